"""A network of its own between a worker and its database, that can vanish without a word (Linux, as root)."""

import contextlib
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import URL

from support.worker import TESTS, stop_process

NEAR, FAR = "10.203.{}.1", "10.203.{}.2"


class FarNetwork:
    """A network namespace in which a proxy forwards to the database's Unix socket."""

    def __init__(self, name: str, near: str, url: URL) -> None:
        self._name = name
        self._near = near
        self.url = url
        """The URL of the database by way of this network."""

    def vanish(self) -> None:
        """Drop every packet on its way back: nothing is refused, nothing is reset, nothing is acknowledged."""
        ip("-n", self._name, "route", "add", "blackhole", f"{self._near}/32")

    def come_back(self) -> None:
        ip("-n", self._name, "route", "del", "blackhole", f"{self._near}/32")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def far_network(database: URL, socket_directory: str, port: int, folder: Path) -> Iterator[FarNetwork]:
    """Make the network for the time of a block; skip where this user may not."""
    name = f"ca{uuid.uuid4().hex[:8]}"
    number = os.getpid() % 250 + 1
    near, far = NEAR.format(number), FAR.format(number)
    if shutil.which("ip") is None:
        pytest.skip("no `ip` here (iproute2), so no network that can vanish")
    try:
        ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespace here: {error.stderr.strip()}")
    with contextlib.ExitStack() as stack:
        stack.callback(ip, "netns", "del", name)
        try:
            ip("link", "add", f"{name}n", "type", "veth", "peer", "name", f"{name}f", "netns", name)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no virtual Ethernet here: {error.stderr.strip()}")
        # A namespace lives on while a socket of it does, and so does this end of the wire, with the next one's address.
        stack.callback(ip, "link", "del", f"{name}n")
        ip("addr", "add", f"{near}/30", "dev", f"{name}n")
        ip("link", "set", f"{name}n", "up")
        ip("-n", name, "addr", "add", f"{far}/30", "dev", f"{name}f")
        ip("-n", name, "link", "set", f"{name}f", "up")
        socket_url = database.set(host=None, port=port).update_query_dict({"host": socket_directory})
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "scripts.far_proxy", far]
        command.append(socket_url.render_as_string(hide_password=False))
        log = stack.enter_context((folder / "far.log").open("wb"))
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, cwd=TESTS, start_new_session=True)
        stack.callback(stop_process, process)
        assert process.stdout is not None
        stack.callback(process.stdout.close)
        said = process.stdout.readline()
        assert said, f"the proxy did not start: {(folder / 'far.log').read_text()}"
        yield FarNetwork(name, near, database.set(host=far, port=int(said)))
