"""`ordain webhooks`: where events are sent to, for the operator. Secrets never pass through here."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import quote

from cyclopts import App, Parameter

from broker.cli.base import Config, Data, Json, ask, print_json, print_table
from broker.operations.asking import call, pages

webhooks = App(name="webhooks", help="Webhooks: list, pause, resume, redrive.")


@webhooks.command(name="list")
def list_webhooks(*, data: Data = None, config: Config = None, as_json: Json = False) -> None:
    """All webhooks, newest first, with how far behind each is and why it stands still."""
    found = ask(data, config, lambda client, _: pages(client, "/v1/webhooks"))
    if as_json:
        print_json(found)
        return
    rows = [
        (each["id"], each["project"], each["state"], str(each["lag"]), each["url"], each["reason"] or "")
        for each in found
    ]
    print_table(("id", "project", "state", "lag", "url", "reason"), rows)


@webhooks.command(name="pause")
def pause_webhook(
    webhook: str, /, *, data: Data = None, config: Config = None, as_json: Json = False
) -> None:
    """Send nothing to it until it is resumed; nothing is lost meanwhile."""
    _change(data, config, as_json, "PATCH", webhook, "", {"enabled": False})


@webhooks.command(name="resume")
def resume_webhook(
    webhook: str, /, *, data: Data = None, config: Config = None, as_json: Json = False
) -> None:
    """Go on where it stopped; what failed is tried at once."""
    _change(data, config, as_json, "POST", webhook, "/resume")


@webhooks.command(name="redrive")
def redrive_webhook(
    webhook: str,
    /,
    *,
    position: Annotated[int, Parameter(name="--from")],
    data: Data = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Send everything it wants again, under the same ids.

    Parameters
    ----------
    position
        Position in the log from which on.
    """
    _change(data, config, as_json, "POST", webhook, "/redrive", {"from": position})


def _change(
    data: str | None,
    config: str | None,
    as_json: bool,
    method: str,
    webhook: str,
    more: str,
    body: dict[str, Any] | None = None,
) -> None:
    path = f"/v1/webhooks/{quote(webhook, safe='')}{more}"
    changed = ask(data, config, lambda client, _: call(client, method, path, body))
    if as_json:
        print_json(changed)
    else:
        print(f"{changed['id']} {changed['state']}, from position {changed['cursor']}")
