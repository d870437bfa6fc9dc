"""`make dist`: the packages of `ordain` and of `ordain-device`, each as a wheel and as a source archive.

`ordain-device` is `devices/` alone, for makers of devices, with the few packages it needs. It is built from
the same source and the same version. Nothing is fetched: the build backend is in the locks.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uv_build

ROOT = Path(__file__).parents[1]
# The packages that `devices/` imports. pyproject.toml has their versions.
NEEDED = ("aiomqtt", "paho-mqtt", "jmespath", "msgspec", "pyjwt", "cryptography", "rfc8785", "jsonschema-rs")
NEEDED_BY_RELAY = ("httpx2",)

DEVICE_PROJECT = """\
[project]
name = "ordain-device"
version = "{version}"
description = "The device side of Ordain: the reference agent and relay, the wire format, device types"
readme = "README.md"
license = "{license}"
license-files = ["LICENSE"]
requires-python = "{python}"
dependencies = {needed}

[project.optional-dependencies]
relay = {relay}

[build-system]
requires = {backend}
build-backend = "uv_build"

[tool.uv.build-backend]
module-name = "devices"
module-root = ""
"""
DEVICE_README = """\
# ordain-device

The device side of Ordain, an event-sourced command broker for MQTT devices. It holds the package `devices`:
`devices.agent` connects a device to its broker and runs each command once; `devices.relay` (install
`ordain-device[relay]`) carries commands to a device that has no network of its own; `devices.wire` and
`devices.grant` are the messages and the signed permission in them.

The package `ordain` contains the same files. Install one of the two in an environment, not both.
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="make dist", description="Build the packages.")
    parser.add_argument("--to", type=Path, default=ROOT / "dist", help="the directory of the packages")
    to: Path = parser.parse_args().to
    to.mkdir(parents=True, exist_ok=True)
    # The backend looks for its program on PATH only; the program is in the same directory as Python.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for file in build(to.resolve()):
        print(to / file)


def build(to: Path) -> Iterator[str]:
    """Builds all packages; gives the name of each file. A wheel is built from its source archive, so that the
    archive is known to be whole."""
    yield from _built(ROOT, to)
    with tempfile.TemporaryDirectory() as scratch:
        project = Path(scratch)
        device_project(project)
        yield from _built(project, to)


def device_project(project: Path) -> None:
    """Writes the source of `ordain-device` to an empty directory."""
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())
    versions = {_name(each): each for each in ours["project"]["dependencies"]}
    text = DEVICE_PROJECT.format(
        version=ours["project"]["version"],
        license=ours["project"]["license"],
        python=ours["project"]["requires-python"],
        needed=[versions[name] for name in NEEDED],
        relay=[versions[name] for name in NEEDED_BY_RELAY],
        backend=ours["build-system"]["requires"],
    )
    (project / "pyproject.toml").write_text(text)
    (project / "README.md").write_text(DEVICE_README)
    shutil.copy(ROOT / "LICENSE", project)
    shutil.copytree(ROOT / "devices", project / "devices", ignore=shutil.ignore_patterns("__pycache__"))


def _name(requirement: str) -> str:
    return requirement.split("[")[0].split(">")[0].split("=")[0].split("<")[0].strip()


def _built(project: Path, to: Path) -> Iterator[str]:
    with _working_in(project):
        archive = uv_build.build_sdist(str(to))
    yield archive
    with tempfile.TemporaryDirectory() as scratch:
        with tarfile.open(to / archive) as file:
            # The argument `filter` is newer than Python 3.11.3, and so is what it names.
            file.extraction_filter = getattr(tarfile, "data_filter", None)
            file.extractall(scratch)
        with _working_in(Path(scratch) / archive.removesuffix(".tar.gz")):
            yield uv_build.build_wheel(str(to))


@contextmanager
def _working_in(directory: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)


if __name__ == "__main__":
    main()
