"""The console in a real browser, against a real broker with a device that answers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Collection
from functools import partial
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.system.console.conftest import WIDE, Console
from tests.system.support import ORDAIN, WITHIN_SEC, environment, until

AXE = (Path(__file__).parent / "axe" / "axe.min.js").read_text()
PHONE = {"width": 390, "height": 844}
HOSTILE = """</script><img src=x onerror="alert(1)"><svg onload=alert(2)>'"`${alert(3)}\u202e{{7*7}}"""


WCAG = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]


def faults(page: Page, rules: list[str]) -> list[str]:
    """Violations that axe finds: of all rules for WCAG 2.2 A and AA, or of some rules."""
    found = page.evaluate("only => axe.run(document, { runOnly: only, resultTypes: ['violations'] })", rules)
    return [
        f"{each['id']}: {node['target']} {node['failureSummary']}"
        for each in found["violations"]
        for node in each["nodes"]
    ]


def explained(page: Page) -> str:
    return page.locator(".explain").inner_text()


def test_a_command_is_sent_from_the_form_and_watched_to_its_end(console: Console) -> None:
    tab = console.tab()
    page = tab.open("/devices/door-7")
    form = page.locator("form.send")
    form.get_by_label("Command").fill("unlock")
    form.get_by_label("Parameters (JSON)").fill('{"note": "from the form"}')
    expect(form.locator("pre")).to_contain_text('"note":"from the form"')
    form.get_by_role("button", name="Send").click()
    form.get_by_role("status").get_by_role("link").click()
    page.locator(".panehead .s-executed").wait_for()
    command_id = page.url.rpartition("/")[2]
    command = console.broker.command(command_id)
    assert (command["state"], command["params"]) == ("executed", {"note": "from the form"})
    said = console.broker.http("GET", f"/v1/commands/{command_id}/explain").json()["summary"]
    until(lambda: explained(page) == said, lambda: explained(page))
    rows = page.locator(".waterfall .what")
    expect(rows).to_have_text(["in lane", "attempt 1", "on device", "result"])
    events = page.get_by_role("tabpanel").locator("tbody tr td:first-child")
    expect(events).to_have_text(["created", "published", "acknowledged", "executed"])
    expect(page.locator(".row.selected .s-executed")).to_have_count(1)
    page.get_by_role("tab", name="Grant").click()
    expect(page.get_by_role("tabpanel").get_by_text("door-7")).to_be_visible()
    page.get_by_role("tab", name="Payload & topic").click()
    expect(page.get_by_text("iotee/dev/door-7/rls")).to_be_visible()


def test_the_list_is_live_and_the_address_has_its_filters(console: Console) -> None:
    broker = console.broker
    console.device("away-1")
    broker.create("door-7", "unlock")
    page = console.tab().open()
    page.get_by_role("grid").wait_for()
    waiting = broker.create("away-1", "unlock")
    done = broker.create("door-7", "unlock")
    page.locator(f"a[href$='{done}']").wait_for()
    row = page.locator(".row", has=page.locator(f"a[href$='{done}']"))
    row.locator(".s-executed").wait_for()
    page.get_by_role("group", name="Only in this state").get_by_role("button", name="pending").click()
    expect(page).to_have_url(re.compile(r"\?state=pending$"))
    page.locator(f"a[href$='{waiting}']").wait_for()
    expect(page.locator(f"a[href$='{done}']")).to_have_count(0)
    page.get_by_label("Only of this device").fill("away-1")
    page.get_by_label("Only of this device").press("Enter")
    page.reload()
    page.locator(f"a[href$='{waiting}']").wait_for()
    expect(page.get_by_label("Only of this device")).to_have_value("away-1")
    assert broker.http("DELETE", f"/v1/devices/away-1/commands/{waiting}").status_code == 200
    page.get_by_text("No command fits these filters.").wait_for()


@pytest.mark.parametrize("label", ["Only commands of this name", "Only of this device"])
def test_a_filter_keeps_what_is_typed_while_commands_arrive(console: Console, label: str) -> None:
    console.broker.create("door-7", "unlock")
    page = console.tab().open()
    page.get_by_role("grid").wait_for()
    field = page.get_by_label(label)
    field.fill("do")
    arrived = console.broker.create("door-7", "unlock")
    page.locator(".row", has=page.locator(f"a[href$='{arrived}']")).locator(".s-executed").wait_for()
    assert field.input_value() == "do"
    page.keyboard.press("Escape")  # leaves the field
    page.get_by_text("No command fits these filters.").wait_for()
    page.get_by_role("button", name="Show all").click()
    expect(field).to_have_value("")


