"""Whose topics go to which connection, and who is away when it ends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from broker.mqtt.access import Peer
from broker.mqtt.packets import Filter, Reason
from broker.mqtt.routes import Routes


def test_with_its_gateway_each_device_is_away_also_one_whose_topics_nobody_heard() -> None:
    devices = {name: frozenset({f"iotee/dev/{name}/rls"}) for name in ("gw", "lock", "lamp")}
    peer = Peer("gw", frozenset().union(*devices.values()), devices=devices)
    connection: Any = SimpleNamespace(filters={}, routes={})
    routes = Routes()
    assert routes.grant(connection, peer, Filter("iotee/dev/lock/rls", 1), 100) == 1
    assert routes.renew(connection, peer, peer) == (["lock"], [])

    assert sorted(routes.drop(connection, peer)) == ["lamp", "lock"]
    assert "iotee/dev/lock/rls" not in routes


def test_a_gateway_reaches_hundreds_of_devices_with_one_filter_or_with_as_many_as_a_client_may_have() -> None:
    devices = {f"d{n}": frozenset({f"zigbee2mqtt/d{n}/set"}) for n in range(500)}
    peer = Peer("gw", frozenset().union(*devices.values()), devices={"gw": frozenset(), **devices})
    wide, exact = Routes(), Routes()
    bridge: Any = SimpleNamespace(filters={}, routes={})
    single: Any = SimpleNamespace(filters={}, routes={})

    assert wide.grant(bridge, peer, Filter("zigbee2mqtt/#", 1), 100) == 1
    codes = [exact.grant(single, peer, Filter(f"zigbee2mqtt/d{n}/set", 1), 100) for n in range(500)]

    assert wide.renew(bridge, peer, peer) == (list(devices), [])
    assert wide.get("zigbee2mqtt/d499/set") is bridge
    assert codes == [1] * 100 + [Reason.QUOTA] * 400
    assert len(exact.renew(single, peer, peer)[0]) == 100
