"""The client `mqtt` of npm, which browsers and Node use: TCP, TLS and WebSocket, both versions of MQTT."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import uvloop

from broker.mqtt.tls import Certificates
from devices.mqtt_url import Endpoint
from tests.integration.mqtt.listener_support import ACK, RLS, TOKENS, Owner, listening
from tests.integration.mqtt.test_sockets import Authority, over_http
from tests.packages import EXAMPLES, node_modules

# Each turn: connect, subscribe, answer one command, say goodbye.
SCRIPT = """
import { readFileSync } from "node:fs";
import mqtt from "mqtt";
const { turns, ca, token, rls, ack } = JSON.parse(process.argv[2]);
for (const [url, protocolVersion] of turns) {
  const login = { clientId: "door", username: "door", password: token };
  const client = await mqtt.connectAsync(url, { ...login, protocolVersion, ca: readFileSync(ca) });
  const commanded = new Promise((done) => client.once("message", (_, payload) => done(payload)));
  await client.subscribeAsync(rls, { qos: 1 });
  await client.publishAsync(ack, `done ${await commanded}`, { qos: 1 });
  await client.endAsync();
}
"""


def test_the_client_of_npm_makes_the_round_trip_on_every_transport(tmp_path: Path) -> None:
    (tmp_path / "node_modules").symlink_to(node_modules(EXAMPLES / "device-node"))
    (tmp_path / "device.mjs").write_text(SCRIPT)
    authority = Authority(tmp_path)
    certificates = Certificates(*authority.issue("server"))
    endpoints = (Endpoint("127.0.0.1", 0), Endpoint("127.0.0.1", 0, tls=True))

    async def main() -> None:
        owner = Owner()
        async with (
            listening(owner, endpoints=endpoints, certificates=certificates) as server,
            over_http(server.listener) as port,
        ):
            urls = [*map(str, server.sockets.endpoints), f"ws://127.0.0.1:{port}/mqtt"]
            turns = [(url, version) for url in urls for version in (4, 5)]
            given = {"turns": turns, "ca": authority.file, "token": TOKENS["door"], "rls": RLS, "ack": ACK}
            node = await asyncio.create_subprocess_exec(
                "node", "device.mjs", json.dumps(given), cwd=tmp_path, stderr=asyncio.subprocess.PIPE
            )
            for number in range(len(turns)):
                await owner.until(lambda: owner.presence.count("door online") > number)  # noqa: B023
                owner.send(b"%d" % number)
                await owner.until(lambda: len(owner.payloads) > number)  # noqa: B023
            _, complaints = await node.communicate()
            assert (node.returncode, complaints) == (0, b"")
            assert owner.payloads == [b"done %d" % number for number in range(len(turns))]

    uvloop.run(main())
