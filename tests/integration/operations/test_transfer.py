"""A log exported as JSON Lines and imported again is the same; an incomplete file is refused."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from broker.domain.events import ERASURES, NAMES, Changed, Erased, Recorded, TokenRotated, encode
from broker.log import chain, lines, sqlite
from broker.log.chain import Row
from broker.log.driven import read_now
from broker.opening import snapshot
from broker.operations import transfer
from broker.operations.backup import Refused
from broker.operations.fit import unfit
from broker.operations.transfer import Moved, Only
from broker.settings import Settings
from broker.world import DATABASE
from projections import follower
from tests.integration.log.test_golden import RELEASES, put

# More levels than the decoder of any Python takes: 3.13 takes more than 3.11.
DEEP = 100_000
GONE = "UPDATE events SET data = NULL, salt = NULL WHERE stream = ?"


@pytest.fixture(scope="module", params=RELEASES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with the log of a release, in which one command was erased."""
    directory = tmp_path_factory.mktemp("written")
    with closing(sqlite3.connect(directory / DATABASE, isolation_level=None)) as sql:
        put(sql, request.param)
        head = read_now(sql, sqlite.head)
        stream = sql.execute("SELECT stream FROM events WHERE type = 'executed' LIMIT 1").fetchone()[0]
        erased = Recorded(
            position=head.position + 1,
            stream=ERASURES,
            version=2,
            recorded_at=head.recorded_at,
            decided_at=head.recorded_at,
            project="acme",
            device_id=None,
            actor="key:key_1",
            event=Erased(ids=[stream], count=1),
        )
        sqlite.append(sql, head, [erased], bytes(16))
        sql.execute(GONE, (stream,))
        follower.renew(sql)
    return directory


@pytest.fixture
def data(written: Path, tmp_path: Path) -> Path:
    """A copy of it for one test."""
    return Path(shutil.copytree(written, tmp_path / "data"))


def exported(data: Path, to: Path | None, **only: Any) -> Moved:
    with closing(snapshot(Settings(data=str(data)))) as sql:
        return transfer.export(sql, to, Only(**only), lambda _: None)


def brought_in(source: Path, into: Path) -> Moved:
    return transfer.bring_in(source, into, lambda done, total: None)


def everything(data: Path) -> Any:
    with closing(snapshot(Settings(data=str(data)))) as sql:
        return (
            list(read_now(sql, sqlite.all_rows)),
            read_now(sql, follower.dump),
            read_now(sql, sqlite.verify),
            read_now(sql, sqlite.meta, "log_id"),
        )


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_bytes().splitlines()[1:]]


def test_a_log_is_imported_with_the_same_bytes_and_projections(data: Path, tmp_path: Path) -> None:
    out = exported(data, tmp_path / "log.jsonl")
    back = brought_in(tmp_path / "log.jsonl", tmp_path / "other")

    assert back == out
    assert everything(tmp_path / "other") == everything(data)
    assert everything(data)[2].fault is None
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == [DATABASE]
    again = exported(tmp_path / "other", tmp_path / "again.jsonl")
    assert again == out
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "log.jsonl").read_bytes()
    assert (tmp_path / "log.jsonl").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "other" / DATABASE).stat().st_mode & 0o777 == 0o600


