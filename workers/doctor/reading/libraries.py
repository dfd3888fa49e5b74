"""What calls of libraries' names do, and return."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from typing import Any

from .calls import SENDS, USES_ENGINE, Calls
from .state import State
from .values import UNKNOWN, Value, external, literal, made_by

_NOT_CELERY = {"invoke", "prefect", "airflow", "huey", "luigi", "locust", "fabric", "dramatiq", "taskiq"}
_SIGNAL = re.compile(r"(\w+)\.connect(?:\(\))?$")
#: What runs a coroutine, in an event loop that may be the process's own.
_RUNNERS = {"run_until_complete", "run_coroutine_threadsafe", "run"}
_SPAWNS = re.compile(
    r"threading\.(?:Thread|Timer)$|Executor\(\)\.(?:submit|map)$|(?:^|\.)Pool\(\)\.\w+$|multiprocessing\.\w+$"
    r"|(?:^|\.)(?:gevent|eventlet)\.spawn\w*$|to_thread$|run_in_executor$|run_in_threadpool$|asyncio\.gather$"
)


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a library's name."""

    target: Value
    args: list[Value]
    keywords: dict[str, Value]
    state: State
    node: Any


class Libraries(Calls):
    """The libraries whose calls mean something to a Session."""

    quiet: int
    async_uses: list[tuple[Value, ast.AST]]

    def library(
        self, target: Value, args: list[Value], keywords: dict[str, Value], state: State, node: ast.Call
    ) -> Value:
        """Go through a call of a library's name."""
        kind = made_by(target)
        if kind:
            return self._made(kind, target, args, keywords, state, node)
        last = target.last.removesuffix("()")
        function = args[0] if args and args[0].kind in {"function", "partial"} else None
        if last in {"task", "shared_task"} and target.root not in _NOT_CELERY:
            app = None if target.root == "celery" else target
            known = target if "app" in target.parts else external(target.name, app=app, **target.parts)
            return self._task_decorator(known, args, keywords, state, node)
        of_name: Any = getattr(self, f"_name_{last}", None)
        found = of_name(Call(target, args, keywords, state, node)) if of_name is not None else None
        if found is not None:
            return found  # type: ignore[no-any-return]
        signal = _SIGNAL.search(target.name)
        if signal is not None and function is not None:
            self.handlers.append((signal[1], function))
            return function
        if last in SENDS and target.root not in {"multiprocessing", "concurrent", "billiard"}:
            self.emit("send", node, state, target, args=[*args, *keywords.values()], keywords=keywords)
        if _SPAWNS.search(target.name):
            self._spawn(target, node, state)
        for one in (*args, *keywords.values()):
            if one.kind.endswith("engine") and last in USES_ENGINE:
                self.engine_used(one, state, node)
            elif one.kind == "method" and one.name in {"close", "remove", "aclose"} and one.parts["of"].is_session:
                self.session_end(one.parts["of"], state, node)
            elif one.is_session and last in {"addCleanup", "callback"}:
                self.session_end(one, state, node)
        self.emit("library", node, state, target, args=args)
        if target.name in {"sys.exit", "os._exit", "exit", "quit"}:
            state.dead = True
        parts = {"args": target.parts.get("args") or args, "keywords": keywords}
        parts["entry"] = target.parts.get("entry", self.entry.kind)
        return Value("external", f"{target.name}()", node, parts=parts)

    def _made(
        self, kind: str, target: Value, args: list[Value], keywords: dict[str, Value], state: State, node: ast.Call
    ) -> Value:
        """Return what SQLAlchemy, Celery or we make."""
        if kind in {"engine", "async_engine"}:
            return self.make(kind, None, state, node, poolclass=keywords.get("poolclass"), options=keywords)
        bind = next(
            (one for one in (keywords.get("bind"), *args) if one is not None and one.kind.endswith("engine")), None
        )
        if kind == "session":
            return self.make(
                "session", bind, state, node, maker=node, autocommit=bool(literal(keywords.get("autocommit")))
            )
        parts: dict[str, Any] = {"key": node, "engine": bind, **({"args": args} if kind == "signature" else {})}
        if kind == "maker":
            parts["class"] = next(
                (one for one in (keywords.get("class_"), *args) if one is not None and one.kind == "class"), None
            )
            parts["autocommit"] = bool(literal(keywords.get("autocommit")))
        elif kind == "scoped" and args:
            parts |= {"engine": args[0].parts.get("engine"), "maker": args[0].key}
        elif kind == "celery":
            parts["task_cls"] = keywords.get("task_cls")
        made = Value(kind, "", node, self.frame.module, parts)
        self.apps.extend([made] if kind == "celery" else [])
        self.emit("made", node, state, made, args=args, keywords=keywords)
        return made

    def _spawn(self, target: Value, node: ast.Call, state: State) -> None:
        together = target.last == "gather"
        found = [
            value
            for one in (*node.args, *(key.value for key in node.keywords))
            for value in self._sessions_in(one, state)
        ]
        many = any(isinstance(one, ast.Starred) for one in node.args)
        if found and (not together or many or len(found) > len({value.key for value in found})):
            self.emit("spawn", node, state, found[0], what=target.name)

    def _sessions_in(self, node: ast.expr, state: State) -> list[Value]:
        """Return the Sessions that an argument hands over, those that a function has around it among them."""
        found = []
        self.quiet += 1
        for one in ast.walk(node):
            if not isinstance(one, ast.Name | ast.Attribute) or not isinstance(one.ctx, ast.Load):
                continue
            value = self.evaluate(one, State(state.env, state.outer, dict(state.sessions)))
            found.append(value)
            if value.kind == "bound":
                found += value.parts["self"].parts.get("fields", {}).values()
            if value.kind == "function" and value.parts["outer"] and value.node is not None:
                inner = {name.id for name in ast.walk(value.node) if isinstance(name, ast.Name)}
                bound = {name.arg for name in ast.walk(value.node) if isinstance(name, ast.arg)}
                bound |= {
                    name.id
                    for name in ast.walk(value.node)
                    if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
                }
                found += [env[name] for env in value.parts["outer"] for name in inner - bound if name in env]
        self.quiet -= 1
        return [one for one in found if one.kind == "session" and one.name != "proxy"]

    def own_loop(self, target: Value, state: State, node: ast.Call) -> None:
        """Tell of a coroutine that runs in an event loop of its own, and uses an Engine of the process.

        It may have been made before, and handed to a function of the project that runs it.
        """
        new_loop = target.name in {"asyncio.run", "anyio.run", "asyncio.Runner().run", "uvloop.run"}
        new_loop = new_loop or target.name.endswith("async_to_sync()")
        if target.name == "asyncio.new_event_loop().run_until_complete":
            new_loop = target.parts.get("entry") != "import"
        if not new_loop and target.last not in _RUNNERS:
            return
        used, self.async_uses = self.async_uses, []
        if used and new_loop:
            at = (self.frames[1].module, self.stack[1]) if len(self.stack) > 1 else (self.frame.module, node)
            self.emit("new-loop", node, state, used[0][0], at=at)

    # -- names with a meaning of their own -----------------------------------------------------------------------------

    def _name_next(self, call: Call) -> Value | None:
        generator = call.args[0] if call.args else UNKNOWN
        if generator.kind not in {"generator", "context"} or call.target.name not in {"next", "anext"}:
            return None
        return self.taken(generator, call.state, call.node, kept=not isinstance(call.node.args[0], ast.Call))

    _name_anext = _name_next

    def _name_setattr(self, call: Call) -> Value | None:
        if call.args and call.args[0].kind == "entity":
            self.entity_written(call.args[0], call.state, call.node)
        return None

    def _name_contextmanager(self, call: Call) -> Value | None:
        return self._flagged(call.args, "context")

    _name_asynccontextmanager = _name_contextmanager

    def _name_lru_cache(self, call: Call) -> Value | None:
        return self._flagged(call.args, "cached")

    _name_cache = _name_lru_cache

    def _name_property(self, call: Call) -> Value | None:
        return self._flagged(call.args, "property")

    def _name_cached_property(self, call: Call) -> Value | None:
        function = self._flagged(call.args, "property")
        return self._flagged([function], "kept") if function is not None else None

    def _name_staticmethod(self, call: Call) -> Value | None:
        return self._flagged(call.args, "static")

    def _name_classmethod(self, call: Call) -> Value | None:
        return self._flagged(call.args, "class")

    def _name_wraps(self, call: Call) -> Value | None:
        return call.args[0] if call.args and call.target.name.endswith("()") else None

    def _name_partial(self, call: Call) -> Value | None:
        return (
            Value(
                "partial",
                node=call.node,
                parts={"function": call.args[0], "args": call.args[1:], "keywords": call.keywords},
            )
            if call.args
            else None
        )

    def _name_closing(self, call: Call) -> Value | None:
        return (
            Value("context", "closing", call.node, parts={"of": call.args[0], "gives": call.args[0]})
            if call.args
            else None
        )

    _name_aclosing = _name_closing

    def _name_enter_context(self, call: Call) -> Value | None:
        return (
            self.session_end(self.enter(call.args[0], call.state, call.node), call.state, call.node)
            if call.args
            else None
        )

    _name_enter_async_context = _name_enter_context

    def _name_app_context(self, call: Call) -> Value | None:
        return Value("context", "flask", call.node, parts={"of": UNKNOWN, "gives": UNKNOWN})

    _name_test_request_context = _name_app_context

    def _name_async_to_sync(self, call: Call) -> Value | None:
        if call.target.name.endswith("()") and call.target.parts["args"]:
            return self.called(call.target.parts["args"][0], call.args, call.keywords, call.state, call.node)
        return None

    def _name_run(self, call: Call) -> Value | None:
        if call.target.name == "anyio.run" and call.args:
            return self.called(call.args[0], call.args[1:], call.keywords, call.state, call.node)
        return call.args[0] if call.args and call.target.root in {"asyncio", "uvloop"} else None

    def _name_run_until_complete(self, call: Call) -> Value | None:
        return call.args[0] if call.args else None

    def _name_iter(self, call: Call) -> Value | None:
        return call.args[0] if call.args and call.args[0].kind == "generator" else None

    def _name_list(self, call: Call) -> Value | None:
        value = call.args[0] if call.args else UNKNOWN
        if value.kind == "query":
            self.statement(value.parts["session"], call.state, call.node, writes=False)
        known = value.kind in {"entities", "query"} and value.parts.get("cls") is not None
        return Value("entities", "all", call.node, parts=value.parts) if known else None

    _name_tuple = _name_set = _name_sorted = _name_list

    def _name_listens_for(self, call: Call) -> Value | None:
        # The recipe that discards, at checkout, a connection of another process.
        if len(call.args) > 1 and literal(call.args[1]) == "checkout":
            self.emit("guarded", call.node, call.state, call.args[0])
        return None

    _name_listen = _name_listens_for

    def _name_register_at_fork(self, call: Call) -> Value | None:
        function = call.keywords.get("after_in_child")
        if function is not None and function.kind == "function":
            self.handlers.append(("worker_process_init", function))
        return None

    _name_wait_for = _name_run_until_complete

    def _name_super(self, call: Call) -> Value | None:
        return external("?")

    def _flagged(self, args: list[Value], flag: str) -> Value | None:
        if not args or args[0].kind != "function":
            return None
        function = args[0].but(flags=args[0].parts["flags"] | {flag})
        if function.node is not None:
            self.functions[function.node] = function
        return function
