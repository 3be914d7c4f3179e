"""Every fused kernel against the model's own code, in float32 and bfloat16, over strided rows.

bfloat16 must agree to the bit on the CPU: a kernel that rounds elsewhere than eager code gives another model. On a GPU
the fast `exp` and `rsqrt` may tip a rounding, so one step of bfloat16 is allowed there.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as rotate_partly
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from trimkv_core.gates import GateKind, GateShape, build_gates
from trimkv_core.kernels.fused import add_rms_norm, gate_log_beta, qk_norm_rope, silu_mul

# SiLU of -200 goes through exp(200), and the interpreter says so.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")

DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-6


def strided(*shape: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    """Random rows that lie further apart than they are long."""
    wide = torch.randn(*shape[:-1], shape[-1] + 5, device=device) * scale
    return wide.to(dtype)[..., : shape[-1]]


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Strided rows of NaN: what a kernel does not write shows."""
    return torch.full((*shape[:-1], shape[-1] + 3), float("nan"), dtype=dtype, device=device)[..., : shape[-1]]


def check(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    if actual.dtype == torch.bfloat16 and not actual.is_cuda:
        torch.testing.assert_close(actual, expected, atol=0, rtol=0)
    elif actual.dtype == torch.bfloat16:
        torch.testing.assert_close(actual, expected, atol=1e-2, rtol=8e-3)
    else:
        torch.testing.assert_close(actual, expected, atol=2e-6, rtol=2e-6)


def untouched(part: Tensor) -> bool:
    """Whether the gap behind the rows is still what it was."""
    base = part._base
    assert base is not None
    return bool(base[..., part.shape[-1] :].isnan().all())


def norm(width: int, dtype: torch.dtype, device: torch.device) -> Qwen3RMSNorm:
    module = Qwen3RMSNorm(width, eps=EPS).to(device, dtype)
    module.weight.data = (torch.rand(width, device=device) + 0.5).to(dtype)
    return module.requires_grad_(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_residual", [True, False])
@pytest.mark.parametrize(("tokens", "width"), [(1, 64), (3, 100)])
def test_add_rms_norm_equals_the_models_own(
    tokens: int, width: int, has_residual: bool, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    x = strided(tokens, width, dtype=dtype, device=device)
    residual = strided(tokens, width, dtype=dtype, device=device, scale=7.0) if has_residual else None
    module = norm(width, dtype, device)
    out, residual_out = (empty(tokens, width, dtype=dtype, device=device) for _ in range(2))
    add_rms_norm(x, residual, weight=module.weight, eps=EPS, out=out, residual_out=residual_out)
    total = x if residual is None else x + residual
    check(out, module(total))
    assert untouched(out) and untouched(residual_out)
    if residual is not None:
        torch.testing.assert_close(residual_out, total, atol=0, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_may_write_over_its_inputs(dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(1)
    x, residual = (strided(2, 48, dtype=dtype, device=device) for _ in range(2))
    module = norm(48, dtype, device)
    total = x + residual
    expected = module(total)
    add_rms_norm(x, residual, weight=module.weight, eps=EPS, out=x, residual_out=residual)
    check(x, expected)
    check(residual, total)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", ["both", "neither", "query", "key"])
@pytest.mark.parametrize(
    ("query_heads", "heads", "dim", "rotated"),
    [(4, 2, 16, 16), (3, 2, 12, 12), (5, 1, 16, 12)],
    ids=["even", "uneven heads", "partial"],
)
def test_qk_norm_rope_equals_the_models_own(
    query_heads: int, heads: int, dim: int, rotated: int, normed: str, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(2)
    tokens = 2
    qkv = strided(tokens, (query_heads + 2 * heads) * dim + 4, dtype=dtype, device=device)
    angle = torch.rand(tokens, rotated // 2, device=device).repeat(1, 2) * 6
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    q_norm = norm(dim, dtype, device) if normed in {"both", "query"} else None
    k_norm = norm(dim, dtype, device) if normed in {"both", "key"} else None
    q_out = empty(tokens, query_heads, dim, dtype=dtype, device=device)
    k_out = empty(tokens, heads, dim, dtype=dtype, device=device)
    qk_norm_rope(
        qkv,
        cos=cos,
        sin=sin,
        q_weight=None if q_norm is None else q_norm.weight,
        k_weight=None if k_norm is None else k_norm.weight,
        eps=EPS,
        q_out=q_out,
        k_out=k_out,
    )
    split = query_heads * dim
    query = qkv[:, :split].reshape(1, tokens, query_heads, dim)
    key = qkv[:, split : split + heads * dim].reshape(1, tokens, heads, dim)
    query = query if q_norm is None else q_norm(query)
    key = key if k_norm is None else k_norm(key)
    rotate = apply_rotary_pos_emb if rotated == dim else rotate_partly
    expected_query, expected_key = rotate(query, key, cos[None], sin[None], unsqueeze_dim=2)
    check(q_out, expected_query[0])
    check(k_out, expected_key[0])
    assert untouched(q_out) and untouched(k_out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 40), (3, 1030)])
def test_silu_mul_equals_eager_code(tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(3)
    gate_up = strided(tokens, 2 * width, dtype=dtype, device=device, scale=4.0)
    gate_up[0, 0], gate_up[0, 1] = -200.0, 200.0
    out = empty(tokens, width, dtype=dtype, device=device)
    silu_mul(gate_up, out=out)
    gate, up = gate_up.chunk(2, -1)
    check(out, F.silu(gate) * up)
    assert untouched(out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [0.0, 18.0, -5.0])
@pytest.mark.parametrize(("heads", "width"), [(2, 24), (3, 300)])
def test_gate_log_beta_equals_the_gate(
    heads: int, width: int, bias: float, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(4)
    shape = GateShape(
        kind=GateKind.RG,
        hidden_size=8,
        intermediate_size=width,
        num_heads=heads,
        num_layers=1,
        is_tied=False,
        bias_init=bias,
    )
    gate = build_gates(shape, device=device, dtype=dtype)[0].requires_grad_(False)
    hidden = torch.randn(3, 8, device=device).to(dtype) * 3
    wide = F.pad(gate.linear1(hidden), (0, 7))  # type: ignore[operator]
    out = empty(3, heads, dtype=torch.float32, device=device)
    gate_log_beta(wide[:, :width], weight=gate.last_projection().weight, bias=gate.bias, out=out)
    # Relative: at a bias of 18 all of log β is about -1.5e-8, and its differences decide what is kept.
    torch.testing.assert_close(out, gate(hidden), atol=0, rtol=5e-6)
    assert untouched(out)


def test_log_sigmoid_holds_over_the_whole_range(device: torch.device) -> None:
    """One weight of 1 behind a feature whose SiLU is known, the bias sweeping."""
    bias = torch.cat([torch.linspace(-90, 90, 181), torch.tensor([1e-3, -1e-3, 87.0, -87.0])]).to(device)
    features = torch.zeros(1, 4, device=device)
    out = empty(1, bias.numel(), dtype=torch.float32, device=device)
    gate_log_beta(features, weight=torch.zeros(bias.numel(), 4, device=device), bias=bias, out=out)
    exact = F.logsigmoid(bias.double()).float()
    torch.testing.assert_close(out[0], exact, atol=1e-38, rtol=5e-6 if out.is_cuda else 3e-7)


def test_what_a_kernel_cannot_read_is_refused() -> None:
    x, weight = torch.zeros(2, 8), torch.ones(8)
    with pytest.raises(ValueError, match="x has stride 2 in its last dimension"):
        add_rms_norm(torch.zeros(2, 16)[:, ::2], None, weight=weight, eps=EPS, out=x)
    with pytest.raises(ValueError, match="residual_out=None is not possible beside a residual"):
        add_rms_norm(x, x, weight=weight, eps=EPS, out=x)
    with pytest.raises(ValueError, match="gate_up has 8 columns and out 8"):
        silu_mul(x, out=x)
    with pytest.raises(ValueError, match="need at least 16"):
        heads = torch.zeros(2, 1, 8)
        qk_norm_rope(x, cos=x, sin=x, q_weight=None, k_weight=None, eps=EPS, q_out=heads, k_out=heads)
    with pytest.raises(ValueError, match=r"out is torch\.bfloat16: scores tie"):
        gate_log_beta(x, weight=torch.zeros(2, 8), bias=torch.zeros(2), out=torch.zeros(2, 2, dtype=torch.bfloat16))
