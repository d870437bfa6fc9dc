"""One certificate for HTTP and MQTT of a running broker, read again on SIGHUP."""

from __future__ import annotations

import json
import signal
import ssl
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from tests.conftest import unused_port
from tests.integration.mqtt.test_sockets import Authority
from tests.sdk_driver import MODULE, WITHIN_SEC
from tests.system.conftest import NewBroker
from tests.system.support import environment, until


def test_https_is_served_with_the_same_certificate_and_read_again_on_sighup(
    new_broker: NewBroker, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    certificate, key = authority.issue("server")
    port = unused_port()
    config = tmp_path / "config.toml"
    config.write_text(f'https = "127.0.0.1:{port}"\ntls_certificate = "{certificate}"\ntls_key = "{key}"\n')
    broker = new_broker("--config", str(config), "--mqtt-listen", "mqtts://127.0.0.1:0,127.0.0.1:0").start()
    listening = [line for line in broker.said().splitlines() if "event=mqtt.listening" in line]
    assert ["mqtts://" in line for line in listening] == [True, False]
    trusting = ssl.create_default_context(cafile=authority.file)
    with httpx2.Client(verify=trusting, timeout=WITHIN_SEC, trust_env=False) as client:
        assert client.get(f"https://127.0.0.1:{port}/healthz").status_code == 200
    authority.issue("server")
    broker.run.signal(signal.SIGHUP)
    broker.run.err.wait("event=tls.reloaded")
    Path(certificate).write_text("nonsense")
    broker.run.signal(signal.SIGHUP)
    broker.run.err.wait("event=tls.not_reloaded")
    trusting = ssl.create_default_context(cafile=authority.file)
    with httpx2.Client(verify=trusting, timeout=WITHIN_SEC, trust_env=False) as client:
        until(lambda: client.get(f"https://127.0.0.1:{port}/healthz").status_code == 200)


PYTHON = """
import asyncio, json, sys
from broker.client import App

async def main() -> None:
    async with App(*sys.argv[1:]) as app:
        print(json.dumps(await app.command.send({"name": "on", "device_ident": ["nobody"], "data": {}})))

asyncio.run(main())
"""
JAVASCRIPT = """
const [module, url, key] = process.argv.slice(1);
const { App } = await import(module);
const app = new App(url, key);
console.log(JSON.stringify(await app.command.send({ name: "on", device_ident: ["nobody"], data: {} })));
process.exit(0);
"""


@pytest.mark.parametrize(
    ("variable", "program"),
    [
        ("SSL_CERT_FILE", [sys.executable, "-c", PYTHON]),
        ("NODE_EXTRA_CA_CERTS", ["node", "--input-type=module", "--eval", JAVASCRIPT, MODULE.as_uri()]),
    ],
)
def test_an_sdk_trusts_the_private_authority_that_its_environment_names(
    new_broker: NewBroker, tmp_path: Path, variable: str, program: list[str]
) -> None:
    authority = Authority(tmp_path)
    certificate, key = authority.issue("server")
    port = unused_port()
    config = tmp_path / "config.toml"
    config.write_text(f'https = "127.0.0.1:{port}"\ntls_certificate = "{certificate}"\ntls_key = "{key}"\n')
    broker = new_broker("--config", str(config)).start()
    assert broker.http("GET", "/v1/types").status_code == 200  # and makes the key
    ask = [*program, f"https://127.0.0.1:{port}", broker.key]
    strange = subprocess.run(ask, env=environment(), capture_output=True, text=True, timeout=WITHIN_SEC)
    assert strange.returncode != 0
    assert "certificate" in strange.stderr
    known = environment(**{variable: str(authority.file)})
    done = subprocess.run(ask, env=known, capture_output=True, text=True, timeout=WITHIN_SEC)
    assert json.loads(done.stdout) == {"nobody": {"sent": False, "error": "Device not found"}}, done.stderr
