"""Transposes of backward kernels that PyTorch cannot differentiate.

Each kernel is linear in the gradient that it is given. Its transpose takes the tangents of
the forward operation's arguments to the tangent of its result. Kernels that multiply each
entry of the gradient by a slope of its own become plain ATen equations; the others a
`KernelTranspose`, whose own transpose is the kernel again.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from .._programs.aten import schema_of
from .._programs.program import Emitter, Equation, Operation
from .._programs.values import Constant, Var, zeros
from .._record.node_formulas import Differential
from .._spaces.nested import map_leaves
from .._torch.names import OpOverload, aten
from .kernel_formulas import (
    Formula,
    attention_tangent,
    cdist_tangent,
    pdist_tangent,
    weight_norm_tangent,
)
from .rules import Cotangents, Result, as_gradient, fit, rule, rule_of_several


class _Hole:
    """Stands for a residual among a kernel's arguments."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


class KernelTranspose(Operation):
    """The transpose of a kernel with respect to its first argument, by a formula.

    It is called with a tangent for each of the kernel's results (None for zero), followed by
    the kernel's residuals.
    """

    __slots__ = ("args", "count", "formula", "kernel", "kwargs")
    may_alias = False
    of_point = False

    def __init__(
        self, kernel: OpOverload, args: Any, kwargs: Any, count: int, formula: Formula
    ) -> None:
        self.kernel = kernel
        #: The kernel's arguments after the gradient, with holes for residuals.
        self.args, self.kwargs = args, kwargs
        self.count = count
        self.formula = formula

    @property
    def name(self) -> str:  # type: ignore[override]
        """Printable name."""
        return f"transposed {schema_of(self.kernel).name}"

    def filled(self, residuals: Sequence[Any]) -> tuple[Any, Any]:
        """Return the kernel's arguments after the gradient."""

        def fill(x: Any) -> Any:
            return residuals[x.index] if isinstance(x, _Hole) else x

        return map_leaves(fill, self.args), map_leaves(fill, self.kwargs)

    def __call__(self, *given: Any) -> Any:
        """Apply the formula."""
        tangents, residuals = given[: self.count], given[self.count :]
        if all(t is None for t in tangents):
            return (None,)
        args, kwargs = self.filled(residuals)
        return (self.formula(tangents, _named(self.kernel, args, kwargs)),)


