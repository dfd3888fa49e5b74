"""Sessions: whose they are, whether they are closed, and what is done while they are open."""

from __future__ import annotations

import ast
import re

from ..reading.state import Event, Use
from ..reading.values import Value, commits_itself, is_ours, is_task_class, literal
from . import engines
from .facts import Facts

_RUNS = {"task", "late", "hook"}
_SLOW = re.compile(
    r"^(?:(?:requests|httpx|aiohttp|urllib3|boto3|botocore|smtplib|ftplib|paramiko|stripe|openai|anthropic|twilio)\b.*"
    r"\.(?:get|post|put|patch|delete|head|options|request|send|stream|urlopen|sendmail|send_message|create|retrieve"
    r"|put_object|get_object|upload_file\w*|download_file\w*|invoke|list|exec_command)"
    r"|(?:time|gevent|eventlet|asyncio|trio|anyio)\.sleep|urllib\.request\.(?:urlopen|urlretrieve)"
    r"|subprocess\.(?:run|call|check_call|check_output)|os\.system)$"
)
_SHORT_S = 0.1


def is_shared(value: Value) -> bool:
    """Tell whether a value is one Session itself, no proxy that finds the right one."""
    return value.kind == "session" and value.name not in {"proxy", "ours"}


def sessions_of(value: Value | None) -> list[Value]:
    """Return the Session that a value is, or that an object has."""
    if value is None:
        return []
    inner = value.parts["fields"].values() if value.kind == "instance" else ()
    return [one for one in (value, *inner) if is_shared(one)]


def on_assigned(event: Event, facts: Facts) -> None:
    """A name of a module, or of a class, stands for something now."""
    name = str(event.info["name"])
    if event.value is not None and event.value.kind == "scoped":
        facts.names.setdefault(event.value.key, name)
    for session in sessions_of(event.value):
        later = event.entry.kind != "import"
        if isinstance(event.value, Value) and event.value.parts.get("later"):
            continue
        used = _is_used(facts, name.rpartition(".")[2])
        facts.add(
            "global-session",
            event,
            holds=lambda key=session.key, counts=later or used: counts and key not in facts.closed_at_import,  # type: ignore[misc]
            name=name,
        )


