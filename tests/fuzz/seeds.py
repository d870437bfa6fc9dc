"""Where each target begins: good input, and the words of its grammar."""

from __future__ import annotations

import json
from importlib import resources

import msgspec

from broker.http.edge.pages import Pager
from broker.log import lines
from broker.mqtt import packets as p
from broker.mqtt.codec import encode
from broker.settings import Limits, MqttLimits, Settings
from devices import wire
from devices.types import CommandType, DeviceType
from tests.fuzz.targets import ANSWER_HEADER, GOOD_HEADERS, GRANTED, golden_rows, signed


def packets() -> list[bytes]:
    will = p.Will(topic="iotee/dev/door/status", payload=b"offline", qos=1, retain=True)
    props = {"receive_maximum": 2, "maximum_packet": 200, "user": [("a", "b")]}
    said = p.Publish("iotee/dev/door/ack", b"ok", 1, 1, properties={"correlation": b"cmd_1"})
    found = []
    for version in (4, 5):
        hello = p.Connect(client_id="door", version=version, user="door", password=b"t", will=will)
        if version == 5:
            hello.properties = props
        each: list[p.Packet] = [
            hello,
            p.Subscribe(2, [p.Filter("iotee/dev/door/rls", 1), p.Filter("iotee/dev/+/rbt")]),
            said,
            p.Publish("iotee/dev/door/ack", b"", 2, 3),
            p.Ack(p.PUBREL, 3),
            p.Ack(p.PUBACK, 1),
            p.Unsubscribe(4, ["iotee/dev/door/rls"]),
            p.Ping(),
            p.Goodbye(),
        ]
        for choice in (0x10, 0x22):
            first = bytes((choice | (version == 5),))
            found += [first + encode(packet, version) for packet in each]
            found.append(first + b"".join(encode(packet, version) for packet in each))
    return found


def answers() -> list[bytes]:
    texts = [
        b"1", b"err", b"online", b"ON \r\n\0",
        b'{"id":"cmd_1","status":"executed","result":{"a":[1,2.5,null,true,"x"]},"at":"2026-11-20T09:30:00Z"}',
        b'{"status":"failed","error":{"code":"jam","message":"stuck","details":{"a":1}}}',
        b'{"status":"progress","progress":{"percent":40,"note":"half"}}',
        b'{"status":"online","session":"s1"}',
        b'{"id":"cmd_1","type":"lock","params":{"for_sec":5},"attempt":2,"expires_at":"2026-11-20T09:30:00.5+01:00"}',
    ]  # fmt: skip
    packed = [msgspec.msgpack.encode(msgspec.json.decode(text)) for text in texts if text[:1] == b"{"]
    bare = wire.encode_status(True, "s" * 128)
    jws = b'{"iss":"door-7","id":"cmd_1","status":"progress","progress":{"percent":5},"seq":7}'
    return [b"\x40" + jws] + [
        bytes((choice,)) + text for choice in (0, 5, 10) for text in (*texts, *packed, bare)
    ]


def topics() -> list[bytes]:
    pairs = ["iotee/dev/door/rls\niotee/dev/door/rls", "iotee/dev/+/#\niotee/dev/door/a/b", "+/+\na/", "#\na"]
    return [pair.encode() for pair in pairs]


def grants() -> list[bytes]:
    claims = json.dumps(GRANTED).encode()
    tokens = [signed(header, claims, name == "HS256").encode() for name, header in GOOD_HEADERS.items()]
    jwk = {"kty": "OKP", "crv": "Ed25519", "kid": "ed", "alg": "EdDSA", "use": "sig", "x": "A" * 43}
    raw = [b"\0" + each for each in (*tokens, json.dumps({"keys": [jwk]}).encode())]
    return [
        *raw,
        b"\1" + GOOD_HEADERS["EdDSA"] + b"\n" + claims,
        b"\2" + GOOD_HEADERS["HS256"] + b"\n" + claims,
        b"\2" + ANSWER_HEADER + b'\n{"iss":"door-7","id":"cmd_1","status":"executed"}',
    ]


def cursors() -> list[bytes]:
    pager = Pager(b"k" * 32, "commands", "acme")
    return [pager.seal(place).encode() for place in (0, 1, 2**64 - 1)]


