"""The secret that goes into the digests of API keys. It lies beside the log, never in it."""

from __future__ import annotations

import os
from pathlib import Path

from broker.seams import Broken

PEPPER = "key.pepper"
SHORTEST_PEPPER = 16


def pepper_of(directory: Path, place: str) -> bytes:
    """The secret that goes into the digests of API keys: the content of the file `place`, or, if that is
    empty, of `key.pepper` in the data directory, which is made if it is missing. It is in no backup.

    Raises:
        Broken: the file cannot be read or made, or is too short.
    """
    path = Path(place) if place else directory / PEPPER
    try:
        if not place and not path.exists():
            made = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            with open(made, "wb") as file:
                file.write(os.urandom(32).hex().encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        pepper = path.read_bytes().strip()
    except OSError as error:
        raise Broken(f"{path}: {error.strerror or error}") from error
    if len(pepper) < SHORTEST_PEPPER:
        raise Broken(f"{path} has {len(pepper)} bytes; a pepper needs at least {SHORTEST_PEPPER}")
    return pepper