def test_the_first_view_is_small(console: Console) -> None:
    """60 kB compressed, with headers: what a browser loads to show the page, without the data."""
    page = console.tab().open()
    page.locator("main :is(.row, .empty)").first.wait_for()
    loaded = page.evaluate(
        "performance.getEntries().filter((each) => /\\/(console|sdk)/.test(each.name))"
        ".map((each) => [each.name, each.transferSize])"
    )
    assert len(loaded) > 10
    assert sum(size for _, size in loaded) < 60_000, loaded


def test_a_paused_list_shows_all_missed_commands_when_it_is_resumed(console: Console) -> None:
    console.device("away-2")
    page = console.tab().open("?device=away-2")
    page.get_by_text("No command fits these filters.").wait_for()
    page.get_by_role("button", name="Pause").click()
    made = [console.broker.create("away-2", "unlock") for _ in range(3)]
    page.get_by_role("button", name="Resume (3 new)").wait_for()
    assert page.locator(".row a").count() == 0
    page.keyboard.press("p")
    page.locator(".row a").nth(2).wait_for()
    shown = [each.get_attribute("href") for each in page.locator(".row a").all()]
    assert shown == [f"/console/commands/{each}" for each in reversed(made)]


def test_the_keyboard_reaches_everything(console: Console) -> None:
    console.device("away-3")
    made = [console.broker.create("away-3", "unlock") for _ in range(3)]
    page = console.tab().open("?device=away-3")
    page.locator(".row a").nth(2).wait_for()
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/commands/{made[1]}?device=away-3")
    page.locator(".explain").wait_for()
    page.keyboard.press("c")
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("Cancel unlock to away-3?")
    page.locator("dialog button:focus").get_by_text("Back").wait_for()
    page.keyboard.press("Enter")
    dialog.wait_for(state="detached")
    assert console.broker.command(made[1])["state"] == "pending"
    page.keyboard.press("c")
    page.locator("dialog button:focus").get_by_text("Back").wait_for()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.locator(".panehead .s-cancelled").wait_for()
    assert console.broker.command(made[1])["state"] == "cancelled"
    page.keyboard.press("r")
    page.get_by_role("dialog").get_by_role("button", name="Retry").click()
    page.locator(".facts").get_by_text("retry of").wait_for()
    page.keyboard.press("Escape")
    page.wait_for_url("**/console*")
    page.keyboard.press("?")
    page.get_by_role("dialog").get_by_text("Keyboard", exact=True).wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("dialog").wait_for(state="detached")
    page.keyboard.press("/")
    page.keyboard.type("Front")
    page.get_by_role("option", name="door-7").wait_for()
    page.keyboard.press("Enter")
    page.wait_for_url("**/devices/door-7")
    page.keyboard.press("g")
    page.keyboard.press("s")
    page.wait_for_url("**/system")
    page.keyboard.press("/")
    page.keyboard.insert_text(made[0])
    page.keyboard.press("Enter")  # before the search is answered
    page.wait_for_url(f"**/commands/{made[0]}")


LONG_LIFE = """async () => {
  const { html, render } = await import("/console/assets/html.mjs");
  const { Waterfall } = await import("/console/assets/waterfall.mjs");
  const event = (type, at) => ({ type, position: 1, recorded_at: `2026-01-01T00:0${at}:00.000Z`, data: {} });
  const events = [event("created", 0), event("expired", 5)];
  document.body.replaceChildren();
  render(html`<${Waterfall} command=${{ state: "expired" }} events=${events} />`, document.body);
}"""


def test_a_life_of_more_than_a_minute_has_an_axis_in_percent(console: Console) -> None:
    page = console.tab().open()
    page.get_by_role("navigation", name="Pages").wait_for()
    page.evaluate(LONG_LIFE)
    track, axis = page.locator(".track").first.bounding_box(), page.locator(".axis.percent")
    marks = [mark.bounding_box() for mark in axis.locator("span").all()]
    assert axis.inner_text().split("\n") == ["0 %", "25 %", "50 %", "75 %", "100 %"]
    assert track is not None
    for mark, quarter in zip(marks, range(5), strict=True):
        assert mark is not None
        assert abs(mark["x"] - track["x"] - track["width"] * quarter / 4) < 2


