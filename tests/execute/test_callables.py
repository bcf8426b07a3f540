"""The quick ways to call an operation lead to that operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from linearize._execute.quickest import _QUICK, quickest
from linearize._torch.names import aten


class Seen(TorchDispatchMode):
    """Notes the operations that PyTorch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def a(*shape: int) -> torch.Tensor:
    return torch.rand(shape or (4, 4), dtype=torch.float64) + 0.5


PLACES = torch.tensor([[0, 1], [1, 0]])
ARGUMENTS: dict[str, list[tuple[Callable[[], tuple[Any, ...]], dict[str, Any]]]] = {
    "add.Tensor": [(lambda: (a(), a()), {}), (lambda: (a(), a()), {"alpha": 2})],
    "add_.Tensor": [(lambda: (a(), a()), {}), (lambda: (a(), a()), {"alpha": 2})],
    "addcmul.default": [(lambda: (a(), a(), a()), {}), (lambda: (a(), a(), a()), {"value": 3})],
    "addcmul_.default": [(lambda: (a(), a(), a()), {}), (lambda: (a(), a(), a()), {"value": 3})],
    "addmm.default": [(lambda: (a(), a(), a()), {}), (lambda: (a(), a(), a()), {"beta": 2})],
    "addmm_.default": [(lambda: (a(), a(), a()), {"alpha": 2})],
    "baddbmm.default": [(lambda: (a(2, 3, 3),) * 3, {"beta": 2, "alpha": 3})],
    "baddbmm_.default": [(lambda: (a(2, 3, 3), a(2, 3, 3), a(2, 3, 3)), {"beta": 2})],
    "bmm.default": [(lambda: (a(2, 3, 3), a(2, 3, 3)), {})],
    "cat.default": [(lambda: ([a(), a()], 1), {}), (lambda: ([a(), a()],), {})],
    "clone.default": [
        (lambda: (a(),), {}),
        (lambda: (a().t(),), {"memory_format": torch.contiguous_format}),
    ],
    "convolution.default": [
        (
            lambda: (a(1, 2, 5, 5), a(3, 2, 3, 3), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1),
            {},
        )
    ],
    "conj_physical.default": [(lambda: (a() * 1j,), {})],
    "cos.default": [(lambda: (a(),), {})],
    "div.Scalar": [(lambda: (a(), 2.0), {})],
    "div.Tensor": [(lambda: (a(), a()), {})],
    "div_.Scalar": [(lambda: (a(), 2.0), {})],
    "div_.Tensor": [(lambda: (a(), a()), {})],
    "dot.default": [(lambda: (a(4), a(4)), {})],
    "exp.default": [(lambda: (a(),), {})],
    "expand.default": [(lambda: (a(1, 4), [3, 4]), {}), (lambda: (a(4), (3, -1)), {})],
    "flip.default": [(lambda: (a(), [1]), {})],
    "gather.default": [(lambda: (a(2, 2), 0, PLACES), {})],
    "index_add.default": [(lambda: (a(), 0, torch.tensor([1, 1]), a(2, 4)), {})],
    "index_select.default": [(lambda: (a(), 1, torch.tensor([1, 1])), {})],
    "matmul.default": [(lambda: (a(2, 3, 4), a(4, 3)), {})],
    "mean.dim": [(lambda: (a(), [0], True), {}), (lambda: (a(), None), {})],
    "mm.default": [(lambda: (a(), a()), {})],
    "mul.Scalar": [(lambda: (a(), 2.0), {}), (lambda: (a(), 3), {})],
    "mul.Tensor": [(lambda: (a(), a()), {}), (lambda: (a(), a(4)), {})],
    "mul_.Scalar": [(lambda: (a(), 2.0), {})],
    "mul_.Tensor": [(lambda: (a(), a()), {})],
    "mv.default": [(lambda: (a(), a(4)), {})],
    "neg.default": [(lambda: (a(),), {})],
    "neg_.default": [(lambda: (a(),), {})],
    "permute.default": [(lambda: (a(2, 3, 4), [2, 0, 1]), {})],
    "reciprocal.default": [(lambda: (a(),), {})],
    "reshape.default": [(lambda: (a(), [2, 8]), {}), (lambda: (a(), (-1,)), {})],
    "roll.default": [(lambda: (a(), [1], [0]), {}), (lambda: (a(), [3]), {})],
    "scatter_add.default": [(lambda: (a(2, 2), 0, PLACES, a(2, 2)), {})],
    "select.int": [(lambda: (a(), 0, 1), {})],
    "sin.default": [(lambda: (a(),), {})],
    "squeeze.dim": [(lambda: (a(1, 4), 0), {})],
    "squeeze.dims": [(lambda: (a(1, 4, 1), [0, 2]), {})],
    "stack.default": [(lambda: ([a(), a()], 1), {})],
    "sub.Tensor": [(lambda: (a(), a()), {"alpha": 2})],
    "sub_.Tensor": [(lambda: (a(), a()), {})],
    "sum.default": [(lambda: (a(),), {}), (lambda: (a(),), {"dtype": torch.float32})],
    "sum.dim_IntList": [
        (lambda: (a(), [0]), {}),
        (lambda: (a(), [0, 1], True), {}),
        (lambda: (a(), None), {"dtype": torch.float32}),
        (lambda: (a(), []), {}),
    ],
    "t.default": [(lambda: (a(),), {})],
    "transpose.int": [(lambda: (a(), 0, 1), {})],
    "unbind.int": [(lambda: (a(), 1), {})],
    "unsqueeze.default": [(lambda: (a(), -1), {})],
    "where.self": [(lambda: (a() > 1, a(), a()), {})],
    "view.default": [(lambda: (a(), [2, 8]), {}), (lambda: (a(), (16,)), {})],
}


def name(op: Any) -> str:
    return str(op).removeprefix("aten.")


def test_every_quick_way_is_tried() -> None:
    assert {name(op) for op in _QUICK} == set(ARGUMENTS)


@pytest.mark.parametrize("op", _QUICK, ids=name)
def test_the_quick_way_leads_to_the_same_operation(op: Any) -> None:
    for make, kwargs in ARGUMENTS[name(op)]:
        args = make()
        torch.manual_seed(0)
        again = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
        with Seen() as direct:
            expected = op(*args, **kwargs)
        with Seen() as quick:
            found = quickest(op)(*again, **kwargs)
        assert [call[0].overloadpacket for call in quick.calls] == [
            call[0].overloadpacket for call in direct.calls
        ]
        several = isinstance(expected, (tuple, list))
        for x, y in zip(*((found, expected) if several else ([found], [expected])), strict=True):
            assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())
            assert torch.equal(x, y)


def test_operations_without_a_quick_way_are_called_as_they_are() -> None:
    x = a()
    torch.testing.assert_close(quickest(aten.tanh_backward.default)(x, x), x * (1 - x * x))
    assert quickest(abs) is abs