def test_an_empty_log_is_imported_empty(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with closing(sqlite3.connect(tmp_path / "data" / DATABASE, isolation_level=None)) as sql:
        sqlite.create(sql, "log_empty", "00")
        follower.prepare(sql)

    assert exported(tmp_path / "data", tmp_path / "log.jsonl").rows == 0
    assert brought_in(tmp_path / "log.jsonl", tmp_path / "other").position == 0


def test_the_page_size_does_not_change_the_export(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported(data, tmp_path / "whole.jsonl")
    monkeypatch.setattr(transfer, "PAGE", 3)
    exported(data, tmp_path / "paged.jsonl")

    assert (tmp_path / "paged.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    brought_in(tmp_path / "paged.jsonl", tmp_path / "other")
    assert everything(tmp_path / "other") == everything(data)


def test_filters_select_rows_and_a_filtered_export_cannot_be_imported(data: Path, tmp_path: Path) -> None:
    all_rows = everything(data)[0]
    device_id = next(row.device_id for row in all_rows if row.type == "registered")
    chosen: list[tuple[dict[str, Any], Callable[[Any], bool]]] = [
        ({"project": "acme"}, lambda row: row.project == "acme"),
        ({"type": "created"}, lambda row: row.type == "created"),
        ({"device": "lamp-1"}, lambda row: row.device_id == device_id),
        ({"since": 5, "until": 9}, lambda row: 5 <= row.position <= 9),
        (
            {"device": device_id, "type": "online", "since": 3},
            lambda row: row.device_id == device_id and row.type == "online" and row.position >= 3,
        ),
        ({"project": "nobody"}, lambda row: False),
    ]
    for number, (only, fits) in enumerate(chosen):
        file = tmp_path / f"{number}.jsonl"
        moved = exported(data, file, **only)
        expected = [row.position for row in all_rows if fits(row)]
        assert [row["position"] for row in rows(file)] == expected, only
        assert moved.rows == len(expected)
        with pytest.raises(Refused, match="only part of a log"):
            brought_in(file, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(Refused, match="no device 'nobody'"):
        exported(data, tmp_path / "x.jsonl", device="nobody")
    assert not list(tmp_path.glob("x.*"))


def change(line: bytes, **fields: Any) -> bytes:
    return json.dumps(json.loads(line) | fields).encode()


DAMAGE: list[tuple[Callable[[list[bytes]], list[bytes]], str]] = [
    (lambda found: found[:-1], "ends at position"),
    (lambda found: [*found[:-1], found[-1][:40]], "it is not a row of a log"),
    (lambda found: found[:5] + found[6:], "line 6: position 5 is missing"),
    (lambda found: [*found[:5], found[6], found[5], *found[7:]], "line 6: position 5 is missing"),
    (lambda found: [*found[:5], change(found[5], actor="me"), *found[6:]], "line 6: position 5 does not"),
    (lambda found: [*found[:5], change(found[5], data="e30K"), *found[6:]], "line 6: position 5 was"),
    (lambda found: [*found[:5], change(found[5], data=None, salt=None), *found[6:]], "no erased event"),
    (lambda found: [*found[:5], change(found[5], position=-5), *found[6:]], "line 6: it is not a row"),
    (lambda found: [*found[:5], change(found[5], more=1), *found[6:]], "line 6: it is not a row"),
    (lambda found: [*found, found[-1]], "is missing: the next row is"),
    (lambda found: found[1:], "not an export of a log"),
    (lambda found: [change(found[0], version=3), *found[1:]], "this release reads 'ordain-log' 1"),
    (lambda found: [change(found[0], hash="AAAA"), *found[1:]], "ends at position"),
    (lambda found: [], "not an export of a log"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGE)
def test_an_incomplete_or_changed_file_is_refused_and_nothing_is_left(
    data: Path, tmp_path: Path, damage: Callable[[list[bytes]], list[bytes]], said: str
) -> None:
    exported(data, tmp_path / "log.jsonl")
    found = (tmp_path / "log.jsonl").read_bytes().splitlines()
    (tmp_path / "bad.jsonl").write_bytes(b"".join(line + b"\n" for line in damage(found)))

    with pytest.raises(Refused) as refused:
        brought_in(tmp_path / "bad.jsonl", tmp_path / "other")

    assert said in str(refused.value)
    assert "bad.jsonl" in str(refused.value)
    assert not list((tmp_path / "other").glob("*"))


def rechained(found: list[bytes], at: int, **changed: Any) -> list[bytes]:
    """The file with one row changed and every later hash made to fit, as a forger would write it."""
    rows, previous = [lines.as_row(line) for line in found[1:]], chain.GENESIS
    made = []
    for row in rows:
        if row.position == at:
            row = row._replace(**changed)
            assert row.data is not None
            assert row.salt is not None
            row = row._replace(digest=chain.digest(row.salt, row.data))
        previous = chain.link(previous, *row[:10], row.digest)
        made.append(lines.as_line(row._replace(hash=previous)))
    header = lines.header(found[0])
    return [lines.header_line(msgspec.structs.replace(header, hash=previous)), *made]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"device_id": "../a"}, "device_id = '../a' is no identifier"),
        ({"project": "a b"}, "project = 'a b' is no identifier"),
        ({"stream": "device/a/b"}, "stream = 'a/b' is no identifier"),
        ({"type": "unheard"}, "it is no event of a log"),
        ({"data": b"{}"}, "it is no event of a log"),
        ({"data": b"[" * 100_000}, "it is no event of a log"),
        ({"recorded_at": 2**62}, "recorded_at = 4611686018427387904"),
    ],
)
def test_a_row_that_no_broker_records_is_not_imported(
    data: Path, tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    exported(data, tmp_path / "log.jsonl")
    found = (tmp_path / "log.jsonl").read_bytes().splitlines()
    at = next(row.position for row in map(lines.as_row, found[1:]) if row.type == "registered")
    forged = rechained(found, at, **changed)
    (tmp_path / "bad.jsonl").write_bytes(b"".join(line + b"\n" for line in forged))

    with pytest.raises(Refused, match=re.escape(f"line {at + 1}: {said}")):
        brought_in(tmp_path / "bad.jsonl", tmp_path / "other")


@pytest.mark.parametrize(
    ("type", "fields", "said"),
    [
        ("registered", {"answer_key": "AA"}, "answer_key = 'AA' "),
        ("registered", {"gateway": "a/b"}, "gateway = 'a/b' is no identifier"),
        ("registered", {"hardware_id": "service"}, "hardware_id = 'service' is a reserved MQTT user name"),
        ("registered", {"name": "x" * 201}, f"name = '{'x' * 64}' has more than 200 characters"),
        ("registered", {"token_digest": "$7$1$a$b\nroot:$7$1$c$d"}, "token_digest = "),
        ("registered", {"token_digest": f"$7$999999999${'A' * 16}${'A' * 86}=="}, "token_digest = "),
        ("created", {"topic": "iotee/dev/+/rls"}, "topic = 'iotee/dev/+/rls' is no topic to publish on"),
        ("created", {"device_type": "../a"}, "device_type = '../a' is no identifier"),
        ("created", {"collapse_key": "a b"}, "collapse_key = 'a b' is no identifier"),
        ("defined", {"definition": {"device_type": "generic"}}, "stream = "),
    ],
)
def test_a_field_that_no_other_door_takes_is_not_imported(
    data: Path, tmp_path: Path, type: str, fields: dict[str, Any], said: str
) -> None:
    exported(data, tmp_path / "log.jsonl")
    found = (tmp_path / "log.jsonl").read_bytes().splitlines()
    row = next(row for row in map(lines.as_row, found[1:]) if row.type == type and row.data is not None)
    assert row.data is not None
    forged = rechained(found, row.position, data=msgspec.json.encode(msgspec.json.decode(row.data) | fields))
    (tmp_path / "bad.jsonl").write_bytes(b"".join(line + b"\n" for line in forged))

    with pytest.raises(Refused, match=re.escape(f"line {row.position + 1}: {said}")):
        brought_in(tmp_path / "bad.jsonl", tmp_path / "other")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (Changed(device_type="a b"), "device_type = 'a b' is no identifier"),
        (Changed(answer_key="AA"), "answer_key = 'AA' "),
        (Changed(gateway="#"), "gateway = '#' is no identifier"),
        (TokenRotated(token_digest="plain"), "token_digest = 'plain' is no digest of a token"),
    ],
)
def test_a_change_that_no_other_door_takes_is_unfit(change: Changed | TokenRotated, said: str) -> None:
    name, data = NAMES[type(change)], encode(change)
    row = Row(1, "device/dev_1", 2, name, 1, 1, 1, "acme", "dev_1", "key:key_1", data, b"", b"", b"")
    assert str(unfit(row)).startswith(said)


