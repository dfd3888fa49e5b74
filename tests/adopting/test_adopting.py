"""`celery-alchemy adopt`: small projects, as they stand and rewritten, under real workers."""

from pathlib import Path

import pytest
from adopting import (
    shapes_blocks,
    shapes_bodies,
    shapes_mixed,
    shapes_modules,
    shapes_recipes,
    shapes_refused,
    shapes_right,
)
from support.adopting import Run, Shape, texts, write
from support.databases import PostgreSQL
from support.worker import Site

from celery_alchemy.workers.adopting import adopt

MODULES = (shapes_bodies, shapes_blocks, shapes_recipes, shapes_modules, shapes_mixed, shapes_right, shapes_refused)
ALL = [shape for module in MODULES for shape in module.SHAPES]
POOLS = ("prefork", "threads")


@pytest.mark.parametrize("shape", ALL, ids=str)
def test_rewritten(shape: Shape, tmp_path: Path) -> None:
    """What is rewritten, what is refused, and that a second run finds nothing to do."""
    package = write(shape, tmp_path)
    before = texts(package)
    shown = adopt(tmp_path, write=False)
    assert texts(package) == before, "a diff writes nothing"
    outcome = adopt(tmp_path, write=True)
    assert outcome == shown
    after = texts(package)
    together = "\n".join(after.values())
    for text in shape.written:
        assert text in together, f"{text!r} is not in\n{together}"
    for text in shape.gone:
        assert text in "\n".join(before.values())
        assert text not in together, f"{text!r} is still in\n{together}"
    assert (after == before) is shape.unchanged
    assert len(outcome.refused) == len(shape.refused), outcome.refused
    for line, reason in zip(outcome.refused, shape.refused, strict=True):
        assert reason in line
    for name, text in after.items():
        compile(text, name, "exec")
    assert not adopt(tmp_path, write=True).changes
    assert texts(package) == after


SAMPLE = ("factory_try_finally", "recipe")


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("shape", [shape for shape in ALL if shape.runs and shape.name not in SAMPLE], ids=str)
def test_under_a_worker(shape: Shape, pool: str, site: Site, database: PostgreSQL, tmp_path: Path) -> None:
    """Wrong before where its shape is wrong, right after."""
    check(Run(site, database, tmp_path, pool, shape))


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("shape", [shape for shape in ALL if shape.name in SAMPLE], ids=str)
def test_some_under_a_worker(shape: Shape, pool: str, site: Site, database: PostgreSQL, tmp_path: Path) -> None:
    """The same, of the two most common shapes."""
    check(Run(site, database, tmp_path, pool, shape))


def check(run: Run) -> None:
    write(run.shape, run.folder)
    before = run.look()
    if f"{run.pool}?" not in run.shape.wrong:
        assert bool(before) is (run.pool in run.shape.wrong), before
    if run.shape.unchanged:
        return  # test_rewritten has seen that it stays as it is
    adopt(run.folder, write=True)
    assert run.look() == []
