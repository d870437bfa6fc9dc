"""`make audit`: security lints (ruff's S rules, bandit), and known vulnerabilities of the locked packages.

pip-audit says "no known vulnerabilities" even if it could ask about no package at all. Here each skipped
package is a failure: exit code 1 for a finding, 3 if the list of vulnerabilities cannot be asked.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ROOMS = ["broker", "devices", "projections"]
LOCKS = ["requirements.lock", "requirements-dev.lock"]
ASK_WITHIN_SEC = 600


def main() -> int:
    # pyproject.toml selects the S rules. It also says which of them are off, and why.
    code = passes("ruff", "check", *ROOMS)
    code |= passes("bandit", "--quiet", "--configfile", "pyproject.toml", "--recursive", *ROOMS)
    return code or max(vulnerable(lock) for lock in LOCKS)


def passes(tool: str, *options: str) -> int:
    """0 if a tool finds nothing; else 1, and its findings are printed."""
    done = subprocess.run(
        [sys.executable, "-m", tool, *options], cwd=ROOT, capture_output=True, text=True, check=False
    )
    print(f"{tool}: {'nothing found' if not done.returncode else 'found something'}")
    if done.returncode:
        print(done.stdout + done.stderr)
    return int(done.returncode != 0)


def vulnerable(lock: str) -> int:
    """Asks about every package of a lock. 0: no vulnerability is known; 1: one is; 3: not all were asked."""
    command = [
        "pip_audit",
        "--disable-pip",
        "--require-hashes",
        "--format",
        "json",
        "--progress-spinner",
        "off",
    ]
    done = subprocess.run(
        [sys.executable, "-m", *command, "--requirement", lock],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=ASK_WITHIN_SEC,
    )
    code, sentence = judged(done.stdout, done.stderr)
    print(f"pip-audit, {lock}: {sentence}")
    return code


def judged(answer: str, errors: str) -> tuple[int, str]:
    """The exit code and a sentence for what pip-audit printed."""
    try:
        packages: list[dict[str, Any]] = json.loads(answer)["dependencies"]
    except (ValueError, KeyError, TypeError):
        last = (errors.strip().splitlines() or ["it said nothing"])[-1]
        return 3, f"NOT CHECKED: the list of known vulnerabilities cannot be asked ({last[:200]})"
    found = [
        f"{package['name']} {package['version']}: {fault['id']}"
        for package in packages
        for fault in package.get("vulns", [])
    ]
    if found:
        return 1, "known vulnerabilities: " + ", ".join(found)
    skipped = [package for package in packages if "skip_reason" in package]
    if skipped or not packages:
        why = skipped[0]["skip_reason"] if skipped else "it named no package"
        return 3, f"NOT CHECKED: {len(skipped)} of {len(packages)} packages were skipped ({why})"
    return 0, f"no known vulnerability in {len(packages)} packages"


if __name__ == "__main__":
    sys.exit(main())
