"""`trimkv-eval`: from flags to results on disk. Owns wiring, exit statuses and what a person reads, no numbers."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from trimkv_core.budget import BudgetError
from trimkv_core.checkpoint import CheckpointError
from trimkv_core.embedded import EmbeddedModelError
from trimkv_core.evaluation.agreement import AgreementTask
from trimkv_core.evaluation.baselines import MethodError
from trimkv_core.evaluation.conversation import ConversationTask, make_conversations
from trimkv_core.evaluation.feeding import Answerer
from trimkv_core.evaluation.foreign import KvpressAnswerer, check_foreign
from trimkv_core.evaluation.haystack import paragraphs_of
from trimkv_core.evaluation.kvpress_client import KvpressError, kvpress_versions
from trimkv_core.evaluation.loading import LoadedModel, load_model, read_dtype
from trimkv_core.evaluation.methods import DENSE, Case, check_case, make_reader
from trimkv_core.evaluation.perplexity import TextError, TextTask, cut_excerpts, read_texts
from trimkv_core.evaluation.recall import RecallTask, make_questions
from trimkv_core.evaluation.report import write_report
from trimkv_core.evaluation.rows import FILE_NAME, ResultFile, ResultsError
from trimkv_core.evaluation.running import Task, order_cases, run_all, stale_rows
from trimkv_core.evaluation.settings import PROGRAM, Settings, read_settings
from trimkv_core.evaluation.tasks import ProbeError
from trimkv_core.models import UnsupportedModelError
from trimkv_core.options import SettingsError

logger = logging.getLogger(__name__)

EXIT_FAILURE = 1
EXIT_USAGE = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the result is the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    try:
        settings = read_settings(sys.argv[1:] if argv is None else argv)
        texts = read_texts(settings.texts)
    except (SettingsError, MethodError, TextError) as error:
        return _complain(error, EXIT_USAGE)
    try:
        _check_output(settings)
        return _run(settings, texts)
    except (SettingsError, MethodError, BudgetError, TextError, ResultsError, ProbeError) as error:
        return _complain(error, EXIT_USAGE)
    except (CheckpointError, EmbeddedModelError, UnsupportedModelError, KvpressError, OSError) as error:
        return _complain(error, EXIT_FAILURE)
    except torch.OutOfMemoryError as error:
        return _complain(f"{error}; lower --lanes or --text-tokens, and --resume", EXIT_FAILURE)
    except KeyboardInterrupt:
        return _complain("interrupted; --resume goes on from here", EXIT_FAILURE)


def _check_output(settings: Settings) -> None:
    """Hours of somebody's results are not written over."""
    if settings.output is not None and not settings.resumes and (path := settings.output / FILE_NAME).exists():
        raise SettingsError(
            f"--output {settings.output} holds {path.name} of an earlier run: add --resume, or name another"
        )


def _run(settings: Settings, texts: dict[str, str]) -> int:
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    model = load_model(
        settings.model,
        settings.gates,
        device=_choose_device(settings.device),
        dtype=read_dtype(settings.dtype),
        num_sink_tokens=settings.gate_sinks,
        max_tokens=2 * max(settings.text_tokens, *settings.recall_lengths),
    )
    if model.tokenizer is None:
        raise TextError(f"model {settings.model!r} has no tokenizer: texts and questions cannot be read")
    # The picture takes seconds: whatever is wrong with it is said before hours are spent.
    if settings.picture is not None:
        _draw(settings, model, texts, settings.picture)
    if settings.output is not None:
        _evaluate(settings, model, texts, settings.output)
    return 0


def _evaluate(settings: Settings, model: LoadedModel, texts: dict[str, str], output: Path) -> None:
    cases = order_cases(settings.methods, settings.budgets)
    for case in cases:
        check_case(case, model, settings.regime)
    check_foreign(cases, settings.kvpress_python, model.base)
    tasks = _make_tasks(settings, model, texts)
    longest = max(len(probe.ids) for task in tasks for probe in task.probes)
    context = getattr(model.config, "max_position_embeddings", longest)
    if longest > context:
        logger.warning("sequences of %d tokens are beyond the model's context of %d", longest, context)
    results = ResultFile(output / FILE_NAME, _describe(settings, model, texts))
    if settings.resumes:
        logger.info("%d rows of an earlier run", results.resume())
        stale = stale_rows(tasks, model, results.rows, regime=settings.regime, seed=settings.seed)
        for row in stale:
            logger.warning(
                "%s of task %s holds no more (other texts, gates or settings)",
                Case(row.method, row.memory_size),
                row.task,
            )
        results.forget(stale)
    output.mkdir(parents=True, exist_ok=True)

    def make_answerer(case: Case) -> Answerer:
        if case.is_foreign and settings.kvpress_python is not None:
            return KvpressAnswerer(
                settings.kvpress_python,
                Path(model.base),
                case,
                settings.regime,
                device=str(model.device),
                threads=settings.threads,
            )
        return make_reader(case, model, settings.regime, seed=settings.seed, lanes=settings.lanes)

    run_all(tasks, cases, model, results, regime=settings.regime, seed=settings.seed, make_answerer=make_answerer)
    results.save()
    for path in write_report(results.path):
        logger.info("wrote %s", path)


