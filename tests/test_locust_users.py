"""`CeleryUser` and `ArrivalUser` in somebody's own locustfile, against a worker that runs already."""

import csv
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL
from support import locusts

LOCUSTFILE = """
import json, time
from locust import constant, events, task
from celery_alchemy.loadtests import ArrivalUser, CeleryUser

PREFIX = "celery_alchemy.loadtests.tasks.workloads."
TARGET = json.loads({target!r})

class Reader(CeleryUser):
    broker_url, reply_url, queue = TARGET
    task_name = PREFIX + "select"
    task_args = (7,)

class Teller(CeleryUser):
    broker_url, reply_url, queue = TARGET
    wait_time = constant(0.01)

    def context(self):
        return {{"who": "teller"}}

    @task(3)
    def transfer(self):
        ended = self.run_task(PREFIX + "transfer", [5], label="move money")
        assert ended.final.outcome == "success"

    @task
    def fail(self):
        assert self.run_task(PREFIX + "transfer", label="wrong call").final.error_type == "TypeError"

class Visitor(ArrivalUser):
    broker_url, reply_url, queue = TARGET
    task_name = PREFIX + "slow_io"
    task_args = (1,)
    rate = 50.0

class Lost(CeleryUser):
    queue = "nowhere"
    task_name = "x"

class Unanswered(CeleryUser):
    broker_url, reply_url, queue = [*TARGET[:2], "nobody-consumes"]
    task_name = "x"
    reply_timeout_s = 0.5

out = open({out!r}, "a")

@events.request.add_listener
def on_request(request_type, name, response_time, exception, context, **_):
    seen = dict(context, ended=time.time())
    out.write(json.dumps([request_type, name, response_time, repr(exception) if exception else None, seen]) + "\\n")
    out.flush()
"""


@pytest.fixture(scope="module")
def bank(postgresql_server: URL) -> Iterator[locusts.Bank]:
    with locusts.bank(postgresql_server) as found:
        yield found


class Seen:
    """A run of this locustfile: what it printed, and the `request` events it fired."""

    def __init__(self, bank: locusts.Bank, directory: Path, *arguments: str) -> None:
        environment, out = bank.environment, directory / "requests.jsonl"
        target = json.dumps([environment.broker_url, environment.reply_url, environment.queue])
        (directory / "locustfile.py").write_text(LOCUSTFILE.format(target=target, out=str(out)))
        self.done = locusts.locust(
            *("--headless", "--only-summary", "-u", "4", "-r", "4", "-t", "6s", "--csv", "run", "--json-file", "run"),
            *arguments,
            cwd=directory,
        )
        self.output = self.done.stdout
        lines = out.read_text().splitlines() if out.exists() else []
        self.requests: list[list[Any]] = [json.loads(line) for line in lines]
        with (directory / "run_stats.csv").open(newline="") as file:
            self.csv = {(row["Type"], row["Name"]): row for row in csv.DictReader(file)}
        path = directory / "run.json"
        self.stats = {entry["method"]: entry for entry in json.loads(path.read_text())} if path.exists() else {}


def test_a_few_lines_are_enough_and_each_task_is_one_request(bank: locusts.Bank, tmp_path: Path) -> None:
    seen = Seen(bank, tmp_path, "Reader")
    assert seen.done.returncode == 0, seen.output
    name = "celery_alchemy.loadtests.tasks.workloads.select"
    assert seen.requests
    assert {tuple(request[:2]) for request in seen.requests} == {("celery", name)}
    assert max(Counter(request[4]["task_id"] for request in seen.requests).values()) == 1
    assert {request[4]["attempts"] for request in seen.requests} == {1}
    for _, _, milliseconds, exception, context in seen.requests:
        assert exception is None
        assert isinstance(milliseconds, float)
        assert 0 < context["queue"] + context["run"] <= milliseconds + 0.01
        assert 0 < context["database"] <= context["run"]
    assert {method: entry["num_requests"] for method, entry in seen.stats.items()} == dict.fromkeys(
        ("celery", "queue", "run", "checkout", "database"), len(seen.requests)
    )
    # The file is some moments older than the end, on a busy machine as old as the start. With rows of phases the sum
    # would be several times as much.
    assert int(seen.csv["", "Aggregated"]["Request Count"]) <= len(seen.requests)


