"""Ordain beside plain scripts on other servers, with the same work.

A command is accepted durably while its device is offline, is delivered when the device returns, and the
answer is recorded durably. The plain scripts are one publisher, and one service that keeps each answer in
SQLite. The servers are Mosquitto with persistence, RabbitMQ's MQTT plugin and NATS JetStream's MQTT, which
keep a session for each device. Then each server is killed twice with SIGKILL: after it has confirmed all
commands, and after it has confirmed all answers.

A killed process is not a power cut: Ordain syncs each commit, RabbitMQ its messages before it confirms them,
NATS every two minutes, and Mosquitto keeps all in memory until it saves.

Run `python -m scripts.bench.peers`. A server that is not installed is left out
(Debian: apt install rabbitmq-server nats-server).
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvloop

from scripts.bench import processes
from scripts.bench.devices import hardware_id
from scripts.bench.peer_servers import Ordain, Plain, Server
from scripts.soak.world import MOSQUITTO, until

WITHIN_SEC = 300
ANSWERED_WITHIN_SEC = 60
QUIET_SEC = 5.0  # after a kill: no message for so long means that no more will come
RABBITMQ = """
listeners.tcp = none
mqtt.listeners.tcp.1 = 127.0.0.1:{port}
mqtt.allow_anonymous = true
mqtt.default_user = guest
mqtt.default_pass = guest
mqtt.prefetch = 1000
distribution.listener.interface = 127.0.0.1
"""
NATS = """
listen: 127.0.0.1:{other}
server_name: peer
jetstream {{ store_dir: "{home}/jetstream" }}
mqtt {{ listen: "127.0.0.1:{port}", ack_wait: "2s", max_ack_pending: 1000 }}
"""

Figures = dict[str, float]


async def measure(server: Server, count: int, once: int) -> Figures:
    """All figures of one server. `count`: commands in each part; `once`: single commands for the latency."""
    figures: Figures = {}

    def delivered() -> int:
        return len(server.devices.seen)

    await server.start()
    await server.record_again()
    await server.arrive()  # so that there are sessions
    server.devices.leave()

    since = time.perf_counter()
    await server.order(count)
    figures["commands accepted/s"] = count / (time.perf_counter() - since)
    since = time.perf_counter()
    await server.arrive()
    await until(lambda: server.executed() == count, "all are executed", WITHIN_SEC)
    figures["backlog executed/s"] = count / (time.perf_counter() - since)
    took = []
    for _ in range(once):
        since = time.perf_counter()
        await server.once()
        took.append((time.perf_counter() - since) * 1_000)
    took.sort()
    figures["one command, ms p50"] = statistics.median(took)
    figures["one command, ms p99"] = took[int(len(took) * 0.99)]

    server.devices.leave()
    before = delivered()
    await server.order(count)
    await server.kill()
    await server.start()
    await server.record_again()
    await server.arrive()
    await _quiet(delivered)
    figures["commands lost by kill -9"] = count - (delivered() - before)

    await _quiet(server.executed)
    server.devices.leave()
    await server.order(count)
    await server.stop_recording()
    recorded, before = server.executed(), delivered()
    await server.arrive()
    with suppress(TimeoutError):  # what was lost before does not come
        await until(lambda: delivered() - before == count, "all are delivered", ANSWERED_WITHIN_SEC)
    await server.devices.settled()
    came = delivered() - before
    await server.kill()
    server.devices.leave()
    await server.start()
    await server.record_again()
    await _quiet(server.executed)
    figures["confirmed answers lost by kill -9"] = came - (server.executed() - recorded)
    return figures


async def _quiet(count: Any) -> None:
    """Returns when the count has not changed for QUIET_SEC."""
    seen, since = count(), time.monotonic()
    while time.monotonic() < since + QUIET_SEC:
        await asyncio.sleep(0.1)
        if count() != seen:
            seen, since = count(), time.monotonic()


def servers(home: Path, names: Sequence[str]) -> dict[str, Server]:
    """Those that are installed. Each has a directory of its own."""
    found: dict[str, Server] = {}

    def place(name: str) -> tuple[Path, int]:
        directory = home / name
        directory.mkdir(parents=True)
        return directory, processes.unused_port()

    directory, port = place("ordain")
    found["Ordain"] = Ordain(directory, names)
    for name, every in (("Mosquitto", 1_800), ("Mosquitto, saves each second", 1)):
        directory, port = place(f"mosquitto-{every}")
        config = directory / "mosquitto.conf"
        config.write_text(MOSQUITTO.format(port=port, home=directory, every=every))
        found[name] = Plain([processes.mosquitto(), "-c", str(config)], directory, port, names)
    if (nats := shutil.which("nats-server", path=processes.PATH)) is not None:
        directory, port = place("nats")
        config = directory / "nats.conf"
        config.write_text(NATS.format(port=port, home=directory, other=processes.unused_port()))
        found["NATS JetStream"] = Plain([nats, "-c", str(config)], directory, port, names)
    if Path(RABBIT).exists():
        directory, port = place("rabbitmq")
        found["RabbitMQ"] = Plain(_rabbitmq(directory, port), directory, port, names)
    return found


RABBIT = "/usr/lib/rabbitmq/bin/rabbitmq-server"


def _rabbitmq(home: Path, port: int) -> list[str]:
    (home / "rabbitmq.conf").write_text(RABBITMQ.format(port=port))
    (home / "plugins").write_text("[rabbitmq_mqtt].")
    given = {
        "HOME": home, "RABBITMQ_BASE": home, "RABBITMQ_MNESIA_BASE": home / "data", "RABBITMQ_LOG_BASE": home,
        "RABBITMQ_CONFIG_FILE": home / "rabbitmq", "RABBITMQ_ENABLED_PLUGINS_FILE": home / "plugins",
        "RABBITMQ_NODENAME": f"peer{port}@localhost", "RABBITMQ_DIST_PORT": processes.unused_port(),
        "ERL_EPMD_ADDRESS": "127.0.0.1", "ERL_EPMD_PORT": processes.unused_port(),
        "ERL_CRASH_DUMP_SECONDS": 0,
    }  # fmt: skip
    # Erlang would start its name server as a daemon, which would live on.
    command = 'epmd & until epmd -names >/dev/null 2>&1; do sleep 0.1; done; exec "$0"'
    return ["env", *(f"{name}={value}" for name, value in given.items()), "sh", "-c", command, RABBIT]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.peers", description=__doc__)
    parser.add_argument("--commands", type=int, default=2_000, help="in each part")
    parser.add_argument("--devices", type=int, default=50)
    parser.add_argument("--once", type=int, default=200, help="single commands, for the latency")
    parser.add_argument("--only", nargs="*", default=None, help="the names of servers")
    given = parser.parse_args()
    names = [hardware_id(number) for number in range(given.devices)]
    with tempfile.TemporaryDirectory(prefix="ordain-peers-") as home:
        uvloop.run(_all(Path(home), names, given))


async def _all(home: Path, names: Sequence[str], given: argparse.Namespace) -> None:
    found = servers(home, names)
    if unknown := set(given.only or ()) - found.keys():
        raise SystemExit(f"{', '.join(sorted(unknown))}: not installed; there are {', '.join(found)}")
    for name, server in found.items():
        if given.only and name not in given.only:
            continue
        try:
            figures = await measure(server, given.commands, given.once)
        finally:
            server.devices.leave()
            await server.kill()
        print(name, *(f"{value:12,.1f}  {what}" for what, value in figures.items()), sep="\n", flush=True)


if __name__ == "__main__":
    main()
