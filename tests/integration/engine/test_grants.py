"""Grants as the broker mints them and a device checks them: key rotation, and shared secrets of small
devices."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import httpx2
import jwt
import msgspec
import pytest

from broker.control import services
from broker.core import Core
from broker.domain.errors import Refusal
from broker.domain.events import Changed
from broker.engine.commands import Caller, Order
from broker.engine.registry import Issued, NewDevice
from broker.http.app import create_app
from broker.settings import Settings
from broker.type_files import load_types
from broker.world import SqliteStorage, SystemClock, SystemEntropy, open_for_reading
from devices.grant import GrantRefused, GrantVerifier, keys_from_jwks, secret_key
from devices.wire import Unsendable

ME = Caller(actor="operator", project=None, scopes=frozenset(["admin"]))
SMALL = 'name = "small"\ngrants = "HS256"\npayload = "msgpack"\n[commands.open]\n'


@asynccontextmanager
async def running(home: Path) -> AsyncIterator[Core]:
    """A broker that also knows the type `small`, without an MQTT server."""
    types = home / "types"
    types.mkdir(exist_ok=True)
    (types / "small.toml").write_text(SMALL)
    settings = Settings(data=str(home / "data"), types=str(types))
    storage = await SqliteStorage.open(Path(settings.data))
    try:
        core = Core(storage, SystemClock(), SystemEntropy(), load_types(settings.types), settings)
        await core.open(embedded=True)
        async with core.running("embedded"):
            yield core
    finally:
        await storage.close()


def operator(core: Core) -> httpx2.AsyncClient:
    app: Any = create_app(services(core), local=True)
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://ordain")


async def device(core: Core, type: str = "small", hardware_id: str = "lock-1") -> Issued:
    return await core.registry.register(ME, NewDevice(hardware_id=hardware_id, type=type, project="acme"))


async def minted(core: Core, hardware_id: str = "lock-1", command: str = "open") -> tuple[str, str]:
    """The id of a new command and a grant for it."""
    state = (await core.commands.create(ME, Order(device=hardware_id, type=command))).state
    return state.id, core.grants.mint(state, core.writer.now())


def verifier(core: Core, keys: dict[str, Any], hardware_id: str = "lock-1") -> GrantVerifier:
    return GrantVerifier(keys, "ordain", hardware_id, lambda: core.writer.now() / 1_000)


def jwks(core: Core) -> dict[str, Any]:
    return dict(keys_from_jwks(core.grants.jwks()))


def verdict(by: GrantVerifier, grant: tuple[str, str], command: str = "open", params: Any = None) -> str:
    command_id, token = grant
    try:
        by.verify(token, command_id=command_id, command=command, params={} if params is None else params)
    except GrantRefused as refused:
        return refused.code
    return "good"


async def test_after_a_rotation_both_keys_are_valid_until_the_old_one_is_retired(tmp_path: Path) -> None:
    async with running(tmp_path) as core:
        await device(core, "generic")
        reads_once, refreshes = verifier(core, jwks(core)), verifier(core, jwks(core))
        by_old = await minted(core)

        old = core.grants.signing
        new = await core.grants.rotate()
        by_new = await minted(core)

        assert (core.grants.signing.kid, old.kid != new.kid) == (new.kid, True)
        assert [verdict(reads_once, grant) for grant in (by_old, by_new)] == ["good", "unknown_key"]
        refreshes.use(jwks(core))
        assert [verdict(refreshes, grant) for grant in (by_old, by_new)] == ["good", "good"]

        await core.grants.retire(old.kid)
        refreshes.use(jwks(core))
        assert [verdict(refreshes, grant) for grant in (by_old, by_new)] == ["unknown_key", "good"]

    async with running(tmp_path) as core:
        assert [(key.kid, key.retired_at is None) for key in core.grants.all()] == [
            (old.kid, False),
            (new.kid, True),
        ]
        assert verdict(verifier(core, jwks(core)), await minted(core)) == "good"


async def test_the_signing_key_cannot_be_retired_and_an_unknown_key_is_not_found(tmp_path: Path) -> None:
    async with running(tmp_path) as core:
        for kid, kind in ((core.grants.signing.kid, "conflict"), ("key_none", "not_found")):
            with pytest.raises(Refusal) as refused:
                await core.grants.retire(kid)
            assert refused.value.kind == kind


async def test_a_small_device_checks_grants_with_its_own_secret(tmp_path: Path) -> None:
    async with running(tmp_path) as core:
        issued, other = await device(core), await device(core, hardware_id="lock-2")
        assert issued.secret is not None
        assert other.secret is not None
        small = verifier(core, {issued.device.id: secret_key(issued.secret)})
        grant = await minted(core)

        assert verdict(small, grant) == "good"
        assert verdict(small, grant, "shut") == "wrong_command"
        assert verdict(small, grant, params={"a": 1}) == "changed_parameters"
        assert verdict(small, await minted(core, "lock-2")) == "unknown_key"
        assert verdict(verifier(core, {issued.device.id: secret_key(other.secret)}), grant) == "bad_signature"
        assert verdict(verifier(core, jwks(core)), grant) == "unknown_key"
        assert len(core.grants.jwks()["keys"]) == 1


async def test_a_public_key_used_as_a_secret_signs_no_grant(tmp_path: Path) -> None:
    async with running(tmp_path) as core:
        await device(core, "generic")
        key = core.grants.signing
        confused = verifier(core, {key.kid: key.private.public_key().public_bytes_raw()})

        assert verdict(confused, await minted(core)) == "wrong_algorithm"


async def test_a_shown_grant_is_signed_once_and_again_at_half_its_life(tmp_path: Path) -> None:
    async with running(tmp_path) as core:
        await device(core, "generic")
        state = (await core.commands.create(ME, Order(device="lock-1", type="open", ttl_sec=600))).state
        now = core.writer.now()
        first = core.grants.shown(state, now)
        assert first is not None

        assert core.grants.shown(state, now + 299_000) == first
        later = core.grants.shown(state, now + 301_000)
        assert later not in (None, first)
        assert core.grants.mint(state, now + 302_000) not in (first, later)  # each hand-over has its own


async def test_the_grant_of_a_closed_command_ends_with_it_and_is_signed_once(tmp_path: Path) -> None:
    async with running(tmp_path) as core:
        await device(core, "generic")
        created = (await core.commands.create(ME, Order(device="lock-1", type="open"))).state
        open_for_a_day = core.grants.shown(created, core.writer.now())
        closed = await core.commands.cancel(ME, created.id)
        assert closed.closed_at is not None

        shown = core.grants.shown(closed, closed.closed_at + 60_000)
        assert shown not in (None, open_for_a_day)
        claims = jwt.decode(shown or "", options={"verify_signature": False})
        assert claims["exp"] == closed.closed_at // 1_000
        assert core.grants.shown(closed, closed.closed_at + 86_400_000) == shown


async def test_after_a_rotation_no_old_grant_is_shown(tmp_path: Path) -> None:
    async with running(tmp_path) as core:
        await device(core, "generic")
        state = (await core.commands.create(ME, Order(device="lock-1", type="open"))).state
        old = core.grants.shown(state, core.writer.now())
        new = await core.grants.rotate()
        shown = core.grants.shown(state, core.writer.now())
        assert shown not in (None, old)
        assert jwt.get_unverified_header(shown or "")["kid"] == new.kid


async def test_a_new_token_brings_a_new_secret_that_survives_a_restart(tmp_path: Path) -> None:
    async with running(tmp_path) as core:
        first = await device(core)
        second = await core.registry.rotate_token(ME, "lock-1")
    assert first.secret is not None
    assert second.secret is not None

    async with running(tmp_path) as core:
        grant = await minted(core)
        verdicts = [
            verdict(verifier(core, {first.device.id: secret_key(secret)}), grant)
            for secret in (first.secret, second.secret)
        ]

    assert verdicts == ["bad_signature", "good"]


async def test_a_secret_is_never_in_the_log(tmp_path: Path) -> None:
    async with running(tmp_path) as core:
        issued = await device(core)
    assert issued.secret is not None

    with closing(open_for_reading(tmp_path / "data")) as sql:
        rows = [row[0] for row in sql.execute("SELECT data FROM events").fetchall()]
        kept = sql.execute("SELECT device_id, secret FROM device_secrets").fetchall()

    assert kept == [(issued.device.id, secret_key(issued.secret))]
    forms = (issued.secret.encode(), secret_key(issued.secret).hex().encode())
    assert [row for row in rows if any(form in row for form in forms)] == []


async def test_a_device_without_a_secret_gets_no_grants_of_its_new_type(tmp_path: Path) -> None:
    async with running(tmp_path) as core:
        issued = await device(core, "generic")
        before = await minted(core)
        await core.registry.change(ME, "lock-1", Changed(device_type="small"))
        after = (await core.commands.create(ME, Order(device="lock-1", type="open"))).state

        assert issued.secret is None
        assert verdict(verifier(core, jwks(core)), before) == "good"
        with pytest.raises(Unsendable, match="lock-1 has no device secret"):
            core.grants.mint(after, core.writer.now())
        assert core.grants.shown(after, core.writer.now()) is None

        renewed = await core.registry.rotate_token(ME, "lock-1")
        assert renewed.secret is not None
        small = verifier(core, {issued.device.id: secret_key(renewed.secret)})
        assert verdict(small, (after.id, core.grants.mint(after, core.writer.now()))) == "good"


async def test_a_deleted_device_leaves_no_secret(tmp_path: Path) -> None:
    async with running(tmp_path) as core:
        issued = await device(core)
        await core.registry.delete(ME, "lock-1", force=False)

        assert core.registry.secrets.get(issued.device.id) is None
    with closing(open_for_reading(tmp_path / "data")) as sql:
        assert sql.execute("SELECT * FROM device_secrets").fetchall() == []


async def test_over_http_a_secret_is_shown_once_and_only_for_types_that_have_one(tmp_path: Path) -> None:
    async with running(tmp_path) as core, operator(core) as client:
        made = (await client.post("/v1/devices", json={"hardware_id": "lock-1", "type": "small"})).json()
        plain = (await client.post("/v1/devices", json={"hardware_id": "lamp-1", "type": "generic"})).json()
        seen = (await client.get("/v1/devices/lock-1")).json()
        again = (await client.post("/v1/devices/lock-1/token")).json()

    assert len(secret_key(made["device_secret"])) == 32
    assert again["device_secret"] != made["device_secret"]
    assert "device_secret" not in seen
    assert "device_secret" not in plain


async def test_the_operator_lists_rotates_and_retires_keys(tmp_path: Path) -> None:
    async with running(tmp_path) as core, operator(core) as client:
        first = (await client.get("/local/grants")).json()["data"][0]
        made = await client.post("/local/grants/rotate")
        refused = await client.post(f"/local/grants/{made.json()['kid']}/retire")
        retired = await client.post(f"/local/grants/{first['kid']}/retire")
        repeated = await client.post(f"/local/grants/{first['kid']}/retire")
        listed = (await client.get("/local/grants")).json()["data"]
        shown = (await client.get("/.well-known/jwks.json")).json()["keys"]

    assert (made.status_code, refused.status_code, retired.status_code) == (201, 409, 200)
    assert repeated.json() == retired.json()
    assert [key["signing"] for key in listed] == [False, True]
    assert listed[0]["retired_at"] is not None
    assert [key["kid"] for key in shown] == [made.json()["kid"]]
    assert "private" not in json.dumps(listed)


async def test_an_accepted_command_keeps_its_grant_algorithm(tmp_path: Path) -> None:
    async with running(tmp_path) as core:
        issued = await device(core)
        assert issued.secret is not None
        state = (await core.commands.create(ME, Order(device="lock-1", type="open"))).state
        await core.registry.change(ME, "lock-1", Changed(device_type="generic"))
        small = verifier(core, {issued.device.id: secret_key(issued.secret)})

        assert verdict(small, (state.id, core.grants.mint(state, core.writer.now()))) == "good"
        definition = core.live.definitions[state.definition]
        assert msgspec.to_builtins(definition)["grant_algorithm"] == "HS256"
