"""Every page of the documentation: its examples run, and print the answers it shows.

`ORDAIN_WRITE_ANSWERS=1 pytest -n0 tests/system/docs/test_pages.py -k PAGE` writes the answers into the page.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.system.conftest import NewBroker
from tests.system.docs.pages import (
    READ,
    RUN,
    SHOWN,
    Block,
    Reader,
    blocks_of,
    check_read,
    fits,
    laid_out,
    one_module,
)
from tests.system.support import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WRITE = bool(os.environ.get("ORDAIN_WRITE_ANSWERS"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_examples_of_a_page_run_and_print_what_it_shows(
    page: Path, new_broker: NewBroker, tmp_path: Path
) -> None:
    text = page.read_text()
    blocks = one_module(list(blocks_of(text)))
    reader = Reader(new_broker, tmp_path)
    changes: list[tuple[int, int, str]] = []
    try:
        for block, following in zip(blocks, [*blocks, None][1:], strict=True):
            assert block.language in RUN | READ | SHOWN, f"{block}: a block needs one of {RUN | READ | SHOWN}"
            if block.is_answer:
                continue
            if block.language in READ:
                check_read(block)
            if "skip" in block.directives:
                assert block.directives["skip"], f"{block}: say why it is not run"
            elif block.language in RUN or (block.language in READ | SHOWN and block.title):
                answer = following if following is not None and following.is_answer else None
                changes += judged(block, answer, reader.run(block))
    finally:
        reader.close()
    if changes:
        for start, end, new in reversed(changes):
            text = text[:start] + new + text[end:]
        page.write_text(text)


def judged(block: Block, answer: Block | None, printed: str) -> list[tuple[int, int, str]]:
    """Fails if a page does not show what was printed; while answers are written: the change to the page."""
    if answer is None and (not printed.strip() or block.language != "sh"):
        return []
    if answer is not None and fits(answer, printed):
        return []
    language, text = laid_out(printed)
    if not WRITE:
        shown = answer.text if answer is not None else "nothing"
        pytest.fail(f"{block}\n--- printed\n{text}--- the page shows\n{shown}", pytrace=False)
    lines = [f'```{language} title="Answer"\n', *text.splitlines(keepends=True), "```"]
    new = "".join(block.indent + line for line in lines)
    return [(block.end, block.end, "\n\n" + new)] if answer is None else [(answer.start, answer.end, new)]
