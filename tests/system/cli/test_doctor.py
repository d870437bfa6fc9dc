"""`ordain doctor` reports each fault in one line and finds none in a healthy broker."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from typing import Any

import msgspec
import pytest

from broker.log import sqlite as log
from broker.log.driven import read_now
from tests.conftest import Mosquitto
from tests.system.conftest import NewBroker
from tests.system.support import Broker, until


def findings(broker: Broker, *options: str) -> tuple[int, list[dict[str, Any]]]:
    """On a busy machine the canary's trial may find no time, and it says so; then it is made again."""

    def found() -> tuple[int, list[dict[str, Any]]] | None:
        done = broker.ordain("doctor", "--json", *options)
        untried = "--canary" in options and "could not be checked" in done.stdout
        return None if untried else (done.returncode, json.loads(done.stdout))

    return until(found)


def levels(found: list[dict[str, Any]], check: str) -> list[str]:
    return [each["level"] for each in found if each["check"] == check]


@pytest.mark.parametrize("server", ["embedded", "mosquitto"])
def test_a_healthy_broker_has_no_fault_and_passes_the_canary(new_broker: NewBroker, server: str) -> None:
    broker = new_broker("--mqtt-server", server).start()
    broker.device("lamp-1")
    for _ in range(2):  # in the second run the canary's devices exist already
        code, found = findings(broker, "--canary")
        assert code == 0, found
        assert {each["level"] for each in found} == {"ok"}, found
        assert any("no device can use another's topics" in each["says"] for each in found)
    assert {each["check"] for each in found} >= {
        "file",
        "chain",
        "projections",
        "clock",
        "disk",
        "broker",
        "keys",
        "mqtt",
    }


def test_each_missing_rule_of_an_mqtt_server_is_a_named_fault(
    new_broker: NewBroker, mosquitto: Mosquitto
) -> None:
    broker = new_broker("--mqtt-url", mosquitto.url).start()
    broker.device("lamp-1")
    # The broker's own trial at its start uses the same devices.
    until(lambda: broker.operator("GET", "/v1/system").json()["mqtt"]["rules"]["checked_at"])
    code, found = findings(broker, "--canary")
    assert code == 1
    says = "\n".join(each["says"] for each in found if each["level"] == "fault")
    for breach in ("accepts clients without", "wrong password", "receives messages for other devices",
                   "can answer for another", "last will", "can take over",
                   "devices: homeassistant/lock/", "another device on homeassistant/lock/"):  # fmt: skip
        assert breach in says, says


def test_a_stopped_broker_is_a_warning_and_no_fault(broker: Broker) -> None:
    assert broker.end() == 0
    code, found = findings(broker)
    assert code == 0
    assert levels(found, "broker") == ["warning"]
    assert levels(found, "chain") == ["ok"]


def test_a_changed_row_is_a_named_fault(broker: Broker) -> None:
    broker.device("lamp-1")
    assert broker.end() == 0
    with closing(sqlite3.connect(broker.data / "ordain.db")) as sql, sql:
        sql.execute("UPDATE events SET actor = 'somebody' WHERE type = 'registered'")
        changed = sql.execute("SELECT position FROM events WHERE type = 'registered'").fetchone()[0]
    code, found = findings(broker)
    assert code == 1
    assert next(each["says"] for each in found if each["check"] == "chain").startswith(f"position {changed} ")


def test_a_projection_that_differs_from_the_log_is_a_fault(broker: Broker) -> None:
    broker.device("lamp-1")
    broker.create("lamp-1", "on")
    assert broker.end() == 0
    with closing(sqlite3.connect(broker.data / "ordain.db")) as sql, sql:
        sql.execute("UPDATE commands SET state = 'executed'")
    code, found = findings(broker)
    assert code == 1
    assert levels(found, "chain") == ["ok"]
    assert levels(found, "projections") == ["fault"]


def test_an_event_with_a_future_time_is_a_clock_fault(broker: Broker) -> None:
    assert broker.end() == 0
    with closing(sqlite3.connect(broker.data / "ordain.db")) as sql, sql:
        head = read_now(sql, log.head)
        last = read_now(sql, log.rows, head.position - 1)[0]
        later = msgspec.structs.replace(
            log.recorded(last),
            position=head.position + 1,
            version=last.version + 1,
            recorded_at=last.recorded_at + 86_400_000,
            decided_at=last.recorded_at + 86_400_000,
        )
        log.append(sql, head, [later], bytes(16))
    code, found = findings(broker)
    assert code == 1
    assert levels(found, "clock") == ["fault"]
