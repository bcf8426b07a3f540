"""What is known of ATen operations: schemas, zeros, linearity.

An operation is recorded only if it is linear in its variable arguments jointly. For most
operations of PyTorch's backward formulas that is known here by name; for any other it is
tested on numbers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .._torch.names import OpOverload, aten
from .residuals import leaves, map_leaves

#: Operations whose result does not depend on the numbers in their tensor argument.
CONSTANT = frozenset(
    op
    for packet in (
        "zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones "
        "new_full new_empty new_empty_strided"
    ).split()
    for op in (getattr(aten, packet).default,)
)
UNINITIALIZED = frozenset(
    {
        aten.empty.memory_format,
        aten.empty_like.default,
        aten.empty_strided.default,
        aten.new_empty.default,
        aten.new_empty_strided.default,
    }
)
#: Operations that hand the numbers of a tensor to the host.
READS_NUMBERS = frozenset(
    {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
)

_VIEWS_AND_MOVES = (
    "alias detach clone _to_copy view _unsafe_view _reshape_alias reshape t transpose permute "
    "unsqueeze squeeze expand slice select diagonal as_strided split split_with_sizes unbind "
    "unfold roll flip tril triu slice_backward select_backward diagonal_backward unfold_backward "
    "view_as_real view_as_complex _conj conj_physical _neg_view real imag lift_fresh neg "
    "resolve_conj resolve_neg contiguous _efficientzerotensor movedim narrow squeeze_ "
    "repeat pixel_shuffle pixel_unshuffle rot90 take gather index index_select trace diag "
    "diag_embed sum mean cumsum nansum as_strided_copy fft_fft _fft_c2c _fft_r2c _fft_c2r "
)
_LINEAR_FIRST = frozenset((_VIEWS_AND_MOVES + " embedding_dense_backward").split())
_JOINTLY_LINEAR = frozenset(("add sub cat stack").split())
_BILINEAR = frozenset(("mul mm bmm mv dot vdot").split())
_GRADIENT_FIRST = frozenset(
    (
        "tanh_backward sigmoid_backward silu_backward gelu_backward threshold_backward "
        "softplus_backward hardtanh_backward leaky_relu_backward elu_backward mish_backward "
        "hardswish_backward hardsigmoid_backward logit_backward native_dropout_backward "
        "_softmax_backward_data _log_softmax_backward_data native_layer_norm_backward "
        "native_batch_norm_backward native_group_norm_backward convolution_backward "
        "avg_pool2d_backward max_pool2d_with_indices_backward _adaptive_avg_pool2d_backward "
        "nll_loss_backward mse_loss_backward"
    ).split()
)


#: Backward operations that take gradients of any strides.
_ANY_STRIDES = frozenset(
    (
        "slice_backward select_backward diagonal_backward unfold_backward convolution_backward "
        "native_layer_norm_backward native_batch_norm_backward native_dropout_backward "
        "embedding_dense_backward _scaled_dot_product_flash_attention_for_cpu_backward "
        "_scaled_dot_product_flash_attention_backward "
        "_scaled_dot_product_efficient_attention_backward "
        "_scaled_dot_product_cudnn_attention_backward"
    ).split()
)


@dataclasses.dataclass(frozen=True, slots=True)
class Schema:
    """The parts of an operation's schema that recording needs."""

    name: str
    writes: tuple[tuple[int, str], ...]
    is_view: bool
    pointwise: bool


