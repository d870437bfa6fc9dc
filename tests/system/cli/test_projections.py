"""`ordain projections run`: the user's own projection file, beside a running broker."""

from __future__ import annotations

import json
from pathlib import Path

from tests.system.support import ROOT, Broker, Device, executed, refused

EXAMPLE = str(ROOT / "docs" / "projections" / "time_to_acknowledge.py")


def test_the_example_of_the_how_to_runs_beside_a_broker(broker: Broker, tmp_path: Path) -> None:
    device = Device(broker.mqtt_port, "lamp-1", broker.device("lamp-1"))
    listening = device.listen()
    command_id = broker.create("lamp-1", "on")
    device.next(listening)
    device.say(executed(command_id))
    broker.reaches(command_id, "executed")
    for _ in range(2):
        done = broker.ordain("projections", "run", EXAMPLE, "--into", str(tmp_path / "own.db"), "--json")
        assert (done.returncode, done.stderr) == (0, "")
        [row] = json.loads(done.stdout)
        assert (row["device type"], row["commands"]) == ("generic", 1)
    table = broker.ordain("projections", "run", EXAMPLE)
    assert table.stdout.splitlines()[0].split() == ["device", "type", "commands", "p95", "ms"]


def test_an_invalid_projection_file_is_refused(broker: Broker, tmp_path: Path) -> None:
    (tmp_path / "none.py").write_text("TABLES = ''\n")
    refused(broker.ordain("projections", "run", str(tmp_path / "none.py")), 2, "none.py", "must define apply")
