"""`ordain doctor`: silent about what is well, and a line for each thing that is not."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from typing import Any

import msgspec
import pytest

from broker.log import sqlite as log
from tests.conftest import Mosquitto
from tests.system.conftest import NewBroker
from tests.system.support import Broker


def findings(broker: Broker, *options: str) -> tuple[int, list[dict[str, Any]]]:
    done = broker.ordain("doctor", "--json", *options)
    return done.returncode, json.loads(done.stdout)


def levels(found: list[dict[str, Any]], check: str) -> list[str]:
    return [each["level"] for each in found if each["check"] == check]


@pytest.mark.parametrize("server", ["embedded", "mosquitto"])
def test_a_broker_in_good_health_has_no_fault_and_its_canary_lives(
    new_broker: NewBroker, server: str
) -> None:
    broker = new_broker("--mqtt-server", server).start()
    broker.device("lamp-1")
    for _ in range(2):  # the second time its devices are there already
        code, found = findings(broker, "--canary")
        assert code == 0, found
        assert {each["level"] for each in found} == {"ok"}, found
        assert any("no device reaches another's topics" in each["says"] for each in found)
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


def test_an_mqtt_server_without_rules_is_a_fault_each_named(
    new_broker: NewBroker, mosquitto: Mosquitto
) -> None:
    broker = new_broker("--mqtt-url", mosquitto.url).start()
    broker.device("lamp-1")
    code, found = findings(broker, "--canary")
    says = "\n".join(each["says"] for each in found if each["level"] == "fault")
    assert code == 1
    for breach in ("lets in anybody", "wrong password", "hears what is for others", "answers for another",
                   "last will", "takes over"):  # fmt: skip
        assert breach in says, says


def test_without_a_broker_it_says_so_and_finds_no_fault(broker: Broker) -> None:
    assert broker.end() == 0
    code, found = findings(broker)
    assert code == 0
    assert levels(found, "broker") == ["warning"]
    assert levels(found, "chain") == ["ok"]


def test_a_changed_row_is_a_fault_that_is_named(broker: Broker) -> None:
    broker.device("lamp-1")
    assert broker.end() == 0
    with closing(sqlite3.connect(broker.data / "ordain.db")) as sql, sql:
        sql.execute("UPDATE events SET actor = 'somebody' WHERE type = 'registered'")
        changed = sql.execute("SELECT position FROM events WHERE type = 'registered'").fetchone()[0]
    code, found = findings(broker)
    assert code == 1
    assert next(each["says"] for each in found if each["check"] == "chain").startswith(f"position {changed} ")


def test_a_projection_that_is_not_what_the_log_says_is_a_fault(broker: Broker) -> None:
    broker.device("lamp-1")
    command_id = broker.create("lamp-1", "on")
    assert broker.end() == 0
    with closing(sqlite3.connect(broker.data / "ordain.db")) as sql, sql:
        sql.execute("UPDATE commands SET state = 'executed' WHERE id = ?", (command_id,))
    code, found = findings(broker)
    assert code == 1
    assert levels(found, "chain") == ["ok"]
    assert levels(found, "projections") == ["fault"]


def test_a_log_from_the_future_is_a_fault_of_the_clock(broker: Broker) -> None:
    assert broker.end() == 0
    with closing(sqlite3.connect(broker.data / "ordain.db")) as sql, sql:
        head = log.head(sql)
        last = log.rows(sql, head.position - 1)[0]
        later = msgspec.structs.replace(
            log.recorded(last),
            position=head.position + 1,
            version=last.version + 1,
            recorded_at=last.recorded_at + 86_400_000,
        )
        log.append(sql, head, [later], bytes(16))
    code, found = findings(broker)
    assert code == 1
    assert levels(found, "clock") == ["fault"]
