"""`locust -f loadtests/locustfile.py`: services and a worker for the run, checked and gone at its end."""

import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import URL
from support import locusts

QUICK = ("-u", "4", "-r", "4", "-t", "2s", "--worker-pool", "threads")
BAD_ARGUMENTS = {
    "--worker-pool gvent": "'gvent' is not a worker pool. Did you mean 'gevent'?",
    "--strategy scopd": "'scopd' is not a session strategy. Did you mean 'scoped'?",
    "--workload tranfer": "'tranfer' is not a workload. Did you mean 'transfer'?",
    "--pattern nul_pool": "'nul_pool' is not a pattern. Did you mean 'null_pool'?",
    "--pattern process_init --worker-pool threads": "makes no sense with --worker-pool threads: use prefork or solo.",
    "--pattern recipe --strategy scoped": "--strategy is celery-alchemy's: the pattern recipe has none.",
    "--concurrency 0": "0 is not in the range 1<=x<=256.",
    "--rate 0": "0.0 is not in the range x>0.",
    "--fail-ratio 2": "2.0 is not in the range 0<=x<=1.",
    "--args 1": "'1' is not a JSON list, such as '[1]'.",
    "--app shop": "--app needs --task",
    "--task shop.pay": "--task needs --app",
    "--app shop --task shop.pay --workload mix": "--workload cannot be combined with --app",
    "--app no_such_module --task x": "'no_such_module' cannot be imported",
    "--database-url sqlite://": "DATABASE_URL begins with 'sqlite'",
}


@pytest.fixture
def database_url(postgresql_server: URL) -> str:
    return postgresql_server.render_as_string(hide_password=False)


