"""Result directories of benchmarks that never ran: seeded, and shaped like real ones."""

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from celery_alchemy.loadtests.bench.contests import orders, patterns_contest, pools_contest
from celery_alchemy.loadtests.bench.results import Arm, Batch, Cell, Counted, RunFacts, Slice, SweepStep, Verdict
from celery_alchemy.loadtests.bench.rows import Percentiles
from celery_alchemy.loadtests.bench.store import Store
from celery_alchemy.loadtests.tasks.patterns import OURS, PATTERNS, POOLS
from celery_alchemy.loadtests.tasks.workloads import WORKLOADS

AUTOMATIC = {"prefork": "per_process", "threads": "scoped", "gevent": "scoped", "eventlet": "scoped", "solo": "local"}
STRATEGIES = ("local", "scoped", "per_process")
CHECKS = (
    "every task was answered",
    "every task had a Session of its own",
    "every balance is explained by its ledger lines",
    "no connection was left idle in transaction",
    "never more connections than promised",
)
SHARED = "shared: Session 0x7f3a is in use by task 51c9"
#: One Session for what runs side by side: what breaks, and how it shows.
BROKEN = {
    ("threads", "recipe"): {"every task had a Session of its own": f"212 times, as in: {SHARED}"},
    ("gevent", "recipe"): {
        "every task was answered": "8: 0c3f, 1d22, 9a01, ...",
        "no connection was left idle in transaction": "1 connections",
    },
    ("eventlet", "recipe"): {"every balance is explained by its ledger lines": "accounts 2: 17, 31"},
    ("threads", "global_session"): {"every task had a Session of its own": f"640 times, as in: {SHARED}"},
    ("gevent", "global_session"): {"every task was answered": "16: 11aa, 12bb, 13cc, ..."},
    ("eventlet", "global_session"): {"every task had a Session of its own": f"51 times, as in: {SHARED}"},
}
#: Successful tasks per second, and how much of it concurrency can multiply.
RATES = {
    "select": 420.0, "insert": 330.0, "transfer": 240.0, "statements": 90.0, "slow_query": 18.0, "slow_io": 17.0,
    "cpu": 130.0, "mix": 160.0,
}  # fmt: skip
POOL_FACTOR = {"prefork": 1.0, "threads": 0.93, "gevent": 0.88, "eventlet": 0.8, "solo": 0.7}
PATTERN_FACTOR = {"null_pool": 0.62, "flask": 0.9, "recipe": 1.03, "with_session": 1.02}
FREE, BURDENED = 0.05, 0.9
"""CPUs that others use on an idle machine, and on a busy one."""


@dataclass(frozen=True)
class Plan:
    """What was run."""

    seed: int = 1
    pools: Sequence[str] = POOLS
    workloads: Sequence[str] = tuple(WORKLOADS)
    baselines: Sequence[str] = tuple(name for name in PATTERNS if name != OURS)
    concurrency: int = 4
    concurrencies: Sequence[int] = (4, 16)
    """Of the contests between worker pools; none: there are no such contests."""
    batches: int = 6
    rounds: int = 4
    """Of each batch; 0: checked only."""
    sweeps: int = 5
    sweep: bool = True
    noise: float = 0.08
    foreign_cpus: float = FREE
    generator_share: float = 0.3
    broken: Mapping[tuple[str, str], Mapping[str, str]] = field(default_factory=lambda: BROKEN)
    """Breaches by worker pool and pattern."""
    speed: Callable[[Arm, str], float] = lambda arm, workload: 1.0
    """What to multiply the goodput of an arm by."""
    pss: float = 1.0
    version: str = "0.1.0"
    patterns_only: Sequence[str] = ()
    """Workloads of the contests between patterns, if not all."""


