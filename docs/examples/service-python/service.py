"""A service in Python: it unlocks a door, waits for the end, and prints the outcome.

The time to live matters: without it, a door that was away for an hour would unlock when it comes back.
"""

import asyncio
import os

from broker.client import App, Timeout

URL = os.environ.get("ORDAIN_URL", "http://127.0.0.1:8080")
DEVICE = os.environ.get("DEVICE", "demo_lock")


async def main() -> None:
    async with App(URL, os.environ["KEY"]) as app:
        sent = await app.command.send({"name": "unlock", "device_ident": [DEVICE], "data": {"for_sec": 5}})
        answer = sent[DEVICE]
        if not answer["sent"]:
            print(f"{DEVICE}: {answer['error']}")
            return
        try:
            command = await app.command.wait(answer["command_id"], timeout=30)
        except Timeout:
            print(f"{DEVICE}: no end after 30 s; the command goes on")
            return
        print(f"{DEVICE}: {command['state']} {command['result'] or command['error']}")


asyncio.run(main())
