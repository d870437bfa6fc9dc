"""The C program in the docs signs answers as the broker wants them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import msgspec

from devices.speech.signing import is_signed_by
from devices.wire import decode_answer
from tests.packages import EXAMPLES, has_c

SECRET = "0123456789abcdefghijklmnopqrstuv"


def test_an_answer_that_the_c_program_signed_is_the_devices(tmp_path: Path) -> None:
    has_c("openssl/evp.h")
    program, source = str(tmp_path / "sign"), str(EXAMPLES / "device-c" / "sign.c")
    strict = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["cc", *strict, source, "-lcrypto", "-o", program], check=True)
    for note in ("", "ü", "xx", "\U0001f512" * 500):
        said = {"iss": "vault-1", "id": "cmd_1", "status": "executed", "result": {"note": note}}
        asked = [program, SECRET, msgspec.json.encode(said).decode()]
        told = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
        answer = decode_answer(told.encode(), None, {})
        assert (answer.id, answer.status, answer.result) == ("cmd_1", "executed", {"note": note})
        assert answer.token is not None
        assert is_signed_by(answer.token, "vault-1", SECRET.encode())
        assert not is_signed_by(answer.token, "vault-2", SECRET.encode())
        assert not is_signed_by(answer.token, "vault-1", SECRET.upper().encode())
