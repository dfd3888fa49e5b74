"""The README's code runs as it stands, but for the addresses of the servers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parent.parent / "README.md"


def python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.M | re.S)


@pytest.fixture(scope="module")
def readme(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The namespace after the README's first block, on a SQLite file, with its tables created; executed once, for
    Celery shares its tasks with every app of the process."""
    tmp_path = tmp_path_factory.mktemp("shop")
    namespace: dict[str, Any] = {"__name__": "shop"}
    first = python_blocks()[0]
    assert "postgresql+psycopg://localhost/shop" in first
    first = first.replace("postgresql+psycopg://localhost/shop", f"sqlite:///{tmp_path}/shop.sqlite3")
    first = first.replace("redis://localhost", "memory://")
    exec(compile(first, "README.md", "exec", dont_inherit=True), namespace)
    namespace["app"].conf.task_always_eager = True
    namespace["Base"].metadata.create_all(namespace["db"].engine)
    yield namespace
    namespace["db"].dispose()


@pytest.fixture
def shop(readme: dict[str, Any]) -> dict[str, Any]:
    with readme["db"].unit_of_work() as session:
        session.query(readme["User"]).delete()
    return readme


def names(shop: dict[str, Any]) -> set[str]:
    with shop["db"].unit_of_work() as session:
        return {user.name for user in session.query(shop["User"])}


def test_the_two_lines_make_a_task_whose_return_commits(shop: dict[str, Any]) -> None:
    shop["create"].delay("grace").get()
    assert names(shop) == {"grace"}


def test_the_other_blocks_do_what_the_text_says(shop: dict[str, Any]) -> None:
    for block in python_blocks()[1:]:
        exec(compile(block, "README.md", "exec", dont_inherit=True), shop)
    assert names(shop) == {"ada"}
    shop["rename_user"].delay("ada", "ada lovelace").get()
    shop["welcome"].delay("alan").get()
    assert names(shop) == {"ada lovelace", "Alan"}
    assert shop["how_many"].delay().get() == 2


def test_the_readme_opens_with_the_two_commands() -> None:
    text = README.read_text(encoding="utf-8")
    assert text.index("make demo") < text.index("make test") < text.index("## ")
