"""The memory of a device: the commands it has seen, and its last answer to each.

`put` returns only when the entry survives a power cut. The device stores each step before it acts or answers.
The memory keeps all unfinished commands and the newest finished ones.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Protocol

import msgspec

from devices.wire import Answer, CommandMessage

KEEP = 10_000


class Remembered(msgspec.Struct, frozen=True, kw_only=True):
    """One command in the memory. `begun`: its handler may have run. `command` is None once it is finished."""

    answer: Answer
    begun: bool = False
    command: CommandMessage | None = None

    @property
    def finished(self) -> bool:
        return self.answer.status in ("executed", "failed")


class Memory(Protocol):
    def get(self, command_id: str) -> Remembered | None: ...

    def put(self, command_id: str, remembered: Remembered) -> None:
        """Stores an entry. It is durable when this returns."""
        ...

    def unfinished(self) -> list[Remembered]:
        """The unfinished commands, in order of arrival."""
        ...

    def close(self) -> None:
        """Closes the memory. The agent calls this when it ends."""
        ...


class RamMemory:
    """A memory for simulation and demos. It is lost when the process ends."""

    def __init__(self, keep: int = KEEP) -> None:
        self._keep = keep
        self._entries: dict[str, Remembered] = {}

    def get(self, command_id: str) -> Remembered | None:
        return self._entries.get(command_id)

    def put(self, command_id: str, remembered: Remembered) -> None:
        self._entries[command_id] = remembered
        if len(self._entries) > self._keep:
            oldest = next((seen for seen, entry in self._entries.items() if entry.finished), None)
            if oldest is not None:
                del self._entries[oldest]

    def unfinished(self) -> list[Remembered]:
        return [entry for entry in self._entries.values() if not entry.finished]

    def close(self) -> None:
        """Nothing is open. The entries stay for the next agent."""


class SqliteMemory:
    """A memory in a small SQLite file. Use it for one agent only, from the thread of its event loop."""

    def __init__(self, path: Path | str, keep: int = KEEP) -> None:
        self._keep = keep
        self._db = sqlite3.connect(path)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        with self._db:
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS commands"
                " (seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, finished INTEGER NOT NULL,"
                " remembered BLOB NOT NULL)"
            )

    def get(self, command_id: str) -> Remembered | None:
        row = self._db.execute("SELECT remembered FROM commands WHERE id = ?", (command_id,)).fetchone()
        return None if row is None else msgspec.json.decode(row[0], type=Remembered)

    def put(self, command_id: str, remembered: Remembered) -> None:
        with self._db:
            self._db.execute(
                "INSERT INTO commands (id, finished, remembered) VALUES (?, ?, ?)"
                " ON CONFLICT (id) DO UPDATE"
                " SET finished = excluded.finished, remembered = excluded.remembered",
                (command_id, remembered.finished, msgspec.json.encode(remembered)),
            )
            self._db.execute(
                "DELETE FROM commands WHERE finished AND seq <= (SELECT max(seq) FROM commands) - ?",
                (self._keep,),
            )

    def unfinished(self) -> list[Remembered]:
        rows = self._db.execute("SELECT remembered FROM commands WHERE NOT finished ORDER BY seq")
        return [msgspec.json.decode(row[0], type=Remembered) for row in rows]

    def close(self) -> None:
        self._db.close()
