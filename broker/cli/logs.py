"""Log lines of `ordain serve` on standard error: as text or JSON, and in the form of systemd's journal."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Mapping, MutableMapping
from typing import IO, Any

import structlog

from broker.cli.base import CONTROL
from broker.often import Often
from broker.settings import Settings

SECRET = re.compile(
    r"(sk_live_|dtok_|whsec_)[\w+/=-]{8,}|eyJ[\w-]{8,}\.[\w-]+\.[\w-]+"  # the last one: a JWT
)
# Level -> priority of syslog(3). A line that begins with <N> gets this priority: sd-daemon(3).
PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}


def configure(settings: Settings, environment: Mapping[str, str]) -> None:
    """Sets up all log lines of this process.

    The journal has its own time stamp, so a line for it has none, but a priority.
    """
    journal = is_journal(environment, sys.stderr)
    steps: list[Any] = [structlog.processors.add_log_level]
    if not journal:
        steps.append(structlog.processors.TimeStamper(fmt="iso", utc=True))
    steps += [structlog.processors.format_exc_info, safe]
    if settings.log_format == "json":
        steps += [_in_order, structlog.processors.JSONRenderer(ensure_ascii=False)]
    else:
        order = ["level", "event"] if journal else ["timestamp", "level", "event"]
        steps.append(structlog.processors.LogfmtRenderer(key_order=order))
    if journal:
        steps.append(_prioritised(steps.pop()))
    structlog.configure(
        processors=steps,
        wrapper_class=structlog.make_filtering_bound_logger(settings.log_level),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
    )
    logging.getLogger().handlers[:] = [Bridge()]


class Bridge(logging.Handler):
    """Passes what libraries write with Python's own logging to the log of this process.

    So these lines too are masked, escaped and bounded: asyncio writes one for each write to a connection that
    is gone.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._often = Often(time.monotonic)

    def emit(self, record: logging.LogRecord) -> None:
        line = {"of": record.name, "message": record.getMessage()[:500]}
        allowed = self._often.allowed(record.name, line)
        if allowed is not None:
            structlog.get_logger().log(record.levelno, "python.log", exc_info=record.exc_info, **allowed)


def safe(_: object, __: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Masks what looks like a key, a token or a grant in all values, and escapes control characters.

    Values come from strangers too: a terminal must not obey them, and a line must stay one line.
    """
    for name, value in line.items():
        if isinstance(value, str | bytes | list | tuple | dict | BaseException):
            text = value if isinstance(value, str) else str(value)
            text = SECRET.sub(lambda found: (found[1] or "eyJ") + "…", text)
            parts = [CONTROL.sub(lambda found: ascii(found[0])[1:-1], part) for part in text.split("\n")]
            text = ("\n" if name == "exception" else "\\n").join(parts)
            line[name] = text if isinstance(value, str) or text != str(value) else value
    return line


def is_journal(environment: Mapping[str, str], stream: IO[str]) -> bool:
    """Whether the stream goes to systemd's journal. Source: JOURNAL_STREAM in systemd.exec(5)."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):  # closed, or not a file
        return False
    return environment.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def _in_order(_: object, __: str, line: MutableMapping[str, Any]) -> dict[str, Any]:
    first = {key: line[key] for key in ("timestamp", "level", "event") if key in line}
    return first | dict(line)


def _prioritised(render: Any) -> Any:
    def rendered(logger: object, name: str, line: MutableMapping[str, Any]) -> str:
        priority = PRIORITIES.get(line["level"], PRIORITIES["info"])
        return f"<{priority}>{render(logger, name, line)}"

    return rendered
