"""How prefork's main process asks its pool processes: whatever TMPDIR is, and whoever else writes where it looks."""

import contextlib
import os
import signal
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.databases import PostgreSQL
from support.waiting import eventually
from support.worker import Site, Worker, running

from celery_alchemy.strategies.watching.pool_processes import REPORT, PoolProcesses


def answer(question: bytes) -> dict[str, Any]:
    return {"asked": question.decode()}


@pytest.fixture
def asking() -> Iterator[PoolProcesses]:
    processes = PoolProcesses()
    yield processes
    processes.close()


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory for temporary files, of this test alone; pytest's own may be too deep for a socket in it."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        inner = Path(folder) / "t"
        inner.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(inner))
        yield inner


def ending(question: bytes) -> dict[str, Any]:
    os._exit(0)


def come_in(processes: PoolProcesses, address: str | None) -> list[dict[str, Any]]:
    """Answer, as a spawned pool process does, and return what is heard of it."""
    assert address is not None
    processes.come_in(address, answer)
    return processes.ask(REPORT)


def test_only_this_user_may_enter(asking: PoolProcesses, temporary: Path) -> None:
    address = asking.open_door()
    assert come_in(asking, address) == [{"pid": os.getpid(), "asked": "report\n"}]
    (folder,) = temporary.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    asking.close()
    assert [*temporary.iterdir()] == []


def test_two_workers_that_share_a_directory_leave_each_other_alone(asking: PoolProcesses, temporary: Path) -> None:
    """Two containers have the same process ids, too."""
    other = PoolProcesses()
    first, second = asking.open_door(), other.open_door()
    assert first != second
    other.close()
    assert len(come_in(asking, first)) == 1


def test_files_and_links_that_were_there_before_are_not_followed(asking: PoolProcesses, temporary: Path) -> None:
    elsewhere = temporary.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "ask").write_text("of somebody else")
    for name in ("celery-alchemy", f"celery-alchemy-{os.getpid()}", "ask"):
        (temporary / name).symlink_to(elsewhere)
    assert len(come_in(asking, asking.open_door())) == 1
    asking.close()
    assert (elsewhere / "ask").read_text() == "of somebody else"
    assert len([*temporary.iterdir()]) == 3


def test_a_link_for_a_directory_will_do(
    asking: PoolProcesses, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = temporary.parent / "link"
    link.symlink_to(temporary)
    monkeypatch.setattr(tempfile, "tempdir", str(link))
    assert len(come_in(asking, asking.open_door())) == 1


@pytest.mark.parametrize("place", ["missing", "a file", "no files there", "too long"])
def test_where_there_can_be_no_socket_it_does_without(
    asking: PoolProcesses, temporary: Path, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    names = {"missing": "missing", "a file": "file", "no files there": "/proc/self/task", "too long": "x" * 100}
    folder = temporary / names[place]
    (temporary / "file").touch()
    (temporary / names["too long"]).mkdir()
    tempfile.tempdir = str(folder)  # the fixture sets it back
    assert asking.open_door() is None
    assert "will show no spawned pool process" in caplog.text
    assert asking.ask(REPORT) == []
    assert [*(temporary / names["too long"]).iterdir()] == []


@pytest.mark.parametrize("said", [b"nonsense\n", b"[]\n", b'{"pid": "no"}\n', b"{}\n", b'{"pid": 1', b"\xff\n", b"\n"])
def test_an_answer_that_is_none_costs_that_answer(asking: PoolProcesses, said: bytes) -> None:
    address = asking.open_door()
    assert len(come_in(asking, address)) == 1
    assert address is not None
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(address)
        asking._let_in()
        theirs = asking._sockets[-1]
        ask_one = asking._send

        def send(one: socket.socket, question: bytes) -> bool:
            sent = ask_one(one, question)
            if one is theirs:
                stranger.sendall(said)
                stranger.shutdown(socket.SHUT_WR)
            return sent

        asking._send = send  # type: ignore[method-assign]
        heard = asking.ask(REPORT)
    assert heard == [{"pid": os.getpid(), "asked": "report\n"}]
    assert len(asking.ask(REPORT)) == 1


def test_a_pool_process_that_ends_meanwhile_is_left_out(asking: PoolProcesses) -> None:
    children = []
    for ends in (False, True):
        asking.before_fork()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                asking.in_child(ending if ends else answer)
                signal.pause()  # the test ends it
            os._exit(1)
        children.append(child)
    try:
        for _ in range(2):  # on a busy machine an answer may come too late for the question
            eventually(lambda: [one["pid"] for one in asking.ask(REPORT)] == children[:1], "the living one answers")
    finally:
        os.kill(children[0], 9)
        for child in children:
            os.waitpid(child, 0)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_worker_starts_whatever_tmpdir_is(
    site: Site, run_database: PostgreSQL, tmp_path: Path, key: str, method: str
) -> None:
    """A link to a directory whose name is too long for a socket: forked pool processes need none, and answer."""
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    (folder / "celery-alchemy-0").symlink_to("/")
    name = f"tmpdir-{method}-{key[:8]}"
    worker = Worker(
        site, name, "prefork", database_url=run_database.url(name), modules=("endings", "observed"),
        own=True, environment={"TMPDIR": str(tmp_path / "link" if method == "fork" else folder)},
        arguments=["--pool-start-method", method] if method == "spawn" else [],
    )  # fmt: skip
    with running(worker):
        assert worker.call("server_pid").state == "SUCCESS"
        pids = [process["pid"] for process in worker.inspect("sessions")["processes"]]
        if method == "fork":
            eventually(lambda: len(worker.inspect("sessions")["processes"]) == 2, "both answer")
        else:
            assert pids == []
            assert "will show no spawned pool process" in worker.log()
    assert [one.name for one in folder.iterdir() if "alchemy" in one.name] == ["celery-alchemy-0"]
