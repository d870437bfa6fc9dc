"""Numbers in JSON that take long to read: those with an exponent near the end of what a float can hold.

To read one takes as long as to read a hundred others, and it may have only six bytes.
"""

from __future__ import annotations

import re

MOST_HARD = 500  # of one message
FEW = 8  # letters that may begin an exponent: fewer numbers cost nothing
_HARD = re.compile(rb"[eE][+-]?0*[23][0-9]{2}[ \t\r\n]*[],}]")


def hard_numbers(text: bytes) -> int:
    """How many numbers of a JSON text have an exponent from 200 to 399. Beyond that they are quick again."""
    if text.count(b"e") + text.count(b"E") <= FEW:
        return 0
    return len(_HARD.findall(text))


def too_hard(text: bytes) -> str | None:
    """Why a JSON text takes too long to read; None if it does not."""
    if (found := hard_numbers(text)) <= MOST_HARD:
        return None
    return f"it has {found} numbers with an exponent beyond 200; at most {MOST_HARD} are allowed"
