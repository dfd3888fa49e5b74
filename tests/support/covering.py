"""The two sizes of the suite: which tests are in the covering set, and which only the full run has.

The covering set (`make test`) meets each worker pool, strategy, driver, broker and ending, but not each pair of them.
Two rules make it, both here: tests that take long are listed by name, and of a test with parameters the covering set
has the fewest combinations that hold each value of each parameter. A contract test counts once for each ending or
other case, so each case meets every worker pool and every strategy.
"""

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

#: Pairs of strategy and worker pool whose workers the covering set starts: those `auto` chooses among them, and
#: prefork, the default of Celery, with every strategy. One pair of each worker pool holds every strategy.
PAIRS = {
    "prefork": ("per_process", "local", "scoped", "per_loop"),
    "threads": ("scoped", "per_loop"),
    "asyncio": ("per_loop", "scoped"),
    "gevent": ("scoped",),
    "eventlet": ("local",),
    "solo": ("per_process", "per_loop"),
}

#: Tests and modules that only the full run has: they take long, and what they prove breaks seldom, or shows elsewhere.
FULL_RUN_ONLY = frozenset(
    {
        # Whole runs of `celery alchemy bench`, `faults` and `soak`, and of Locust; the gates themselves.
        "first_statement/test_where.py::test_tasks_behind_pgbouncer",
        "test_bench_report.py::test_the_terminal_shows_no_number_of_a_broken_arm",
        "test_bench_runs.py::test_a_driver_that_blocks_the_hub_is_refused",
        "test_bench_runs.py::test_a_killed_run_leaves_nothing_behind",
        "test_bench_runs.py::test_a_sweep_finds_the_rate_that_keeps_the_objective",
        "test_bench_runs.py::test_a_task_of_the_users_own",
        "test_bench_runs.py::test_a_task_of_the_users_own_that_fails_is_broken",
        "test_bench_runs.py::test_an_interrupted_run_leaves_nothing_behind_and_goes_on",
        "test_bench_runs.py::test_broken_patterns_are_caught_and_get_no_speed",
        "test_bench_runs.py::test_the_recipe_leaks_its_session_when_a_task_is_retried_under_prefork",
        "test_bench_runs.py::test_a_demo_counts_the_orders_of_the_recipe_and_of_ours",
        "test_counts.py::test_a_walk_that_finds_nothing_is_no_short_one",
        "test_doctor_static.py::test_the_command",
        "exactly_once/test_killed_with_outbox.py",
        "exactly_once/test_once_kills.py",
        "exactly_once/test_once_storm.py",
        "test_loadtest_faults.py::test_a_message_that_comes_three_times",
        "async_faults/test_memory.py",
        "asyncio_pool/test_servers_that_hang.py::test_a_broker_that_hangs_while_tasks_publish",
        "async_drivers/test_silent_servers.py",
        "test_locust_run.py::test_a_master_and_two_workers_started_by_hand_find_each_other",
        "test_loadtest_patterns.py::test_another_framework_does_the_same_work_on_the_same_queue",
        "test_loadtest_profiles.py::test_a_mariadb_of_the_runs_own",
        "test_typing.py::test_all_that_is_public_has_a_type",
        "test_typing.py::test_pyright_knows_them_too",
        "test_typing.py::test_the_examples_are_typed",
        "test_connection_pool.py::test_a_worker_pool_that_grows_announces_its_connections_anew",
        "test_counts.py::test_a_listener_on_each_statement_is_caught",
        "test_counts.py::test_a_regression_is_an_exit_code",
        "test_counts.py::test_instructions_are_the_same_on_every_run",
        "test_examples.py::test_two_databases",
        "test_fork_sqlite.py::test_an_engine_that_nobody_told_of",
        "test_fork_workers.py::test_replaced_after_each_task",
        "test_loadtest_faults.py::test_a_fault_is_caused_and_counted",
        "test_loadtest_faults.py::test_a_short_soak",
        "test_loadtest_faults.py::test_tasks_that_are_retried_for_ever_are_not_waited_for_for_ever",
        "test_loadtest_patterns.py::test_a_baseline_is_right_where_its_users_rely_on_it",
        "test_loadtest_patterns.py::test_all_patterns_register_the_same_tasks_and_only_ours_has_an_alchemy",
        "test_loadtest_patterns.py::test_preflight_tells_whether_the_driver_blocks_the_hub",
        "test_loadtest_round_trips.py::test_a_task_costs_what_its_statements_and_its_transaction_cost",
        "test_loadtest_round_trips.py::test_our_pattern_spares_the_second_rollback_of_mariadb",
        "test_loadtest_workloads.py::test_a_users_worker_answers_for_tasks_with_the_header_only",
        "test_loadtest_workloads.py::test_connections_are_promised_for_baselines_too",
        "test_locust_app.py::test_a_worker_that_has_loaded_the_replies_needs_no_events",
        "test_locust_app.py::test_an_unknown_task_is_refused_with_what_the_worker_knows",
        "test_locust_app.py::test_events_are_switched_on_for_the_run_and_off_again",
        "test_locust_app.py::test_events_that_were_on_stay_on",
        "test_locust_app.py::test_failures_come_back_with_their_class",
        "test_locust_app.py::test_without_a_worker_the_run_is_refused",
        "test_locust_generator.py::test_a_wrong_command_is_answered_and_the_process_goes_on",
        "test_locust_generator.py::test_arms_are_closed_and_opened_again",
        "test_locust_generator.py::test_arrivals_show_a_stall_of_the_worker",
        "test_locust_generator.py::test_no_more_tasks_are_in_flight_than_there_are_users",
        "test_locust_generator.py::test_numbers_are_never_used_twice_and_nothing_is_in_flight_between_slices",
        "test_locust_run.py::test_a_broken_invariant_gives_code_1_whatever_the_thresholds",
        "test_locust_run.py::test_a_stopped_or_killed_locust_leaves_nothing_behind",
        "test_locust_run.py::test_arrivals_come_at_the_rate_however_many_users_share_it",
        "test_locust_run.py::test_each_threshold_that_is_not_kept_is_named_and_gives_code_3",
        "test_locust_run.py::test_kept_thresholds_give_code_0",
        "test_locust_run.py::test_several_processes_share_the_load_and_the_master_knows_all_of_it",
        "test_locust_users.py::test_a_few_lines_are_enough_and_each_task_is_one_request",
        "test_locust_users.py::test_a_task_without_an_answer_has_failed",
        "test_locust_users.py::test_a_user_class_without_a_broker_says_so",
        "test_locust_users.py::test_arrivals_do_not_wait_for_the_worker",
        "test_mistakes.py::test_celery_multi_says_it_in_the_log",
        "test_outbox_run.py::test_a_signal_ends_it_and_nothing_is_sent_twice",
        "test_outbox_sending.py::test_routes_priorities_and_headers_are_as_given",
        "test_plugin.py::test_the_alchemy_is_found_or_asked_for",
        # Two workers for each small project: as it stands, and rewritten.
        "adopting/test_adopting.py::test_under_a_worker",
        # Faults at many moments.
        "faults/test_contention.py",
        "faults/test_hostile_settings.py",
        "faults/test_interrupts.py::test_soft_limit_anywhere",
        "faults/test_kills.py::test_a_killed_task_is_lost_or_delivered_again_and_finds_clean_data",
        "faults/test_kills.py::test_a_memory_error",
        "faults/test_kills.py::test_a_memory_error_that_ends_the_worker",
        "faults/test_kills.py::test_ended_from_outside_in_the_middle_of_a_statement",
        "faults/test_lost_networks.py::test_a_soft_limit_in_a_statement_that_nobody_answers",
        "faults/test_mariadb_connections.py",
        "faults/test_outbox_kills.py",
        "faults/test_restarts.py",
        "faults/test_shutdowns.py::test_a_main_process_that_is_killed",
        "faults/test_shutdowns.py::test_a_pool_process_for_every_task",
        "faults/test_shutdowns.py::test_cold",
        "faults/test_shutdowns.py::test_soft",
        "test_fork_scenarios.py::test_many_forks",
        "test_outbox.py::test_killed_anywhere",
        "two_phase/test_in_doubt.py::test_interrupted_at_any_moment_both_are_committed_or_none",
        # Workers started in seldom ways.
        "test_fork_workers.py::test_autoscale",
        "test_fork_workers.py::test_hooks_in_the_main_process",
        "test_fork_workers.py::test_pool_restart",
        "test_fork_workers.py::test_spawn",
        "test_fork_workers.py::test_transaction_of_the_main_process",
        "test_plugin.py::test_celerys_own_fixtures",
        "test_plugin.py::test_celerys_worker_in_a_thread",
        "test_plugin.py::test_they_pass_in_several_processes",
        "test_selection.py::test_an_embedded_worker_is_a_worker",
        "test_selection.py::test_the_choice_reaches_spawned_pool_processes",
        "test_selection.py::test_under_autoscale_the_upper_end_counts",
    }
)

