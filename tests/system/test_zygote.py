"""The helper that starts `ordain` for the system tests: its failure must not look like success."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system import zygote
from tests.system.support import ORDAIN, WITHIN_SEC, environment
from tests.system.zygote import Forked


def test_the_helper_goes_on_after_a_caller_that_left_at_once() -> None:
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(str(zygote.program(ORDAIN).parents[1] / "socket"))
    child = Forked([ORDAIN, "--version"], None, environment())
    child.communicate(timeout=WITHIN_SEC)
    assert child.returncode == 0


@pytest.mark.parametrize("answer", [b"\0\0\0\1", b""], ids=["after the start", "before the start"])
def test_a_helper_that_died_does_not_look_like_success(
    answer: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a Unix socket must be short
    program = zygote.PROGRAM.format(python=sys.executable, address="socket", program=ORDAIN)
    with socket.socket(socket.AF_UNIX) as door:
        door.bind("socket")
        door.listen()
        command = [sys.executable, "-ISc", program]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as asks:
            with door.accept()[0] as caller:
                size = int.from_bytes(caller.recv(4), "big")
                caller.recv(size, socket.MSG_WAITALL)
                caller.sendall(answer)
            _, said = asks.communicate(timeout=WITHIN_SEC)
    assert (asks.returncode, said) == (1, "the helper has ended\n")