def _is_used(facts: Facts, name: str) -> bool:
    return any(
        isinstance(one, ast.Name | ast.Attribute) and name in {getattr(one, "id", ""), getattr(one, "attr", "")}
        for module in facts.project.modules.values()
        for function in ast.walk(module.tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for one in ast.walk(function)
    )


def on_in_class(event: Event, facts: Facts) -> None:
    """A class has something for all its objects."""
    if event.value is not None and is_shared(event.value):
        code = "session-on-task" if is_task_class(event.info["cls"]) else "global-session"
        name = event.info["cls"].name if code == "session-on-task" else f"{event.info['cls'].name}.{event.info['name']}"
        facts.add(code, event, at=(event.module, event.value.node or event.node), name=name)


def on_task_attribute(event: Event, facts: Facts) -> None:
    """A Task keeps something."""
    if sessions_of(event.value):
        facts.add("session-on-task", event, name=event.info["cls"].name.rpartition(".")[2])


def on_left(event: Event, facts: Facts) -> None:
    """A task, a hook or a function was left."""
    if event.entry.kind not in _RUNS:
        return
    for use in event.state.sessions.values():
        if use.value.kind.endswith("engine"):
            engines.on_left(event, use, facts)
        elif use.value.kind == "connection":
            _uncommitted(event, use, facts)
        elif use.value.name == "ours":
            if use.broken is not None and not event.info["failed"]:
                then = "The task returns with a broken transaction: everything is rolled back, and the task fails."
                facts.add("swallowed-error", event, at=use.broken, then=then)
            _uncommitted(event, use, facts)
        else:
            _left_open(event, use, facts)
            _uncommitted(event, use, facts)


def _left_open(event: Event, use: Use, facts: Facts) -> None:
    failed = event.info["failed"]
    scoped = use.value if use.value.kind == "scoped" else use.value.parts.get("scoped")
    if (
        scoped is not None
        and use.value.parts.get("entry") != "import"
        and use.open is not None
        and scoped.module is not None
        and scoped.node is not None
    ):
        when = " when it raises" if failed else ""
        at = (scoped.module, scoped.node)
        facts.add(
            "scoped-session",
            event,
            at=at,
            holds=lambda: scoped.key not in facts.removed and not facts.waits,
            name=facts.names.get(scoped.key, "This"),
            when=when,
        )
    if use.made is None or not use.unclosed or use.escaped:
        return
    if use.open is not None or (use.touched and not failed and use.value.key not in facts.closed):
        facts.add("session-not-closed", event, at=use.made, when="when the task raises" if failed else "at the end")


def _uncommitted(event: Event, use: Use, facts: Facts) -> None:
    lost = use.writes | use.lost
    task = event.entry.task
    if use.value.name == "ours" and task is not None and not is_ours(task.parts.get("base")):
        return  # missing-base has been told
    if not lost or event.info["failed"] or use.committed or commits_itself(use.value) or use.escaped:
        return
    if event.entry.kind == "task" and (use.made is not None or use.value.name == "ours"):
        key = use.value.key
        at = min(lost, key=lambda place: (place[0].name, getattr(place[1], "lineno", 0)))
        facts.add("never-commits", event, at=at, holds=lambda: key not in facts.committed, name=event.entry.name)


def on_closed(event: Event, facts: Facts) -> None:
    """A Session was closed or removed."""
    assert event.value is not None
    facts.closed.add(event.value.key)
    if event.entry.kind in {"late", "hook", "process_init"}:
        facts.removed.add(event.value.key)
    if event.value.parts.get("flask"):
        facts.removed.add(event.value.key)
    if event.entry.kind == "import":
        facts.closed_at_import.add(event.value.key)
    if event.value.name == "ours" and event.entry.ours and event.state.use(event.value).writes:
        facts.add("closes-session", event)


def on_commit(event: Event, facts: Facts) -> None:
    """A Session commits."""
    session = event.value
    assert session is not None
    facts.committed.add(session.key)
    if event.entry.kind == "late":
        own = event.state.use(session).made is not None or (session.name == "ours" and session.key != "ours")
        if not own and not event.entry.ours:
            too_late(event, facts)


def too_late(event: Event, facts: Facts) -> None:
    """Something commits after the result is stored."""
    signal = event.entry.signal
    facts.add("commit-in-signal" if signal else "commit-in-hook", event, name=event.entry.name, signal=signal)


def on_broken(event: Event, facts: Facts) -> None:
    """A Session is used after its error was swallowed."""
    assert event.value is not None
    if event.entry.kind not in _RUNS:
        return
    at = event.state.use(event.value).broken
    then = "The next statement on this Session raises PendingRollbackError, or `current transaction is aborted`."
    facts.add("swallowed-error", event, at=at, then=then)


def on_swallowed(event: Event, facts: Facts) -> None:
    """A Session is closed after its error was swallowed."""
    assert event.value is not None
    if event.entry.kind in _RUNS:
        at = event.state.use(event.value).broken
        facts.add("swallowed-error", event, at=at, then="The work is lost, and the task succeeds all the same.")


def on_library(event: Event, facts: Facts) -> None:
    """Something of a library was called."""
    assert event.value is not None
    if event.value.last == "commit" and event.entry.kind == "late" and not event.entry.ours:
        too_late(event, facts)
    if not _SLOW.search(event.value.name) or event.entry.kind != "task":
        return
    args = event.info["args"]
    if (
        event.value.last == "sleep"
        and args
        and isinstance(literal(args[0]), int | float)
        and literal(args[0]) < _SHORT_S
    ):
        return
    for use in list(event.state.sessions.values()):
        if use.open is not None and use.slow is None and use.value.kind != "connection":
            event.state.change(use.value, slow=(event.module, event.node))


def on_slow(event: Event, facts: Facts) -> None:
    """A transaction ends in which there was slow work."""
    if event.entry.kind == "task":
        node = event.node
        what = ast.unparse(node.func) + "()" if isinstance(node, ast.Call) else "slow work"
        facts.add("slow-in-transaction", event, at=(event.info["module"], node), what=what)


def on_nested(event: Event, facts: Facts) -> None:
    """A Session is used while another one is open."""
    assert event.value is not None
    if event.entry.kind in _RUNS:
        use = event.state.use(event.value)
        facts.add("session-in-session", event, at=use.made)


def on_generator(event: Event, facts: Facts) -> None:
    """A Session was taken out of a generator that is thrown away."""
    if event.entry.kind in _RUNS | {"function"}:
        facts.add("generator-session", event)


def on_spawn(event: Event, facts: Facts) -> None:
    """A Session was handed to something that runs at the same time."""
    facts.add("session-in-threads", event, what=f"{event.info['what']}")


def on_kept(event: Event, facts: Facts) -> None:
    """Something was put where it lives longer than a task."""
    value = event.value
    assert value is not None
    if is_shared(value) and event.info["where"] == "cache":
        facts.add("global-session", event, name="What a cached function returns")
    elif is_shared(value) and event.info.get("container"):
        name = str(event.info["where"])
        facts.add("global-session", event, holds=lambda: not _is_emptied(facts, name), name=f"A Session in {name}")
    loaded = value.kind in {"entity", "entities"} and value.parts.get("session") is not None
    if loaded and not value.parts.get("expunged"):
        where = event.info["where"]
        module = event.info.get("module") or event.module
        facts.add("objects-kept", event, at=(module, event.node), where="a cache" if where == "cache" else where)


def on_thread_local(event: Event, facts: Facts) -> None:
    """A Session is kept for its thread."""
    session, name = event.value, str(event.info["name"])
    assert session is not None
    owner, _, attribute = name.rpartition(".")

    def holds() -> bool:
        closed = any(isinstance(key, tuple) and key[0] is session.node for key in facts.closed)
        return not closed and not _is_put_away(facts, owner.rpartition(".")[2], attribute)

    facts.add("thread-local-session", event, holds=holds, name=name)


def _is_put_away(facts: Facts, owner: str, attribute: str) -> bool:
    """Tell whether a function closes, removes or deletes what stands in an attribute of a `threading.local()`."""
    for module in facts.project.modules.values():
        for function in ast.walk(module.tree):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            inside = list(ast.walk(function))
            names = {getattr(one, "id", getattr(one, "attr", "")) for one in inside}
            names |= {one.value for one in inside if isinstance(one, ast.Constant) and isinstance(one.value, str)}
            ends = any(isinstance(one, ast.Delete) for one in inside) or names & {"close", "remove", "delattr"}
            if {owner, attribute} <= names and ends:
                return True
    return False


def _is_emptied(facts: Facts, container: str) -> bool:
    """Tell whether something takes out of a container what was put into it."""
    looks = re.compile(rf"\b{re.escape(container)}\.pop\(|\bdel {re.escape(container)}\[")
    return any(looks.search(ast.unparse(module.tree)) for module in facts.project.modules.values())


def commits_at_return(base: Value | None, options: dict[str, Value]) -> bool:
    """Tell whether a task of ours commits when it returns."""
    said = options.get("commit_on_success")
    for one in (base,) if said is None and base is not None and base.kind == "class" else ():
        said = one.parts["env"].get("commit_on_success")
    return is_ours(base) and literal(said, True) is not False
