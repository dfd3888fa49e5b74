"""Statements as they are shown: without what may be secret. Literals, numbers and comments become a question mark.

Where they end depends on the dialect, and with a backslash in a literal on a setting of the server. Then what either
reading takes for a part of a literal is masked. What is read is bounded by what is shown, whatever a statement holds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import islice

MASK = "?"


@dataclass(frozen=True, slots=True)
class Syntax:
    """Where literals, names and comments begin and end in a dialect. The defaults mask most."""

    escapes: tuple[bool, ...] = (False, True)
    """Whether a backslash escapes, in a literal that does not say so itself; both: a setting of the server decides."""
    names: str = "`"
    """What quotes names, beside literals; `[` ends with `]`."""
    literals: str = "'\""
    """What quotes literals. A double quote does on MySQL."""
    dollars: bool = True
    """$tag$ quotes a literal until $tag$."""
    hashes: bool = False
    """# begins a comment."""
    dashes_need_space: bool = False
    """-- begins a comment only where a space follows."""
    nests: bool = True
    """A comment /* may hold /* others */ */."""
    line_ends: re.Pattern[str] = re.compile("\n")


_MYSQL = Syntax(dollars=False, hashes=True, dashes_need_space=True, nests=False)
_SYNTAXES = {
    "postgresql": Syntax(names='"', literals="'", line_ends=re.compile("[\n\r]")),
    "sqlite": Syntax(escapes=(False,), names='"`[', literals="'", dollars=False, nests=False),
    "mssql": Syntax(escapes=(False,), names="[", dollars=False),
    "mysql": _MYSQL,
    "mariadb": _MYSQL,
}
_OTHER = Syntax()

#: Words and placeholders, which are shown, and all that begins what is masked, or what must not be taken for that.
_TOKEN = re.compile(
    r"""(?P<word>[^\W\d][\w$]*)|(?P<placeholder>[%:@]\(?[^\W\d]\w*|:\d+|\$\d+)|(?P<number>\.?\d[\w.]*)"""
    r"""|(?P<quote>['"`\[])|(?P<dollar>\$(?:[^\W\d]\w*)?\$)|(?P<comment>--|\#|/\*)"""
)
_COMMENT_EDGE = re.compile(r"/\*|\*/")
_MOST_EDGES = 1000
#: From behind the first quote to behind the last; possessive, so that a statement of backslashes takes no longer.
_ESCAPED = {quote: re.compile(rf"(?s:[^{quote}\\]++|\\.|{quote}{quote})*+{quote}") for quote in "'\""}
_ORACLE = {"q", "nq"}
_PAIRS = {"[": "]", "(": ")", "{": "}", "<": ">"}

Span = tuple[int, int]


def masked(statement: str, dialect: str, length: int) -> str:
    """Return the beginning of `statement` without its literals, numbers and comments.

    Args:
        dialect: SQLAlchemy's name for it.
        length: The most characters that are returned.
    """
    syntax = _SYNTAXES.get(dialect, _OTHER)
    escapes = syntax.escapes if "\\" in statement else syntax.escapes[:1]
    readings = [_Reading(statement, syntax, one, length) for one in escapes]
    end = min(reading.end for reading in readings)
    shown: list[str] = []
    at = 0
    for start, stop in sorted(span for reading in readings for span in reading.secrets):
        if start >= end:
            break
        if start > at or not shown:
            shown += (statement[at:start], MASK)
        at = max(at, stop)
    shown.append(statement[at:end])
    return "".join(shown)[:length]


class _Reading:
    """One way to read a statement: `secrets` are where they are, `end` is how far it was read.

    Args:
        escapes: A backslash escapes in every literal.
        length: It is read no further than that so many characters are shown.
    """

    def __init__(self, statement: str, syntax: Syntax, escapes: bool, length: int) -> None:
        self._statement, self._syntax, self._escapes = statement, syntax, escapes
        self.secrets: list[Span] = []
        at = shown = 0
        while shown <= length:
            token = _TOKEN.search(statement, at, at + length - shown + 1)
            if token is None:
                at = min(at + length - shown + 1, len(statement))
                break
            stop, secret = self._read(token)
            shown += (1 if secret else stop - token.start()) + token.start() - at
            if secret:
                self.secrets.append((token.start(), stop))
            at = stop
        self.end = at

    def _read(self, token: re.Match[str]) -> tuple[int, bool]:
        """Return where what begins with `token` ends, and whether it is secret."""
        text, start, stop = token[0], token.start(), token.end()
        if token.lastgroup == "number":
            return stop, True
        if token.lastgroup == "word":
            return self._after_word(text.lower(), stop)
        if token.lastgroup == "quote":
            return self._quoted(text, stop, self._escapes)
        if token.lastgroup == "dollar" and self._syntax.dollars:
            return self._until(text, stop), True
        if token.lastgroup == "comment":
            return self._comment(text, start, stop)
        return stop, False

    def _after_word(self, word: str, stop: int) -> tuple[int, bool]:
        """A literal may follow whose end its prefix decides; then the word is masked with it."""
        if not self._statement.startswith("'", stop):
            return stop, False
        if word == "e":
            return self._quoted("'", stop + 1, True)
        if word in _ORACLE and self._syntax is _OTHER:
            opened = self._statement[stop + 1 : stop + 2]
            return self._until(_PAIRS.get(opened, opened) + "'", stop + 2), True
        return stop, False

    def _quoted(self, quote: str, stop: int, escapes: bool) -> tuple[int, bool]:
        if quote in self._syntax.literals:
            if not escapes:
                return self._until(quote, stop), True  # a doubled one begins another, right behind
            found = _ESCAPED[quote].match(self._statement, stop)
            return found.end() if found else len(self._statement), True
        if quote not in self._syntax.names:
            return stop, False
        end = self._statement.find("]" if quote == "[" else quote, stop)
        return (end + 1, False) if end >= 0 else (len(self._statement), True)

    def _comment(self, text: str, start: int, stop: int) -> tuple[int, bool]:
        if text == "/*":
            return self._block_end(stop), True
        if text == "#" and not self._syntax.hashes:
            return stop, False
        if text == "--" and self._syntax.dashes_need_space and self._statement[stop : stop + 1].strip():
            return start + 1, False
        found = self._syntax.line_ends.search(self._statement, stop)
        return found.start() if found else len(self._statement), True

    def _block_end(self, stop: int) -> int:
        if not self._syntax.nests:
            return self._until("*/", stop)
        depth = 1
        for edge in islice(_COMMENT_EDGE.finditer(self._statement, stop), _MOST_EDGES):
            depth += 1 if edge[0] == "/*" else -1
            if depth == 0:
                return edge.end()
        return len(self._statement)

    def _until(self, end: str, stop: int) -> int:
        found = self._statement.find(end, stop)
        return found + len(end) if found >= 0 else len(self._statement)
