"""One certificate for HTTP and MQTT of a running broker, read again on SIGHUP."""

from __future__ import annotations

import signal
import ssl
from pathlib import Path

import httpx2

from tests.conftest import unused_port
from tests.integration.mqtt.test_sockets import Authority
from tests.system.conftest import NewBroker
from tests.system.support import until


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
    with httpx2.Client(verify=ssl.create_default_context(cafile=authority.file), trust_env=False) as client:
        assert client.get(f"https://127.0.0.1:{port}/healthz").status_code == 200
    authority.issue("server")
    broker.run.signal(signal.SIGHUP)
    broker.run.err.wait("event=tls.reloaded")
    Path(certificate).write_text("nonsense")
    broker.run.signal(signal.SIGHUP)
    broker.run.err.wait("event=tls.not_reloaded")
    with httpx2.Client(verify=ssl.create_default_context(cafile=authority.file), trust_env=False) as client:
        until(lambda: client.get(f"https://127.0.0.1:{port}/healthz").status_code == 200)
