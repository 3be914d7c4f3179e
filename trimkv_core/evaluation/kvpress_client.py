"""Baselines through the public `kvpress` package, which lives in a Python of its own.

kvpress 0.5.5 needs transformers < 5.3, so it is never imported here: `run_kvpress` starts `kvpress_worker.py` with the
Python it is given, and the two exchange a JSON file each way. Owns that exchange and every complaint about it. What the
methods do, and how each is adapted to reading in chunks, stands in the worker's docstring.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimkv_core.evaluation import kvpress_worker
from trimkv_core.evaluation.tasks import Probe, ProbeResult

logger = logging.getLogger(__name__)

KVPRESS_METHODS = kvpress_worker.METHODS
PACKAGES = ("torch", "transformers", "kvpress")
INSTALL = "python3 -m venv FOLDER && FOLDER/bin/pip install torch kvpress==0.5.5 'transformers<5.3'"

_TAIL_CHARS = 2000
_ASK_VERSIONS = f"""
import importlib.metadata, json
found = {{}}
for name in {PACKAGES!r}:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


class KvpressError(RuntimeError):
    """kvpress cannot be had or did not answer; the message says what to install or change, or what it last said."""


def kvpress_versions(python: Path) -> dict[str, str]:
    """Versions of torch, transformers and kvpress in another Python (isolated: no user site, no PYTHONPATH).

    Raises:
        KvpressError: it cannot be started, or a package is missing from it.
    """
    try:
        done = subprocess.run(
            [python, "-I", "-c", _ASK_VERSIONS], capture_output=True, text=True, timeout=60, check=False
        )
        found = json.loads(done.stdout) if done.returncode == 0 else None
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        raise KvpressError(f"{python} is no Python that can be started: {error}; make one: {INSTALL}") from error
    if not isinstance(found, dict):
        raise KvpressError(f"{python} is no Python that can be started: {_tail(done.stderr)}; make one: {INSTALL}")
    if missing := [name for name in PACKAGES if name not in found]:
        raise KvpressError(f"{python} has no {', '.join(missing)}; make a Python that has them: {INSTALL}")
    return {name: str(found[name]) for name in PACKAGES}


def run_kvpress(
    python: Path,
    model_folder: Path,
    method: str,
    memory_size: int,
    probes: Sequence[Probe],
    *,
    chunk: int,
    buffer: int,
    sinks: int,
    timeout_s: float,
    batch: int = 4,
    device: str = "cpu",
    threads: int | None = None,
) -> list[ProbeResult]:
    """Read probes with one of kvpress's methods under our feeding regime.

    Args:
        python: of the environment that has kvpress.
        model_folder: a `transformers` model with full attention and its weights; it runs in the precision stored.
        method: one of KVPRESS_METHODS.
        memory_size: M, entries a stream keeps (AdaKV: on average over a layer's heads).
        probes: what to read.
        chunk: tokens a forward.
        buffer: entries beyond M before a stream is cut.
        sinks: first positions that always stay.
        timeout_s: seconds for all of it.
        batch: probes of equal length read at once.
        device: where the other PyTorch computes.
        threads: of the other PyTorch on a CPU; None leaves the choice to it.

    Returns:
        One result a probe, in order.

    Raises:
        KvpressError: an argument is out of range, kvpress cannot be had, the worker failed or took too long.
    """
    if method not in KVPRESS_METHODS:
        raise KvpressError(f"method={method!r} is unknown to kvpress here: {', '.join(KVPRESS_METHODS)}")
    if not 0 <= sinks < memory_size:
        raise KvpressError(f"sinks={sinks} with memory_size={memory_size}: 0 ≤ sinks < memory_size is needed")
    if min(chunk, batch) < 1 or buffer < 0:
        raise KvpressError(f"chunk={chunk}, batch={batch}, buffer={buffer}: chunk and batch ≥ 1, buffer ≥ 0 are needed")
    if any(not probe.ids for probe in probes):
        raise KvpressError("a probe without tokens cannot be read")
    if not probes:
        return []
    versions = kvpress_versions(python)
    logger.info("reading %d probes with %s, M=%d, %s", len(probes), method, memory_size, versions)
    request = {
        "model_folder": str(model_folder.resolve()),
        "method": method,
        "regime": {"memory_size": memory_size, "chunk": chunk, "buffer": buffer, "sinks": sinks},
        "batch": batch,
        "device": device,
        "threads": threads,
        "probes": [
            {"ids": list(probe.ids), "spans": [[span.start, span.stop] for span in probe.spans]} for probe in probes
        ],
    }
    # Isolated: the worker's folder must not be on its path, where our modules would stand before the packages'.
    worker = [str(python), "-I", str(Path(kvpress_worker.__file__).resolve())]
    return results_of(exchange(worker, request, timeout_s=timeout_s), probes)


def exchange(command: Sequence[str], request: Mapping[str, Any], *, timeout_s: float) -> object:
    """Run `command REQUEST REPLY`, two JSON files, and return what the reply says.

    Raises:
        KvpressError: it took too long (it is killed), failed, or left no JSON.
    """
    with tempfile.TemporaryDirectory(prefix="trimkv-kvpress-") as name:
        asked, reply, said = (Path(name) / part for part in ("request.json", "reply.json", "output.txt"))
        asked.write_text(json.dumps(request), encoding="utf-8")
        try:
            with said.open("wb") as output:
                done = subprocess.run(
                    [*command, str(asked), str(reply)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=os.environ | {"HF_HUB_OFFLINE": "1"},
                    timeout=timeout_s,
                    check=False,
                )
        except OSError as error:
            raise KvpressError(f"{command[0]} cannot be started: {error}") from error
        except subprocess.TimeoutExpired as error:
            raise KvpressError(
                f"the kvpress worker took longer than timeout_s={timeout_s:g}; raise it or read fewer probes. "
                f"It said last: {_tail(said.read_text(encoding='utf-8', errors='replace'))}"
            ) from error
        tail = _tail(said.read_text(encoding="utf-8", errors="replace"))
        try:
            answer = json.loads(reply.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise KvpressError(f"the kvpress worker ended with {done.returncode} and no answer: {tail}") from error
    if isinstance(answer, dict) and "error" in answer:
        raise KvpressError(f"the kvpress worker failed: {answer['error']}. It said last: {tail}")
    return answer


def results_of(answer: object, probes: Sequence[Probe]) -> list[ProbeResult]:
    """The reply's results, one a probe.

    Raises:
        KvpressError: they are not what the probes ask for.
    """
    try:
        listed = answer["results"]  # type: ignore[index]
        results = [
            ProbeResult(
                nll=tuple(float(value) for value in entry["nll"]),
                best=tuple(int(value) for value in entry["best"]),
                peak_entries=float(entry["peak_entries"]),
            )
            for entry in listed
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise KvpressError(f"the kvpress worker's answer is not one: {error!r}") from error
    wanted = [probe.num_predicted for probe in probes]
    got = [len(result.nll) if len(result.nll) == len(result.best) else -1 for result in results]
    if got != wanted:
        raise KvpressError(f"the kvpress worker predicted {got} tokens, {wanted} were asked for")
    return results


def _tail(text: str) -> str:
    return text.strip()[-_TAIL_CHARS:] or "nothing"
