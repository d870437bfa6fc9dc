"""Writes the parts of the documents that come from code: the picture of states, tables, examples.

`python -m scripts.draw` rewrites them; a test compares them with the code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import jwt
import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cyclopts import App

from broker.cli.main import application
from broker.http.edge.errors import BY_STATUS, DOCUMENTED, STATUS
from devices.grant import TYPE, Claims, params_hash
from devices.names import command_topic
from devices.types import DeviceType, load_type, shipped_types
from devices.wire import encode_command
from scripts import vocabulary
from scripts.picture import picture

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
EXAMPLES = DOCS / "examples"
LANGUAGES = {".py": "python", ".mjs": "js", ".c": "c"}
COMMAND = f"cmd_{'0' * 26}"
PARAMS = {"for_sec": 5}
# A PUBLISH of MQTT 3.1.1 with a payload of 106 to 16,000 bytes, QoS 1.
FIXED_HEADER, PACKET_ID = 3, 2


def code(path: str, part: str) -> str:
    """The lines of an example between `begin PART` and `end PART`."""
    source = EXAMPLES / path
    inside = source.read_text().split(f"begin {part}")[1].split(f"end {part}")[0]
    lines = "\n".join(inside.splitlines()[1:-1]).strip()
    return f"```{LANGUAGES[source.suffix]}\n{lines}\n```\n"


def commands() -> str:
    """Every command of `ordain`, with the first sentence of its help."""
    found = sorted(_commands(application(), ""))
    rows = [f"| `ordain {name}` | {_sentence(one.help)} |" for name, one in found]
    return "\n".join(["| command | |", "|---|---|", *rows]) + "\n"


def _commands(group: App, before: str) -> Iterator[tuple[str, App]]:
    for name in group:
        if not name.startswith("-"):
            found = group[name]
            inside = list(_commands(found, f"{before}{name} "))
            yield from inside or [(before + name, found)]


def _sentence(text: str | None) -> str:
    return re.split(r"(?<=\.)\s", " ".join((text or "").split()), maxsplit=1)[0].replace("|", "\\|")


def errors() -> str:
    """Every HTTP status of an error with its codes, and what they mean."""
    codes: dict[int, list[str]] = {}
    for code, status in STATUS.items():
        codes.setdefault(status, []).append(code)
    rows = []
    for status, named in codes.items():
        _, otherwise = BY_STATUS.get(status, ("", "a fault of the broker; its log says more"))
        meaning = DOCUMENTED.get(status, otherwise)
        if len(named) == 1:
            meaning = meaning.removeprefix(f"`{named[0]}`: ")
        rows.append(
            f"| {status} | {', '.join(f'`{code}`' for code in named)} | {meaning.removesuffix('.')} |"
        )
    return "\n".join(["| status | code | |", "|---|---|---|", *rows]) + "\n"


def sizes() -> str:
    """How many bytes a small command takes as an MQTT 3.1.1 packet."""
    bare = 'open = true\ngrants = "none"\n'
    without, packed = load_type(f'name = "a"\n{bare}'), load_type(f'name = "a"\npayload = "msgpack"\n{bare}')
    rows = [
        ("type `generic`, with its grant", _size(shipped_types()["generic"], _grant())),
        ('`grants = "none"`', _size(without, None)),
        ('`grants = "none"`, `payload = "msgpack"`', _size(packed, None)),
    ]
    lines = ['| `unlock` with `{"for_sec": 5}` | bytes of the MQTT packet, about |', "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {round(size, -1)} |" for name, size in rows)]) + "\n"


def _size(kind: DeviceType, grant: str | None) -> int:
    payload = encode_command(
        kind.definition("unlock"), command_id=COMMAND, command="unlock", params=PARAMS, attempt=1,
        expires_at="2026-11-20T12:00:00.000Z", grant=grant,
    )  # fmt: skip
    topic = command_topic("iotee", "door-7", kind.definition("unlock"))
    return FIXED_HEADER + 2 + len(topic) + PACKET_ID + len(payload)


def _grant() -> str:
    """A grant of the same length as the broker's."""
    now = 1_800_000_000
    claims = Claims(
        iss="ordain", aud="door-7", sub=COMMAND, jti=COMMAND, iat=now, nbf=now, exp=now, cmd="unlock",
        phs=params_hash(PARAMS),
    )  # fmt: skip
    key = Ed25519PrivateKey.from_private_bytes(bytes(32))
    headers = {"kid": f"key_{'0' * 26}", "typ": TYPE}
    return jwt.encode(msgspec.to_builtins(claims), key, "EdDSA", headers)


Draw = Callable[[], str]
WHOLE: Mapping[Path, Draw] = {DOCS / "explanation" / "life.svg": picture}
PARTS: Mapping[Path, Mapping[str, Draw]] = {
    DOCS / "reference" / "vocabulary.md": {
        "states": vocabulary.states,
        "fields": vocabulary.fields,
        "calls": vocabulary.calls,
    },
    DOCS / "reference" / "http.md": {"errors": errors},
    DOCS / "reference" / "command-line.md": {"commands": commands},
    DOCS / "reference" / "grants.md": {
        "python_check": partial(code, "device-python/grant.py", "check"),
        "node_check": partial(code, "device-node/grant.mjs", "check"),
        "c_check": partial(code, "device-c/grant.c", "check"),
        "sizes": sizes,
    },
    DOCS / "how-to" / "signed-answers.md": {"c_sign": partial(code, "device-c/sign.c", "sign")},
}
DRAWN = [*WHOLE, *PARTS]


def drawn(page: Path) -> str:
    """A page with its pictures, tables and examples as the code has them now."""
    if page in WHOLE:
        return WHOLE[page]()
    text = page.read_text()
    for name, draw in PARTS[page].items():
        begin, end = f"<!-- {name}: drawn by scripts/draw.py -->\n", f"<!-- /{name} -->"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = before + begin + draw() + end + after
    return text


if __name__ == "__main__":
    for page in DRAWN:
        page.write_text(drawn(page))
