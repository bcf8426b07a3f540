"""Whether operations are linear in their variable arguments jointly: only those are recorded.

For most operations of PyTorch's backward formulas that is known here by name; for any other it
is tested on numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .._programs.aten import schema_of
from .._spaces.compare import close, close_at, magnitudes
from .._spaces.nested import leaves, map_leaves
from .._torch.names import OpOverload

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


def tested_linear(
    op: Callable[..., Any], args: Any, kwargs: Any, is_variable: Callable[[Any], bool]
) -> list[bool] | None:
    """Test on random numbers whether an operation is linear in its variable arguments.

    At several magnitudes: what clips, rounds or saturates is linear at one.

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

    both, first, second, twice = at(1.0, 1.0), at(1.0, 0.0), at(0.0, 1.0), at(-2.0, 0.0)
    linear = []
    for b, x, y, t in zip(both, first, second, twice, strict=True):
        if not (x.is_floating_point() or x.is_complex()) or (
            bool(x[torch.isfinite(x)].any()) and close(b, x) and close(y, x) and close(t, x)
        ):
            linear.append(False)
        elif close(b, x + y) and close(t, -2 * x):
            linear.append(True)
        else:
            return None
    dtypes = {x.dtype for x in leaves((args, kwargs)) if is_variable(x)}
    for factor in magnitudes(_narrowest(dtypes)):
        for x, y, same in zip(first, at(factor, 0.0), linear, strict=True):
            number = x.is_floating_point() or x.is_complex()
            if number and not close_at(factor, y, factor * x if same else x):
                return None
    return linear


def _narrowest(dtypes: set[torch.dtype]) -> torch.dtype:
    """Return the dtype of the smallest range."""
    return min(dtypes, key=lambda d: torch.finfo(d).max)
