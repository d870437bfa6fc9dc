"""What `make fuzz` feeds with bytes: one function for each door that takes input from outside.

A target raises for what must never happen: another exception than the documented one, or an outcome that
breaks a rule. It decides everything from its bytes, so an input that fails once fails always.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Callable
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import jwt
import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from paho.mqtt.client import topic_matches_sub

from broker.domain.errors import Refusal
from broker.http.edge.pages import Pager
from broker.log import chain, lines
from broker.log.chain import Row
from broker.log.driven import read_now
from broker.mqtt.access import fits, is_filter
from broker.opening import snapshot
from broker.operations import transfer
from broker.operations.backup import Refused
from broker.settings import BadSetting, Settings, load
from broker.type_files import load_types
from devices import wire
from devices.grant import TYPE, GrantRefused, GrantVerifier, Key, keys_from_jwks, params_hash
from devices.names import device_topic, is_name, parse_topic
from devices.speech.signing import is_signed_by
from devices.types import AnswerStatus, BadParams, BadType, Definition
from projections import follower
from tests.fuzz.packets import kept, packets
from tests.golden.write import HERE as GOLDEN

ANSWERS: tuple[dict[str, AnswerStatus], ...] = (
    {},
    {"1": "acknowledged", "0": "executed", "err": "failed"},
    {"ON": "executed", "OFF": "executed"},
)
NOW = 1_800_000_000
PRIVATE = Ed25519PrivateKey.from_private_bytes(bytes(32))
SECRET = b"s" * 32
PARAMS = {"for_sec": 5, "names": ["a", None]}
GRANTED = {
    "iss": "ordain",
    "aud": "door-7",
    "sub": "cmd_1",
    "jti": "cmd_1",
    "iat": NOW,
    "nbf": NOW,
    "exp": NOW + 60,
    "cmd": "lock",
    "phs": params_hash(PARAMS),
}


def answers(data: bytes) -> None:
    """What devices send: answers, statuses and, on the device, commands."""
    choice, payload = data[0] if data else 0, data[1:]
    if choice & 0x40:  # as the payload of a JWS
        payload = signed(ANSWER_HEADER, payload, hmac=True).encode()
    correlation = (None, b"cmd_1", payload[:8], b"")[choice & 3]
    try:
        answer = wire.decode_answer(payload, correlation, ANSWERS[choice >> 2 & 3 & len(ANSWERS) - 1])
    except wire.Malformed as malformed:
        str(malformed).encode()
    else:
        assert answer.id is None or is_name(answer.id), "an id that is no identifier"
        assert answer.token is None or answer.id is not None, "a signed answer that names no command"
        # The broker writes results and errors into its log, and devices may send them as JSON or msgpack.
        again = msgspec.json.decode(msgspec.json.encode(answer), type=wire.Answer)
        assert msgspec.json.encode(again) == msgspec.json.encode(answer), "an answer changes in the log"
    try:
        status = wire.decode_status(payload)
    except wire.Malformed as malformed:
        str(malformed).encode()
    else:
        assert len((status.session or "").encode()) <= wire.MAX_SESSION_BYTES
    try:
        message = wire.decode_command(payload)
    except wire.Malformed as malformed:
        str(malformed).encode()
    else:
        assert wire.decode_command(msgspec.json.encode(message)) == message, "a command changes on its way"


def topics(data: bytes) -> None:
    """A filter and a topic. Where both are right by MQTT's rules, paho must agree on whether they match."""
    text = data.decode(errors="replace").replace("\0", "")
    topic_filter, _, topic = text.partition("\n")
    parsed = parse_topic("iotee", topic)
    if parsed is not None:
        assert device_topic("iotee", *parsed) == topic, "a topic that is read as another"
        assert all(map(is_name, (parsed[0], *parsed[1].split("/"))))
    covered, right = fits(topic_filter, topic), is_filter(topic_filter)
    plain = topic != "" and not {"+", "#", "$"} & set(topic)
    if right and plain and not topic_filter.startswith("$"):
        assert covered == topic_matches_sub(topic_filter, topic), "paho sees it otherwise"
    if parsed is not None and right and not {"+", "#"} & set(topic_filter):
        assert covered == (topic_filter == topic)