def _named(kernel: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a kernel's arguments after the gradient by name, defaults included."""
    declared = kernel._schema.arguments[1:]
    named = {a.name: a.default_value for a in declared if a.has_default_value()}
    named.update((a.name, x) for a, x in zip(declared, args, strict=False))
    return named | kwargs


def _read(e: Emitter, eq: Equation) -> tuple[Any, Any]:
    """Return a kernel's arguments after the gradient, with tensors in place of constants.

    Others are made of them, so that they must be what they were.
    """
    for r in e.numbers.residuals(eq.constants()):
        r.check()
    return e.numbers.filled((eq.args[1:], eq.kwargs))  # type: ignore[no-any-return]


def _linear_in_first(eq: Equation) -> bool:
    """Whether the gradient is all that varies, as a rule of this module expects."""
    return isinstance(eq.args[0], Var) and len(eq.inputs()) == 1


def _turned(e: Emitter, eq: Equation, cts: Cotangents, formula: Formula) -> Result | None:
    """Emit a `KernelTranspose`."""
    if not _linear_in_first(eq):
        return None
    constants = list(dict.fromkeys(eq.constants()))

    def hole(x: Any) -> Any:
        return _Hole(constants.index(x)) if isinstance(x, Constant) else x

    args, kwargs = map_leaves(hole, eq.args[1:]), map_leaves(hole, eq.kwargs)
    op = KernelTranspose(eq.op, args, kwargs, len(cts), formula)  # type: ignore[arg-type]
    grad = eq.args[0]
    return [(grad, e.emit(op, (*cts, *constants), grad.spec))]


@rule(KernelTranspose)
def _kernel_again(e: Emitter, eq: Equation, ct: Var) -> Result:
    op: Any = eq.op
    tangents = eq.args[: op.count]
    args, kwargs = op.filled(eq.args[op.count :])
    outs = [Var(t.spec) if isinstance(t, Var) else None for t in tangents]
    e.add(op.kernel, (as_gradient(e, op.kernel, ct), *args), outs, **kwargs)
    return [(t, out) for t, out in zip(tangents, outs, strict=True) if out is not None]


@rule(Differential)
def _differential(e: Emitter, eq: Equation, ct: Var) -> Result:
    x, *point = eq.args
    turned = eq.op.turned()  # type: ignore[attr-defined]
    return [(x, e.emit(turned, (ct, *point), x.spec))]


# -- each entry of the gradient times a slope -------------------------------------------------


def _summed(e: Emitter, eq: Equation, ct: Var, dims: list[int]) -> Result:
    """Emit the sum of slopes times tangents over the dimensions that the gradient lacks.

    The slopes are the kernel's result for a gradient of ones.
    """
    grad = eq.args[0]
    args, kwargs = _read(e, eq)
    ones = torch.ones(grad.spec.shape, dtype=grad.spec.dtype, device=grad.spec.device)
    with torch.no_grad():
        slopes = e.constant(eq.op(ones, *args, **kwargs).detach())
    out = e.emit(aten.mul.Tensor, (ct, slopes), ct.spec)
    if dims:
        shape = [n for i, n in enumerate(ct.spec.shape) if i not in dims]
        out = e.emit(aten.sum.dim_IntList, (out, dims), ct.spec.shaped(*shape))
    return [(grad, fit(e, e.shaped(out, *grad.spec.shape), grad.spec))]


@rule(aten.multi_margin_loss_backward.default, aten.multilabel_margin_loss_backward.default)
def _margin(e: Emitter, eq: Equation, ct: Var) -> Result | None:
    """Scale slopes: the loss is a number for each row, or one for all."""
    if not _linear_in_first(eq):
        return None
    lead = len(eq.args[0].spec.shape)
    return _summed(e, eq, ct, list(range(lead, len(ct.spec.shape))))


@rule(aten._ctc_loss_backward.default, aten._ctc_loss_backward.Tensor)
def _ctc(e: Emitter, eq: Equation, ct: Var) -> Result | None:
    """Scale slopes of shape (time, sequence, class) for each sequence.

    Graves et al., ICML 2006, equation 16. PyTorch gives the gradient with respect to what
    `log_softmax` is applied to, and so does this: it is right for normalized `log_probs`.
    """
    alone = len(ct.spec.shape) == 2  # one sequence, without a dimension for it
    shapes = ((), (1,)) if alone else (ct.spec.shape[1:2],)
    if not _linear_in_first(eq) or eq.args[0].spec.shape not in shapes:
        return None
    return _summed(e, eq, ct, [0, 1] if alone else [0, 2])


# -- bags of embeddings -----------------------------------------------------------------------


def _bags(named: dict[str, Any]) -> torch.Tensor:
    """Return the bag of each index; the forward kernel may have left that out."""
    known: torch.Tensor = named["offset2bag"]
    indices = named["indices"]
    if known.numel() or not indices.numel():
        return known
    offsets = named["offsets"]
    places = torch.arange(indices.numel(), device=indices.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets, places, right=True) - 1


@rule(aten._embedding_bag_backward.default, aten._embedding_bag_dense_backward.default)
def _embedding_bag(e: Emitter, eq: Equation, ct: Var) -> Result | None:
    """Sum rows of the weight, each times a factor, or pick the largest of each column.

    `torch.nn.EmbeddingBag`. With `scale_grad_by_freq` the kernel gives something else than a
    derivative (and on the CPU its counts belong to other indices): that is left out.
    """
    if not _linear_in_first(eq):
        return None
    grad, named = eq.args[0], _named(eq.op, *_read(e, eq))
    if named.get("sparse") or named["scale_grad_by_freq"]:
        return None
    indices, size = named["indices"].long(), named["bag_size"]
    if named["mode"] == 2:
        place = named["maximum_indices"].long().clamp(min=0)
        rows = e.emit(aten.gather.default, (ct, 0, e.constant(place)), grad.spec)
        filled = (size > 0).to(grad.spec.dtype)[:, None]
        return [(grad, e.emit(aten.mul.Tensor, (rows, e.constant(filled)), grad.spec))]
    bags = _bags(named).long()
    factor = (indices != named["padding_idx"]).to(grad.spec.dtype)
    if named["per_sample_weights"] is not None:
        factor = factor * named["per_sample_weights"].detach()
    if named["mode"] == 1:
        factor = factor / size.clamp(min=1)[bags]
    spec = ct.spec.shaped(indices.numel(), *ct.spec.shape[1:])
    rows = e.emit(aten.index_select.default, (ct, 0, e.constant(indices)), spec)
    rows = e.emit(aten.mul.Tensor, (rows, e.constant(factor[:, None])), spec)
    args = (zeros(grad.spec), 0, e.constant(bags), rows)
    return [(grad, e.emit(aten.index_add.default, args, grad.spec))]


@rule(aten._embedding_bag_per_sample_weights_backward.default)
def _per_sample_weights(e: Emitter, eq: Equation, ct: Var) -> Result | None:
    """Sum rows of the weight times tangents: a bag receives the row of each of its indices."""
    if not _linear_in_first(eq):
        return None
    grad, named = eq.args[0], _named(eq.op, *_read(e, eq))
    indices = named["indices"].long()
    rows = named["weight"].detach().index_select(0, indices)
    rows = rows * (indices != named["padding_idx"])[:, None]
    out = e.shaped(ct, indices.numel(), 1)
    out = e.emit(aten.mul.Tensor, (out, e.constant(rows)), ct.spec.shaped(*rows.shape))
    args = (zeros(grad.spec), 0, e.constant(_bags(named).long()), out)
    return [(grad, e.emit(aten.index_add.default, args, grad.spec))]


# -- distances, and normalized weights --------------------------------------------------------

for _kernel, _formula in {
    aten._cdist_backward.default: cdist_tangent,
    aten._pdist_backward.default: pdist_tangent,
    aten._weight_norm_interface_backward.default: weight_norm_tangent,
}.items():
    rule_of_several(_kernel)(functools.partial(_turned, formula=_formula))


# -- attention --------------------------------------------------------------------------------


@rule_of_several(
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
    aten._scaled_dot_product_flash_attention_backward.default,
    aten._scaled_dot_product_efficient_attention_backward.default,
    aten._scaled_dot_product_cudnn_attention_backward.default,
)
def _attention(e: Emitter, eq: Equation, cts: Cotangents) -> Result | None:
    """Differentiate softmax(q kᵀ) v along tangents of q, k, v and of the bias.

    With P = softmax(S), dP = P ∘ (dS - rowsum(P ∘ dS)) and dO = dP v + P dv, for blocks of
    queries, so that P as a whole is never there: Dao et al., FlashAttention (2022), appendix B.
    """
    named = _named(eq.op, *_read(e, eq))
    if named["dropout_p"] or any(
        isinstance(named.get(k), torch.Tensor) and named[k].numel()
        for k in ("cum_seq_q", "cum_seq_k")
    ):
        return None
    return _turned(e, eq, cts, attention_tangent)
