"""Style as tests: import directions, access to the outside world, and sizes.

The rules are the data at the top. Each checker takes a path and a source text and returns its complaints. The
last tests plant a fault for each checker, so that a checker that finds nothing fails.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("broker", "projections", "devices")
LONGEST_FUNCTION = 70
LONGEST_MODULE = 400
MOST_MODULES = 18

# Pure rooms and modules: no clock, disk, network or task.
PURE = (
    "broker/domain",
    "broker/operations/redecide",
    "broker/subscriptions/webhook_queue",
    "broker/mqtt/packets",
    "broker/mqtt/codec",
    "broker/mqtt/session",
)
NEVER_IN_PURE = {
    "asyncio",
    "time",
    "random",
    "os",
    "sqlite3",
    "aiosqlite",
    "aiomqtt",
    "litestar",
    "structlog",
}

# Only these may read a clock, draw a random number, start a thread or open a socket.
SEAMS = (
    "broker/world",
    "broker/pepper",
    "broker/log/postgresql/blocking",
    "broker/log/postgresql/vanished",
    "broker/serve",
    "broker/serving",
    "broker/control",
    "broker/private_socket",
    "broker/client",
    "broker/cli",
    "broker/mqtt/client/link",
    "broker/mqtt/client/connection",
    "broker/mqtt/client/wire",
    "broker/mqtt/sockets",
    "broker/mqtt/tls",
    "broker/mqtt/mosquitto",
    "broker/mqtt/external/password_file",
    "broker/subscriptions/outbound",
    "broker/nodes/connections",
    "devices/agent",
    "devices/canary",
    "devices/tls",
    "devices/fleet/simulator",
)
WORLD_MODULES = {
    "time", "random", "secrets", "uuid", "threading", "socket", "socketserver", "ssl", "select", "concurrent",
    "multiprocessing", "subprocess", "signal",
}  # fmt: skip
WORLD_NAMES = {
    "datetime.now", "datetime.utcnow", "datetime.today", "date.today", "os.urandom", "os.getrandom",
    "asyncio.to_thread", "asyncio.open_connection", "asyncio.start_server",
}  # fmt: skip

# The rooms from the lowest floor up: each may import the rooms of earlier lines and no other of this project.
# A module directly in `broker/` is a room of its own. Rooms on one line do not import each other.
FLOORS = (
    (
        "devices",
        "broker/__init__",
        "broker/often",
        "broker/client_types",
        "broker/log_url",
        "broker/limits",
    ),
    (
        "devices/fleet",
        "broker/client",
        "broker/domain",
        "broker/settings",
        "broker/private_socket",
    ),
    ("broker/seams",),
    ("broker/log", "broker/type_files"),
    ("projections",),
    ("broker/engine", "broker/log/postgresql"),
    ("broker/subscriptions", "broker/world", "broker/pepper"),
    ("broker/core", "broker/opening"),
    ("broker/operations",),
    ("broker/mqtt", "broker/demo", "broker/metrics"),
    ("broker/http/edge",),
    ("broker/http/v1",),
    ("broker/http/compat",),
    ("broker/http/schema",),
    ("broker/http",),
    ("broker/nodes", "broker/control"),
    ("broker/serving",),
    ("broker/serve",),
    ("broker/cli",),
)  # fmt: skip
# A room or module -> all it may import of this project, where that is less than all floors below it.
MAY_IMPORT = {
    "devices": {"devices"},
    "broker/client": {"broker.client_types"},
    "broker/domain": {"broker.domain", "devices.types", "devices.names", "devices.clock"},
    "projections": {
        "projections", "broker.domain", "broker.log", "broker.seams", "devices.types",
    },
}  # fmt: skip
# A room or module -> what it must not import.
MUST_NOT_IMPORT = {
    "broker/log": {"litestar", "uvicorn", "httpx2"},
    "broker/engine": {"litestar", "uvicorn", "httpx2", "aiomqtt"},
    "broker/client": {"litestar", "uvicorn", "msgspec", "aiosqlite", "aiomqtt"},
}
# An imported module -> the only rooms and modules of `broker/` and `projections/` that may.
IMPORTED_ONLY_BY = {
    "aiomqtt": {"broker/mqtt/client/link", "broker/mqtt/client/connection"},
    "paho": {"broker/mqtt/client/link", "broker/mqtt/client/connection"},
    "amqtt": set(),
    "asyncpg": {"broker/log/postgresql"},
    "broker.world": {
        "broker/serving",
        "broker/control",
        "broker/cli",
        "broker/operations",
        "broker/opening",
    },
    "broker.mqtt": {"broker/mqtt", "broker/serve", "broker/serving"},
    "broker.subscriptions.outbound": {"broker/serving", "broker/cli"},
}

Checker = Callable[[str, str], list[str]]


def sources() -> Iterator[tuple[str, str]]:
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text()


def complaints(checker: Checker) -> list[str]:
    return [complaint for path, text in sources() for complaint in checker(path, text)]


def within(name: str, modules: set[str]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def in_room(path: str, room: str) -> bool:
    return path == f"{room}.py" or path.startswith(room + "/")


def in_any(path: str, rooms: Iterable[str]) -> bool:
    return any(in_room(path, room) for room in rooms)


def place(path: str) -> tuple[str, int]:
    """The innermost room that holds `path` (with or without its ending), and the number of its floor."""
    found = [
        (room, number)
        for number, rooms in enumerate(FLOORS)
        for room in rooms
        if path == room or in_room(path, room)
    ]
    if not found:
        raise AssertionError(f"{path} is in no room: name its room in FLOORS")
    return max(found, key=lambda room: len(room[0]))


@cache
def nodes(text: str) -> tuple[ast.AST, ...]:
    """All nodes of a source text; kept, because each checker asks for those of every module."""
    return tuple(ast.walk(ast.parse(text)))


def imports(path: str, text: str) -> Iterator[str]:
    """Every imported thing by its full dotted name: `from a import b` is a.b."""
    package = path.split("/")[:-1]
    for node in nodes(text):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def names_the_world(text: str) -> Iterator[str]:
    """Dotted names in use, such as `dt.datetime.now`, that end in one of WORLD_NAMES."""
    for node in nodes(text):
        if isinstance(node, ast.Attribute):
            name = dotted(node)
            if any(f".{name}".endswith(f".{forbidden}") for forbidden in WORLD_NAMES):
                yield name


def wrong_imports(path: str, text: str) -> list[str]:
    found = []
    for name in imports(path, text):
        ours = within(name, set(ROOMS))
        found += [
            f"{path} imports {name}; {room} may not"
            for room, allowed in MAY_IMPORT.items()
            if ours and in_room(path, room) and not within(name, allowed)
        ]
        found += [
            f"{path} imports {name}; {room} must not"
            for room, forbidden in MUST_NOT_IMPORT.items()
            if in_room(path, room) and within(name, forbidden)
        ]
        found += [
            f"{path} imports {name}; only {', '.join(sorted(allowed))} may"
            for thing, allowed in IMPORTED_ONLY_BY.items()
            if within(name, {thing}) and not in_room(path, "devices") and not in_any(path, allowed)
        ]
        found += upward(path, name) if ours else []
    return found


def upward(path: str, name: str) -> list[str]:
    """An import of a room that is not on a floor below."""
    if name == "broker.__version__":
        return []
    (room, floor), (target, below) = place(path), place(module_of(name))
    if room == target or below < floor:
        return []
    return [f"{path} imports {name}, which is not on a floor below it"]


def module_of(name: str) -> str:
    """The path, without its ending, of the module that a dotted name lies in; of a package, its __init__."""
    parts = name.split(".")
    while not exists("/".join(parts)):
        parts.pop()
    path = "/".join(parts)
    return f"{path}/__init__" if (ROOT / path).is_dir() else path


def impure(path: str, text: str) -> list[str]:
    if not in_any(path, PURE):
        return []
    names = [name for name in imports(path, text) if within(name, NEVER_IN_PURE | WORLD_MODULES)]
    return [f"{path} is pure and uses {name}" for name in [*names, *names_the_world(text)]]


def reaches_the_world(path: str, text: str) -> list[str]:
    if in_any(path, SEAMS):
        return []
    names = [name for name in imports(path, text) if within(name, WORLD_MODULES | WORLD_NAMES)]
    return [f"{path} reaches past the seams: {name}" for name in [*names, *names_the_world(text)]]


def too_long(path: str, text: str) -> list[str]:
    lines = len(text.splitlines())
    found = [f"{path} has {lines} lines"] if lines > LONGEST_MODULE else []
    for node in nodes(text):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > LONGEST_FUNCTION:
                found.append(f"{path}:{node.lineno} {node.name} has {length} lines")
    return found


def swallows(path: str, text: str) -> list[str]:
    """`except Exception: pass`, in any of its spellings."""
    found = []
    for node in nodes(text):
        if isinstance(node, ast.ExceptHandler):
            caught, silent = node.type, all(does_nothing(statement) for statement in node.body)
            if silent and (caught is None or is_broad(caught)):
                found.append(f"{path}:{node.lineno} swallows every exception")
        elif (
            isinstance(node, ast.Call)
            and dotted(node.func).endswith("suppress")
            and any(map(is_broad, node.args))
        ):
            found.append(f"{path}:{node.lineno} swallows every exception")
    return found


def does_nothing(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Pass | ast.Continue) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    )


def is_broad(caught: ast.expr) -> bool:
    kinds = caught.elts if isinstance(caught, ast.Tuple) else [caught]
    return any(dotted(kind).split(".")[-1] in ("Exception", "BaseException") for kind in kinds)


def addresses(path: str, text: str) -> list[str]:
    return [
        f"{path}:{number} holds an address"
        for number, line in enumerate(text.splitlines(), 1)
        if "://" in line
    ]


def test_imports_run_inward_and_only_serve_wires() -> None:
    assert complaints(wrong_imports) == []


def test_pure_modules_are_pure() -> None:
    assert complaints(impure) == []


def test_every_room_that_a_rule_names_exists() -> None:
    named = {*PURE, *SEAMS, *MAY_IMPORT, *MUST_NOT_IMPORT, *(room for rooms in FLOORS for room in rooms)}
    named |= {room for rooms in IMPORTED_ONLY_BY.values() for room in rooms}
    assert [room for room in sorted(named) if not exists(room)] == []


def exists(room: str) -> bool:
    return (ROOT / room).is_dir() or (ROOT / f"{room}.py").is_file()


def test_no_room_is_crowded() -> None:
    count = Counter(Path(path).parent.as_posix() for path, _ in sources())
    assert {room: modules for room, modules in count.items() if modules > MOST_MODULES} == {}


def test_only_the_seams_reach_the_world() -> None:
    assert complaints(reaches_the_world) == []


def test_functions_and_modules_stay_short() -> None:
    assert complaints(too_long) == []


def test_no_exception_is_swallowed() -> None:
    assert complaints(swallows) == []


def test_lock_files_hold_no_addresses() -> None:
    locks = [*ROOT.glob("requirements*.lock"), *ROOT.glob("scripts/*.lock")]
    locks += [ROOT / "tests/system/http/npm/package-lock.json"]
    assert len(locks) == 4
    assert [line for lock in locks for line in addresses(lock.name, lock.read_text())] == []


PLANTED = [
    (wrong_imports, "devices/agent.py", "import broker.domain.events"),
    (wrong_imports, "devices/agent.py", "from projections import lanes"),
    (wrong_imports, "broker/client.py", "from broker.engine.commands import Order"),
    (wrong_imports, "projections/lanes.py", "from broker.engine.commands import Commands"),
    (wrong_imports, "projections/lanes.py", "from devices import wire"),
    (wrong_imports, "broker/log/sqlite.py", "from broker import http"),
    (wrong_imports, "broker/log/sqlite.py", "from ..http import v1"),
    (wrong_imports, "broker/engine/dispatch.py", "import aiomqtt"),
    (wrong_imports, "broker/engine/dispatch.py", "from ..mqtt import link"),
    (wrong_imports, "broker/http/app.py", "from broker.serve import serve"),
    (wrong_imports, "broker/engine/dispatch.py", "from broker.subscriptions.feed import Feed"),
    (wrong_imports, "broker/http/v1/lanes.py", "from broker.http.compat import iotee"),
    (wrong_imports, "broker/domain/lanes.py", "from broker.seams import Sql"),
    (impure, "broker/domain/lanes.py", "def now():\n    import time"),
    (impure, "broker/domain/events.py", "from datetime import datetime\nAT = datetime.now()"),
    (impure, "broker/domain/lifecycle.py", "if TYPE_CHECKING:\n    import asyncio"),
    (reaches_the_world, "broker/engine/commands.py", "from time import monotonic"),
    (reaches_the_world, "broker/engine/commands.py", "import datetime as dt\nAT = dt.datetime.utcnow()"),
    (reaches_the_world, "projections/lanes.py", "import os\nSALT = os.urandom(16)"),
    (reaches_the_world, "projections/lanes.py", "from os import urandom"),
    (reaches_the_world, "devices/wire.py", "import socket"),
    (too_long, "broker/engine/commands.py", "async def long():\n" + "    pass\n" * LONGEST_FUNCTION),
    (too_long, "broker/engine/commands.py", "A = 1\n" * (LONGEST_MODULE + 1)),
    (swallows, "broker/engine/commands.py", "try:\n    f()\nexcept:\n    pass"),
    (swallows, "broker/engine/commands.py", "try:\n    f()\nexcept (OSError, Exception) as e:\n    ..."),
    (
        swallows,
        "broker/engine/commands.py",
        "for x in y:\n  try:\n    f()\n  except BaseException:\n    continue",
    ),
    (swallows, "broker/engine/commands.py", "with contextlib.suppress(Exception):\n    f()"),
    (addresses, "requirements.lock", "--index-url https:" + "//example.org"),
]

CLEAN = """
import timeit
from datetime import UTC, datetime
from broker.domain.events import Created
AT = datetime.fromtimestamp(0, UTC)
LATER = sorted({"time": 1, "now": 2})
try:
    f()
except OSError:
    pass
"""


@pytest.mark.parametrize(("checker", "path", "text"), PLANTED)
def test_a_planted_fault_is_found(checker: Checker, path: str, text: str) -> None:
    assert checker(path, text) != []


@pytest.mark.parametrize("path", ["broker/engine/commands.py", "broker/domain/lanes.py"])
@pytest.mark.parametrize("checker", [wrong_imports, reaches_the_world, impure, too_long, swallows, addresses])
def test_clean_code_is_left_alone(checker: Checker, path: str) -> None:
    assert checker(path, CLEAN) == []
