"""Several nodes on one log in PostgreSQL, with one Mosquitto: real processes, killed, stopped and ended."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

import httpx2
import pytest

from tests.conftest import Mosquitto, unused_port
from tests.postgres import Postgres
from tests.system.conftest import NewBroker
from tests.system.mqtt.test_bought_devices import Connected
from tests.system.support import WITHIN_SEC, Broker, Device, executed, until

NewNode = Callable[[str], Broker]


@pytest.fixture
def new_node(new_broker: NewBroker, database: str, mosquitto: Mosquitto, tmp_path: Path) -> NewNode:
    """Starts a node, and waits until it serves."""
    settings = settings_of_nodes(tmp_path, database, mosquitto.url)
    return lambda name: node(new_broker, settings, name, "127.0.0.1").start()


def settings_of_nodes(home: Path, database: str, mqtt_url: str) -> Path:
    """The file with what all nodes have in common."""
    settings = home / "ordain.toml"
    (home / "secret").write_text("s" * 40)
    (home / "pepper").write_text("p" * 40)
    settings.write_text(
        f'log = "{database}"\nmqtt_url = "{mqtt_url}"\n'
        f'cluster_secret_file = "{home}/secret"\nkey_pepper_file = "{home}/pepper"\n'
    )
    return settings


def node(new_broker: NewBroker, settings: Path, name: str, host: str) -> Broker:
    """A node that is not started yet."""
    place = f"{host}:{unused_port()}"
    options = ("--config", str(settings), "--node", name, "--http", place, "--advertise", place)
    return new_broker(*options, data=settings.parent / name)


def role(node: Broker) -> str:
    """`owner`, `door`, or why it is neither."""
    answer = httpx2.get(f"{node.url}/readyz", verify=False, trust_env=False, timeout=WITHIN_SEC)
    said: dict[str, Any] = answer.json()
    return str(said["role"] if answer.status_code == 200 else said)


def owns(node: Broker) -> bool:
    until(lambda: role(node) == "owner", lambda: role(node))
    return True


def is_door(node: Broker) -> bool:
    until(lambda: role(node) == "door", lambda: role(node))
    return True


def registered(node: Broker, mosquitto: Mosquitto) -> Device:
    """A device that is online, with a session in which Mosquitto keeps its commands."""
    node.device("door-7")
    door = Device(mosquitto.port, "door-7", own_server=False)
    door.subscribe()
    door.online()
    return door


def heard(door: Device) -> dict[str, Any]:
    """The next command that the device gets."""
    got: dict[str, Any] = json.loads(door.next(door.listen("rls", "-c")))
    return got


def created(node: Broker, type: str = "lock") -> str:
    """A command, asked for again with the same key while the answer is 503: there is no owner yet, or an
    owner ended before it answered, and the door cannot know whether it recorded the command."""
    path, key = "/v1/devices/door-7/commands", {"Idempotency-Key": type}

    def made() -> str | None:
        answer = node.http("POST", path, {"type": type}, **key)
        assert answer.status_code in (200, 201, 503), answer.text
        return None if answer.status_code == 503 else str(answer.json()["id"])

    return until(made)


def test_after_kill_9_of_the_owner_a_door_goes_on_without_losing_or_doubling_a_command(
    new_node: NewNode, mosquitto: Mosquitto
) -> None:
    one = new_node("one")
    assert owns(one)
    two = new_node("two")
    assert is_door(two)
    two.key = one.key = two._make_key()  # the operator may ask at any node
    door = registered(two, mosquitto)
    done = two.create("door-7")
    assert heard(door)["id"] == done
    door.say(executed(done))
    assert two.reaches(done, "executed") == one.command(done)
    wrong = two.http("GET", f"/v1/commands/{done}", **{"X-Ordain-Secret": "t" * 40})
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (403, "forbidden")
    passed_on = two.http("GET", f"/v1/commands/{done}", **{"X-Ordain-Secret": "s" * 40})
    assert (passed_on.status_code, passed_on.headers["x-ordain-moved"]) == (503, "1")
    left = one.create("door-7")
    first = heard(door)
    assert (first["id"], first["attempt"]) == (left, 1)

    one.run.kill()
    between = created(two)  # asks until the new owner answers
    assert owns(two)
    again = heard(door)
    door.say(executed(left))
    assert (again["id"], again["attempt"]) == (left, 2)
    two.reaches(left, "executed")
    assert heard(door)["id"] == between
    door.say(executed(between))
    two.reaches(between, "executed")
    assert two.events(done) == ["created", "published", "executed"]
    assert two.end(signal.SIGTERM) == 0


def test_a_hand_over_at_sigterm_refuses_nothing_and_loses_nothing(
    new_node: NewNode, mosquitto: Mosquitto
) -> None:
    one = new_node("one")
    assert owns(one)
    two = new_node("two")
    assert is_door(two)
    two.key = one.key = two._make_key()
    registered(two, mosquitto)
    made: list[str] = []
    enough, over = Event(), Event()

    def create() -> None:
        """Creates commands at the door, until after the hand-over."""
        while not over.is_set():
            made.append(two.create("door-7", f"c{len(made)}"))
            if len(made) > 5:
                enough.set()

    with ThreadPoolExecutor() as pool:
        creating = pool.submit(create)
        assert enough.wait(WITHIN_SEC)
        assert one.end(signal.SIGTERM) == 0
        assert owns(two)
        before = len(made)
        until(lambda: len(made) > before + 5 or creating.done())
        over.set()
        creating.result(WITHIN_SEC)

    listed: list[str] = []
    cursor: str | None = ""
    while cursor is not None:
        query = f"limit=100{cursor and '&cursor=' + cursor}"
        page = two.http("GET", f"/v1/devices/door-7/commands?{query}").json()
        listed += [each["id"] for each in page["data"]]
        cursor = page["next_cursor"]
    assert listed[::-1] == made
    three = new_node("three")
    assert is_door(three)
    assert two.end(signal.SIGTERM) == 0
    assert owns(three)
    three.key = one.key
    assert three.command(made[0])["type"] == "c0"


def test_an_owner_that_was_stopped_past_its_lease_does_nothing_when_it_wakes(
    new_node: NewNode, mosquitto: Mosquitto, database: str
) -> None:
    one = new_node("one")
    assert owns(one)
    two = new_node("two")
    assert is_door(two)
    two.key = one.key = two._make_key()
    door = registered(two, mosquitto)
    first = two.create("door-7")
    assert heard(door)["id"] == first
    tap = Connected(mosquitto.port, "tap", None, ["iotee/dev/+/rls"], lambda *_: [], ("", ""))
    assert tap.ready.wait(WITHIN_SEC)

    one.run.signal(signal.SIGSTOP)
    with ThreadPoolExecutor() as pool:
        asked: Future[httpx2.Response] = pool.submit(one.http, "GET", f"/v1/commands/{first}")
        assert owns(two)
        assert heard(door)["attempt"] == 2
        door.say(executed(first))
        two.reaches(first, "executed")
        before = two.http("GET", "/v1/events?limit=1000").json()["data"]
        one.run.signal(signal.SIGCONT)
        assert one.run.wait(WITHIN_SEC) == 3
        failed = asked.exception()
        assert isinstance(failed, httpx2.TransportError) or asked.result().status_code == 503, one.said()

    assert "another node owns it" in one.run.err.all()
    assert two.http("GET", "/v1/events?limit=1000").json()["data"] == before
    second = two.create("door-7")

    def sent() -> list[tuple[str, int]]:
        said = [json.loads(each.payload) for each in tap.heard]
        return [(each["id"], each["attempt"]) for each in said]

    until(lambda: (second, 1) in sent(), sent)
    assert sent() == [(first, 2), (second, 1)]
    tap.end()
    log = two.ordain("log", "verify", "--log", database)
    assert "no fault" in log.stdout


@contextmanager
def following(node: Broker) -> Iterator[list[int]]:
    """The positions of the events that a stream at this node gives."""
    got: list[int] = []
    opened = Event()

    def follow() -> None:
        with suppress(httpx2.TransportError):  # at the end of the test
            read()

    def read() -> None:
        headers = {"Authorization": f"Bearer {node.key}", "Accept": "text/event-stream"}
        with httpx2.stream(
            "GET", node.url + "/v1/events", headers=headers, timeout=None, verify=False, trust_env=False
        ) as s:
            for line in s.iter_lines():
                opened.set()
                if line.startswith("data:"):
                    got.append(int(json.loads(line[5:])["id"].rpartition(":")[2]))

    Thread(target=follow, daemon=True).start()
    assert opened.wait(WITHIN_SEC)
    yield got


def test_event_streams_at_doors_go_on_through_the_end_of_the_owner(
    new_node: NewNode, mosquitto: Mosquitto, database: str
) -> None:
    one = new_node("one")
    assert owns(one)
    two, three = new_node("two"), new_node("three")
    assert is_door(two)
    assert is_door(three)
    for node in (one, two, three):
        node.key = one.key or one._make_key()
    registered(three, mosquitto)
    roles = {"one": "owner", "two": "door", "three": "door"}

    def shown(nodes: list[dict[str, Any]]) -> dict[str, str]:
        return {each["name"]: each["role"] for each in nodes}

    until(lambda: shown(three.operator("GET", "/v1/system").json()["nodes"]) == roles)
    listed = json.loads(two.ordain("nodes", "list", "--json", ORDAIN_LOG=database).stdout)
    assert listed["term"] == 1
    assert shown(listed["nodes"]) == roles
    with following(two) as at_two, following(three) as at_three:
        made = [three.create("door-7", f"c{number}") for number in range(3)]
        one.run.kill()
        made += [created(two, f"c{number}") for number in range(3, 6)]
        page = three.http("GET", "/v1/events?limit=1000").json()["data"]
        places = [int(each["id"].rpartition(":")[2]) for each in page]
        creates = {
            each["subject"]: at for each, at in zip(page, places, strict=True) if ".created." in each["type"]
        }
        assert list(creates) == made
        for got in (at_two, at_three):  # one may have begun some events after the other, and more may follow
            until(lambda got=got: places[-1] in got, lambda: (at_two, at_three, places))  # type: ignore[misc]
            assert got[0] <= creates[made[0]]
            assert got[: got.index(places[-1]) + 1] == places[places.index(got[0]) :]
    figures = [dict(re.findall(r"^(ordain_node_\S+) (\S+)$", node.http("GET", "/metrics").text, re.MULTILINE))
               for node in (two, three)]  # fmt: skip
    assert sorted(each["ordain_node_owner"] for each in figures) == ["0.0", "1.0"]
    assert {(each["ordain_node_term"], each["ordain_node_peers"]) for each in figures} == {("2.0", "2.0")}
    door = next(each for each in figures if each["ordain_node_owner"] == "0.0")
    assert float(door['ordain_node_passed_on_total{outcome="answered"}']) > 0
    assert float(door["ordain_node_waiting_requests"]) == 0


def test_after_an_outage_of_the_database_the_same_owner_goes_on(
    new_node: NewNode, mosquitto: Mosquitto, postgres: Postgres
) -> None:
    one = new_node("one")
    assert owns(one)
    two = new_node("two")
    assert is_door(two)
    two.key = one.key = two._make_key()
    door = registered(two, mosquitto)
    first = two.create("door-7")
    assert heard(door)["id"] == first

    postgres.kill()
    try:
        one.run.err.wait("event=node.lapsed")
        one.run.err.wait("event=mqtt.link_down")
        assert one.http("GET", f"/v1/commands/{first}").status_code == 503
        until(lambda: role(two) != "door")
    finally:
        postgres.start()
    assert owns(one)
    assert is_door(two)
    door.say(executed(first))
    two.reaches(first, "executed")
    second = two.create("door-7")
    again = 0
    while (got := heard(door))["id"] != second:
        # The first command may have been sent again before its answer came.
        again += 1
        assert got["id"] == first
        assert max(again, got["attempt"]) <= 2
    nodes = two.operator("GET", "/v1/system").json()
    assert nodes["term"] == 1
