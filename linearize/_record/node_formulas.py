"""Pullbacks of graph nodes for which PyTorch's formula does not do.

PyTorch computes some gradients by steps that are not linear in the cotangent although the
result is: through a block matrix, or through logarithms of its positive and negative parts.
Such a node is recognised by its name and written down as one `Differential`. And some
gradients are wrong: for these there is another formula, written down step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from .._capture.repeated import left_to_chance, read_repeatedly, repeats
from .._programs.aten import schema_of
from .._programs.numbers import Numbers
from .._programs.program import Equation, Operation
from .._programs.values import Var
from .._spaces.nested import leaves
from .._torch.aot import reading_of
from .._torch.graphs import Node, leaf_variable, recomputed_apart, signed
from .._torch.names import OpOverload, aten
from .._torch.sharded import is_sharded
from ..errors import UnsupportedError
from .formulas import FORMULAS, Gradients, call_node


class Differential(Operation):
    """The derivative of a function of one tensor at a point, or the transpose of it.

    It is called with a tangent (a cotangent, if `adjoint`) and the tensors of the point.
    """

    __slots__ = ("adjoint", "setting")
    may_alias = False
    of_point = False

    def __init__(self, adjoint: bool, setting: Any = None) -> None:
        self.adjoint = adjoint
        self.setting = setting

    def turned(self) -> Differential:
        """Return the transpose."""
        return type(self)(not self.adjoint, self.setting)

    def __call__(self, t: torch.Tensor | None, *point: torch.Tensor) -> Any:
        """Apply the derivative or its transpose."""
        return (None if t is None else self.apply(t, *point),)

    def apply(self, t: torch.Tensor, *point: torch.Tensor) -> torch.Tensor:
        """Do so for a tangent that is not zero."""
        raise NotImplementedError


class MatrixExpDifferential(Differential):
    """exp([[A, E], [0, A]]) has L(A, E), the derivative at A along E, in its upper right.

    The transpose of E ↦ L(A, E) is E ↦ L(Aᴴ, E). Higham, Functions of Matrices (2008),
    theorem 3.6 and section 10.2; Najfeld and Havel, Adv. Appl. Math. 16 (1995).
    """

    __slots__ = ()
    name = "matrix_exp differential"

    def apply(self, t: torch.Tensor, *point: torch.Tensor) -> torch.Tensor:
        """Return L(A, t)."""
        (a,) = point
        if self.adjoint:
            a = a.mH
        n = a.shape[-1]
        # L is linear: with a direction not larger than A no digits are lost to scaling.
        norm = t.abs().amax((-2, -1), keepdim=True) if t.numel() else torch.ones_like(t)
        size = torch.where(norm > 0, norm, torch.ones_like(norm))
        above = torch.cat([a, t / size], -1)
        below = torch.cat([torch.zeros_like(a), a], -1)
        both = torch.linalg.matrix_exp(torch.cat([above, below], -2))
        upper: torch.Tensor = both[..., :n, n:] * size
        return upper


class LogCumSumExpDifferential(Differential):
    """The derivative of y = logcumsumexp(x): dyᵢ = Σ exp(xⱼ - yᵢ) dxⱼ over j ≤ i.

    No factor is ever large: partial sums over a stretch that ends at i - s are carried to i by
    exp(yᵢ₋ₛ - yᵢ), with s doubling (the scan of Hillis and Steele, Comm. ACM 29, 1986). The
    transpose does the same steps in reverse. Where y is -inf, the derivative is taken as zero.
    """

    __slots__ = ()
    name = "logcumsumexp differential"

    def apply(self, t: torch.Tensor, *point: torch.Tensor) -> torch.Tensor:
        """Return the tangent of y, or from a cotangent of y that of x."""
        x, y = point
        if x.dim() == 0:
            return t.clone()
        dim = self.setting
        t, x, y = t.transpose(dim, -1), x.transpose(dim, -1), y.transpose(dim, -1)
        count = x.shape[-1]
        strides = [1 << k for k in range(max(count - 1, 0).bit_length())]
        if not self.adjoint:
            t = _ratio(x, y) * t
            for s in strides:
                carried = _ratio(y[..., :-s], y[..., s:]) * t[..., :-s]
                t = torch.cat([t[..., :s], t[..., s:] + carried], -1)
            return t.transpose(dim, -1)
        for s in reversed(strides):
            carried = _ratio(y[..., :-s], y[..., s:]).conj() * t[..., s:]
            t = torch.cat([t[..., :-s] + carried, t[..., -s:]], -1)
        return (_ratio(x, y).conj() * t).transpose(dim, -1)


def _ratio(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return exp(a - b), zero where a is -inf."""
    gone = (a.real if a.is_complex() else a) == -torch.inf
    return torch.exp(a - b).masked_fill(gone, 0)


