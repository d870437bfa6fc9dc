"""`app.command` as its users know it from another system: their examples unchanged, in both languages, and
the answers field by field. Only address and key are replaced."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from broker.client import App
from tests.sdk_driver import LANGUAGES, run_javascript, run_python
from tests.system.conftest import NewBroker
from tests.system.support import Broker

SEND = {
    "javascript": """
const result = await app.command.send({
name: "reboot",
device_ident: ["sensor_01", "sensor_02"],
data: { force: false },
});
""",
    "python": """
result = await app.command.send({
"name": "reboot",
"device_ident": ["sensor_01", "sensor_02"],
"data": {"force": False},
})
""",
}
HISTORY = {
    "javascript": """
const history = await app.command.history({
name: "reboot",
device_idents: ["sensor_01"],
start: "2026-03-01T00:00:00.000Z",
end: "2026-03-02T00:00:00.000Z",
});
history["sensor_01"].forEach((record) => {
console.log(`${JSON.stringify(record.value)} at ${record.timestamp}`);
});
""",
    "python": """
history = await app.command.history({
"name": "reboot",
"device_idents": ["sensor_01"],
"start": "2026-03-01T00:00:00.000Z",
"end": "2026-03-02T00:00:00.000Z",
})
for record in history["sensor_01"]:
    print(f"{record['value']} at {record['timestamp']}")
""",
}
languages = pytest.mark.parametrize("language", LANGUAGES)


def run(language: str, example: str, name: str, broker: Broker) -> tuple[Any, list[str]]:
    """The value of the example's variable, and the lines it printed before."""
    broker.http("GET", "/v1/types")  # creates the broker's key
    if language == "python":
        printed = asyncio.run(_python(example, name, broker))
    else:
        ours = 'import { App } from "./app.mjs";\nconst app = new App(url, key);\n'
        theirs = f"console.log(JSON.stringify({name}));\n"
        printed = run_javascript(ours + example + theirs, broker.cwd, url=broker.url, key=broker.key)
    *lines, last = printed.splitlines()
    return json.loads(last), lines


async def _python(example: str, name: str, broker: Broker) -> str:
    async with App(broker.url, broker.key) as app:
        return await run_python(f"{example}\nprint(json.dumps({name}))", app=app, json=json)


@languages
def test_the_examples_run_unchanged_and_give_the_documented_answers(broker: Broker, language: str) -> None:
    for hardware_id in ("sensor_01", "sensor_02"):
        broker.device(hardware_id)
    began = int(time.time() * 1_000)

    first, _ = run(language, SEND[language], "result", broker)
    assert list(first) == ["sensor_01", "sensor_02"]
    for hardware_id, sent in first.items():
        assert sent == {"sent": True, "command_id": sent["command_id"]}
        command = broker.command(sent["command_id"])
        assert (command["hardware_id"], command["type"]) == (hardware_id, "reboot")
        assert (command["params"], command["expires_at"]) == ({"force": False}, None)

    unknown = SEND[language].replace("sensor_02", "sensor_99")
    second, _ = run(language, unknown, "result", broker)
    assert second == {
        "sensor_01": {"sent": True, "command_id": second["sensor_01"]["command_id"]},
        "sensor_99": {"sent": False, "error": "Device not found"},
    }

    # Unchanged, the example asks for a day before the first command.
    assert run(language, HISTORY[language], "history", broker) == ({"sensor_01": []}, [])
    today = HISTORY[language].replace("2026-03-01T", time.strftime("%Y-%m-%dT", time.gmtime(began / 1_000)))
    history, printed = run(language, today.replace("2026-03-02T", "2999-01-01T"), "history", broker)
    assert list(history) == ["sensor_01"]
    times = [record["timestamp"] for record in history["sensor_01"]]
    assert began - 1_000 <= times[0] <= times[1] <= int(time.time() * 1_000) + 1_000
    assert history["sensor_01"] == [
        {
            "value": {"force": False},
            "timestamp": timestamp,
            "command_id": sent["sensor_01"]["command_id"],
            "status": "pending",
        }
        for timestamp, sent in zip(times, (first, second), strict=True)
    ]
    assert [line.rpartition(" at ")[2] for line in printed] == [str(timestamp) for timestamp in times]


def test_commands_are_queued_per_name_up_to_the_configured_limit(
    new_broker: NewBroker, tmp_path: Path
) -> None:
    settings = tmp_path / "ordain.toml"
    settings.write_text("[limits]\nqueue_per_name = 1\n")
    broker = new_broker("--config", str(settings)).start()
    broker.device("sensor_01")
    example = SEND["python"].replace(', "sensor_02"', "")
    assert run("python", example, "result", broker)[0]["sensor_01"]["sent"] is True
    full, _ = run("python", example, "result", broker)
    assert full == {"sensor_01": {"sent": False, "error": "Queue full"}}
    other, _ = run("python", example.replace("reboot", "blink"), "result", broker)
    assert other["sensor_01"]["sent"] is True
