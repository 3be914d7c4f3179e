"""A request's sampling fields → the `SamplingParams` the engine works by.

Owns their defaults (the model's, then OpenAI's), how many tokens an answer may have, and the checks that need the
loaded model. Knows no HTTP beyond the error it raises.
"""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus

from service.api.errors import ApiError, invalid_value
from service.api.schemas import SamplingFields
from service.engine.interface import ModelInfo, SamplingParams
from trimkv_core.budget import Budget

# Under this temperature the distribution has one token left, and dividing by it only costs precision.
GREEDY_TEMPERATURE = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputLimits:
    """How long an answer may get.

    Attributes:
        default_max_tokens: for a request that names no limit and has no budget, since its cache grows with its length.
        max_output_tokens: the operator's cap, None for the context alone.
    """

    default_max_tokens: int
    max_output_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedTokens:
    """`max_tokens` as asked for: its value, None where a client said nothing, and the field it came in.

    `min_tokens` is how long the answer has to be at least.
    """

    field: str
    value: int | None
    min_tokens: int = 0


def resolve_max_tokens(
    asked: AskedTokens, *, prompt_tokens: int, budget: Budget, info: ModelInfo, limits: OutputLimits
) -> int:
    """How many tokens the answer may have at most.

    Raises:
        ApiError: 400 when prompt and answer do not fit the context, or the operator's cap is passed.
    """
    longest = info.max_model_len
    room = longest - prompt_tokens
    if room < 1:
        raise _too_long(
            "messages",
            f"The prompt has {prompt_tokens} tokens, and max_model_len={longest} holds prompt and answer together: "
            f"allowed are at most {longest - 1}.",
        )
    cap = limits.max_output_tokens
    if asked.value is None:
        wanted = room if budget.is_bounded else min(room, max(limits.default_max_tokens, asked.min_tokens))
        return wanted if cap is None else min(wanted, cap)
    if cap is not None and asked.value > cap:
        raise invalid_value(asked.field, asked.value, f"the operator of this server allows at most {cap}")
    if asked.value > room:
        raise _too_long(
            asked.field,
            f"The prompt's {prompt_tokens} tokens + {asked.field}={asked.value} are more than max_model_len={longest}: "
            f"allowed are at most {room} with this prompt.",
        )
    return asked.value


def resolve_sampling(
    fields: SamplingFields, info: ModelInfo, *, max_tokens: int, max_tokens_field: str
) -> SamplingParams:
    """The sampling parameters of a request.

    Raises:
        ApiError: 400 for a token id the model does not have, or more `min_tokens` than tokens.
    """
    min_tokens = fields.min_tokens or 0
    if min_tokens > max_tokens:
        raise invalid_value("min_tokens", min_tokens, f"must be an integer from 0 to {max_tokens_field}={max_tokens}")
    for token_id in fields.stop_token_ids or ():
        if token_id >= info.vocab_size:
            raise invalid_value("stop_token_ids", token_id, f"must be token ids from 0 to {info.vocab_size - 1}")
    defaults = info.sampling_defaults
    temperature = fields.temperature if fields.temperature is not None else defaults.get("temperature", 1.0)
    top_k = fields.top_k if fields.top_k is not None else int(defaults.get("top_k", 0))
    repetition_penalty = fields.repetition_penalty
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature if temperature >= GREEDY_TEMPERATURE else 0.0,
        top_p=fields.top_p if fields.top_p is not None else defaults.get("top_p", 1.0),
        top_k=min(max(top_k, 0), info.vocab_size),
        min_p=fields.min_p if fields.min_p is not None else defaults.get("min_p", 0.0),
        seed=fields.seed,
        presence_penalty=fields.presence_penalty or 0.0,
        frequency_penalty=fields.frequency_penalty or 0.0,
        repetition_penalty=(
            repetition_penalty if repetition_penalty is not None else defaults.get("repetition_penalty", 1.0)
        ),
        min_tokens=min_tokens,
        ignore_eos=bool(fields.ignore_eos),
        stop=fields.stop or (),
        stop_token_ids=fields.stop_token_ids or (),
        include_stop_str_in_output=bool(fields.include_stop_str_in_output),
    )


def _too_long(param: str, message: str) -> ApiError:
    return ApiError(HTTPStatus.BAD_REQUEST, message, param=param, code="context_length_exceeded")