#: Values of a parameter that the covering set has of a module or a test: where workers are started for it alone,
#: one of each worker pool costs more than it shows. The contract tests meet all of them.
FEWER: Mapping[str, Mapping[str, Collection[str]]] = {
    "asyncio_pool/test_stopping.py": {"broker_url": ("rabbitmq",)},
    "exactly_once/test_once_workers.py": {"worker": ("await asyncio", "await prefork")},
    "adopting/test_adopting.py::test_rewritten": {
        "shape": (
            *("factory_try_finally", "two_around_slow_work", "options_survive", "called_like_a_function"),
            *("recipe_that_does_more", "scoped_session_of_helpers", "helper_closes", "adopted_self_db"),
        )
    },
    "faults/test_connections.py": {"place": ("prefork",)},
    "faults/test_interrupts.py": {"strategy": ("scoped",)},
    "faults/test_kills.py": {"strategy": ("scoped",)},
    "faults/test_limits.py": {"strategy": ("scoped",), "pool": ("prefork",)},
    "faults/test_limits_in_c.py": {"how": ("sleep",)},
    "faults/test_lost_networks.py": {"pool": ("prefork",), "driver": ("psycopg",)},
    "faults/test_read_only_servers.py": {"pool": ("prefork",)},
    "faults/test_secrets.py::test_a_worker": {"pool": ("prefork",)},
    "test_brokers_and_drivers.py": {
        "setup": (
            "psycopg2-redis-prefork",
            "psycopg2-redis-eventlet",
            "pymysql-redis-gevent",
            "psycopg-rabbitmq-threads",
        )
    },
    "test_celerys_own.py": {
        "worker": ("('prefork', 'none')", "('prefork', 'sentry')", "('threads', 'opentelemetry', 'outbox')")
    },
    "test_connection_pool.py": {"pool": ("threads", "eventlet"), "strategy": ("per_process",)},
    "test_connection_pool.py::test_helpers_of_a_task_are_served_one_after_another": {"pool": ("prefork", "gevent")},
    "test_connection_pool.py::test_a_task_whose_helpers_came_first_is_served": {"pool": ("solo",)},
    "test_examples.py": {"shop": ("fastapi_app", "two_databases")},
    "test_fork_sqlite.py": {"whose": ("url",), "action": ("exit", "close", "read")},
    "test_green_units.py::test_engine_used_before_the_patch": {"driver": ("psycopg",)},
    "test_green_workers.py::test_unpatched_worker_does_not_start": {"how": ("glued", "program")},
    "test_locust_run.py": {"arguments": ("--worker-pool gvent",)},
    "test_outbox.py::test_the_command": {"serve": ("until it is told to stop",)},
    "test_outbox_commands.py": {"pool": ("prefork", "gevent")},
    "test_inspect.py": {"worker": ("prefork", "gevent")},
    "test_loadtest_workloads.py": {"ours": ("prefork", "gevent")},
    "test_observing.py": {"worker": ("prefork", "threads")},
    "test_options.py": {"worker": ("prefork", "eventlet")},
    "test_pgbouncer.py": {"pool": ("prefork", "gevent")},
    "test_plugin.py": {"url": ("sqlite",)},
    "test_pool_processes.py": {"method": ("fork",)},
    "test_read_only.py": {"pool": ("prefork", "eventlet")},
    "reset_on_return/test_reset_workers.py": {"setup": ("psycopg-prefork", "psycopg2-threads", "pymysql-gevent")},
    "test_secrecy.py::test_no_message_shows_a_password": {"password": ("sesame/barley",)},
    "test_selection.py": {"strategy": ("scoped",)},
    "test_several_pools.py": {"pool": ("eventlet",), "method": ("fork",)},
    "test_sqlite.py": {"worker": ("prefork", "threads", "gevent")},
    "test_stale_statements.py": {"pool": ("prefork",)},
    "test_tracing.py::test_opentelemetry_traces_each_statement_once": {"pool": ("prefork", "gevent")},
    "two_phase/test_two_phase.py": {"pool": ("prefork", "gevent")},
}

