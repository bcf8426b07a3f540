"""The quickest way to call an operation.

An `OpOverload` turns its arguments into boxed values; the functions of `torch` and the methods
of `torch.Tensor` that lead to the same operation do not, which saves half of a microsecond to
one at each call. They take the same arguments in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .._torch.names import aten, bare, native_function, native_method

#: By name, and fetched from where PyTorch keeps them: what stands in `torch` itself other packages
#: replace by functions of their own.
_FUNCTIONS = {
    "add": "Tensor",
    "addcmul": "default",
    "addmm": "default",
    "baddbmm": "default",
    "bmm": "default",
    "cat": "default",
    "clone": "default",
    "conj_physical": "default",
    "convolution": "default",
    "cos": "default",
    "div": "Tensor Scalar",
    "dot": "default",
    "exp": "default",
    "flip": "default",
    "gather": "default",
    "index_add": "default",
    "index_select": "default",
    "matmul": "default",
    "mean": "dim",
    "mm": "default",
    "mul": "Tensor Scalar",
    "mv": "default",
    "neg": "default",
    "permute": "default",
    "reciprocal": "default",
    "reshape": "default",
    "roll": "default",
    "scatter_add": "default",
    "select": "int",
    "sin": "default",
    "squeeze": "dim dims",
    "stack": "default",
    "sub": "Tensor",
    "sum": "default dim_IntList",
    "t": "default",
    "transpose": "int",
    "unbind": "int",
    "unsqueeze": "default",
    "where": "self",
}
_METHODS = {
    "add_": "Tensor",
    "addcmul_": "default",
    "addmm_": "default",
    "baddbmm_": "default",
    "div_": "Tensor Scalar",
    "expand": "default",
    "mul_": "Tensor Scalar",
    "neg_": "default",
    "sub_": "Tensor",
    "view": "default",
}
_QUICK: dict[Any, Callable[..., Any]] = {
    getattr(getattr(aten, name), overload): fetch(name)
    for fetch, table in ((native_function, _FUNCTIONS), (native_method, _METHODS))
    for name, overloads in table.items()
    for overload in overloads.split()
}


def quickest(op: Any) -> Any:
    """Return what runs an operation with the least to do around it."""
    return _QUICK.get(op) or bare(op)
