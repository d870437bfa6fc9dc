"""Nodes that are cut off: one of two runs in a network namespace, and the test pulls its cables."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import httpx2
import pytest

from broker.private_socket import socket_path
from tests.conftest import MINIMAL, Mosquitto, unused_port
from tests.elsewhere import Elsewhere, NotHere
from tests.postgres import Postgres
from tests.system import zygote
from tests.system.conftest import NewBroker
from tests.system.faults.test_nodes import (
    created,
    heard,
    is_door,
    node,
    owns,
    registered,
    settings_of_nodes,
)
from tests.system.mqtt.test_bought_devices import Connected
from tests.system.support import ORDAIN, WITHIN_SEC, Broker, executed, until

SOON_SEC = 60  # a system that notices nothing keeps a dead connection for 15 minutes


class Nodes(NamedTuple):
    """`far`: the node with cables: one to the database, one to the MQTT server and the other node."""

    far: Broker
    near: Broker
    place: Elsewhere
    mosquitto: Mosquitto
    tap: Connected

    def sent(self) -> list[tuple[str, int]]:
        """Command and attempt of all messages to devices."""
        said = [json.loads(each.payload) for each in self.tap.heard]
        return [(each["id"], each["attempt"]) for each in said]


@pytest.fixture
def place() -> Iterator[Elsewhere]:
    zygote.program(ORDAIN)  # starts the helper here, not in a place that ends with this test
    try:
        made = Elsewhere()
    except NotHere as error:
        pytest.skip(str(error))
    yield made
    made.close()


@pytest.fixture
def nodes(place: Elsewhere, new_broker: NewBroker, tmp_path: Path) -> Iterator[Nodes]:
    """The far node owns the log; the near one is a door."""
    database, others = place.first, place.second
    with ExitStack() as ends:
        postgres = Postgres(listen_addresses=database.here)
        ends.callback(postgres.remove)
        with (postgres.home / "data/pg_hba.conf").open("a") as allowed:
            allowed.write(f"host all all {database.there}/32 trust\nhost all all {database.here}/32 trust\n")
        postgres.start()
        postgres.create("test")
        port = unused_port()
        config = MINIMAL.format(port=port) + f"listener {port} {others.here}\n"
        mosquitto = Mosquitto(config, port, tmp_path)
        ends.callback(mosquitto.kill)
        mosquitto.start()
        tap = Connected(port, "tap", None, ["iotee/dev/+/rls"], lambda *_: [], ("", ""))
        ends.callback(tap.end)
        assert tap.ready.wait(WITHIN_SEC)
        url = f"postgresql://ordain@{database.here}/test"
        settings = settings_of_nodes(tmp_path, url, f"mqtt://{others.here}:{port}")
        far, near = (
            node(new_broker, settings, *each) for each in (("far", others.there), ("near", others.here))
        )
        ends.callback(far.kill)
        ends.callback(near.kill)
        far.program = place.there.program(ORDAIN, tmp_path / "ordain-far")
        near.program = place.here.program(ORDAIN, tmp_path / "ordain-near")
        owns(far.start())
        is_door(near.start())
        far.key = near.key = near._make_key()
        yield Nodes(far, near, place, mosquitto, tap)


def status(node: Broker, path: str) -> int:
    """What a read of the operator at that node gets, soon, and not when a cable is there again. A door waits
    10 s for the owner: longer than httpx does by default."""
    with socket_path(node.data) as private:
        transport = httpx2.HTTPTransport(uds=private)
        with httpx2.Client(transport=transport, base_url="http://ordain", timeout=SOON_SEC) as client:
            return client.get(path).status_code


def test_an_owner_that_is_cut_from_the_database_does_nothing_and_is_a_door_later(nodes: Nodes) -> None:
    far, near, cable = nodes.far, nodes.near, nodes.place.first
    door = registered(near, nodes.mosquitto)
    first = near.create("door-7")
    assert heard(door)["id"] == first

    cable.pull()
    with ThreadPoolExecutor() as pool:  # they reach the far node before it knows that it is cut off
        reads = pool.submit(far.http, "GET", "/v1/events?limit=1000")
        creates = pool.submit(far.http, "POST", "/v1/devices/door-7/commands", {"type": "lock"})
        second = created(near)  # waits for the new owner, at most for a lease and 5 s
        assert owns(near)
        assert [each.result(SOON_SEC).status_code for each in (reads, creates)] == [503, 503]
    assert far.http("GET", f"/v1/commands/{first}").status_code == 503
    assert heard(door)["attempt"] == 2
    door.say(executed(first))
    near.reaches(first, "executed")
    assert heard(door)["id"] == second
    far.run.err.wait("event=node.lapsed")

    cable.plug()
    assert far.run.wait(WITHIN_SEC) == 3
    assert "another node owns it" in far.run.err.all()
    door.say(executed(second))
    near.reaches(second, "executed")
    until(lambda: (second, 1) in nodes.sent(), nodes.sent)
    assert nodes.sent() == [(first, 1), (first, 2), (second, 1)]
    listed = near.http("GET", "/v1/devices/door-7/commands").json()["data"]
    assert [each["id"] for each in listed] == [second, first]
    assert near.events(first) == ["created", "published", "published", "executed"]
    assert near.events(second) == ["created", "published", "executed"]
    assert is_door(far.start())
    assert far.command(second)["state"] == "executed"

    nodes.place.second.pull()  # now a door is cut from the owner, which goes on
    assert status(far, f"/v1/commands/{second}") == 503
    nodes.place.second.plug()
    until(lambda: status(far, f"/v1/commands/{second}") == 200)
