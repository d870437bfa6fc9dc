"""`app.command` as its users know it from elsewhere: their examples as they stand, in both languages, and
what comes back field by field. Only address and key are ours.
"""

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
    """The example's one variable, and what it printed before."""
    broker.http("GET", "/v1/types")  # makes the key
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
def test_the_send_example_sends_to_both_devices(broker: Broker, language: str) -> None:
    for hardware_id in ("sensor_01", "sensor_02"):
        broker.device(hardware_id)
    result, _ = run(language, SEND[language], "result", broker)
    assert list(result) == ["sensor_01", "sensor_02"]
    for hardware_id, sent in result.items():
        assert sent == {"sent": True, "command_id": sent["command_id"]}
        command = broker.command(sent["command_id"])
        assert (command["hardware_id"], command["type"]) == (hardware_id, "reboot")
        assert (command["params"], command["expires_at"]) == ({"force": False}, None)


@languages
def test_a_device_that_does_not_exist_has_an_error_of_its_own(broker: Broker, language: str) -> None:
    broker.device("sensor_01")
    example = SEND[language].replace("sensor_02", "sensor_99")
    result, _ = run(language, example, "result", broker)
    assert result == {
        "sensor_01": {"sent": True, "command_id": result["sensor_01"]["command_id"]},
        "sensor_99": {"sent": False, "error": "Device not found"},
    }


@languages
def test_the_history_example_shows_values_and_times_in_order(broker: Broker, language: str) -> None:
    for hardware_id in ("sensor_01", "sensor_02"):
        broker.device(hardware_id)
    began = int(time.time() * 1_000)
    sent = [run(language, SEND[language], "result", broker)[0]]
    other = SEND[language].replace('"force"', '"reason"').replace("force:", "reason:")
    sent.append(run(language, other, "result", broker)[0])
    # The example's day, moved to now.
    example = HISTORY[language].replace("2026-03-01T", time.strftime("%Y-%m-%dT", time.gmtime(began / 1_000)))
    example = example.replace("2026-03-02T", "2999-01-01T")
    history, printed = run(language, example, "history", broker)
    assert list(history) == ["sensor_01"]
    first, second = history["sensor_01"]
    assert began - 1_000 <= first["timestamp"] <= second["timestamp"] <= int(time.time() * 1_000) + 1_000
    for record, value, answer in ((first, {"force": False}, sent[0]), (second, {"reason": False}, sent[1])):
        assert record == {
            "value": value,
            "timestamp": record["timestamp"],
            "command_id": answer["sensor_01"]["command_id"],
            "status": "pending",
        }
    assert len(printed) == 2
    assert printed[0].endswith(f" at {first['timestamp']}")


@languages
def test_the_history_example_as_it_stands_is_before_all_that_is_kept(broker: Broker, language: str) -> None:
    broker.device("sensor_01")
    run(language, SEND[language], "result", broker)
    assert run(language, HISTORY[language], "history", broker) == ({"sensor_01": []}, [])


def test_commands_are_queued_per_name_up_to_the_configured_number(
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
