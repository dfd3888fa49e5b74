"""What is compared with what: arms, contests, their batches, the order of their turns; and a task of the user's own."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import click
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from ...workers import apps
from ..services.databases import DRIVERS
from ..tasks.patterns import OURS, PATTERNS, pattern_for
from .arguments import AUTO, suggest
from .results import Arm
from .store import Store

ALONE = ("solo",)  # Worker pools that run one task at a time, whatever the concurrency
AS_IT_IS = "as-it-is"  # The pattern of a user's task whose app has no Alchemy: whatever it does
RECIPE = "recipe"  # The hand-written pattern of the demo


@dataclass(frozen=True, slots=True)
class Contest:
    """Arms under one workload, compared in turns."""

    name: str  # `patterns/<worker pool>/<workload>`, `pools/<workload>` or `demo/<worker pool>`
    workload: str
    arms: tuple[Arm, ...]  # No two of one name

    @property
    def reference(self) -> Arm:
        """What the others are divided by."""
        return self.arms[0]


def patterns_contest(
    workload: str, reference: Arm, strategies: Sequence[str] = (), baselines: Sequence[str] = (),
    automatic: Mapping[str, str] | None = None,
) -> Contest:  # fmt: skip
    """Return the contest of all session patterns under one worker pool.

    Args:
        reference: What the others are compared with; it is there twice: the second copy shows the noise floor.
        strategies: Ours to compare with it.
        automatic: What `auto` chooses, by worker pool: asking for it by name would be a third copy.
    """
    pool, workers = reference.pool, reference.concurrency
    own = {reference.strategy, AUTO, (automatic or {}).get(pool)}
    others = [Arm(pool, workers, OURS, name) for name in strategies if name not in own]
    by_hand = [Arm(pool, workers, name) for name in baselines]
    arms = (reference, replace(reference, copy=1), *others, *by_hand)
    return Contest(f"patterns/{pool}/{workload}", workload, arms)


def pools_contest(workload: str, arms: Sequence[Arm]) -> Contest:
    """Return the contest of worker pools and concurrencies; the first arm is the reference, and there twice."""
    reference, *others = dict.fromkeys(arms)
    return Contest(f"pools/{workload}", workload, (reference, replace(reference, copy=1), *others))


def demo_contests(pools: Sequence[str], concurrency: int, workload: str) -> list[Contest]:
    """Return the recipe and ours, under each worker pool."""
    slots = {pool: 1 if pool in ALONE else concurrency for pool in pools}
    return [
        Contest(f"demo/{pool}", workload, (Arm(pool, workers, RECIPE), Arm(pool, workers, OURS, AUTO)))
        for pool, workers in slots.items()
        if pool in PATTERNS[RECIPE].pools
    ]


def plan(
    kinds: Sequence[str], user_task: UserTask | None, automatic: Mapping[str, str], *, pools: list[str],
    strategies: list[str], baselines: list[str], workloads: list[str], concurrency: Sequence[int], **_: object,
) -> list[Contest]:  # fmt: skip
    """Return the contests of a run."""
    names = [user_task.task] if user_task else workloads
    pattern, strategy = (AS_IT_IS, "") if user_task and not user_task.alchemy else (OURS, AUTO)
    own = {pool: pattern_for(pool) if pattern == OURS else pattern for pool in pools}
    arms = {
        pool: [Arm(pool, number, own[pool], strategy) for number in ((1,) if pool in ALONE else concurrency)]
        for pool in pools
    }
    every, contests = [arm for of_pool in arms.values() for arm in of_pool], []
    if "pools" in kinds and (len(every) > 1 or "patterns" not in kinds):
        contests += [
            pools_contest(workload, [arm for arm in every if arm.pattern == AS_IT_IS or _runs(arm, workload)])
            for workload in names
        ]
    if "patterns" in kinds:
        ours = strategies if strategy else []
        for pool, found in arms.items():
            for workload in (name for name in names if _runs(found[0], name)):
                others = [] if user_task else [name for name in baselines if name != own[pool]]
                by_hand = [name for name in others if PATTERNS[name].runs(pool, workload)]
                strategies = ours if own[pool] == pattern else []  # `async def` tasks have one of their own
                contests.append(patterns_contest(workload, found[0], strategies, by_hand, automatic))
    return contests


def _runs(arm: Arm, workload: str) -> bool:
    """Tell whether the pattern of `arm` can run it; a task of the user's own is run as it is."""
    return arm.pattern not in PATTERNS or workload not in PATTERNS[arm.pattern].without


def remaining(store: Store, contests: Sequence[Contest], restarts: int) -> list[tuple[Contest, int]]:
    """Return the batches that are still to run: every contest once, then every contest again with new workers."""
    every = ((contest, number) for number in range(1, restarts + 1) for contest in contests)
    return [(contest, number) for contest, number in every if (contest.name, number) not in store.done]


def orders(arms: Sequence[Arm], rounds: int, seed: str) -> Iterator[list[Arm]]:
    """Yield the order of each round: a random one, then the same backwards.

    Whatever drifts over a round or goes with a position in it then hits all arms alike.
    """
    rng = random.Random(seed)  # noqa: S311 - reproducible, not secret.
    order = list(arms)
    for number in range(rounds):
        order.reverse() if number % 2 else rng.shuffle(order)
        yield list(order)


@dataclass(frozen=True, slots=True)
class UserTask:
    """A task of somebody else's app, to be measured as it is."""

    app: str  # As in `celery -A`
    task: str
    args: list[Any]
    kwargs: dict[str, Any]
    broker_url: str
    environ: dict[str, str]  # What its worker needs: the broker, if that is not the one its app knows
    database_url: URL | None
    """What its connections are counted on; None if it is not known, or no server whose connections can be counted."""
    alchemy: bool  # Whether the app has an Alchemy: strategies can be chosen then


def find_user_task(
    ctx: click.Context, *, task: str, args: list[Any], kwargs: dict[str, Any], broker_url: str | None,
    database_url: str | None, **_: Any,
) -> UserTask | None:  # fmt: skip
    """Return the task, looked up in the app; None if none is asked for.

    Raises:
        click.UsageError: There is no app, or no such task in it.
    """
    if not task:
        return None
    name = ctx.find_root().params.get("app")
    if not isinstance(name, str):
        raise click.UsageError("--task needs the app that has it: celery -A proj alchemy bench --task proj.tasks.name")
    app = ctx.obj.app
    app.loader.import_default_modules()
    app.finalize()
    if task not in app.tasks:
        known = [known for known in sorted(app.tasks) if not known.startswith("celery.")]
        raise click.BadParameter(f"{name} has no task {task!r}. {suggest(task, known)}", param_hint="--task")
    broker = broker_url or app.conf.broker_url
    if not broker:
        raise click.UsageError(f"The app {name} has no broker_url: give one with --broker-url.")
    url, environ = database_url or app.conf.get("alchemy_database_url"), dict[str, str]()
    with contextlib.suppress(ArgumentError):
        url = make_url(url) if url else None
    if broker_url:
        environ["CELERY_BROKER_URL"] = broker_url
    observable = url if isinstance(url, URL) and url.drivername in DRIVERS else None
    first = broker if isinstance(broker, str) else broker[0]
    return UserTask(name, task, args, kwargs, first, environ, observable, apps.find(app) is not None)
