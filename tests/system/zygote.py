"""Starts `ordain` processes quickly: a helper process imports Ordain once, and each start is a fork of it.

A start of Python and the imports take longer than most command lines work, and the tests start about a
thousand. The children are ordinary processes: own arguments, environment, directory, standard streams,
signals and exit code. `tests/unit/cli/test_main.py` holds what a command may import, with Pythons of their
own.

Run as a program, this module is the helper: it takes one connection for each start, answers with the child's
process id, and with its exit code when it has ended. A child whose connection is closed is killed. The helper
ends when its standard input is closed.
"""

from __future__ import annotations

import gc
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[2]
# For shells: asks the helper for a child with its own standard streams, and ends like it.
PROGRAM = """\
#!{python} -IS
import json, os, signal, socket, sys

def said(signed):
    answer = helper.recv(4, socket.MSG_WAITALL)
    if len(answer) != 4:
        sys.exit("the helper has ended")
    return int.from_bytes(answer, "big", signed=signed)

def pass_on(number, _):
    try:
        os.kill(child, number)
    except ProcessLookupError:  # it has just ended
        pass

stops = {{signal.SIGINT, signal.SIGTERM}}
signal.pthread_sigmask(signal.SIG_BLOCK, stops)  # until they can be passed on
helper = socket.socket(socket.AF_UNIX)
helper.connect({address!r})
argv = [{program!r}, *sys.argv[1:]]
request = json.dumps({{"argv": argv, "cwd": os.getcwd(), "env": dict(os.environ)}}).encode()
socket.send_fds(helper, [len(request).to_bytes(4, "big")], [0, 1, 2])
helper.sendall(request)
child = said(signed=False)
for number in stops:
    signal.signal(number, pass_on)
signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)
code = said(signed=True)
sys.exit(code if code >= 0 else 128 - code)
"""


class Forked:
    """One child, with the part of the interface of `subprocess.Popen` that the tests use."""

    def __init__(self, command: list[str], cwd: Path | None, env: dict[str, str]) -> None:
        self.returncode: int | None = None
        self.args = command
        self._helper = socket.socket(socket.AF_UNIX)
        self._helper.connect(_helper())
        out, err = os.pipe(), os.pipe()
        nothing = os.open(os.devnull, os.O_RDONLY)
        request = json.dumps({"argv": command, "cwd": str(cwd or Path.cwd()), "env": env}).encode()
        socket.send_fds(self._helper, [len(request).to_bytes(4, "big")], [nothing, out[1], err[1]])
        self._helper.sendall(request)
        for used in (nothing, out[1], err[1]):
            os.close(used)
        self.stdout: IO[str] = os.fdopen(out[0], encoding="utf-8")
        self.stderr: IO[str] = os.fdopen(err[0], encoding="utf-8")
        self.pid = self._said(signed=False)

    def _said(self, *, signed: bool) -> int:
        answer = self._helper.recv(4, socket.MSG_WAITALL)
        assert len(answer) == 4, "the helper has ended"
        return int.from_bytes(answer, "big", signed=signed)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; minus the number of the signal that ended it.

        Raises:
            subprocess.TimeoutExpired: it has not ended in time.
        """
        if self.returncode is None:
            self._helper.settimeout(timeout)
            try:
                self.returncode = self._said(signed=True)
            except TimeoutError:
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
            self._helper.close()
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0.000_001)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Standard output and error of a child, which has ended after `timeout` seconds or is killed."""
        with selectors.DefaultSelector() as ready, self.stdout as out, self.stderr as err:
            said = {out: b"", err: b""}
            for stream in said:
                ready.register(stream, selectors.EVENT_READ)
            deadline = time.monotonic() + timeout
            while ready.get_map():
                found = ready.select(deadline - time.monotonic())
                if not found:
                    self.kill()
                    self.wait()
                    raise subprocess.TimeoutExpired(self.args, timeout)
                for key, _ in found:
                    part = os.read(key.fd, 65_536)
                    said[key.fileobj] += part  # type: ignore[index]
                    if not part:
                        ready.unregister(key.fileobj)
        self.wait(timeout)
        return said[out].decode(), said[err].decode()


_running: list[tuple[subprocess.Popen[bytes], str]] = []


def program(ordain: str) -> Path:
    """A program that does what `ordain` does, without the time of a start. Its file has the same name.
    SIGKILL ends this program first; its child is killed a moment later.
    """
    place = Path(_helper()).parent / "bin" / "ordain"
    if not place.exists():
        place.parent.mkdir()
        place.write_text(PROGRAM.format(python=sys.executable, address=_helper(), program=ordain))
        place.chmod(0o755)
    return place