def test_two_events_of_a_stream_with_the_same_version_are_not_imported(data: Path, tmp_path: Path) -> None:
    exported(data, tmp_path / "log.jsonl")
    found = (tmp_path / "log.jsonl").read_bytes().splitlines()
    second = next(row for row in map(lines.as_row, found[1:]) if row.version == 2)
    forged = rechained(found, second.position, version=1)
    (tmp_path / "bad.jsonl").write_bytes(b"".join(line + b"\n" for line in forged))

    with pytest.raises(Refused, match="same version"):
        brought_in(tmp_path / "bad.jsonl", tmp_path / "other")
    assert not (tmp_path / "other" / DATABASE).exists()


@pytest.mark.parametrize("field", ["expires_at", "ttl_ms"])
def test_a_command_whose_times_are_beyond_the_calendar_is_not_imported(
    data: Path, tmp_path: Path, field: str
) -> None:
    exported(data, tmp_path / "log.jsonl")
    found = (tmp_path / "log.jsonl").read_bytes().splitlines()
    row = next(row for row in map(lines.as_row, found[1:]) if row.type == "created" and row.data is not None)
    said = json.loads(row.data or b"") | {field: 2**62}
    forged = rechained(found, row.position, data=json.dumps(said).encode())
    (tmp_path / "bad.jsonl").write_bytes(b"".join(line + b"\n" for line in forged))

    with pytest.raises(Refused, match=f"{field} = 4611686018427387904"):
        brought_in(tmp_path / "bad.jsonl", tmp_path / "other")


