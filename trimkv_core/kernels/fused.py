"""The small operations between a decoder's matmuls, fused: norms, RoPE, SiLU, the end of the retention gate.

With few rows a step is launches and not arithmetic; each function here is one launch in place of four to ten. Results
are rounded where the model's own code rounds, so that a step made of these gives what `transformers` gives: statistics
and SiLU in float32, everything that is a tensor there in its dtype here. Knows no model: shapes and strides only.

Rows may be strided; the last dimension may not.

Letters: T tokens, E hidden size, I intermediate size, HQ query heads, H KV heads, D head dimension, R how much of D is
rotated.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_SILU_COLUMNS = 1024
_ROPE_HEADS = 4
_GATE_COLUMNS = 256


@triton.jit
def _rounded(x, like: tl.constexpr):
    """float32 as it comes back from a tensor of another dtype."""
    return x.to(like).to(tl.float32)


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _log_sigmoid(x):
    """min(x, 0) - log(1 + exp(-|x|)), to the last bits even where the logarithm is tiny.

    A bias of 18 asks for log(1 + 1.5e-8), which float32 cannot take apart, and the GPU's fast logarithm is no better:
    log(1 + z) = 2 · artanh(z / (2 + z)), whose argument is at most 1/3, so seven terms of the series are enough.
    """
    z = tl.exp(-tl.abs(x))
    s = z / (2.0 + z)
    t = s * s
    series = 1.0 / 11.0 + t * (1.0 / 13.0)
    series = 1.0 / 9.0 + t * series
    series = 1.0 / 7.0 + t * series
    series = 1.0 / 5.0 + t * series
    series = 1.0 / 3.0 + t * series
    return tl.minimum(x, 0.0) - 2.0 * s * (1.0 + t * series)


@triton.jit
def add_rms_norm_kernel(
    x,
    x_by_token,
    residual,
    residual_by_token,
    weight,
    out,
    out_by_token,
    residual_out,
    residual_out_by_token,
    eps,
    E: tl.constexpr,
    E_PADDED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """One row a program."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, E_PADDED)
    inside = at < E
    row = tl.load(x + token * x_by_token + at, mask=inside, other=0.0)
    dtype: tl.constexpr = row.dtype
    hidden = row.to(tl.float32)
    if HAS_RESIDUAL:
        before = tl.load(residual + token * residual_by_token + at, mask=inside, other=0.0)
        hidden = _rounded(hidden + before.to(tl.float32), dtype)
        tl.store(residual_out + token * residual_out_by_token + at, hidden.to(dtype), mask=inside)
    normalised = hidden * tl.rsqrt(tl.sum(hidden * hidden, 0) / E + eps)
    scaled = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32) * _rounded(normalised, dtype)
    tl.store(out + token * out_by_token + at, scaled.to(dtype), mask=inside)


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    *,
    weight: Tensor,
    eps: float,
    out: Tensor,
    residual_out: Tensor | None = None,
) -> None:
    """residual_out = x + residual; out = RMSNorm(residual_out) · weight, in one launch.

    Rounded as `Qwen3RMSNorm` and `LlamaRMSNorm`: statistics in float32, the normalised row in the model's dtype before
    the weight. Outputs may be inputs.

    Args:
        x: [T, E].
        residual: [T, E]; None: x itself is normalised and `residual_out` stays as it is.
        weight: [E].
        eps: of the variance.
        out, residual_out: [T, E], written; `residual_out` is needed beside a residual.

    Raises:
        ValueError: a row is not contiguous, or a residual has nowhere to go.
    """
    _require_rows(x=x, residual=residual, weight=weight, out=out, residual_out=residual_out)
    if residual is not None and residual_out is None:
        raise ValueError("residual_out=None is not possible beside a residual: pass a tensor, or the residual itself")
    tokens, width = x.shape
    # Triton wants a pointer for every argument; without a residual nobody reads these.
    before, after = (x if given is None else given for given in (residual, residual_out))
    add_rms_norm_kernel[(tokens,)](
        x,
        x.stride(0),
        before,
        before.stride(0),
        weight,
        out,
        out.stride(0),
        after,
        after.stride(0),
        eps,
        E=width,
        E_PADDED=triton.next_power_of_2(width),
        HAS_RESIDUAL=residual is not None,
        num_warps=8 if width > 1024 else 4,
    )