def _helper() -> str:
    """The address of this test process's helper, which is started at the first use."""
    if not _running:
        address = str(Path(tempfile.mkdtemp(prefix="ordain-zygote-")) / "socket")
        program = [sys.executable, "-c", "from tests.system.zygote import main; main()", address]
        started = subprocess.Popen(program, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert started.stdout is not None
        assert started.stdout.readline() == b"ready\n"
        _running.append((started, address))
    return _running[0][1]


def end() -> None:
    """Ends the helper of this test process."""
    for started, address in _running:
        started.communicate(timeout=60)
        shutil.rmtree(Path(address).parent)
    _running.clear()


# --- the helper ------------------------------------------------------------------------------------


def main() -> None:
    import atexit
    import importlib
    import threading

    code: list[int] = []
    atexit.register(_leave, code)  # registered first, so it runs last

    from broker.cli.main import COMMANDS
    from broker.cli.main import main as ordain
    from broker.http.app import warm
    from devices.types import shipped_types

    for place, _ in COMMANDS.values():
        importlib.import_module(place.partition(":")[0])
    warm()  # the routes are the same for every broker
    shipped_types()
    importlib.import_module("anyio._backends._asyncio")  # loaded late, by the client for webhooks
    assert threading.active_count() == 1, "a fork must not leave a thread behind"
    gc.freeze()
    request = _serve(sys.argv[1])
    if request is not None:  # this is a child
        _become(request)
        try:
            ordain()
        except SystemExit as ended:
            if isinstance(ended.code, int):
                code.append(ended.code)
            raise


def _leave(code: list[int]) -> None:
    """Ends a child after its threads and all that was registered for its end. Python would only free each
    object now, in a copy of the helper's memory: that takes longer than most command lines work."""
    if code:
        gc.collect()  # unclosed files and unawaited coroutines warn now
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code[0])


def _serve(address: str) -> dict[str, Any] | None:
    """Forks for each connection. Returns the request in the child, and None when the helper shall end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which end this helper
    signal.signal(signal.SIGCHLD, lambda *_: None)
    ended, wakes = socket.socketpair()
    ended.setblocking(False)
    wakes.setblocking(False)
    signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
    children: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX) as door, selectors.DefaultSelector() as ready:
        door.bind(address)
        door.listen(100)
        for source in (door, ended, sys.stdin):
            ready.register(source, selectors.EVENT_READ)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while True:
            found = [key for key, _ in ready.select()]
            sources = [key.fileobj for key in found]
            for key in found:
                if key.data is not None:  # a child's caller has gone
                    ready.unregister(key.fileobj)
                    os.kill(key.data, signal.SIGKILL)
            if ended in sources:
                ended.recv(4_096)
                _report(children, ready)
            if door in sources:
                caller, _ = door.accept()
                request = _request(caller)
                if request is None:
                    caller.close()
                    continue
                pid = os.fork()
                if pid == 0:
                    for each in (caller, *children.values(), ended, wakes):
                        each.close()
                    return request
                for stream in request["streams"]:
                    os.close(stream)
                with suppress(OSError):  # the caller has gone; the next turn kills the child
                    caller.sendall(pid.to_bytes(4, "big"))
                children[pid] = caller
                ready.register(caller, selectors.EVENT_READ, pid)
            if sys.stdin in sources:
                for pid in children:
                    os.kill(pid, signal.SIGKILL)
                return None


def _request(caller: socket.socket) -> dict[str, Any] | None:
    """None if the caller has gone before its request was complete."""
    size, streams, _, _ = socket.recv_fds(caller, 4, 3)
    length = int.from_bytes(size, "big")
    with caller.makefile("rb") as sent:
        text = sent.read(length)
    if not text or len(text) < length:
        for stream in streams:
            os.close(stream)
        return None
    request: dict[str, Any] = json.loads(text)
    return request | {"streams": streams}


def _report(children: dict[int, socket.socket], ready: selectors.BaseSelector) -> None:
    """Tells the callers of all children that have ended their exit codes."""
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        code = os.waitstatus_to_exitcode(status)
        with children.pop(pid) as caller, suppress(KeyError, OSError):  # the caller has gone
            ready.unregister(caller)
            caller.sendall(code.to_bytes(4, "big", signed=True))


def _become(request: dict[str, Any]) -> None:
    """Makes the fork what a started program would be."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in enumerate(request["streams"]):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    time.tzset()
    sys.argv = request["argv"]