def write_results(directory: Path, plan: Plan = Plan()) -> Path:
    """Write a result directory, and return it."""
    rng = random.Random(plan.seed)
    store = Store(directory, "matrix", facts_of(plan))
    contests = [
        patterns_contest(
            workload,
            Arm(pool, 1 if pool == "solo" else plan.concurrency, OURS, "auto"),
            STRATEGIES,
            [name for name in plan.baselines if PATTERNS[name].runs(pool, workload)],
            AUTOMATIC,
        )
        for pool in plan.pools
        for workload in plan.patterns_only or plan.workloads
    ]
    arms = [
        Arm(pool, 1 if pool == "solo" else number, OURS, "auto") for pool in plan.pools for number in plan.concurrencies
    ]
    if arms:
        contests += [pools_contest(workload, arms) for workload in plan.workloads]
    number = 1
    for turn in range(1, plan.batches + 1):
        for contest in contests:
            batch = make_batch(rng, plan, contest.name, turn, contest.workload, contest.arms, contest.reference, number)
            number += len(batch.slices)
            store.add_batch(batch, [])
    swept = [
        (arm, workload) for workload in plan.workloads for arm in dict.fromkeys(arms)
        if plan.sweep and (arm.concurrency != 16 or workload.startswith("slow"))
    ]  # fmt: skip
    for arm, workload in swept:
        for turn in range(1, plan.sweeps + 1):
            store.add_sweep([replace(step, sweep=turn) for step in make_sweep(rng, plan, arm, workload)], [])
    trips = {"select": 3, "insert": 3, "transfer": 6, "statements": 23}
    store.add_round_trips({
        name: {
            pattern: trips.get(name, 4) + {"null_pool": 5.0, "flask": 0.0, OURS: 0.0}.get(pattern, 0.13)
            for pattern in (OURS, *plan.baselines)
        }
        for name in plan.workloads
    })  # fmt: skip
    return directory


def facts_of(plan: Plan) -> RunFacts:
    """Return what a plan says of its run."""
    return RunFacts(
        command=f"celery alchemy bench --pools {','.join(plan.pools)} --out report/\n"
        "celery alchemy bench sweep --out report/",
        begun="2026-11-23T07:30:00+00:00",
        options={"rounds": plan.rounds * plan.batches, "restarts": plan.batches, "slice_s": 1.0},
        services=["PostgreSQL 18.1 (embedded)", "Valkey 9.1.2 (embedded, unix socket)"],
        versions={"celery-alchemy": plan.version, "celery": "5.7.0", "SQLAlchemy": "2.1.9", "gevent": "26.9.0"},
        machine={"cpu": "An EPYC <7B13>", "cpus": "2", "memory": "24 GiB", "system": "Linux 6.1", "python": "3.11.7"},
        workloads={name: WORKLOADS[name].summary if name in WORKLOADS else "Yours." for name in plan.workloads},
        patterns={name: PATTERNS[name].summary for name in (OURS, *plan.baselines)},
        objective="p95=100ms" if plan.sweep else "",
    )


#: Of 200 orders: right, wrong, unanswered and connections left by the recipe.
DEMO = {"prefork": (131, 64, 5, 3), "threads": (20, 163, 17, 12), "gevent": (37, 155, 8, 9),
        "eventlet": (41, 159, 0, 8), "solo": (171, 29, 0, 1)}  # fmt: skip