def test_abandoning_a_command_asks_for_a_reason_and_records_it(console: Console) -> None:
    name = "slow-1"
    console.device(name, type="iotee_device")  # handed over whether it is there or not
    command = console.broker.create(name, "lock")
    console.broker.reaches(command, "published")
    page = console.tab().open(f"/commands/{command}")
    page.get_by_role("button", name="Abandon").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("may still execute it")
    dialog.get_by_label("Reason").fill("the door was replaced")
    dialog.get_by_role("button", name="Abandon").click()
    page.locator(".panehead .s-timed_out").wait_for()
    page.get_by_role("tabpanel").get_by_text("the door was replaced").wait_for()


def copied(page: Page, before: Collection[str]) -> str | None:
    """What the clipboard holds, once it is something new."""
    text: str = page.evaluate("navigator.clipboard.readText()")
    return text if text and text not in before else None


def run(command: list[str], cwd: Path, key: str) -> None:
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment(ORDAIN_KEY=key, PATH=f"{Path(ORDAIN).parent}{os.pathsep}{os.environ['PATH']}"),
        capture_output=True,
        text=True,
        timeout=WITHIN_SEC,
    )
    assert done.returncode == 0, done.stderr + done.stdout


def test_each_copied_snippet_sends_the_same_command_again(console: Console, tmp_path: Path) -> None:
    broker = console.broker
    console.device("away-4")
    params = {"text": 'it\'s $HOME "quoted" `x` \\ é\n', "on": True, "off": None, "n": [1, {"two": 2.5}]}
    command = broker.create("away-4", "set", params=params, ttl_sec=600)
    tab = console.tab()
    page = tab.open(f"/commands/{command}")
    texts: dict[str, str] = {}
    for name in ("curl", "ordain send", "Python", "JavaScript"):
        page.get_by_text("Copy as").click()
        page.get_by_role("button", name=name).click()
        texts[name] = until(partial(copied, page, texts.values()))
        page.get_by_text("Copy as").click()
    run(["bash", "-ec", texts["curl"]], tmp_path, broker.key)
    run(["bash", "-ec", f"export ORDAIN_DATA={broker.data}; {texts['ordain send']}"], tmp_path, broker.key)
    (tmp_path / "send.py").write_text(texts["Python"])
    run([sys.executable, "send.py"], tmp_path, broker.key)
    sdk = broker.http("GET", "/sdk/app.mjs").content
    (tmp_path / "app.mjs").write_bytes(sdk)
    (tmp_path / "send.mjs").write_text(texts["JavaScript"])
    run(["node", "send.mjs"], tmp_path, broker.key)
    found = broker.http("GET", "/v1/devices/away-4/commands").json()["data"]
    assert [each["params"] for each in found] == [params] * 5
    assert [each["type"] for each in found] == ["set"] * 5
    assert all(each["expires_at"] is not None for each in found)


def test_every_page_is_shown_as_it_was(console: Console) -> None:
    broker = console.broker
    command = broker.create("door-7", "unlock")
    broker.reaches(command, "executed")
    events = broker.http("GET", f"/v1/commands/{command}/events").json()["data"]
    created, published = events[0]["position"], events[1]["position"]
    page = console.tab().open(f"/commands/{command}?at={published}")
    page.locator(".panehead .s-published").wait_for()
    expect(page.get_by_text("read-only")).to_be_visible()
    assert page.locator(".explain").count() == 0
    for name in ("Cancel", "Retry", "Clone"):
        assert page.get_by_role("button", name=name, exact=True).count() == 0
    page.get_by_role("button", name="One event back").click()
    page.locator(".panehead .s-pending").wait_for()
    expect(page).to_have_url(re.compile(rf"\bat={published - 1}\b"))
    page.get_by_role("button", name="Play forward").click()
    page.locator(".panehead .s-executed").wait_for()
    page.get_by_role("navigation", name="Pages").get_by_role("link", name="Devices").click()
    page.locator(".row.device").first.wait_for()
    expect(page).to_have_url(re.compile(r"\bat="))
    page.keyboard.press("Escape")
    page.get_by_text("read-only").wait_for(state="detached")
    page.goto(f"{broker.url}/console/time?at={created}")
    page.get_by_role("button", name="this moment").first.click()
    beside = page.locator(".moment", has=page.get_by_label("To"))
    expect(beside.get_by_role("button", name="this moment")).to_have_count(1)
    page.get_by_role("button", name="Compare").click()
    change = page.locator(".changes li", has=page.locator(f"a[href*='{command}']"))
    change.wait_for()
    assert re.sub(r"\s+", " ", change.inner_text()) == "unlock to door-7 ◷pending → ✓executed"


