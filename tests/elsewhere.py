"""Two network namespaces, joined by cables that a test can pull. A cable that is pulled swallows all packets,
as a machine does that has vanished.

The test itself moves into one of them. The network of this machine stays as it is: a browser beside the test
would drop its requests if an interface came or went.

It needs Linux and root. It ends with the test, however that ends: a namespace goes with its last process, and
the cables go with the namespaces.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path

CLONE_NEWNET = 0x40000000  # setns(2)
PROGRAMS = ("unshare", "nsenter", "setpriv", "ip")
_libc = ctypes.CDLL(None, use_errno=True)


class NotHere(Exception):
    """This machine does not allow it; the message says why."""


class Place:
    """A network namespace with a loopback interface."""

    def __init__(self) -> None:
        self._holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "ip link set lo up && echo made && exec cat"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert self._holder.stdout is not None
        self.pid = self._holder.pid
        if not self._holder.stdout.readline():
            raise NotHere(f"unshare --net: {self._holder.communicate()[1].decode().strip()}")

    def run(self, *command: str) -> None:
        _run("nsenter", f"--net=/proc/{self.pid}/ns/net", *command)

    def enter(self) -> None:
        """Moves this thread, and what it starts from now on, into this place."""
        with Path(f"/proc/{self.pid}/ns/net").open() as found:
            _enter(found.fileno())

    def program(self, program: str, at: Path) -> str:
        """Writes a program to `at` that runs `program` in this place."""
        into = f"setpriv --pdeathsig KILL nsenter --net=/proc/{self.pid}/ns/net"
        at.write_text(f'#!/bin/sh\nexec {into} {program} "$@"\n')
        at.chmod(0o755)
        return str(at)

    def close(self) -> None:
        """Call this when the processes in it have ended."""
        self._holder.kill()
        self._holder.communicate()


class Cable:
    """`here` and `there`: the addresses of its two ends."""

    def __init__(self, name: str, here: Place, there: Place, network: str) -> None:
        self.here, self.there = f"{network}.1", f"{network}.2"
        self._name, self._near = name, here
        far = ("peer", "name", name, "netns", str(there.pid))
        here.run("ip", "link", "add", name, "type", "veth", *far)
        for place, address in ((here, self.here), (there, self.there)):
            place.run("ip", "address", "add", f"{address}/30", "dev", name)
            place.run("ip", "link", "set", name, "up")

    def plug(self) -> None:
        self._near.run("ip", "link", "set", self._name, "up")

    def pull(self) -> None:
        self._near.run("ip", "link", "set", self._name, "down")


class Elsewhere:
    """Two cables, `first` and `second`, from `here` to `there`. The thread of the test is `here`."""

    def __init__(self) -> None:
        """Raises:
        NotHere: this machine does not allow it.
        """
        if os.geteuid() != 0:
            raise NotHere("only root may make a network namespace")
        if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
            raise NotHere(f"{', '.join(missing)}: not installed (Debian: apt install util-linux iproute2)")
        with ExitStack() as ends:
            self.here = Place()
            ends.callback(self.here.close)
            self.there = Place()
            ends.callback(self.there.close)
            self.first = Cable("first", self.here, self.there, "198.18.1")  # RFC 2544: networks for tests
            self.second = Cable("second", self.here, self.there, "198.18.2")
            home = ends.enter_context(Path("/proc/thread-self/ns/net").open())
            self.here.enter()
            ends.callback(_enter, home.fileno())
            self._ends = ends.pop_all()

    def close(self) -> None:
        """Call this when the processes in it have ended."""
        self._ends.close()


def _enter(namespace: int) -> None:
    """Raises:
    NotHere: this machine does not allow it.
    """
    if _libc.setns(namespace, CLONE_NEWNET):
        raise NotHere(f"setns: {os.strerror(ctypes.get_errno())}")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NotHere(f"{' '.join(command)}: {done.stderr.strip()}")
