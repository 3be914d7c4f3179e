"""Methods of the public `kvpress` package as answerers: another Python and another process read the probes.

Knows how the client is called, not what the package does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trimkv_core.evaluation.baselines import MethodError
from trimkv_core.evaluation.feeding import Regime
from trimkv_core.evaluation.kvpress_client import KVPRESS_METHODS, run_kvpress
from trimkv_core.evaluation.methods import KVPRESS, Case
from trimkv_core.evaluation.tasks import Probe, ProbeResult

TIMEOUT_SECONDS = 6 * 3600


@dataclass(frozen=True, slots=True)
class KvpressAnswerer:
    """Answers probes through kvpress.

    Attributes:
        python: of the environment that has kvpress.
        model_folder: of the base model.
        case: method and budget.
        regime: how it is fed.
        device: where the other PyTorch computes.
        threads: of the other PyTorch on a CPU; None leaves the choice to it.
    """

    python: Path
    model_folder: Path
    case: Case
    regime: Regime
    device: str = "cpu"
    threads: int | None = None

    def answer(self, probes: Sequence[Probe]) -> list[ProbeResult]:
        if self.case.memory_size is None:
            raise MethodError(f"{self.case.method} needs a budget")
        return run_kvpress(
            self.python,
            self.model_folder,
            self.case.method.removeprefix(KVPRESS),
            self.case.memory_size,
            probes,
            chunk=self.regime.chunk,
            buffer=self.regime.buffer,
            sinks=self.regime.sinks,
            timeout_s=TIMEOUT_SECONDS,
            device=self.device,
            threads=self.threads,
        )


def check_foreign(cases: Sequence[Case], python: Path | None, base: str) -> None:
    """Refuse what the other process could not do, before anything runs.

    Raises:
        MethodError: no Python is named, the method is not one of kvpress's, or the model is no folder.
    """
    names = {case.method.removeprefix(KVPRESS) for case in cases if case.is_foreign}
    if not names:
        return
    if unknown := sorted(names - set(KVPRESS_METHODS)):
        raise MethodError(f"kvpress has no {', '.join(unknown)} here: use {', '.join(KVPRESS_METHODS)}")
    if python is None:
        raise MethodError("kvpress methods need --kvpress-python, the Python of an environment that has kvpress")
    if not Path(base).is_dir():
        raise MethodError(f"kvpress methods need the base model as a folder, {base!r} is none")
