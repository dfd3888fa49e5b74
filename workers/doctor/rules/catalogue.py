"""Each fault in code: its code, what happens in production, and the remedy, by hand and with celery-alchemy."""

from __future__ import annotations

from dataclasses import dataclass

from ..findings import Finding, Level


@dataclass(frozen=True, slots=True)
class Fault:
    """A kind of fault."""

    level: Level
    what: str
    """What happens in production; names in braces are filled in."""
    by_hand: str
    with_us: str


def _error(what: str, by_hand: str, with_us: str) -> Fault:
    return Fault("error", what, by_hand, with_us)


def _warning(what: str, by_hand: str, with_us: str) -> Fault:
    return Fault("warning", what, by_hand, with_us)


CATALOGUE = {
    "session-on-task": _error(
        "{name} keeps a Session on the Task object. A Task is one object for all requests of a process: under "
        "threads, gevent and eventlet they share the Session, and a retry, Ignore or Reject leaves its transaction "
        "open.",
        "open a Session in each task with `with SessionLocal() as session:`",
        "use base=DatabaseTask of celery_alchemy and self.db; leave out the class",
    ),
    "global-session": _error(
        "{name} is one Session for all tasks of a process: what one task has not committed, another commits or "
        "rolls back, and under threads two tasks use it at one time.",
        "open a Session in each task with `with SessionLocal() as session:`",
        "use self.db, or db.session, which is the Session of the task that is running",
    ),
    "engine-at-import": _error(
        "An Engine connects while {module} is imported, before Celery forks. Its connections cross the fork: parent "
        "and children talk on one socket, and get each other's rows or `SSL error: decryption failed`.",
        "connect in a command of its own (a migration), or call engine.dispose(close=False) in worker_process_init",
        "one Alchemy(app) guards every Engine of the process across forks",
    ),
    "dispose-in-child": _error(
        "The pool process calls dispose() on an Engine that has connected at import. That closes the connections of "
        "the parent: its next statement fails, and so do those of other pool processes.",
        "engine.dispose(close=False)",
        "leave it out: one Alchemy(app) guards every Engine across forks",
    ),
    "engine-in-process-init": _error(
        "The Engine is made in worker_process_init, and this project's workers run with {pools}: Celery sends that "
        "signal under prefork and solo only, so the Engine stays None.",
        "make the Engine at import, it connects with the first statement; or use worker_init",
        "use self.db; the Engine is made where the worker pool needs it",
    ),
    "engine-per-task": _warning(
        "{name} makes an Engine for each call, and does not dispose of it: each has a connection pool of its own, "
        "and its connections stay open until the garbage collector finds them: `too many clients already`.",
        "make one Engine at import, or call engine.dispose() in a finally",
        "use self.db: one Engine for each process",
    ),
    "async-engine-loop": _error(
        "The async Engine lives as long as the process, and each task runs it in an event loop of its own. The "
        "second task gets a connection of a loop that is closed: `attached to a different loop`, `Event loop is "
        "closed`.",
        "use poolclass=NullPool, or await engine.dispose() at the end of the coroutine",
        "make the task an ordinary function and use self.db",
    ),
    "session-not-closed": _warning(
        "The Session is not closed {when}. Its connection is not given back until the garbage collector finds it, "
        "and its transaction and locks stay open: `idle in transaction`, `QueuePool limit reached`.",
        "use `with SessionLocal() as session:`, or close it in a finally",
        "use self.db: it is closed at each ending of a task",
    ),
    "generator-session": _warning(
        "next() takes a Session out of a generator that is then thrown away: Python closes the generator at once, "
        "its `finally` closes the Session before it is used, and what is opened afterwards is never closed.",
        "use contextlib.contextmanager(...) and a `with` block",
        "use self.db, or with db.unit_of_work() as session",
    ),
    "scoped-session": _warning(
        "{name} is a scoped_session that this task does not remove(){when}: its transaction stays open, and the "
        "next task in the same thread has its objects and its unfinished work.",
        "call {name}.remove() in a finally, or in a receiver of task_postrun",
        "write db.share({name}), and it is the task's Session in tasks; or use db.session",
    ),
    "thread-local-session": _warning(
        "{name} keeps a Session for its thread, and nothing closes it. Its transaction stays open, and the next task "
        "in the same thread has its objects and its unfinished work; under prefork that is every task of the process.",
        "open a Session in each task with `with SessionLocal() as session:`, or use scoped_session and its remove()",
        "use db.session, which is the Session of the task that is running",
    ),
    "session-in-threads": _error(
        "A Session is handed to other threads, greenlets or coroutines ({what}). A Session and its connection serve "
        "one at a time: `This session is provisioning a new connection; concurrent operations are not permitted`, "
        "lost rows.",
        "open a Session in each of them, and hand over ids",
        "open `with db.unit_of_work() as session:` in each of them",
    ),
    "session-in-session": _warning(
        "A second Session of the same Engine is used while the first one has a transaction open. The task needs two "
        "connections at a time: tasks that each hold one wait for each other (`QueuePool limit`), and the second "
        "does not see what the first has not committed, or waits for its locks.",
        "hand the first Session over, or commit it before",
        "use db.session down the call stack: it is the task's Session",
    ),
    "context-pushed-once": _warning(
        "A Flask application context is pushed once, and not popped: Flask-SQLAlchemy's db.session belongs to the "
        "context, so all tasks of the process share one Session, which is never removed. Threads have no context at "
        "all.",
        "use `with app.app_context():` in each task, or in the task class's __call__",
        "use self.db, and db.share(db.session) for code that uses db.session",
    ),
    "swallowed-error": _warning(
        "An error of the database is caught and not rolled back. {then}",
        "call session.rollback() in the except block, or let the error go up",
        "the same: call self.db.rollback(); for one statement use `with self.db.begin_nested():`",
    ),
    "sends-before-commit": _warning(
        "{name} writes, and sends a task before that is committed: the other task may run before it can see the "
        "row, or for a row that is rolled back.",
        "send after the commit",
        "use delay_on_commit(...) or apply_async_on_commit(...), or set alchemy_enqueue_on_commit = True",
    ),
    "on-commit-outside": _warning(
        "{name} is no task, and has no COMMIT to wait for at {call}(): it is sent at once, before the COMMIT, and "
        "stays after a rollback.",
        "call delay() after the commit",
        "in a web application share its scoped_session (db.share(...)), or follow its Session in a dependency (with "
        "db.follow(session):), or pass session=. Elsewhere open a unit of work: with db.unit_of_work():",
    ),
    "slow-in-transaction": _warning(
        "{what} runs between a statement and the commit: the transaction, its locks and its connection are held for "
        "as long as the other side takes (`idle in transaction`, `QueuePool limit reached`).",
        "commit before it, and write in a second transaction",
        "call self.db.commit() before it: the connection goes back, and self.db works on",
    ),
    "objects-as-arguments": _error(
        "{what} is an argument of a task. It cannot be encoded as JSON (`Object of type ... is not JSON "
        "serializable`); pickled, the other task has old values and no Session.",
        "send the id, and load the object in the task",
        "the same; `late(lambda: user.id)` where the id comes with the flush",
    ),
    "objects-kept": _warning(
        "An object of a Session is kept in {where}, beyond the task. Its values grow old; after the Session is "
        "closed an attribute that is not loaded raises DetachedInstanceError; while it is open, two tasks share it.",
        "keep ids and plain values, or expunge() a fully loaded object",
        "the same",
    ),
    "commit-in-signal": _error(
        "{name} commits in the signal {signal}. By then the result is stored and the next task of a chain is sent; "
        "a COMMIT that fails is only logged.",
        "commit in the task",
        "Commit in the task: with base=DatabaseTask its return commits, before the result is stored",
    ),
    "commit-in-hook": _error(
        "{name} commits in a hook of the task. Celery skips hooks for some endings, and a COMMIT that fails there "
        "comes too late.",
        "commit in the task",
        "Commit in the task: with base=DatabaseTask its return commits, before the result is stored",
    ),
    "closes-session": _error(
        "The task closes its own self.db with work that is not committed: the work is rolled back, and the task fails.",
        "leave the close out",
        "the same: the Session is committed and closed when the task returns",
    ),
    "missing-base": _error(
        "{name} uses {attr}, and its task has no base class that gives it: AttributeError when it runs.",
        "give the task a base class that has it",
        "write base=DatabaseTask in the decorator, or Celery(task_cls='celery_alchemy:DatabaseTask')",
    ),
    "task-option": _warning(
        "{option} is no option of a task. Celery takes it without a word, and it does nothing.",
        "write {nearest}",
        "the same",
    ),
    "never-commits": Fault(
        "note",
        "{name} writes, and commits on no way through it: what it writes is rolled back.",
        "call session.commit(), or use `with SessionLocal.begin() as session:`",
        "use base=DatabaseTask: its return commits",
    ),
    "session-state": _warning(
        "{name} executes {what}, which stays with the connection: the next task that gets the connection has it too.",
        "use what ends with the transaction: SET LOCAL, set_config(..., true), ON COMMIT DROP, pg_advisory_xact_lock",
        "the same; or set alchemy_reset_on_return = True (docs/tenants.md)",
    ),
    "unknown-ignore": Fault(
        "note", "A comment ignores {what}, which is no code of the doctor's.", "write one of docs/doctor.md", "the same"
    ),
    "not-read": Fault(
        "note",
        "{name} calls more than was read: after {why}, the doctor leaves further calls out, {first}() first. Faults in "
        "them are not found from here.",
        "look at what {first}() does with the Session of the task",
        "the same",
    ),
    "unreadable": Fault(
        "note", "The file cannot be read, and was left out: {what}", "see whether it is Python", "the same"
    ),
}  # fmt: skip


def finding(code: str, where: str, /, *, level: Level | None = None, **words: str) -> Finding:
    """Return a finding, its words filled in."""
    fault = CATALOGUE[code]
    by_hand, with_us = (text.format(**words) for text in (fault.by_hand, fault.with_us))
    ours = "" if with_us.startswith("the same") and with_us == "the same" else f" With celery-alchemy: {with_us}."
    return Finding(level or fault.level, code, fault.what.format(**words), f"By hand: {by_hand}.{ours}", where)
