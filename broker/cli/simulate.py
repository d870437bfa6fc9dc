"""`ordain simulate`: runs a fleet of simulated devices with faults against a running broker, and reports.

The fleet is `devices.fleet.simulator`. This module is its connection to the broker, as the operator, and its
output.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx2
import msgspec
import uvloop
from cyclopts import Parameter
from rich.console import Console
from rich.live import Live
from rich.table import Table

from broker.cli.base import Config, Data, Json, Text, print_json, settings_of
from broker.control import operator
from broker.operations.asking import REFUSED, UNREACHABLE, USAGE, Failed
from broker.private_socket import answers
from broker.settings import Settings
from devices.fleet.bought import MODELS
from devices.fleet.device import TYPE
from devices.fleet.faults import Faults
from devices.fleet.simulator import NoFleet, Plan, Server, Simulation
from devices.fleet.summary import Summary, View
from devices.mqtt_url import parse_url
from devices.tls import trust

PROJECT = "simulation"
TOKENS = "simulation.tokens"
MOST_DEVICES = 20_000
REGISTERING = 32
REDRAW_SEC = 0.25
# How long requests are retried while the broker restarts. Retries use the same idempotency key.
AWAY_SEC = 60
AGAIN_SEC = 0.5


def simulate(
    *,
    devices: int = 100,
    offline: str = "0%",
    fail: str = "0%",
    duplicate: str = "0%",
    lose: str = "0%",
    slow: str = "0%",
    send_rate: float = 50,
    duration: float = 30,
    seed: int = 1,
    type_name: Annotated[str, Parameter(name="--type")] = TYPE,
    mqtt_url: Text = None,
    data: Data = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Run simulated devices against a running broker, and report what happened to each command.

    A share is written as 10% or 0.1. It is a share of all commands; one command can have several faults. Exit
    0 only if no command was executed twice, none was lost, and every state fits what the device did.

    Parameters
    ----------
    devices
        How many devices; they are registered as sim-0001, sim-0002, …, in project simulation.
    offline
        Share of commands at which the device loses its connection, for 1 to 8 s.
    fail
        Share of commands that the device fails.
    duplicate
        Share of commands whose answers the device sends twice.
    lose
        Share of commands whose answers are lost until the broker sends the command again.
    slow
        Share of commands that take the device 1 to 5 s.
    send_rate
        Commands a second, over all devices.
    duration
        Seconds of sending.
    seed
        The same seed gives the same devices and the same faults.
    type_name
        The type of the devices: generic, or a shipped type of bought devices. Those get no command ids, so a
        command that is executed twice cannot be seen.
    mqtt_url
        The MQTT server's address for the devices; else the broker's own.
    """
    _within("--devices", devices, 1, MOST_DEVICES)
    _within("--send-rate", send_rate, 0.01, 10_000)
    _within("--duration", duration, 0.1, 86_400)
    _known(type_name)
    settings = settings_of(config, data=data)
    plan = Plan(
        devices=devices,
        type=type_name,
        faults=Faults(
            offline=share("--offline", offline),
            fail=share("--fail", fail),
            duplicate=share("--duplicate", duplicate),
            lose=share("--lose", lose),
            slow=share("--slow", slow),
            seed=seed,
        ),
        send_rate=send_rate,
        duration_sec=duration,
    )
    summary = uvloop.run(_simulated(settings, plan, mqtt_url, live=not as_json and Console().is_terminal))
    _report(summary, as_json=as_json)


def _report(summary: Summary, *, as_json: bool) -> None:
    if as_json:
        print_json(summary)
    else:
        print(told(summary))
    if not summary.good:
        found = f"{summary.doubled} doubled, {summary.lost} lost, {summary.misfits} misfits"
        raise Failed(REFUSED, f"{found}; {summary.examples[0]}")


def _known(type_name: str) -> None:
    if type_name != TYPE and type_name not in MODELS:
        raise Failed(USAGE, f"--type = {type_name}: must be one of {', '.join([TYPE, *MODELS])}")


