"""Identifiers and secrets: their form, their order, and a check with another implementation."""

from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st
from typeid import TypeID

from broker.engine.ids import is_token, new_id, new_secret, secret_digest, token_digest
from devices.names import is_name
from tests.integration.core_support import SeededEntropy, T

TIMES = st.integers(0, 2**48 - 1)
PREFIXES = st.sampled_from(["cmd", "dev", "key", "log"])


@given(PREFIXES, TIMES, st.integers(0, 2**32))
def test_an_id_is_a_type_id_of_a_uuid_version_7(prefix: str, at: int, seed: int) -> None:
    made = new_id(prefix, at, SeededEntropy(seed))

    read = TypeID.from_string(made)
    assert read.prefix == prefix
    assert (read.uuid.version, read.uuid.variant) == (7, "specified in RFC 4122")
    assert read.uuid.int >> 80 == at
    assert str(read) == made
    assert is_name(made)


@given(TIMES, TIMES, st.integers(0, 2**32))
def test_ids_sort_by_time(one: int, other: int, seed: int) -> None:
    entropy = SeededEntropy(seed)
    first, second = new_id("cmd", one, entropy), new_id("cmd", other, entropy)

    assert one == other or (first < second) == (one < other)


def test_two_ids_of_the_same_millisecond_differ() -> None:
    entropy = SeededEntropy()
    assert len({new_id("cmd", T, entropy) for _ in range(1_000)}) == 1_000


def test_a_secret_names_its_purpose_and_only_its_digest_is_stored() -> None:
    entropy = SeededEntropy()
    secret, other = new_secret("sk_live_", entropy), new_secret("sk_live_", entropy)

    assert secret.startswith("sk_live_")
    assert len(secret) == len("sk_live_") + 43
    assert secret_digest(secret) == hashlib.sha256(secret.encode()).hexdigest()
    assert secret_digest(secret) != secret_digest(other)


def test_a_token_with_a_nul_is_not_the_token() -> None:
    digest = token_digest("dtok_a", SeededEntropy())
    assert is_token("dtok_a", digest)
    assert not is_token("dtok_a\0", digest)
    assert not is_token("dtok_a\0\0", digest)
