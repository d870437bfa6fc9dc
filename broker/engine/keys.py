"""API keys, their scopes and what limits them. Only digests are stored; the secret is shown once, when the
key is made.

Keys are stored beside the log, not in it. All keys are in memory, so that a revoked key stops working
at once.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from typing import Literal

import msgspec
import structlog

from broker.domain.errors import invalid, not_found
from broker.domain.fleet import DeviceSet
from broker.engine.commands import Caller
from broker.engine.ids import check_name, new_id, new_secret, peppered_digest, secret_digest
from broker.engine.writer import Writer
from broker.seams import Change, New, Put, Sql
from devices.names import is_name

logger = structlog.get_logger()

OF_KEY = "sk_live_"
SCOPES = ("devices:read", "devices:write", "events:read", "admin")
LOCAL = "operator:local"
State = Literal["active", "revoked", "expired", "unusable"]
MOST_NAMES, MOST_PREFIXES = 1_000, 100  # of one device set


class Terms(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """The limits of a key. `expires_at` in ms. `devices` None: all devices of its project. A rate of 0: no
    limit; None: the limit in the settings."""

    expires_at: int | None = None
    devices: DeviceSet | None = None
    commands_per_minute: int | None = None
    requests_per_minute: int | None = None


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """An API key without its secret. Times in ms.

    `pepper` names the pepper that its digest was made with; None: without one. `digest` is hex.
    """

    id: str
    project: str
    scopes: tuple[str, ...]
    name: str | None
    created_at: int
    revoked_at: int | None
    digest: str
    terms: Terms = Terms()
    pepper: str | None = None

    @property
    def actor(self) -> str:
        return f"key:{self.id}"

    def works(self, now: int) -> bool:
        ends = (self.revoked_at, self.terms.expires_at)
        return all(end is None or now < end for end in ends)


class Keys:
    """`ended(actor)` is called when a key is revoked or expires; the actor is `key:<id>`.

    `pepper`: a secret that is not in the log's file and goes into the digests of new keys; None: no pepper.
    """

    def __init__(self, writer: Writer, pepper: bytes | None = None) -> None:
        self.writer = writer
        self.ended: Callable[[str], None] = lambda actor: None
        self._pepper = pepper
        self._pepper_name = None if pepper is None else hashlib.sha256(b"ordain " + pepper).hexdigest()[:16]
        self._by_digest: dict[str, tuple[Key, Caller]] = {}
        self._by_id: dict[str, Key] = {}
        self._used: dict[str, int] = {}  # by id, ms
        self._unsaved: dict[str, None] = {}
        self._unrecorded: set[str] = set()  # keys whose revocation may not be in the log
        self._ticked = 0

    async def load(self) -> None:
        async def work(sql: Sql) -> list[tuple[Key, int | None]]:
            rows = await sql.all(
                "SELECT digest, k.id, project, scopes, name, created_at, revoked_at, terms, pepper, "
                "last_used_at FROM api_keys k LEFT JOIN key_terms t ON t.id = k.id ORDER BY k.id"
            )
            return [
                (
                    Key(
                        digest=bytes(row[0]).hex(),
                        id=row[1],
                        project=row[2],
                        scopes=tuple(row[3].split()),
                        name=row[4],
                        created_at=row[5],
                        revoked_at=row[6],
                        terms=Terms() if row[7] is None else msgspec.json.decode(row[7], type=Terms),
                        pepper=row[8],
                    ),
                    row[9],
                )
                for row in rows
            ]

        self._ticked = self.writer.now()
        for key, used in await self.writer.storage.read(work):
            self._keep(key)
            if used is not None:
                self._used[key.id] = used
        if unusable := sum(self.state(key) == "unusable" for key in self._by_id.values()):
            logger.warning(
                "keys.unusable", count=unusable, why="made with another pepper: see key_pepper_file"
            )

    def _keep(self, key: Key) -> None:
        admin = "admin" in key.scopes
        caller = Caller(
            actor=key.actor,
            project=None if admin else key.project,
            scopes=frozenset(SCOPES if admin else key.scopes),
            devices=key.terms.devices,
            commands_per_minute=key.terms.commands_per_minute,
            requests_per_minute=key.terms.requests_per_minute,
        )
        self._by_digest[key.digest] = key, caller
        self._by_id[key.id] = key

    # --- reading ---

    def caller(self, secret: str) -> Caller | None:
        """The caller of a key's secret; None if the key is unknown, revoked or expired.

        Both digests are made for every secret, so that a wrong one costs the same as a right one.
        """
        digests = [secret_digest(secret)]
        if self._pepper is not None:
            digests.append(peppered_digest(secret, self._pepper))
        found = None
        for digest in digests:
            known = self._by_digest.get(digest)
            if known is not None and hmac.compare_digest(known[0].digest, digest):
                found = known
        now = self.writer.now()
        if found is None or not found[0].works(now):
            return None
        key, caller = found
        self._used[key.id] = now
        self._unsaved[key.id] = None
        return caller

    def project_of(self, actor: str) -> str | None:
        """The project of a key, for admin keys too. It is the default project of what the key creates."""
        key = self._by_id.get(actor.removeprefix("key:"))
        return None if key is None else key.project

    def has_ended(self, actor: str) -> bool:
        """Whether the actor is a key that was revoked or has expired; the operator has none."""
        key = self._by_id.get(actor.removeprefix("key:"))
        return key is not None and not key.works(self.writer.now())

    def all(self) -> list[Key]:
        return sorted(self._by_id.values(), key=lambda key: key.id)

    def get(self, key_id: str) -> Key:
        """One key, also one that was revoked.

        Raises:
            Refusal: not_found.
        """
        key = self._by_id.get(key_id)
        if key is None:
            raise not_found("key", key_id)
        return key

    def last_used(self, key: Key) -> int | None:
        """When the key was last used, ms; None: never. After a crash it may be a minute older."""
        return self._used.get(key.id)

    def state(self, key: Key) -> State:
        """`active`, `revoked`, `expired`, or `unusable`: the broker does not have the key's pepper."""
        if key.revoked_at is not None:
            return "revoked"
        if not key.works(self.writer.now()):
            return "expired"
        return "active" if key.pepper in (None, self._pepper_name) else "unusable"

    # --- changing ---

    async def create(
        self,
        project: str,
        scopes: tuple[str, ...],
        name: str | None,
        terms: Terms | None = None,
        actor: str = LOCAL,
    ) -> tuple[Key, str]:
        """Makes a key; this also creates its project. Returns the key and its secret (`sk_live_…`).

        Raises:
            Refusal: invalid_request.
            Unavailable: the log could not be written.
        """
        check_name("project", project)
        terms = terms or Terms()
        for scope in scopes:
            if scope not in SCOPES:
                raise invalid("scopes", f"must be one of {', '.join(SCOPES)}", scope)
        if not scopes:
            raise invalid("scopes", "at least one is needed")
        self._check(terms, scopes)
        await self.writer.room()
        now = self.writer.now()
        secret = new_secret(OF_KEY, self.writer.entropy)
        key = Key(
            id=new_id("key", now, self.writer.entropy),
            project=project,
            scopes=tuple(dict.fromkeys(scopes)),
            name=name,
            created_at=now,
            revoked_at=None,
            digest=secret_digest(secret) if self._pepper is None else peppered_digest(secret, self._pepper),
            terms=terms,
            pepper=self._pepper_name,
        )
        values = (key.id, bytes.fromhex(key.digest), project, " ".join(key.scopes), name, now)
        more = (key.id, msgspec.json.encode(terms), key.pepper)
        self.writer.also(New("api_keys", (*values, None)), New("key_terms", (*more, None)))
        limits = {name: value for name, value in msgspec.to_builtins(terms).items() if value is not None}
        self.writer.operated(actor, "key.created", key.id, project, scopes=list(key.scopes), **limits)
        await self.writer.barrier()
        self._keep(key)
        return key, secret

    def _check(self, terms: Terms, scopes: tuple[str, ...]) -> None:
        if terms.expires_at is not None and terms.expires_at <= self.writer.now():
            raise invalid("expires_at", "must lie in the future")
        if (devices := terms.devices) is None:
            return
        if "admin" in scopes:
            raise invalid("devices", "a key with the scope admin cannot be limited to devices")
        for field, texts, most in (
            ("devices", devices.names, MOST_NAMES),
            ("device_prefixes", devices.prefixes, MOST_PREFIXES),
        ):
            if len(texts) > most:
                raise invalid(field, f"has {len(texts)}; at most {most} are allowed")
            for text in texts:
                if not is_name(text):
                    raise invalid(field, "must match [A-Za-z0-9][A-Za-z0-9_-]{0,63}", text)

    async def revoke(self, key_id: str, actor: str = LOCAL) -> Key:
        """Revokes a key for ever. Commands that it created go on. Revoking it again changes nothing.

        Raises:
            Refusal: not_found.
            Unavailable: the log could not be written; the key stops working until the next start.
        """
        key = self.get(key_id)
        await self.writer.room()
        at = key.revoked_at or self.writer.now()
        if key.revoked_at is None or key_id in self._unrecorded:
            self._unrecorded.add(key_id)
            self.writer.operated(actor, "key.revoked", key_id, key.project)
        # The key stops working now. The row is written every time, because an earlier write may have failed.
        key = msgspec.structs.replace(key, revoked_at=at)
        self._keep(key)
        self.ended(key.actor)
        self.writer.also(Change("api_keys", (key_id,), {"revoked_at": at}))
        await self.writer.barrier()
        self._unrecorded.discard(key_id)
        return key

    # --- in time ---

    def tick(self) -> None:
        """Call this about once a second. Calls `ended` for each key that expired since the last call."""
        now, since = self.writer.now(), self._ticked
        self._ticked = now
        for key in self._by_id.values():
            if key.terms.expires_at is not None and since < key.terms.expires_at <= now:
                self.ended(key.actor)

    def save_uses(self) -> None:
        """Stages the times when keys were last used. Nothing depends on them."""
        # A key from an older release may have no row in `key_terms`.
        uses = [
            Put("key_terms", (key_id, b"{}", None, self._used[key_id]), only=("last_used_at",))
            for key_id in self._unsaved
        ]
        self._unsaved.clear()
        self.writer.note(*uses)
