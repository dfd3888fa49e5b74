"""`celery alchemy faults` and `celery alchemy soak`: small runs of them, and what they make of their numbers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from celery_alchemy.loadtests.bench.runs import command_line
from celery_alchemy.loadtests.faults import place
from celery_alchemy.loadtests.faults.commands import Cell, Result, cells, markdown
from celery_alchemy.loadtests.faults.place import FAULTS, Damage
from celery_alchemy.loadtests.faults.soak import MOST_PER_TASK, Sample, Soak
from celery_alchemy.loadtests.faults.soak import soak as run_soak
from celery_alchemy.loadtests.faults.tasks import SURELY
from celery_alchemy.loadtests.services.harness import services


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "celery", "alchemy", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.timeout(320)
def test_a_fault_is_caused_and_counted(tmp_path: Path) -> None:
    """A hand-written pattern fails a task on a connection that died while it was idle; ours takes no damage."""
    done = run("faults", "--pools", "solo", "--faults", "idle", "--side-by-side", "3", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads((tmp_path / "faults.json").read_text())
    damage = {
        (found["cell"]["pattern"], found["cell"]["strategy"]): found["damage"] | {"failed": found["failed"]}
        for found in facts["results"]
    }
    assert len(damage) == 11
    nothing = {"lost": 0, "wrong": 0, "leaked": 0, "stuck": 0, "needless": 0, "failed": ""}
    for (pattern, _), found in damage.items():
        assert found.pop("tasks") > 0
        if pattern.startswith("celery-alchemy"):
            assert found == nothing
    assert damage["with_session", ""]["needless"] > 0
    page = (tmp_path / "faults.md").read_text()
    assert "## idle" in page
    assert "| celery-alchemy (local) | · | · | · | · | · | · |" in page


@pytest.mark.timeout(320)
def test_a_message_that_comes_three_times(tmp_path: Path) -> None:
    """Patterns written by hand do its work each time; with exactly_once, ours does it once."""
    done = run("faults", "--pools", "threads", "--faults", "twice", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    wrong: dict[str, set[int]] = {}
    for found in json.loads((tmp_path / "faults.json").read_text())["results"]:
        assert found["failed"] == ""
        wrong.setdefault(found["cell"]["pattern"], set()).add(found["damage"]["wrong"])
    assert wrong.pop("celery-alchemy") == wrong.pop("celery-alchemy-async") == {0}
    assert all(numbers == {8} for name, numbers in wrong.items() if name != "recipe")


@pytest.mark.timeout(120)
def test_tasks_that_are_retried_for_ever_are_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each retry is an answer, so waiting for the next answer would never end: no server listens any more."""
    monkeypatch.setattr(place, "LONGEST_S", 3.0)
    with services() as found, place.place(found, "threads", "with_session") as here:
        here.proxy.refuse()
        tasks = here.send(SURELY, 2)
        here.wait(tasks)
        assert all(task.replies for task in tasks)
        assert not any(task.final for task in tasks)


def test_a_password_is_not_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page of the faults and the file of a run name the command."""
    words = [
        "celery",
        "alchemy",
        "faults",
        "--database-url",
        "postgresql://u:secret@h/d",
        "--broker-url=redis://:secret@h",
    ]
    monkeypatch.setattr(sys, "argv", words)
    assert command_line() == "celery alchemy faults --database-url ... --broker-url=..."


def test_a_fault_that_is_not_known() -> None:
    done = run("faults", "--faults", "earthquake")
    assert done.returncode == 2
    assert "'earthquake' is not a fault." in done.stderr


def test_cells() -> None:
    found = list(cells(["prefork", "gevent"], ["forked", "idle"]))
    assert {cell.pool for cell in found if cell.fault == "forked"} == {"prefork"}
    assert len(found) == 11 + (11 + 8)
    assert set(FAULTS) >= {cell.fault for cell in found}


def test_a_cell_that_could_not_be_run_is_no_success() -> None:
    cell = Cell("solo", "celery-alchemy", "local", "idle")
    page = markdown([Result(cell, Damage(), "the worker did not start")], command="x", about=[])
    assert "- idle, solo, celery-alchemy (local): the worker did not start" in page


def test_words() -> None:
    assert str(Damage(tasks=9)) == "none"
    assert str(Damage(lost=1) + Damage(lost=2, stuck=1)) == "3 lost, 1 stuck"


@pytest.mark.timeout(320)
def test_a_short_soak(tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    done = run("soak", "--pools", "threads", "--tasks", "400", "--out", str(out))
    (found,) = json.loads(out.read_text())
    assert (found["pool"], found["tasks"], found["failed"]) == ("threads", 400, 0), done.stdout + done.stderr
    assert {sample["sessions"] for sample in found["samples"]} == {1}
    assert {sample["connections"] <= 8 for sample in found["samples"]} == {True}
    assert all(sample["memory_bytes"] > 1e6 and sample["objects"] > 1000 for sample in found["samples"])


def soak(*, memory: float = 0, objects: float = 0, sessions: float = 0, connections: float = 0) -> Soak:
    samples = [
        Sample(
            tasks, int(5e7 + memory * tasks), int(4 + connections * tasks), int(1 + sessions * tasks),
            int(100_000 + objects * tasks),
        )
        for tasks in range(1000, 41_000, 1000)
    ]  # fmt: skip
    return Soak("threads", 40_000, 60.0, 0, samples)


@pytest.mark.parametrize(("field", "name"), [("memory_bytes", "memory"), ("objects", "objects")])
def test_what_grows_steadily(field: str, name: str) -> None:
    """One object that each tenth task leaves is found, whatever memory does."""
    most = MOST_PER_TASK[field]
    assert soak(**{name: most * 1.1}).grows == [field]
    assert soak(**{name: most / 2}).grows == []
    assert soak(**{name: most / 2}).slope(field)[0] == pytest.approx(most / 2)


def test_what_grows_at_all() -> None:
    assert soak().grows == []
    assert soak(sessions=0.001, connections=0.001).grows == ["connections", "sessions"]


@pytest.mark.timeout(120)
def test_a_soak_tells_of_each_sample() -> None:
    """One that is ended early has written down what it has seen."""
    told: list[tuple[int, int]] = []
    with services() as given:
        run_soak(given, "solo", "", (20, 40), lambda so_far: told.append((so_far.tasks, len(so_far.samples))))
    assert told == [(20, 1), (40, 2)]
