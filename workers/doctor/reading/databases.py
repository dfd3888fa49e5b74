"""What calls on Sessions, Engines, queries and their objects do."""

from __future__ import annotations

import ast
import re
from abc import abstractmethod
from typing import Any

from .expressions import Expressions
from .names import NONE
from .state import State, Use
from .values import UNKNOWN, Value, is_mapped, literal

_ADDS = {"add", "add_all", "delete"}
_FLUSHES = {"merge", "flush", "bulk_save_objects", "bulk_insert_mappings", "bulk_update_mappings", "prepare"}
_EXECUTES = {"execute", "scalar", "scalars", "exec", "stream", "stream_scalars", "executemany", "exec_driver_sql"}
_READS = {"get", "get_one", "query", "refresh", "connection", "run_sync"}
CLOSES = {"close", "remove", "aclose", "reset", "invalidate", "close_all"}
_ONE = {"first", "one", "one_or_none", "get", "get_or_404", "first_or_404", "one_or_404", "scalar_one", "fetchone"}
_ONE |= {"scalar_one_or_none", "get_one"}
_MANY = {"all", "scalars", "fetchall", "unique", "yield_per", "partitions", "fetchmany", "iterator", "mappings"}
_MUTATES = {"append", "remove", "add", "extend", "clear", "update", "pop", "insert", "discard", "setdefault"}
_WRITING_NAME = re.compile(r"(?:^|\.)(?:insert|update|delete)\(\)")
_WRITING_TEXT = re.compile(r"\b(?:INSERT\s+INTO|UPDATE\s+\S+\s+SET|DELETE\s+FROM|MERGE\s+INTO|REPLACE\s+INTO)\b", re.I)


