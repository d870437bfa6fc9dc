"""`make audit` and `make sbom`: a skipped package is a failure, and the list of components is whole."""

from __future__ import annotations

import json
import re
from importlib import resources
from typing import Any

import jsonschema_rs
import pytest

from scripts.audit import ROOT, judged
from scripts.sbom import pinned, written

GOOD = {"name": "a", "version": "1", "vulns": []}
SKIPPED = {"name": "b", "skip_reason": "Dependency not found on PyPI and could not be audited: b (2)"}


def document() -> dict[str, Any]:
    lock, project = (ROOT / "requirements.lock").read_text(), (ROOT / "pyproject.toml").read_text()
    assert written(lock, project) == written(lock, project)
    found: dict[str, Any] = json.loads(written(lock, project))
    return found


def cyclonedx() -> jsonschema_rs.Validator:
    """The schema of CycloneDX 1.6, from its own library, with the two that it refers to."""
    folder = resources.files("cyclonedx") / "schema" / "_res"
    files = [f"{name}.SNAPSHOT.schema.json" for name in ("bom-1.6", "spdx", "jsf-0.82")]
    schemas = {file: json.loads((folder / file).read_text()) for file in files}
    registry = jsonschema_rs.Registry(
        [(f"http://cyclonedx.org/schema/{file}", schema) for file, schema in schemas.items()]
    )
    return jsonschema_rs.validator_for(schemas[files[0]], registry=registry)


def test_the_list_of_components_is_cyclonedx() -> None:
    validator, found = cyclonedx(), document()

    assert [error.message for error in validator.iter_errors(found)] == []
    wrong = found | {"components": [{"type": "library"}]}
    assert not validator.is_valid(wrong)


def test_the_list_of_components_holds_every_package_of_the_lock_with_its_version_and_hashes() -> None:
    lock, found = (ROOT / "requirements.lock").read_text(), document()["components"]

    names = re.findall(r"^([a-z0-9-]+)==(\S+)", lock, re.MULTILINE)
    assert [(each["name"], each["version"]) for each in found] == names
    hashes = [one["content"] for each in found for one in each["externalReferences"][0]["hashes"]]
    assert hashes == re.findall(r"--hash=sha256:(\w{64})", lock)


def test_every_component_is_needed_by_ordain_or_by_one_that_is() -> None:
    needs = {each["ref"]: each["dependsOn"] for each in document()["dependencies"]}
    reached, ahead = set[str](), ["ordain"]
    while ahead:
        name = ahead.pop()
        if name not in reached:
            reached.add(name)
            ahead += needs[name]

    assert set(needs) == reached


def test_a_line_that_pins_nothing_is_no_lock() -> None:
    with pytest.raises(ValueError, match="not a pinned package"):
        pinned("litestar>=2\n")


@pytest.mark.parametrize(
    ("packages", "code", "said"),
    [
        ([GOOD], 0, "no known vulnerability in 1 packages"),
        ([GOOD, SKIPPED], 3, "NOT CHECKED: 1 of 2 packages were skipped (Dependency not found"),
        ([], 3, "NOT CHECKED"),
        ([SKIPPED, GOOD | {"vulns": [{"id": "PYSEC-1"}]}], 1, "a 1: PYSEC-1"),
    ],
)
def test_a_skipped_package_is_a_failure(packages: list[Any], code: int, said: str) -> None:
    found, sentence = judged(json.dumps({"dependencies": packages}), "No known vulnerabilities found")

    assert found == code
    assert said in sentence


def test_a_service_that_cannot_be_reached_is_a_failure_in_one_line() -> None:
    code, sentence = judged("", "Traceback\n  …\nConnectionError: no route to host\n")

    assert code == 3
    assert "NOT CHECKED" in sentence
    assert "no route to host" in sentence
    assert "\n" not in sentence