Formula: TypeAlias = Callable[[Any], tuple[Operation, Sequence[torch.Tensor]]]


def _matrix_exp(node: Any) -> tuple[Operation, Sequence[torch.Tensor]]:
    return MatrixExpDifferential(adjoint=True), [node._saved_self]


def _logcumsumexp(node: Any) -> tuple[Operation, Sequence[torch.Tensor]]:
    x, y = node._saved_self, node._saved_result
    return LogCumSumExpDifferential(True, signed(node._saved_dim)), [x, y]


_FORMULAS: dict[str, Formula] = {
    "LinalgMatrixExpBackward0": _matrix_exp,
    "LogcumsumexpBackward0": _logcumsumexp,
}


def formula_of(node: Node) -> Formula | None:
    """Return what gives a node's pullback and the tensors of its point, None if nothing does."""
    return _FORMULAS.get(node.name())


# -- gradients that are wrong -----------------------------------------------------------------


def mended(node: Node) -> Callable[[Gradients], Gradients]:
    """Return what computes the gradients of a built-in node, or of a compiled piece."""
    reading = reading_of(node)
    if reading is not None:
        return lambda grads: reading(node, grads)
    formula = _MENDED.get(node.name())
    if formula is None:
        return lambda grads: call_node(node, grads)
    return lambda grads: (call_node if any(map(is_sharded, grads)) else formula)(node, grads)


def differentiable(node: Node) -> Callable[[Gradients], Gradients]:
    """Return what computes the gradients of a node so that PyTorch can differentiate it again."""
    if node.name() == "SparseCooTensorWithDimsAndTensorsBackward0":
        return lambda grads: _values_of_sparse(node, grads)
    return mended(node)


def _values_of_sparse(node: Any, grads: Gradients) -> Gradients:
    """Pick the values at the indices; PyTorch's formula forgets the history of the gradient."""
    (grad,) = grads
    if grad is None:
        return (None,)
    indices = node._saved_result.detach()._indices()
    if grad.layout == torch.strided:
        return (grad[tuple(indices)],)
    grad = grad.coalesce()
    have, want = (_flat(i, grad.shape) for i in (grad.indices(), indices))
    values = grad.values()
    if not len(have):
        return (values.new_zeros((len(want), *values.shape[1:])),)
    places = torch.searchsorted(have, want).clamp(max=len(have) - 1)
    missing = (have[places] != want).reshape(-1, *[1] * (values.dim() - 1))
    return (values[places].masked_fill(missing, 0),)