class Databases(Expressions):
    """Everything that has to do with a database."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.async_uses: list[tuple[Value, ast.AST]] = []
        """Statements on async Engines that modules have made."""

    @abstractmethod
    def enter(self, value: Value, state: State, node: ast.AST) -> Value:
        """Return what `with value as ...` gives."""

    def key_of(self, node: ast.AST) -> tuple[ast.AST, ...]:
        """Return what tells an object that is made here from one that the same line makes for another caller."""
        return (node, *self.stack)

    def make(self, kind: str, engine: Value | None, state: State, node: ast.AST, **parts: Any) -> Value:
        """Let a Session, a connection or an Engine be made here."""
        key = self.key_of(node)
        value = Value(kind, node=node, module=self.frame.module, parts={"key": key, "engine": engine, **parts})
        value.parts["entry"] = self.entry.kind
        state.put(Use(value, made=(self.frame.module, node), unclosed=True))
        cached = any(frame.function is not None and "cached" in frame.function.parts["flags"] for frame in self.frames)
        if cached and kind.endswith("engine"):
            state.change(value, escaped=True)
        self.emit("made", node, state, value)
        return value

    def on_session(
        self, session: Value, name: str, args: list[Value], keywords: dict[str, Value], state: State, node: ast.Call
    ) -> Value:
        """Go through a method of a Session or connection."""
        place = (self.frame.module, node)
        if name in _ADDS:
            self.usable(session, state, node)
            use = state.change(session, touched=True)
            state.put(state.change(session, writes=use.writes | {place}))
            return UNKNOWN
        if name in _FLUSHES:
            self.statement(session, state, node, writes=name != "flush", risky=True)
            return args[0] if name == "merge" and args else UNKNOWN
        if name in _EXECUTES:
            writes = bool(args) and _writes(args[0])
            self.statement(session, state, node, writes=writes, args=args)
            return self._result(session, name, args, node)
        if name in _READS:
            self.statement(session, state, node, writes=False)
            return self._read(session, name, args, node)
        if name == "commit":
            self.commit(session, state, node)
        elif name == "rollback":
            state.put(state.use(session).ended())
        elif name in CLOSES:
            self.close(session, state, node)
        elif name == "begin":
            return Value("context", "commit", node, parts={"of": session, "key": session.key, "gives": UNKNOWN})
        elif name == "begin_nested":
            return Value("context", "nested", node, parts={"of": session, "gives": UNKNOWN})
        elif name.startswith("expunge"):
            for one in args:
                one.parts["expunged"] = True
        elif name == "execution_options":
            if literal(keywords.get("isolation_level")) == "AUTOCOMMIT":
                session.parts["autocommit"] = True
            return session
        elif name == "registry" or name.startswith("__"):
            return session
        return UNKNOWN

    def usable(self, session: Value, state: State, node: ast.AST) -> None:
        """Tell of a Session that is used after its error was swallowed."""
        if state.use(session).broken is not None:
            self.emit("broken", node, state, session)

    def statement(
        self,
        session: Value,
        state: State,
        node: ast.AST,
        *,
        writes: bool,
        risky: bool = False,
        args: list[Value] | None = None,
    ) -> None:
        """Let a Session execute something."""
        self.usable(session, state, node)
        before, place = state.use(session), (self.frame.module, node)
        engine = session.parts.get("engine")
        self._begins(session, state, node)
        state.change(
            session,
            open=before.open or place,
            touched=True,
            risk=place if writes or risky else before.risk,
            writes=before.writes | {place} if writes else before.writes,
        )
        if engine is not None:
            self.engine_used(engine, state, node)
        self.emit("statement", node, state, session, args=args or [])
        self.frame.raised.add(state)

    def _begins(self, session: Value, state: State, node: ast.AST) -> None:
        """Tell of a Session that takes a connection while another one has one."""
        for other in list(state.sessions.values()) if state.use(session).open is None else ():
            if other.open is not None and other.value.key != session.key and _same_origin(other.value, session):
                self.emit("nested", node, state, session, other=other)

    def engine_used(self, engine: Value, state: State, node: ast.AST) -> None:
        """Let an Engine connect."""
        self.emit("engine-used", node, state, engine)
        if engine.kind == "async_engine" and engine.parts.get("entry") == "import" and not self.quiet:
            self.async_uses.append((engine, node))

    def commit(self, session: Value, state: State, node: ast.AST) -> None:
        """Let a Session commit."""
        self.usable(session, state, node)
        before = state.use(session)
        place = (self.frame.module, node)
        if before.writes and session.parts.get("engine") is not None:
            self.engine_used(session.parts["engine"], state, node)
        if before.writes:
            self._begins(session, state, node)
        if before.slow is not None:
            self.emit("slow", before.slow[1], state, session, module=before.slow[0], opened=before.open)
        self.emit("commit", node, state, session)
        if before.writes or before.open:
            state.change(session, risk=place, open=before.open or place)
            self.frame.raised.add(state)
        state.put(state.use(session).ended(committed=True, touched=True))

    def close(self, session: Value, state: State, node: ast.AST) -> None:
        """Let a Session be closed."""
        before = state.use(session)
        if before.broken is not None and before.quiet:
            self.emit("swallowed", node, state, session)
        self.emit("closed", node, state, session)
        lost = before.lost if before.broken or session.name == "ours" else before.lost | before.writes
        state.put(before.ended(unclosed=False, lost=lost))

    # -- what a Session returns ----------------------------------------------------------------------------------------

    def _read(self, session: Value, name: str, args: list[Value], node: ast.AST) -> Value:
        cls = args[0] if args else None
        if name in {"get", "get_one"} and is_mapped(cls):
            return Value("entity", node=node, parts={"session": session, "cls": cls})
        if name == "query":
            return Value("query", node=node, parts={"session": session, "cls": cls if is_mapped(cls) else None})
        if name == "connection":
            return session
        return UNKNOWN

    def _result(self, session: Value, name: str, args: list[Value], node: ast.AST) -> Value:
        selects = bool(args) and args[0].kind == "external" and "select()" in args[0].name
        selected = args[0].parts.get("args", []) if selects else []
        mapped = selected[0] if len(selected) == 1 and is_mapped(selected[0]) else None
        parts = {"session": session, "cls": mapped}
        if name == "scalar":
            return Value("entity", node=node, parts=parts) if mapped is not None else UNKNOWN
        return Value("entities", name, node, parts=parts)

    def on_query(
        self, query: Value, name: str, args: list[Value], keywords: dict[str, Value], state: State, node: ast.Call
    ) -> Value:
        """Go through a method of a Query, or of what `execute` returns."""
        session, cls = query.parts["session"], query.parts.get("cls")
        if query.kind == "query":
            if name in {"update", "delete"}:
                self.statement(session, state, node, writes=True)
                return UNKNOWN
            if name in _ONE | _MANY | {"count", "scalar", "exists"}:
                self.statement(session, state, node, writes=False)
        if name in _ONE:
            row = query.name == "execute" and name in {"first", "one", "one_or_none", "fetchone"}
            return Value("entity", node=node, parts=query.parts) if cls is not None and not row else UNKNOWN
        if name in _MANY:
            rows = query.name == "execute" and name not in {"scalars", "unique"}
            return UNKNOWN if cls is None or rows else Value("entities", name, node, parts=query.parts)
        return query if query.kind == "query" and name not in {"count", "scalar"} else UNKNOWN

    def on_field(self, field: Value, name: str, state: State, node: ast.Call) -> Value:
        """Go through a method of an attribute of an object: a collection may change."""
        entity = field.parts["of"]
        if field.kind == "field" and name in _MUTATES:
            self.entity_written(entity, state, node)
        return UNKNOWN

    def entity_written(self, entity: Value, state: State, node: ast.AST) -> None:
        """Let an attribute of an object of a Session change."""
        session = entity.parts.get("session")
        if session is not None and not entity.parts.get("expunged"):
            use = state.use(session)
            state.change(session, writes=use.writes | {(self.frame.module, node)}, touched=True)

    # -- Engines -------------------------------------------------------------------------------------------------------

    def on_engine(self, engine: Value, name: str, keywords: dict[str, Value], state: State, node: ast.Call) -> Value:
        """Go through a method of an Engine."""
        if name == "dispose":
            self.emit("dispose", node, state, engine, close=literal(keywords.get("close"), True))
            self.async_uses = [one for one in self.async_uses if one[0].key != engine.key]
            if engine.key in state.sessions:
                state.change(engine, unclosed=False)
            return UNKNOWN
        if name == "execution_options":
            return engine.but(options={**engine.parts.get("options", {}), **keywords})
        if name not in {"connect", "begin", "raw_connection", "execute", "run_callable", "scalar"}:
            return UNKNOWN
        self.engine_used(engine, state, node)
        if name in {"connect", "begin", "raw_connection"}:
            connection = self.make("connection", engine, state, node)
            if name == "begin":
                parts = {"of": connection, "key": connection.key, "gives": connection}
                return Value("context", "commit", node, parts=parts)
            return connection
        return UNKNOWN

    def on_maker(self, maker: Value, name: str, state: State, node: ast.Call) -> Value:
        """Go through a method of a sessionmaker or of a scoped_session's factory."""
        if name == "begin":
            session = self.make_session(maker, {}, state, node)
            return Value("context", "both", node, parts={"of": session, "gives": session})
        return UNKNOWN

    def make_session(self, maker: Value, keywords: dict[str, Value], state: State, node: ast.AST) -> Value:
        """Let a sessionmaker make a Session."""
        engine = keywords.get("bind") or maker.parts.get("engine")
        engine = engine if engine is not None and engine.kind in {"engine", "async_engine"} else None
        autocommit = bool(literal(keywords.get("autocommit")) or maker.parts.get("autocommit"))
        kind = {"cls": maker.parts["class"]} if maker.parts.get("class") is not None else {}
        return self.make("session", engine, state, node, maker=maker.key, autocommit=autocommit, **kind)

    @staticmethod
    def escape(value: Value | None, state: State) -> None:
        """Let something live longer than this call."""
        if value is not None and value.key in state.sessions and value.kind != "entity":
            state.change(value, escaped=True)
        for one in value.parts.get("items", ()) if value is not None and value.kind == "list" else ():
            Databases.escape(one, state)
        for one in value.parts.get("fields", {}).values() if value is not None and value.kind == "instance" else ():
            if one.is_session:
                Databases.escape(one, state)

    def session_end(self, value: Value, state: State, node: ast.AST) -> Value:
        """Close what `contextlib.closing`, an ExitStack or a callback closes later."""
        if value.is_session and value.key in state.sessions:
            state.change(value, unclosed=False, escaped=True)
        return value if value.kind != "method" else NONE


def _same_origin(one: Value, other: Value) -> bool:
    """Tell whether two Sessions take their connections from one pool."""
    if "connection" in {one.kind, other.kind} or "ours" in {one.name, other.name}:
        return False
    engines = [value.parts.get("engine") for value in (one, other)]
    if engines[0] is not None and engines[1] is not None:
        return bool(engines[0].key == engines[1].key)
    makers = [value.parts.get("maker") for value in (one, other)]
    return makers[0] is not None and bool(makers[0] == makers[1])


def _writes(statement: Value) -> bool:
    """Tell whether a statement changes something."""
    if statement.kind == "constant":
        return bool(_WRITING_TEXT.search(str(literal(statement))))
    if statement.kind != "external":
        return False
    if _WRITING_NAME.search(statement.name):
        return True
    return any(_writes(one) for one in statement.parts.get("args", ()) if one.kind == "constant")
