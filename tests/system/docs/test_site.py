"""The documentation site: it is built without a warning, needs no network, and can be searched."""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from playwright.sync_api import Page, TimeoutError

from tests.system.support import ROOT, environment

# Resources that a browser would load from other hosts; links that a reader may follow are allowed.
FETCHED = re.compile(
    r"""<(?:script|img|iframe)[^>]*\ssrc="(?:https?:)?//|<link[^>]*\shref="(?:https?:)?//[^"]*"[^>]*>"""
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "-f", ".mkdocs.yml", "-d"]
    quiet = environment(NO_MKDOCS_2_WARNING="1")
    done = subprocess.run([*build, place], cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=400)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return place


def test_every_page_is_on_the_site_and_fetches_nothing_from_elsewhere(site: Path) -> None:
    pages = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")]
    canonical = re.compile(r'<link[^>]*rel="canonical"[^>]*>')
    assert pages
    for page in pages:
        html = canonical.sub("", (site / page.with_suffix(".html")).read_text())
        assert FETCHED.findall(html) == [], page


def test_a_page_opened_as_a_file_asks_no_network_and_can_be_searched(site: Path, page: Page) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    found = page.locator(".md-search-result__link[href*=html]").first  # the list is drawn anew as it grows
    for limit_sec in (10, 20, 40, 80, 160):  # a page that is still loading may lose what is typed
        page.goto((site / "index.html").as_uri())
        page.get_by_role("textbox", name="Search").press_sequentially("checkpoint")
        with suppress(TimeoutError):
            found.wait_for(timeout=limit_sec * 1_000)
            break
    found.wait_for()
    assert [url for url in asked if not url.startswith(("file:", "blob:", "data:"))] == []
