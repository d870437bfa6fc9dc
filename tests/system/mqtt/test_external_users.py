"""A Mosquitto of one's own that is kept in step with the devices while it runs, and whose rules are tried."""

from __future__ import annotations

import glob
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from devices.agent import Agent, Call
from tests.conftest import program, unused_port
from tests.system.conftest import NewBroker
from tests.system.mqtt.test_bought_devices import Connected
from tests.system.mqtt.test_gateways import presence
from tests.system.support import WITHIN_SEC, Broker, Device, running, until

PLUGIN = next(iter(glob.glob("/usr/lib/*/mosquitto_dynamic_security.so")), None)


@contextmanager
def mosquitto(home: Path, port: int, *lines: str) -> Iterator[Path]:
    conf = home / "mosquitto.conf"
    every = (
        "user root",
        f"listener {port} 127.0.0.1",
        "allow_anonymous false",
        f"pid_file {home}/pid",
        *lines,
    )
    conf.write_text("\n".join(every) + "\n")
    with open(home / "mosquitto.log", "wb") as said:
        server = subprocess.Popen([program("mosquitto"), "-c", str(conf)], stdout=said, stderr=said)
    try:
        until(lambda: listens(port), (home / "mosquitto.log").read_text)
        yield home / "mosquitto.log"
    finally:
        server.kill()
        server.wait()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def silent(topic: str, payload: bytes) -> list[tuple[str, str]]:
    return []


def mqtt(broker: Broker) -> dict[str, Any]:
    found: dict[str, Any] = broker.operator("GET", "/v1/system").json()["mqtt"]
    return found


def lives(broker: Broker, port: int, name: str, token: str) -> None:
    """One whole life of a command, as a device with this token."""

    def agent() -> Agent:
        made = Agent(name, token, f"mqtt://127.0.0.1:{port}", jwks=f"{broker.url}/.well-known/jwks.json")

        @made.command("on")
        async def on(_: Call) -> None:
            return None

        return made

    with running(agent):
        broker.reaches(broker.create(name, "on"), "executed")


def enters(port: int, name: str, token: str) -> bool:
    """Whether the server accepts this client. MQTT 3.1.1, section 3.1: user, password and a clean session."""
    body = b"\x00\x04MQTT\x04\xc2\x00\x0a"
    for text in (name, name, token):
        body += len(text).to_bytes(2, "big") + text.encode()
    with socket.create_connection(("127.0.0.1", port), timeout=WITHIN_SEC) as client:
        client.sendall(b"\x10" + bytes([len(body)]) + body)
        return client.recv(4) == b"\x20\x02\x00\x00"


def with_dynsec(new_broker: NewBroker, tmp_path: Path) -> tuple[Broker, int, tuple[str, ...]]:
    """A broker that keeps a Mosquitto's dynamic-security plugin in step, not started; the port of that
    Mosquitto, and the lines of its configuration."""
    users, port = tmp_path / "dynsec.json", unused_port()
    subprocess.run([program("mosquitto_ctrl"), "dynsec", "init", str(users), "ordain", "secret"], check=True)
    config = tmp_path / "config.toml"
    config.write_text('mqtt_users = "dynsec"\n')
    broker = new_broker("--config", str(config), "--mqtt-url", f"mqtt://ordain:secret@127.0.0.1:{port}")
    return broker, port, ("allow_anonymous false", f"plugin {PLUGIN}", f"plugin_opt_config_file {users}")


def in_step(broker: Broker) -> None:
    until(lambda: mqtt(broker)["rules"]["in_step"] or None, lambda: mqtt(broker))


@pytest.mark.skipif(PLUGIN is None, reason="Mosquitto's dynamic-security plugin is not installed")
def test_the_dynamic_security_plugin_learns_of_devices_tokens_and_deletions(
    new_broker: NewBroker, tmp_path: Path
) -> None:
    broker, port, plugin = with_dynsec(new_broker, tmp_path)
    broker.start()
    early = broker.device("early")  # before the server is there
    with mosquitto(tmp_path, port, *plugin):
        in_step(broker)
        lives(broker, port, "early", early)
        token = broker.device("lamp")
        lives(broker, port, "lamp", token)
        listening = Device(port, "lamp", token).listen()
        renewed = broker.http("POST", "/v1/devices/lamp/token").json()["device_token"]
        listening.wait()  # its connection ended
        until(lambda: enters(port, "lamp", renewed) or None)
        assert not enters(port, "lamp", token)
        assert "no device can use another's topics" in broker.canary()
        assert broker.http("DELETE", "/v1/devices/lamp?force=true").status_code == 200
        until(lambda: not enters(port, "lamp", renewed) or None)
        assert mqtt(broker)["users"] == "dynsec"


