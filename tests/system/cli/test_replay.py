"""`ordain replay`: the same events with the same ids at every target, and no command is sent again."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks import Webhook

from broker.domain.events import ERASURES, Erased, Recorded
from broker.log import erasing
from broker.log import sqlite as log
from broker.seams import Sqlite
from broker.world import SqliteStorage, SystemClock
from tests.conftest import Mosquitto, program
from tests.system.conftest import NewBroker
from tests.system.support import (
    WITHIN_SEC,
    Broker,
    Device,
    Process,
    executed,
    one_sentence,
    ordain,
    refused,
    until,
)

SECRET = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"


@pytest.fixture
def lived(broker: Broker) -> tuple[Broker, str]:
    """A broker whose only device executed one command and left, and the command's id."""
    device = Device(broker.mqtt_port, "lamp-1", broker.device("lamp-1"))
    listening = device.listen()
    command_id = broker.create("lamp-1", "on")
    device.next(listening)
    device.say(executed(command_id))
    broker.reaches(command_id, "executed")
    until(lambda: "offline" in kinds(broker), lambda: kinds(broker))
    return broker, command_id


def kinds(broker: Broker) -> list[str]:
    events = broker.http("GET", "/v1/events?limit=1000").json()["data"]
    return [str(event["type"].split(".")[2]) for event in events]


def shown(broker: Broker, *options: str) -> list[dict[str, Any]]:
    done = broker.ordain("replay", "--into", "stdout", *options)
    assert done.returncode == 0, done.stderr
    one_sentence(done.stderr.replace("stdout:", "ordain: "), "sent")
    return [json.loads(line) for line in done.stdout.splitlines()]