def grants(data: bytes) -> None:
    """A token as it comes, or header and payload signed with a good key: only the good grant is accepted."""
    keys: dict[str, Key] = {"ed": PRIVATE.public_key(), "hs": SECRET}
    verifier = GrantVerifier(keys, "ordain", "door-7", lambda: float(NOW))
    choice, rest = data[0] if data else 0, data[1:]
    if choice & 3 == 0:
        token = rest.decode("latin-1")
    else:
        header, _, payload = rest.partition(b"\n")
        token = signed(header, payload, hmac=choice & 3 == 2)
    try:
        claims = verifier.verify(token, command_id="cmd_1", command="lock", params=PARAMS)
    except GrantRefused as refused:
        str(refused).encode()
    else:
        assert (claims.iss, claims.aud, claims.cmd) == ("ordain", "door-7", "lock")
        assert claims.sub == claims.jti == "cmd_1"
        assert claims.exp > NOW
        assert claims.phs == GRANTED["phs"]
        assert token.count(".") == 2, "a token that is not of three parts"
        assert not any(is_signed_by(token, "door-7", key) for key in keys.values()), "a grant as an answer"
    if any(is_signed_by(token, "door-7", key) for key in keys.values()):
        assert jwt.get_unverified_header(token)["typ"] == "answer+jwt"
        payload = jwt.utils.base64url_decode(token.split(".")[1])
        assert json.loads(payload)["iss"] == "door-7", "another device's answer"
    try:
        document = json.loads(rest)
    except (ValueError, RecursionError):
        return
    try:
        params_hash(document)
    except ValueError as error:
        str(error)
    if isinstance(document, dict):
        try:
            keys_from_jwks(document)
        except ValueError as error:
            str(error)


def signed(header: bytes, payload: bytes, hmac: bool) -> str:
    """A token with any bytes as header and payload, and a signature that fits them."""
    text = b".".join(jwt.utils.base64url_encode(part) for part in (header, payload))
    name = "HS256" if hmac else "EdDSA"
    seal = jwt.get_algorithm_by_name(name).sign(text, SECRET if hmac else PRIVATE)
    return (text + b"." + jwt.utils.base64url_encode(seal)).decode()


def cursors(data: bytes) -> None:
    """A list takes only the cursors that it gave."""
    pager = Pager(b"k" * 32, "commands", "acme")
    text = data.decode(errors="replace")
    try:
        place = pager.after(text)
    except Refusal as refused:
        kept(refused.kind == "invalid_request", "another refusal than that of a wrong cursor")
    else:
        assert place is not None
        assert pager.seal(place) == text, "a cursor that this list did not give"
    place = int.from_bytes(data[:8].ljust(8, b"\0"), "big")
    given = pager.seal(place)
    assert pager.after(given) == place
    for other in (Pager(b"k" * 32, "commands", "other"), Pager(b"q" * 32, "commands", "acme")):
        try:
            other.after(given)
        except Refusal:
            continue
        raise AssertionError("a cursor of another list was taken")


