"""The reference device and the keys of its broker's grants."""

from __future__ import annotations

from devices.agent import Agent, Call
from tests.system.support import Broker, running


def test_a_command_that_is_signed_with_a_new_key_is_executed(broker: Broker) -> None:
    token = broker.device("vault-1")

    def agent() -> Agent:
        url = f"mqtt://127.0.0.1:{broker.mqtt_port}"
        made = Agent("vault-1", token, url, jwks=f"{broker.url}/.well-known/jwks.json")

        @made.command("open")
        async def open_(call: Call) -> None:
            pass

        return made

    with running(agent):
        broker.reaches(broker.create("vault-1", "open"), "executed")
        assert broker.ordain("grants", "rotate").returncode == 0
        broker.reaches(broker.create("vault-1", "open"), "executed")
