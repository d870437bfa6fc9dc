"""The signature check on the page about webhooks: it accepts only genuine requests."""

from __future__ import annotations

import asyncio
import json
import re
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from standardwebhooks import Webhook

from tests.sdk_driver import LANGUAGES, run_javascript, run_python
from tests.system.support import ROOT

PAGE = (ROOT / "docs" / "how-to" / "webhooks.md").read_text()
BLOCK = {"python": "python", "javascript": "js"}
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{BLOCK[language]}\n(.*?)```", PAGE, re.DOTALL)


Case = tuple[dict[str, str], str]


def signed(body: str, at: float, secret: str = SECRET) -> Case:
    stamp = datetime.fromtimestamp(int(at), UTC)
    signature = Webhook(secret).sign("msg_1", stamp, body)
    return {"webhook-id": "msg_1", "webhook-timestamp": str(int(at)), "webhook-signature": signature}, body


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_webhook_check_accepts_only_genuine_requests(tmp_path: Path, language: str) -> None:
    now = time.time()
    headers, body = signed('{"grün": "🔒"}', now)
    others, _ = signed(body, now, "whsec_" + "A" * 32)
    rotated = {"webhook-signature": f"{others['webhook-signature']} {headers['webhook-signature']}"}
    cases: list[tuple[Case, bool]] = [
        ((headers, body), True),
        ((headers | rotated, body), True),
        ((headers, body + " "), False),
        ((headers | {"webhook-id": "msg_2"}, body), False),
        ((others, body), False),
        ((headers | {"webhook-signature": "v1,"}, body), False),
        (signed(body, now - 3_600), False),
        (signed(body, now + 3_600), False),
    ]
    source = blocks(language)[-1]
    given = [[headers, body] for (headers, body), _ in cases]
    if language == "python":
        theirs = "\nprint([is_genuine(secret, headers, body.encode()) for headers, body in given])"
        printed = asyncio.run(run_python(source + theirs, secret=SECRET, given=given)).lower()
    else:
        theirs = (
            "\nconsole.log(JSON.stringify(given.map(([headers, body]) => isGenuine(secret, headers, body))));"
        )
        printed = run_javascript(source + theirs, tmp_path, secret=SECRET, given=given)
    assert json.loads(printed) == [genuine for _, genuine in cases]
