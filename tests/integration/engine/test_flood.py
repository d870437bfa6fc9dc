"""What one device may send, and what it costs everybody else."""

from __future__ import annotations

import asyncio
from pathlib import Path

from structlog.testing import capture_logs

from broker.seams import Message
from tests.integration.core_support import ManualClock, running, until
from tests.stretches import LONGEST_SEC, Stretches


async def test_a_flood_with_qos_0_neither_delays_another_project_nor_holds_the_loop_up(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as bench:
        intake = bench.core.intake
        intake.embedded = False
        dropped: list[str] = []
        intake.on_unmatched = dropped.append
        await bench.device()
        command = await bench.order()
        await until(lambda: bench.state(command.id) == "published")
        async with Stretches() as longest:
            for n in range(20_000):
                intake.message(Message(topic=f"iotee/dev/loud-{n % 40}/ack", payload=b"{", qos=0))
                if n == 19_000:
                    text = b'{"id": "%s", "status": "executed"}' % command.id.encode()
                    intake.message(Message(topic="iotee/dev/lamp-1/ack", payload=text))
                if n % 500 == 0:
                    await asyncio.sleep(0)
            before = len(dropped)
            await until(lambda: bench.state(command.id) == "executed")
            assert len(dropped) - before < 500  # it did not wait behind the flood
            await until(lambda: not len(intake._waiting))
        assert dropped.count("overrun") > 15_000
        assert longest.cpu_sec < LONGEST_SEC


async def test_large_answers_together_do_not_hold_the_loop_up(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        await bench.device()
        command = await bench.order()
        await until(lambda: bench.state(command.id) == "published")
        large = b'{"id":"unknown","status":"executed","result":[' + b",".join([b"{}"] * 20_000) + b"]}"
        kept: list[str] = []
        bench.core.intake.on_unmatched = kept.append
        async with Stretches() as longest:
            for _ in range(40):
                bench.core.intake.message(Message(topic="iotee/dev/lamp-1/ack", payload=large))
            await until(lambda: len(kept) == 40)
        assert longest.cpu_sec < LONGEST_SEC


async def test_answers_that_match_nothing_get_a_few_short_lines_and_a_count(tmp_path: Path) -> None:
    clock = ManualClock()
    async with running(tmp_path, clock) as bench:
        kept: list[str] = []
        bench.core.intake.on_unmatched = kept.append
        topic = "iotee/dev/\x1b[2J\n" + "x" * 300 + "/ack"
        with capture_logs() as lines:
            for count in (1_000, 1):
                kept.clear()
                for _ in range(count):
                    bench.core.intake.message(Message(topic=topic, payload=b"{"))
                await until(lambda: len(kept) == count)  # noqa: B023
                clock.pass_ms(10_000)
        said = [line for line in lines if line["event"] == "answer.unmatched"]
        assert [line.get("left_out") for line in said] == [None] * 10 + [990]
        assert {line["topic"] for line in said} == {"iotee/dev/\\x1b[2J\\n" + "x" * 49 + "…"}
