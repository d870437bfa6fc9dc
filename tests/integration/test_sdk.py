"""Both SDKs against a scripted server: the requests they send, and how they handle answers that come late,
twice, in pieces or not at all."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from broker.client import App, AppError
from broker.client_types import ERRORS
from broker.http.edge.errors import STATUS
from tests.sdk_driver import LANGUAGES, Thrown, sdk
from tests.streams import stream_server

CUT = b""
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
SEND = {"name": "reboot", "device_ident": ["sensor_01"], "data": {"force": False}}
SENT = {"sensor_01": {"sent": True, "command_id": "cmd_1"}}


def answer(status: int, body: object, **headers: str) -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    told = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return (
        f"HTTP/1.1 {status} -\r\ncontent-length: {len(content)}\r\nconnection: close\r\n{told}\r\n".encode()
        + content
    )


def refusal(status: int, code: str, message: str = "so it is", **more: object) -> dict[str, object]:
    return {"error": {"code": code, "message": message, **more}}


LOG, OTHER_LOG = "log_" + "1" * 26, "log_" + "2" * 26


def event(position: int, type: str = "executed", log: str | None = None, **data: object) -> bytes:
    told = {"id": str(position), "type": f"ordain.command.{type}.v1", "subject": "cmd_1", "data": data}
    where = position if log is None else f"{log}:{position}"
    return f"id: {where}\ndata: {json.dumps(told, ensure_ascii=False)}\n\n".encode()


@dataclass(frozen=True)
class Asked:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: Any


class Script:
    """Answers each request with the next answer of the script; the last one is repeated."""

    def __init__(self, answers: Sequence[bytes | list[bytes]]) -> None:
        self.asked: list[Asked] = []
        self._answers = answers
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            request, *lines = head.split("\r\n")
            method, target, _ = request.split(" ")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            parts = urlsplit(target)
            query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            asked = Asked(method, parts.path, query, headers, json.loads(body) if body else None)
            self.asked.append(asked)
            pieces = self._answers[min(len(self.asked), len(self._answers)) - 1]
            for piece in [pieces] if isinstance(pieces, bytes) else pieces:
                writer.write(piece)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            return
        finally:
            writer.close()


@asynccontextmanager
async def server(*answers: bytes | list[bytes]) -> AsyncIterator[Script]:
    script = Script(answers)
    async with stream_server(script.serve) as port:
        script.url = f"http://127.0.0.1:{port}"
        yield script


pytestmark = pytest.mark.parametrize("language", LANGUAGES)


async def test_send_uses_the_key_and_a_new_idempotency_key(language: str) -> None:
    async with server(answer(200, SENT)) as script:
        first = await sdk(language, script.url, "sk_live_mine").send(SEND)
        await sdk(language, script.url, "sk_live_mine").send(SEND)
    assert first.answer == SENT
    asked, again = script.asked
    assert (asked.method, asked.path) == ("POST", "/v1/app/command/send")
    assert asked.headers["authorization"] == "Bearer sk_live_mine"
    assert asked.headers["content-type"] == "application/json"
    assert asked.body.pop("idempotency_key") != again.body.pop("idempotency_key")
    assert asked.body == SEND


async def test_a_base_path_in_the_url_is_kept(language: str) -> None:
    async with server(answer(200, SENT)) as script:
        await sdk(language, f"{script.url}/ordain/").send(SEND)
    assert script.asked[0].path == "/ordain/v1/app/command/send"


TROUBLE = {
    "cut": CUT,
    "cut in the answer": answer(200, SENT)[:-3],
    "503": answer(503, refusal(503, "unavailable")),
    "a proxy's 502": answer(502, b"<h1>Bad gateway</h1>"),
    "429": answer(429, refusal(429, "rate_limit_exceeded"), retry_after="0"),
    "408": answer(408, refusal(408, "invalid_request")),
}


@pytest.mark.parametrize("trouble", TROUBLE.values(), ids=TROUBLE)
async def test_temporary_failures_are_retried_with_the_same_idempotency_key(
    language: str, trouble: bytes
) -> None:
    async with server(trouble, trouble, answer(200, SENT)) as script:
        outcome = await sdk(language, script.url).send(SEND)
    assert outcome.answer == SENT
    assert len(script.asked) == 3
    assert len({asked.body["idempotency_key"] for asked in script.asked}) == 1


async def test_retries_are_limited_and_the_error_has_the_key_that_completes_the_call(language: str) -> None:
    async with server(CUT) as script:
        outcome = await sdk(language, script.url, retries=2).send(SEND)
    assert len(script.asked) == 3
    assert (outcome.error["name"], outcome.error["status"]) == ("Unavailable", None)
    assert outcome.error["idempotency_key"] == script.asked[0].body["idempotency_key"]


async def test_retry_after_is_respected_and_a_long_one_ends_the_call(
    language: str,
) -> None:
    busy = answer(429, refusal(429, "rate_limit_exceeded"), retry_after="60")
    async with server(busy) as script:
        outcome = await sdk(language, script.url).send(SEND)
    assert (outcome.error["name"], outcome.error["retry_after"]) == ("RateLimited", 60)
    assert len(script.asked) == 1


@pytest.mark.parametrize(("code", "status"), [(c, s) for c, s in STATUS.items() if s < 500 and s != 429])
async def test_a_refusal_is_a_typed_error_and_is_not_retried(language: str, code: str, status: int) -> None:
    details = {"field": "name", "reason": "is required"}
    async with server(answer(status, refusal(status, code, details=details))) as script:
        outcome = await sdk(language, script.url).send(SEND)
    assert len(script.asked) == 1
    kind = ERRORS.get(code, AppError).__name__
    told = {key: outcome.error[key] for key in ("name", "code", "message", "status", "details")}
    assert told == {"name": kind, "code": code, "message": "so it is", "status": status, "details": details}


async def test_an_answer_not_from_ordain_is_an_error_too(language: str) -> None:
    async with server(answer(200, b"<h1>Log in to the network</h1>")) as script:
        portal = await sdk(language, script.url).send(SEND)
    async with server(answer(404, b"nothing here")) as script:
        elsewhere = await sdk(language, script.url).send(SEND)
    assert (portal.error["name"], portal.error["code"]) == ("AppError", "unexpected_answer")
    assert (elsewhere.error["name"], elsewhere.error["code"]) == ("AppError", "http_404")


async def test_more_than_ten_thousand_devices_are_several_requests_with_one_key(language: str) -> None:
    idents = [f"d{number}" for number in range(20_001)]
    async with server(
        answer(200, {"d0": {"sent": False, "error": "Device not found"}}), CUT, answer(200, SENT)
    ) as script:
        outcome = await sdk(language, script.url).send(SEND | {"device_ident": idents})
    assert outcome.answer == {"d0": {"sent": False, "error": "Device not found"}} | SENT
    assert [len(asked.body["device_ident"]) for asked in script.asked] == [10_000, 10_000, 10_000, 1]
    assert script.asked[1].body == script.asked[2].body
    assert script.asked[3].body["device_ident"] == ["d20000"]
    assert len({asked.body["idempotency_key"] for asked in script.asked}) == 1


async def test_a_key_given_by_the_caller_is_used(language: str) -> None:
    async with server(answer(200, SENT)) as script:
        await sdk(language, script.url).send(SEND | {"idempotency_key": "mine"})
    assert script.asked[0].body["idempotency_key"] == "mine"


@pytest.mark.parametrize("wrong", ["sensor_01", None, {"a": 1}, [1]])
async def test_a_device_list_of_a_wrong_type_is_sent_and_refused_by_the_broker(
    language: str, wrong: object
) -> None:
    async with server(answer(400, refusal(400, "invalid_request"))) as script:
        outcome = await sdk(language, script.url).send(SEND | {"device_ident": wrong})
    assert outcome.error["name"] == "InvalidRequest"
    assert script.asked[0].body["device_ident"] == wrong


async def test_a_ttl_and_a_collapse_key_are_sent_as_given(language: str) -> None:
    more = {"ttl_sec": 60, "collapse_key": "door"}
    async with server(answer(200, SENT)) as script:
        await sdk(language, script.url).send(SEND | more)
    assert {key: script.asked[0].body[key] for key in more} == more


async def test_one_command_is_read_and_explained(language: str) -> None:
    async with server(answer(200, {"id": "cmd_/1"})) as script:
        read = await sdk(language, script.url).call("get", "cmd_/1")
        explained = await sdk(language, script.url).call("explain", "cmd_/1")
    assert read.answer == explained.answer == {"id": "cmd_/1"}
    assert [(asked.method, asked.path, asked.query) for asked in script.asked] == [
        ("GET", "/v1/commands/cmd_%2F1", {"grant": "false"}),
        ("GET", "/v1/commands/cmd_%2F1/explain", {}),
    ]


async def test_cancel_names_the_commands_device(language: str) -> None:
    async with server(
        answer(200, {"id": "cmd_1", "device_id": "dev_1"}), answer(409, refusal(409, "conflict"))
    ) as script:
        outcome = await sdk(language, script.url).call("cancel", "cmd_1")
    assert outcome.error["name"] == "Conflict"
    assert (script.asked[1].method, script.asked[1].path) == ("DELETE", "/v1/devices/dev_1/commands/cmd_1")


async def test_a_retry_is_repeated_with_the_same_key_and_its_error_has_that_key(language: str) -> None:
    async with server(CUT, answer(201, {"id": "cmd_2"}), CUT) as script:
        retried = await sdk(language, script.url).call("retry", "cmd_1")
        failed = await sdk(language, script.url, retries=0).call("retry", "cmd_1", "mine")
    assert retried.answer == {"id": "cmd_2"}
    assert {asked.path for asked in script.asked} == {"/v1/commands/cmd_1/retry"}
    first, again, mine = (asked.body["idempotency_key"] for asked in script.asked)
    assert first == again != mine == "mine" == failed.error["idempotency_key"]


async def test_history_sends_its_parameters_unchanged(language: str) -> None:
    asked = {"name": "reboot", "device_idents": ["a"], "start": "2026-03-01T00:00:00.000Z"}
    async with server(answer(200, {"a": []})) as script:
        outcome = await sdk(language, script.url).history(asked)
    assert outcome.answer == {"a": []}
    assert (script.asked[0].path, script.asked[0].body) == ("/v1/app/command/history", asked)


# --- events ----------------------------------------------------------------------------------------


async def test_events_are_complete_however_the_bytes_are_split(language: str) -> None:
    said = (
        b": hello\n\n"
        + event(1, note="grün 🔒")
        + b"id: 2\r\ndata: {\r\ndata: }\r\n\r\n"
        + b"id:3\rdata:{}\r\r"
    )
    async with server([STREAM, *(bytes([byte]) for byte in said), event(4)]) as script:
        outcome = await sdk(language, script.url).events(4, after=0)
    assert outcome.events[0]["data"] == {"note": "grün 🔒"}
    assert outcome.events[1:3] == [{}, {}]
    assert len(outcome.events) == 4


async def test_a_lost_stream_resumes_and_repeats_no_event(language: str) -> None:
    async with server(
        [STREAM, event(5), event(7), event(9)[:-1]],
        answer(503, refusal(503, "unavailable")),
        CUT,
        [STREAM, event(7), event(9), event(9), b": ping\n\n", event(12)],
    ) as script:
        outcome = await sdk(language, script.url).events(4, after=4, device="door-7", type="lock")
    assert outcome.positions == [5, 7, 9, 12]
    first, *later = script.asked
    assert (first.path, first.headers["accept"]) == ("/v1/events", "text/event-stream")
    assert first.query == {"after": "4", "device": "door-7", "type": "lock"}
    assert [asked.headers["last-event-id"] for asked in later] == ["7", "7", "7"]
    assert [asked.query["after"] for asked in later] == ["7", "7", "7"]


async def test_a_live_stream_remembers_its_start_position(language: str) -> None:
    """An SSE id without data gives the stream's start position, so events during a break are not missed."""
    async with server([STREAM, b"id: 41\n\n"], [STREAM, event(42)]) as script:
        outcome = await sdk(language, script.url).events(1)
    assert outcome.positions == [42]
    first, second = script.asked
    assert (first.query, first.headers.get("last-event-id")) == ({}, None)
    assert (second.query, second.headers["last-event-id"]) == ({"after": "41"}, "41")