#: Tells of all tests of the suite, in a run that has collected them: see `listed`.
COLLECTED = pytest.StashKey[Callable[[], list[dict[str, Any]]]]()

#: Parameters that say where a test happens; their values count, not the combination they stand in.
PLACES = frozenset({"strategy", "pool", "driver", "library", "broker", "place", "pattern", "url"})

#: Values of these parameters that need what `make test` does not bring along.
OPTIONAL = frozenset({"pymysql", "mysqldb", "rabbitmq"})


@dataclass(frozen=True, slots=True)
class Case:
    """A test as it was collected: what the choice depends on."""

    module: str
    """Path of its file below `tests`, with slashes."""
    name: str
    """Name of its function."""
    parameters: Mapping[str, Any]
    """Values of its parameters, those of fixtures among them."""
    together: Sequence[Sequence[str]] = ()
    """Names of the parameters whose values one `parametrize` gives together."""

    @property
    def function(self) -> str:
        return f"{self.module}::{self.name}"

    @property
    def contract(self) -> bool:
        """Whether it runs on workers that differ in more than one respect at once."""
        return any(hasattr(value, "pool") for value in self.parameters.values())

    def values(self) -> frozenset[Hashable]:
        """Return what the covering set must have of this test at least once."""
        found: set[Hashable] = set()
        for name, value in self.parameters.items():
            if hasattr(value, "_fields"):
                found.update(zip(value._fields, value, strict=True))
            elif isinstance(value, tuple):
                found.update((name, number, part) for number, part in enumerate(value))
            elif name in PLACES:
                found.add((name, value))
        return frozenset(found) | self.kinds()

    def kinds(self) -> frozenset[Hashable]:
        """Return the values of the parameters that say what happens, not where."""
        rest = {n for n, value in self.parameters.items() if not isinstance(value, tuple) and n not in PLACES}
        groups = [*self.together, *((name,) for name in rest - {name for group in self.together for name in group})]
        named = [tuple(name for name in group if name in rest) for group in groups]
        return frozenset((names, *(repr(self.parameters[name]) for name in names)) for names in named if names)

    def words(self) -> set[str]:
        """Return its values as words, those of a NamedTuple or a tuple one by one."""
        values = [part for v in self.parameters.values() for part in (v if isinstance(v, tuple) else (v,))]
        return {value for value in values if isinstance(value, str)} | {repr(kind) for kind in self.kinds()}

    def optional(self) -> bool:
        """Whether it needs a server or a driver that a machine may lack."""
        return bool(OPTIONAL & self.words())

    def worker(self) -> tuple[Hashable, ...]:
        """Return what tells the hosts apart that the tests of a module share; the pairs' workers run in any case."""
        values = [value for value in self.parameters.values() if isinstance(value, tuple)]
        return tuple(value for value in values if not hasattr(value, "strategy"))


