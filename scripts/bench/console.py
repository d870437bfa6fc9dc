"""The console in Chromium: time to usable, frames while 100,000 commands scroll by, memory under events.

Run `python -m scripts.bench.console`. A frame is the time between two of the browser's animation frames.
Memory is the JavaScript heap after a collection.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx2
from playwright.sync_api import CDPSession, Page, sync_playwright

ORDAIN = str(Path(sys.executable).parent / "ordain")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
DEVICES = 1_000
# Scrolls to the end at a steady pace, and notes how long each frame took.
SCROLL = """
async ([wanted, pixels]) => {
  const box = document.querySelector(".scroll");
  const frames = [];
  let before = performance.now();
  let quiet = 0;
  while (box.scrollTop < wanted && quiet < 600) {
    const now = await new Promise(requestAnimationFrame);
    frames.push(now - before);
    before = now;
    const was = box.scrollTop;
    box.scrollTop += pixels;
    quiet = box.scrollTop === was ? quiet + 1 : 0;
  }
  frames.sort((a, b) => a - b);
  const at = (share) => frames[Math.floor(frames.length * share)];
  return { frames: frames.length, p50: at(0.5), p99: at(0.99), longest: frames.at(-1),
    over50: frames.filter((each) => each > 50).length, reached: box.scrollTop, height: box.scrollHeight };
}
"""


class Broker:
    """`ordain serve` in a directory of its own, with an admin's key."""

    def __init__(self, home: Path) -> None:
        self.data = str(home / "data")
        places = ("--http", "127.0.0.1:0", "--mqtt-listen", "127.0.0.1:0")
        log = home / "log"
        with log.open("w") as out:
            self.process = subprocess.Popen([ORDAIN, "serve", "--data", self.data, *places], stderr=out)
        while "event=broker.serving" not in (text := log.read_text()):
            assert self.process.poll() is None, text
            time.sleep(0.05)
        line = next(line for line in text.splitlines() if "event=broker.serving" in line)
        self.url = line.split("http=")[1].split()[0]
        made = ("keys", "create", "--project", "simulation", "--scope", "admin", "--data", self.data)
        self.key = subprocess.run([ORDAIN, *made], capture_output=True, text=True, check=True).stdout.strip()
        self._client = httpx2.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {self.key}"}, timeout=60, trust_env=False
        )

    def http(self, method: str, path: str, body: object = None) -> httpx2.Response:
        return self._client.request(method, path, json=body)


def fill(broker: Broker, commands: int) -> None:
    """Creates so many commands for devices that are offline."""
    names = [f"bench-{number:04}" for number in range(DEVICES)]
    for name in names:
        assert broker.http("POST", "/v1/devices", {"hardware_id": name, "type": "generic"}).status_code == 201
    for number in range(-(-commands // DEVICES)):
        body = {"devices": names, "type": f"do-{number // 50}", "params": {}, "ttl_sec": 86_400}
        answer = broker.http("POST", "/v1/commands", body)
        assert answer.is_success, answer.text


def heap(session: CDPSession) -> float:
    """MB in use after a collection."""
    session.send("HeapProfiler.collectGarbage")
    found: dict[str, Any] = session.send("Runtime.getHeapUsage")
    return float(found["usedSize"]) / 1e6


def usable(page: Page, url: str) -> tuple[float, int]:
    """Milliseconds until rows are shown, and the bytes that the first view needed."""
    begun = time.perf_counter()
    page.goto(f"{url}/console")
    page.locator(".row a").first.wait_for()
    took = (time.perf_counter() - begun) * 1_000
    size = page.evaluate(
        """() => ["resource", "navigation"].flatMap((kind) => performance.getEntriesByType(kind))
        .filter((each) => /console|sdk/.test(each.name))
        .reduce((sum, each) => sum + each.encodedBodySize, 0)"""
    )
    return took, size


def tasks(trace: bytes) -> list[float]:
    """The longest tasks of the page's main thread, in ms of CPU: what a frame costs on an idle machine."""
    events = json.loads(trace)["traceEvents"]
    mains = {
        (each["pid"], each["tid"])
        for each in events
        if each.get("name") == "thread_name" and each["args"].get("name") == "CrRendererMain"
    }
    took = [
        each["tdur"] / 1_000
        for each in events
        if "tdur" in each and (each["pid"], each["tid"]) in mains and "RunTask" in each["name"]
    ]
    return sorted(took)[-5:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commands", type=int, default=100_000)
    parser.add_argument("--events", type=int, default=500, help="a second")
    parser.add_argument("--seconds", type=int, default=120)
    given = parser.parse_args()
    home = Path(tempfile.mkdtemp())
    broker = Broker(home)
    try:
        fill(broker, given.commands)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=ARGUMENTS)
            context = browser.new_context(viewport={"width": 1440, "height": 900})
            page = context.new_page()
            page.goto(f"{broker.url}/console/assets/icon.svg")
            page.evaluate("key => sessionStorage.setItem('ordain.key', key)", broker.key)
            took, size = usable(page, broker.url)
            print(f"first view: {size:,} bytes compressed; rows after {took:.0f} ms (first), ", end="")
            print(f"{usable(page, broker.url)[0]:.0f} ms (again)")
            browser.start_tracing(page=page, categories=["toplevel", "__metadata"])
            seen = page.evaluate(SCROLL, [given.commands * 32 - 2_000, 1_600])
            print("scrolling down:", seen)
            print("longest tasks of the page, ms of its CPU:", tasks(browser.stop_tracing()))
            memory(broker, page, context.new_cdp_session(page), given.events, given.seconds)
            browser.close()
    finally:
        broker.process.kill()
        broker.process.wait()
        shutil.rmtree(home)


def memory(broker: Broker, page: Page, session: CDPSession, events: int, seconds: int) -> None:
    """The heap while a page shows the events of a simulated fleet; a command has four events."""
    rate = ("--send-rate", str(events / 4), "--devices", "500", "--duration", str(seconds + 30))
    fleet = subprocess.Popen(
        [ORDAIN, "simulate", *rate], env=os.environ | {"ORDAIN_DATA": broker.data}, stdout=subprocess.DEVNULL
    )
    try:
        begun = broker.http("GET", "/v1/system").json()["position"]
        page.wait_for_timeout(15_000)
        middle = broker.http("GET", "/v1/system").json()["position"]
        since = time.monotonic()
        for _ in range(6):
            print(f"  heap {heap(session):.1f} MB after {time.monotonic() - since:.0f} s")
            page.wait_for_timeout(seconds * 1_000 / 6)
        end = broker.http("GET", "/v1/system").json()["position"]
        print(f"  heap {heap(session):.1f} MB after {time.monotonic() - since:.0f} s; ", end="")
        print(f"{(end - middle) / (time.monotonic() - since):.0f} events a second, {middle - begun} before")
        print("frames under events:", page.evaluate(IDLE))
    finally:
        fleet.kill()
        fleet.wait()


IDLE = """
async () => {
  const frames = [];
  let before = performance.now();
  while (frames.length < 300) {
    const now = await new Promise(requestAnimationFrame);
    frames.push(now - before);
    before = now;
  }
  frames.sort((a, b) => a - b);
  return { p50: frames[150], p99: frames[297], longest: frames.at(-1) };
}
"""


if __name__ == "__main__":
    main()
