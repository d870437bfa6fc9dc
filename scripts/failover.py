"""Measures how long nobody answers when the owner of a log on PostgreSQL is killed.

Two nodes, a real PostgreSQL and a real Mosquitto, OPEN open commands. Each round kills the owner with
SIGKILL, times until the door has claimed the log and until it has answered a create with 201, and starts the
killed node again. What lies between the two is mostly the reading of the open commands.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx2

from tests.conftest import MINIMAL, Mosquitto, unused_port
from tests.postgres import Postgres
from tests.system.support import Broker, until

DEVICES = 1_000
AIM_SEC = 10  # a lease, and 5 s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--open", type=int, default=100_000, help="how many open commands there are")
    parser.add_argument(
        "--creates", type=int, default=0, help="creates at the owner and at the door, in turn"
    )
    parser.add_argument("--signal", choices=("KILL", "TERM"), default="KILL")
    given = parser.parse_args()
    postgres = Postgres(shared_buffers="256MB", autovacuum="on")
    postgres.start()
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        port = unused_port()
        mosquitto = Mosquitto(MINIMAL.format(port=port), port, home)
        mosquitto.start()
        nodes: list[Broker] = []
        try:
            database = postgres.create("log")
            nodes = [_node(each, database, mosquitto, home) for each in "ab"]
            _fill(nodes[0].start(), nodes[1].start(), given.open)
            if given.creates:
                _forwarded(nodes, given.creates)
            took = [_round(nodes, given.signal) for _ in range(given.rounds)]
        finally:
            for node in nodes:
                node.kill()
            mosquitto.kill()
            postgres.remove()
    claimed, answered = (_shown([each[place] for each in took]) for place in (0, 1))
    print(
        f"SIG{given.signal} of the owner with {given.open:,} open commands, {len(took)} rounds:\n"
        f"  nobody answered for {answered} (aim: at most {AIM_SEC} s)\n"
        f"  of that, until the next owner had claimed the log: {claimed}"
    )


def _shown(seconds: list[float]) -> str:
    return f"p50 {statistics.median(seconds):.1f} s, max {max(seconds):.1f} s"


def _node(name: str, database: str, mosquitto: Mosquitto, home: Path) -> Broker:
    settings = home / "ordain.toml"
    (home / "secret").write_text("s" * 40)
    settings.write_text(
        f'log = "{database}"\nmqtt_url = "{mosquitto.url}"\n'
        f'cluster_secret_file = "{home}/secret"\nkey_pepper_file = "{home}/secret"\n'
        "[limits]\nqueue_per_name = 10000\nqueue_per_device = 10000\n"
    )
    place = f"127.0.0.1:{unused_port()}"
    options = ("--config", str(settings), "--node", name, "--http", place, "--advertise", place)
    return Broker(home / name, *options, cwd=home)


def _role(node: Broker) -> str:
    try:
        answer: dict[str, Any] = httpx2.get(f"{node.url}/readyz", trust_env=False).json()
    except httpx2.TransportError:
        return ""
    return str(answer.get("role", ""))


def _fill(one: Broker, two: Broker, count: int) -> None:
    until(lambda: {_role(one), _role(two)} == {"owner", "door"})
    owner = one if _role(one) == "owner" else two
    one.key = two.key = owner._make_key()
    names = [f"door-{number}" for number in range(DEVICES)]
    for name in names:
        owner.device(name)
    for number in range(count // DEVICES):
        body = {"devices": names, "type": "lock", "params": {"n": number}, "ttl_sec": 86_400}
        answer = owner.http("POST", "/v1/commands", body)
        assert answer.status_code < 300, answer.text
    print(f"{count:,} commands are open", file=sys.stderr)


def _forwarded(nodes: list[Broker], count: int) -> None:
    """How much longer a create takes at a door, which passes it on. One connection each, kept open."""
    owner, door = sorted(nodes, key=lambda node: _role(node) != "owner")
    took: dict[str, list[float]] = {"owner": [], "door": []}
    body = {"type": "unlock", "ttl_sec": 86_400}
    path = "/v1/devices/door-2/commands"
    with httpx2.Client(headers={"X-API-Key": owner.key}, trust_env=False) as client:
        for _ in range(count):
            for name, node in (("owner", owner), ("door", door)):
                since = time.perf_counter()
                answer = client.post(node.url + path, json=body)
                took[name].append(1e3 * (time.perf_counter() - since))
                assert answer.status_code == 201, answer.text
    own, forwarded = (statistics.median(took[name]) for name in ("owner", "door"))
    print(
        f"a create, p50 of {count:,}: {own:.2f} ms at the owner, {forwarded:.2f} ms at a door: "
        f"{forwarded - own:.2f} ms more (aim: at most 2)"
    )


def _round(nodes: list[Broker], number: str) -> tuple[float, float]:
    """Until the log was claimed, and until a create was answered, s."""
    until(lambda: {_role(node) for node in nodes} == {"owner", "door"})
    owner, door = sorted(nodes, key=lambda node: _role(node) != "owner")
    sent = signal.SIGKILL if number == "KILL" else signal.SIGTERM
    since = time.monotonic()
    os.kill(owner.run.process.pid, sent)
    if sent is signal.SIGKILL:
        owner.run.wait()
    door.run.err.wait("event=node.claimed")
    claimed = time.monotonic() - since
    while True:  # the door holds a request for some time, and then refuses it
        answer = door.http("POST", "/v1/devices/door-1/commands", {"type": "unlock", "ttl_sec": 86_400})
        if answer.status_code == 201:
            break
    answered = time.monotonic() - since
    print(f"claimed after {claimed:.1f} s, answered after {answered:.1f} s", file=sys.stderr, flush=True)
    owner.run.wait()
    owner.start()
    return claimed, answered


if __name__ == "__main__":
    try:
        main()
    except subprocess.SubprocessError as error:
        sys.exit(str(error))