@cache
def scratch() -> Path:
    """A directory for the files of this process; removed when it ends."""
    made = tempfile.mkdtemp(prefix="ordain-fuzz-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


def settings(data: bytes) -> None:
    """A settings file, or with a first byte below 32 one value of the environment."""
    place = scratch() / "ordain.toml"
    place.write_bytes(data[1:])
    names = ("ORDAIN_HTTP", "ORDAIN_MQTT_LISTEN", "ORDAIN_MQTT_URL", "ORDAIN_LOG_LEVEL")
    first = data[0] if data else 0
    given = {names[first % 4]: data[1:].decode(errors="replace")} if first < 32 else {}
    try:
        found = load({}, given, None if given else str(place))
    except BadSetting as bad:
        str(bad).encode(errors="backslashreplace")
    else:
        assert msgspec.convert(msgspec.to_builtins(found), Settings) == found


def types(data: bytes) -> None:
    """A file with a device type. What is accepted must work: definitions, parameters, payloads."""
    directory = scratch() / "types"
    directory.mkdir(exist_ok=True)
    (directory / "mine.toml").write_bytes(data)
    shipped = load_types("").keys()
    try:
        found = load_types(str(directory))
    except (BadType, BadSetting) as bad:
        str(bad).encode(errors="backslashreplace")
        return
    kind = next(kind for name, kind in found.items() if name not in shipped)
    for command in (*kind.commands, *(["any"] if kind.open else [])):
        definition = kind.definition(command)
        kept = msgspec.json.encode(msgspec.to_builtins(definition), order="sorted")
        assert msgspec.json.decode(kept, type=Definition) == definition, "a definition changes in the log"
        try:
            params = kind.check_params(command)
        except BadParams as bad_params:
            str(bad_params)
            continue
        msgspec.json.encode(params)
        try:
            wire.encode_command(
                definition,
                command_id="cmd_1",
                command=command,
                params=params,
                attempt=1,
                expires_at=None,
                grant=None,
            )
        except wire.Unsendable as unsendable:
            str(unsendable)
        definition.result_fault({"value": 1})


@cache
def golden_rows() -> list[Row]:
    return [lines.as_row(line, 1) for line in (GOLDEN / "0.1.0.jsonl").read_bytes().splitlines()]


def imports(data: bytes) -> None:
    """A file to import. First byte even: lines as they come. Odd: changes to rows of a good log, with hashes
    made anew, so that what the rows say is judged too."""
    source, into = scratch() / "log.jsonl", scratch() / "data"
    source.write_bytes(data[1:] if not data or data[0] % 2 == 0 else changed(data[1:]))
    try:
        transfer.bring_in(source, into, lambda done, total: None)
    except Refused as refused:
        str(refused).encode(errors="backslashreplace")
    else:
        with closing(snapshot(Settings(data=str(into)))) as sql:
            transfer.stats(sql)
            assert read_now(sql, follower.fault, lambda position: None) is None
            transfer.export(sql, into / "again.jsonl", transfer.Only(), lambda position: None)
        rows = []
        for file in (source, into / "again.jsonl"):
            first, *rest = file.read_bytes().splitlines()
            rows.append([lines.as_row(line, lines.header(first).version) for line in rest])
        assert rows[0] == rows[1], "an imported log is exported otherwise"
    finally:
        for file in into.glob("*"):
            file.unlink()
    try:
        transfer.read_command(source)
    except Refused as refused:
        str(refused).encode(errors="backslashreplace")


def changed(script: bytes) -> bytes:
    """An export of the first rows of the golden log. `script`: how many rows, then for each change a row, a
    column, a length and that many bytes."""
    keep = script[0] % 65 + 1 if script else 1
    rows, at = golden_rows()[:keep], 1
    columns = Row._fields[1:11]
    while at + 3 <= len(script):
        place, column, length = script[at] % keep, columns[script[at + 1] % len(columns)], script[at + 2]
        value: Any = script[at + 3 : at + 3 + length]
        at += 3 + length
        if column in ("version", "schema", "recorded_at", "decided_at"):
            value = int.from_bytes(value[:8], "big") % 2**63
        elif column not in ("data", "salt"):
            value = value.decode(errors="replace")
        rows[place] = rows[place]._replace(**{column: value})
    previous, made = chain.GENESIS, []
    for row in rows:
        digest = row.digest if row.data is None or row.salt is None else chain.digest(row.salt, row.data)
        previous = chain.link(previous, *row[:10], digest)
        made.append(lines.as_line(row._replace(digest=digest, hash=previous)))
    header = lines.Header(log_id="log_fuzz", position=len(rows), hash=previous)
    return b"\n".join([lines.header_line(header), *made, b""])


TARGETS: dict[str, Callable[[bytes], None]] = {
    "packets": packets,
    "answers": answers,
    "topics": topics,
    "grants": grants,
    "cursors": cursors,
    "settings": settings,
    "types": types,
    "imports": imports,
}
ANSWER_HEADER = b'{"alg":"HS256","typ":"answer+jwt"}'
GOOD_HEADERS = {
    "EdDSA": json.dumps({"alg": "EdDSA", "typ": TYPE, "kid": "ed"}).encode(),
    "HS256": json.dumps({"alg": "HS256", "typ": TYPE, "kid": "hs"}).encode(),
}
