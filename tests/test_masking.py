"""What `inspect sessions` and warnings show of a statement: no literal of it, as the servers themselves read them."""

import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Engine, create_engine
from support import servers
from support.databases import PostgreSQL

from celery_alchemy.strategies.watching.masking import masked

SECRET = "hunter2"
FAR = 10_000  # characters; nothing is cut off


@pytest.fixture(scope="module")
def mariadb() -> Iterator[Engine]:
    engine = create_engine(servers.mariadb())
    yield engine
    engine.dispose()


#: Literals of PostgreSQL, each with something that could be taken for its end; `!` is where the secret stands.
POSTGRESQL = [
    "'!'", "'it''s !'", "''' !'", "'! \\'", "E'it\\'s !'", "e'\\\\\\' !'", "E'a''\\' !'", "U&'\\0061 !'",
    "U&'d!0061 !' UESCAPE '~'", "$$!$$", "$$ ' $ !$$", "$a$ $$ $b$ !$a$", "$_é1$ $a$ !$_é1$", "'--' || '!'",
    "'/*' || '!'", "'$$' || '!'", "'\"' || '!'", "/* ' */ '!'", "/* /* ' */ ' */ '!'", "-- '\n'!'", "-- '\r'!'",
    "'a'\n'!'", "'\n!'", '\'!\' AS "it\'s"', "'x' AS \"a\"\"'b\", '!'", "1 + 5 # 3, '!'", "1 AS a$a$, '!' AS b$a$",
]  # fmt: skip
#: The same where standard_conforming_strings is off.
POSTGRESQL_BEFORE = ["'it\\'s !'", "'\\\\' || '!'", "'\\'' || ' !'"]
MARIADB = [
    "'!'", '"!"', "'it''s !'", '"a""b !"', "'it\\'s !'", '"a\\"b !"', "'\\\\', '!'", "'\"', '!'", "\"'\", '!'",
    "'#', '!'", "# '\n'!'", "-- '\n'!'", "5--'1', '!'", "/* ' */ '!'", "/* /* ' */ '!'", "1 AS `it's`, '!'",
    "1 AS `a``'b`, '!'", "_utf8mb4'!'", "N'!'", "'a' '!'", "1 AS a$a$, '!' AS b$a$", "'$$', '!'",
]  # fmt: skip
#: The same where sql_mode has NO_BACKSLASH_ESCAPES.
MARIADB_WITHOUT_ESCAPES = ["'\\', '!'", "'a\\', '!', '\\'", '"\\", "!"']


def with_secret(literal: str) -> str:
    return f"SELECT {literal.replace('!', SECRET)}"


@pytest.mark.parametrize("literal", POSTGRESQL + POSTGRESQL_BEFORE)
def test_postgresql(run_database: PostgreSQL, literal: str) -> None:
    statement = with_secret(literal)
    with run_database.engine.connect() as connection:
        how = "off" if literal in POSTGRESQL_BEFORE else "on"
        connection.exec_driver_sql(f"SET standard_conforming_strings = {how}")
        cursor = connection.connection.cursor()
        cursor.execute(statement)
        assert SECRET in str(cursor.fetchone()), "so it is read by the server"
        connection.exec_driver_sql("RESET standard_conforming_strings")
    assert SECRET not in masked(statement, "postgresql", FAR)


@pytest.mark.parametrize("literal", MARIADB + MARIADB_WITHOUT_ESCAPES)
def test_mariadb(mariadb: Engine, literal: str) -> None:
    statement = with_secret(literal)
    with mariadb.connect() as connection:
        mode = "NO_BACKSLASH_ESCAPES" if literal in MARIADB_WITHOUT_ESCAPES else ""
        connection.exec_driver_sql(f"SET SESSION sql_mode = '{mode}'")
        cursor = connection.connection.cursor()
        cursor.execute(statement)
        assert SECRET in str(cursor.fetchone()), "so it is read by the server"
        connection.invalidate()
    for dialect in ("mysql", "mariadb"):
        assert SECRET not in masked(statement, dialect, FAR)