@pytest.mark.skipif(PLUGIN is None, reason="Mosquitto's dynamic-security plugin is not installed")
def test_the_dynamic_security_plugin_gives_a_gateway_the_topics_of_its_devices(
    new_broker: NewBroker, tmp_path: Path
) -> None:
    broker, port, plugin = with_dynsec(new_broker, tmp_path)
    with mosquitto(tmp_path, port, *plugin):
        broker.start()
        in_step(broker)
        tokens = {
            name: broker.device(name, kind) for name, kind in (("gw", "gateway"), ("stranger", "generic"))
        }
        until(lambda: all(enters(port, *each) for each in tokens.items()) or None)
        stranger = Connected(
            port, "stranger", tokens["stranger"], ["iotee/dev/stranger/rls"], silent, ("", "")
        )
        assert stranger.ready.wait(WITHIN_SEC)
        stranger.say("iotee/dev/stranger/status", "online", retain=True)
        filters = ["iotee/dev/+/rls", "#", "$SYS/#", "$CONTROL/#"]
        gateway = Connected(port, "gw", tokens["gw"], filters, silent, ("", ""))
        assert gateway.ready.wait(WITHIN_SEC)
        gateway.say("iotee/dev/gw/status", "online")
        body = {"hardware_id": "lamp", "type": "generic", "gateway": "gw"}
        own = broker.http("POST", "/v1/devices", body).json()["device_token"]

        def speaks_for_lamp() -> bool:
            with suppress(RuntimeError):  # the plugin ends the connection of a client that gets new topics
                gateway.say("iotee/dev/lamp/status", "online")
            return presence(broker, "lamp") == "online"

        until(lambda: speaks_for_lamp() or None)

        broker.create("stranger", "open")
        broker.create("lamp", "open")
        until(lambda: (stranger.heard and gateway.heard) or None)
        assert {each.topic for each in gateway.heard} == {"iotee/dev/lamp/rls"}
        assert not enters(port, "lamp", own)
        gateway.heard.clear()
        broker.http("PATCH", "/v1/devices/lamp", {"gateway": None})
        renewed = broker.http("POST", "/v1/devices/lamp/token").json()["device_token"]
        lives(broker, port, "lamp", renewed)
        assert gateway.heard == []
        stranger.end()
        gateway.end()


@pytest.mark.skipif(PLUGIN is None, reason="Mosquitto's dynamic-security plugin is not installed")
def test_a_gateway_that_was_subscribed_hears_nothing_of_a_device_that_moved_to_another(
    new_broker: NewBroker, tmp_path: Path
) -> None:
    broker, port, plugin = with_dynsec(new_broker, tmp_path)
    topic = "iotee/dev/lamp/rls"
    with mosquitto(tmp_path, port, *plugin):
        broker.start()
        in_step(broker)
        tokens = {name: broker.device(name, "gateway") for name in ("gw-1", "gw-2")}

        def speaks(name: str) -> Connected | None:
            device = Connected(port, name, tokens[name], [topic], lambda *said: [], ("", ""))
            if device.ready.wait(WITHIN_SEC) and device.codes == [0]:
                return device
            device.end()
            return None

        until(lambda: all(enters(port, *each) for each in tokens.items()) or None)
        broker.http("POST", "/v1/devices", {"hardware_id": "lamp", "type": "generic", "gateway": "gw-1"})
        first = until(lambda: speaks("gw-1"))
        broker.http("PATCH", "/v1/devices/lamp", {"gateway": "gw-2"})
        second = until(lambda: speaks("gw-2"))

        def speaks_for_lamp() -> bool:
            with suppress(RuntimeError):  # the plugin ends the connection of a client that gets new topics
                second.say("iotee/dev/lamp/status", "online")
            return presence(broker, "lamp") == "online"

        until(lambda: speaks_for_lamp() or None)
        broker.create("lamp", "open")

        until(lambda: second.heard or None)
        assert first.heard == []
        first.end()
        second.end()


