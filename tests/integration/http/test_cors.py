"""CORS: web pages of the origins in the settings may use the API, others may not."""

from __future__ import annotations

from pathlib import Path

import httpx2
import pytest

from broker.http.edge.cors import allowing
from broker.settings import BadSetting, load
from tests.integration.http.support import Broker, running

OURS = "https://console.example.org"
GRANTED = "access-control-allow-origin"


def from_elsewhere(broker: Broker, origin: str) -> httpx2.AsyncClient:
    client = broker.client(app=allowing(broker.app, [OURS]))
    client.headers["Origin"] = origin
    return client


async def test_a_page_of_a_listed_origin_may_read_answers_and_refusals(tmp_path: Path) -> None:
    async with running(tmp_path) as broker, from_elsewhere(broker, OURS) as page:
        answers = [await page.get("/healthz"), await page.get("/v1/commands"), await page.get("/nothing")]
    assert [answer.status_code for answer in answers] == [200, 401, 404]
    for answer in answers:
        assert (answer.headers[GRANTED], answer.headers["vary"]) == (OURS, "origin")
        assert "retry-after" in answer.headers["access-control-expose-headers"]


async def test_the_preflight_allows_what_the_sdk_sends(tmp_path: Path) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    async with running(tmp_path) as broker, from_elsewhere(broker, OURS) as page:
        answer = await page.options("/v1/app/command/send", headers=asked)
    assert (answer.status_code, answer.content, answer.headers[GRANTED]) == (204, b"", OURS)
    allowed = answer.headers["access-control-allow-headers"].split(", ")
    assert {"authorization", "content-type", "last-event-id"} <= set(allowed)
    assert "POST" in answer.headers["access-control-allow-methods"]


@pytest.mark.parametrize("origin", ["https://elsewhere.example.org", "null", f"{OURS}.example.com"])
async def test_pages_of_other_origins_get_no_cors_headers(tmp_path: Path, origin: str) -> None:
    asked = {"Access-Control-Request-Method": "POST"}
    async with running(tmp_path) as broker, from_elsewhere(broker, origin) as page:
        answers = [await page.get("/healthz"), await page.options("/v1/commands", headers=asked)]
        unset = await broker.client().get("/healthz", headers={"Origin": OURS})
    assert [GRANTED in answer.headers for answer in [*answers, unset]] == [False, False, False]


@pytest.mark.parametrize(
    "origin", ["*", f"{OURS}/", "console.example.org", "https://Console.example.org", ""]
)
def test_an_origin_that_no_browser_sends_is_refused_at_the_start(tmp_path: Path, origin: str) -> None:
    place = tmp_path / "ordain.toml"
    place.write_text(f'cors_origins = ["{origin}"]\n')
    with pytest.raises(BadSetting, match=r"cors_origins = .* must be an origin"):
        load({}, {}, str(place))