def write_demo(
    directory: Path, demo: Mapping[str, tuple[int, int, int, int]] = DEMO, ours: tuple[int, int] = (200, 0),
    cpu_s: Sequence[float] = (0.9,),
) -> Path:  # fmt: skip
    """Write the directory of a demo: each worker pool, the recipe and ours, counted.

    Args:
        ours: How many of ours are right, and how many wrong.
        cpu_s: The worker's CPU seconds of ours, of each restart.
    """
    store = Store(directory, "demo", replace(facts_of(Plan(sweep=False)), options={"orders": 200}))
    for (pool, (right, wrong, unanswered, left)), number in itertools.product(demo.items(), range(len(cpu_s))):
        own, recipe = Arm(pool, 1 if pool == "solo" else 4, OURS, "auto"), Arm(pool, 4, "recipe")
        breaches = {CHECKS[1]: f"{wrong} times"} if wrong else {}
        cells = [
            Cell(
                own,
                [Verdict(name, not (ours[1] and name == CHECKS[1])) for name in CHECKS],
                strategy=AUTOMATIC[pool],
                counted=Counted(sum(ours), *ours, 0, 0, 1.61, cpu_s[number]),
            ),
            Cell(recipe, [Verdict(name, name not in breaches, breaches.get(name, "")) for name in CHECKS],
                 counted=Counted(right + wrong + unanswered, right, wrong, unanswered, left, 4.2, 0.91)),
        ]  # fmt: skip
        store.add_batch(Batch(f"demo/{pool}", number + 1, "orders", own.name, cells, []), [])
    return directory


def goodput(plan: Plan, arm: Arm, workload: str) -> float:
    """Return what an arm achieves without noise."""
    if workload.startswith("slow"):
        width = {"gevent": 1.0, "eventlet": 0.9, "threads": 0.97}.get(arm.pool, 1.0) * arm.concurrency
    else:
        width = 1.0 if arm.concurrency < 10 else 0.97
    factor = POOL_FACTOR.get(arm.pool, 1.0) * PATTERN_FACTOR.get(arm.pattern, 1.0)
    return RATES.get(workload, 100.0) * width * factor * plan.speed(arm, workload)


def make_batch(
    rng: random.Random,
    plan: Plan,
    contest: str,
    number: int,
    workload: str,
    arms: Sequence[Arm],
    reference: Arm,
    first: int,
) -> Batch:
    """Return a batch: each worker a little different for as long as it lives, each slice a little more."""
    breaches = {arm: plan.broken.get((arm.pool, arm.pattern), {}) if arm.concurrency > 1 else {} for arm in arms}
    live = [arm for arm in arms if not breaches[arm]]
    bias = {arm: math.exp(rng.gauss(0, plan.noise / 4)) for arm in live}
    slices: list[Slice] = []
    for turn, order in enumerate(orders(live, plan.rounds, f"{contest}/{number}"), start=1):
        for position, arm in enumerate(order):
            rate = goodput(plan, arm, workload) * bias[arm] * math.exp(rng.gauss(0, plan.noise))
            slices.append(_slice(rng, plan, arm, workload, first + len(slices), turn, position, rate))
    cells = [_cell(rng, plan, arm, workload, breaches[arm]) for arm in arms if number == 1 or not breaches[arm]]
    return Batch(contest, number, workload, reference.name, cells, slices, "2026-11-23T07:31:00+00:00", 61.5)


def _slice(
    rng: random.Random, plan: Plan, arm: Arm, workload: str, number: int, turn: int, position: int, rate: float
) -> Slice:
    succeeded = max(1, round(rate))
    tasks = succeeded + arm.concurrency
    middle = 2 * arm.concurrency / rate * 1000
    latency = Percentiles.of(middle * math.exp(rng.gauss(0, 0.35)) for _ in range(succeeded))
    cost = 0.0042 * {"threads": 1.1, "gevent": 1.3, "eventlet": 1.4, "null_pool": 1.2}.get(arm.pool, 1.0)
    cost *= 1.25 if arm.pattern == "null_pool" else 0.97 if arm.pattern == "with_session" else 1.0
    database = 0.0009 * (9 if arm.pattern == "null_pool" else 1)
    wall = 1.15
    return Slice(
        number=number,
        round=turn,
        position=position,
        arm=arm.name,
        seconds=1.0,
        succeeded=succeeded,
        failed=0,
        unanswered=0,
        tasks=tasks,
        latency=latency,
        worker_cpu_s=round(cost * tasks * math.exp(rng.gauss(0, 0.04)), 3),
        database_cpu_s=round(database * tasks * math.exp(rng.gauss(0, 0.05)), 4),
        generator_cpu_s=round(plan.generator_share * wall, 3),
        foreign_cpus=round(plan.foreign_cpus * rng.uniform(0.5, 1.5), 3),
        wall_s=wall,
        send_lag_p99_ms=0.4,
    )


