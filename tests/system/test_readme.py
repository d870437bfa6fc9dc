"""The README, compared with the program: its pictures are drawn from the code, and its examples run
unchanged."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest

from broker.settings import ENVIRONMENT, Limits, ProjectLimits, Settings
from devices.agent import Agent
from devices.wire import decode_answer, decode_command
from scripts.draw import DRAWN, README, drawn
from tests.system.conftest import NewBroker
from tests.system.support import ORDAIN, ROOT, Broker, environment, paste

TEXT = README.read_text()


def section(title: str) -> str:
    return TEXT.split(f"## {title}\n")[1].split("\n## ")[0]


def blocks(title: str, language: str = "") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", section(title), re.DOTALL)


@pytest.mark.parametrize("page", DRAWN, ids=lambda page: page.name)
def test_pictures_and_tables_match_the_code(page: Path) -> None:
    assert drawn(page) == page.read_text()


def test_every_file_the_readme_names_exists() -> None:
    named = set(re.findall(r"`((?:broker|projections|devices|scripts|tests|docs)/[\w/.]*)`", TEXT))
    named |= set(re.findall(r"\]\(([\w/.-]+)\)", TEXT))
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_first_commands_work_with_the_demo_devices(new_broker: NewBroker) -> None:
    broker = new_broker().start("--demo")
    welcome = broker.run.out.wait("key  ")
    key = welcome.split()[-1]
    _, curls = blocks("Start in 60 seconds")
    created, _, listed = paste(curls.replace("\ncurl", "; echo\ncurl"), broker, KEY=key).partition("\n")
    command = msgspec.json.decode(created)
    assert command["type"] == "lock"
    assert msgspec.json.decode(listed)["data"][0]["id"] == command["id"]
    broker.key = key
    assert broker.reaches(command["id"], "executed")["result"] == {"locked": True}


def test_the_examples_for_services_and_device_makers_run_in_one_story(broker: Broker) -> None:
    make_key, register, send, read, follow = blocks("For services")
    key = paste(make_key + "echo $KEY", broker).strip()
    device = msgspec.json.decode(paste(register, broker, KEY=key))
    first = msgspec.json.decode(paste(send, broker, KEY=key))
    again = msgspec.json.decode(paste(send, broker, KEY=key))
    assert (again["id"], first["hardware_id"]) == (first["id"], "door-7")
    assert msgspec.json.decode(paste(read, broker, KEY=key))["data"][0]["id"] == first["id"]
    stream = paste(follow.rstrip() + " -m 1 -H 'Last-Event-ID: 0' || true", broker, KEY=key)
    told = [msgspec.json.decode(line[6:]) for line in stream.splitlines() if line.startswith("data: ")]
    assert [(event["type"], event["subject"]) for event in told] == [
        ("ordain.device.registered.v1", device["id"]),
        ("ordain.command.created.v1", first["id"]),
    ]
    broker.key = key
    asyncio.run(_run_agent(broker, device["device_token"], first["id"]))
    assert broker.command(first["id"])["result"] == {"locked": False}


def test_the_heartbeat_and_the_reports_for_device_makers_run(broker: Broker) -> None:
    token = broker.device("rec-7", "recorder")
    command_id = broker.create("rec-7", "start_recording")
    curls = re.findall(r"```\n(.*?)```", TEXT.split("### Without MQTT\n")[1], re.DOTALL)[0]
    answers = paste(curls.replace("\ncurl", "; echo\ncurl"), broker, TOKEN=token, ID=command_id).splitlines()
    beat, acknowledged, done = map(msgspec.json.decode, answers)
    assert [command["id"] for command in beat["commands"]] == [command_id]
    assert (acknowledged["status"], done["status"]) == ("delivered", "executed")
    assert broker.http("GET", "/v1/devices/rec-7").json()["attributes"] == {"battery_percent": 81}


async def _run_agent(broker: Broker, token: str, command_id: str) -> None:
    """Runs the README's agent on the broker's port until the command is done."""
    (source,) = blocks("For device makers", "python")
    source = source.replace("127.0.0.1:1883", f"127.0.0.1:{broker.mqtt_port}")
    source = source.replace('Path("door-7.db")', f"Path({str(broker.cwd / 'door-7.db')!r})")
    names: dict[str, Any] = {"token": token}
    exec(compile(source, "README.md", "exec"), names)
    agent: Agent = names["agent"]
    running = asyncio.create_task(agent.run())
    await asyncio.to_thread(broker.reaches, command_id, "executed")
    running.cancel()
    await asyncio.wait({running})


def test_the_messages_shown_to_device_makers_are_accepted_by_the_code() -> None:
    command, answers = (block.replace("…", "1") for block in blocks("For device makers", "json"))
    assert decode_command(command.encode()).type == "unlock"
    statuses = [decode_answer(line.encode(), None, {}).status for line in answers.splitlines()]
    assert statuses == ["acknowledged", "progress", "executed", "failed"]


@pytest.mark.parametrize("command", re.findall(r"\| `(ordain [^`]*)`", section("For operators")))
def test_every_command_in_the_table_for_operators_exists(command: str, tmp_path: Path) -> None:
    words = [word for word in command.split()[1:] if re.fullmatch(r"[a-z]+", word)]
    path = environment(PATH=f"{Path(ORDAIN).parent}{os.pathsep}{os.environ['PATH']}")
    done = subprocess.run(
        ["ordain", *words, "--help"], env=path, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    for option in re.findall(r"--[a-z]+", command):
        assert option in done.stdout


def test_the_page_of_settings_names_every_setting_and_its_default() -> None:
    page = (ROOT / "docs" / "settings.md").read_text()
    shown = msgspec.to_builtins(Settings()) | {
        f"limits.{key}": value for key, value in msgspec.to_builtins(Limits()).items()
    }
    del shown["limits"], shown["projects"]
    for key in ProjectLimits.__struct_fields__:
        assert f"| `projects.<name>.{key}` | as `limits.{key}` |" in page
    for key, default in shown.items():
        row = next(line for line in page.splitlines() if line.startswith(f"| `{key}` |"))
        written = str(default).lower() if isinstance(default, bool) else str(default)  # written as in TOML
        assert written in row
        assert ENVIRONMENT.get(key, "") in row