@pytest.mark.parametrize("after", [4, "4", f"{LOG}:4", {"id": "4", "source": f"/ordain/{LOG}"}])
async def test_a_stream_resumes_with_the_log_that_its_position_belongs_to(
    language: str, after: object
) -> None:
    async with server(
        [STREAM, f"id: {LOG}:4\n\n".encode()],
        [STREAM, event(5, log=LOG), event(5, log=LOG)],
        [STREAM, event(5, log=LOG), event(8, log=LOG)],
    ) as script:
        outcome = await sdk(language, script.url).events(2, after=after)
    assert outcome.positions == [5, 8]
    first = "4" if after in (4, "4") else f"{LOG}:4"
    assert [asked.query["after"] for asked in script.asked] == [first, f"{LOG}:4", f"{LOG}:5"]
    assert [asked.headers["last-event-id"] for asked in script.asked] == [first, f"{LOG}:4", f"{LOG}:5"]


async def test_a_replaced_log_ends_a_stream_instead_of_a_gap(language: str) -> None:
    async with server([STREAM, event(5, log=LOG)], [STREAM, event(6, log=OTHER_LOG)]) as script:
        outcome = await sdk(language, script.url).events(2, after=0)
    assert outcome.positions == [5]
    assert outcome.error["name"] == "Gone"
    assert f"{LOG}:5" in outcome.error["message"]


