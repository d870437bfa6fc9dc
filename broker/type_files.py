"""Loads the device types of a broker: the shipped types, and the user's own type files.

Files are read once, at start. A file must not change a shipped type, because devices may already use it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from broker.settings import BadSetting
from devices.types import BadType, DeviceType, load_type, shipped_types


def load_types(directory: str) -> dict[str, DeviceType]:
    """The shipped types and those in the `*.toml` files of a directory; "" means no directory.

    Raises:
        BadSetting: the directory cannot be read.
        BadType: a file is wrong; the error names the file, the key, the value and a valid value.
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
        kind = load_beside(path, types, came_from)
        types[kind.name], came_from[kind.name] = kind, path.name
    return types


def load_beside(
    path: Path, types: Mapping[str, DeviceType], came_from: Mapping[str, str] = MappingProxyType({})
) -> DeviceType:
    """The type of one file, if it can be used together with these other types. `came_from`: their files.

    Raises:
        BadType: the file is wrong, or does not fit to the others.
    """
    kind = load_type(path)
    if kind.name in types:
        source = came_from.get(kind.name, "Ordain itself")
        right = f"another name: a type of this name comes from {source}"
        raise BadType(str(path), "name", kind.name, right)
    _check_suffixes(str(path), kind, types)
    return kind


def _check_suffixes(file: str, kind: DeviceType, others: Mapping[str, DeviceType]) -> None:
    """Checks that no topic suffix is used for commands and answers at once: the broker would receive its own
    commands as answers.

    Raises:
        BadType: a suffix is used for both.
    """
    for other in others.values():
        if kind.answer_suffix in other.command_suffixes:
            right = f"another suffix: {other.name} uses this one for commands"
            raise BadType(file, "answer_suffix", kind.answer_suffix, right)
        if other.answer_suffix in kind.command_suffixes:
            right = f"another suffix: {other.name} uses this one for answers"
            raise BadType(file, "command_suffix", other.answer_suffix, right)
