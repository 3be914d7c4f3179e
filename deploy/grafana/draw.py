"""Draws a dashboard as a picture, its panels where Grafana puts them, from what a Prometheus answers to their queries.

    python deploy/grafana/draw.py --prometheus http://127.0.0.1:9090 --dashboard overview --output overview.png

For a machine without Grafana. Needs matplotlib and httpx, which `pip install '.[test]'` brings.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Sequence
from pathlib import Path

import build
from answers import Source
from drawers import DRAWN, EDGE, FAINT, INK, LEFT, LEGEND, PADDING, SMALL, TEXT, TICKS
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from panels import Json
from PIL import Image

# Inches of one column and of one line of Grafana's grid, and of what is around a panel's drawing.
COLUMN, LINE = 0.5, 0.27
GAP, TITLE, RIGHT, SCALE = 0.05, 0.36, 0.14, 0.75
PAPER, CARD = "#f1f2f4", "#ffffff"

Box = tuple[float, float, float, float]


def inside(panel: Json, card: Box) -> Box:
    """Where a panel's axes lie in its card: left, bottom, width, height."""
    left, bottom, width, height = card
    match panel["type"]:
        case "stat" | "table":
            margins = (PADDING, PADDING, PADDING)
        case "heatmap":
            margins = (LEFT, TICKS + PADDING, SCALE)
        case "bargauge":
            margins = (LEFT, TICKS + PADDING, RIGHT)
        case _:
            margins = (LEFT, TICKS + LEGEND, RIGHT)
    before, under, after = margins
    return left + before, bottom + under, width - before - after, height - under - TITLE


def draw(board: Json, source: Source, output: Path) -> None:
    """All panels of a dashboard into one picture."""
    width = 24 * COLUMN
    height = LINE * (2 + max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in board["panels"]))
    figure = Figure(figsize=(width, height), dpi=100, facecolor=PAPER)
    figure.text(PADDING / width, 1 - 0.3 / height, board["title"], fontsize=13, weight="bold", color=INK, va="center")

    def part(box: Box) -> Box:
        return box[0] / width, box[1] / height, box[2] / width, box[3] / height

    for panel in board["panels"]:
        place = panel["gridPos"]
        left, wide, high = place["x"] * COLUMN, place["w"] * COLUMN, place["h"] * LINE
        bottom = height - (place["y"] + 2) * LINE - high
        if panel["type"] == "row":
            where = (PADDING / width, (bottom + high / 2) / height)
            figure.text(*where, panel["title"], fontsize=10, weight="bold", color=INK, va="center")
            continue
        card = (left + GAP, bottom + GAP, wide - 2 * GAP, high - 2 * GAP)
        x, y, w, h = part(card)
        figure.add_artist(Rectangle((x, y), w, h, facecolor=CARD, edgecolor=EDGE, linewidth=0.8, zorder=-1))
        heading, size = panel["title"], TEXT
        if panel["type"] == "stat":  # too narrow for one line
            heading, size = heading.replace(": ", ":\n"), SMALL
        where = (x + PADDING / width, y + h - TITLE / 2 / height)
        figure.text(*where, heading, fontsize=size, weight="bold", color=INK, va="center")
        axes = figure.add_axes(part(inside(panel, card)), facecolor=CARD)
        axes.spines[:].set_visible(False)
        axes.grid(visible=True, color=EDGE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=SMALL, length=0, labelcolor=FAINT, pad=5)
        DRAWN[panel["type"]](axes, panel, source)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", facecolor=PAPER)
    # A palette makes it half as large.
    Image.open(drawn).convert("RGB").quantize().save(output, optimize=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description="Draw a dashboard from a running Prometheus.")
    parser.add_argument("--prometheus", required=True, help="its URL")
    parser.add_argument("--dashboard", required=True, choices=build.DASHBOARDS, help="which one")
    parser.add_argument("--start", type=float, help="Unix seconds; an hour before the end by default")
    parser.add_argument("--end", type=float, help="Unix seconds; now by default")
    parser.add_argument("--rate-interval", default="1m", help="four scrape intervals (default: 1m)")
    parser.add_argument("--output", type=Path, required=True, help="picture to write")
    options = parser.parse_args(arguments)
    end = options.end or time.time()
    source = Source(options.prometheus, options.start or end - 3600, end, options.rate_interval)
    draw(build.DASHBOARDS[options.dashboard](), source, options.output)


if __name__ == "__main__":
    main()