def settings() -> list[bytes]:
    file = (
        b'prefix = "iotee"\nhttp = "127.0.0.1:0"\nmqtt_listen = ["mqtt://[::1]:1883", "0.0.0.0:1"]\n'
        b'cors_origins = ["https://a.example"]\ntrusted_proxies = ["10.0.0.0/8"]\nwebhook_timeout_sec = 2.5\n'
        b"[limits]\nqueue_per_name = 5\n[mqtt_limits]\nburst_sec = 1.0\n[projects.acme]\nparams_bytes = 100\n"
    )
    given = [b"127.0.0.1:80", b"mqtts://[::1]:8883,mqtt://h:1", b"mqtts://user:pw%40@host:8883/?v=5", b"info"]
    once_wrong = [
        b"trusted_proxies = [1]",
        b"x = " + b"9" * 5_000,
        b"x = " + b"[" * 5_000,
        b'data = "a\\u0000b"',
    ]
    return [
        b" " + file,
        *(b" " + text for text in once_wrong),
        *(bytes((place,)) + text for place, text in enumerate(given)),
    ]


def types() -> list[bytes]:
    shipped = sorted((resources.files("devices") / "shipped").iterdir(), key=lambda file: file.name)
    renamed = [file.read_bytes() for file in shipped if file.name.endswith(".toml")]
    once_wrong = [
        b'name = "x"\nopen = true\nmax_attempts = ' + digits
        for digits in (b"9" * 5_000, b"0x" + b"f" * 5_000)
    ]
    return [*once_wrong, *(text.replace(b'name = "', b'name = "my', 1) for text in renamed)]


def imports() -> list[bytes]:
    rows = golden_rows()[:8]
    header = lines.header_line(lines.Header(log_id="log_1", position=8, hash=rows[-1].hash))
    file = b"\n".join([header, *map(lines.as_line, rows), b""])
    changes = [
        b"\x40",
        b"\x40\x02\x01\x01\x01",
        b"\x40\x40\x04\x08\x40" + bytes(7),
        b"\x40\x05\x08\x02{}",
        b"\x40\x09\x02\x08executed",
        b"\x08\x01\x03\x01\x02",
    ]
    return [b"\0" + file, *(b"\1" + change for change in changes)]


def _names(*kinds: type) -> list[bytes]:
    return [name.encode() for kind in kinds for name in kind.__struct_fields__]  # type: ignore[attr-defined]


_JSON = [b"null", b"true", b"1e999", b"1" + b"0" * 30, b"NaN", b'"\\ud800"', b"[" * 80, b'{"a":' * 80]
_TOML = [
    b" = ",
    b"[[",
    b"1979-05-27T07:32:00Z",
    b"nan",
    b"inf",
    b"0x" + b"f" * 20,
    b'"""',
    b"\\u0000",
    b"9" * 20,
    b"0x" + b"f" * 4_000,
    b"[" * 500,
    b"[1]",
]
WORDS: dict[str, list[bytes]] = {
    "packets": [
        b"\x00\x04MQTT",
        b"\x10",
        b"\xff\xff\xff\x7f",
        b"$share/g/#",
        b"\x21\x00\x01",
        b"\x27\0\0\0\x02",
    ],
    "answers": [
        *_JSON,
        *_names(wire.AnswerMessage, wire.Progress, wire.CommandMessage),
        b"\xc4\x01a",
        b"\xd6\xff\0\0\0\0",
    ],
    "topics": [b"iotee/dev/", b"$share/", b"$SYS", b"/+/", b"/#", b"\n"],
    "grants": [
        *_JSON,
        *(name.encode() for name in (*GRANTED, "alg", "typ", "kid", "crit", "b64", "keys", "none")),
    ],
    "cursors": [b"AAAA", b"=", b"==", b"_", b"-"],
    "settings": [*_TOML, *_names(Settings, Limits, MqttLimits), b"[projects.a]"],
    "types": [
        *_TOML,
        *_names(DeviceType, CommandType),
        b"[commands.x]",
        b"$ref",
        b"pattern",
        b"properties",
        b"default",
    ],
    "imports": [*_JSON, *_names(lines.Line, lines.Header), b"erased", b"created", b"defined", b"registered"],
}
SEEDS = {
    "packets": packets,
    "answers": answers,
    "topics": topics,
    "grants": grants,
    "cursors": cursors,
    "settings": settings,
    "types": types,
    "imports": imports,
}