def test_percentiles_have_three_digits(bank: locusts.Bank, tmp_path: Path) -> None:
    seen = Seen(bank, tmp_path, "Reader")
    ordered = sorted(request[2] for request in seen.requests)
    line = next(line for line in seen.output.splitlines() if line.startswith("celery_alchemy.") and " latency " in line)
    number, *shown = (float(cell) for cell in line.split()[2:])
    assert number == len(ordered)
    assert shown[-1] == round(ordered[-1], 2)
    for percent, value in zip((50, 95, 99), shown, strict=False):
        # Locust's rank is the nearest one, or the next.
        rank = math.ceil(len(ordered) * percent / 100) - 1
        near = (ordered[rank], ordered[min(rank + 1, len(ordered) - 1)])
        assert any(value == pytest.approx(one, rel=0.006, abs=0.01) for one in near), (value, near)
    # Locust's own statistics: three significant digits, where it had whole milliseconds.
    buckets = {float(value) for value in seen.stats["celery"]["response_times"]}
    assert buckets <= {float(f"{value:.3g}") for value in ordered} | {round(value, 2) for value in ordered}
    finer = [value for value in ordered if not float(f"{value:.3g}").is_integer()]
    assert any(not value.is_integer() for value in buckets) == bool(finer)


def test_tasks_of_a_locustfile_run_with_labels_contexts_and_failures(bank: locusts.Bank, tmp_path: Path) -> None:
    seen = Seen(bank, tmp_path, "Teller", "--fail-ratio", "0.9")
    assert seen.done.returncode == 0, seen.output
    names = Counter(request[1] for request in seen.requests)
    assert set(names) == {"move money", "wrong call"}
    assert {request[4]["who"] for request in seen.requests} == {"teller"}
    for _, name, _, exception, _ in seen.requests:
        assert (exception is None) == (name == "move money")
        assert exception is None or exception.startswith('TaskFailed("TypeError: ')
    assert f"{names['move money']} of {len(seen.requests)} tasks succeeded" in seen.output
    # One error, however many tasks: Locust keeps every different one. Not from its file, which it writes now and then.
    assert len({exception for *_, exception, _ in seen.requests if exception is not None}) == 1


def test_arrivals_do_not_wait_for_the_worker(bank: locusts.Bank, tmp_path: Path) -> None:
    """A user that waits would send nothing between a task and its answer; this one's tasks are side by side."""
    seen = Seen(bank, tmp_path, "Visitor", "-u", "1", "-t", "12s")  # a busy machine may send few at first
    assert seen.done.returncode == 0, seen.output
    ended = sorted(request[4]["ended"] for request in seen.requests)
    began = sorted(one["ended"] - (one["queue"] + one["run"]) / 1000 for *_, one in seen.requests)
    assert any(later < earlier for later, earlier in zip(began[1:], ended, strict=False)), seen.requests[:20]
    assert len(seen.requests) <= 600 + 6 * 600**0.5
    assert {request[3] for request in seen.requests} == {None}


def test_a_user_class_without_a_broker_says_so(bank: locusts.Bank, tmp_path: Path) -> None:
    seen = Seen(bank, tmp_path, "Lost")
    assert "Lost.broker_url is not set, nor is its `app`." in seen.output
    assert seen.requests == []


def test_a_task_without_an_answer_has_failed(bank: locusts.Bank, tmp_path: Path) -> None:
    seen = Seen(bank, tmp_path, "Unanswered")
    assert seen.done.returncode == 1
    assert len(seen.requests) >= 4
    assert {request[3] for request in seen.requests} == {"TaskUnanswered('')"}
