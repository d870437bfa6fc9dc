"""The packages: each is built, installed into an empty environment away from the checkout, and used."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from tests.system.conftest import NewBroker
from tests.system.faults.test_start import bash, welcome
from tests.system.support import ROOT, WITHIN_SEC, environment, until

# A device as its maker would write it: it needs only `ordain-device`, and nothing of the broker.
DEVICE = """
import asyncio, importlib.util, sys
from devices.agent import Agent, Call

assert importlib.util.find_spec("broker") is None
agent = Agent("door-7", sys.argv[1], sys.argv[2], grants="none")

@agent.command("lock")
async def lock(call: Call) -> object:
    return {"got": call.params}

asyncio.run(agent.run())
"""
IMPORT_ALL = """
import devices, importlib, importlib.metadata, json, pkgutil
for module in pkgutil.walk_packages(devices.__path__, "devices."):
    importlib.import_module(module.name)
print(json.dumps([each.name for each in importlib.metadata.distributions()]))
"""

# A package index may be reached through a proxy whose certificate only the system knows.
ENVIRONMENT = environment(UV_SYSTEM_CERTS="1")


def uv() -> str:
    places = [os.environ["PATH"], str(ROOT / ".uv" / "bin"), str(Path(sys.executable).parent)]
    found = shutil.which("uv", path=os.pathsep.join(places))
    assert found is not None, "uv is not there: run `make setup`"
    return found


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "scripts.dist", "--to", str(to), cwd=ROOT)
    return to


def wheel_of(packages: Path, name: str) -> Path:
    return next(packages.glob(f"{name}-*.whl"))


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=ENVIRONMENT, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def installed(directory: Path, wheel: Path, extra: str = "") -> Path:
    """A new environment with one wheel and what it needs, in the versions of the lock; its `bin`."""
    run(uv(), "venv", "--quiet", "--seed", "--python", sys.executable, str(directory), cwd=directory.parent)
    python = str(directory / "bin" / "python")
    lock = str(ROOT / "requirements.lock")
    run(
        uv(),
        "pip",
        "install",
        "--quiet",
        "--python",
        python,
        "-c",
        lock,
        f"{wheel}{extra}",
        cwd=directory.parent,
    )
    return directory / "bin"


@pytest.fixture(scope="module")
def programs(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with the wheel of the broker."""
    return installed(tmp_path_factory.mktemp("broker") / "env", wheel_of(packages, "ordain"))


def committed(*rooms: str) -> set[str]:
    """The files of these directories that are committed, or are new and not ignored."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", *rooms, cwd=ROOT)
    return {name for name in listed.splitlines() if (ROOT / name).is_file()}


def held(names: Iterator[str], *rooms: str) -> set[str]:
    return {name for name in names if name.split("/")[0] in rooms and not name.endswith("/")}


@pytest.mark.parametrize(
    ("name", "rooms"), [("ordain", ("broker", "devices", "projections")), ("ordain_device", ("devices",))]
)
def test_a_package_holds_every_file_of_its_rooms_and_no_other(
    packages: Path, name: str, rooms: tuple[str, ...]
) -> None:
    wheel, archive = wheel_of(packages, name), next(packages.glob(f"{name}-*.tar.gz"))
    with zipfile.ZipFile(wheel) as zipped, tarfile.open(archive) as tarred:
        in_wheel = held(iter(zipped.namelist()), *rooms)
        files = (each.name.partition("/")[2] for each in tarred.getmembers() if each.isfile())
        in_archive = held(files, *rooms)

    assert in_wheel == in_archive == committed(*rooms)


def test_the_wheel_serves_its_demo_and_the_devices_package_runs_a_device(
    packages: Path, programs: Path, new_broker: NewBroker, tmp_path: Path
) -> None:
    broker = new_broker("--demo")
    broker.program = str(programs / "ordain")

    printed = welcome(broker.start())
    bash(printed["send"], tmp_path)
    until(lambda: '"state":"executed"' in bash(printed["look"], tmp_path))
    assert "executed" in bash(printed["log"], tmp_path)
    for path in ("/docs", "/openapi.json", "/sdk/app.mjs"):
        assert httpx2.get(broker.url + path, trust_env=False, timeout=WITHIN_SEC).status_code == 200, path

    wheel = wheel_of(packages, "ordain_device")
    python = str(installed(tmp_path / "device-env", wheel) / "python")
    url = f"mqtt://127.0.0.1:{broker.mqtt_port}"
    device = subprocess.Popen([python, "-c", DEVICE, broker.device("door-7"), url], cwd=tmp_path)
    try:
        done = broker.reaches(broker.create("door-7", "lock", params={"for_sec": 5}), "executed")
    finally:
        device.kill()
        device.wait()
    assert done["result"] == {"got": {"for_sec": 5}}


def test_the_wheel_has_the_configuration_of_its_own_mosquitto(programs: Path, new_broker: NewBroker) -> None:
    broker = new_broker("--mqtt-server", "mosquitto")
    broker.program = str(programs / "ordain")

    assert broker.start().not_ready() == []


def test_pip_accepts_the_documented_commands(packages: Path, programs: Path, tmp_path: Path) -> None:
    """All is there already, so pip loads nothing, but it reads the requirements and judges their hashes."""
    page = (ROOT / "docs" / "deploy" / "index.md").read_text()
    lines = re.findall("^/opt/ordain/bin/pip install .*$", page, re.MULTILINE)
    (tmp_path / "requirements.lock").symlink_to(ROOT / "requirements.lock")
    (tmp_path / "dist").symlink_to(packages)

    said = [run("sh", "-ec", line.replace("/opt/ordain/bin", str(programs)), cwd=tmp_path) for line in lines]

    assert len(said) == 2
    assert "ordain" in said[-1]


def test_the_devices_package_needs_few_others(packages: Path, tmp_path: Path) -> None:
    wheel = wheel_of(packages, "ordain_device")
    python = str(installed(tmp_path / "env", wheel, "[relay]") / "python")

    names = json.loads(run(python, "-c", IMPORT_ALL, cwd=tmp_path))

    assert "ordain-device" in names
    assert {"ordain", "litestar", "uvicorn", "amqtt", "rich"}.isdisjoint(names)
    assert len(names) <= 25
