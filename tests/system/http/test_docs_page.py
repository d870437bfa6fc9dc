"""The API page in a real browser: all operations are there, and nothing is loaded from other hosts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, Request

from tests.system.api_support import Served, description, served
from tests.system.support import until


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("api") / "data", quiet=True) as here:
        yield here


def test_every_operation_is_shown_and_can_be_tried_offline(page: Page, here: Served) -> None:
    asked: list[str] = []
    said: list[str] = []

    def note(request: Request) -> None:
        asked.append(request.url)

    page.on("request", note)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))

    page.goto(f"{here.url}/docs")
    page.get_by_role("button", name="Authorize").wait_for()

    def missing() -> list[str]:
        shown = page.locator("#api").inner_text().replace("\u200b", "")
        paths = description()["paths"]
        summaries = [operation["summary"] for item in paths.values() for operation in item.values()]
        return [each for each in (*paths, *summaries) if each not in shown]

    until(lambda: not missing(), missing)

    page.get_by_role("button", name="Authorize").click()
    page.get_by_label("auth-bearer-value").fill(here.key)
    page.get_by_role("button", name="Apply credentials").first.click()
    page.get_by_role("button", name="Close").first.click()
    operation = page.locator("#operations-Commands-create_command")
    operation.locator(".opblock-summary-control").click()
    operation.get_by_placeholder("device").first.fill("lamp-1")
    operation.get_by_role("button", name="Execute").click()
    answer = operation.locator(".live-responses-table .response", has_text="201")
    answer.wait_for()
    assert '"hardware_id": "lamp-1"' in answer.inner_text()

    assert said == []
    assert asked
    assert all(url.startswith((f"{here.url}/", "data:")) for url in asked)
