"""`make sbom`: the components of a broker as CycloneDX 1.6 JSON, read from the lock of the run time.

The same lock gives the same bytes: there is no time, no serial number and no address in it. A component's
hashes are those of its files at the registry; one of them is what gets installed.
Source: https://cyclonedx.org/docs/1.6/json/, and package URLs as in https://github.com/package-url/purl-spec.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
TO = ROOT / "dist" / "sbom.cdx.json"


class Pinned(NamedTuple):
    """One package of a lock. `parents`: who needs it; none: it only builds. `marker`: where it is needed."""

    name: str
    version: str
    marker: str
    hashes: list[str]
    parents: list[str]


def main() -> None:
    parser = argparse.ArgumentParser(prog="make sbom", description="Writes the list of components.")
    parser.add_argument("--to", type=Path, default=TO, help="the file; its directory is made")
    to: Path = parser.parse_args().to
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(written((ROOT / "requirements.lock").read_text(), (ROOT / "pyproject.toml").read_text()))
    print(to)


def written(lock: str, project: str) -> str:
    """The document for a lock file and the project's own description."""
    ours = tomllib.loads(project)["project"]
    packages = pinned(lock)
    own = {
        "type": "application",
        "bom-ref": ours["name"],
        "name": ours["name"],
        "version": ours["version"],
        "description": ours["description"],
        "licenses": [{"license": {"id": ours["license"]}}],
        "purl": purl(ours["name"], ours["version"]),
    }
    needs: dict[str, list[str]] = {name: [] for name in (ours["name"], *(each.name for each in packages))}
    for package in packages:
        for parent in package.parents or [ours["name"]]:
            needs[parent].append(package.name)
    found = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": own},
        "components": [component(package) for package in packages],
        "dependencies": [{"ref": name, "dependsOn": needed} for name, needed in sorted(needs.items())],
    }
    return json.dumps(found, indent=2) + "\n"


def component(package: Pinned) -> dict[str, Any]:
    url = purl(package.name, package.version)
    hashes = [{"alg": "SHA-256", "content": each} for each in package.hashes]
    made: dict[str, Any] = {
        "type": "library",
        "bom-ref": package.name,
        "name": package.name,
        "version": package.version,
        "scope": "excluded" if not package.parents else "optional" if package.marker else "required",
        "purl": url,
        "externalReferences": [{"type": "distribution", "url": url, "hashes": hashes}],
    }
    if package.marker:
        made["properties"] = [{"name": "python:marker", "value": package.marker}]
    return made


def purl(name: str, version: str) -> str:
    return f"pkg:pypi/{name}@{version}"


def pinned(lock: str) -> list[Pinned]:
    """The packages of a lock file that `make lock` wrote.

    Raises:
        ValueError: a line has another form.
    """
    found: list[Pinned] = []
    for line in lock.splitlines():
        text = line.strip().removesuffix("\\").strip()
        if text.startswith("--hash=sha256:"):
            found[-1].hashes.append(text.removeprefix("--hash=sha256:"))
        elif text.startswith("#"):
            parent = text.removeprefix("#").strip().removeprefix("via").strip().partition(" ")[0]
            found[-1].parents.extend([parent] if parent else [])
        elif text:
            pin, _, marker = text.partition(";")
            name, equal, version = pin.strip().partition("==")
            if not equal:
                raise ValueError(f"not a pinned package: {line!r}")
            found.append(Pinned(name, version, marker.strip(), [], []))
    return found


if __name__ == "__main__":
    main()