def test_an_export_of_a_command_with_data_nested_too_deeply_is_refused(data: Path, tmp_path: Path) -> None:
    row = next(row for row in everything(data)[0] if row.type == "created" and row.data is not None)
    deep = b'{"params":' + b"[" * DEEP + b"]" * DEEP + b"," + (row.data or b"")[1:]
    header = lines.Header(log_id="log_1", position=row.position, hash=row.hash, command=row.stream)
    text = lines.header_line(header) + b"\n" + lines.as_line(row._replace(data=deep)) + b"\n"
    (tmp_path / "bad.jsonl").write_bytes(text)

    with pytest.raises(Refused, match="nested too deeply"):
        transfer.read_command(tmp_path / "bad.jsonl")


def test_a_log_id_that_is_no_identifier_is_not_imported(data: Path, tmp_path: Path) -> None:
    exported(data, tmp_path / "log.jsonl")
    first, rest = (tmp_path / "log.jsonl").read_bytes().split(b"\n", 1)
    header = json.loads(first) | {"log_id": "log_1\0"}
    (tmp_path / "bad.jsonl").write_bytes(json.dumps(header).encode() + b"\n" + rest)

    with pytest.raises(Refused, match="log_id"):
        brought_in(tmp_path / "bad.jsonl", tmp_path / "other")


def test_no_existing_file_is_overwritten(data: Path, tmp_path: Path) -> None:
    exported(data, tmp_path / "log.jsonl")
    before, kept = (tmp_path / "log.jsonl").read_bytes(), everything(data)

    with pytest.raises(Refused, match="already exists"):
        exported(data, tmp_path / "log.jsonl")
    with pytest.raises(Refused, match="already has a log"):
        brought_in(tmp_path / "log.jsonl", data)
    assert (tmp_path / "log.jsonl").read_bytes() == before
    assert everything(data) == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "log.jsonl"]


def test_data_covered_by_a_purge_is_not_exported(data: Path, tmp_path: Path) -> None:
    with closing(sqlite3.connect(data / DATABASE, isolation_level=None)) as sql:
        head = read_now(sql, sqlite.head)
        purged = Recorded(
            position=head.position + 1,
            stream=ERASURES,
            version=3,
            recorded_at=head.recorded_at + 1,
            decided_at=head.recorded_at + 1,
            project="",
            device_id=None,
            actor="key:key_1",
            event=Erased(cutoff=head.recorded_at + 1, count=1),
        )
        sqlite.append(sql, head, [purged], bytes(16))
        sql.execute(
            "INSERT INTO purges VALUES (?, ?, ?, ?)",
            (purged.position, head.recorded_at + 1, head.position + 1, head.recorded_at + 1),
        )
        hidden = sql.execute(
            "SELECT stream FROM events JOIN commands USING (position) WHERE closed_at IS NOT NULL LIMIT 1"
        ).fetchone()[0]

    exported(data, tmp_path / "log.jsonl")

    assert {row["data"] for row in rows(tmp_path / "log.jsonl") if row["stream"] == hidden} == {None}
    brought_in(tmp_path / "log.jsonl", tmp_path / "other")


def test_a_row_survives_conversion_to_a_line_and_back(data: Path) -> None:
    for row in everything(data)[0]:
        assert lines.as_row(lines.as_line(row)) == row
