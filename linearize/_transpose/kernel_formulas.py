"""Derivatives of distances and of attention along tangents, block by block.

Each function takes the tangents of a forward operation's arguments, None for zero, and the
arguments of its backward kernel by name, and returns the tangent of the forward result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch

Tangents: TypeAlias = Sequence[torch.Tensor | None]
Formula: TypeAlias = Callable[[Tangents, dict[str, Any]], torch.Tensor]

#: Numbers in one block.
BLOCK = 1 << 20


def _spans(count: int, each: int) -> Iterator[tuple[int, int]]:
    """Yield the start and end of blocks of items, of `each` numbers apiece."""
    step = max(1, BLOCK // max(each, 1))
    for start in range(0, max(count, 1), step):
        yield start, min(start + step, count)


def cdist_tangent(tangents: Tangents, a: dict[str, Any]) -> torch.Tensor:
    """Differentiate |x - y|ₚ along a tangent of x, for blocks of rows x."""
    (t,) = tangents
    assert t is not None
    x, y, dist = a["x1"], a["x2"], a["cdist"]
    parts = []
    for i, j in _spans(dist.shape[-2], dist.shape[:-2].numel() * y.shape[-2] * y.shape[-1]):
        diff = x[..., i:j, None, :] - y[..., None, :, :]
        slope = _slope(diff, dist[..., i:j, :, None], a["p"])
        parts.append((slope * t[..., i:j, None, :]).sum(-1))
    return torch.cat(parts, -2)


def pdist_tangent(tangents: Tangents, a: dict[str, Any]) -> torch.Tensor:
    """Differentiate |xᵢ - xⱼ|ₚ for i < j, for blocks of pairs."""
    (t,) = tangents
    assert t is not None
    x, dist = a["self"], a["pdist"]
    first, second = torch.triu_indices(len(x), len(x), 1, device=x.device)
    parts = []
    for i, j in _spans(dist.shape[0], x.shape[1]):
        one, two = first[i:j], second[i:j]
        slope = _slope(x[one] - x[two], dist[i:j, None], a["p"])
        parts.append((slope * (t[one] - t[two])).sum(-1))
    return torch.cat(parts)


def weight_norm_tangent(tangents: Tangents, a: dict[str, Any]) -> torch.Tensor:
    """Differentiate w = g v / |v|, the norm over all dimensions but one (`weight_norm`)."""
    dv, dg = tangents
    v, g, dim = a["saved_v"], a["saved_g"], a["dim"]
    others = [i for i in range(v.dim()) if i != dim % v.dim()]
    norm = a["saved_norms"].to(v.dtype).reshape(g.shape)
    unit = v / norm
    total = torch.zeros_like(v)
    if dg is not None:
        total = total + unit * dg
    if dv is not None:
        along = (unit * dv).sum(others, keepdim=True)
        total = total + g / norm * (dv - unit * along)
    return total


def _slope(diff: torch.Tensor, dist: torch.Tensor, p: float) -> torch.Tensor:
    """Return the derivative of |d|ₚ by d, in the kernel's choice where there is none: zero."""
    if p == 0:
        return torch.zeros_like(diff)
    if p == 1:
        return diff.sign()
    if p == 2:
        slope = diff / dist
    elif p == math.inf:
        slope = diff.sign() * (diff.abs() == dist)
    else:
        slope = diff.sign() * (diff.abs() / dist) ** (p - 1)
        slope = slope.masked_fill(diff == 0, 0)
    return slope.masked_fill(dist == 0, 0)


def attention_tangent(tangents: Tangents, a: dict[str, Any]) -> torch.Tensor:
    tq, tk, tv, tb = (*tangents, None)[:4]
    q, k, v = a["query"], a["key"], a["value"]
    bias, causal = a.get("attn_mask", a.get("attn_bias")), a["is_causal"]
    scale = a["scale"] if a["scale"] is not None else 1 / math.sqrt(q.shape[-1])
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    heads, keys = q.shape[:-2], k.shape[-2]
    parts = []
    for i, j in _spans(q.shape[-2], heads.numel() * keys):
        end = min(j, keys) if causal else keys  # later keys are not seen by these queries

        def rows(x: torch.Tensor, i: int = i, j: int = j) -> torch.Tensor:
            return x[..., i:j, :].to(wide)

        def columns(x: torch.Tensor, end: int = end) -> torch.Tensor:
            repeat = heads[-1] // max(x.shape[-3], 1) if x.dim() > 2 else 1
            x = x[..., :end, :].to(wide)
            return x.repeat_interleave(repeat, -3) if repeat > 1 else x

        def block(x: torch.Tensor | None, i: int = i, j: int = j, end: int = end) -> Any:
            if x is None:
                return 0
            x = x if x.shape[-2] == 1 else x[..., i:j, :]
            return (x if x.shape[-1] == 1 else x[..., :end]).to(wide)

        q_, k_ = rows(q), columns(k)
        scores = scale * (q_ @ k_.mT) + block(bias)
        if causal:
            place = torch.arange(end, device=q.device)
            scores = scores.masked_fill(
                place > torch.arange(i, j, device=q.device)[:, None], -torch.inf
            )
        share = scores.softmax(-1)
        if bias is not None:  # a query that may see no key gives zero
            share = share.masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0)
        moved = torch.zeros((), dtype=wide, device=q.device) + block(tb)
        if tq is not None:
            moved = moved + scale * (rows(tq) @ k_.mT)
        if tk is not None:
            moved = moved + scale * (q_ @ columns(tk).mT)
        moved = share * moved
        moved = moved - share * moved.sum(-1, keepdim=True)
        out = moved @ columns(v)
        parts.append(out if tv is None else out + share @ columns(tv))
    return torch.cat(parts, -2).to(q.dtype)
