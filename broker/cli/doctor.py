"""`ordain doctor`: prints what it finds; exit 0 also with warnings, 1 with a fault."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import httpx2
from cyclopts import Parameter

from broker.cli.base import Config, Data, Json, ask, print_json, settings_of
from broker.operations import doctor as looks
from broker.operations.asking import REFUSED, Failed
from broker.operations.doctor import Finding

BROKEN_LOG = ("file", "chain", "projections")  # with one of these nothing is asked: it would be built on


def doctor(
    *,
    canary: Annotated[bool, Parameter(negative="")] = False,
    data: Data = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Look at everything a broker stands on, beside it or without one, and say what to do.

    Parameters
    ----------
    canary
        Also try the MQTT server's rules as a device: registers two devices of its own, at the first time.
    """
    settings = settings_of(config, data=data)
    found = list(looks.files(Path(settings.data)))

    async def asking(client: httpx2.AsyncClient, serving: bool) -> list[Finding]:
        return [*await looks.broker(client, serving), *await looks.mqtt(client, serving, canary)]

    if not any(each.level == "fault" and each.check in BROKEN_LOG for each in found):
        found += ask(data, config, asking)
    faults = sum(each.level == "fault" for each in found)
    if as_json:
        print_json([each._asdict() for each in found])
    else:
        for each in found:
            print(f"{each.level:8}{each.check:12}{each.says}" + (f"\n{'':20}→ {each.do}" if each.do else ""))
    if faults:
        raise Failed(REFUSED, f"{faults} fault{'s' if faults > 1 else ''} found")
