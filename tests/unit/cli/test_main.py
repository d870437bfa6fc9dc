"""The command line starts quickly: it imports what one command needs, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from importlib import import_module
from pathlib import Path
from socketserver import UnixStreamServer
from typing import cast

import pytest
from cyclopts import App
from docstring_parser import parse

from broker.cli.commands import parameters, typed
from broker.cli.main import COMMANDS
from broker.operations.asking import Failed
from broker.private_socket import SOCKET

# Neither the help nor a command that asks a running broker may import these: they are what made a start slow.
NEVER = {
    "aiomqtt", "aiosqlite", "amqtt", "asyncio", "cryptography", "httpcore2", "httpx2", "jsonschema_rs", "jwt",
    "litestar", "markdown_it", "paho", "prometheus_client", "rfc8785", "sqlite3", "structlog", "uvicorn",
    "uvloop", "broker.client", "broker.control", "broker.core", "broker.demo", "broker.engine", "broker.http",
    "broker.log", "broker.metrics", "broker.mqtt", "broker.serve", "broker.subscriptions",
    "broker.type_files", "broker.world", "projections",
}  # fmt: skip
AND_NOT_WHEN_ASKING = {"rich"}
AND_NOT_FOR_HELP = {"broker.private_socket", "broker.seams", "http.client"}
HELP = (["--help"], ["--version"])
ASKING = (
    ["keys", "create", "--project", "acme", "--scope", "admin"],
    ["audit"],
    ["keys", "list"],
    ["keys", "show", "key_1"],
    ["keys", "revoke", "key_1"],
    ["grants", "list"],
    ["grants", "rotate"],
    ["grants", "retire", "k1"],
    ["devices", "add", "door-7", "--type", "generic"],
    ["devices", "list"],
    ["devices", "show", "door-7"],
    ["devices", "token", "door-7"],
    ["devices", "move", "door-7", "--gateway", "gw-1"],
    ["devices", "delete", "door-7"],
    ["commands", "list", "--state", "failed"],
    ["commands", "show", "cmd_1"],
    ["commands", "cancel", "cmd_1"],
    ["commands", "retry", "cmd_1"],
    ["send", "door-7", "lock", "for_sec=5", "--wait"],
    ["explain", "cmd_1"],
    ["diff", "1", "2"],
    ["delete", "cmd_1"],
    ["purge", "--older-than-days", "3"],
    ["purge", "--device-events", "--older-than-days", "3"],
    ["webhooks", "list"],
    ["webhooks", "pause", "hook_1"],
    ["webhooks", "resume", "hook_1"],
    ["webhooks", "redrive", "hook_1", "--from", "1"],
)
# These look at files, run for long, or are the broker: they may load what they need.
OWN_WORK = {
    "backup", "completion", "doctor", "log", "migrate", "mqtt", "nodes", "projections", "replay", "restore",
    "serve", "simulate", "types",
}  # fmt: skip
# Runs each command line that it is told in a fork of its own: all begin with the same import. It answers with
# the exit code and what is imported then.
LOOK = """
import json, os, sys
from broker.cli.main import run
for line in sys.stdin:
    os.environ["ORDAIN_DATA"], arguments = json.loads(line)
    if os.fork() == 0:
        answers = os.dup(1)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nowhere, stream)
        code = run(arguments)
        os.write(answers, json.dumps([code, sorted(sys.modules)]).encode() + b"\\n")
        os._exit(0)
    if os.wait()[1] != 0:
        os.write(1, b"[null, []]\\n")
