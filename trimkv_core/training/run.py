"""The loop: from settings to an output folder that holds trained gates.

Owns time: the order of steps, when to save, when to stop. Everything it does in a step is somebody else's. Several
processes (one a GPU) each compute their rows, and the first one writes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from trimkv_core.options import SettingsError
from trimkv_core.training.assembly import (
    TrainingData,
    gate_config,
    gate_shape,
    load_decoder,
    make_optimizer,
    open_training_data,
)
from trimkv_core.training.batch import PackedBatch
from trimkv_core.training.curve import CurvePoint, LossCurve
from trimkv_core.training.documents import DataError
from trimkv_core.training.packing import StreamState
from trimkv_core.training.progress import Progress
from trimkv_core.training.saving import OutputFolder, SavedState
from trimkv_core.training.schedule import kappa_at, learning_rate_at, objective_at
from trimkv_core.training.settings import TrainSettings
from trimkv_core.training.stepping import DivergedError, Figures, Stepper

logger = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why, and where the last good checkpoint is."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call of `train` ended.

    Attributes:
        step: the last one made.
        is_complete: whether that was the run's last; else it was asked to stop, and saved.
    """

    step: int
    is_complete: bool


@dataclass(frozen=True, slots=True)
class _Batches:
    """The batches of a step, and where the data stand after it."""

    batches: list[PackedBatch]
    rows: int
    streams: tuple[StreamState, ...]


def train(settings: TrainSettings, *, should_stop: Callable[[], bool] = lambda: False) -> Outcome:
    """Train gates as `settings` say, or go on with a run that was killed.

    Args:
        settings: see `TrainSettings`.
        should_stop: asked before each step; once it is true the run saves and ends.

    Raises:
        SettingsError: the output folder, or settings that a resumed run may not change.
        DataError, CheckpointError, UnsupportedModelError, EmbeddedModelError: what the settings name cannot be used.
        TrainingError: the loss or a gradient is no number any more, or the data turned out bad on the way.
    """
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    output = OutputFolder(settings.output)
    output.claim(settings)
    accelerator = _make_accelerator(settings)
    data = open_training_data(settings, rank=accelerator.process_index, processes=accelerator.num_processes)
    output.check_same_run(settings, data.records, accelerator.num_processes)
    saved = output.load()
    run = _Run(settings, accelerator, data, output)
    if saved is not None:
        run.restore(saved)
    accelerator.wait_for_everyone()  # all have looked before the first one writes
    if not accelerator.is_main_process:
        return run.finish(should_stop)
    with output.lock():
        output.write_settings(
            settings,
            data.records,
            processes=accelerator.num_processes,
            device=str(accelerator.device),
            documents=len(data.store),
        )
        return run.finish(should_stop)


def _make_accelerator(settings: TrainSettings) -> Accelerator:
    if settings.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise SettingsError("--mixed-precision=fp16 is not possible without a GPU: use bf16 or no")
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision, gradient_accumulation_steps=settings.gradient_accumulation_steps
    )
    known = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    if accelerator.distributed_type not in known:
        raise SettingsError(
            f"accelerate is set up for {accelerator.distributed_type.value}: gates are small, and are trained with one "
            "whole model on each GPU (accelerate launch --multi_gpu)"
        )
    return accelerator


