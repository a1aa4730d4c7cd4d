"""A real PostgreSQL for tests, on a free port of 127.0.0.1, with its data in a temporary folder.

All of it goes with the process that made it, also when that is killed: tests/keeper.py. PostgreSQL refuses to run as
root, so under root it runs as the user ``postgres``, or ``nobody``.
"""

import contextlib
import os
import pwd
import re
import shutil
import signal
import time
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

import psycopg

from tests.apache_kafka import Keeper, free_ports

__all__ = ["CURE", "PostgreSQL", "unavailable"]

CURE = "install it (apt-get install postgresql)"
FOLDER_PREFIX = "kser-postgresql-"
START_TIMEOUT_S = 60
TAIL_LINES = 20
USER = "kser"
#: With what has a meaning in URLs: a storage must decode them.
PASSWORD = "p@ss/w:rd%20"
DATABASE = "kser test/%"
#: Quick, and nothing to lose; the time zone is far from UTC on purpose.
SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "max_connections": "60",
    "shared_buffers": "32MB",
    "dynamic_shared_memory_type": "mmap",
    "timezone": "Asia/Kathmandu",
}


def unavailable() -> str:
    """Why PostgreSQL cannot run here; "" when it can."""
    if _program("initdb") is None or _program("postgres") is None:
        return "no initdb and postgres in /usr/lib/postgresql or on PATH"
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        return "no setpriv on PATH, and PostgreSQL does not run as root"
    return ""


class PostgreSQL:
    """A PostgreSQL of its own, up and with an empty database when this returns, gone at stop().

    Raises RuntimeError when it does not come up; the text has the tail of its log.
    """

    def __init__(self) -> None:
        self.port = free_ports(1, None)[0]
        self._keeper = Keeper(FOLDER_PREFIX)
        self._stopped = False
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def url(self, prefix: str = "") -> str:
        """The storage's URL, everything in it encoded; with this prefix of the tables."""
        query = f"?table_prefix={prefix}" if prefix else ""
        user, password, database = (quote(text, safe="") for text in (USER, PASSWORD, DATABASE))
        return f"postgresql://{user}:{password}@127.0.0.1:{self.port}/{database}{query}"

    def connect(self, database: str = DATABASE) -> psycopg.Connection:
        """A connection that commits each statement."""
        return psycopg.connect(
            host="127.0.0.1",
            port=self.port,
            user=USER,
            password=PASSWORD,
            dbname=database,
            connect_timeout=5,
            autocommit=True,
        )

    def stop(self) -> None:
        """End it and remove its data. A second call does nothing."""
        if self._stopped:
            return
        self._stopped = True
        with contextlib.suppress(Exception):  # it may not have come up
            self._keeper.call("signal", "postgres", signal.SIGINT)  # a clean end leaves no shared memory behind
            self._wait_ended("postgres", 10)
        self._keeper.close()

    def _start(self) -> None:
        folder = self._keeper.folder
        folder.chmod(0o711)
        data = folder / "data"
        data.mkdir(0o700)
        password = folder / "password"
        password.write_text(PASSWORD)
        if (owner := _owner()) is not None:
            os.chown(data, owner.pw_uid, owner.pw_gid)
            os.chown(password, owner.pw_uid, owner.pw_gid)
        initdb = [_program("initdb"), "-D", data, "-U", USER, "-A", "scram-sha-256", f"--pwfile={password}"]
        self._spawn("initdb", [*initdb, "--no-sync", "-E", "UTF8", "--locale=C"])
        if code := self._wait_ended("initdb", START_TIMEOUT_S):
            raise RuntimeError(f"initdb ended with exit code {code}:\n{self._tail('initdb')}")
        options = [text for name, value in SETTINGS.items() for text in ("-c", f"{name}={value}")]
        self._spawn("postgres", [_program("postgres"), "-D", data, "-p", self.port, *options])
        self._wait_up()
        with self.connect("postgres") as connection:
            connection.execute('CREATE DATABASE "{}"'.format(DATABASE.replace('"', '""')))

    def _spawn(self, name: str, command: list[object]) -> None:
        if (owner := _owner()) is not None:
            # The kernel forgets whom to end with whom when the user changes: setpriv says it again.
            become = ["setpriv", f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--clear-groups"]
            command = [*become, "--pdeathsig=KILL", "--", *command]
        self._keeper.call("spawn", name, [str(part) for part in command], str(self._keeper.folder / f"{name}.log"))

    def _wait_up(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                self.connect("postgres").close()
            except psycopg.OperationalError as error:
                code = self._keeper.call("poll", "postgres")
                if code is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"PostgreSQL did not come up ({error}):\n{self._tail('postgres')}") from error
                time.sleep(0.05)
            else:
                return

    def _wait_ended(self, name: str, timeout_s: float) -> int | None:
        deadline = time.monotonic() + timeout_s
        while (code := self._keeper.call("poll", name)) is None and time.monotonic() < deadline:
            time.sleep(0.02)
        return code

    def _tail(self, name: str) -> str:
        log = self._keeper.folder / f"{name}.log"
        return "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:]) if log.exists() else ""


def _owner() -> pwd.struct_passwd | None:
    """Whom it runs as; None: whoever runs the tests."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise RuntimeError("there is neither a user postgres nor nobody to run PostgreSQL as")


def _program(name: str) -> str | None:
    found = list(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    if found:
        return str(max(found, key=lambda path: [int(number) for number in re.findall(r"\d+", path.parts[4])]))
    return shutil.which(name)