@pytest.mark.parametrize(
    ("dialect", "statement", "shown"),
    [
        ("postgresql", "ALTER USER \"Bob\" PASSWORD 'x'", 'ALTER USER "Bob" PASSWORD ?'),
        ("mysql", "ALTER USER 'bob'@'%' IDENTIFIED BY \"x\"", "ALTER USER ?@? IDENTIFIED BY ?"),
        ("mysql", "SELECT `a`, 0xFF, 12e3 FROM t1 # x", "SELECT `a`, ?, ? FROM t1 ?"),
        ("sqlite", "SELECT [it's], 'a', \"b\" FROM t", 'SELECT [it\'s], ?, "b" FROM t'),
        ("oracle", "SELECT q'[it's]', 'x' FROM \"x\"", "SELECT ?, ? FROM ?"),
        ("mssql", "SELECT [it's], N'x'", "SELECT [it's], N?"),
        ("postgresql", "SELECT a FROM t2 WHERE b = 5 AND c = -1.5", "SELECT a FROM t2 WHERE b = ? AND c = -?"),
        ("postgresql", "SELECT %(a_1)s, %s, :b1, $1, ?", "SELECT %(a_1)s, %s, :b1, $1, ?"),
        ("postgresql", "SELECT a::int /* x */ -- y", "SELECT a::int ? ?"),
        ("postgresql", "SELECT a, 'x", "SELECT a, ?"),
        ("postgresql", "SELECT \"a, 'x'", "SELECT ?"),
        ("postgresql", "DO $$ BEGIN 'x'; END", "DO ?"),
        ("postgresql", "SELECT a /* x", "SELECT a ?"),
        ("postgresql", "", ""),
    ],
)
def test_what_is_left(dialect: str, statement: str, shown: str) -> None:
    """Names, words and placeholders; of what has no end, nothing."""
    assert masked(statement, dialect, FAR) == shown


CONTENT = st.text(st.sampled_from("'\"\\$`#-/*[]\n aE"), max_size=12).map(lambda text: f"{text}{SECRET}{text[::-1]}")
AROUND = ["a", "b2", ", ", " ", "+", "1", "\n", "E", "q", "e"]


def doubled(quote: str) -> Callable[[str], str]:
    return lambda content: quote + content.replace(quote, quote * 2) + quote


def escaped(prefix: str, quote: str) -> Callable[[str], str]:
    return lambda content: prefix + quote + content.replace("\\", "\\\\").replace(quote, "\\" + quote) + quote


def statements(literals: list[Callable[[str], str]], names: list[str]) -> st.SearchStrategy[str]:
    pieces = [CONTENT.map(literal) for literal in literals] + [st.sampled_from(AROUND + names)]
    # A word right before a literal would be its prefix.
    return st.lists(st.one_of(pieces), max_size=12).map(lambda parts: " " + " , ".join(parts))


@given(statements([doubled("'"), escaped("E", "'"), lambda content: f"$t$ {content.replace('$t$', '')} $t$"], ['"\'"']))
def test_any_literals_of_postgresql(statement: str) -> None:
    assert SECRET not in masked(statement, "postgresql", FAR)


@given(statements([escaped("", "'"), escaped("", '"')], ["`'`", '`"`']))
def test_any_literals_of_mysql(statement: str) -> None:
    assert SECRET not in masked(statement, "mysql", FAR)


@pytest.mark.parametrize("dialect", ["postgresql", "mysql", "sqlite", "another"])
@pytest.mark.parametrize("piece", ["'", '"', "/*", "--", "#", "$a$b", "$", "%(", "E'\\'", "\\'", "a", "1", "(", "'\\"])
def test_a_statement_that_is_long_takes_no_time(dialect: str, piece: str) -> None:
    """No longer by the square of its length, that is: then this would take hours."""
    statement = piece * (2_000_000 // len(piece))
    began = time.process_time()
    assert len(masked(statement, dialect, 200)) <= 200
    assert time.process_time() - began < 20
