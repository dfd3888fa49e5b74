"""Every block of code on the pages of the documentation is run, checked, or marked with the reason why not."""

import ast
import configparser
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml
from sqlalchemy import text
from support import forking
from support.databases import PostgreSQL
from support.docs import DOCS, blocks, fences

from celery_alchemy.workers import settings
from celery_alchemy.workers.commands import alchemy

ROOT = DOCS.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("docs/**/*.md"))
}
PAGES = {name: words for name, words in PAGES.items() if "/_build/" not in name}
ALL = PAGES | {
    name: (ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
}
ALL |= {name: (ROOT / name).read_text() for name in ("examples/README.md", "loadtests/README.md")}

#: Pages whose code is run by tests of their own, which look at what it does.
ELSEWHERE = {
    "docs/async.md": "async_tasks/test_features",
    "docs/fastapi.md": "test_bridges",
    "docs/flask.md": "test_bridges",
    "docs/injection.md": "test_bridges",
    "docs/several-databases.md": "test_docs",
    "docs/sending.md": "test_docs",
    "docs/tenants.md": "test_docs",
    "docs/tutorial.md": "test_docs",
    "docs/django.md": "test_docs",
    "docs/doctor.md": "test_docs",  # faults, which the doctor is to find
    "docs/testing.md": "test_plugin",
    "docs/outbox.md": "test_outbox_migrations",
}
#: Pages that go on where another one ends.
AFTER = {"docs/observing.md": "docs/tutorial.md", "docs/round-trips.md": "docs/tutorial.md"}
AFTER |= {name: "docs/errors/index.md" for name in PAGES if name.startswith("docs/errors/")}
AFTER["docs/alembic.md"] = "docs/tutorial.md"
LANGUAGES = {"python", "sh", "sql", "yaml", "ini", "", "diff", "{toctree}", "{eval-rst}", "{include} ../CHANGELOG.md"}

HERE = [name for name, words in PAGES.items() if blocks(words, "python") and name not in ELSEWHERE]


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[forking.Script]:
    """A process that has imported what pages import, and runs each in a child."""
    folder = tmp_path_factory.mktemp("pages")
    with forking.script("pages", folder / "log", folder=str(folder)) as script:
        yield script


@pytest.mark.parametrize("page", HERE)
def test_the_code_of_a_page_runs(runner: forking.Script, page: str) -> None:
    before = AFTER.get(page, page)
    words = PAGES[page] if before == page else PAGES[before] + "\n" + PAGES[page]
    code = "\n".join(blocks(words, "python")).replace("redis://localhost", "memory://")
    code = code.replace("from shop import", "# from shop import")
    code = re.sub(r"postgresql\+psycopg://localhost/(\w+)", r"sqlite:///{cwd}/\1.sqlite3", code)
    said = runner.ask(page=page, code=code)
    assert said is None, said


def test_pages_with_tests_of_their_own_have_them() -> None:
    for page, module in ELSEWHERE.items():
        tree = ast.parse((Path(__file__).parent / f"{module}.py").read_text())
        strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        titles = set(re.findall(r"^## (.*)$", PAGES[page], flags=re.M))
        assert strings & {Path(page).name, *titles}, f"{module} does not read {page}"


def test_no_block_is_of_a_language_that_nothing_looks_at() -> None:
    found = {(name, language) for name, words in ALL.items() for language, _ in fences(words)}
    assert {(name, language) for name, language in found if language not in LANGUAGES} == set()


@pytest.mark.parametrize("page", [name for name, words in PAGES.items() if blocks(words, "sql")])
def test_the_sql_of_a_page_runs(page: str, run_database: PostgreSQL) -> None:
    for statement in blocks(PAGES[page], "sql"):
        with run_database.engine.connect() as connection:
            connection.execute(text(statement)).all()


def commands(language: str, words: str) -> list[str]:
    return [line for block in blocks(words, language) for line in block.splitlines() if " alchemy " in line]


@pytest.mark.parametrize("page", [name for name, words in ALL.items() if commands("sh", words)])
def test_the_commands_of_a_page_exist(page: str) -> None:
    for line in commands("sh", ALL[page]):
        words = shlex.split(line, comments=True)
        rest = words[words.index("alchemy") + 1 :]
        command: click.Command | None = alchemy
        while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
            found = command.get_command(click.Context(command), rest[0])
            if found is None and command.params:
                break
            assert found is not None, line
            command, rest = found, rest[1:]
        assert command is not None
        command.make_parser(click.Context(command)).parse_args(rest)


def test_other_files_are_well_formed() -> None:
    for words in PAGES.values():
        for block in blocks(words, "yaml"):
            assert all("kind" in one for one in yaml.safe_load_all(block))
        for block in blocks(words, "ini"):
            configparser.ConfigParser().read_string(block)


def slugs(words: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and MyST make them."""
    without = re.sub(r"^```.*?^```$", "", words, flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", without, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ALL)
def test_every_link_leads_somewhere(page: str) -> None:
    words = re.sub(r"^```.*?^```$", "", ALL[page], flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", words):
        if target.startswith(("https:", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        path = ((ROOT / page).parent / file).resolve() if file else ROOT / page
        assert path.exists(), f"{page} links to {target}"
        if anchor:
            assert anchor in slugs(path.read_text()), f"{page} links to {target}"


def test_the_page_of_settings_names_each() -> None:
    rows = re.findall(r"^\| `(alchemy_\w+)` \|", PAGES["docs/settings.md"], flags=re.M)
    assert sorted(rows) == sorted(settings._KNOWN)


def test_the_site_has_every_page() -> None:
    named = {line for block in blocks(PAGES["docs/index.md"], "{toctree}") for line in block.splitlines()}
    pages = {name.removeprefix("docs/").removesuffix(".md") for name in PAGES if not name.startswith("docs/errors/")}
    assert pages - {"index"} - named == set()


def test_the_page_of_errors_names_each() -> None:
    linked = set(re.findall(r"\]\((\w[\w-]*\.md)\)", PAGES["docs/errors/index.md"]))
    pages = [name for name in PAGES if name.startswith("docs/errors/") and not name.endswith("index.md")]
    assert linked == {Path(name).name for name in pages}
    for name in pages:
        headings = re.findall(r"^## (.*)$", PAGES[name], flags=re.M)
        assert headings == ["Symptom", "Cause", "How to see it", "Fix by hand", "With celery-alchemy"], name
