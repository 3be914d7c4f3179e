"""What the endpoints share: the engine, the settings, and the chat format that is loaded after the model.

Owns nothing but the moment at which the service as a whole is ready. Knows no route.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import anyio

from service.engine.interface import Engine, EngineState, RejectionReason, SubmitError
from service.generation.chat_format import ChatFormat
from service.metrics import Metrics
from service.settings import Settings

TOKENISER_THREADS = 2


@dataclass(slots=True, kw_only=True)
class ApiContext:
    """Shared by all routes of one app.

    Attributes:
        chat_format: None until the model's tokenizer is loaded.
        failure: why the service can never become ready, None while it can.
        created: when this server started, in Unix seconds.
        tokeniser_limiter: how many prompts are tokenised at once, so that long ones do not take every thread.
    """

    settings: Settings
    engine: Engine
    metrics: Metrics
    chat_format: ChatFormat | None = None
    failure: BaseException | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    tokeniser_limiter: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(TOKENISER_THREADS))

    @property
    def is_ready(self) -> bool:
        """Whether a request sent now would be taken, a full queue aside."""
        return self.engine.state is EngineState.READY and self.chat_format is not None

    def check_ready(self) -> None:
        """Turn a request away, and count it, while the service is not ready.

        Raises:
            SubmitError: the model or its tokenizer is not loaded, or the server drains.
        """
        if self.engine.state is not EngineState.READY:
            # The engine knows what to say, and counts the refusal; a place that it grants after all goes straight back.
            with self.engine.reserve():
                pass
        if self.chat_format is None:
            self.metrics.on_rejected(RejectionReason.NOT_READY)
            raise SubmitError(RejectionReason.NOT_READY, "The tokenizer is still loading; try again in a moment.")

    @property
    def served_names(self) -> tuple[str, ...]:
        """The names a request may call the model by."""
        names = self.settings.served_model_name or (self.settings.model, self.engine.info.model)
        return tuple(dict.fromkeys(names))
