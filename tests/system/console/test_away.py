"""The console while the broker is away, and after: it says so, and nothing is missing."""

from __future__ import annotations

import signal

from playwright.sync_api import Browser

from tests.conftest import unused_port
from tests.system.conftest import NewBroker
from tests.system.console.conftest import Console


def test_a_broker_that_dies_is_said_to_be_away_and_what_came_meanwhile_follows(
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
    shown = [each.get_attribute("href") for each in page.locator(".row a").all()]
    assert shown == [f"/console/commands/{each}" for each in [*reversed(made), before]]
    tab.said.clear()  # the browser writes down each request that failed itself
    tab.close()
