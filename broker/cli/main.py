"""The command line. Every command finds the broker by its data directory, and works while a broker runs.

A command is one line in COMMANDS. Its module is imported only when the command is used, because a start must
be quick: this module and `broker.cli.base` import nothing that most commands do not need.

Exit codes: 0 done; 1 refused, not executed, or a fault found; 2 the command line or a setting is wrong;
3 the broker or its log cannot be reached. Errors are one sentence on standard error; with
--json they are JSON there, `{"error": {"code", "message"}}`.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence

import msgspec
from cyclopts import App, CycloptsError

from broker import __version__
from broker.cli.base import escaped
from broker.domain.errors import Unavailable
from broker.operations.asking import DONE, REFUSED, UNREACHABLE, USAGE, Failed
from broker.settings import BadSetting

# Name -> the function or App behind it, and its line in `ordain --help`, which is the first line of its help.
COMMANDS = {
    "serve": ("broker.cli.serve:serve", "Run the broker until SIGTERM or Ctrl-C."),
    "keys": ("broker.cli.keys:keys", "API keys: make, list, show, revoke."),
    "devices": ("broker.cli.devices:devices", "Devices: add, list, show, move, delete, give a new token."),
    "commands": ("broker.cli.commands:commands", "Commands: list, show, cancel, retry."),
    "send": (
        "broker.cli.commands:send",
        "Send one command. Without --wait, prints its id as soon as it is durable.",
    ),
    "explain": (
        "broker.cli.commands:explain",
        "Explain why a command is in its state, and what happens next.",
    ),
    "diff": (
        "broker.cli.diff:diff",
        "Show the changes between two points of the log: commands and devices, field by field.",
    ),
    "audit": (
        "broker.cli.keys:audit",
        "Show who changed what: every change by a key or the operator, with request id and address.",
    ),
    "log": ("broker.cli.log:logs", "The log: read, verify, export, import."),
    "migrate": (
        "broker.cli.transfer:migrate",
        "Move the log of a data directory into an empty PostgreSQL database. Stop the broker first.",
    ),
    "replay": (
        "broker.cli.replay:replay",
        "Send recorded events again, with their original ids. No command is sent again.",
    ),
    "nodes": ("broker.cli.doctor:nodes", "Nodes: list the brokers that share a log."),
    "projections": (
        "broker.cli.projections:projections",
        "Projections: tables that are computed from the log.",
    ),
    "webhooks": ("broker.cli.webhooks:webhooks", "Webhooks: list, pause, resume, redrive."),
    "grants": ("broker.cli.keys:grants", "Keys that sign grants: list, rotate, retire."),
    "delete": (
        "broker.cli.commands:delete",
        "Erase one closed command permanently. A pending command is cancelled first.",
    ),
    "purge": (
        "broker.cli.commands:purge",
        "Erase permanently all closed commands older than a number of days, or old device events.",
    ),
    "backup": (
        "broker.cli.backup:backup",
        "Copy the log to a new file and verify the copy. A broker may run meanwhile.",
    ),
    "restore": ("broker.cli.backup:restore", "Restore a backup into a data directory that has no log."),
    "doctor": (
        "broker.cli.doctor:doctor",
        "Check everything a broker depends on, and say how to correct problems. A broker may run or not.",
    ),
    "types": ("broker.cli.set_up:types", "Device types: check a file, try a message on it."),
    "mqtt": ("broker.cli.set_up:mqtt", "An MQTT server of your own: its password file and its access rules."),
    "completion": (
        "broker.cli.set_up:completion",
        "Print a script that lets a shell complete commands and options.",
    ),
    "simulate": (
        "broker.cli.simulate:simulate",
        "Run simulated devices against a running broker, and report what happened to each command.",
    ),
}

# Errors with a sentence for the user, by where they are defined. What no module has loaded cannot have
# been raised, so none of these is imported here.
EXPECTED = (CycloptsError, BadSetting, Failed, Unavailable, OSError)
EXPECTED_IF_LOADED = (
    *(("broker.seams", name) for name in ("Broken", "Conflict", "Fenced", "Full", "InUse", "Unknown")),
    ("sqlite3", "Error"),
    ("httpx2", "HTTPError"),
    ("devices.types", "BadType"),
)


# The `code` of an error in JSON that is not the broker's own answer.
NAMED = {REFUSED: "refused", USAGE: "usage", UNREACHABLE: "unavailable"}


def main() -> None:
    """Entry point of `ordain`."""
    # While modules load there is little garbage. To look for it as often as usual takes 8 % of a start.
    gc.set_threshold(50_000, 20, 50)
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader closed the pipe, as in `ordain log tail | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = DONE
    sys.exit(code)


def application(arguments: Sequence[str] = ()) -> App:
    """The commands. One that is named in `arguments` shows its whole help; others are not imported."""
    app = App(
        name="ordain",
        version=__version__,
        # A Markdown parser takes 0.05 s to load. Only the longer help of one command needs it.
        help_format="markdown" if COMMANDS.keys() & arguments else "plaintext",
        help="An event-sourced command broker for MQTT devices.",
        help_epilogue="Exit codes: 0 done; 1 refused, not executed, or a fault found; "
        "2 wrong command line or setting; 3 the broker or its log cannot be reached.",
    )
    for name, (place, line) in COMMANDS.items():
        app.command(place, name=name, help=None if name in arguments else line)
    return app


def run(arguments: list[str]) -> int:
    """Runs one command line and returns its exit code."""
    try:
        application(arguments)(
            arguments, exit_on_error=False, print_error=False, result_action="return_value"
        )
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        expected = (*EXPECTED, *_loaded())
        one = _first(error)
        if isinstance(error, ExceptionGroup) and error.split(expected)[1] is not None:
            raise
        if not isinstance(one, expected):
            raise
        return _error(one, as_json="--json" in arguments)
    return DONE


def _loaded() -> list[type[Exception]]:
    modules = ((sys.modules.get(module), name) for module, name in EXPECTED_IF_LOADED)
    return [getattr(module, name) for module, name in modules if module is not None]


def _first(group: BaseException) -> BaseException:
    return _first(group.exceptions[0]) if isinstance(group, BaseExceptionGroup) else group


def _error(error: BaseException, *, as_json: bool) -> int:
    """Prints the error in one line, as a sentence or as JSON, and returns the exit code."""
    message = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        message = ": ".join([*([str(error.filename)] if error.filename else []), error.strerror])
    message, code = " ".join(message.split()), _exit_code(error)
    if as_json:
        answer = error.error if isinstance(error, Failed) else None
        shown = {"error": answer or {"code": NAMED[code], "message": message}}
        message = msgspec.json.encode(shown).decode()
    print(escaped(message if as_json else f"ordain: {message}"), file=sys.stderr)
    return code


def _exit_code(error: BaseException) -> int:
    if isinstance(error, Failed):
        return error.code
    types = sys.modules.get("devices.types")
    wrong = (BadSetting, CycloptsError) if types is None else (BadSetting, CycloptsError, types.BadType)
    return USAGE if isinstance(error, wrong) else UNREACHABLE
