"""The dashboard and the alert rules use only metrics and labels that a broker really exposes."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from prometheus_client.parser import text_string_to_metric_families

from broker.domain.events import TYPES
from broker.metrics.metrics import Metrics
from broker.mqtt.figures import figures
from broker.nodes.figures import watch_node
from broker.world import SystemClock
from tests.integration.mqtt.listener_support import Owner, listening
from tests.system.api_support import served

DOCS = Path(__file__).parents[2] / "docs"
# Labels that Prometheus adds when it scrapes.
SCRAPED = {"instance", "job"}
FUNCTIONS = {"absent", "delta", "histogram_quantile", "increase", "max", "min", "rate", "sum"}
WORDS = FUNCTIONS | {"by", "and", "or", "unless", "on"}
NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
MATCHER = re.compile(rf'({NAME})\s*(=~|!~|!=|=)\s*"([^"]*)"')
RULE_FIELDS = {"alert", "expr", "for", "labels", "annotations"}
# Label values that a healthy run does not produce.
RARE = {("status", "500")}

Samples = dict[str, list[dict[str, str]]]


async def _of_listener() -> str:
    """What a broker with its own MQTT server, or with other nodes, exposes beside the rest."""
    async with listening(Owner()) as server:
        metrics = Metrics(SystemClock())
        metrics.watch_lookups(lambda: 0, lambda: 0)
        metrics.watch_listener(figures(server.listener), {0x87: 1})
        watch_node(
            metrics.registry,
            owns=lambda: 1,
            term=lambda: 1,
            beat_age_sec=lambda: 1,
            alive=lambda: 1,
            held=lambda: 0,
            held_bytes=lambda: 0,
            outcomes={"answered": 1, "held": 1},
        )
        return metrics.text().decode()


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """Every sample's name, with the label sets it had."""
    found: Samples = {}
    with served(tmp_path_factory.mktemp("api") / "data") as here, here.client() as client:
        text = client.get("/metrics").text
    text += asyncio.run(_of_listener())
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    return found


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DOCS / "grafana.json").read_text())
    return found


def rules() -> list[dict[str, Any]]:
    found = yaml.safe_load((DOCS / "alerts.yml").read_text())
    assert found.keys() == {"groups"}
    assert all(group.keys() == {"name", "rules"} for group in found["groups"])
    return [rule for group in found["groups"] for rule in group["rules"]]


def expressions() -> list[str]:
    panels = [panel for panel in dashboard()["panels"] if panel["type"] != "row"]
    return [target["expr"] for panel in panels for target in panel["targets"]] + [
        rule["expr"] for rule in rules()
    ]


def faults(expression: str, samples: Samples) -> Iterator[str]:
    """Metrics, labels and values in an expression that the broker does not expose."""
    labels = {label for seen in samples.values() for each in seen for label in each} | SCRAPED
    text = re.sub(r"\$__rate_interval|\[\d+[mhs]\]", "", expression)
    for name, inside in re.findall(rf"({NAME})\s*(?:\{{([^}}]*)\}})?", MATCHER.sub("", text)):
        del inside
        if name not in samples and name not in WORDS | labels and name != "le":
            yield f"no metric {name}"
    for name, inside in re.findall(rf"({NAME})\{{([^}}]*)\}}", text):
        for label, how, value in MATCHER.findall(inside):
            values = {each[label] for each in samples.get(name, []) if label in each}
            if label in SCRAPED:
                continue
            if not values:
                yield f"{name} has no label {label}"
            elif (label, value) in RARE:
                continue
            elif how in ("=", "=~") and not any(re.fullmatch(value, known) for known in values):
                yield f"{name} is never {label}={value}"
    for grouped in re.findall(r"by \(([^)]*)\)", text):
        for label in filter(None, re.split(r",\s*", grouped)):
            if label not in labels:
                yield f"no label {label}"


@pytest.mark.parametrize("expression", expressions())
def test_every_expression_uses_existing_metrics(expression: str, samples: Samples) -> None:
    assert list(faults(expression, samples)) == []
    assert any(name in expression for name in samples)


@pytest.mark.parametrize(
    "expression",
    [
        "ordain_open_comands > 1",
        'rate(ordain_events_total{typ="created"}[5m])',
        'rate(ordain_events_total{type="creatd"}[5m])',
        "sum by (typ) (ordain_events_total)",
    ],
)
def test_a_planted_mistake_is_found(expression: str, samples: Samples) -> None:
    assert list(faults(expression, samples)) != []


def test_a_rule_has_only_known_fields_and_a_summary() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names)
    for rule in rules():
        assert rule.keys() <= RULE_FIELDS, rule
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["summary"]
        assert re.fullmatch(r"\d+[smh]", rule.get("for", "1m"))


def test_the_dashboard_has_what_an_import_needs() -> None:
    board = dashboard()
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    assert {variable["name"] for variable in board["templating"]["list"]} == {"datasource", "instance"}
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_every_event_type_has_a_counter_that_starts_at_zero(samples: Samples) -> None:
    assert {each["type"] for each in samples["ordain_events_total"]} == set(TYPES)


def test_every_metric_is_on_the_dashboard(samples: Samples) -> None:
    asked = " ".join(expressions())
    ours = {re.sub("_(total|bucket|sum|count)$", "", name) for name in samples if name.startswith("ordain_")}
    assert {name for name in ours if name not in asked} == {"ordain_info", "ordain_commit_events"}