def test_names_and_values_from_others_are_never_run_as_markup(console: Console) -> None:
    """A script or a tag in names, attributes, parameters or a device's texts is only shown as text."""
    broker = console.broker
    console.device("odd-1", name=HOSTILE, attributes={HOSTILE: HOSTILE})
    broker.http("PATCH", "/v1/devices/odd-1", {"name": HOSTILE})
    command = broker.create("door-7", "unlock", params={"jam": HOSTILE})
    broker.reaches(command, "failed")
    tab = console.tab()
    page = tab.open(f"/commands/{command}")
    page.locator(".explain", has_text="{{7*7}}").wait_for()
    detail = page.locator(".detail")
    expect(detail.locator(".explain")).to_contain_text("\\u202e")
    expect(detail.get_by_role("tabpanel")).to_contain_text("\\u202e")
    assert "\u202e" not in detail.inner_text()
    for name in ("Payload & topic", "Raw"):
        page.get_by_role("tab", name=name).click()
        expect(page.get_by_role("tabpanel").get_by_text("onerror").first).to_be_visible()
    page.get_by_text("Copy as").click()
    for path in ("/devices/odd-1", "/devices", "?state=failed", "/time", "/system"):
        tab.open(path)
        page.locator("main").wait_for()
    tab.open("/devices/odd-1")
    expect(page.locator(".facts")).to_contain_text("onerror")
    tab.open(f"?device={'%3Cimg%20src=x%20onerror=alert(1)%3E'}")
    page.get_by_role("alert").wait_for()
    tab.said = [each for each in tab.said if "400" not in each]
    assert page.locator("img").count() == 0


def test_a_key_sees_and_does_only_what_it_may(console: Console) -> None:
    broker = console.broker
    console.device("away-5")
    command = broker.create("away-5", "unlock")
    reader = console.tab(console.key("devices:read"))
    page = reader.open("?device=away-5")
    page.locator(".row a").wait_for()
    expect(page.get_by_text("updated every 2 s")).to_be_visible()
    second = broker.create("away-5", "unlock")
    page.locator(f"a[href$='{second}']").wait_for()
    page.locator(f"a[href$='{command}']").click()
    page.locator(".explain").wait_for()
    expect(page.locator(".detail .actions > button")).to_have_text(["Show at this time"])
    reader.open("/devices/away-5")
    page.get_by_text("needs a key with the scope events:read").wait_for()
    assert page.locator("form.send").count() == 0
    reader.open("/system")
    page.get_by_role("heading", name="Device types").wait_for()
    assert page.get_by_role("heading", name="API keys").count() == 0
    assert page.get_by_role("button", name="Verify the chain").count() == 0

    stranger = console.tab(console.key("devices:read", "events:read", project="other"))
    page = stranger.open()
    page.get_by_text("No command yet.").wait_for()
    page = console.tab("").open()
    page.get_by_label("API key").fill("sk_live_" + "x" * 43)
    page.get_by_role("button", name="Sign in").click()
    page.get_by_text("This key is unknown or revoked.").wait_for()
    page.get_by_label("API key").fill(console.key("events:read"))
    page.get_by_role("button", name="Sign in").click()
    page.get_by_text("needs a key with the scope devices:read").wait_for()
    page.get_by_label("API key").fill(console.key("devices:read"))
    page.get_by_role("button", name="Sign in").click()
    page.locator(".row a").first.wait_for()
    console.tabs[-1].said.clear()  # the browser writes down each refusal itself


