"""Sends generated requests to the API: many that its description allows, and many that it forbids."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from tests.system.api_support import Served, description, is_stream, served

if TYPE_CHECKING:  # only these tests need it, and it takes 0.7 s of CPU to load
    from requests import Session
    from schemathesis import Case, CheckContext, Response

# Set EXAMPLES=2000 by hand to find rare faults; the default of 15 keeps the daily run short.
EXAMPLES = int(os.environ.get("EXAMPLES", "15"))
# Fields that may be refused although they match the schema, because the broker judges them by its state or by
# another field.
BEYOND_A_SCHEMA = {
    "cursor", "type", "command", "device_type", "params", "all", "project", "start", "end", "as_of", "from",
    "to", "url", "device", "after", "Last-Event-ID", "expires_at", "expires_in_sec", "devices",
    "device_prefixes", "answer_key", "signed", "gateway",
}  # fmt: skip

OPERATIONS = [
    (method, path)
    for path, item in description()["paths"].items()
    for method, operation in item.items()
    if not is_stream(operation)
]


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Served]:
    with served(tmp_path / "data") as here:
        yield here


def fit_data_is_refused_only_for_what_a_schema_cannot_say(
    context: CheckContext, response: Response, case: Case[Any]
) -> None:
    if case.meta is not None and case.meta.generation.mode.is_positive and response.status_code == 400:
        details = response.json()["error"]["details"]
        # In JSON Schema 5.0 is an integer; the broker reads it as a float and refuses it.
        if not re.search(r"whole number.*\(got -?[0-9]+\.0\)$", details["reason"]):
            assert details["field"].partition(".")[0] in BEYOND_A_SCHEMA, response.text


def faults_are_named(context: CheckContext, response: Response, case: Case[Any]) -> None:
    if response.status_code == 400:
        details = response.json()["error"]["details"]
        assert details["field"]
        assert details["reason"]


def name_what_is_there(case: Case[Any], here: Served) -> None:
    """Generated names fit no known object: replaces those of odd length with known ones. Removes the
    Idempotency-Key header if the body has a key too, because two keys contradict. Removes `wait`: it would
    only take time; test_waits.py has it."""
    case.query.pop("wait", None)
    if isinstance(case.body, dict) and "idempotency_key" in case.body:
        case.headers.pop("Idempotency-Key", None)
    for name, known in (("device", here.devices), ("command_id", here.commands)):
        given = case.path_parameters.get(name)
        if isinstance(given, str) and len(given) % 2:
            case.path_parameters[name] = known[sum(given.encode()) % len(known)]


def behaves_as_described(case: Case[Any], here: Served, session: Session) -> None:
    if case.meta is not None and case.meta.generation.mode.is_positive:
        name_what_is_there(case, here)
    from schemathesis.checks import positive_data_acceptance

    case.call_and_validate(
        base_url=here.url,
        session=session,
        headers={"Authorization": f"Bearer {here.key}"},
        timeout=120,
        additional_checks=[fit_data_is_refused_only_for_what_a_schema_cannot_say, faults_are_named],
        excluded_checks=[positive_data_acceptance],
    )


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_every_operation_behaves_as_described(method: str, path: str, here: Served) -> None:
    """Does not use `schema.parametrize()`: that makes the cases of all operations while tests are collected,
    which takes seconds in every worker."""
    import schemathesis
    from requests import Session
    from schemathesis.core.result import Ok
    from schemathesis.pytest.lazy import get_all_tests

    schema = schemathesis.openapi.from_dict(description()).include(method=method.upper(), path=path)
    [made] = get_all_tests(
        schema=schema,
        test_func=behaves_as_described,
        settings=settings(
            max_examples=EXAMPLES,
            derandomize=EXAMPLES == 15,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
        given_kwargs=None,
    )
    assert isinstance(made, Ok)
    _, run = made.ok()
    with Session() as session:
        session.trust_env = False  # a fifth of a request is to look for proxies and a .netrc
        run(here=here, session=session)
