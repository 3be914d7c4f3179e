"""The retention picture: the text itself, true holdings, and a page that needs nothing else."""

from __future__ import annotations

import base64
import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.evaluation.tiny_model import load
from trimkv_core.batches import Segment
from trimkv_core.evaluation.feeding import Regime
from trimkv_core.evaluation.holdings import HELD
from trimkv_core.evaluation.loading import LoadedModel
from trimkv_core.evaluation.methods import Case, make_memory
from trimkv_core.evaluation.perplexity import TextError
from trimkv_core.evaluation.picture import split_tokens, write_picture

TEXT = "A <b>bold</b> café & a “quote”, 日本 %%TEXT%% </script> tabs\tand\nlines. " * 4
REGIME = Regime(chunk=16, buffer=4)
CASE = Case("gates-global", 8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(tmp_path_factory.mktemp("model"), with_tokenizer=True)


def test_the_page_holds_every_token_and_needs_nothing_else(model: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "new" / "picture.html"
    write_picture(path, TEXT, CASE, model, REGIME, max_tokens=100)
    page = path.read_text(encoding="utf-8")
    pieces, ids = split_tokens(model.tokenizer, TEXT, 100)
    assert len(ids) == 100
    assert TEXT.startswith("".join(pieces))
    shown = re.findall(r'<span style="--k:([\d.]+)" title="token (\d+): [^"]*">([^<]*)</span>', page)
    assert [html.unescape(piece) for _, _, piece in shown] == pieces
    assert [int(number) for _, number, _ in shown] == list(range(100))
    assert not re.search(r"""(?:src|href)\s*=|url\(|@import|https?:""", page)
    assert page.count("</script>") == 2
    assert "prefers-color-scheme: dark" in page


def test_what_the_page_says_is_what_the_cache_held(model: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "picture.html"
    holdings = write_picture(path, TEXT, CASE, model, REGIME, max_tokens=90)
    layers, heads = holdings.gone.shape[:2]
    raw = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    assert raw is not None
    data = json.loads(raw[1])
    assert data["points"] == [16, 32, 48, 64, 80, 90]
    gone = np.frombuffer(base64.b64decode(data["gone"]), np.uint8).reshape(layers, heads, 90)
    assert np.array_equal(gone, holdings.gone)

    memory = make_memory(CASE, model, REGIME, 0)
    row, fed = memory.open(90), 0
    _, ids = split_tokens(model.tokenizer, TEXT, 90)
    for point, stop in enumerate(holdings.points):
        step = memory.extend([Segment(row, stop - fed)])
        wanted = torch.zeros(0, dtype=torch.int64)
        model.decoder.forward(torch.tensor(ids[fed:stop]), step.position, step.layers, wanted)
        memory.settle([row])
        fed = stop
        for layer in range(layers):
            for head in range(heads):
                held = memory.table.positions_of(row, layer, head).tolist()  # type: ignore[attr-defined]
                assert np.flatnonzero(holdings.held_at(point)[layer, head]).tolist() == held
    assert (holdings.gone[:, :, :2] == HELD).all(), "sinks stay"
    assert (holdings.gone == HELD).sum() == layers * heads * 8


def test_a_text_that_is_held_whole_makes_no_picture(model: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(TextError, match="held whole at gates-global M=8"):
        write_picture(tmp_path / "p.html", "short", CASE, model, REGIME, max_tokens=100)