async def test_a_stream_that_was_open_is_retried_without_limit(language: str) -> None:
    busy = answer(429, refusal(429, "rate_limit_exceeded"), retry_after="0")
    async with server([STREAM, event(1)], *[CUT, busy] * 4, [STREAM, event(2)]) as script:
        outcome = await sdk(language, script.url, retries=1, backoff_cap_sec=0.002).events(2, after=0)
    assert outcome.positions == [1, 2]
    assert len(script.asked) == 10


async def test_a_stream_that_never_opened_is_given_up_after_its_retries(language: str) -> None:
    async with server(CUT) as script:
        outcome = await sdk(language, script.url, retries=2).events(1)
    assert outcome.error["name"] == "Unavailable"
    assert len(script.asked) == 3


async def test_an_answer_that_is_no_event_stream_is_given_up_too(language: str) -> None:
    async with server(*[answer(200, {})] * 3) as script:
        outcome = await sdk(language, script.url, retries=2).events(1)
    assert outcome.error["name"] == "Unavailable"
    assert len(script.asked) == 3


@pytest.mark.parametrize(
    ("status", "code", "name"),
    [(410, "gone", "Gone"), (401, "unauthorized", "Unauthorized"), (403, "forbidden", "Forbidden")],
)
async def test_a_refused_stream_ends_with_the_reason_also_on_reconnect(
    language: str, status: int, code: str, name: str
) -> None:
    async with server([STREAM, event(1)], answer(status, refusal(status, code))) as script:
        outcome = await sdk(language, script.url).events(2, after=0)
    assert outcome.positions == [1]
    assert outcome.error["name"] == name
    assert len(script.asked) == 2


