"""`ordain simulate` as a user runs it, with a few dozen devices, on both kinds of MQTT server."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Mosquitto
from tests.system.conftest import NewBroker
from tests.system.support import ORDAIN, Broker, Device, Process, environment, ordain, refused, until

# The broker resends after 10 to 15 s without an answer, and one device may lose several answers.
ENDS_WITHIN_SEC = 600
ALL_FAULTS = ("--offline", "10%", "--fail", "5%", "--duplicate", "10%", "--lose", "2%", "--slow", "0.05")


def simulating(url: str, broker: Broker, *options: str) -> Process:
    env = environment(ORDAIN_DATA=str(broker.data))
    return Process(ORDAIN, "simulate", "--mqtt-url", url, *options, env=env)


def ended(run: Process) -> dict[str, Any]:
    """The summary of a simulation that ended with exit code 0."""
    assert run.wait(ENDS_WITHIN_SEC) == 0, run.err.all() + run.out.all()
    summary: dict[str, Any] = json.loads(run.out.all())
    return summary


def simulated(url: str, broker: Broker, *options: str) -> dict[str, Any]:
    return ended(simulating(url, broker, "--json", *options))


def recorded(broker: Broker, event: str) -> int:
    """The number of events of this type in the log."""
    return broker.ordain("log", "tail", "--lines", "100000").stdout.count(f" {event} ")


def embedded(broker: Broker) -> str:
    return f"mqtt://127.0.0.1:{broker.mqtt_port}"


def test_with_mosquitto_and_all_faults_nothing_is_doubled_or_lost_and_only_drawn_failures_occur(
    mosquitto: Mosquitto, new_broker: NewBroker
) -> None:
    broker = new_broker("--mqtt-url", mosquitto.url).start()

    options = ("--devices", "40", "--send-rate", "50", "--duration", "4")
    summary = simulated(mosquitto.url, broker, *options, *ALL_FAULTS)

    assert (summary["sent"], summary["refused"], summary["open"]) == (200, 0, 0)
    assert (summary["doubled"], summary["lost"], summary["misfits"]) == (0, 0, 0)
    assert min(summary["drawn"].values()) > 0
    assert summary["failed"] == summary["drawn"]["fail"]
    assert summary["executed"] == 200 - summary["failed"]
    assert broker.verified()


def test_with_the_embedded_server_a_second_run_reuses_the_devices_and_draws_the_same_faults(
    broker: Broker,
) -> None:
    options = ("--devices", "30", "--send-rate", "50", "--duration", "2", "--fail", "20%", "--seed", "5")

    first = simulated(embedded(broker), broker, *options)
    tokens = (broker.data / "simulation.tokens").read_bytes()
    second = simulated(embedded(broker), broker, *options)

    assert first["sent"] == second["sent"] == 100
    assert first["failed"] == second["failed"] == first["drawn"]["fail"] > 0
    assert (broker.data / "simulation.tokens").read_bytes() == tokens
    assert (broker.data / "simulation.tokens").stat().st_mode & 0o777 == 0o600


def test_devices_with_missing_or_old_tokens_get_new_ones(broker: Broker) -> None:
    options = ("--devices", "3", "--send-rate", "10", "--duration", "1")
    tokens = broker.data / "simulation.tokens"
    simulated(embedded(broker), broker, *options)
    kept = json.loads(tokens.read_bytes())
    tokens.write_text(json.dumps({"sim-0001": "dtok_old", "sim-0002": kept["sim-0002"]}))

    assert simulated(embedded(broker), broker, *options)["executed"] == 10
    assert json.loads(tokens.read_bytes())["sim-0002"] == kept["sim-0002"]
    assert json.loads(tokens.read_bytes()).keys() == kept.keys()


def test_simulate_takes_the_mqtt_url_and_prefix_from_the_broker(
    new_broker: NewBroker, tmp_path: Path
) -> None:
    config = tmp_path / "site.toml"
    config.write_text('prefix = "site1"')
    broker = new_broker("--config", str(config)).start()

    done = broker.ordain("simulate", "--json", "--devices", "2", "--send-rate", "5", "--duration", "1")

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["executed"] == 5


def test_a_device_outside_the_simulation_is_not_touched(broker: Broker) -> None:
    token = broker.device("sim-0001")

    refused(broker.ordain("simulate", "--devices", "2"), 1, "sim-0001", "default")

    assert Device(broker.mqtt_port, "sim-0001", token).say("online", suffix="status") == 0


def test_a_broker_killed_during_a_run_loses_and_doubles_no_command(
    mosquitto: Mosquitto, new_broker: NewBroker
) -> None:
    broker = new_broker("--mqtt-url", mosquitto.url).start()
    options = ("--json", "--devices", "20", "--send-rate", "40", "--duration", "6")
    run = simulating(mosquitto.url, broker, *options)
    until(lambda: recorded(broker, "executed") >= 40)

    broker.run.kill()
    broker.start()

    summary = ended(run)
    assert (summary["sent"], summary["executed"]) == (240, 240)
    assert (summary["doubled"], summary["lost"], summary["misfits"]) == (0, 0, 0)


def test_ctrl_c_ends_cleanly_with_the_summary_so_far(broker: Broker) -> None:
    options = ("--devices", "10", "--send-rate", "50", "--duration", "600")
    run = simulating(embedded(broker), broker, *options)
    until(lambda: recorded(broker, "executed") >= 20)

    run.signal(signal.SIGINT)

    assert run.wait() == 0, run.err.all()
    assert run.err.all() == ""
    assert run.out.all().startswith("10 devices, seed 1\n")
    assert "interrupted" in run.out.all()
    until(lambda: recorded(broker, "offline") == 10)


def test_bought_devices_are_simulated_by_type(broker: Broker) -> None:
    faults = ("--duplicate", "50%", "--fail", "20%")
    for kind in ("shelly_gen2", "home_assistant_lock"):
        options = ("--json", "--devices", "3", "--send-rate", "6", "--duration", "1", *faults)
        summary = ended(simulating(embedded(broker), broker, "--type", kind, *options))
        assert (summary["sent"], summary["executed"] + summary["failed"]) == (6, 6), summary
        assert (summary["lost"], summary["misfits"]) == (0, 0), summary


@pytest.mark.parametrize(
    ("option", "value"),
    [("--offline", "200%"), ("--fail", "often"), ("--devices", "0"), ("--send-rate", "nan"),
     ("--duration", "-1"), ("--mqtt-url", "http"), ("--type", "toaster")],
)  # fmt: skip
def test_a_wrong_option_gives_a_one_sentence_error(broker: Broker, option: str, value: str) -> None:
    refused(broker.ordain("simulate", option, value), 2, option)


def test_a_missing_broker_or_mqtt_server_is_reported(broker: Broker, free_port: int) -> None:
    nobody = f"mqtt://127.0.0.1:{free_port}"

    refused(broker.ordain("simulate", "--devices", "2", "--mqtt-url", nobody), 3, "0 of 2 devices")
    assert broker.end() == 0
    refused(broker.ordain("simulate"), 3, "no broker serves")
    refused(ordain("simulate", data=broker.data / "nowhere"), 3, "no broker serves")
    assert not (broker.data / "nowhere").exists()