@contextmanager
def receiver(status: int = 204) -> Iterator[tuple[str, list[tuple[dict[str, str], bytes]]]]:
    """An HTTP server that keeps the requests it receives."""
    got: list[tuple[dict[str, str], bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            got.append(({key.lower(): value for key, value in self.headers.items()}, body))
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/events", got
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_to_stdout_by_position_time_device_and_speed(lived: tuple[Broker, str]) -> None:
    broker, command_id = lived
    whole = shown(broker)
    mine = [event for event in whole if event["subject"] == command_id]
    assert [event["type"].split(".")[2] for event in mine] == ["created", "published", "executed"]
    first, last = mine[0]["id"], mine[1]["id"]  # the device may have said `online` between them
    between = [event for event in whole if int(first) <= int(event["id"]) <= int(last)]
    assert shown(broker, "--from", first, "--to", last, "--speed", "1000x") == between
    later = shown(broker, "--from", mine[2]["time"], "--device", "lamp-1")
    assert later == [event for event in whole if event["time"] >= mine[2]["time"]]
    broker.device("lamp-2")
    assert shown(broker, "--device", "lamp-2")[0]["data"]["hardware_id"] == "lamp-2"


def test_a_dry_run_counts_the_events_and_sends_none(lived: tuple[Broker, str]) -> None:
    broker, _ = lived
    with receiver() as (url, got):
        done = broker.ordain("replay", "--into", url, "--dry-run", "--device", "lamp-1", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["events"] >= 4
        assert got == []


def test_to_a_webhook_events_are_signed_and_keep_their_ids(
    new_broker: NewBroker, tmp_path: Path, lived: tuple[Broker, str]
) -> None:
    broker, _ = lived
    (tmp_path / "allow.toml").write_text('webhook_allow = ["127.0.0.0/8"]\n')
    allow = ("--config", str(tmp_path / "allow.toml"))
    with receiver() as (url, got):
        for _ in range(2):
            done = broker.ordain("replay", "--into", url, *allow, ORDAIN_WEBHOOK_SECRET=SECRET)
            assert done.returncode == 0, done.stderr
    half = len(got) // 2
    assert [head["webhook-id"] for head, _ in got[:half]] == [head["webhook-id"] for head, _ in got[half:]]
    assert [Webhook(SECRET).verify(body, head) for head, body in got[:half]] == shown(broker)


def test_a_refusing_webhook_stops_the_replay_and_the_error_names_the_next_position(
    lived: tuple[Broker, str], tmp_path: Path
) -> None:
    broker, _ = lived
    (tmp_path / "allow.toml").write_text('webhook_allow = ["127.0.0.0/8"]\n')
    with receiver(500) as (url, got):
        done = broker.ordain("replay", "--into", url, "--config", str(tmp_path / "allow.toml"))
        refused(done, 1, "it answered 500", "go on with --from")
        refused(broker.ordain("replay", "--into", url), 1, "not an address of the public internet")
        assert len(got) == 1


def test_to_mqtt_each_event_goes_to_its_commands_topic(new_broker: NewBroker, mosquitto: Mosquitto) -> None:
    broker = new_broker("--mqtt-url", mosquitto.url).start()
    broker.device("lamp-1")
    command_id = broker.create("lamp-1", "on")
    created = shown(broker, "--device", "lamp-1")[-1]
    subscriber = (
        program("mosquitto_sub"), "-p", str(mosquitto.port), "-i", "auditor", "-c", "-q", "1",
        "-W", str(WITHIN_SEC), "-t", f"iotee/evt/lamp-1/{command_id}",
    )  # fmt: skip
    assert Process(*subscriber, "-E").wait() == 0
    done = broker.ordain("replay", "--into", "mqtt", "--from", created["id"], "--to", created["id"])
    assert done.returncode == 0, done.stderr
    heard = Process(*subscriber, "-C", "1")
    assert heard.wait() == 0
    assert json.loads(heard.out.all()) == created
    assert broker.end() == 0
    refused(broker.ordain("replay", "--into", "mqtt"), 3, "no broker serves")


def test_into_a_directory_writes_a_log_up_to_a_position_that_no_broker_serves(
    lived: tuple[Broker, str], tmp_path: Path
) -> None:
    broker, command_id = lived
    published = next(e for e in shown(broker) if e["subject"] == command_id and ".published." in e["type"])
    copy = tmp_path / "copy"
    done = broker.ordain("replay", "--to", published["id"], "--into", str(copy))
    assert done.returncode == 0, done.stderr
    verified = json.loads(ordain("log", "verify", "--json", data=copy).stdout)
    assert (verified["rows"], verified["fault"]) == (int(published["id"]), None)
    assert ordain("projections", "verify", data=copy).returncode == 0
    refused(ordain("serve", "--http", "127.0.0.1:0", data=copy), 2, "made by `ordain replay`")
    refused(broker.ordain("replay", "--into", str(copy)), 2, "already exists")


@pytest.mark.parametrize("erase", [("delete",), ("purge", "--older-than-days", "-1")], ids=["one", "all"])
def test_a_copy_that_ends_before_an_erasure_verifies_and_says_what_is_empty(
    lived: tuple[Broker, str], tmp_path: Path, erase: tuple[str, ...]
) -> None:
    broker, command_id = lived
    position = shown(broker)[-1]["id"]
    if erase == ("delete",):
        assert broker.ordain("delete", command_id).returncode == 0
    else:  # what is created today is purged the day after tomorrow, so the row is written here
        assert broker.end() == 0
        purge_everything(broker.data)
    copies = [tmp_path / "copy", tmp_path / "copy of copy"]

    assert broker.ordain("replay", "--to", position, "--into", str(copies[0])).returncode == 0
    assert ordain("replay", "--into", str(copies[1]), data=copies[0]).returncode == 0

    for copy in copies:
        verified = json.loads(ordain("log", "verify", "--json", data=copy).stdout)
        assert verified["fault"] is None
        assert verified["erased_later"] > 0
        assert ordain("projections", "verify", data=copy).returncode == 0
        assert '"fault"' not in ordain("doctor", "--json", data=copy).stdout
        assert ordain("log", "export", "--to", str(copy / "part.jsonl"), data=copy).returncode == 0
        imported = ordain("log", "import", "--from", str(copy / "part.jsonl"), data=tmp_path / "new")
        refused(imported, 1, "only part of a log", "replayed to")
    assert "it is a copy" in ordain("log", "verify", data=copies[1]).stdout
    with closing(sqlite3.connect(copies[0] / "ordain.db")) as sql, sql:
        sql.execute("UPDATE events SET data = NULL, salt = NULL WHERE type = 'registered'")
    refused(ordain("log", "verify", data=copies[0]), 1, "has no data")


def purge_everything(data: Path) -> None:
    async def purge() -> None:
        storage = await SqliteStorage.open(data)
        now = SystemClock().wall_ms() + 1_000
        head = await storage.read(log.head)
        erased = Recorded(
            position=head.position + 1, stream=ERASURES, version=1, recorded_at=now, decided_at=now,
            project="", device_id=None, actor="operator:cli", event=Erased(cutoff=now, count=1),
        )  # fmt: skip

        def work(sql: Sqlite) -> None:
            log.append(sql, head, [erased], bytes(16))
            for (stream,) in sql.execute(
                "SELECT stream FROM events JOIN commands USING (position)"
            ).fetchall():
                erasing.erase(sql, stream)

        await storage.write(work)
        await storage.close()

    asyncio.run(purge())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--from", "yesterday"), ("--from = yesterday", "RFC 3339")),
        (("--to", "999999999"), ("--to = 999999999", "ends at position")),
        (("--speed", "fast"), ("--speed = fast", "10x")),
        (("--device", "nobody"), ("--device = nobody",)),
        (("--secret", "whsec_?"), ("--secret", "base64")),
    ],
)
def test_a_wrong_option_is_named(broker: Broker, options: tuple[str, ...], words: tuple[str, ...]) -> None:
    refused(broker.ordain("replay", "--into", "stdout", *options), 2, *words)


def test_a_mistyped_target_is_not_used_as_a_directory(broker: Broker) -> None:
    refused(broker.ordain("replay", "--into", "mqqt"), 2, "--into = mqqt", "./copy")