def _flat(indices: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return one number for each column of indices, in their order."""
    keys = torch.zeros_like(indices[0])
    for n, row in zip(shape, indices, strict=False):
        keys = keys * n + row
    return keys


def _as_strided_scatter(node: Any, grads: Gradients) -> Gradients:
    """Keep all but the window for the first argument, and the window for the second.

    PyTorch keeps the window for both. It takes an offset as one into the gradient, whose memory
    begins with its first element; that of the first argument need not.
    """
    (grad,) = grads
    size, stride, offset = (
        node._saved_size,
        node._saved_stride,
        node._saved_storage_offset,
    )
    if grad is None:
        return None, None
    if offset is not None:
        leaf = node.next_functions[0][0]
        variable = None if leaf is None else leaf_variable(leaf)
        if variable is None:
            raise UnsupportedError(
                f"{node.name()}: PyTorch does not keep where in memory the first argument of "
                "as_strided_scatter begins, unless it is a primal; leave storage_offset out, or "
                "write by slice_scatter or index_put"
            )
        offset -= variable.storage_offset()
    where = size, stride, offset or 0
    flat = grad.reshape(-1)
    places = torch.arange(flat.numel(), device=flat.device).as_strided(*where)
    if len(places.unique()) < places.numel():
        raise UnsupportedError(
            f"{node.name()}: the window of as_strided_scatter overlaps itself, so that its value "
            "is undefined"
        )
    window = flat.as_strided(*where)
    rest = flat.as_strided_scatter(torch.zeros_like(places, dtype=flat.dtype), *where)
    return rest.reshape(grad.shape), window


def _max_unpool(node: Any, grads: Gradients) -> Gradients:
    """Leave out entries that others overwrite.

    PyTorch's kernels go through the entries in order, so that the last one at a place stays,
    if one thread does it all; and autograd gives the gradient of the place to each.
    """
    gradients = call_node(node, grads)
    given = gradients[0]
    if given is None:
        return gradients
    with recomputed_apart():  # the node has unpacked them itself
        indices = node._saved_indices
    spatial = 2 if node.name() == "MaxUnpool2DBackward0" else 3
    planes = indices.flatten(-spatial)
    count = planes.shape[-1]
    order = torch.arange(count, device=planes.device).expand_as(planes)
    if not count or not planes.numel():
        return gradients
    last = torch.full((*planes.shape[:-1], int(planes.max()) + 1), -1, device=planes.device)
    last = last.scatter_reduce(-1, planes, order, "amax")
    stays = (last.gather(-1, planes) == order).reshape(indices.shape)
    if bool(stays.all()):
        return gradients
    if indices.device.type != "cpu" or torch.get_num_threads() > 1:
        raise UnsupportedError(
            f"{node.name()}: with repeated indices several entries are put at one place, and "
            "which of them stays is left to chance where several threads work on it (on the CPU, "
            "torch.set_num_threads(1) settles it)"
        )
    return [given * stays, *gradients[1:]]


def _written(node: Any, grads: Gradients) -> Gradients:
    """Leave out entries that others overwrite; which they are a write of their numbers tells."""
    gradients = call_node(node, grads)
    given = gradients[1]
    if given is None or not repeats(node):
        return gradients
    if left_to_chance(given):
        raise UnsupportedError(
            f"{node.name()}: with repeated indices several entries are put at one place, and "
            "which of them stays is left to chance; use accumulate=True or index_add, or indices "
            "without repetition"
        )
    (grad,) = grads
    assert grad is not None
    order = torch.arange(given.numel(), device=given.device).reshape(given.shape)
    blank = torch.full(grad.shape, -1, device=given.device)
    return [gradients[0], given * (_LAST[node.name()](node, blank, order) == order)]


def refuse_repeated(
    node: Node,
    equations: Sequence[Equation],
    numbers: Numbers,
    relies: Callable[[torch.Tensor], None],
) -> None:
    """Raise if a node of which no more is seen puts several entries at one place.

    What it does tells: it sets the gradient of what was there before to zero, and reads that of
    the entries. `relies` is told of the indices that do not: at another point they may.
    """
    called = [(schema_of(eq.op).name, eq) for eq in equations if isinstance(eq.op, OpOverload)]
    names = {name for name, _ in called}
    reads = [
        (name, numbers.filled(eq.args[1:]), eq.args[0].spec.shape)
        for name, eq in called
        if _READS.get(name) in names and isinstance(eq.args[0], Var)
    ]
    for _, indices, _ in reads:
        for t in leaves(indices):
            if isinstance(t, torch.Tensor) and t.dtype != torch.bool:
                relies(t)
    if any(read_repeatedly(*read) for read in reads):
        raise UnsupportedError(
            f"{node.name()}: entries are written into a part of a tensor with repeated indices, "
            "and the gradient would count those that others overwrite; write into the whole "
            "tensor, or with indices without repetition"
        )


#: What reads the entries that were put by what.
_READS = {"index": "index_put", "gather": "scatter", "index_select": "index_fill", "take": "put"}


def _last_indexed(node: Any, blank: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    indices = list(node._saved_indices)
    last: torch.Tensor = aten.index.Tensor(aten.index_put.default(blank, indices, order), indices)
    return last


def _last_copied(node: Any, blank: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    index, dim = node._saved_index, signed(node._saved_dim)
    return blank.index_copy(dim, index, order).index_select(dim, index).reshape(order.shape)


def _last_scattered(node: Any, blank: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    index, dim = node._saved_index, signed(node._saved_dim)
    return blank.scatter(dim, index, order).gather(dim, index)


def _last_put(node: Any, blank: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    index = node._saved_index
    return blank.put(index, order).take(index).reshape(order.shape)


_LAST: dict[str, Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "IndexCopyBackward0": _last_copied,
    "IndexPutBackward0": _last_indexed,
    "PutBackward0": _last_put,
    "ScatterBackward0": _last_scattered,
    "UnsafeIndexPutBackward0": _last_indexed,
}

_MENDED: dict[str, Callable[[Any, Gradients], Gradients]] = {
    **FORMULAS,
    **dict.fromkeys(_LAST, _written),
    "AsStridedScatterBackward0": _as_strided_scatter,
    "MaxUnpool2DBackward0": _max_unpool,
    "MaxUnpool3DBackward0": _max_unpool,
}
