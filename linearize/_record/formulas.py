"""Gradients of graph nodes written anew, step by step.

PyTorch's own formula of these is wrong at special points, not linear there, fails for some
layouts, or is a kernel of which no more can be seen. What is written here is made of operations
that a recorder follows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from .._torch.graphs import is_custom, signed
from .._torch.names import aten

Gradients: TypeAlias = Sequence[torch.Tensor | None]


def call_node(node: Any, grads: Sequence[torch.Tensor | None]) -> Sequence[torch.Tensor | None]:
    """Call a built-in graph node with gradients of its outputs."""
    if getattr(node, "_saved_sparse", False) and grads[0] is not None:
        dense = _DENSE.get(node.name())  # the same gradient as of `sparse=False`
        if dense is not None:
            return dense(node, grads[0])
    result = node.apply(*grads) if is_custom(node) else node(*grads)
    return result if isinstance(result, (tuple, list)) else (result,)


def _dense_embedding(node: Any, grad: torch.Tensor) -> Sequence[torch.Tensor | None]:
    return (
        aten.embedding_dense_backward.default(
            grad,
            node._saved_indices,
            node._saved_weight_sym_argsize_0,
            signed(node._saved_padding_idx),
            node._saved_scale_grad_by_freq,
        ),
    )


def _dense_bag(node: Any, grad: torch.Tensor) -> Sequence[torch.Tensor | None]:
    indices, offsets, bags = node._saved_indices, node._saved_offsets, node._saved_result1
    mode, padding = node._saved_mode, signed(node._saved_padding_idx)
    weight = aten._embedding_bag_backward.default(
        grad,
        indices,
        offsets,
        bags,
        node._saved_result2,
        node._saved_result3,
        node._saved_weight_sym_argsize_0,
        node._saved_scale_grad_by_freq,
        mode,
        False,  # not sparse
        node._saved_per_sample_weights,
        padding,
    )
    if node.next_functions[-1][0] is None:
        return weight, None
    of_samples = aten._embedding_bag_per_sample_weights_backward.default
    return weight, of_samples(grad, node._saved_weight, indices, offsets, bags, mode, padding)


_DENSE: dict[str, Callable[..., Sequence[torch.Tensor | None]]] = {
    "EmbeddingBackward0": _dense_embedding,
    "EmbeddingBagBackward0": _dense_bag,
}


def det(node: Any, grads: Gradients) -> Gradients:
    """Multiply with the matrix of cofactors, which is there for singular matrices too.

    PyTorch multiplies the inverse with the determinant, zero, if no graph of the gradient is asked
    for. Here pivots that are zero are made as small as rounding, in both factors: that moves the
    cofactors, polynomials of the entries, no further than rounding does.
    """
    (grad,) = grads
    if grad is None:
        return (None,)
    matrix = node._saved_A.detach()
    if not matrix.numel():
        return (grad[..., None, None] * matrix,)
    lu, pivots, _ = torch.linalg.lu_factor_ex(matrix)
    pivot = lu.diagonal(dim1=-2, dim2=-1)
    tiny = torch.finfo(lu.dtype).eps * lu.abs().amax((-2, -1), keepdim=True)[..., 0]
    tiny = torch.where(tiny == 0, torch.finfo(lu.dtype).tiny ** 0.5, tiny).to(lu.dtype)
    shift = torch.where(pivot == 0, tiny, torch.zeros_like(pivot))
    lu = lu + torch.diag_embed(shift)
    places = torch.arange(1, matrix.shape[-1] + 1, device=pivots.device, dtype=pivots.dtype)
    odd = (pivots != places).sum(-1) % 2
    value = (pivot + shift).prod(-1) * (1 - 2 * odd)
    one = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    inverse = torch.linalg.lu_solve(lu, pivots, one.expand_as(matrix))
    cofactors = (inverse * value[..., None, None]).mH
    return (grad[..., None, None] * cofactors,)


def segment_reduce(node: Any, grads: Gradients) -> Gradients:
    """Give each entry its share of the gradient of its segment.

    PyTorch's kernel divides among largest entries that are equal if the gradient is positive only.
    The shares are what it makes of ones.
    """
    (grad,) = grads
    if grad is None:
        return (None,)
    data = node._saved_data.detach()
    axis = signed(node._saved_axis) % data.dim()
    lengths, offsets = node._saved_lengths, node._saved_offsets
    result = node._saved_result.detach()
    shares = aten._segment_reduce_backward.default(
        torch.ones_like(result),
        result,
        data,
        node._saved_reduce,
        lengths=lengths,
        offsets=offsets,
        axis=axis,
        initial=node._saved_initial,
    )
    if not result.shape[axis]:
        return (grad.sum() * shares,)
    ends = lengths.cumsum(-1) if lengths is not None else offsets[..., 1:].contiguous()
    places = torch.arange(data.shape[axis], device=ends.device, dtype=ends.dtype)
    places = places.expand(*ends.shape[:-1], data.shape[axis]).contiguous()
    # Entries outside of all segments have no share, wherever they are put.
    segment = torch.searchsorted(ends, places, right=True).clamp(max=ends.shape[-1] - 1)
    segment = segment.reshape(*segment.shape, *(1,) * (data.dim() - segment.dim()))
    return (grad.gather(axis, segment.expand(data.shape)) * shares,)


def embedding(node: Any, grads: Gradients) -> Gradients:
    """Scale by how often an index occurs, if that is asked for, before rows are summed.

    The kernel that does both has a transpose that forgets the scale.
    """
    (grad,) = grads
    if grad is None or not node._saved_scale_grad_by_freq:
        return call_node(node, grads)
    indices, count = node._saved_indices, node._saved_weight_sym_argsize_0
    flat = indices.reshape(-1)
    wide = torch.promote_types(grad.dtype, torch.float32)
    often = torch.zeros(count, dtype=wide, device=flat.device)
    often = often.index_add(0, flat, torch.ones_like(flat, dtype=wide))
    often = often.index_select(0, flat).reshape(*indices.shape, 1)
    grad = (grad / often).to(grad.dtype)
    padding = signed(node._saved_padding_idx)
    return (aten.embedding_dense_backward.default(grad, indices, count, padding, False),)


def nll_loss2d(node: Any, grads: Gradients) -> Gradients:
    """Hand the kernel its input laid out as it wants it."""
    (grad,) = grads
    scores = node._saved_self
    if grad is None or scores.is_contiguous():
        return call_node(node, grads)
    return (
        aten.nll_loss2d_backward.default(
            grad,
            scores.detach().contiguous(),
            node._saved_target,
            node._saved_weight,
            node._saved_reduction,
            signed(node._saved_ignore_index),
            node._saved_total_weight,
        ),
    )


def lstm(node: Any, grads: Gradients) -> Gradients:
    """Go back through the time steps of one layer, which oneDNN does in one kernel.

    Hochreiter and Schmidhuber, Neural Computation 9 (1997), with a forget gate. The states are
    the outputs that were saved; of the cells only the last was.
    """
    of_output, of_state, of_cell = grads[:3]
    x, w_in, w_state, *_ = (getattr(node, f"_saved_{n}").detach() for n in _LSTM)
    state, cell = node._saved_hx_.detach(), node._saved_cx_.detach()
    output = node._saved_result0.detach()
    steps = range(len(x))
    order = list(reversed(steps)) if node._saved_reverse else list(steps)
    before = [state, *(output[t] for t in order[:-1])]
    states = torch.stack([before[order.index(t)] for t in steps])
    gates = torch.nn.functional.linear(x, w_in) + torch.nn.functional.linear(states, w_state)
    if node._saved_has_biases:
        gates = gates + node._saved_weight2.detach() + node._saved_weight3.detach()
    enter, forget, new, leave = gates.chunk(4, -1)
    enter, forget, leave, new = enter.sigmoid(), forget.sigmoid(), leave.sigmoid(), new.tanh()
    cells = [cell]
    for t in order:
        cells.append(forget[t] * cells[-1] + enter[t] * new[t])
    found: dict[int, torch.Tensor] = {}
    for k, t in reversed(list(enumerate(order))):
        of_state = _plus(of_state, None if of_output is None else of_output[t])
        shown = cells[k + 1].tanh()
        if of_state is not None:
            of_cell = _plus(of_cell, of_state * (leave[t] * (1 - shown * shown)))
        parts = [
            _times(of_cell, new[t] * enter[t] * (1 - enter[t])),
            _times(of_cell, cells[k] * forget[t] * (1 - forget[t])),
            _times(of_cell, enter[t] * (1 - new[t] * new[t])),
            _times(of_state, shown * leave[t] * (1 - leave[t])),
        ]
        given = next((p for p in parts if p is not None), None)
        if given is None:
            continue
        found[t] = torch.cat([torch.zeros_like(given) if p is None else p for p in parts], -1)
        of_cell = _times(of_cell, forget[t])
        of_state = found[t] @ w_state
    of_gates = torch.stack([found[t] if t in found else torch.zeros_like(gates[t]) for t in steps])
    flat = of_gates.flatten(0, 1)
    of_bias = flat.sum(0)
    return (
        of_gates @ w_in,
        flat.t() @ x.flatten(0, 1),
        flat.t() @ states.flatten(0, 1),
        of_bias,
        of_bias,
        of_state,
        of_cell,
    )


_LSTM = ("input", "weight0", "weight1")


def _plus(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return b if a is None else a if b is None else a + b


def _times(a: torch.Tensor | None, b: torch.Tensor) -> torch.Tensor | None:
    return None if a is None else a * b


FORMULAS: dict[str, Callable[[Any, Gradients], Gradients]] = {
    "EmbeddingBackward0": embedding,
    "LinalgDetBackward0": det,
    "MkldnnRnnLayerBackward0": lstm,
    "NllLoss2DBackward0": nll_loss2d,
    "SegmentReduceBackward0": segment_reduce,
}
