"""Pictures of every page with a busy fleet, for the docs. `scripts/screenshots` runs it.

ORDAIN_SCREENSHOTS names the folder for the pictures. Without it the test is skipped: it takes minutes, and
the other tests open the same pages.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from tests.system.conftest import NewBroker
from tests.system.console.conftest import WIDE, Console
from tests.system.support import ORDAIN, Process, environment, running, until

PHONE = {"width": 390, "height": 844}
FOLDER = os.environ.get("ORDAIN_SCREENSHOTS", "")
SECONDS = 60


@pytest.fixture
def fleet(new_broker: NewBroker, browser: Browser) -> Iterator[tuple[Console, dict[str, str]]]:
    """A console whose devices work, fail, are slow, lose answers and go offline; and values for paths."""
    broker = new_broker().start()
    console = Console(browser, broker)
    with ExitStack() as stack:
        for name, title in (("door-7", "Front door"), ("door-9", "Back door")):
            stack.enter_context(running(console.device(name, name=title, attributes={"floor": 2})))
        console.device("gate-1", name="Garage", type="iotee_device")
        console.device("rec-4", name="Recorder, room 4", type="recorder")
        faults = ("--offline", "2%", "--fail", "3%", "--slow", "8%", "--lose", "2%", "--seed", "7")
        rates = ("--devices", "40", "--send-rate", "20", "--duration", str(SECONDS))
        simulation = Process(
            ORDAIN, "simulate", *rates, *faults, env=environment(ORDAIN_DATA=str(broker.data))
        )
        stack.callback(simulation.kill)
        executed = broker.create("door-7", "unlock", params={"for_sec": 5})
        failed = broker.create("door-9", "unlock", params={"jam": "the bolt does not move"})
        broker.create("gate-1", "lock")
        for name in ("start_recording", "stop_recording"):
            broker.create("rec-4", name, ttl_sec=3_600)
        broker.reaches(executed, "executed")
        broker.reaches(failed, "failed")
        position = broker.http("GET", f"/v1/commands/{failed}/events").json()["data"][2]["position"]
        until(lambda: simulated(broker.operator("GET", "/v1/commands?type=simulate&limit=100").json()))
        yield console, {"command": failed, "position": str(position)}


def simulated(page: dict[str, list[dict[str, str]]]) -> list[str]:
    """The states of simulated commands, once one of them has failed, or there are many; else empty."""
    states = [each["state"] for each in page["data"]]
    return states if "failed" in states or len(states) > 50 else []


@pytest.mark.skipif(not FOLDER, reason="scripts/screenshots makes the pictures")
@pytest.mark.timeout(300)
def test_every_page_gives_a_screenshot(fleet: tuple[Console, dict[str, str]]) -> None:
    console, known = fleet
    key = console.key("admin", project="simulation")
    pages = {
        "now": "",
        "command": f"/commands/{known['command']}",
        "device": "/devices/sim-0012",
        "time": f"/time?at={known['position']}",
        "system": "/system",
    }
    first = console.tab(key).open()
    first.locator(".row.s-row-executed").first.wait_for()
    first.wait_for_timeout((SECONDS - 20) * 1_000)
    for size, suffix in ((WIDE, ""), (PHONE, "-phone")):
        for scheme in ("light", "dark"):
            tab = console.tab(key, "dark" if scheme == "dark" else "light", size)
            for name, path in pages.items():
                page = tab.open(path)
                settle(page)
                if name == "time":
                    page.get_by_label("From").fill("1")
                    page.get_by_role("button", name="this moment").nth(1).click()
                    page.get_by_role("button", name="Compare").click()
                    page.locator(".changes li").first.wait_for()
                dark = "-dark" if scheme == "dark" else ""
                page.screenshot(
                    path=Path(FOLDER) / f"console-{name}{suffix}{dark}.png", animations="disabled"
                )
    for tab in console.tabs:
        tab.close()


def settle(page: Page) -> None:
    page.locator("main :is(.row, table, .failure, .empty):visible").first.wait_for()
    page.locator(".skeleton").first.wait_for(state="detached")
    page.wait_for_timeout(1_500)
