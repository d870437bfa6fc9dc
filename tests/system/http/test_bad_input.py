"""Every field in the API description, with every kind of wrong value: the answer is 400, names the field, and
nothing changes.

The cases are generated from the description, so a new route is tested as soon as it is described.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx2
import pytest

from broker.engine.keys import SCOPES
from tests.system.api_support import WITHIN_SEC, Served, description, is_stream, served

DOCUMENT = description()
OPERATIONS = {
    f"{method.upper()} {path}": operation
    for path, item in DOCUMENT["paths"].items()
    for method, operation in item.items()
    if not is_stream(operation)
}
KINDS: dict[str, Any] = {
    "null": None,
    "boolean": True,
    "integer": 1,
    "number": 1.5,
    "string": "x",
    "array": [],
    "object": {},
}
NOT_NAMES = ("", "a b", "x" * 65, "../up", "é", "a\n", "-a")
NOT_JSON = (b"", b"{", b"nonsense", b'"\xff"', b"\xef\xbb\xbf{}", b"NaN", b"\x00", b"[" * 7_900, b"'a'")
# Wrong names in their URL-encoded form: not UTF-8, forbidden characters, too long.
NOT_IN_A_PATH = ("%FF", "%C3%28", "a%20b", "%00", "x" * 65, "%C3%A9", "a%0A")


class Fault(NamedTuple):
    """One request, and the one field in it that is wrong."""

    field: str
    path: str
    body: bytes | None = None
    query: str = ""
    header: str | None = None


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("api") / "data", quiet=True) as here:
        yield here


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in schema:
        found: dict[str, Any] = DOCUMENT["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        return found
    return schema


def branches(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """All schemas that a value may match, with unions flattened."""
    schema = resolved(schema)
    union = schema.get("anyOf") or schema.get("oneOf")
    return [schema] if union is None else [each for part in union for each in branches(part)]


def kinds(schema: dict[str, Any]) -> set[str]:
    """The JSON types that a value may have; all of them if the schema names none."""
    if "enum" in schema or "const" in schema:
        return {"string"}
    given = schema.get("type", list(KINDS))
    named = {given} if isinstance(given, str) else set(given)
    return named | {"integer"} if "number" in named else named


def misfits(schema: dict[str, Any]) -> Iterator[Any]:
    """Values that do not fit the schema."""
    fits = branches(schema)
    allowed = set().union(*map(kinds, fits))
    yield from (value for kind, value in KINDS.items() if kind not in allowed)
    for fit in fits:
        if "minimum" in fit:
            yield fit["minimum"] - 1
        if "maximum" in fit:
            yield from (fit["maximum"] + 1, 10**40)
        if "minLength" in fit:
            yield "x" * (fit["minLength"] - 1)
        if "maxLength" in fit:
            yield "x" * (fit["maxLength"] + 1)
        if "pattern" in fit:
            yield from NOT_NAMES
        if "enum" in fit:
            yield from ("nonsense", "")
        if "maxItems" in fit:
            yield [None] * (fit["maxItems"] + 1)
        if fit.get("minItems"):
            yield []
        if fit.get("type") == "array" and "items" in fit:
            yield from ([wrong] for wrong in misfits(fit["items"]))


def wrong_bodies(operation: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    body = operation["requestBody"]
    content = body["content"]["application/json"]
    example = content["example"]
    for fit in branches(content["schema"]):
        for field, schema in fit.get("properties", {}).items():
            for value in misfits(schema):
                yield field, json.dumps(example | {field: value}).encode()
        if fit.get("additionalProperties") is False:
            yield "no_such_field", json.dumps(example | {"no_such_field": 1}).encode()
        for field in fit.get("required", []):
            yield (
                field,
                json.dumps({name: value for name, value in example.items() if name != field}).encode(),
            )
    for value in misfits(content["schema"]):
        yield "body", json.dumps(value).encode()
    for text in NOT_JSON:
        if text or body["required"]:
            yield "body", text


def wrong_texts(schema: dict[str, Any]) -> Iterator[str]:
    """Wrong values of a query parameter, URL-encoded."""
    yield "%FF"
    kind = schema.get("type")
    if kind == "integer":
        yield from ("x", "", "1.5", "9" * 400, "null", "true", "0x1", "+1")
        yield from (
            str(schema[key] + step) for key, step in (("minimum", -1), ("maximum", 1)) if key in schema
        )
    elif kind == "boolean":
        yield from ("x", "", "2", "null")
    elif "enum" in schema:
        yield from ("nonsense", "", "null")
    elif "pattern" in schema or "anyOf" in schema:
        yield from ("", "a%20b", "x" * 65, "%00", "%C3%A9")


def wrong_headers(schema: dict[str, Any]) -> Iterator[str]:
    if "minLength" in schema:
        yield ""
    if "maxLength" in schema:
        yield "x" * (schema["maxLength"] + 1)
    yield "\xff"


def faults(label: str, here: Served) -> Iterator[Fault]:
    """All wrong requests of an operation; each has one fault."""
    operation = OPERATIONS[label]
    template = label.partition(" ")[2]
    path = here.path(template)
    body = None
    if "requestBody" in operation:
        body = json.dumps(operation["requestBody"]["content"]["application/json"]["example"]).encode()
        for field, wrong in wrong_bodies(operation):
            yield Fault(field, path, wrong)
    for parameter in operation.get("parameters", []):
        name, schema = parameter["name"], parameter["schema"]
        if parameter["in"] == "path":
            for text in NOT_IN_A_PATH:
                yield Fault(name, here.path(template, **{name: text}), body)
        elif parameter["in"] == "query":
            for text in wrong_texts(schema):
                yield Fault(name, path, body, f"{name}={text}")
            yield Fault(name, path, body, f"{name}=1&{name}=1")
        else:
            # A value given in both the body and the header must be equal, so only one of the two is set.
            alone = {
                key: value
                for key, value in json.loads(body or b"{}").items()
                if not names_the_field(name, key)
            }
            for text in wrong_headers(schema):
                yield Fault(name, path, body and json.dumps(alone).encode(), header=text)


def names_the_field(field: str, found: str) -> bool:
    """Whether the error names the field. HTTP headers ignore case; a nested path starts with the field's
    name."""
    field, found = (name.lower().replace("-", "_") for name in (field, found))
    return found == field or found.startswith((f"{field}.", f"{field}["))


def ask(client: httpx2.Client, method: str, fault: Fault) -> httpx2.Response:
    headers = []
    if fault.header is not None:
        headers.append((fault.field.encode(), fault.header.encode("latin-1")))
    if fault.body is not None:
        headers.append((b"Content-Type", b"application/json"))
    query = f"?{fault.query}" if fault.query else ""
    return client.request(method, fault.path + query, headers=headers, content=fault.body)


@pytest.mark.parametrize("label", OPERATIONS)
def test_a_wrong_value_is_named_and_changes_nothing(label: str, here: Served) -> None:
    before, found = here.position(), []
    with here.client() as client:
        for fault in faults(label, here):
            answer = ask(client, label.partition(" ")[0], fault)
            details = answer.json().get("error", {}).get("details", {})
            if answer.status_code != 400 or not names_the_field(fault.field, details.get("field", "")):
                found.append((fault, answer.status_code, answer.text[:300]))
    assert not found, "\n".join(map(str, found))
    assert here.position() == before


def needs_a_key(label: str) -> bool:
    return bool(OPERATIONS[label].get("security") != [{}])


@pytest.mark.parametrize("label", [label for label in OPERATIONS if needs_a_key(label)])
def test_an_unknown_query_parameter_is_named_with_the_nearest_known_one(label: str, here: Served) -> None:
    method, _, template = label.partition(" ")
    parameters = OPERATIONS[label].get("parameters", [])
    known = [each["name"] for each in parameters if each["in"] == "query"]
    before = here.position()
    with here.client() as client:
        for wrong in ("colour", *(f"{name}x" for name in known)):
            answer = client.request(method, here.path(template), params={wrong: "1"})
            details = answer.json()["error"]["details"]
            assert (answer.status_code, details["field"]) == (400, wrong), answer.text
            assert all(name in details["reason"] for name in known)
            assert wrong == "colour" or f"did you mean `{wrong[:-1]}`?" in details["reason"]
    assert here.position() == before


@pytest.mark.parametrize("label", OPERATIONS)
def test_a_wrong_word_of_a_list_is_answered_with_the_whole_list(label: str, here: Served) -> None:
    method, _, template = label.partition(" ")
    with here.client() as client:
        for parameter in OPERATIONS[label].get("parameters", []):
            if "enum" in parameter["schema"]:
                answer = client.request(method, here.path(template), params={parameter["name"]: "nonsense"})
                reason = answer.json()["error"]["details"]["reason"]
                bare = [word for word in parameter["schema"]["enum"] if "." not in word]
                assert all(word in reason for word in bare), answer.text


@pytest.mark.parametrize("label", [label for label, found in OPERATIONS.items() if "requestBody" in found])
def test_a_compressed_body_is_refused(label: str, here: Served) -> None:
    method, _, template = label.partition(" ")
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    with here.client() as client:
        answer = client.request(method, here.path(template), content=gzip.compress(b"{}"), headers=headers)
    assert answer.status_code == 415
    assert "Content-Encoding" in answer.json()["error"]["message"]


@pytest.mark.parametrize("label", [label for label, found in OPERATIONS.items() if "requestBody" in found])
def test_a_body_of_another_type_or_size_is_refused(label: str, here: Served) -> None:
    method, _, template = label.partition(" ")
    path = here.path(template)
    before = here.position()
    with here.client() as client:
        for kind in ("text/plain", "application/x-www-form-urlencoded", "application/cbor", ""):
            assert (
                client.request(method, path, content=b"{}", headers={"Content-Type": kind}).status_code == 415
            )
        large = client.request(
            method, path, content=b" " * 5_000_000, headers={"Content-Type": "application/json"}
        )
        assert large.status_code == 413
    assert here.position() == before


@pytest.mark.parametrize(
    "label", [label for label, found in OPERATIONS.items() if found.get("security") != [{}]]
)
def test_requests_without_the_key_or_the_required_scope_are_refused(label: str, here: Served) -> None:
    method, _, template = label.partition(" ")
    path, operation = here.path(template), OPERATIONS[label]
    scopes = operation["security"][0]["bearer"]
    lacking = [
        here.new_key("acme", *(other for other in SCOPES if other not in (scope, "admin")))
        for scope in scopes
    ]
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("example")
    before = here.position()
    with httpx2.Client(base_url=here.url, timeout=WITHIN_SEC, verify=False) as client:
        for headers, status in (
            ({}, 401),
            ({"X-API-Key": ""}, 401),
            ({"Authorization": "Bearer sk_live_none"}, 401),
            ({"Authorization": f"Basic {here.key}"}, 401),
            *(({"Authorization": f"Bearer {key}"}, 403) for key in lacking),
            *(({"X-API-Key": key}, 403) for key in lacking),
        ):
            answer = client.request(method, path, headers=headers, json=body)
            assert answer.status_code == status, (headers, answer.text)
            assert str(status) in operation["responses"]
    assert here.position() == before


def test_every_body_example_has_all_required_fields() -> None:
    """test_a_wrong_value_is_named_and_changes_nothing builds its wrong bodies from these examples."""
    for label, operation in OPERATIONS.items():
        if "requestBody" in operation:
            content = operation["requestBody"]["content"]["application/json"]
            required = {field for fit in branches(content["schema"]) for field in fit.get("required", [])}
            assert required <= content["example"].keys(), label
