"""Checkpoints against attacks by the owner of the file and of the keys: cutting the log off and rewriting
it."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import jwt
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from broker.engine.grants import GrantKey, jwk
from broker.log import chain
from broker.log import sqlite as log
from broker.log.driven import read_now
from broker.operations import checkpoint
from broker.operations.backup import Refused
from broker.operations.checkpoint import Checkpoint
from broker.world import DATABASE
from tests.integration.core_support import Bench, running


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with running(tmp_path) as bench:
        await bench.device(online=False)
        await bench.order()
        yield bench


@contextmanager
def opened(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(tmp_path / DATABASE)) as sql:
        yield sql


def kept(tmp_path: Path) -> Checkpoint:
    with opened(tmp_path) as sql:
        return checkpoint.read(checkpoint.sign(sql).encode())


def copy(sql: sqlite3.Connection) -> sqlite3.Connection:
    """A copy of the database that a test may manipulate."""
    mine = sqlite3.connect(":memory:", isolation_level=None)
    sql.backup(mine)
    return mine


async def test_a_log_that_grew_matches_its_checkpoint(bench: Bench, tmp_path: Path) -> None:
    said = kept(tmp_path)
    with opened(tmp_path) as sql:
        head = read_now(sql, log.head)
        assert (said.claims.position, said.claims.hash) == (head.position, head.hash.hex())
        assert checkpoint.contradiction(sql, said.claims) is None
    await bench.order()
    with opened(tmp_path) as sql:
        assert read_now(sql, log.head).position > said.claims.position
        assert checkpoint.contradiction(sql, said.claims) is None


async def test_a_cut_off_log_verifies_but_contradicts_its_checkpoint(bench: Bench, tmp_path: Path) -> None:
    said = kept(tmp_path)
    with opened(tmp_path) as sql, closing(copy(sql)) as mine:
        mine.execute("DELETE FROM events WHERE position = ?", (said.claims.position,))

        assert read_now(mine, log.verify).fault is None
        assert "cut off: it ends at" in (checkpoint.contradiction(mine, said.claims) or "")


async def test_a_rewritten_log_verifies_but_contradicts_its_checkpoint(bench: Bench, tmp_path: Path) -> None:
    await bench.order()
    said = kept(tmp_path)
    with opened(tmp_path) as sql, closing(copy(sql)) as mine:
        previous = chain.GENESIS
        for row in list(read_now(mine, log.all_rows)):
            forged = row._replace(actor="nobody" if row.type == "created" else row.actor)
            previous = chain.link(previous, *forged[:10], forged.digest)
            mine.execute(
                "UPDATE events SET actor = ?, hash = ? WHERE position = ?",
                (forged.actor, previous, row.position),
            )

        assert read_now(mine, log.verify).fault is None
        assert "rewritten" in (checkpoint.contradiction(mine, said.claims) or "")


async def test_another_log_contradicts_a_checkpoint_and_a_restored_one_does_not(
    bench: Bench, tmp_path: Path
) -> None:
    said = kept(tmp_path)
    with opened(tmp_path) as sql, closing(copy(sql)) as mine:
        mine.execute("UPDATE meta SET value = 'log_other' WHERE key = 'log_id'")
        assert "is of log" in (checkpoint.contradiction(mine, said.claims) or "")
        mine.execute("INSERT INTO meta VALUES ('restored_from', ?)", (said.claims.log_id,))
        assert checkpoint.contradiction(mine, said.claims) is None


async def test_the_published_key_verifies_the_signature(bench: Bench, tmp_path: Path) -> None:
    with opened(tmp_path) as sql:
        token = checkpoint.sign(sql)
    (published,) = bench.core.grants.jwks()["keys"]

    header = jwt.get_unverified_header(token)
    claims = jwt.decode(token, jwt.PyJWK(published), algorithms=["EdDSA"])

    assert (header["typ"], header["kid"], header["jwk"]) == ("checkpoint+jwt", published["kid"], published)
    assert claims == msgspec.to_builtins(kept(tmp_path).claims)


async def test_a_changed_checkpoint_is_refused(bench: Bench, tmp_path: Path) -> None:
    with opened(tmp_path) as sql:
        token = checkpoint.sign(sql)
    head, body, signature = token.split(".")
    state = next(iter(bench.live.members.values())).state
    other = jwt.encode({"position": 1}, Ed25519PrivateKey.generate(), "EdDSA", {"typ": checkpoint.TYPE})
    for wrong in (
        f"{head}.{body[:-2]}AA.{signature}",
        f"{head}.{body}.{signature[:-6]}AAAAAA",
        f"{head}.{body}",
        "",
        "é",
        bench.core.grants.mint(state, bench.writer.now()),
        other,
    ):
        with pytest.raises(Refused, match="not a checkpoint"):
            checkpoint.read(wrong.encode())


async def test_a_checkpoint_signed_with_another_key_has_another_thumbprint(
    bench: Bench, tmp_path: Path
) -> None:
    said = kept(tmp_path)
    mine = GrantKey(kid=said.kid, private=Ed25519PrivateKey.generate(), created_at=0)
    headers = {"typ": checkpoint.TYPE, "kid": said.kid, "jwk": jwk(mine)}
    forged = jwt.encode(msgspec.to_builtins(said.claims), mine.private, "EdDSA", headers)

    read = checkpoint.read(forged.encode())

    assert read.claims == said.claims
    assert read.thumbprint != said.thumbprint


def test_the_thumbprint_follows_the_standard() -> None:
    # The test vector of RFC 8037, appendix A.3.
    public = {"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}
    assert checkpoint._thumbprint(public) == "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"


def test_an_empty_log_and_one_without_a_key_have_no_checkpoint() -> None:
    with closing(sqlite3.connect(":memory:")) as sql:
        log.create(sql, "log_empty", "00")
        with pytest.raises(Refused, match="empty"):
            checkpoint.sign(sql)