def _within(option: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise Failed(USAGE, f"{option} = {value:g}: must be between {least:g} and {most:g}")


async def _simulated(settings: Settings, plan: Plan, mqtt_url: str | None, *, live: bool) -> Summary:
    directory = Path(settings.data)
    if not answers(directory):
        raise Failed(UNREACHABLE, f"no broker serves {directory}: start one with ordain serve")
    async with operator(settings) as (client, _):
        system = _json(await client.get("/v1/system"))
        server = _mqtt_server(mqtt_url or system["mqtt"]["url"], settings)
        plan = msgspec.structs.replace(plan, prefix=system["settings"]["prefix"])
        simulation = Simulation(plan, server, OperatorDoor(client, directory / TOKENS, plan.type))
        try:
            async with _shown(simulation, live=live):
                return await simulation.run()
        except NoFleet as error:
            raise Failed(UNREACHABLE, str(error)) from error


def share(option: str, text: str) -> float:
    """Parses a share such as `10%` or `0.1`.

    Raises:
        Failed: it is not a share, or not between 0 and 100%.
    """
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1
    if not 0 <= value <= 1:
        raise Failed(USAGE, f"{option} = {text!r}: must be a share such as 10% or 0.1, at most 100%")
    return value


def _mqtt_server(url: str, settings: Settings) -> Server:
    try:
        address = parse_url(url)
    except ValueError as error:
        raise Failed(USAGE, f"--mqtt-url: {error}") from error
    return Server(address.host, address.port, trust(settings.mqtt_ca) if address.tls else None)


class OperatorDoor:
    """`devices.fleet.simulator.Door` over the operator's HTTP API. Keeps the devices' tokens in a file."""

    def __init__(self, client: httpx2.AsyncClient, tokens: Path, type: str = TYPE) -> None:
        self._client, self._path, self._type = client, tokens, type
        self._tokens: dict[str, str] = {}

    async def tokens(self, names: Sequence[str]) -> dict[str, str]:
        if self._path.exists():
            self._tokens = msgspec.json.decode(self._path.read_bytes(), type=dict[str, str])
        missing = iter([name for name in names if name not in self._tokens])

        async def register() -> None:
            for name in missing:
                self._tokens[name] = await self._made(name)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(REGISTERING):
                    group.create_task(register())
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        finally:
            self._keep()
        return {name: self._tokens[name] for name in names}

    async def new_token(self, name: str) -> str:
        self._tokens[name] = await self._made(name)
        self._keep()
        return self._tokens[name]

    async def send(self, name: str, command: str, params: object, key: str) -> str | None:
        body = {"type": command, "params": params, "idempotency_key": key}
        response = await self._ask("POST", f"/v1/devices/{name}/commands", body)
        if response.status_code == 429:
            return None
        made: str = _json(response)["id"]
        return made

    async def open(self) -> set[str]:
        # In the order of a command's life: a command that changes state meanwhile is in the later list.
        return {
            view.id
            for state in ("pending", "published", "acknowledged")
            async for view in self._list(f"state={state}&")
        }

    async def views(self, ids: set[str]) -> dict[str, View]:
        found: dict[str, View] = {}
        left = set(ids)
        if left:
            async for view in self._list(""):
                if view.id in left:
                    found[view.id] = view
                    left.discard(view.id)
                if not left:
                    break
        return found

    async def _list(self, query: str) -> AsyncIterator[View]:
        cursor: str | None = ""
        while cursor is not None:
            response = await self._ask(
                "GET", f"/v1/commands?{query}limit=100" + (f"&cursor={cursor}" if cursor else "")
            )
            page = _json(response)
            for view in msgspec.convert(page["data"], list[View]):
                yield view
            cursor = page["next_cursor"]

    async def _made(self, name: str) -> str:
        """Registers the device, or gives a registered one a new token; returns the token.

        Raises:
            Failed: the device belongs to another project.
        """
        body = {"hardware_id": name, "type": self._type, "project": PROJECT}
        if self._type == TYPE:  # in the topics of other types the name may be a level
            body["name"] = "simulated"
        response = await self._ask("POST", "/v1/devices", body)
        if response.status_code == 409:
            known = _json(await self._ask("GET", f"/v1/devices/{name}"))
            if known["project"] != PROJECT:
                raise Failed(REFUSED, f"{name} is a device of project {known['project']}, not of {PROJECT}")
            response = await self._ask("POST", f"/v1/devices/{name}/token")
        token: str = _json(response)["device_token"]
        return token

    def _keep(self) -> None:
        with open(self._path, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            file.write(msgspec.json.encode(self._tokens))

    async def _ask(self, method: str, path: str, body: object = None) -> httpx2.Response:
        """Sends a request; retries for up to AWAY_SEC while the broker is away or answers 503.

        Raises:
            httpx2.TransportError: the broker stayed away.
        """
        content = None if body is None else msgspec.json.encode(body)
        headers = None if body is None else {"Content-Type": "application/json"}
        loop = asyncio.get_running_loop()
        until = loop.time() + AWAY_SEC
        while True:
            try:
                response = await self._client.request(method, path, content=content, headers=headers)
                if response.status_code != 503 or loop.time() > until:
                    return response
            except httpx2.TransportError:
                if loop.time() > until:
                    raise
            await asyncio.sleep(AGAIN_SEC)


def _json(response: httpx2.Response) -> Any:
    """The response's JSON.

    Raises:
        Failed: the broker answered with an error; the message is the broker's.
    """
    answer = response.json()
    if response.is_error:
        raise Failed(UNREACHABLE if response.status_code >= 500 else REFUSED, answer["error"]["message"])
    return answer


# --- output ----------------------------------------------------------------------------------------


@asynccontextmanager
async def _shown(simulation: Simulation, *, live: bool) -> AsyncIterator[None]:
    if not live:
        yield
        return
    with Live(auto_refresh=False, transient=True) as picture:

        async def redraw() -> None:
            while True:
                picture.update(_picture(simulation), refresh=True)
                await asyncio.sleep(REDRAW_SEC)

        task = asyncio.create_task(redraw())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait({task})


def _picture(simulation: Simulation) -> Table:
    plan, fleet = simulation.plan, simulation.fleet
    online = 0 if fleet is None else len(fleet.online)
    table = Table(title=f"ordain simulate: {simulation.phase}", show_header=False, min_width=48)
    table.add_row("devices online", f"{online} of {plan.devices}")
    table.add_row("commands sent", f"{len(simulation.sent)} of {plan.commands}")
    table.add_row("refused by the broker", str(simulation.refused))
    table.add_row("done by devices", str(simulation.ledger.runs))
    table.add_row("still open", str(simulation.open) if simulation.phase == "settling" else "")
    return table


def told(summary: Summary) -> str:
    """The summary as text, one figure a line."""
    drawn = msgspec.structs.asdict(summary.drawn)
    rate = summary.sent / summary.sending_sec if summary.sending_sec else 0
    rows = [
        ("sent", summary.sent, f"in {summary.sending_sec:.1f} s, {rate:.0f} a second"),
        ("refused", summary.refused, "by the broker, so not sent"),
        ("executed", summary.executed, _latency(summary)),
        ("failed", summary.failed, ""),
        ("timed out", summary.timed_out, ""),
        ("expired", summary.expired, ""),
        ("cancelled", summary.cancelled, ""),
        ("open", summary.open, "interrupted" if summary.interrupted else ""),
        ("doubled", summary.doubled, "done more than once"),
        ("lost", summary.lost, "accepted, but never closed"),
        ("misfits", summary.misfits, "in a state that does not fit what the device did"),
    ]
    return "\n".join(
        [
            f"{summary.devices} devices, seed {summary.seed}",
            "faults drawn: " + ", ".join(f"{name} {count}" for name, count in drawn.items()),
            *(f"{name:<10}{count:>9}  {note}".rstrip() for name, count, note in rows),
            *summary.examples,
        ]
    )


def _latency(summary: Summary) -> str:
    if summary.latency_p50_ms is None:
        return ""
    return f"from created to executed: p50 {summary.latency_p50_ms} ms, p99 {summary.latency_p99_ms} ms"
