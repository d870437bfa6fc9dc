"""Secrets must not be in log lines: searches a whole session's log for keys, tokens, passwords and grants."""

from __future__ import annotations

import json
import signal
from urllib.parse import urlsplit

import httpx2

from tests.conftest import Mosquitto
from tests.system.conftest import NewBroker
from tests.system.support import SECRET, WITHIN_SEC, Broker, Device, executed, made


def test_no_key_token_or_grant_of_a_session_is_in_a_log_line(broker: Broker) -> None:
    token = made(broker.ordain("devices", "add", "door-7", "--type", "generic"))
    door = Device(broker.mqtt_port, "door-7", token)
    command_id = broker.create("door-7", params={"code": "s3cret-parameter"})
    grant = json.loads(door.next())["grant"]
    Device(broker.mqtt_port, "door-7", "a-wrong-password").say("ok")
    door.say(executed(command_id), "not JSON " + token)
    headers = {"Authorization": "Bearer sk_live_a_wrong_but_long_key"}
    url = f"{broker.url}/v1/devices?key={broker.key}"
    httpx2.get(url, headers=headers, timeout=WITHIN_SEC, trust_env=False)
    broker.http("GET", f"/nowhere/{broker.key}")
    broker.reaches(command_id, "executed")
    assert broker.end(signal.SIGTERM) == 0

    said = broker.run.err.all() + broker.run.out.all()
    for secret in (broker.key, token, grant, "s3cret-parameter", "a-wrong-password", "sk_live_a_wrong"):
        assert secret not in said


def test_the_password_in_the_servers_url_is_in_no_log_line(
    mosquitto: Mosquitto, new_broker: NewBroker
) -> None:
    where = urlsplit(mosquitto.url).netloc
    broker = new_broker("--mqtt-url", f"mqtt://ordain:pass-of-ordain@{where}").start()
    broker.run.err.wait("mqtt.link_up")
    mosquitto.kill()
    broker.run.err.wait("mqtt.link_down")
    assert broker.end() == 0

    assert "pass-of-ordain" not in broker.run.err.all()


def test_the_search_for_secrets_finds_them() -> None:
    assert SECRET.search("key=sk_live_LRj2aXiGXEbwujZC3PrOzVkPcQlKeEhV8uE7V0No8zw")
    assert SECRET.search("grant=eyJhbGciOiJFZERTQSJ9.eyJpc3MiOiJvcmRhaW4ifQ.c2lnbmF0dXJl")