def _cell(rng: random.Random, plan: Plan, arm: Arm, workload: str, breaches: Mapping[str, str]) -> Cell:
    ours = arm.pattern == OURS
    taken = AUTOMATIC[arm.pool] if arm.strategy == "auto" else arm.strategy
    processes = arm.concurrency if arm.pool == "prefork" else 1
    promised = (
        (arm.concurrency if arm.pool in {"prefork", "solo"} else min(arm.concurrency, 20)) * 2
        if ours
        else arm.concurrency
        if arm.pattern == "null_pool"
        else processes * 15
    )
    middle = 2 * arm.concurrency / goodput(plan, arm, workload) * 1000
    shares = {"queue": 0.45, "checkout": 0.02, "database": 0.3, "run": 0.5, "latency": 1.0}
    if arm.pattern == "null_pool":
        shares["checkout"] = 0.15
    phases = {
        name: _spread(rng, middle * share, 3000) for name, share in shares.items() if plan.rounds and not breaches
    }
    return Cell(
        arm=arm,
        verdicts=[Verdict(name, name not in breaches, breaches.get(name, "")) for name in CHECKS],
        strategy=taken if ours else "",
        reason="auto: greenlets share one process" if ours and arm.strategy == "auto" else "",
        start_s=1.4,
        promised_connections=promised,
        peak_connections=min(arm.concurrency, promised),
        pss_bytes=round(plan.pss * 2**20 * (62 + (48 * arm.concurrency if arm.pool == "prefork" else 0.4))),
        phases=phases,
        errors={"InvalidRequestError": 45, "ResourceClosedError": 3} if breaches else {},
        tasks=3000,
        log="Traceback ...\nsqlalchemy.exc.InvalidRequestError: <this Session's transaction>" if breaches else "",
    )


def _spread(rng: random.Random, middle: float, n: int) -> Percentiles:
    found = Percentiles.of(middle * math.exp(rng.gauss(0, 0.4)) for _ in range(300))
    assert found is not None
    return replace(found, n=n)


def make_sweep(rng: random.Random, plan: Plan, arm: Arm, workload: str) -> list[SweepStep]:
    """Return steps that rise past the knee: beyond the ceiling the queue grows, and the latency with it."""
    ceiling = goodput(plan, arm, workload) * 0.95
    service = 1000 * arm.concurrency / ceiling
    breaches = plan.broken.get((arm.pool, arm.pattern), {}) if arm.concurrency > 1 else {}
    steps = []
    for share in (0.1, 0.25, 0.4, 0.55, 0.7, 0.8, 0.9, 1.0, 1.15):
        rate = round(ceiling * share, 1)
        over = max(0.0, share - 0.97)
        middle = service / max(0.12, 1.02 - share) ** 0.5 + over * 9000
        latency = _spread(rng, middle * 0.6, max(1, round(rate * 4)))
        achieved = min(rate, ceiling) * rng.uniform(0.98, 1.0)
        steps.append(
            SweepStep(
                arm=arm,
                workload=workload,
                offered_per_s=rate,
                seconds=4.0,
                achieved_per_s=round(achieved, 2),
                failed=0,
                unanswered=0,
                latency=latency,
                foreign_cpus=plan.foreign_cpus,
                peak_connections=min(arm.concurrency, 20),
                send_lag_p99_ms=0.8,
                uncorrected=replace(latency, p999=latency.p99),
                late=round(over * 40),
                skipped=round(over * 9),
                met=latency.p95 <= 100 and achieved >= 0.9 * rate,
            )
        )
    verdicts = [Verdict(name, name not in breaches, breaches.get(name, "")) for name in CHECKS]
    return [*steps[:-1], replace(steps[-1], verdicts=verdicts)]
