"""The output folder of a run: a gate checkpoint, what a resumed run needs, and the settings of both.

    config.json, trimkv_weights.safetensors   the checkpoint, replaced as a whole file each
    settings.json                             settings, versions, data
    state/step-N.pt                           gates in float32, optimiser, place in the data: one file, one save
    loss.csv, loss.png                        `curve`'s

Owns how these are written, so that a kill at any moment leaves the last save whole. Knows no loop.
"""

from __future__ import annotations

import json
import os
import pickle
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from trimkv_core.checkpoint import CONFIG_NAME, WEIGHT_NAMES, GateConfig, save_gates
from trimkv_core.gates import GateShape, RetentionGate, build_gates
from trimkv_core.options import SettingsError
from trimkv_core.training.data import SourceRecord
from trimkv_core.training.loading import PROGRAM, SETTINGS_NAME, read_saved_settings
from trimkv_core.training.packing import Piece, StreamState
from trimkv_core.training.settings import TrainSettings

_STATE = "state"
_LOCK = ".lock"
_SCRATCH = ".checkpoint-"
_STATE_FILE = re.compile(r"step-(\d+)\.pt")
_PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "numpy", "trimkv-serve")


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedState:
    """All that a run is, after a step.

    Attributes:
        step: the last one made.
        tokens: trained on so far, over all processes.
        gates: float32 parameters of every layer's gate, by name.
        optimizer: its `state_dict`.
        scaler: `state_dict` of the gradient scaler; empty without one.
        rows: rows drawn from the data.
        streams: where every stream of rows stands.
    """

    step: int
    tokens: int
    gates: list[dict[str, Tensor]]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    rows: int
    streams: tuple[StreamState, ...]


class OutputFolder:
    """One run's output folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def claim(self, settings: TrainSettings) -> None:
        """Make sure that nothing in the folder is another's.

        Raises:
            SettingsError: it holds a run and `resume` is not asked for, or it holds something else.
        """
        if self.path.exists() and not self.path.is_dir():
            raise SettingsError(f"--output={self.path} is a file: it must be a folder")
        is_empty = not self.path.exists() or all(entry.name == _LOCK for entry in self.path.iterdir())
        if is_empty:
            return
        if read_saved_settings(self.path) is None:
            raise SettingsError(f"--output={self.path} is not empty and holds no run: name another folder")
        if not settings.resume:
            raise SettingsError(
                f"--output={self.path} already holds a run: go on with it with --resume, or name another folder"
            )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other runs out while this one writes.

        Raises:
            SettingsError: another one is at it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.path / _LOCK, timeout=0):
                yield
        except Timeout:
            raise SettingsError(f"--output={self.path} is being written by another run that goes on") from None

    def check_same_run(self, settings: TrainSettings, data: Sequence[SourceRecord], processes: int) -> None:
        """Raise `SettingsError`, naming every difference, if going on with these would make another run."""
        earlier = read_saved_settings(self.path)
        if earlier is None:
            return
        saved = json.loads((self.path / SETTINGS_NAME).read_text(encoding="utf-8"))
        changes = settings.changes_from(earlier)
        if saved.get("processes") != processes:
            changes.append(f"processes: {processes}, was {saved.get('processes')}")
        was = [(record["name"], record["sha256"]) for record in saved.get("data", ())]
        now = [(record.name, record.sha256) for record in data]
        if [digest for _, digest in was] != [digest for _, digest in now]:
            names = sorted({name for name, _ in set(was) ^ set(now)}) or ["in another order"]
            changes.append(f"data: changed, added or left out: {', '.join(names)}")
        if changes:
            raise SettingsError(
                f"--resume would not go on with the run in {self.path} but make another: {'; '.join(changes)}"
            )

    def write_settings(
        self, settings: TrainSettings, data: Sequence[SourceRecord], *, processes: int, device: str, documents: int
    ) -> None:
        """Write `settings.json`."""
        self.path.mkdir(parents=True, exist_ok=True)
        contents = {
            "program": PROGRAM,
            "settings": json.loads(settings.model_dump_json(exclude={"resume", "config"})),
            "data": [{"name": r.name, "sha256": r.sha256, "size": r.size} for r in data],
            "documents": documents,
            "processes": processes,
            "device": device,
            "versions": {"python": platform.python_version(), **_versions()},
        }
        scratch = self.path / f".{SETTINGS_NAME}"
        scratch.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
        scratch.replace(self.path / SETTINGS_NAME)

    def latest(self) -> Path | None:
        """The newest saved state, None before the first save."""
        folder = self.path / _STATE
        found = [path for path in folder.glob("step-*.pt") if _STATE_FILE.fullmatch(path.name)]
        return max(found, key=_step_of, default=None)

    def load(self) -> SavedState | None:
        """The newest saved state, on the CPU.

        Raises:
            SettingsError: it cannot be read.
        """
        path = self.latest()
        if path is None:
            return None
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
            streams = tuple(
                StreamState(epoch, cursor, rows, tuple(Piece(*piece) for piece in pool))
                for epoch, cursor, rows, pool in loaded.pop("streams")
            )
            return SavedState(**loaded, streams=streams)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError, TypeError, KeyError) as error:
            raise SettingsError(f"{path} cannot be read ({error}): begin anew in another folder") from error

    def save(
        self, state: SavedState, gates: Sequence[RetentionGate], config: GateConfig, shape: GateShape, dtype: str
    ) -> None:
        """Write a save: first the state, then the checkpoint made from it, then forget older states."""
        folder = self.path / _STATE
        folder.mkdir(parents=True, exist_ok=True)
        contents = {
            "step": state.step,
            "tokens": state.tokens,
            "gates": state.gates,
            "optimizer": state.optimizer,
            "scaler": state.scaler,
            "rows": state.rows,
            "streams": [(s.epoch, s.cursor, s.rows, [tuple(piece) for piece in s.pool]) for s in state.streams],
        }
        path = folder / f"step-{state.step:08d}.pt"
        scratch = folder / ".saving"
        with scratch.open("wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
        self._write_checkpoint(gates, config, shape, getattr(torch, dtype))
        for other in folder.glob("step-*.pt"):
            if other != path:
                other.unlink(missing_ok=True)

    def _write_checkpoint(
        self, gates: Sequence[RetentionGate], config: GateConfig, shape: GateShape, dtype: torch.dtype
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            copies = build_gates(shape, dtype=dtype)
        for copy, gate in zip(copies, gates, strict=True):
            copy.load_state_dict(gate.state_dict())
        # Inside the output, which may be a mounted volume: files move within one file system only.
        for left_over in self.path.glob(f"{_SCRATCH}*"):  # of a run that was killed
            shutil.rmtree(left_over, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=self.path))
        try:
            save_gates(copies, config, scratch, use_safetensors=True)
            _rename_base(scratch, self.path)
            for name in (WEIGHT_NAMES[0], CONFIG_NAME):
                (scratch / name).replace(self.path / name)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _rename_base(scratch: Path, folder: Path) -> None:
    """Name a base model that lies in a folder from `folder`, where the config in `scratch` is about to move."""
    config = scratch / CONFIG_NAME
    raw = json.loads(config.read_text(encoding="utf-8"))
    base = scratch / raw["base_model"]
    if base.exists():
        raw["base_model"] = os.path.relpath(base.resolve(), folder.resolve())
        config.write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _step_of(path: Path) -> int:
    match = _STATE_FILE.fullmatch(path.name)
    return int(match[1]) if match else -1


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
