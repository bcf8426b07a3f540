"""Many vectors at once: programs of their own, from the second stack of one size on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import linearize as lz
from tests.support.functions import randn

D, C = torch.float64, torch.complex128
K = 3


INDEX = torch.tensor([1, 1, 3, 4, 1, 6, 0])
CASES: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "pointwise, broadcast": (lambda x, y: (x * y).tanh() * y + x.sum(), (randn(3, 1), randn(4))),
    "a number": (lambda x: x.sin() * randn(3), (randn(),)),
    "matrices from both sides": (
        lambda x: (randn(5, 3) @ x.sin() @ randn(4, 2)).T.reshape(-1),
        (randn(3, 4),),
    ),
    "a column": (lambda x: randn(5, 3) @ x.sin(), (randn(3, 1),)),
    "a vector": (lambda x: randn(5, 3) @ x.sin() + randn(5, 3).T.sin().T @ x, (randn(3),)),
    "matrix and vector": (lambda x: x.sin() @ randn(4), (randn(3, 4),)),
    "layers": (
        lambda x, w, b: F.linear(F.linear(x, w, b).tanh(), w.T, None),
        (randn(6, 3), randn(4, 3), randn(4)),
    ),
    "batches of matrices": (
        lambda x, y: torch.bmm(torch.bmm(x, y).sin(), y.mT),
        (randn(2, 3, 4), randn(2, 4, 5)),
    ),
    "batches of thin matrices": (
        lambda x: torch.bmm(randn(6, 3, 2), torch.bmm(randn(6, 2, 4), x).sin()),
        (randn(6, 4, 2),),
    ),
    "batches of empty matrices": (
        lambda x: torch.bmm(randn(6, 3, 0), torch.bmm(randn(6, 0, 4), x)),
        (randn(6, 4, 2),),
    ),
    "attention": (
        lambda q, k: (q @ k.mT * 0.5).softmax(-1) @ q,
        (randn(2, 5, 3), randn(2, 5, 3, seed=1)),
    ),
    "log-softmax": (lambda x: x.log_softmax(0), (randn(4, 3),)),
    "norms": (lambda x, w: F.layer_norm(x.sin(), (4,), w), (randn(3, 4), randn(4))),
    "norms with all parameters": (
        lambda x, w, b: F.layer_norm(x.sin(), (3, 4), w, b),
        (randn(2, 3, 4), randn(3, 4), randn(3, 4, seed=1)),
    ),
    "norms of one row": (
        lambda x, w, b: F.layer_norm(x.sin(), (4,), w, b).tanh(),
        (randn(4), randn(4, seed=1), randn(4, seed=2)),
    ),
    "norms of values out of order": (
        lambda x, w: F.layer_norm(x.sin().mT.mT @ randn(4, 4), (4,), w).mT,
        (randn(2, 3, 4), randn(4)),
    ),
    "large norms": (lambda x: F.layer_norm(x, (64,)) * randn(64), (randn(200, 64),)),
    "many columns": (
        lambda w, x: randn(3, 5) @ (randn(5, 4) @ w + x),
        (randn(4, 20), randn(5, 20)),
    ),
    "few columns of large matrices": (
        lambda x: randn(3, 40) @ (randn(40, 60) @ x).sin(),
        (randn(60, 5),),
    ),
    "convolution": (lambda x: F.conv2d(x.sin(), randn(3, 2, 3, 3)), (randn(2, 2, 5, 5),)),
    "convolution by its weight": (lambda w: F.conv1d(randn(2, 2, 7), w), (randn(3, 2, 3),)),
    "stencil": (lambda x: x * x.roll(1) + x.flip(0) + x.roll(-2, 0), (randn(7),)),
    "stencil over all dimensions": (lambda x: x.sin().roll(2), (randn(3, 4),)),
    "parts": (
        lambda x: torch.stack([x[1, 1:], x[0, :-1] * 2, torch.cat([x[2, :1], x[2, 2:]])], 1),
        (randn(3, 4),),
    ),
    "permutations": (
        lambda x: x.permute(2, 0, 1).sin().mT.reshape(4, 6)[:, ::2],
        (randn(3, 2, 4),),
    ),
    "sums": (
        lambda x: (x.sum(0), x.mean((0, -1), keepdim=True), x.sum(), x.mean()),
        (randn(3, 2, 4),),
    ),
    "sizes of one": (lambda x: (x.squeeze(1) * 2, x.unsqueeze(0).squeeze()), (randn(3, 1, 4),)),
    "expanded": (lambda x: x.expand(4, 3).sin() * randn(4, 3), (randn(3),)),
    "taken by positions": (lambda x: x.sin()[INDEX] * randn(7, 2), (randn(7, 2),)),
    "put to positions": (
        lambda x: torch.zeros(7, 2, dtype=D).index_add(0, INDEX, x.sin()),
        (randn(7, 2),),
    ),
    "positions apart": (lambda x: x[[0, 1], :, [1, 0]].sin(), (randn(3, 2, 4),)),
    "cross products": (lambda x: torch.linalg.cross(x, x.sin()), (randn(5, 3),)),
    "solve": (
        lambda x, b: torch.linalg.solve(x + 3 * torch.eye(4, dtype=D), b),
        (randn(4, 4), randn(4)),
    ),
    "diagonal": (lambda x: torch.linalg.solve(torch.diag(x.exp()) + 0.1, randn(4)), (randn(4),)),
    "another dtype": (lambda x: (x.float() * 3).double() * x, (randn(4),)),
    "complex": (lambda z: z.conj() * z.sin() + z.real, (randn(4, dtype=C),)),
    "nothing shared": (lambda x: (x[:0].sin(), x * 0), (randn(4),)),
    "maxima": (lambda x: F.max_pool1d(x[None], 2)[0].cumsum(-1), (randn(2, 6),)),
}
#: Operations that no rule takes, which `torch.vmap` maps.
MAPPED = {
    "large norms": {"native_layer_norm_backward"},
    "convolution by its weight": {"convolution_backward", "convolution"},
    "maxima": None,
    "positions apart": None,
    "put to positions": {"index_select"},
    "log-softmax": {"_log_softmax_backward_data"},
}


def like(tree: Any, seed: int) -> Any:
    return torch.utils._pytree.tree_map(
        lambda t: randn(K, *t.shape, dtype=t.dtype, seed=seed), tree
    )


def programs(product: Any) -> list[Any]:
    (plan,) = product._plans.values()
    return [known[0].program for known in plan._stacked.values() if known is not None]


@pytest.mark.parametrize("name", CASES)
def test_stacks_are_the_single_products(name: str) -> None:
    f, primals = CASES[name]
    here = lz.Linearizer(f).at(*primals)
    single = lz.Linearizer(f, simplify=False).at(*primals)
    leaves = torch.utils._pytree.tree_leaves
    for call in range(4):
        v, u = like(primals, call), like(here.value, 10 + call)
        got = leaves(here.jvp_fn.batched(*v)) + leaves(here.vjp_fn.batched(u))
        rows = [
            leaves(single.jvp_fn(*(t[k] for t in v)))
            + leaves(single.vjp_fn(torch.utils._pytree.tree_map(lambda t, k=k: t[k], u)))
            for k in range(K)
        ]
        for g, *expected in zip(got, *rows, strict=True):
            rtol = 1e-5 if name == "another dtype" else 1e-10
            torch.testing.assert_close(g, torch.stack(expected), rtol=rtol, atol=rtol)
    for product in (here.jvp_fn, here.vjp_fn):
        (program,) = programs(product)
        mapped = {str(eq.op) for eq in program.equations if "each" in str(eq.op)}
        allowed = MAPPED.get(name, set())
        assert allowed is None or all(any(a in m for a in allowed) for m in mapped), mapped


def test_a_stack_program_is_exchanged_for_a_smaller_one() -> None:
    x = randn(6)

    def f(x: torch.Tensor) -> torch.Tensor:
        for _ in range(20):
            x = x.sin() * 1.1
        return x

    here = lz.Linearizer(f).at(x)
    v = randn(K, 6)
    for _ in range(3):
        out = here.jvp_fn.batched(v)
    (program,) = programs(here.jvp_fn)
    assert len(program.equations) == 1
    torch.testing.assert_close(out, torch.stack([here.jvp_fn(row) for row in v]))


def test_stacks_of_few_sizes_are_remembered() -> None:
    here = lz.Linearizer(lambda x: x.sin() @ randn(3, 2)).at(randn(3))
    for count in range(2, 12):
        for _ in range(3):
            v = randn(count, 3, seed=count)
            expected = (v * randn(3).cos()) @ randn(3, 2)
            torch.testing.assert_close(here.jvp_fn.batched(v), expected)
    assert 0 < len(programs(here.jvp_fn)) <= 4


def test_a_change_is_noticed_by_stacks() -> None:
    w = randn(3, 2)
    here = lz.Linearizer(lambda x: x.sin() @ w).at(randn(3))
    v = randn(4, 3)
    for _ in range(3):
        here.jvp_fn.batched(v)
    w.mul_(2)
    with pytest.raises(lz.errors.StalenessError):
        here.jvp_fn.batched(v)


def test_bytes_of_stack_programs_are_counted() -> None:
    here = lz.Linearizer(lambda x: x.sin().cos()).at(randn(1000))
    for _ in range(4):
        here.jvp_fn.batched(randn(4, 1000))
    assert here.nbytes >= 8000


def test_a_differentiable_stack() -> None:
    w = randn(3, 2)
    here = lz.Linearizer(lambda x: x.sin() @ w).at(randn(3))
    for _ in range(3):
        v = randn(4, 3).requires_grad_()
        here.jvp_fn.batched(v).square().sum().backward()
        j = (randn(3).cos()[:, None] * w).T
        assert v.grad is not None
        torch.testing.assert_close(v.grad, 2 * v.detach() @ j.T @ j)


class Counted(torch.autograd.Function):
    """Says that it takes batches."""

    generate_vmap_rule = True
    calls: list[str]

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, u: torch.Tensor) -> torch.Tensor:
        Counted.calls.append("backward")
        (x,) = ctx.saved_tensors
        return u * x.cos()

    @staticmethod
    def jvp(ctx: Any, v: torch.Tensor) -> torch.Tensor:
        Counted.calls.append("jvp")
        (x,) = ctx.saved_tensors
        return v * x.cos()


def test_functions_that_take_batches_are_called_once_for_all() -> None:
    Counted.calls = []
    here = lz.Linearizer(lambda x: randn(4, 3) @ Counted.apply(x)).at(randn(3))
    v, u = randn(5, 3), randn(5, 4)
    j = randn(4, 3) * randn(3).cos()
    for _ in range(3):
        Counted.calls.clear()
        torch.testing.assert_close(here.jvp_fn.batched(v), v @ j.T)
        torch.testing.assert_close(here.vjp_fn.batched(u)[0], u @ j)
        assert Counted.calls == ["jvp", "backward"]


def test_functions_that_say_so_wrongly_are_called_for_each() -> None:
    class Reads(Counted):
        @staticmethod
        def jvp(ctx: Any, v: torch.Tensor) -> torch.Tensor:
            (x,) = ctx.saved_tensors
            return x.cos() * torch.tensor([t.item() for t in v], dtype=D)

    here = lz.Linearizer(lambda x: randn(4, 3) @ Reads.apply(x)).at(randn(3))
    v = randn(5, 3)
    for _ in range(3):
        torch.testing.assert_close(here.jvp_fn.batched(v), v @ (randn(4, 3) * randn(3).cos()).T)
