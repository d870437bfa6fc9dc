"""Draws the named figures as an SVG picture: each as a ratio to its floor, on a logarithmic scale."""

from __future__ import annotations

import math
import statistics

from scripts.bench.named import Figures, named, ratios

WIDTH, LEFT, RIGHT = 880, 280, 80
ROW, TOP = 30, 60
DECADES = range(-2, 3)  # 0.01 to 100
STYLE = (
    "text{font:14px system-ui,sans-serif;fill:#1f2933}.n{text-anchor:end}.t{font-size:12px;fill:#52606d}"
    ".m{text-anchor:middle}line{stroke:#cbd2d9}.one{stroke:#52606d}.spread{stroke:#2563b0;stroke-width:3}"
    "circle{fill:#2563b0}.page{fill:#fff}"
)


def plot(figures: dict[str, Figures], machine: dict[str, str]) -> str:
    """The whole SVG. A point is the median over the rounds, a bar goes from the lowest to the highest."""
    found = named(figures)
    bottom = TOP + ROW * len(found)
    told = f"Cores: {machine['cores']}. Python: {machine['Python']}. Load: {machine['load']}."
    rows = [
        line
        for at, one in enumerate(found)
        for line in _row(f"{one.name}, {one.unit}", ratios(figures, one.name), TOP + ROW * at + ROW // 2)
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 52}" role="img">',
            "<title>Figures of the benchmark as ratios to their floors</title>",
            f"<style>{STYLE}</style>",
            f'<rect class="page" width="{WIDTH}" height="{bottom + 52}" rx="8"/>',
            '<text x="16" y="28">Figure / floor of the same run.',
            "Of rates (…/s) more is better, of µs and ms less.</text>",
            *(line for decade in DECADES for line in _scale(decade, bottom)),
            *rows,
            f'<text class="t" x="16" y="{bottom + 42}">{told}</text>',
            "</svg>\n",
        ]
    )


def _x(ratio: float) -> float:
    lowest, highest = 10.0 ** DECADES[0], 10.0 ** DECADES[-1]
    share = math.log10(min(max(ratio, lowest), highest) / lowest) / (len(DECADES) - 1)
    return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)


def _scale(decade: int, bottom: int) -> list[str]:
    x, kind = _x(10.0**decade), ' class="one"' if decade == 0 else ""
    return [
        f'<line{kind} x1="{x}" y1="{TOP}" x2="{x}" y2="{bottom}"/>',
        f'<text class="t m" x="{x}" y="{bottom + 18}">{10.0**decade:g}</text>',
    ]


def _row(name: str, found: list[float], y: int) -> list[str]:
    median = statistics.median(found)
    return [
        f'<text class="n" x="{LEFT - 16}" y="{y + 5}">{name}</text>',
        f'<line class="spread" x1="{_x(min(found))}" y1="{y}" x2="{_x(max(found))}" y2="{y}"/>',
        f'<circle cx="{_x(median)}" cy="{y}" r="5"/>',
        f'<text x="{WIDTH - RIGHT + 16}" y="{y + 5}">{median:.2g}</text>',
    ]
