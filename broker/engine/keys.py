"""API keys and their scopes. Only digests are stored; the secret is shown once, when the key is made.

Keys are stored beside the log, not in it. All keys are in memory, so that a revoked key stops working
at once.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from broker.domain.errors import invalid, not_found
from broker.engine.commands import Caller
from broker.engine.ids import new_id, new_secret, secret_digest
from broker.engine.registry import check_name
from broker.engine.writer import Writer
from broker.seams import Sql

OF_KEY = "sk_live_"
SCOPES = ("devices:read", "devices:write", "events:read", "admin")


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """An API key without its secret. Times in ms."""

    id: str
    project: str
    scopes: tuple[str, ...]
    name: str | None
    created_at: int
    revoked_at: int | None


class Keys:
    """`revoked(actor)` is called when a key is revoked; the actor is `key:<id>`."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.revoked: Callable[[str], None] = lambda actor: None
        self._by_digest: dict[str, Key] = {}

    async def load(self) -> None:
        def work(sql: Sql) -> list[tuple[bytes, Key]]:
            rows = sql.execute(
                "SELECT digest, id, project, scopes, name, created_at, revoked_at FROM api_keys ORDER BY id"
            ).fetchall()
            return [
                (
                    bytes(row[0]),
                    Key(
                        id=row[1],
                        project=row[2],
                        scopes=tuple(row[3].split()),
                        name=row[4],
                        created_at=row[5],
                        revoked_at=row[6],
                    ),
                )
                for row in rows
            ]

        self._by_digest = {digest.hex(): key for digest, key in await self.writer.storage.read(work)}

    def caller(self, secret: str) -> Caller | None:
        """The caller of a key's secret; None if the key is unknown or revoked."""
        key = self._by_digest.get(secret_digest(secret))
        if key is None or key.revoked_at is not None:
            return None
        return self.as_caller(key)

    def as_caller(self, key: Key) -> Caller:
        admin = "admin" in key.scopes
        return Caller(
            actor=f"key:{key.id}",
            project=None if admin else key.project,
            scopes=frozenset(SCOPES if admin else key.scopes),
        )

    def project_of(self, actor: str) -> str | None:
        """The project of a key, for admin keys too. It is the default project of what the key creates."""
        return next((key.project for key in self._by_digest.values() if f"key:{key.id}" == actor), None)

    def is_revoked(self, actor: str) -> bool:
        """Whether the actor is a key that was revoked; the operator of this machine has no key."""
        return any(
            key.revoked_at is not None and f"key:{key.id}" == actor for key in self._by_digest.values()
        )

    def all(self) -> list[Key]:
        return sorted(self._by_digest.values(), key=lambda key: key.id)

    async def create(self, project: str, scopes: tuple[str, ...], name: str | None) -> tuple[Key, str]:
        """Makes a key; this also creates its project. Returns the key and its secret (`sk_live_…`).

        Raises:
            Refusal: invalid_request.
            Unavailable: the log could not be written.
        """
        check_name("project", project)
        for scope in scopes:
            if scope not in SCOPES:
                raise invalid("scopes", f"must be one of {', '.join(SCOPES)}", scope)
        if not scopes:
            raise invalid("scopes", "at least one is needed")
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
        )
        digest = secret_digest(secret)
        values = (key.id, bytes.fromhex(digest), project, " ".join(key.scopes), name, now)
        self.writer.also(lambda sql: sql.execute("INSERT INTO api_keys VALUES (?,?,?,?,?,?,NULL)", values))
        await self.writer.barrier()
        self._by_digest[digest] = key
        return key, secret

    async def revoke(self, key_id: str) -> Key:
        """Revokes a key for ever. Commands that it created go on. Revoking it again changes nothing.

        Raises:
            Refusal: not_found.
            Unavailable: the log could not be written; the key stops working until the next start.
        """
        found = [(digest, key) for digest, key in self._by_digest.items() if key.id == key_id]
        if not found:
            raise not_found("key", key_id)
        digest, key = found[0]
        await self.writer.room()
        at = key.revoked_at or self.writer.now()
        # The key stops working now. The row is written every time, because an earlier write may have failed.
        key = self._by_digest[digest] = msgspec.structs.replace(key, revoked_at=at)
        self.revoked(f"key:{key_id}")
        self.writer.also(
            lambda sql: sql.execute("UPDATE api_keys SET revoked_at = ? WHERE id = ?", (at, key_id))
        )
        await self.writer.barrier()
        return key
