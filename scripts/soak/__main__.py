"""`make soak`: long runs with real processes and faults. They print figures and check the delivery promises.

backlog: a long queue while all devices are offline, two kill -9, then all devices come online at once.
drain: a longer queue for many more devices, and the memory of a waiting command. slope: does memory grow with
the number of closed commands? away: the MQTT server or the broker is down for a while. overload: twice the
load that the broker can hold. faults (`make faults`): everything fails at random moments. The exit code is 1
if a promise was broken. Speed is never judged.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from pathlib import Path

import msgspec
import uvloop

from scripts.soak import away as soak_away
from scripts.soak import backlog as soak_backlog
from scripts.soak import drain as soak_drain
from scripts.soak import faults as soak_faults
from scripts.soak import overload as soak_overload
from scripts.soak import slope as soak_slope
from scripts.soak.judge import Figures

Run = Callable[[Path, argparse.Namespace, Figures], Coroutine[None, None, list[str]]]
RUNS: dict[str, Run] = {
    "backlog": soak_backlog.run,
    "drain": soak_drain.run,
    "slope": soak_slope.run,
    "away": soak_away.run,
    "overload": soak_overload.run,
    "faults": soak_faults.run,
}


def main() -> int:
    given = _options()
    figures: Figures = {"load before": "{:.1f} {:.1f} {:.1f}".format(*os.getloadavg())}
    since = time.monotonic()
    home = Path(tempfile.mkdtemp(prefix="ordain-soak-", dir=given.dir))
    try:
        faults = uvloop.run(RUNS[given.run](home, given, figures))
    except BaseException:
        for log in sorted(home.glob("*.log")):
            print(f"--- {log}\n{log.read_text(errors='replace')[-2_000:]}", file=sys.stderr)
        raise
    if faults or given.keep:
        print(f"all files are kept in {home}", file=sys.stderr)
    else:
        shutil.rmtree(home)
    figures["total seconds"] = time.monotonic() - since
    figures["load after"] = "{:.1f} {:.1f} {:.1f}".format(*os.getloadavg())
    if given.json:
        print(msgspec.json.encode({"figures": figures, "faults": faults}).decode())
    else:
        for name, value in figures.items():
            print(f"{name:52} {value if isinstance(value, str) else f'{value:,.2f}':>14}")
        print("\n".join(f"FAULT {fault}" for fault in faults) or "no fault found")
    return int(bool(faults))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.soak", description=__doc__)
    parser.add_argument("--dir", type=Path, help="directory for the log; not a file system in memory")
    parser.add_argument(
        "--keep", action="store_true", help="keep all files; after a fault they are always kept"
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of a table")
    runs = parser.add_subparsers(dest="run", required=True)
    backlog = runs.add_parser("backlog", help="a long queue for devices that come online at once")
    backlog.add_argument("--devices", type=int, default=1_000)
    backlog.add_argument("--count", type=int, default=100_000, help="at most 400 per device")
    backlog.add_argument("--child", action="store_true", help="use a Mosquitto child, killed with the broker")
    backlog.add_argument(
        "--ack-timeout", type=int, default=10, help="seconds; interrupted commands wait for it"
    )
    drain = runs.add_parser("drain", help="very many queued commands for very many devices that come online")
    drain.add_argument("--devices", type=int, default=100_000)
    drain.add_argument("--count", type=int, default=1_000_000)
    slope = runs.add_parser("slope", help="memory by number of closed commands")
    slope.add_argument("--devices", type=int, default=100)
    slope.add_argument("--count", type=int, default=300_000)
    slope.add_argument("--warm-up", type=int, default=100_000)
    slope.add_argument("--every", type=int, default=50_000)
    slope.add_argument(
        "--trace", type=Path, metavar="PATH", help="write growing objects here; slows the broker a lot"
    )
    away = runs.add_parser("away", help="the MQTT server or the broker is down for a while")
    away.add_argument("--devices", type=int, default=100)
    away.add_argument("--rate", type=float, default=30, help="commands a second during the whole run")
    away.add_argument("--seconds", type=float, default=60)
    away.add_argument(
        "--time-out", type=int, default=5, help="ack time-out, s; the result time-out is three times it"
    )
    away.add_argument("--how", nargs="+", choices=soak_away.WAYS, default=list(soak_away.USUAL))
    overload = runs.add_parser("overload", help="twice the load that the broker can hold")
    overload.add_argument("--devices", type=int, default=20)
    overload.add_argument("--warm-up", type=int, default=10_000, help="commands that measure what it holds")
    overload.add_argument("--seconds", type=float, default=60)
    overload.add_argument("--times", type=float, default=2, help="times what it can hold")
    overload.add_argument("--queue", type=int, default=100, help="open commands of one name and device")
    faults = runs.add_parser("faults", help="kills, stops, cuts, full disks and power cuts at random moments")
    faults.add_argument("--devices", type=int, default=20)
    faults.add_argument("--rate", type=float, default=20, help="commands a second during the whole run")
    faults.add_argument("--minutes", type=float, default=10)
    faults.add_argument("--seed", type=int, default=0, help="decides the faults, but not when they strike")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
