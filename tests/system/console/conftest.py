"""One Chromium and one broker for a whole file of tests: each test has a fresh tab with its own key."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, Literal

import pytest
from playwright.sync_api import Browser, Page, Response, expect, sync_playwright

from devices.agent import Agent, Call, CommandFailed
from tests.system.conftest import ARGUMENTS, WITHIN_MS
from tests.system.support import SECRET, Broker, running

expect.set_options(timeout=WITHIN_MS)

Scheme = Literal["light", "dark"]
WIDE = {"width": 1440, "height": 900}


class Tab:
    """A tab of the console. It records requests to other hosts, log lines, errors and dialogs."""

    def __init__(
        self, browser: Browser, broker: Broker, key: str, scheme: Scheme, size: dict[str, int]
    ) -> None:
        self._context = browser.new_context(
            viewport={"width": size["width"], "height": size["height"]},
            color_scheme=scheme,
            permissions=["clipboard-read", "clipboard-write"],
            timezone_id="UTC",
        )
        self.broker = broker
        self.page = self._context.new_page()
        self.page.set_default_timeout(WITHIN_MS)
        self.asked: list[str] = []
        self.said: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("response", self._answered)
        self.page.on("pageerror", lambda error: self.said.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: self.said.append(f"dialog: {dialog.message}"))
        if key:
            self.page.goto(f"{broker.url}/console/assets/icon.svg")
            self.page.evaluate("key => sessionStorage.setItem('ordain.key', key)", key)

    def _answered(self, response: Response) -> None:
        if response.status >= 400:
            self.said.append(f"{response.status}: {response.url}")

    def open(self, path: str = "") -> Page:
        self.page.goto(f"{self.broker.url}/console{path}")
        return self.page

    def close(self) -> None:
        """Closes the tab. Fails if it sent a request to another host, or if the browser logged anything."""
        self._context.close()
        assert all(url.startswith(f"{self.broker.url}/") for url in self.asked), self.asked
        assert self.said == []


class Console:
    """Gives tests their tabs, keys and devices."""

    def __init__(self, browser: Browser, broker: Broker) -> None:
        self.browser, self.broker = browser, broker
        self.tabs: list[Tab] = []

    def key(self, *scopes: str, project: str = "default") -> str:
        body = {"project": project, "scopes": list(scopes)}
        made: dict[str, Any] = self.broker.operator("POST", "/v1/keys", body).json()
        key: str = made["key"]
        return key

    def tab(self, key: str | None = None, scheme: Scheme = "light", size: dict[str, int] = WIDE) -> Tab:
        if key is None:
            self.broker.http("GET", "/v1/types")  # makes the key
            key = self.broker.key
        self.tabs.append(Tab(self.browser, self.broker, key, scheme, size))
        return self.tabs[-1]

    def device(self, hardware_id: str, **fields: object) -> Callable[[], Agent]:
        """Registers a device. Returns a function that makes its agent, which fails only for `{"jam": …}`."""
        answer = self.broker.http(
            "POST", "/v1/devices", {"hardware_id": hardware_id, "type": "generic"} | fields
        )
        assert answer.status_code == 201, answer.text
        token = answer.json()["device_token"]
        return lambda: agent(self.broker, hardware_id, token)


def agent(broker: Broker, name: str, token: str) -> Agent:
    made = Agent(name, token, f"mqtt://127.0.0.1:{broker.mqtt_port}", grants="none")

    @made.command("unlock")
    async def unlock(call: Call) -> dict[str, Any]:
        if isinstance(call.params, dict) and call.params.get("jam"):
            raise CommandFailed("jammed", str(call.params["jam"]))
        return {"locked": False}

    return made


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.fail("chromium is not installed (Debian: apt install chromium)", pytrace=False)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS, timeout=WITHIN_MS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, browser: Browser) -> Iterator[Console]:
    """A broker with the device `door-7`, which is online."""
    place = tmp_path_factory.mktemp("broker")
    broker = Broker(place / "data", cwd=place).start()
    with ExitStack() as stack:
        stack.callback(broker.kill)
        home = Console(browser, broker)
        stack.enter_context(running(home.device("door-7", name="Front door", attributes={"floor": 2})))
        yield home
    assert not SECRET.search(broker.said())


@pytest.fixture
def console(home: Console) -> Iterator[Console]:
    """Closes the tabs after a test; `Tab.close` checks each."""
    home.tabs = []
    yield home
    for tab in home.tabs:
        tab.close()
