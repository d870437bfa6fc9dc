"""The device types a broker knows: the shipped ones, and the files of a directory of its owner's.

Read once, at start. A file may never change what a shipped type means: devices of it may be anywhere.
"""

from __future__ import annotations

from pathlib import Path

from broker.settings import BadSetting
from devices.types import BadType, DeviceType, load_type, shipped_types


def load_types(directory: str) -> dict[str, DeviceType]:
    """The shipped types and those of `*.toml` in a directory; "" is no directory.

    Raises:
        BadSetting: the directory cannot be read.
        BadType: a file is wrong; names file, key, value and what would be right.
    """
    types = dict(shipped_types())
    if not directory:
        return types
    try:
        files = sorted(path for path in Path(directory).iterdir() if path.suffix == ".toml")
    except OSError as error:
        raise BadSetting(f"types = {directory!r}: must be a directory to read: {error.strerror}") from error
    came_from = dict.fromkeys(types, "Ordain itself")
    for path in files:
        kind = load_type(path)
        if kind.name in types:
            right = f"another name: a type of this name comes from {came_from[kind.name]}"
            raise BadType(str(path), "name", kind.name, right)
        _check_suffixes(str(path), kind, types)
        types[kind.name], came_from[kind.name] = kind, path.name
    return types


def _check_suffixes(file: str, kind: DeviceType, others: dict[str, DeviceType]) -> None:
    """A suffix is for commands or for answers, in all types, else the broker would hear itself."""
    for other in others.values():
        if kind.answer_suffix in other.command_suffixes:
            right = f"another suffix: {other.name} has commands on this one"
            raise BadType(file, "answer_suffix", kind.answer_suffix, right)
        if other.answer_suffix in kind.command_suffixes:
            right = f"another suffix: {other.name} answers on this one"
            raise BadType(file, "command_suffix", other.answer_suffix, right)