class _Run:
    """One run, from where it stands to its end."""

    def __init__(
        self, settings: TrainSettings, accelerator: Accelerator, data: TrainingData, output: OutputFolder
    ) -> None:
        self._settings, self._accelerator, self._data, self._output = settings, accelerator, data, output
        self._config = gate_config(settings)
        self._decoder = load_decoder(settings, self._config, data, accelerator.device)
        self._stepper = Stepper(
            accelerator,
            self._decoder,
            make_optimizer(settings, self._decoder),
            max_grad_norm=settings.max_grad_norm,
        )
        self._step, self._tokens = 0, 0
        self._saved_step: int | None = None

    def restore(self, saved: SavedState) -> None:
        """Stand where a save was made."""
        for gate, values in zip(self._decoder.gates, saved.gates, strict=True):
            gate.load_state_dict(values)
        self._stepper.restore(saved.optimizer, saved.scaler)
        self._data.stream.state = (saved.rows, saved.streams)
        self._step, self._tokens, self._saved_step = saved.step, saved.tokens, saved.step

    def finish(self, should_stop: Callable[[], bool]) -> Outcome:
        """Make the steps that are left."""
        settings, is_main = self._settings, self._accelerator.is_main_process
        curve = LossCurve(settings.output, last_step=self._step) if is_main else None
        if is_main:
            self._announce()
        progress = Progress(first_step=self._step, steps=settings.steps, log_every=settings.log_every, is_shown=is_main)
        taken: _Batches | None = None
        with progress, ThreadPoolExecutor(1, thread_name_prefix="batches") as ahead:
            coming = ahead.submit(self._next_batches, self._step + 1)
            while self._step < settings.steps:
                if self._is_any(should_stop()):
                    self._save(taken, curve)
                    return Outcome(self._step, False)
                started = time.perf_counter()
                taken = self._await(coming)
                # Rows are packed while the step before them is computed.
                coming = ahead.submit(self._next_batches, self._step + 2)
                point = self._make_step(taken, started)
                if curve is not None:
                    curve.append(point)
                progress.show(point)
                if self._step % settings.save_every == 0 or self._step == settings.steps:
                    self._save(taken, curve)
        return Outcome(self._step, True)

    def _announce(self) -> None:
        settings, store = self._settings, self._data.store
        logger.info(
            "%s step=%d/%d model=%s gate_parameters=%d device=%s processes=%d documents=%d too_short=%d",
            "starting" if self._step == 0 else "resuming",
            self._step,
            settings.steps,
            settings.model,
            sum(parameter.numel() for parameter in self._decoder.trainable()),
            self._accelerator.device,
            self._accelerator.num_processes,
            len(store),
            len(store.too_short),
        )

    def _next_batches(self, step: int) -> _Batches:
        batches = self._data.stream.next_step(step)
        return _Batches(batches, *self._data.stream.state)

    def _await(self, coming: Future[_Batches]) -> _Batches:
        try:
            return coming.result()
        except (DataError, OSError) as error:
            raise TrainingError(f"step {self._step + 1}: {error}. {self._last_good()}") from error

    def _make_step(self, taken: _Batches, started: float) -> CurvePoint:
        settings, step = self._settings, self._step + 1
        objective = objective_at(settings, step, is_global=self._config.is_global)
        rate = learning_rate_at(settings, step)
        try:
            figures: Figures = self._stepper.make(taken.batches, objective, learning_rate=rate)
        except DivergedError as error:
            raise TrainingError(
                f"step {step}: {error}. {self._last_good()} Start from it in a new folder (--gates) or anew, with a "
                "lower --learning-rate or --mixed-precision no"
            ) from error
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"step {step}: out of memory on {self._accelerator.device}. {self._last_good()} Use "
                "--gradient-checkpointing, a smaller --logit-block or --batch-size, or a shorter --seq-len"
            ) from error
        self._step, self._tokens = step, self._tokens + figures.tokens
        return CurvePoint(
            step=step,
            tokens=self._tokens,
            loss=figures.loss,
            kl=figures.kl,
            ntp=figures.ntp,
            capacity=figures.capacity,
            soft_size=figures.soft_size,
            learning_rate=rate,
            gradient_norm=figures.gradient_norm,
            seconds=time.perf_counter() - started,
            capacity_target=objective.memory_size,
            kappa=kappa_at(settings, step),
        )

    def _is_any(self, flag: bool) -> bool:
        """Whether any process says so: all must leave the loop at the same step."""
        return bool(self._stepper.total(torch.tensor(float(flag), device=self._accelerator.device)) > 0)

    def _last_good(self) -> str:
        if self._saved_step is None:
            return "No checkpoint was saved yet."
        return f"The last good checkpoint, of step {self._saved_step}, is kept in {self._output.path}."

    def _save(self, taken: _Batches | None, curve: LossCurve | None) -> None:
        """Save the step that `taken` were the batches of; nothing without any, or if it is saved already."""
        if taken is None or self._saved_step == self._step:
            return
        if curve is not None:
            state = SavedState(
                step=self._step,
                tokens=self._tokens,
                gates=[
                    {name: value.detach().cpu().clone() for name, value in gate.state_dict().items()}
                    for gate in self._decoder.gates
                ],
                optimizer=self._stepper.optimizer_state,
                scaler=self._stepper.scaler_state,
                rows=taken.rows,
                streams=taken.streams,
            )
            shape = gate_shape(self._config, self._decoder)
            self._output.save(state, self._decoder.gates, self._config, shape, self._settings.save_dtype)
            curve.draw()
            logger.info("saved step=%d in %s", self._step, self._output.path)
        self._accelerator.wait_for_everyone()
        self._saved_step = self._step
