"""A door in Python with the reference agent: it unlocks, and refuses commands without a valid grant.

The agent subscribes before it says `online`, repeats its answer to an id that it has seen, and publishes an
answer again after a reconnect until the MQTT server has acknowledged it.
"""

import asyncio
import os
from pathlib import Path

from devices.agent import Agent, Call
from devices.memory import SqliteMemory

DEVICE = os.environ.get("DEVICE", "door-7")
MQTT_URL = os.environ.get("MQTT_URL", "mqtt://127.0.0.1:1883")
ORDAIN_URL = os.environ.get("ORDAIN_URL", "http://127.0.0.1:8080")

agent = Agent(
    DEVICE,
    os.environ["TOKEN"],
    MQTT_URL,
    memory=SqliteMemory(Path(f"{DEVICE}.db")),
    jwks=f"{ORDAIN_URL}/.well-known/jwks.json",  # the keys that sign grants
)


@agent.command("unlock")
async def unlock(call: Call) -> dict[str, bool]:
    print("unlock", call.id, flush=True)
    await call.progress(50, "turning")
    return {"locked": False}


asyncio.run(agent.run())
