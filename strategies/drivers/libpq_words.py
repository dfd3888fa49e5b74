"""What libpq says of a connection that could not be made, or that broke: it has words for it, and no code.

A host name may have several addresses, and a URL several hosts: one message then tells of every attempt. All of them
have to pass by themselves, or the next try fails like this one: what a server has refused for good is not mended by
another address where nothing answers. What is not recognised is not called transient.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import ssl

#: Before each attempt: libpq's from version 14 on, the one of older ones, and psycopg's, which makes the attempts.
_ATTEMPT = re.compile(
    r"connection to server (?:at|on socket) |could not connect to server: |"
    r"^- host: .*?, hostaddr: (?:None|'[^'\n]*'): (?:connection (?:failed|is bad): )?",
    re.MULTILINE,
)
#: A message of the server, in whatever language: its severity, a colon, two spaces. An old libpq begins a line with it.
_FROM_SERVER = re.compile(r"(^|: )([^\W\d_][^:\n\"]{1,30}):  (\S[^\n]*)", re.MULTILINE)
_MORE = frozenset({"DETAIL", "HINT", "CONTEXT"})
_CACHED_BY_PGBOUNCER = "server login has been failing, cached error: "

#: How the server, or PgBouncer in its place, says that it is busy, or on its way up or down (SQLSTATE 53300, 57P01 to
#: 57P05). A server says so in the language that it was set up in (lc_messages), for no client has chosen one yet.
#: Source: PostgreSQL's src/backend/po, PgBouncer's src.
_BUSY = """
the database system is
sorry, too many clients
remaining connection slots
too many connections
terminating connection
canceling authentication due to timeout

no more connections allowed
client connections exceeded
pgbouncer cannot connect
server shutting down
pooler is shutting down
pooler is shut down
query_wait_timeout
client_login_timeout
client_idle_timeout
suspend_timeout
admin forced disconnect
server conn crashed
server connection closed
server DNS lookup failed
connect failed
connect timeout
cannot connect

das Datenbanksystem
tut mir leid, schon zu viele
die verbleibenden Verbindungen sind
zu viele Verbindungen
Verbindung wird abgebrochen

el sistema de base
lo siento, ya tenemos demasiados
las conexiones restantes
demasiadas conexiones
terminando la conexión

le système de base
désolé, trop de clients
les emplacements de connexions restants
trop de connexions
arrêt des connexions

il database si sta
il database è in modalità
il sistema di database
spiacente, troppi client
i rimanenti slot di connessione
troppe connessioni
interruzione della connessione

データベースシステムは
現在クライアント数が多すぎます
残りの接続スロット
管理者コマンドにより

მონაცემთა ბაზის სისტემ
მიმდინარეობს მონაცემთა ბაზის სისტემის
უკაცრავად, უკვე მეტისმეტად

데이터베이스 시스템이
해당 데이터베이스 시스템은
최대 동시 접속자 수를
남은 연결 슬롯은

система баз данных
система БД
извините, уже слишком много
оставшиеся слоты
слишком много подключений
закрытие подключения

databassystemet
ledsen, för många
resterande anslutningsslottar
för många uppkopplingar
avslutar anslutning

система бази даних
вибачте, вже забагато
слоти підключень, які залишились
занадто багато підключень
завершення підключення

数据库系统
客户端连接过多
剩余连接槽位

資料庫系統
抱歉
剩餘的連線槽
"""
_SERVER_PASSES = tuple(filter(None, _BUSY.splitlines()))

#: libpq's and psycopg's own words. The last line is of `target_session_attrs`, in a failover.
_CLIENT_PASSES = re.compile(
    r"connection refused|timeout expired|timed out|no route to host|network is unreachable|connection reset|"
    r"broken pipe|closed the connection unexpectedly|connection has been closed unexpectedly|"
    r"could not receive data from server|could not send data to server|"
    r"is the server running|could not translate host name|failed to resolve host|"
    r"name resolution|ssl syscall error|unexpected eof|consuming input failed|the connection is (?:closed|lost)|"
    r"connection (?:already )?closed|"
    r"session is (?:not )?read-only|server is (?:not )?in hot standby mode|could not make a (?:writable|suitable) conn",
    re.IGNORECASE,
)
#: What the operating system says; libpq shows it in the language of the process.
_ERRORS = (
    errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE, errno.ETIMEDOUT, errno.EHOSTUNREACH,
    errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN,
)  # fmt: skip
_NO_SOCKET = errno.ENOENT
"""libpq adds a question then, whether the server is running; of a certificate that is not there it says the same."""


def passes(message: str) -> bool | None:
    """Tell whether what a connection failed with passes by itself; None where `message` does not say.

    Args:
        message: Of libpq, or of a driver that uses it.
    """
    message = message.strip()
    attempts = [attempt for attempt in _ATTEMPT.split(message) if attempt and not attempt.isspace()]
    tried = _ATTEMPT.search(message)
    if tried is not None and tried.start() > 0:
        del attempts[0]  # psycopg's "connection failed: ", or the last of many errors, which comes again
    if attempts and all(_attempt_passes(attempt) for attempt in attempts):
        return True
    return None if tried is None else False


def server_passes(text: str) -> bool:
    """Tell whether a server, or PgBouncer, that says `text` lets us in when we come again."""
    return text.removeprefix(_CACHED_BY_PGBOUNCER).startswith(_SERVER_PASSES)


def network_passes(error: BaseException | None) -> bool:
    """Tell whether `error`, which a driver written in Python gives as its cause, passes by itself."""
    if isinstance(error, ssl.SSLError):
        return False
    if isinstance(error, TimeoutError | socket.gaierror):
        return True
    return isinstance(error, OSError) and error.errno in {*_ERRORS, _NO_SOCKET}


def _attempt_passes(attempt: str) -> bool:
    found = _FROM_SERVER.findall(attempt)
    # Where libpq names the server before, what begins a line is more of the same message.
    said = [text for before, _, text in found if before] or [text for _, label, text in found if label not in _MORE]
    if said:
        return all(server_passes(text) for text in said)
    if any(server_passes(line) for line in attempt.splitlines()):  # psycopg2 takes the severity away
        return True
    return bool(_CLIENT_PASSES.search(attempt)) or any(os.strerror(number) in attempt for number in _ERRORS)
