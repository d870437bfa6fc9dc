"""The API page in a real browser: all operations are there, and nothing is loaded from other hosts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, Request

from tests.system.api_support import Served, description, served


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
    page.get_by_role("heading", name="Schemas").wait_for()

    operations = [each for item in description()["paths"].values() for each in item.values()]
    for operation in operations:
        shown = page.locator(f"details#{operation['operationId']} summary")
        assert operation["summary"] in shown.inner_text()
    for name in description()["components"]["schemas"]:
        assert page.locator(f"details#{name}").count() == 1

    page.locator("input[type=password]").fill(here.key)
    box = page.locator("#create_command")
    box.locator("summary").click()
    box.get_by_label("device").fill("lamp-1")
    box.get_by_label("Idempotency-Key").fill("order-4711")
    box.get_by_role("button", name="Send").click()
    answer = box.locator("pre", has_text="201")
    answer.wait_for()
    assert '"hardware_id": "lamp-1"' in answer.inner_text()

    box.get_by_role("link", name="ErrorBody").first.click()
    page.locator("#ErrorBody[open]").wait_for()

    assert said == []
    assert len(asked) == 3
    assert all(url.startswith(f"{here.url}/") for url in asked)