@pytest.mark.skipif(PLUGIN is None, reason="Mosquitto's dynamic-security plugin is not installed")
def test_what_a_killed_broker_had_not_told_the_plugin_is_told_after_its_start(
    new_broker: NewBroker, tmp_path: Path
) -> None:
    broker, port, plugin = with_dynsec(new_broker, tmp_path)

    def control(*words: str) -> None:
        way = ("-h", "127.0.0.1", "-p", str(port), "-u", "ordain", "-P", "secret")
        subprocess.run([program("mosquitto_ctrl"), *way, "dynsec", *words], check=True)

    def speaks_for_moved() -> bool:
        return b"dev/moved/rls" in (tmp_path / "dynsec.json").read_bytes()

    with mosquitto(tmp_path, port, *plugin):
        broker.start()
        in_step(broker)
        tokens = {name: broker.device(name) for name in ("deleted", "moved", "rotated", "same")}
        tokens["gw"] = broker.device("gw", "gateway")
        until(lambda: all(enters(port, *client) for client in tokens.items()) or None)
        for stranger in ("guest", "visitor"):  # none of them is in the log; one has a role like ours
            control("createClient", stranger, "-p", stranger)
        control("createRole", "ordain-device-visitor")
        control("addClientRole", "visitor", "ordain-device-visitor", "0")
    assert broker.http("DELETE", "/v1/devices/deleted").status_code == 200
    assert broker.http("PATCH", "/v1/devices/moved", {"gateway": "gw"}).status_code == 200
    renewed = broker.http("POST", "/v1/devices/rotated/token").json()["device_token"]
    broker.kill()
    with mosquitto(tmp_path, port, *plugin):
        broker.start()

        gone = ("deleted", "moved", "rotated")
        until(lambda: not any(enters(port, name, tokens[name]) for name in gone) or None)
        until(lambda: speaks_for_moved() or None)  # its gateway does
        assert mqtt(broker)["rules"]["missing"] == 1
        assert not enters(port, "rotated", renewed)  # the broker that knew it has ended
        broker.run.err.wait("event=dynsec.not_in_the_log devices=visitor")
        for name in ("guest", "visitor"):
            assert enters(port, name, name)
        assert enters(port, "same", tokens["same"])
        again = broker.http("POST", "/v1/devices/rotated/token").json()["device_token"]
        until(lambda: enters(port, "rotated", again) or None)
        in_step(broker)


def test_a_password_file_is_written_and_read_again_after_each_change(
    new_broker: NewBroker, tmp_path: Path
) -> None:
    passwords, port = tmp_path / "passwd", unused_port()
    subprocess.run([program("mosquitto_passwd"), "-b", "-c", str(passwords), "ordain", "secret"], check=True)
    config = tmp_path / "config.toml"
    config.write_text(
        f'mqtt_users = "password_file"\nmqtt_password_file = "{passwords}"\n'
        f'mqtt_pid_file = "{tmp_path}/pid"\n'
    )
    url = f"mqtt://ordain:secret@127.0.0.1:{port}"
    with mosquitto(tmp_path, port, "allow_anonymous false", f"password_file {passwords}"):
        broker = new_broker("--config", str(config), "--mqtt-url", url).start()
        broker.run.err.wait("event=mqtt.link_up")
        token = broker.device("lamp")
        until(lambda: enters(port, "lamp", token) or None)
        in_step(broker)
        lives(broker, port, "lamp", token)
        assert broker.http("DELETE", "/v1/devices/lamp").status_code == 200
        until(lambda: not enters(port, "lamp", token) or None)
        assert mqtt(broker)["users"] == "password_file"
        left = broker.device("left")
        until(lambda: enters(port, "left", left) or None)
        as_it_was = passwords.read_text()
        assert broker.http("DELETE", "/v1/devices/left").status_code == 200
        until(lambda: not enters(port, "left", left) or None)
        broker.kill()
        passwords.write_text(as_it_was)  # as if the broker had ended before it wrote the file
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGHUP)
        until(lambda: enters(port, "left", left) or None)
        broker.start()
        until(lambda: not enters(port, "left", left) or None)


def test_what_a_server_without_rules_allows_is_told_everywhere(new_broker: NewBroker, tmp_path: Path) -> None:
    port = unused_port()
    config = tmp_path / "config.toml"
    config.write_text("require_mqtt_acl = true\n")
    with mosquitto(tmp_path, port, "allow_anonymous true"):
        broker = new_broker("--config", str(config), "--mqtt-url", f"mqtt://127.0.0.1:{port}").start()
        broker.run.err.wait("event=mqtt.rule_broken")
        breach = "it accepts clients without user name and password"
        assert breach in broker.said()
        assert mqtt(broker)["rules"]["breaches"] == [breach]
        assert broker.not_ready() == [f"mqtt: {breach}"]
        assert "ordain_mqtt_rule_breaches 1.0" in broker.http("GET", "/metrics").text
        assert breach in broker.ordain("doctor").stdout
