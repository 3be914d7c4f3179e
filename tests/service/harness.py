"""The real engine without thread and HTTP: steps are taken by hand, events and cache contents are collected."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from service.engine.config import EngineConfig
from service.engine.core import EngineCore
from service.engine.interface import AbortReason, Event, Failed, Finished, GenerationRequest, SamplingParams
from service.engine.loader import LoadedEngine, load_engine
from service.engine.mailbox import Dispatcher, Mailbox
from service.engine.request import RequestState
from service.generation.sampler import SamplingState
from service.generation.stopping import AnswerStream
from trimkv_core.budget import Budget
from trimkv_core.sequences import SequenceSnapshot

_numbers = itertools.count()


class SilentObserver:
    """Takes every report and keeps none."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_args, **_kwargs: None


class Collector(Dispatcher):
    """Events by mailbox, without an event loop."""

    def __init__(self) -> None:
        self.events: dict[Mailbox, list[Event]] = {}

    def add(self, mailbox: Mailbox, event: Event) -> None:
        self.events.setdefault(mailbox, []).append(event)

    def flush(self) -> None:
        pass


@dataclass
class Answer:
    """What one request got, and what its cache held at its end."""

    state: RequestState
    events: list[Event] = field(default_factory=list)
    snapshot: SequenceSnapshot | None = None
    row: int | None = None

    @property
    def token_ids(self) -> list[int]:
        return [token for event in self.events if not isinstance(event, Failed) for token in event.token_ids]

    @property
    def finished(self) -> Finished:
        last = self.events[-1]
        assert isinstance(last, Finished), last
        return last

    @property
    def has_ended(self) -> bool:
        return bool(self.events) and isinstance(self.events[-1], Finished | Failed)


class Engine:
    """An `EngineCore` to step by hand."""

    def __init__(self, config: EngineConfig, loaded: LoadedEngine | None = None) -> None:
        self.loaded = loaded or load_engine(config)
        self.collector = Collector()
        self.left_queue: list[RequestState] = []
        self.core: EngineCore = self.loaded.build_core(self.collector, SilentObserver(), self.left_queue.append)
        self.answers: dict[int, Answer] = {}
        close = self.core.runner.close

        def close_and_remember(row: int, *, scrub: bool = False) -> None:
            for answer in self.answers.values():
                if answer.row == row:
                    answer.snapshot, answer.row = self.core.runner.table.snapshot(row), None
            close(row, scrub=scrub)

        self.core.runner.close = close_and_remember  # type: ignore[method-assign]

    def submit(self, prompt_ids: Sequence[int], budget: Budget, *, priority: int = 0, **sampling: Any) -> Answer:
        params = SamplingParams(**({"max_tokens": 8, "temperature": 0.0, "ignore_eos": True} | sampling))
        request = GenerationRequest(
            request_id=f"request-{next(_numbers)}",
            prompt_ids=tuple(prompt_ids),
            sampling=params,
            budget=budget,
            priority=priority,
            arrival=time.monotonic(),
        )
        eos = self.loaded.info.eos_token_ids
        state = RequestState(
            request=request,
            mailbox=Mailbox(),
            sampling=SamplingState(params, prompt_ids=prompt_ids, eos_token_ids=eos),
            answer=AnswerStream(self.loaded.tokenizer, params, eos_token_ids=eos, prompt_ids=prompt_ids),
            pages=self.loaded.ledger.check_fits(request),
        )
        answer = Answer(state)
        self.answers[id(state)] = answer
        self.core.add(state)
        return answer

    def step(self) -> None:
        self.core.step()
        self._collect()

    def abort(self, answer: Answer) -> None:
        self.core.abort(answer.state.request.request_id, AbortReason.CLIENT)
        self._collect()

    def run(self) -> None:
        """Step until nothing is left to do."""
        while self.core.scheduler.has_work:
            self.step()

    def _collect(self) -> None:
        for answer in self.answers.values():
            answer.row = answer.state.row if answer.state.row is not None else answer.row
            answer.events = self.collector.events.get(answer.state.mailbox, [])
