"""`make fuzz`: feeds every door that takes input from outside with bytes, led by coverage (Atheris).

Exits with 1 if a target failed, and prints the input. What it learned is kept in `.fuzz`, so that the next
run goes on from there; `tests/fuzz/corpus.py` takes the best of it into the tests.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
KEPT = ROOT / ".fuzz"
FILES = ("settings", "types", "imports")  # their inputs are files, so they may be longer
INSTRUMENTED = ["broker", "devices", "projections", "jwt", "tomllib", "rfc8785"]
NAMES = ("packets", "answers", "topics", "grants", "cursors", "settings", "types", "imports")


def main() -> int:
    parser = argparse.ArgumentParser(prog="make fuzz", description="Searches for input that breaks a rule.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(NAMES)}; all if none")
    parser.add_argument("--seconds", type=int, default=600, help="how long each target runs")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # the process of one target
    asked = parser.parse_args()
    if importlib.util.find_spec("atheris") is None:
        print(
            "atheris is not made for this Python or machine; it is for Linux on x86_64, Python 3.11 to 3.14"
        )
        return 2
    if unknown := [name for name in asked.targets if name not in NAMES]:
        parser.error(f"unknown target {unknown[0]!r}; known are: {', '.join(NAMES)}")
    if asked.one:
        run(asked.targets[0], asked.seconds)
    failed = [name for name in asked.targets or NAMES if not succeeds(name, asked.seconds)]
    print(f"failed: {', '.join(failed)}" if failed else "no input broke a rule")
    return int(bool(failed))


def succeeds(name: str, seconds: int) -> bool:
    """Runs a target in a process of its own; prints its last words."""
    print(f"{name}: {seconds} s", flush=True)
    command = [sys.executable, "-m", "scripts.fuzz", name, "--seconds", str(seconds), "--one"]
    log = KEPT / f"{name}.log"
    KEPT.mkdir(exist_ok=True)
    with log.open("wb") as file:
        code = subprocess.run(command, stdout=file, stderr=file, cwd=ROOT, timeout=seconds + 600).returncode
    told = log.read_text(errors="replace").splitlines()
    shown = told[-40:] if code else [line for line in told if line.startswith(("Done", "#"))][-2:]
    print("\n".join(f"  {line}" for line in shown), flush=True)
    return code == 0


def run(name: str, seconds: int) -> None:
    """Fuzzes in this process, and ends it."""
    import atheris  # type: ignore[import-untyped, import-not-found, unused-ignore]

    with atheris.instrument_imports(include=INSTRUMENTED):
        from tests.fuzz.corpus import read
        from tests.fuzz.seeds import SEEDS, WORDS
        from tests.fuzz.targets import TARGETS
    learned, found, words = KEPT / name, KEPT / f"{name}-", KEPT / f"{name}.dict"
    learned.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate([*SEEDS[name](), *read(name)]):
        (learned / f"seed-{number}").write_bytes(data)
    quoted = ("".join(f"\\x{byte:02x}" for byte in word) for word in WORDS[name])
    words.write_text("".join(f'"{word}"\n' for word in quoted))
    options = [
        f"-max_total_time={seconds}",
        f"-max_len={4_096 if name in FILES else 512}",
        f"-dict={words}",
        f"-artifact_prefix={found}",
    ]
    atheris.Setup([sys.argv[0], str(learned), *options, "-timeout=60", "-rss_limit_mb=2048"], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