def _make_tasks(settings: Settings, model: LoadedModel, texts: dict[str, str]) -> list[Task]:
    """In the order of the table; texts are cut once."""
    tasks: list[Task] = []
    tokenizer, seed = model.tokenizer, settings.seed
    if {"text", "agreement"} & set(settings.tasks):
        excerpts = cut_excerpts(texts, tokenizer, tokens=settings.text_tokens, excerpts=settings.excerpts)
        if "text" in settings.tasks:
            tasks.append(TextTask(excerpts))
    paragraphs = paragraphs_of(list(texts.values()))
    if "recall" in settings.tasks:
        questions = make_questions(
            tokenizer, paragraphs, cases=settings.recall_cases, seed=seed, lengths=settings.recall_lengths
        )
        tasks.append(RecallTask(questions))
    if "conversation" in settings.tasks:
        tasks.append(
            ConversationTask(make_conversations(tokenizer, paragraphs, cases=settings.conversations, seed=seed))
        )
    if "agreement" in settings.tasks:
        tasks.append(
            AgreementTask(
                excerpts,
                tokens=settings.agreement_tokens,
                new_tokens=settings.new_tokens,
                make_dense=lambda: make_reader(Case(DENSE, None), model, settings.regime, lanes=settings.lanes),
            )
        )
    return tasks


def _draw(settings: Settings, model: LoadedModel, texts: dict[str, str], path: Path) -> None:
    from trimkv_core.evaluation.picture import write_picture

    text = next(iter(texts.values())) if settings.picture_text is None else _only(settings.picture_text)
    size = next(budget for budget in settings.budgets if budget is not None)
    case = Case(next((name for name in settings.methods if name.startswith("gates-")), "gates-global"), size)
    check_case(case, model, settings.regime)
    write_picture(path, text, case, model, settings.regime, max_tokens=settings.picture_tokens)
    logger.info("wrote %s", path)


def _only(path: Path) -> str:
    return next(iter(read_texts([path]).values()))


def _choose_device(name: str) -> torch.device:
    if name != "auto":
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise SettingsError(f"--device {name!r} is none: use cpu, cuda or cuda:N") from error
        if device.type not in ("cpu", "cuda"):
            raise SettingsError(f"--device {name!r} is not supported: use cpu, cuda or cuda:N")
        if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
            raise SettingsError(f"--device {name!r} is not there: PyTorch sees {count} CUDA devices; use cpu")
        return device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _describe(settings: Settings, model: LoadedModel, texts: Mapping[str, str]) -> dict[str, Any]:
    """Machine, versions and settings, without this machine's folders."""
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else _cpu_name()
    versions = {name: _version(name) for name in ("torch", "transformers", "numba", "trimkv-serve")}
    if settings.kvpress_python is not None:
        versions |= {f"kvpress: {name}": found for name, found in kvpress_versions(settings.kvpress_python).items()}
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": {"device": device, "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), **versions},
        "settings": {
            "model": _short(settings.model),
            "gates": None if model.gates is None else _short(model.gates),
            "gates_sha256": model.gates_digest[:16],
            "gate_sinks": model.num_sink_tokens,
            "dtype": str(model.dtype).removeprefix("torch."),
            "decoder": model.decoder.name,
            "chunk": settings.regime.chunk,
            "buffer": settings.regime.buffer,
            "sinks": settings.regime.sinks,
            "seed": settings.seed,
            "text_tokens": settings.text_tokens,
            "excerpts": settings.excerpts,
            "texts": {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in texts.items()},
            "recall_cases": settings.recall_cases,
            "recall_lengths": list(settings.recall_lengths),
            "conversations": settings.conversations,
            "agreement_tokens": settings.agreement_tokens,
            "new_tokens": settings.new_tokens,
        },
    }


def _short(name: str) -> str:
    """A name that says nothing of this machine: a folder's own name, a hub id as it is."""
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() else name


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "–"


def _complain(error: object, status: int) -> int:
    logger.error("%s: %s", PROGRAM, error)
    return status


if __name__ == "__main__":
    sys.exit(main())
