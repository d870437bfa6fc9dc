"""`ordain doctor`: prints its findings. The exit code is 0 also with warnings, and 1 with a fault."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import httpx2
from cyclopts import Parameter

from broker.cli.base import Config, Data, Json, print_json, settings_of
from broker.control import ask_alone
from broker.operations import doctor as looks
from broker.operations.asking import REFUSED, Failed
from broker.operations.doctor import Finding

BROKEN_LOG = (
    "format",
    "file",
    "chain",
    "projections",
)  # after a fault here, no request may use the broken log


def doctor(
    *,
    canary: Annotated[bool, Parameter(negative="")] = False,
    data: Data = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Check everything a broker depends on, and say how to correct problems. A broker may run or not.

    Parameters
    ----------
    canary
        Also check the MQTT server's access rules as a device. The first run registers two devices for it, and
        keeps their tokens in the data directory.
    """
    settings = settings_of(config, data=data)
    found = list(looks.postgresql(settings) if settings.log else looks.files(Path(settings.data)))

    async def asking(client: httpx2.AsyncClient, serving: bool) -> list[Finding]:
        return [
            *await looks.broker(client, serving),
            *await looks.mqtt(client, serving, settings, canary=canary),
        ]

    if not any(each.level == "fault" and each.check in BROKEN_LOG for each in found):
        found += ask_alone(settings, asking)
    faults = sum(each.level == "fault" for each in found)
    if as_json:
        print_json([each._asdict() for each in found])
    else:
        for each in found:
            print(f"{each.level:8}{each.check:12}{each.says}" + (f"\n{'':20}→ {each.do}" if each.do else ""))
    if faults:
        raise Failed(REFUSED, f"{faults} fault{'s' if faults > 1 else ''} found")
