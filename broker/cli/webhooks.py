"""`ordain webhooks`: lists and controls webhooks, for the operator. It never sees their secrets."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import quote

from cyclopts import App, Parameter

from broker.cli.base import Config, Data, Json, ask, print_json, print_table
from broker.operations.asking import Client, call, pages

webhooks = App(name="webhooks", help="Webhooks: list, pause, resume, redrive.")


@webhooks.command(name="list")
def list_webhooks(*, data: Data = None, config: Config = None, as_json: Json = False) -> None:
    """List all webhooks, newest first, with their lag, and why they are stopped or deliveries fail."""

    async def asking(client: Client, serving: bool) -> list[dict[str, Any]]:
        hooks = await pages(client, "/v1/webhooks")
        for each in hooks:
            path = f"/v1/webhooks/{each['id']}/deliveries"
            failed = await pages(client, path, {"outcome": "failed"}, 1) if each["failing"] else []
            each["last_failure"] = failed[0] if failed else None
        return hooks

    found = ask(data, config, asking)
    if as_json:
        print_json(found)
        return
    rows = [
        (each["id"], each["project"], each["state"], str(each["lag"]), each["url"], _why(each))
        for each in found
    ]
    print_table(("id", "project", "state", "lag", "url", "reason"), rows)


def _why(webhook: dict[str, Any]) -> str:
    reasons = [webhook["reason"]] if webhook["reason"] else []
    if failing := webhook["failing"]:
        reasons.append(
            f"position {failing['position']} failed {failing['attempts']} times since {failing['since']}"
        )
    if last := webhook["last_failure"]:
        reasons.append(last["error"] or f"it answered {last['status']}")
    return ": ".join(reasons)


@webhooks.command(name="pause")
def pause_webhook(
    webhook: str, /, *, data: Data = None, config: Config = None, as_json: Json = False
) -> None:
    """Stop deliveries to a webhook until it is resumed. Events are kept and sent then."""
    _change(data, config, as_json, "PATCH", webhook, "", {"enabled": False})


@webhooks.command(name="resume")
def resume_webhook(
    webhook: str, /, *, data: Data = None, config: Config = None, as_json: Json = False
) -> None:
    """Continue deliveries where they stopped. Failed events are retried at once."""
    _change(data, config, as_json, "POST", webhook, "/resume")


@webhooks.command(name="redrive")
def redrive_webhook(
    webhook: str,
    /,
    *,
    position: Annotated[str, Parameter(name="--from")],
    data: Data = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Send all of a webhook's events again from a position on, with the same ids.

    Parameters
    ----------
    position
        The first position in the log to send: a number, or `<log id>:<number>`.
    """
    _change(data, config, as_json, "POST", webhook, "/redrive", {"from": position})


def _change(
    data: Data,
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