@triton.jit
def qk_norm_rope_kernel(
    qkv,
    qkv_by_token,
    cos,
    cos_by_token,
    sin,
    sin_by_token,
    q_weight,
    k_weight,
    q_out,
    q_by_token,
    q_by_head,
    k_out,
    k_by_token,
    k_by_head,
    eps,
    HQ: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    R: tl.constexpr,
    HAS_Q_NORM: tl.constexpr,
    HAS_K_NORM: tl.constexpr,
    HEADS: tl.constexpr,
):
    """A few heads of one token a program. Every element is loaded with its partner of the other half:

    d          0 … R/2      R/2 … R      R … D
    partner    d + R/2      d - R/2      d          the second load comes out of the cache
    sign       -            +            unused
    """
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    d = tl.arange(0, D_PADDED)[None, :]
    is_query = head < HQ
    inside = (head < HQ + H) & (d < D)
    is_lower = d < R // 2
    is_rotated = d < R
    partner = tl.where(is_lower, d + R // 2, tl.where(is_rotated, d - R // 2, d))

    row = qkv + token * qkv_by_token + head * D
    own = tl.load(row + d, mask=inside, other=0.0)
    dtype: tl.constexpr = own.dtype
    x = own.to(tl.float32)
    y = tl.load(row + partner, mask=inside, other=0.0).to(tl.float32)
    if HAS_Q_NORM or HAS_K_NORM:
        factor = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        weight_x = tl.full([HEADS, D_PADDED], 1.0, tl.float32)
        weight_y = weight_x
        if HAS_Q_NORM:
            is_normed = is_query & inside
            weight_x = tl.load(q_weight + d, mask=is_normed, other=1.0).to(tl.float32)
            weight_y = tl.load(q_weight + partner, mask=is_normed, other=1.0).to(tl.float32)
        if HAS_K_NORM:
            is_normed = (head >= HQ) & inside
            weight_x = tl.where(is_query, weight_x, tl.load(k_weight + d, mask=is_normed, other=1.0).to(tl.float32))
            at_y = tl.load(k_weight + partner, mask=is_normed, other=1.0).to(tl.float32)
            weight_y = tl.where(is_query, weight_y, at_y)
        normed_x = _rounded(weight_x * _rounded(x * factor, dtype), dtype)
        normed_y = _rounded(weight_y * _rounded(y * factor, dtype), dtype)
        if HAS_Q_NORM and HAS_K_NORM:
            x = normed_x
            y = normed_y
        else:
            has_norm = is_query if HAS_Q_NORM else head >= HQ
            x = tl.where(has_norm, normed_x, x)
            y = tl.where(has_norm, normed_y, y)
    c = tl.load(cos + token * cos_by_token + d, mask=is_rotated, other=0.0).to(tl.float32)
    s = tl.load(sin + token * sin_by_token + d, mask=is_rotated, other=0.0).to(tl.float32)
    y = tl.where(is_lower, -y, y)
    rotated = _rounded(x * c, dtype) + _rounded(y * s, dtype)
    result = tl.where(is_rotated, rotated, x).to(dtype)
    tl.store(q_out + token * q_by_token + head * q_by_head + d, result, mask=inside & is_query)
    tl.store(k_out + token * k_by_token + (head - HQ) * k_by_head + d, result, mask=inside & (head >= HQ))


def qk_norm_rope(
    qkv: Tensor,
    *,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    q_out: Tensor,
    k_out: Tensor,
) -> None:
    """RMSNorm over each query and key head (Qwen3; optional), then rotate-half RoPE, in one launch.

    Rounded as `apply_rotary_pos_emb`: both products and their sum in the model's dtype. float32 throughout and one
    rounding at the end would be more exact, and different from what every other path of this project computes.

    Args:
        qkv: [T, at least (HQ + H)·D], a fused projection's output: query heads, key heads, anything.
        cos, sin: [T, R], the two halves alike, in the model's dtype; R < D rotates the first R of a head only (Phi-3).
        q_weight, k_weight: [D] of the norms; None: no norm.
        eps: of the norms' variance.
        q_out: [T, HQ, D], written.
        k_out: [T, H, D], written.

    Raises:
        ValueError: a row is not contiguous, or the shapes do not fit each other.
    """
    _require_rows(qkv=qkv, cos=cos, sin=sin, q_weight=q_weight, k_weight=k_weight, q_out=q_out, k_out=k_out)
    tokens, query_heads, dim = q_out.shape
    heads, rotated = k_out.shape[1], cos.shape[-1]
    if qkv.shape[1] < (query_heads + heads) * dim or rotated > dim or rotated % 2:
        raise ValueError(
            f"qkv has {qkv.shape[1]} columns and cos {rotated}: {query_heads} query and {heads} key heads of {dim} "
            f"need at least {(query_heads + heads) * dim}, and an even number up to {dim}"
        )
    qk_norm_rope_kernel[(tokens, triton.cdiv(query_heads + heads, _ROPE_HEADS))](
        qkv,
        qkv.stride(0),
        cos,
        cos.stride(0),
        sin,
        sin.stride(0),
        qkv if q_weight is None else q_weight,
        qkv if k_weight is None else k_weight,
        q_out,
        q_out.stride(0),
        q_out.stride(1),
        k_out,
        k_out.stride(0),
        k_out.stride(1),
        eps,
        HQ=query_heads,
        H=heads,
        D=dim,
        D_PADDED=triton.next_power_of_2(dim),
        R=rotated,
        HAS_Q_NORM=q_weight is not None,
        HAS_K_NORM=k_weight is not None,
        HEADS=_ROPE_HEADS,
        num_warps=4,
    )


@triton.jit
def silu_mul_kernel(gate_up, by_token, out, out_by_token, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """A few columns of one row a program."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = at < WIDTH
    row = gate_up + token * by_token + at
    gate = tl.load(row, mask=inside, other=0.0)
    dtype: tl.constexpr = gate.dtype
    up = tl.load(row + WIDTH, mask=inside, other=0.0).to(tl.float32)
    mixed = _rounded(_silu(gate.to(tl.float32)), dtype) * up
    tl.store(out + token * out_by_token + at, mixed.to(dtype), mask=inside)


def silu_mul(gate_up: Tensor, *, out: Tensor) -> None:
    """out = SiLU(gate) · up, in one launch; SiLU in float32, rounded to the model's dtype before the product.

    Args:
        gate_up: [T, 2·I], a fused projection's output: gate, then up.
        out: [T, I], written.

    Raises:
        ValueError: a row is not contiguous, or the widths do not fit each other.
    """
    _require_rows(gate_up=gate_up, out=out)
    tokens, width = out.shape
    if gate_up.shape[1] != 2 * width:
        raise ValueError(f"gate_up has {gate_up.shape[1]} columns and out {width}: it must have twice as many")
    silu_mul_kernel[(tokens, triton.cdiv(width, _SILU_COLUMNS))](
        gate_up, gate_up.stride(0), out, out.stride(0), WIDTH=width, COLUMNS=_SILU_COLUMNS, num_warps=4
    )


@triton.jit
def gate_log_beta_kernel(
    features,
    features_by_token,
    weight,
    weight_by_head,
    bias,
    out,
    out_by_token,
    H: tl.constexpr,
    H_PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """All heads of one token a program. Products are summed in float32: tensor cores would round them to TF32."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, H_PADDED)
    column = tl.arange(0, COLUMNS)
    row = features + token * features_by_token
    total = tl.zeros([H_PADDED, COLUMNS], tl.float32)
    for start in range(0, WIDTH, COLUMNS):
        at = start + column
        loaded = tl.load(row + at, mask=at < WIDTH, other=0.0)
        active = _rounded(_silu(loaded.to(tl.float32)), loaded.dtype)
        inside = (head < H)[:, None] & (at < WIDTH)[None, :]
        total += (
            tl.load(weight + head[:, None] * weight_by_head + at[None, :], mask=inside, other=0.0) * active[None, :]
        )
    logit = tl.sum(total, 1) + tl.load(bias + head, mask=head < H, other=0.0)
    tl.store(out + token * out_by_token + head, _log_sigmoid(logit), mask=head < H)


def gate_log_beta(features: Tensor, *, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """The end of a retention gate: SiLU, the float32 projection, bias and logsigmoid, in one launch.

    As `RetentionGate.forward` from before its last SiLU, which is rounded to the model's dtype. On a GPU `exp` is the
    fast one: log β differs from PyTorch's by about 1e-6 of itself.

    Args:
        features: [T, I], in the model's dtype, before the last SiLU.
        weight: float32 [H, I].
        bias: float32 [H].
        out: float32 [T, H], written.

    Raises:
        ValueError: a row is not contiguous, or weight, bias or out is not float32.
    """
    _require_rows(features=features, weight=weight, bias=bias, out=out)
    for name, tensor in (("weight", weight), ("bias", bias), ("out", out)):
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name} is {tensor.dtype}: scores tie in anything below float32")
    tokens, width = features.shape
    heads = weight.shape[0]
    gate_log_beta_kernel[(tokens,)](
        features,
        features.stride(0),
        weight,
        weight.stride(0),
        bias,
        out,
        out.stride(0),
        H=heads,
        H_PADDED=triton.next_power_of_2(heads),
        WIDTH=width,
        COLUMNS=_GATE_COLUMNS,
        num_warps=4,
    )


def _require_rows(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} has stride {tensor.stride(-1)} in its last dimension: its rows must be contiguous"
            )
