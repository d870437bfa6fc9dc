"""The page for services, compared with the program: its code blocks run unchanged."""

from __future__ import annotations

import asyncio
import json
import re
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from standardwebhooks import Webhook

from tests.integration.subscriptions.receiver import receiving
from tests.sdk_driver import LANGUAGES, run_javascript, run_python
from tests.system.conftest import NewBroker
from tests.system.http.test_sdk import agent
from tests.system.support import ROOT, Broker, paste, running

PAGE = (ROOT / "docs" / "services.md").read_text()
BLOCK = {"python": "python", "javascript": "js", "shell": "sh"}
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{BLOCK[language]}\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_blocks_of_a_language_are_one_program(broker: Broker, language: str, tmp_path: Path) -> None:
    key = paste(blocks("shell")[0], broker).strip()
    broker.key = key
    token = broker.device("door-7")
    source = "".join(blocks(language)).replace("127.0.0.1:8080", broker.url.removeprefix("http://"))
    with running(lambda: agent(broker, "door-7", token)):
        if language == "python":
            printed = asyncio.run(run_python(source, key=key))
        else:
            printed = run_javascript(source, tmp_path, key=key)
    lines = printed.splitlines()
    command_id = lines[0].split()[1]
    assert lines[0] == f"door-7 {command_id}"
    assert lines[1] == "door-99 Device not found"
    assert lines[2] in ("executed {'locked': False}", 'executed {"locked":false}')
    *events, record, refused = lines[3:]
    told = [line.split()[1].split(".")[2] for line in events if command_id in line]
    assert (told[0], told[-1]) == ("created", "executed")
    assert re.fullmatch(rf"\{{[\"']for_sec[\"']: ?5\}} \d{{13}} {command_id} executed", record)
    assert refused.startswith("name ")
    assert len(broker.http("GET", "/v1/devices/door-7/commands").json()["data"]) == 2


def test_the_curl_calls_work_in_order(broker: Broker, tmp_path: Path) -> None:
    make_key, get_module, send, look, follow, history, _ = blocks("shell")
    key = paste(make_key, broker).strip()
    paste(f"cd {tmp_path}\n{get_module}", broker)
    assert {path.name for path in tmp_path.glob("app.*")} == {"app.mjs", "app.d.mts"}
    broker.key = key
    broker.device("door-7")
    sent = json.loads(paste(send, broker, KEY=key))
    assert json.loads(paste(send, broker, KEY=key)) == sent
    command_id = sent["door-7"]["command_id"]
    assert json.loads(paste(look, broker, KEY=key, COMMAND_ID=command_id))["state"] == "pending"
    told = paste(f"{follow.strip()} || true", broker, KEY=key)
    assert [json.loads(line[6:])["subject"] for line in told.splitlines() if line.startswith("data: ")][
        1:
    ] == [command_id]
    found = json.loads(paste(history, broker, KEY=key))
    assert [record["command_id"] for record in found["door-7"]] == [command_id]


async def test_a_real_webhook_passes_the_signature_check(new_broker: NewBroker) -> None:
    broker = new_broker()
    settings = broker.cwd / "ordain.toml"
    settings.write_text('webhook_allow = ["127.0.0.0/8"]\n')
    broker.start("--config", str(settings))
    make_key, *_, make = blocks("shell")
    broker.key = paste(make_key, broker).strip()
    async with receiving() as receiver:
        make = make.replace("https://service.example.org/ordain", receiver.url)
        secret = json.loads(paste(make, broker, KEY=broker.key))["secret"]
        broker.device("door-7")
        command_id = broker.create("door-7")
        (got,) = await receiver.count(1)
    assert got.event["subject"] == command_id
    check = f"{blocks('python')[-1]}\nprint(is_genuine(secret, headers, body))"
    assert await run_python(check, secret=secret, headers=got.headers, body=got.body) == "True\n"


Case = tuple[dict[str, str], str]


def signed(body: str, at: float, secret: str = SECRET) -> Case:
    stamp = datetime.fromtimestamp(int(at), UTC)
    signature = Webhook(secret).sign("msg_1", stamp, body)
    return {"webhook-id": "msg_1", "webhook-timestamp": str(int(at)), "webhook-signature": signature}, body


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_signature_check_accepts_only_genuine_webhooks(tmp_path: Path, language: str) -> None:
    now = time.time()
    headers, body = signed('{"grün": "🔒"}', now)
    others, _ = signed(body, now, "whsec_" + "A" * 32)
    rotated = {"webhook-signature": f"{others['webhook-signature']} {headers['webhook-signature']}"}
    cases: list[tuple[Case, bool]] = [
        ((headers, body), True),
        ((headers | rotated, body), True),
        ((headers, body + " "), False),
        ((headers | {"webhook-id": "msg_2"}, body), False),
        ((others, body), False),
        ((headers | {"webhook-signature": "v1,"}, body), False),
        (signed(body, now - 3_600), False),
        (signed(body, now + 3_600), False),
    ]
    source = blocks(language)[-1]
    given = [[headers, body] for (headers, body), _ in cases]
    if language == "python":
        theirs = "\nprint([is_genuine(secret, headers, body.encode()) for headers, body in given])"
        printed = asyncio.run(run_python(source + theirs, secret=SECRET, given=given)).lower()
    else:
        theirs = (
            "\nconsole.log(JSON.stringify(given.map(([headers, body]) => isGenuine(secret, headers, body))));"
        )
        printed = run_javascript(source + theirs, tmp_path, secret=SECRET, given=given)
    assert json.loads(printed) == [genuine for _, genuine in cases]
