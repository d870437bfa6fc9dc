"""Reads a page of the documentation and runs its examples in order, as a reader would.

The language, the title and the comment above a block decide how it is run, so a new page needs no code here.
`docs/CONTRIBUTING.md`, "Pages that run", has the rules for authors of pages.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import io
import json
import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml  # type: ignore[import-untyped]

from tests.sdk_driver import node
from tests.system import zygote
from tests.system.conftest import NewBroker
from tests.system.support import ORDAIN, ROOT, WITHIN_SEC, Broker, Process, environment, until

RUN = {"sh", "python", "js"}
READ = {"json", "toml", "yaml"}
# What runs these is not Ordain.
SHOWN = {"text", "c", "ini", "nginx", "caddyfile", "dockerfile", "html", "http", "sql"}
DIRECTIVES = {"broker", "setup", "skip", "background", "until", "fails"}
FOUND = re.compile(
    r"^<!-- (?P<comment>.*?)\s*-->$"
    r'|^(?P<indent> *)```(?P<language>[\w-]*)(?: +title="(?P<title>[^"]*)")?\n(?P<text>.*?)^(?P=indent)```$',
    re.MULTILINE | re.DOTALL,
)
STARTS = re.compile(r"make run|(?:\.venv/bin/)?ordain serve\b(.*)")
# The tests choose these themselves.
OWN_OPTIONS = {"--http", "--mqtt-listen", "--data"}
# Texts that differ from run to run, and their replacements.
VOLATILE = (
    (r"\b([a-z]{2,4}_)[0-9a-z]{26}\b", r"\1▮"),
    (r"(sk_live_|dtok_|whsec_)[\w/+=-]{16,}", r"\1▮"),
    (r"eyJ[\w-]+\.[\w-]+\.[\w-]+", "eyJ▮"),
    (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:\.\d+)?(?:Z|\+00:00)?", "▮T"),
    (r"\b1\d{12}\b", "▮M"),  # milliseconds since 1970
    (r"\b[0-9a-f]{64}\b", "▮H"),
    (r"(?<![\w-])[\w-]{43}(?![\w-])", "▮K"),  # 32 bytes in base64url
)
SECRET = r"(sk_live_|dtok_|whsec_|eyJ)[\w/+=-]{16,}(?:\.[\w-]+)*"
LINE = 100


@dataclass
class Block:
    """One fenced block of a page, with the directives of the comments above it."""

    language: str
    title: str
    indent: str
    text: str
    start: int
    end: int
    line: int
    directives: dict[str, str] = field(default_factory=dict)

    @property
    def is_answer(self) -> bool:
        return self.title == "Answer"

    def __str__(self) -> str:
        return f"line {self.line}, {self.language}: {self.text.strip()}"


def blocks_of(page: str) -> Iterator[Block]:
    """Every block of a page except those that a script generates: they are tested at their source."""
    drawn = False
    directives: dict[str, str] = {}
    for found in FOUND.finditer(page):
        line = page.count("\n", 0, found.start()) + 1
        comment = found["comment"]
        if comment is None:
            if not drawn:
                text = "".join(
                    part.removeprefix(found["indent"]) for part in found["text"].splitlines(keepends=True)
                )
                yield Block(
                    found["language"],
                    found["title"] or "",
                    found["indent"],
                    text,
                    *found.span(),
                    line,
                    directives,
                )
            directives = {}
        elif "drawn by" in comment or comment.startswith("/"):
            drawn = not comment.startswith("/")
        else:
            name, _, value = comment.partition(":")
            assert name in DIRECTIVES, f"line {line}: {name!r} is none of {sorted(DIRECTIVES)}"
            directives[name] = value.strip()


def one_module(blocks: list[Block]) -> list[Block]:
    """Joins the JavaScript blocks into one, at the place of the last: a module cannot be run in parts."""
    parts = [block for block in blocks if block.language == "js" and not block.title and not block.directives]
    if len(parts) < 2:
        return blocks
    whole = replace(parts[-1], text="".join(block.text for block in parts))
    return [whole if block is parts[-1] else block for block in blocks if block not in parts[:-1]]


def fits(shown: Block, printed: str) -> bool:
    """Whether an answer on a page matches the printed one.

    `…` stands for anything. Layout, ids, times and keys may differ, and in a text also numbers.
    """
    parts = [re.escape(_plain(part, shown.language)) for part in shown.text.split("…")]
    return re.fullmatch(".*".join(parts), _plain(printed, shown.language)) is not None


def _plain(text: str, language: str) -> str:
    for pattern, kept in VOLATILE:
        text = re.sub(pattern, kept, text)
    if language == "text":
        text = re.sub(r"\d+(?:[.,]\d+)*", "▮", text)
    return re.sub(r"\s", "", text)


def laid_out(printed: str) -> tuple[str, str]:
    """The language and text of an answer as a page shows it: JSON with line breaks, tokens cut short."""
    printed = re.sub(SECRET, r"\1…", printed.strip())
    try:
        values = [json.loads(line) for line in printed.splitlines()]
    except ValueError:
        return "text", printed + "\n"
    return "json", "".join(_json(value) + "\n" for value in values)


def _json(value: Any, indent: str = "") -> str:
    short = json.dumps(value, ensure_ascii=False)
    if len(indent + short) <= LINE or not isinstance(value, dict | list) or not value:
        return short
    deeper = indent + "  "
    if isinstance(value, list):
        return "[\n" + ",\n".join(deeper + _json(item, deeper) for item in value) + f"\n{indent}]"
    members = [f"{deeper}{json.dumps(key)}: {_json(item, deeper)}" for key, item in value.items()]
    return "{\n" + ",\n".join(members) + f"\n{indent}}}"


class Reader:
    """Follows one page like a reader: with a directory, a shell, a Python session and a broker."""

    def __init__(self, new_broker: NewBroker, home: Path) -> None:
        self._new_broker = new_broker
        self._home = home
        self._state = home / ".shell"
        self._variables: dict[str, str] = {}
        self._broker: Broker | None = None
        self._names: dict[str, Any] = {"__name__": "__main__"}
        self._session: asyncio.Runner | None = None
        self._background: list[Process] = []
        (home / "docs").symlink_to(ROOT / "docs")
        (home / ".venv").symlink_to(Path(ORDAIN).parents[1])

    def close(self) -> None:
        for process in self._background:
            process.kill()
        if self._session is not None:
            self._session.close()

    def run(self, block: Block) -> str:
        """What a block prints."""
        if "broker" in block.directives:
            self._start(block.directives["broker"])
        if setup := block.directives.get("setup"):
            self._shell(setup)
        if block.title:
            file = self._home / block.title
            file.parent.mkdir(parents=True, exist_ok=True)
            # A settings file is there before the broker that reads it, and its addresses with it.
            file.write_text(block.text if block.language == "toml" else self._here(block.text))
            return ""
        if block.language == "python":
            return self._there(self._python(block.text))
        if block.language == "js":
            return self._there(self._javascript(block.text))
        if found := STARTS.fullmatch(block.text.strip()):
            welcome = self._start("--demo" if found[1] is None else found[1])
            return welcome if found[1] is None else ""
        if "background" in block.directives:
            script = self._script("exec " + block.text)
            self._background.append(Process("bash", "-euc", script, cwd=self._home, env=self._environment()))
            return ""
        if words := block.directives.get("until"):
            return until(lambda: self._holds(block, words), block)
        return self._there(self._shell(block.text, fails="fails" in block.directives))

    def _holds(self, block: Block, words: str) -> str | None:
        printed = self._there(self._shell(block.text))
        return printed if words in printed else None

    def _start(self, options: str) -> str:
        """Starts a broker, in place of the one before; what it prints for whoever started it."""
        if self._broker is not None:
            self._broker.end()
        words = shlex.split(options)
        chosen = [
            word
            for at, word in enumerate(words)
            if word not in OWN_OPTIONS and (at == 0 or words[at - 1] not in OWN_OPTIONS)
        ]
        self._broker = self._new_broker().start(*chosen)
        if "--demo" not in chosen:
            return ""
        key = self._broker.run.out.wait("export KEY=")
        self._variables["KEY"] = key.strip().removeprefix("export KEY=")
        self._broker.run.out.wait("# docs")
        return self._there(self._broker.run.out.so_far())

    def _environment(self) -> dict[str, str]:
        if self._broker is None:
            self._start("--demo")
        assert self._broker is not None
        places = [str(zygote.program(ORDAIN).parent), str(Path(ORDAIN).parent), os.environ["PATH"]]
        return (
            environment(
                PATH=os.pathsep.join(places), ORDAIN_DATA=str(self._broker.data), PYTHONPATH=str(ROOT)
            )
            | self._variables
        )

    def _script(self, text: str) -> str:
        self._environment()
        assert self._broker is not None
        mqtt = f"-p {self._broker.mqtt_port}"
        before = [
            'curl() { command curl "$@"; echo; }',
            *(f'{tool}() {{ command {tool} "$@" {mqtt}; }}' for tool in ("mosquitto_sub", "mosquitto_pub")),
            f"[ ! -f {self._state} ] || . {self._state}",
        ]
        return "\n".join([*before, self._here(text)])

    def _shell(self, text: str, *, fails: bool = False) -> str:
        script = self._script(text) + f"\nexport -p > {self._state}\n"
        done = subprocess.run(
            ["bash", "-euc", script], env=self._environment(), cwd=self._home, capture_output=True, text=True,
            timeout=WITHIN_SEC,
        )  # fmt: skip
        assert (done.returncode != 0) == fails, f"{text}\n{done.stdout}\n{done.stderr}"
        return done.stdout + (done.stderr if fails else "")

    def _exported(self) -> dict[str, str]:
        """The variables that the page has exported so far."""
        found = dict(self._environment())
        if self._state.exists():
            said = subprocess.run(
                ["bash", "-c", f". {self._state}; env -0"], capture_output=True, text=True, check=True
            )
            found |= dict(pair.split("=", 1) for pair in said.stdout.split("\0") if "=" in pair)
        return found

    def _python(self, text: str) -> str:
        """Blocks are one session, which may await wherever it likes."""
        self._session = self._session or asyncio.Runner()
        code = compile(self._here(text), "page.py", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        printed = io.StringIO()
        with redirect_stdout(printed), patch.dict(os.environ, self._exported()):
            result = eval(code, self._names)
            if inspect.isawaitable(result):
                self._session.run(_awaited(result))
        return printed.getvalue()

    def _javascript(self, text: str) -> str:
        (self._home / "page.mjs").write_text(self._here(text))
        done = subprocess.run(
            [node(), "page.mjs"], env=self._exported(), cwd=self._home, capture_output=True, text=True,
            timeout=WITHIN_SEC,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def _here(self, text: str) -> str:
        """A text of the page with the addresses of this broker, and with an `ordain` that starts quickly."""
        self._environment()
        assert self._broker is not None
        text = text.replace(".venv/bin/ordain", str(zygote.program(ORDAIN)))
        text = text.replace("127.0.0.1:8080", self._broker.url.removeprefix("http://"))
        return text.replace("127.0.0.1:1883", f"127.0.0.1:{self._broker.mqtt_port}")

    def _there(self, text: str) -> str:
        """What was printed, with the addresses of the page."""
        assert self._broker is not None
        text = text.replace(self._broker.url.removeprefix("http://"), "127.0.0.1:8080")
        text = text.replace(f"127.0.0.1:{self._broker.mqtt_port}", "127.0.0.1:1883")
        text = text.replace(ORDAIN, ".venv/bin/ordain").replace(str(self._broker.data), "data")
        return text.replace(str(self._home), ".")


async def _awaited(result: Any) -> Any:
    return await result


def check_read(block: Block) -> None:
    """Raises if a text that is only read is not what its language says."""
    if block.language == "yaml":
        list(yaml.safe_load_all(block.text))
    elif block.language == "toml":
        tomllib.loads(block.text)
    elif block.language == "json":
        text = block.text.replace("…", "x")
        try:
            json.loads(text)
        except ValueError:
            for line in text.splitlines():
                json.loads(line)
