"""The JavaScript SDK as the broker serves it, and its type declarations compared with the module's
exports."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from broker import client_types
from broker.domain.cloudevents import CloudEvent
from broker.domain.explain import Explanation
from broker.http.compat import app_command
from broker.http.edge.errors import STATUS
from broker.http.v1 import views
from tests.integration.http.support import running
from tests.sdk_driver import MODULE, node, run_javascript
from tests.streams import stream_server

TYPES = MODULE.with_name("app.d.ts").read_text()
# Public methods and fields of each exported class: name -> members.
NAMES = """
import { pathToFileURL } from "node:url";
const module = await import(pathToFileURL(process.argv[1]));
const names = {};
for (const [name, value] of Object.entries(module)) {
  names[name] = Object.getOwnPropertyNames(value.prototype).filter((each) => each !== "constructor");
}
names.App.push(...Object.keys(new module.App("http://127.0.0.1", "k")));
names.AppError.push(...Object.keys(new module.AppError("c", "m")).filter((each) => each !== "name"));
console.log(JSON.stringify(names));
"""


# Prints what would keep node alive, apart from the connection, which may close a little later.
LEFT_EARLY = """
import { App } from "./app.mjs";
for await (const event of new App(url, "sk_live_test").command.events()) break;
console.log(process.getActiveResourcesInfo().filter((each) => each === "Timeout"));
"""


async def test_node_ends_by_itself_when_the_events_are_left_early(tmp_path: Path) -> None:
    async def stays_open(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\nid: 1\ndata: {}\n\n")
        await reader.read()

    async with stream_server(stays_open) as port:
        url = f"http://127.0.0.1:{port}"
        printed = await asyncio.to_thread(run_javascript, LEFT_EARLY, tmp_path, url=url)
    assert printed == "[]\n"


async def test_module_and_types_are_served_unchanged_without_a_key(tmp_path: Path) -> None:
    async with running(tmp_path) as broker, broker.client() as client:
        module = await client.get("/sdk/app.mjs")
        types = await client.get("/sdk/app.d.ts")
        found_by_typescript = await client.get("/sdk/app.d.mts")
        plain = await client.get("/sdk/app.mjs", headers={"Accept-Encoding": "identity"})
        again = await client.get("/sdk/app.mjs", headers={"If-None-Match": module.headers["etag"]})
    assert module.content == plain.content == MODULE.read_bytes()
    assert (module.headers["content-encoding"], again.status_code) == ("gzip", 304)
    assert module.headers["content-type"].startswith("text/javascript")
    assert types.text == found_by_typescript.text == TYPES
    assert types.headers["content-type"].startswith("text/plain")


def test_the_types_declare_exactly_the_modules_exports() -> None:
    done = subprocess.run(
        [node(), "--input-type=module", "-e", NAMES, MODULE], capture_output=True, text=True, check=True
    )
    exported = {name: set(members) for name, members in json.loads(done.stdout).items()}
    classes = re.findall(r"^export class (\w+)(?: extends \w+)? \{(.*?)\}$", TYPES, re.MULTILINE | re.DOTALL)
    declared = {
        name: set(re.findall(r"^  (?:readonly )?(\w+)[(:]", body, re.MULTILINE)) - {"constructor"}
        for name, body in classes
    }
    declared |= {name: set() for name in re.findall(r"^export function (\w+)\(", TYPES, re.MULTILINE)}
    assert declared == exported


@pytest.mark.parametrize(
    ("ours", "in_javascript", "theirs"),
    [
        (client_types.Command, "Command", views.Command),
        (client_types.Event, "Event", CloudEvent),
        (client_types.SendParams, "SendParams", app_command.SendBody),
        (client_types.HistoryParams, "HistoryParams", app_command.HistoryBody),
        (client_types.Record, "HistoryRecord", app_command.HistoryRecord),
        (client_types.Explanation, "Explanation", Explanation),
    ],
)
def test_both_languages_have_the_brokers_fields(
    ours: Any, in_javascript: str, theirs: type[msgspec.Struct]
) -> None:
    fields = {
        field.encode_name: field.default not in (msgspec.UNSET, None)
        for field in msgspec.structs.fields(theirs)
    }
    assert {name: "NotRequired" not in str(kind) for name, kind in ours.__annotations__.items()} == fields
    _, _, body = TYPES.partition(f"export interface {in_javascript} {{\n")
    declared = re.findall(r"^  (\w+)(\??):", body.partition("\n}")[0], re.MULTILINE)
    assert {name: not optional for name, optional in declared} == fields


def test_both_languages_have_the_brokers_enum_values() -> None:
    for name in ("Status", "StateName"):
        words = get_args(getattr(views, name))
        assert get_args(getattr(client_types, name)) == words
        _, _, body = TYPES.partition(f"export type {name} =")
        assert tuple(re.findall(r'"(\w+)"', body.partition(";")[0])) == words
    typed = re.findall(r"^  (\w+): (\w+),$", MODULE.read_text(), re.MULTILINE)
    assert dict(typed) == {code: kind.__name__ for code, kind in client_types.ERRORS.items()}
    assert client_types.ERRORS.keys() <= STATUS.keys()


def test_the_types_declare_the_error_hierarchy() -> None:
    pattern = r"^export class (\w+) extends (\w+)"
    module = MODULE.read_text()
    assert re.findall(pattern, TYPES, re.MULTILINE) == re.findall(pattern, module, re.MULTILINE)