"""


class Refuses(BaseHTTPRequestHandler):
    """Answers as a broker does that does not know a name."""

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b'{"error": {"message": "there is no such thing"}}'
        self.send_response(404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PATCH = do_DELETE = answer

    def log_message(self, format: str, *values: object) -> None:
        cast(Counting, self.server).requests += 1


class Counting(UnixStreamServer):
    requests = 0


@contextmanager
def a_broker_that_refuses(directory: Path) -> Iterator[Counting]:
    with Counting(str(directory / SOCKET), Refuses) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(10)


Started = Callable[[list[str], Path], tuple[int, set[str]]]


@pytest.fixture(scope="module")
def started() -> Iterator[Started]:
    """Runs one command line on a data directory: its exit code, and what it imported.
    `scripts/bench/start.py` measures its time."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ORDAIN_")}
    with subprocess.Popen(
        [sys.executable, "-c", LOOK],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        told, answers = process.stdin, process.stdout
        assert told is not None
        assert answers is not None

        def start(arguments: list[str], directory: Path) -> tuple[int, set[str]]:
            print(json.dumps([str(directory), arguments]), file=told, flush=True)
            code, modules = json.loads(answers.readline())
            return code, set(modules)

        yield start
        told.close()


def test_the_help_imports_no_command(started: Started, tmp_path: Path) -> None:
    commands = {place.partition(":")[0] for place, _ in COMMANDS.values()}
    for arguments in HELP:
        code, modules = started(arguments, tmp_path)
        assert (code, modules & (NEVER | AND_NOT_FOR_HELP | commands)) == (0, set())


@pytest.mark.parametrize("arguments", ASKING, ids=" ".join)
def test_a_command_that_asks_a_running_broker_imports_no_part_of_it(
    arguments: list[str], started: Started, tmp_path: Path
) -> None:
    with a_broker_that_refuses(tmp_path) as asked:
        code, modules = started(arguments, tmp_path)

    assert code == 1
    assert asked.requests == 1
    assert modules & (NEVER | AND_NOT_WHEN_ASKING) == set()


def test_every_command_is_held_by_the_tests_above_or_named_as_one_with_own_work() -> None:
    assert {arguments[0] for arguments in ASKING} | OWN_WORK == set(COMMANDS)
    for name in {arguments[0] for arguments in ASKING}:
        found = target(name)
        if isinstance(found, App):
            held = {arguments[1] for arguments in ASKING if arguments[0] == name}
            assert held == {each for each in found if not each.startswith("-")}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_line_of_a_command_in_the_help_is_the_first_of_its_own_help(name: str) -> None:
    found = target(name)
    text = found.help if isinstance(found, App) else found.__doc__

    assert parse(text or "").short_description == COMMANDS[name][1]


SCHEMA = {
    "properties": {
        "count": {"type": "integer"},
        "share": {"type": ["number", "null"]},
        "open": {"type": "boolean"},
        "level": {"enum": [1, 2, 3]},
        "pin": {"type": "string"},
        "either": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
        "users": {"type": "array"},
        "free": {},
    }
}


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("count", "5", 5),
        ("count", "0042", "0042"),
        ("count", "five", "five"),
        ("share", "1.10", 1.1),
        ("share", "null", None),
        ("open", "true", True),
        ("open", "yes", "yes"),
        ("level", "2", 2),
        ("pin", "0042", "0042"),
        ("pin", "42", "42"),
        ("pin", "true", "true"),
        ("either", "42", "42"),
        ("users", '["a"]', ["a"]),
        ("free", "1.10", "1.10"),
        ("other", "1.10", "1.10"),
    ],
)
def test_a_parameter_is_a_text_unless_the_schema_allows_none(key: str, text: str, value: object) -> None:
    assert typed(SCHEMA, key, text) == value
    assert typed(None, key, text) == text
    assert typed({"additionalProperties": {"type": "number"}}, "n", "1.5") == 1.5


def test_a_parameter_with_a_colon_is_always_json() -> None:
    given = ('users:=["a", "b"]', "level:=3", "note:=null", 'text:="1"', "pin=0042", "url=http://h/?a=b")

    assert parameters(given) == (
        {"pin": "0042", "url": "http://h/?a=b"},
        {"users": ["a", "b"], "level": 3, "note": None, "text": "1"},
    )
    for wrong in (("nonsense",), ("=5",), (":=5",), ("a:=b",), ("a=1", "a=2"), ("a=1", "a:=2")):
        with pytest.raises(Failed) as refused:
            parameters(wrong)
        assert refused.value.code == 2


def target(name: str) -> object:
    module, _, attribute = COMMANDS[name][0].partition(":")
    return getattr(import_module(module), attribute)


def test_serving_loads_no_http_client_and_no_pydantic() -> None:
    """Litestar loads pydantic where it is installed, and amqtt's dependencies install it."""
    look = (
        "import broker.cli.serve, sys; from broker.http.app import _Litestar; _Litestar(openapi_config=None);"
        "print(*sorted({'httpx2', 'pydantic', 'pydantic_core'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, timeout=400)

    assert (done.stderr, done.stdout) == ("", "\n")