@functools.cache
def schema_of(op: OpOverload) -> Schema:
    """Return what an operation writes, and of what kind it is."""
    writes = tuple(
        (-1 if a.kwarg_only else i, a.name)
        for i, a in enumerate(op._schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
    )
    name = op._schema.name.partition("::")[2]
    return Schema(name, writes, bool(op.is_view), torch.Tag.pointwise in op.tags)


@functools.cache
def wants_contiguous(op: OpOverload) -> bool:
    """Whether an operation may go wrong, without a word, for gradients that are not contiguous.

    Formulas of PyTorch's gradients call `contiguous` for such kernels, which leaves no trace
    where there is nothing to do: `native_group_norm_backward` on the CPU reads past strides.
    """
    schema = schema_of(op)
    kernel = schema.name.endswith("_backward") and not schema.pointwise
    return op.namespace == "aten" and kernel and schema.name not in _ANY_STRIDES


@functools.cache
def functional_variant(op: OpOverload) -> OpOverload | None:
    """Return the operation that computes the same without writing to its arguments."""
    if op.namespace != "aten":
        return None
    schema = schema_of(op)
    written = {name for _, name in schema.writes}
    out_style = all(position == -1 for position, _ in schema.writes)
    packet = getattr(aten, schema.name if out_style else schema.name.rstrip("_"), None)
    if packet is None:
        return None

    def signature(o: OpOverload, skip: set[str]) -> list[tuple[str, str]]:
        return [(a.name, str(a.type)) for a in o._schema.arguments if a.name not in skip]

    wanted = signature(op, written if out_style else set())
    for overload in packet.overloads():
        candidate = getattr(packet, overload)
        if not schema_of(candidate).writes and signature(candidate, set()) == wanted:
            return candidate  # type: ignore[no-any-return]
    return None


def known_linear(op: OpOverload, variable: Sequence[bool]) -> bool:
    """Whether an operation is known to be linear in its variable arguments.

    Parameters
    ----------
    op
        The operation.
    variable
        For each positional argument, whether it is or contains a variable.
    """
    if op.namespace != "aten":
        return False
    name = schema_of(op).name
    count = sum(variable)
    first_only = count == 1 and variable[0]
    if name in _LINEAR_FIRST or name in _GRADIENT_FIRST:
        return first_only
    if name in _BILINEAR:
        return count == 1
    if name == "div":
        return first_only and op._overloadname in ("Tensor", "Scalar")
    # `add(g, constant)` is affine: only a constant that is zero makes it linear.
    return name in _JOINTLY_LINEAR and count == len(variable) and op._overloadname != "Scalar"


#: Operations that put numbers elsewhere: linear wherever what they put in between is zero.
_PLACE = frozenset(
    (
        "where scatter scatter_add index_put _index_put_impl_ index_put_ masked_fill "
        "constant_pad_nd diagonal_scatter select_scatter slice_scatter as_strided_scatter "
        "index_add index_copy index_fill masked_scatter masked_select put take "
        "masked_fill_ _unsafe_masked_index _unsafe_masked_index_put_accumulate _unsafe_index_put"
    ).split()
)
#: Operations that are linear in the argument at this place, whatever the others are.
_LINEAR_AT = {
    "linalg_solve_triangular": (1,),
    "linalg_lu_solve": (2,),
    "cholesky_solve": (0,),
    "triangular_solve": (0,),
    "_trilinear": (0, 1, 2),
    "convolution": (0, 1),
    "linalg_cross": (0, 1),
}
#: The same for the first argument, by the beginning of the name.
_LINEAR_FIRST_KINDS = (
    "upsample_",
    "_upsample_",
    "reflection_pad",
    "replication_pad",
    "avg_pool",
    "_adaptive_avg_pool",
    "grid_sampler",
    "im2col",
    "col2im",
)


def linear_by_meaning(
    op: OpOverload, variable: Sequence[bool], others_static: Callable[[], bool]
) -> bool:
    """Whether an operation that tested linear is so for all numbers in its other arguments.

    Parameters
    ----------
    op
        The operation.
    variable
        For each positional argument, whether it is or contains a variable.
    others_static
        Tells whether the other floating point arguments are the same at every point.
    """
    if op.namespace != "aten":
        return False
    name = schema_of(op).name
    if name.endswith("_backward") and not name.endswith("_backward_backward"):
        # The derivative of something, applied to the gradient that comes first.
        first = op._schema.arguments[0].name
        return first.startswith("grad") and variable[0] and sum(variable) == 1
    if name in _LINEAR_AT:
        return sum(variable) == 1 and any(variable[i] for i in _LINEAR_AT[name])
    if name.startswith(_LINEAR_FIRST_KINDS):
        return variable[0] and sum(variable) == 1
    return name in _PLACE and others_static()


_TOLERANCE = {
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
    torch.float32: 1e-3,
    torch.complex64: 1e-3,
    torch.complex32: 2e-2,
}


def tolerance(dtype: torch.dtype) -> float:
    """Return the relative error within which two results of this dtype count as equal."""
    return _TOLERANCE.get(dtype, 1e-8)


def rounding(dtype: torch.dtype) -> float:
    """Return the relative error that rounding in another order may well amount to.

    Less than `tolerance` in single precision: there, digits that a simplified program loses by
    cancellation are missed.
    """
    return min(tolerance(dtype), max(200 * torch.finfo(dtype).eps, 1e-9))


def close(
    a: torch.Tensor, b: torch.Tensor, within: Callable[[torch.dtype], float] = tolerance
) -> bool:
    """Whether two tensors agree within the tolerance of their dtype, relative to the largest.

    Numbers that are not finite must stand at the same places.
    """
    if a.shape != b.shape or a.numel() == 0:
        return a.shape == b.shape
    limit = max(within(a.dtype), within(b.dtype))
    same, off, large = [], [], []
    for x, y in zip(_pieces(a.detach()), _pieces(b.detach()), strict=True):
        wide = torch.complex128 if x.is_complex() or y.is_complex() else torch.float64
        x, y = x.to(wide), y.to(wide)
        finite = torch.isfinite(x)
        same.append((finite == torch.isfinite(y)).all())
        x, y = torch.where(finite, x, 0), torch.where(finite, y, 0)
        off.append((x - y).abs().max())
        large.append(torch.stack([x.abs().max(), y.abs().max()]))
    if not torch.stack(same).all():
        return False
    return bool(torch.stack(off).max() <= limit * torch.stack(large).amax(0).sum() + 1e-300)


#: How many numbers are compared at once: the comparison takes several times their memory.
_AT_ONCE = 1 << 20


def _pieces(t: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return parts of a tensor, none of them much larger than what is compared at once."""
    if t.numel() <= _AT_ONCE:
        return (t,)
    dim = max(range(t.dim()), key=t.shape.__getitem__)
    pieces: Sequence[torch.Tensor] = torch.split(
        t, max(1, t.shape[dim] * _AT_ONCE // t.numel()), dim
    )
    return pieces


def tested_linear(
    op: Callable[..., Any], args: Any, kwargs: Any, is_variable: Callable[[Any], bool]
) -> list[bool] | None:
    """Test on random numbers whether an operation is linear in its variable arguments.

    Returns
    -------
    list of bool, or None
        For each output that is a tensor: True if it is linear, False if it does not depend on
        the variables at all. None if one is neither.
    """

    def at(alpha: float, beta: float) -> list[torch.Tensor]:
        def combine(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            if not is_variable(x):
                return x.clone()
            # Any second direction will do, if it is the same at each call.
            count = max(x.numel(), 1)
            ramp = torch.arange(count, device=x.device, dtype=torch.float32).mul_(1.7).cos_()
            return alpha * x + beta * ramp[: x.numel()].reshape(x.shape).to(x.dtype)

        result = op(*map_leaves(combine, args), **map_leaves(combine, kwargs))
        return [t for t in leaves(result) if isinstance(t, torch.Tensor)]

    both, first, second, twice = at(1.0, 1.0), at(1.0, 0.0), at(0.0, 1.0), at(2.0, 0.0)
    linear = []
    for b, x, y, t in zip(both, first, second, twice, strict=True):
        if not (x.is_floating_point() or x.is_complex()) or (
            bool(x[torch.isfinite(x)].any()) and close(b, x) and close(y, x) and close(t, x)
        ):
            linear.append(False)
        elif close(b, x + y) and close(t, 2 * x):
            linear.append(True)
        else:
            return None
    return linear


_COPYING = {aten.clone.default, aten._to_copy.default}


def may_alias(op: Callable[..., Any]) -> bool:
    """Whether an operation's result may share memory with its argument."""
    return not isinstance(op, OpOverload) or _may_alias(op)


@functools.cache  # of PyTorch's own operations: others go with their point
def _may_alias(op: OpOverload) -> bool:
    if op in _COPYING:
        return False
    if schema_of(op).is_view:
        return True
    aliases = any(r.alias_info is not None for r in op._schema.returns)
    # Composite operations (`reshape`) return a view where they can, without saying so.
    return aliases or op.name() in _MAYBE_VIEW


_MAYBE_VIEW = frozenset(
    {
        "aten::reshape",
        "aten::resolve_conj",
        "aten::resolve_neg",
        "aten::contiguous",
        "aten::_unsafe_view",
        "aten::lift_fresh",
        "aten::_reshape_alias",
    }
)


def returns_several(op: Callable[..., Any]) -> bool:
    """Whether an operation returns a tuple or list, be it of one tensor."""
    return not isinstance(op, OpOverload) or _returns_several(op)


@functools.cache
def _returns_several(op: OpOverload) -> bool:
    returns = op._schema.returns
    return len(returns) != 1 or str(returns[0].type) == "List[Tensor]"
