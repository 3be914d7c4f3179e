"""The loss curve of a run: `loss.csv`, a line each step, and `loss.png`.

Owns both files. Knows no model and no schedule.
"""

from __future__ import annotations

import csv
import logging
import os
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from trimkv_core.options import SettingsError

logger = logging.getLogger(__name__)

CSV_NAME = "loss.csv"
PNG_NAME = "loss.png"


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """One step.

    Attributes:
        step: counted from 1.
        tokens: trained on so far, padding left out, over all processes.
        loss: what was minimised: losses and weighted capacity.
        kl, ntp: mean over the counted tokens, in nats.
        capacity: the hinge, unweighted.
        soft_size: mean retention sum at the documents' ends, entries a stream.
        learning_rate: of this step.
        gradient_norm: before it was cut.
        seconds: the step took.
        capacity_target: entries a stream that were asked for.
        kappa: the decay's far slope.
    """

    step: int
    tokens: int
    loss: float
    kl: float
    ntp: float
    capacity: float
    soft_size: float
    learning_rate: float
    gradient_norm: float
    seconds: float
    capacity_target: float
    kappa: float


COLUMNS = tuple(field.name for field in fields(CurvePoint))


class LossCurve:
    """Appends a point each step, and draws them all.

    Numbers are written so that reading them gives the same number again.
    """

    def __init__(self, folder: Path, *, last_step: int) -> None:
        """Begin a curve, or go on with one: points after `last_step`, of steps that will be made again, go."""
        self._path, self._picture = folder / CSV_NAME, folder / PNG_NAME
        kept = [point for point in read_curve(folder) if point.step <= last_step]
        scratch = self._path.with_name(f".{CSV_NAME}")
        with scratch.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(astuple(point) for point in kept)
        os.replace(scratch, self._path)  # noqa: PTH105  (as `Path.replace`, which hides that it is atomic)

    def append(self, point: CurvePoint) -> None:
        """Write one step down, at once."""
        with self._path.open("a", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(astuple(point))

    def draw(self) -> None:
        """Draw all points; without matplotlib, nothing."""
        pyplot = _load_pyplot()
        points = read_curve(self._path.parent)
        if pyplot is None or not points:
            return
        steps = [point.step for point in points]
        figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
        for name in ("loss", "kl", "ntp", "capacity"):
            top.plot(steps, [getattr(point, name) for point in points], label=name, linewidth=1)
        top.set_ylabel("nats a token (capacity: overrun)")
        top.set_yscale("symlog", linthresh=0.01)
        top.legend(loc="upper right")
        bottom.plot(steps, [point.soft_size for point in points], label="soft size", linewidth=1)
        bottom.plot(steps, [point.capacity_target for point in points], label="capacity target", linewidth=1)
        bottom.set_ylabel("entries a stream")
        bottom.set_yscale("symlog", linthresh=1)
        bottom.set_xlabel("step")
        bottom.legend(loc="upper right")
        scratch = self._picture.with_name(f".{PNG_NAME}")
        figure.savefig(scratch, format="png", dpi=110)
        pyplot.close(figure)
        scratch.replace(self._picture)


def read_curve(folder: Path) -> list[CurvePoint]:
    """The points in a folder's `loss.csv`, none without one; a last line that was cut off by a kill is left out.

    Raises:
        SettingsError: a file that is no loss curve.
    """
    path = folder / CSV_NAME
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    lines = list(csv.reader(text[: text.rfind("\n") + 1].splitlines()))
    if lines and tuple(lines[0]) != COLUMNS:
        raise SettingsError(f"{path} is no loss curve of this version: its columns are {', '.join(lines[0])}")
    try:
        return [CurvePoint(**{n: _number(n, v) for n, v in zip(COLUMNS, line, strict=True)}) for line in lines[1:]]
    except ValueError as error:
        raise SettingsError(f"{path} is damaged: {error}") from None


def _number(name: str, value: str) -> Any:
    return int(value) if name in ("step", "tokens") else float(value)


def _load_pyplot() -> Any:
    try:
        import matplotlib as mpl
    except ImportError:
        logger.warning("no %s: it needs matplotlib (pip install matplotlib)", PNG_NAME)
        return None
    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot
