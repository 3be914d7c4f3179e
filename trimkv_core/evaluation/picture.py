"""The retention picture: one HTML page without external parts that shows which streams kept which token of a text.

Owns what the page says; how it looks is `picture.html`'s. Knows no eviction.

Letters: L layers, H KV heads, T tokens.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimkv_core.evaluation.feeding import Regime
from trimkv_core.evaluation.gated import PagedMemory
from trimkv_core.evaluation.holdings import Holdings, record
from trimkv_core.evaluation.loading import LoadedModel
from trimkv_core.evaluation.methods import Case, make_memory
from trimkv_core.evaluation.perplexity import TextError

_TEMPLATE = Path(__file__).with_name("picture.html")


def write_picture(
    path: Path, text: str, case: Case, model: LoadedModel, regime: Regime, *, max_tokens: int
) -> Holdings:
    """Read the start of a text under a budget and write its page.

    Raises:
        TextError: the text is too short for an eviction to happen, too long for a picture, or the method ranks without
            gates.
    """
    pieces, ids = split_tokens(model.tokenizer, text, max_tokens)
    if case.memory_size is None or len(ids) < case.memory_size + regime.buffer:
        raise TextError(f"a text of {len(ids)} tokens is held whole at {case}: take a longer one or a smaller budget")
    memory = make_memory(case, model, regime, 0)
    if not isinstance(memory, PagedMemory):
        raise TextError(f"{case.method} cannot be shown: use a method that ranks by gates")
    holdings = record(memory, ids, model, regime)
    about = (
        f"{Path(model.name).name}, {case.method}, budget {case.memory_size} entries a stream, "
        f"chunks of {regime.chunk}, buffer {regime.buffer}, {model.num_sink_tokens} sinks"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_picture(pieces, holdings, about), encoding="utf-8")
    return holdings


def split_tokens(tokenizer: Any, text: str, max_tokens: int) -> tuple[list[str], list[int]]:
    """The first tokens of a text: what each stands for in it, and their ids.

    The pieces side by side are the text: of a character that takes several tokens, the first has it all.
    """
    if not getattr(tokenizer, "is_fast", False):
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"][:max_tokens]
        return [tokenizer.decode([token]) for token in ids], ids
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, end, pieces = encoded["input_ids"][:max_tokens], 0, []
    for _, stop in encoded["offset_mapping"][:max_tokens]:
        pieces.append(text[end : max(stop, end)])
        end = max(stop, end)
    return pieces, ids


def render_picture(pieces: Sequence[str], holdings: Holdings, about: str) -> str:
    """The page. Without scripts it shows the end; with them, any eviction point and any token's streams."""
    layers, heads, tokens = holdings.gone.shape
    held = holdings.held_at(len(holdings.points) - 1)
    shares = held.mean((0, 1))
    # A budget of a few percent leaves most shares small: by their square roots they can be told apart.
    spans = [
        f'<span style="--k:{share**0.5:.3f}" title="token {number}: held by {round(share * layers * heads)} of '
        f'{layers * heads} streams">{html.escape(piece)}</span>'
        for number, (piece, share) in enumerate(zip(pieces, shares, strict=True))
    ]
    entries = held.sum((1, 2)) / heads
    rows = "".join(
        f'<tr><th scope="row">{layer}</th><td>{count:.1f}</td>'
        f'<td><div class="bar" style="width:{100 * count / max(entries.max(), 1):.1f}%"></div></td></tr>'
        for layer, count in enumerate(entries)
    )
    data = {
        "layers": layers,
        "heads": heads,
        "tokens": tokens,
        "points": holdings.points,
        "gone": base64.b64encode(holdings.gone.tobytes()).decode("ascii"),
    }
    page = _TEMPLATE.read_text(encoding="utf-8")
    values = {
        "ABOUT": html.escape(about),
        "LAST": str(len(holdings.points) - 1),
        "SEEN": f"{holdings.points[-1]:,}",
        "TEXT": "".join(spans),
        "ROWS": rows,
        "DATA": json.dumps(data),
    }
    # In one pass over the template: the text itself may hold what looks like a placeholder.
    parts = page.split("%%")
    return "".join(values[part] if index % 2 else part for index, part in enumerate(parts))