def test_an_admin_makes_a_key_revokes_it_and_has_the_log_verified(console: Console) -> None:
    page = console.tab(console.key("admin")).open("/system")
    page.get_by_label("Project", exact=True).fill("night")
    page.get_by_label("Name", exact=True).fill("night shift")
    page.get_by_label("Days until it expires").fill("30")
    page.get_by_label("Only these devices").fill("door-7 lamp-*")
    page.get_by_label("devices:read").check()
    page.get_by_role("button", name="Create key").click()
    key = page.locator(".once pre").inner_text()
    console.broker.key, kept = key, console.broker.key
    assert console.broker.http("GET", "/v1/devices").status_code == 200
    row = page.locator("tr", has_text="night shift")
    row.get_by_text("door-7 lamp-…").wait_for()
    (made,) = [key for key in console.broker.operator("GET", "/v1/keys").json()["data"] if key["devices"]]
    assert (made["devices"], made["device_prefixes"]) == (["door-7"], ["lamp-"])
    assert made["expires_at"] is not None
    row.get_by_role("button", name="Revoke…").click()
    expect(page.get_by_role("dialog")).to_contain_text("refused at once")
    page.get_by_role("dialog").get_by_role("button", name="Revoke the key").click()
    row.get_by_text("revoked").wait_for()
    assert console.broker.http("GET", "/v1/devices").status_code == 401
    console.broker.key = kept
    page.get_by_role("button", name="Verify the chain").click()
    page.get_by_text("no fault").wait_for()


def test_a_new_token_needs_a_confirmation_and_is_shown_once(console: Console) -> None:
    console.device("away-6")
    page = console.tab().open("/devices/away-6")
    page.get_by_role("button", name="New token…").click()
    expect(page.get_by_role("dialog")).to_contain_text("stops working at once")
    page.get_by_role("dialog").get_by_role("button", name="Create a new token").click()
    shown = page.locator("section", has_text="Shown only once").locator("pre").first
    assert shown.inner_text().startswith("dtok_")


def test_a_form_follows_the_schema_and_says_what_is_wrong(console: Console) -> None:
    console.device("rec-1", type="recorder")
    page = console.tab().open("/devices/rec-1")
    form = page.locator("form.send")
    form.get_by_label("max_duration_sec").fill("60")
    form.get_by_label("upload_immediately").select_option("false")
    form.get_by_label("metadata").fill('{"room": 4')
    form.get_by_role("button", name="Send").click()
    form.get_by_text("metadata must be JSON").wait_for()
    form.get_by_label("metadata").fill('{"room": 4}')
    form.get_by_role("button", name="Send").click()
    form.get_by_text("Accepted").wait_for()
    made = console.broker.http("GET", "/v1/devices/rec-1/commands").json()["data"]
    assert [each["params"] for each in made] == [
        {"max_duration_sec": 60, "upload_immediately": False, "metadata": {"room": 4}}
    ]


def test_a_page_whose_files_do_not_arrive_says_so(console: Console) -> None:
    tab = console.tab()
    tab.page.route("**/main.mjs", lambda route: route.abort())
    page = tab.open()
    loading = page.get_by_text("a file did not arrive: reload the page")
    until(lambda: loading.evaluate("each => getComputedStyle(each).opacity") == "1")
    assert len(tab.said) == 1
    tab.said.clear()
    page.unroute("**/main.mjs")
    page.reload()
    page.get_by_role("navigation").first.wait_for()
    assert loading.count() == 0


def test_axe_finds_no_barrier_on_any_page(console: Console) -> None:
    """Checks names, roles, contrast and focus, on a screen and on a phone; in dark mode only contrast."""
    broker = console.broker
    failed = broker.create("door-7", "unlock", params={"jam": True})
    broker.reaches(failed, "failed")
    position = broker.http("GET", f"/v1/commands/{failed}/events").json()["data"][0]["position"]
    admin = console.key("admin")
    found: dict[str, list[str]] = {}
    pages = (
        "",
        f"/commands/{failed}",
        "/devices/door-7",
        "/time",
        "/system",
        f"/commands/{failed}?at={position}",
    )
    for size in (WIDE, PHONE):
        tab = console.tab(admin, size=size)
        for path in pages if size is WIDE else pages[:2]:
            page = tab.open(path)
            page.locator("main :is(.row, table, .failure, .empty):visible").first.wait_for()
            page.locator(".skeleton").first.wait_for(state="detached")
            page.evaluate(AXE)
            if wrong := faults(page, WCAG):
                found[f"{path} light {size['width']}"] = wrong
            if size is WIDE:
                page.emulate_media(color_scheme="dark")
                if wrong := faults(page, ["color-contrast"]):
                    found[f"{path} dark {size['width']}"] = wrong
                page.emulate_media(color_scheme="light")
    assert json.dumps(found, indent=1) == "{}"
