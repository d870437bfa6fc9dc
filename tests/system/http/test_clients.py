"""The API descriptions as other tools read them: generated clients type-check, and linters find no error.

The npm tools are installed by `scripts/setup-api-tools`, with the versions of `npm/package-lock.json`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from broker.http.schema import asyncapi, openapi
from devices.types import load_type, shipped_types
from tests.system.support import ROOT

TOOLS = ROOT / ".venv" / "npm" / "api-tools"
BIN = TOOLS / "node_modules" / ".bin"
WITHIN_SEC = 600
CLIENT = """
import type { paths, webhooks, components } from "./api";
type Body = paths["/v1/devices/{device}/commands"]["post"]["requestBody"]["content"]["application/json"];
type Command = components["schemas"]["Command"];
type Event = webhooks["event"]["post"]["requestBody"]["content"]["application/cloudevents+json"];
export const body: Body = { type: "unlock", params: { for_sec: 5 }, ttl_sec: 60 };
export const state = (command: Command): "executed" | string => command.state;
export const subject = (event: Event): string => event.subject;
// @ts-expect-error - a command needs a type
export const wrong: Body = { ttl_sec: 60 };
"""


def run(*command: str | Path, cwd: Path, given: bytes | None = None) -> bytes:
    done = subprocess.run(command, cwd=cwd, input=given, capture_output=True, timeout=WITHIN_SEC)
    assert done.returncode == 0, (done.stdout + done.stderr).decode()
    return done.stdout


@pytest.fixture(scope="module")
def tools() -> Path:
    done = subprocess.run([ROOT / "scripts" / "setup-api-tools"], capture_output=True, timeout=WITHIN_SEC)
    if done.returncode != 0:
        pytest.skip(done.stderr.decode().strip())
    return BIN


@pytest.fixture
def description(tmp_path: Path) -> Path:
    (tmp_path / "openapi.json").write_bytes(openapi.document())
    return tmp_path / "openapi.json"


def test_a_generated_typescript_client_passes_strict_checks(tools: Path, description: Path) -> None:
    home = description.parent
    run(tools / "openapi-typescript", description, "-o", "api.d.ts", cwd=home)
    (home / "client.ts").write_text(CLIENT)
    # Without the types of browsers, and without checking those of the language: they are not ours.
    options = ["--strict", "--noEmit", "--skipDefaultLibCheck", "--target", "es2022", "--lib", "es2022"]
    run(tools / "tsc", *options, "client.ts", "api.d.ts", cwd=home)


def test_a_generated_python_client_passes_mypy(description: Path) -> None:
    home = description.parent
    (home / "config.yaml").write_text("post_hooks: []\n")
    generate = "from openapi_python_client.cli import app; app()"
    options = ["--path", description.name, "--output-path", "client", "--config", "config.yaml"]
    said = run(
        sys.executable, "-c", generate, "generate", *options, "--meta", "none", "--fail-on-warning", cwd=home
    )
    assert b"Warning" not in said
    mypy = ["--strict-equality", "--no-error-summary", "--cache-dir", str(ROOT / ".mypy_cache/clients")]
    run(sys.executable, "-m", "mypy", *mypy, "client", cwd=home)


def test_spectral_finds_no_error_in_the_openapi_description(tools: Path, description: Path) -> None:
    home = description.parent
    (home / ".spectral.json").write_text(json.dumps({"extends": ["spectral:oas"]}))
    run(tools / "spectral", "lint", description, "--ruleset", ".spectral.json", "--quiet", cwd=home)


def test_the_official_parser_reads_the_asyncapi_description(tools: Path) -> None:
    examples = [load_type(path) for path in sorted((ROOT / "docs" / "types").glob("*.toml"))]
    types = dict(shipped_types()) | {kind.name: kind for kind in examples}
    document = msgspec.json.encode(asyncapi.document(types, "iotee"))
    script = (ROOT / "tests/system/http/npm/asyncapi.mjs").read_text()
    said = run("node", "--input-type=module", "--eval", script, cwd=TOOLS, given=document)
    assert json.loads(said) == {"read": True, "faults": []}


def test_every_operation_and_parameter_is_described() -> None:
    for path, methods in json.loads(openapi.document())["paths"].items():
        for method, operation in methods.items():
            assert operation.get("summary"), (method, path)
            assert operation.get("description"), (method, path)
            for parameter in operation.get("parameters", []):
                assert parameter.get("description"), (method, path, parameter["name"])
