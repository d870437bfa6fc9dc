"""Signed answers: what a device signs is read back, and everything else is refused."""

from __future__ import annotations

import base64
import json
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from devices.core import Core, Send
from devices.grant import GrantRefused, GrantVerifier, Key
from devices.memory import RamMemory
from devices.speech.signing import is_signed_by, looks_signed, public_key, sign
from devices.types import BadType, load_type, shipped_types
from devices.wire import Answer, CommandMessage, Malformed, decode_answer, encode_answer, encode_command

PRIVATE = Ed25519PrivateKey.from_private_bytes(b"p" * 32)
OTHER = Ed25519PrivateKey.from_private_bytes(b"q" * 32)
SECRET = b"s" * 32
KEYS: dict[str, tuple[Ed25519PrivateKey | bytes, Key]] = {
    "EdDSA": (PRIVATE, PRIVATE.public_key()),
    "HS256": (SECRET, SECRET),
}
DONE = Answer(id="cmd_1", status="executed", result={"open": True})
TYPE = load_type('name = "signer"\nopen = true\nanswers_signed = "required"\n')


def raw(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def text(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).decode().rstrip("=")


def token(claims: Any, key: Any = PRIVATE, alg: str = "EdDSA", **header: Any) -> str:
    payload = claims if isinstance(claims, bytes) else json.dumps(claims).encode()
    return jwt.PyJWS().encode(payload, key, algorithm=alg, headers={"typ": "answer+jwt"} | header)


CLAIMS = {"iss": "lamp-1", "id": "cmd_1", "status": "executed"}


@pytest.mark.parametrize("name", KEYS)
def test_what_a_device_signs_is_its_answer(name: str) -> None:
    mine, theirs = KEYS[name]
    payload = sign(encode_answer(DONE), "lamp-1", mine)
    answer = decode_answer(payload, b"cmd_other", {})
    assert (answer.id, answer.status, answer.result) == (DONE.id, DONE.status, DONE.result)
    assert answer.token == payload.decode()
    assert jwt.get_unverified_header(answer.token) == {"typ": "answer+jwt", "alg": name}
    assert is_signed_by(answer.token, "lamp-1", theirs)


@pytest.mark.parametrize("name", KEYS)
def test_an_answer_is_not_signed_by_another_device_or_key_or_changed(name: str) -> None:
    mine, theirs = KEYS[name]
    good = sign(encode_answer(DONE), "lamp-1", mine).decode()
    head, _, signature = good.split(".")
    changed = f"{head}.{text(json.dumps(CLAIMS | {'status': 'failed'}).encode())}.{signature}"
    assert not is_signed_by(good, "lamp-2", theirs)
    assert not is_signed_by(changed, "lamp-1", theirs)
    for other in (OTHER.public_key(), b"o" * 32, *(key for other, (_, key) in KEYS.items() if other != name)):
        assert not is_signed_by(good, "lamp-1", other)


def test_an_algorithm_that_is_not_of_the_key_is_refused() -> None:
    public = PRIVATE.public_key()
    known = raw(PRIVATE)
    assert is_signed_by(token(CLAIMS), "lamp-1", public)
    assert not is_signed_by(token(CLAIMS, known, "HS256"), "lamp-1", public)
    head = text(json.dumps({"typ": "answer+jwt", "alg": "none"}).encode())
    assert not is_signed_by(f"{head}.{text(json.dumps(CLAIMS).encode())}.", "lamp-1", public)
    assert not is_signed_by(token(CLAIMS, SECRET * 2, "HS384"), "lamp-1", SECRET * 2)


@pytest.mark.parametrize(
    "forged",
    [
        token(CLAIMS, typ="grant+jwt"),
        token(CLAIMS, typ="JWT"),
        token(CLAIMS, crit=["b64"]),
        token(CLAIMS) + "=",
        token(CLAIMS).replace(".", ".\n", 1),
        token(CLAIMS)[:-2],
        token({**CLAIMS, "iss": 7}),
        token(b"[" * 100_000),
        token(b"{}"),
        token(b'{"iss":"lamp-1","id":"cmd_1","status":"executed","\x88":1}'),
        "eyJ..",
        "..",
        "",
    ],
)
def test_a_token_of_another_kind_or_spelling_is_refused(forged: str) -> None:
    assert not is_signed_by(forged, "lamp-1", PRIVATE.public_key())


def test_no_grant_is_an_answer_and_no_answer_is_a_grant() -> None:
    """A device with a secret shares it with the broker: both sign with it."""
    grant = jwt.encode(CLAIMS, SECRET, "HS256", headers={"typ": "grant+jwt", "kid": "dev_1"})
    assert not is_signed_by(grant, "lamp-1", SECRET)
    answer = token(CLAIMS | {"aud": "lamp-1"}, SECRET, "HS256", kid="dev_1")
    verifier = GrantVerifier({"dev_1": SECRET}, "ordain", "lamp-1", lambda: 0)
    with pytest.raises(GrantRefused, match="wrong_type"):
        verifier.verify(answer, command_id="cmd_1", command="open", params={})


@pytest.mark.parametrize(
    "claims",
    [
        CLAIMS | {"id": None},
        {"iss": "lamp-1", "status": "executed"},
        {"id": "cmd_1", "status": "executed"},
        CLAIMS | {"status": "progress", "progress": {"percent": 5}},
        CLAIMS | {"status": "progress", "progress": {"percent": 5}, "seq": "7"},
        CLAIMS | {"seq": -1},
        CLAIMS | {"seq": 2**53},
        CLAIMS | {"status": "done"},
        [CLAIMS],
        b'{"iss": "lamp-1"',
        b"\xff",
        b'{"iss":"lamp-1","id":"cmd_1","status":"executed","\x88":1}',
        b'{"iss":"lamp-1","id":"cmd_1","status":"executed","result":' + b"[" * 50_000,
    ],
)
def test_a_signed_answer_that_names_nothing_or_cannot_be_read_is_malformed(claims: Any) -> None:
    with pytest.raises(Malformed):
        decode_answer(token(claims).encode(), b"cmd_1", {})


def test_no_other_answer_looks_signed() -> None:
    assert looks_signed(token(CLAIMS).encode())
    for payload in (
        b'{"status":"executed"}',
        b"ok",
        b"eyJhbGci",
        b"a.b.c",
        b"\x81\xa6status\xa8executed",
        b"",
    ):
        assert not looks_signed(payload)


def test_a_public_key_is_32_bytes_in_one_spelling_and_not_of_small_order() -> None:
    assert public_key(text(raw(PRIVATE))) == PRIVATE.public_key()
    good = text(raw(PRIVATE))
    for wrong in ("", "A" * 43, good + "=", good[:-1], "é" * 43, text(b"x" * 31), "/" * 43, "_" * 43):
        with pytest.raises(ValueError, match=r"characters|small order|base64|spelling|ASCII"):
            public_key(wrong)


def test_the_agent_signs_every_answer_and_numbers_its_progress() -> None:
    device = Core("lamp-1", TYPE, RamMemory(), {"open": False}, signs_with=PRIVATE)
    definition = TYPE.definition("open")
    fields: dict[str, Any] = {"params": {}, "attempt": 1, "expires_at": None, "grant": None}
    sent = encode_command(definition, command_id="cmd_1", command="open", **fields)
    effects = device.receive(1_000, "iotee/dev/lamp-1/rls", sent)
    command = CommandMessage(id="cmd_1", type="open")
    running = next(effect.command for effect in effects if not isinstance(effect, Send))
    assert (running.id, running.type) == (command.id, command.type)
    effects += device.progress(2_000, running, 10, "half")
    effects += device.progress(2_000, running, 20, None)
    effects += device.finish(3_000, running, {"open": True})
    effects += device.receive(4_000, "iotee/dev/lamp-1/rls", sent)  # the stored answer, signed again
    said = [decode_answer(each.payload, None, {}) for each in effects if isinstance(each, Send)]
    assert [each.status for each in said] == ["acknowledged", "progress", "progress", "executed", "executed"]
    assert all(is_signed_by(each.token or "", "lamp-1", PRIVATE.public_key()) for each in said)
    assert [each.seq for each in said] == [None, 2_000, 2_001, None, None]


def test_an_answer_that_is_too_large_once_signed_is_replaced() -> None:
    device = Core("lamp-1", TYPE, RamMemory(), {"open": False}, signs_with=SECRET)
    sent = b'{"id":"cmd_1","type":"open","params":{}}'
    _, run = device.receive(0, "iotee/dev/lamp-1/rls", sent)
    assert not isinstance(run, Send)
    (end,) = device.finish(0, run.command, {"text": "x" * 60_000})
    assert isinstance(end, Send)
    assert decode_answer(end.payload, None, {}).result == {"omitted": "too large, or not JSON"}


def test_a_device_cannot_sign_what_its_type_does_not_read() -> None:
    with pytest.raises(ValueError, match="not signed"):
        Core("lamp-1", shipped_types()["generic"], RamMemory(), {}, signs_with=SECRET)


@pytest.mark.parametrize(
    "lines",
    [
        'payload = "bare"\n[commands.open]\ntext = "1"\n',
        "open = true\ncarries_ids = false\n",
        'open = true\ncompletes_on = "published"\n',
        'open = true\nstate_topics = ["{prefix}/dev/{hardware_id}/state"]\ndone_when = "open"\n',
        'open = true\nanswers = [{ when = "ok", status = "executed" }]\n',
    ],
)
@pytest.mark.parametrize("rule", ["optional", "required"])
def test_a_type_with_signed_answers_has_no_other_way_to_say_that_a_command_is_done(
    rule: str, lines: str
) -> None:
    with pytest.raises(BadType, match="answers_signed"):
        load_type(f'name = "x"\nanswers_signed = "{rule}"\n{lines}')
