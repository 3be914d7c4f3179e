"""`POST /tokenize`: how the model's tokenizer cuts a conversation or a text.

Knows no engine: nothing is computed, and nothing waits in the queue.
"""

from __future__ import annotations

import anyio.to_thread
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from service.api.chat import check_served, encode_messages
from service.api.context import ApiContext
from service.api.edge import read_body
from service.api.errors import invalid_value
from service.api.schemas import TokenizeRequest, parse_tokenize_request
from service.generation.chat_format import ChatFormat
from service.generation.detokenizer import IncrementalDetokenizer


class TokenizeBody(BaseModel):
    """Tokens of a prompt.

    Attributes:
        max_model_len: tokens of prompt and answer together.
        tokens: their ids.
        token_strs: the text each of them completes, if asked for: together the whole prompt, special tokens included.
    """

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


def tokenize_router(context: ApiContext) -> APIRouter:
    """The route of the tokenizer."""
    router = APIRouter(tags=["OpenAI"])

    @router.post("/tokenize", response_model=TokenizeBody)
    async def tokenize(request: Request) -> Response:
        chat_format = context.chat_format
        assert chat_format is not None, "the edge lets no POST through before the service is ready"
        fields = parse_tokenize_request(await read_body(request, max_bytes=context.settings.max_body_bytes))
        check_served(context, fields.model)
        max_model_len = context.engine.info.max_model_len
        body = await anyio.to_thread.run_sync(
            _tokenize, chat_format, fields, max_model_len, limiter=context.tokeniser_limiter, abandon_on_cancel=True
        )
        return Response(body.model_dump_json(), media_type="application/json")

    return router


def _tokenize(chat_format: ChatFormat, fields: TokenizeRequest, max_model_len: int) -> TokenizeBody:
    if fields.messages is not None:
        ids = encode_messages(chat_format, fields.messages)
    else:
        ids = chat_format.backend.encode(fields.prompt or "", add_special_tokens=True).ids
    # One call into the tokenizer a token, beside the engine's thread: no more of them than could be served.
    if fields.return_token_strs and len(ids) > max_model_len:
        raise invalid_value(
            "return_token_strs", True, f"the prompt has {len(ids)} tokens, texts are told of up to {max_model_len}"
        )
    texts = _texts(chat_format, ids) if fields.return_token_strs else None
    return TokenizeBody(count=len(ids), max_model_len=max_model_len, tokens=ids, token_strs=texts)


def _texts(chat_format: ChatFormat, ids: list[int]) -> list[str]:
    text = IncrementalDetokenizer(chat_format.backend, skip_special_tokens=False)
    texts = [text.push(token) for token in ids]
    if texts:
        texts[-1] += text.flush()
    return texts
