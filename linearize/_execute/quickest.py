"""The quickest way to call an operation.

An `OpOverload` turns its arguments into boxed values; the functions of `torch` and the methods
of `torch.Tensor` that lead to the same operation do not, which saves half of a microsecond to
one at each call. They take the same arguments in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .._programs.aten import operations, schema_of
from .._torch.names import bare, native_function, native_method

#: Fetched from where PyTorch keeps them: what stands in `torch` itself other packages replace by
#: functions of their own.
_FUNCTIONS = operations(
    "add.Tensor addcmul addmm baddbmm bmm cat clone conj_physical convolution cos div.Tensor "
    "div.Scalar dot exp flip gather index_add index_select matmul mean.dim mm mul.Tensor "
    "mul.Scalar mv neg permute reciprocal reshape roll scatter_add select.int sin squeeze.dim "
    "squeeze.dims stack sub.Tensor sum sum.dim_IntList t transpose.int unbind.int unsqueeze "
    "where.self"
)
_METHODS = operations(
    "add_.Tensor addcmul_ addmm_ baddbmm_ div_.Tensor div_.Scalar expand mul_.Tensor mul_.Scalar "
    "neg_ sub_.Tensor view"
)
_QUICK: dict[Any, Callable[..., Any]] = {
    op: fetch(schema_of(op).name)
    for fetch, ops in ((native_function, _FUNCTIONS), (native_method, _METHODS))
    for op in ops
}


def quickest(op: Any) -> Any:
    """Return what runs an operation with the least to do around it."""
    return _QUICK.get(op) or bare(op)
