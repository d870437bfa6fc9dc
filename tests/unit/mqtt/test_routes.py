"""Whose topics go to which connection, and who is away when it ends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from broker.mqtt.access import Peer
from broker.mqtt.packets import Filter
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
