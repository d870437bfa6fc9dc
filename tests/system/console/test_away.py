"""The console while the broker is away: it shows that, and misses no event after the broker is back."""

from __future__ import annotations

import signal

from playwright.sync_api import Browser, Page

from tests.conftest import unused_port
from tests.system.conftest import NewBroker
from tests.system.console.conftest import Console
from tests.system.support import until


def shown(page: Page) -> list[str | None]:
    return [each.get_attribute("href") for each in page.locator(".row a").all()]


def test_the_page_says_that_the_broker_is_away_and_then_shows_the_missed_commands(
    new_broker: NewBroker, browser: Browser
) -> None:
    broker = new_broker("--http", f"127.0.0.1:{unused_port()}").start()
    console = Console(browser, broker)
    console.device("door-1")
    before = broker.create("door-1", "unlock")
    tab = console.tab()
    page = tab.open()
    page.locator(f"a[href$='{before}']").wait_for()
    page.get_by_role("status").get_by_text("live").wait_for()

    broker.end(signal.SIGKILL)
    page.get_by_text("The broker has not answered since").wait_for()
    assert page.locator(f"a[href$='{before}']").is_visible()
    broker.start()
    made = [broker.create("door-1", "unlock") for _ in range(5)]
    broker.http("DELETE", f"/v1/devices/door-1/commands/{before}")

    page.locator(f"a[href$='{made[-1]}']").wait_for()
    page.get_by_text("The broker has not answered since").wait_for(state="detached")
    page.locator(".row", has=page.locator(f"a[href$='{before}']")).locator(".s-cancelled").wait_for()
    wanted = [f"/console/commands/{each}" for each in [*reversed(made), before]]
    until(lambda: shown(page) == wanted, lambda: shown(page))
    tab.said.clear()  # the browser itself logs each failed request
    tab.close()
