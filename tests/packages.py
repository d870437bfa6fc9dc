"""Programs and packages of npm that a test needs. It is skipped where they cannot be had."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "docs" / "examples"
# Kept from run to run: packages of npm take seconds to fetch.
PACKAGES = ROOT / ".venv" / "npm"
INSTALL_WITHIN_SEC = 400
HEADERS = ("mosquitto.h", "cjson/cJSON.h", "openssl/evp.h")


def need(*programs: str) -> None:
    for name in programs:
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed")


def node_modules(example: Path) -> Path:
    """The packages of an example, installed once and kept; skips where npm cannot install them."""
    need("node", "npm")
    wanted = (example / "package.json").read_bytes()
    home = PACKAGES / hashlib.sha256(wanted).hexdigest()[:16]
    home.mkdir(parents=True, exist_ok=True)
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / "complete").exists():
            (home / "package.json").write_bytes(wanted)
            command = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--silent"]
            try:
                subprocess.run(command, cwd=home, check=True, capture_output=True, timeout=INSTALL_WITHIN_SEC)
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                pytest.skip(f"npm cannot install {example.name}: {error}")
            (home / "complete").touch()
    return home / "node_modules"


def python_packages(example: Path) -> Path:
    """The packages of an example in Python, installed once and kept; skips where pip cannot install them."""
    wanted = (example / "requirements.txt").read_bytes()
    home = ROOT / ".venv" / "pip" / hashlib.sha256(wanted).hexdigest()[:16]
    home.mkdir(parents=True, exist_ok=True)
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / "complete").exists():
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(home / "packages")]
            command += ["-r", str(example / "requirements.txt")]
            try:
                subprocess.run(command, check=True, capture_output=True, timeout=INSTALL_WITHIN_SEC)
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                pytest.skip(f"pip cannot install {example.name}: {error}")
            (home / "complete").touch()
    return home / "packages"


def has_c(*headers: str) -> None:
    """`headers`: those that the program needs; else all that the examples need."""
    need("cc")
    for header in headers or HEADERS:
        found = subprocess.run(["cc", "-E", "-include", header, "-xc", "/dev/null"], capture_output=True)
        if found.returncode != 0:
            pytest.skip(
                f"{header} is not installed (Debian: apt install libmosquitto-dev libcjson-dev libssl-dev)"
            )