# --- wait ------------------------------------------------------------------------------------------

CREATED = answer(200, {"data": [{"position": 7, "type": "created"}], "has_more": True, "next_cursor": "c"})


async def test_wait_follows_the_commands_events_and_reads_the_command_once(language: str) -> None:
    done = {"id": "cmd_1", "state": "executed", "status": "executed"}
    async with server(
        CREATED,
        [STREAM, event(8, "published"), event(9, "acknowledged")],
        [STREAM, event(11)],
        answer(200, done),
    ) as script:
        outcome = await sdk(language, script.url).wait("cmd_1", 20)
    assert outcome.answer == done
    assert [asked.path for asked in script.asked] == [
        "/v1/commands/cmd_1/events", "/v1/events", "/v1/events", "/v1/commands/cmd_1",
    ]  # fmt: skip
    assert [asked.query for asked in script.asked[:3]] == [
        {"limit": "1"}, {"command": "cmd_1", "after": "7"}, {"command": "cmd_1", "after": "9"},
    ]  # fmt: skip


async def test_wait_continues_when_a_late_answer_reopens_the_command(language: str) -> None:
    async with server(
        CREATED,
        [STREAM, event(8, "timed_out")],
        answer(200, {"state": "acknowledged"}),
        [STREAM, event(9, "acknowledged"), event(10, "failed")],
        answer(200, {"state": "failed"}),
    ) as script:
        outcome = await sdk(language, script.url).wait("cmd_1", 20)
    assert outcome.answer == {"state": "failed"}
    assert len(script.asked) == 5


async def test_wait_times_out_and_names_the_command(language: str) -> None:
    async with server(CREATED, answer(503, refusal(503, "unavailable"))) as script:
        outcome = await sdk(language, script.url, retries=1_000).wait("cmd_1", 0.3)
    assert (outcome.error["name"], outcome.error["code"]) == ("Timeout", "timeout")
    assert outcome.error["message"] == "cmd_1 was not closed within 0.3 s"


async def test_wait_for_an_unknown_command_is_refused(language: str) -> None:
    async with server(answer(404, refusal(404, "not_found"))) as script:
        outcome = await sdk(language, script.url).wait("cmd_/../x", 1)
    assert outcome.error["name"] == "NotFound"
    assert script.asked[0].path == "/v1/commands/cmd_%2F..%2Fx/events"


@pytest.mark.parametrize(
    "url",
    [
        "http://u:hidden@host",
        "http://u:hid#den@host",
        "http://u:p@ss#hidden@host",
        "http://host?hidden=1",
        "http://host/#hidden",
        "http://host:hidden",
        "ftp://hidden",
        "http://ho st/hidden",
        "hidden",
    ],
)
async def test_a_url_that_could_hold_a_secret_is_refused_without_repeating_it(
    language: str, url: str
) -> None:
    kind = "TypeError: " if language == "javascript" else ""
    with pytest.raises((ValueError, Thrown), match=f"^{kind}url: must be an http or https URL") as refused:
        App(url, "sk_live_mine") if language == "python" else await sdk(language, url).send(SEND)
    assert "hid" not in str(refused.value)