def run(database_url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return locusts.locust(
        "-f", str(locusts.LOCUSTFILE), "--headless", "--only-summary", "--database-url", database_url, *arguments
    )


def exact(output: str, name: str, phase: str) -> dict[str, float]:
    """Return a line of the table of exact percentiles."""
    line = next(line for line in output.splitlines() if line.startswith(f"{name} {phase} "))
    return dict(zip(("n", "p50", "p95", "p99", "max"), map(float, line.split()[2:]), strict=True))


def children(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def test_a_closed_run_checks_what_it_left_and_ends_with_code_0(database_url: str, tmp_path: Path) -> None:
    done = run(database_url, *QUICK, "--workload", "mix", "--csv", str(tmp_path / "run"))
    assert done.returncode == 0, done.stdout
    assert "ok     every successful task has exactly its ledger lines" in done.stdout
    assert "ok     every task wrote in a transaction of its own" in done.stdout
    assert "BROKEN" not in done.stdout
    rows = {row["Name"]: row for row in read_csv(tmp_path / "run_stats.csv") if row["Type"] in {"celery", ""}}
    phases = {row["Type"] for row in read_csv(tmp_path / "run_stats.csv") if row["Name"] == "mix"}
    assert phases == {"celery", "queue", "run", "checkout", "database"}
    # The phases are rows of their own, but no requests.
    assert rows["Aggregated"]["Request Count"] == rows["mix"]["Request Count"]
    assert rows["Aggregated"]["Failure Count"] == "0"
    assert f"of {rows['mix']['Request Count']} tasks succeeded" in done.stdout


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_arrivals_come_at_the_rate_however_many_users_share_it(database_url: str) -> None:
    done = run(database_url, *QUICK, "--workload", "select", "--rate", "40")
    assert done.returncode == 0, done.stdout
    # 80 on average in 2 s, with a standard deviation of 9; fewer where Locust has to wait for a processor. With the
    # whole rate each the four would send 320.
    assert 20 < exact(done.stdout, "select", "latency")["n"] <= 150


def test_each_threshold_that_is_not_kept_is_named_and_gives_code_3(database_url: str) -> None:
    limits = ("--fail-p95", "0.01", "--fail-p99", "60000", "--fail-goodput", "1000000", "--fail-ratio", "0")
    done = run(database_url, *QUICK, *limits)
    assert done.returncode == 3, done.stdout
    assert re.search(r"--fail-p95: the p95 latency is \d+\.\d\d ms; the limit is 0.01 ms\.", done.stdout)
    assert re.search(r"--fail-goodput: [\d.]+ successful tasks per second; the limit is 1e\+06\.", done.stdout)
    assert "--fail-p99:" not in done.stdout
    assert "--fail-ratio:" not in done.stdout


def test_kept_thresholds_give_code_0(database_url: str) -> None:
    done = run(database_url, *QUICK, "--fail-p95", "60000", "--fail-ratio", "0", "--fail-goodput", "0.1")
    assert done.returncode == 0, done.stdout


def test_a_broken_invariant_gives_code_1_whatever_the_thresholds(database_url: str) -> None:
    """One Session for all threads: errors, or another task's transaction; and the worker says whose Session it was."""
    done = run(database_url, *QUICK, "--pattern", "global_session", "--fail-goodput", "1000000", "--reply-timeout", "3")
    assert done.returncode == 1, done.stdout
    assert "BROKEN every task had a Session of its own" in done.stdout
    assert "--fail-goodput:" in done.stdout


@pytest.mark.parametrize("arguments", BAD_ARGUMENTS)
def test_bad_arguments_are_refused_in_one_sentence(arguments: str) -> None:
    done = locusts.locust("-f", str(locusts.LOCUSTFILE), "--headless", "-t", "1s", *arguments.split())
    assert done.returncode == 2
    said = [line for line in done.stdout.splitlines() if "/INFO/" not in line]
    assert len(said) == 1, done.stdout
    assert BAD_ARGUMENTS[arguments] in said[0]


def test_several_processes_share_the_load_and_the_master_knows_all_of_it(database_url: str) -> None:
    done = run(database_url, *QUICK, "--processes", "2", "--json")
    assert done.returncode == 0, done.stdout
    assert "spawn jobs of 4 users at 4.00 spawn rate to 2 ready workers" in done.stdout
    assert "2 workers connected" in done.stdout
    # Had they read each other's replies, tasks would be unanswered; had the master missed a report, rows would be left.
    assert "ok     every task was answered" in done.stdout
    assert "; 0 unanswered." in done.stdout
    assert "not checked" not in done.stdout
    found = exact(done.stdout, "transfer", "latency")
    [entry] = [entry for entry in stats_of(done.stdout) if entry["method"] == "celery"]
    assert found["n"] == entry["num_requests"]
    assert found["max"] == pytest.approx(entry["max_response_time"], abs=0.01)
    buckets = sorted(map(float, entry["response_times"]))
    # Three significant digits: whole milliseconds are the finest from 100 ms on.
    assert any(not bucket.is_integer() or bucket >= 100 for bucket in buckets), "they did not use the finer buckets"


def stats_of(output: str) -> list[dict[str, Any]]:
    start = output.index("\n[\n")
    found: list[dict[str, Any]] = json.JSONDecoder().raw_decode(output[start + 1 :])[0]
    return found


def test_a_master_and_two_workers_started_by_hand_find_each_other(database_url: str, tmp_path: Path) -> None:
    """As on machines of their own: each generator reads its own replies, and the master judges what all have sent."""
    port = str(free_port())
    where = ("-f", str(locusts.LOCUSTFILE), "--master-port", port, "--worker", "--master-host", "127.0.0.1")
    with locusts.running_locust(*where) as one, locusts.running_locust(*where) as other:
        asked = ("--master", "--master-bind-port", port, "--expect-workers", "2", "--csv", str(tmp_path / "run"))
        done = run(database_url, *QUICK, *asked, "--fail-ratio", "0", "--fail-goodput", "0.01")
        assert (one.wait(20), other.wait(20)) == (0, 0)
    assert done.returncode == 0, done.stdout
    assert "2 workers connected" in done.stdout
    assert "ok     every task was answered\n" in done.stdout
    assert "ok     every successful task has exactly its ledger lines\n" in done.stdout
    found = exact(done.stdout, "transfer", "latency")
    assert f"{found['n']:.0f} of {found['n']:.0f} tasks succeeded" in done.stdout


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def stop_signal(request: pytest.FixtureRequest) -> signal.Signals:
    return request.param


def test_a_stopped_or_killed_locust_leaves_nothing_behind(database_url: str, stop_signal: signal.Signals) -> None:
    where = ("-f", str(locusts.LOCUSTFILE), "--headless", "--only-summary", "-u", "4", "-r", "4")
    with locusts.running_locust(*where, "--database-url", database_url, "--worker-pool", "prefork") as process:
        locusts.wait_for_line(process, "All users spawned")
        below = children(process)
        assert any("celery" in " ".join(child.cmdline()) for child in below)
        os.kill(process.pid, stop_signal)
        output, _ = process.communicate(timeout=250)
        assert process.returncode == (-signal.SIGKILL if stop_signal is signal.SIGKILL else 0), output
        _, left = psutil.wait_procs(below, timeout=30)
        assert [child for child in left if child.status() != psutil.STATUS_ZOMBIE] == []


def test_importing_the_load_tests_imports_neither_locust_nor_gevent() -> None:
    program = """
import sys
import celery_alchemy.loadtests
from celery_alchemy.loadtests.client import serve
assert not {"locust", "gevent"} & set(sys.modules), "imported"
assert sorted(celery_alchemy.loadtests.__all__) == ["ArrivalUser", "CeleryUser"]
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=250)