def choose(cases: Sequence[Case]) -> list[bool]:
    """Return for each test whether the covering set has it."""
    groups: dict[Hashable, list[int]] = {}
    for number, case in enumerate(cases):
        if not (case.module in FULL_RUN_ONLY or case.function in FULL_RUN_ONLY or left_out(case)):
            groups.setdefault((case.function, case.kinds() if case.contract else None), []).append(number)
    chosen: set[int] = set()
    started: dict[str, set[tuple[Hashable, ...]]] = {}
    for turn, members in enumerate(groups.values()):
        module = cases[members[0]].module
        picked = cover(turn, {number: cases[number] for number in members}, started.setdefault(module, set()))
        started[module].update(cases[number].worker() for number in picked)
        chosen |= picked
    return [number in chosen for number in range(len(cases))]


def cover(turn: int, cases: Mapping[int, Case], started: Collection[tuple[Hashable, ...]]) -> set[int]:
    """Pick few that hold each value of each parameter; `started` are workers that run anyway, `turn` breaks ties.

    What needs a server that may be absent comes last: where it is absent, nothing but its own tests is skipped.
    """
    order = [*cases]
    order = order[turn % len(order) :] + order[: turn % len(order)]
    values = {number: case.values() for number, case in cases.items()}
    running = {number for number, case in cases.items() if case.worker() in started}
    picked: set[int] = set()
    for numbers in ([number for number in order if not cases[number].optional()], order):
        missing = frozenset().union(*(values[number] for number in numbers))
        missing -= frozenset().union(*(values[number] for number in picked))
        while missing:
            best = max(numbers, key=lambda number: (len(values[number] & missing), number in running))
            picked.add(best)
            missing -= values[best]
    return picked or set(order)


def left_out(case: Case) -> bool:
    """Return whether one of its parameters has a value that the covering set does without."""
    for value in case.parameters.values():
        if hasattr(value, "strategy") and hasattr(value, "pool") and value.strategy not in PAIRS[value.pool]:
            return True
    fewer = {**FEWER.get(case.module, {}), **FEWER.get(case.function, {})}
    return any(name in case.parameters and str(case.parameters[name]) not in kept for name, kept in fewer.items())


def listed(cases: Sequence[Case], covers: Sequence[bool]) -> list[dict[str, Any]]:
    """Return, for the test that guards the covering set, which tests it has."""
    return [
        {"function": case.function, "words": sorted(case.words()), "covered": covered}
        for case, covered in zip(cases, covers, strict=True)
    ]
