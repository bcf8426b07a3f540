"""The table that compares this package with other tools: every cell on PyTorch, tried.

A cell that is not true any more fails here.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import Function
from torch.autograd import functional as af

import linearize as lz
import linearize.func

ROOT = Path(__file__).parents[2]
NAMES = ["torch.func.jvp", "torch.func.linearize", "torch.func.vjp", "double backward"]
VERSION = "2.13"
pytestmark = [
    pytest.mark.skipif(
        not torch.__version__.startswith(VERSION), reason=f"the table is about PyTorch {VERSION}"
    ),
    # torch.func.linearize folds constants with a warning of its own.
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node"),
]


def table() -> dict[str, list[str]]:
    """Return the comparison's cells by the first of each row."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = text.partition("<!-- begin comparison -->")[2].splitlines()
    rows = [line.strip("|").split("|") for line in lines if line.startswith("|")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


# -- the same product by each tool ---------------------------------------------------------------


def by_jvp(f: Callable[..., Any], x: torch.Tensor, v: torch.Tensor, u: torch.Tensor) -> Any:
    return torch.func.jvp(f, (x,), (v,))[1], None


def by_linearize(f: Callable[..., Any], x: torch.Tensor, v: torch.Tensor, u: torch.Tensor) -> Any:
    return torch.func.linearize(f, x)[1](v), None


def by_vjp(f: Callable[..., Any], x: torch.Tensor, v: torch.Tensor, u: torch.Tensor) -> Any:
    return None, torch.func.vjp(f, x)[1](u)[0]


def by_two_backwards(
    f: Callable[..., Any], x: torch.Tensor, v: torch.Tensor, u: torch.Tensor
) -> Any:
    q = x.detach().requires_grad_()
    y = f(q)
    w = torch.zeros_like(y, requires_grad=True)
    (g,) = torch.autograd.grad(y, q, w, create_graph=True)
    back = torch.autograd.grad(y, q, u, retain_graph=True)[0]
    return torch.autograd.grad(g, w, v)[0], back


def ours(f: Callable[..., Any], x: torch.Tensor, v: torch.Tensor, u: torch.Tensor) -> Any:
    here = lz.Linearizer(f).at(x)
    for _ in range(4):
        jv, uj = here.jvp_fn(v), here.vjp_fn(u)[0]
    return jv, uj


TOOLS = dict(zip(NAMES, (by_jvp, by_linearize, by_vjp, by_two_backwards), strict=True))


# -- what is linearized: x³ in several manners, elementwise ---------------------------------------


class OldStyle(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x**3

    @staticmethod
    def jvp(ctx: Any, v: torch.Tensor) -> torch.Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * v

    backward = jvp


class NewStyle(Function):
    """With `setup_context`, and a backward only."""

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, u: torch.Tensor) -> torch.Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * u


def numbers(t: torch.Tensor) -> Any:
    return t.detach().numpy(force=True)


class OverNumPy(Function):
    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(numbers(x) ** 3)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def jvp(ctx: Any, v: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(3 * numbers(ctx.saved_tensors[0]) ** 2 * numbers(v))

    backward = jvp


class OldOverNumPy(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.slope = 3 * numbers(x) ** 2
        return torch.from_numpy(numbers(x) ** 3)

    @staticmethod
    def jvp(ctx: Any, v: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(ctx.slope * numbers(v))

    backward = jvp


@torch.library.custom_op("claims::cube", mutates_args=())
def library_op(x: torch.Tensor) -> torch.Tensor:
    return x**3


library_op.register_autograd(
    lambda ctx, u: 3 * ctx.x**2 * u,
    setup_context=lambda ctx, inputs, output: setattr(ctx, "x", inputs[0]),
)
library_op.register_fake(torch.empty_like)


def branching(x: torch.Tensor) -> torch.Tensor:
    return x**3 if x.sum().item() > 0 else x


ROWS: dict[str, list[Callable[..., Any]]] = {
    "branches on numbers, `.item()` in f": [branching],
    "Function, old style": [OldStyle.apply],
    "Function, only `backward`, in torch": [NewStyle.apply],
    "Function over NumPy": [OverNumPy.apply, OldOverNumPy.apply],
    "custom op, `register_autograd`": [library_op],
}


def outcome(tool: Callable[..., Any], f: Callable[..., Any]) -> str:
    """Say in the words of the table what comes of a tool."""
    x = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    v, u = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([0.3, 1.0, -1.0]).double()
    try:
        jv, uj = tool(f, x, v, u)
    except Exception:
        return "error"
    right_u = uj is None or torch.allclose(uj, 3 * x**2 * u)
    if jv is None:
        return "Jᵀ·u" if right_u else "wrong numbers"
    if torch.allclose(jv, 3 * x**2 * v) and right_u:
        return "yes"
    return "wrong numbers" if jv.any() else "zeros"


@pytest.mark.parametrize("row", ROWS)
def test_what_is_said_of_the_tools(row: str) -> None:
    cells = table()[row]
    for f in ROWS[row]:
        assert outcome(ours, f) == "yes"
    for name, cell in zip(NAMES, cells[1:5], strict=True):
        found = {outcome(TOOLS[name], f) for f in ROWS[row]}
        said = re.sub(r"[¹²³⁴]", "", cell).strip().removesuffix(", with a `jvp`")
        if said == "zeros or error":  # of the trick itself, and of autograd.functional
            q = torch.tensor([0.5, 1.0]).double()
            assert not af.jvp(OldOverNumPy.apply, q, torch.ones_like(q))[1].any()
            with pytest.raises(RuntimeError):
                af.jvp(OldOverNumPy.apply, q, torch.ones_like(q), strict=True)
            said = "error"
        said = said.replace("yes", "Jᵀ·u") if name == "torch.func.vjp" else said
        if said == "wrong numbers":  # whatever is in the memory that was not written, zeros too
            found = {said if f == "zeros" else f for f in found}
        assert found == set(said.split(" or ")), name


def test_runs_of_the_function() -> None:
    said = table()["runs of f for k products"]
    x, v, k = torch.ones(3).double(), torch.ones(3).double(), 4

    def counted(make: Callable[[Callable[..., Any]], Callable[[], Any]]) -> int:
        runs = 0

        def f(x: torch.Tensor) -> torch.Tensor:
            nonlocal runs
            runs += 1
            return x.sin()

        product = make(f)
        for _ in range(k):
            product()
        return runs

    def linearized(f: Callable[..., Any]) -> Callable[[], Any]:
        jvp_fn = torch.func.linearize(f, x)[1]
        return lambda: jvp_fn(v)

    def pulled(f: Callable[..., Any]) -> Callable[[], Any]:
        vjp_fn = torch.func.vjp(f, x)[1]
        return lambda: vjp_fn(v)

    def here(f: Callable[..., Any]) -> Callable[[], Any]:
        point = lz.Linearizer(f).at(x)
        return lambda: (point.jvp_fn(v), point.vjp_fn(v))

    assert (counted(here), said[0]) == (1, "1")
    assert (counted(lambda f: lambda: torch.func.jvp(f, (x,), (v,))), said[1]) == (k, "k")
    assert (counted(linearized), said[2]) == (2, "2, one of them a trace")
    assert (counted(pulled), said[3]) == (1, "1")
    assert (counted(lambda f: lambda: by_two_backwards(f, x, v, v)), said[4]) == (
        k,
        "1 with a kept graph, else k",
    )


def test_the_version_is_stated() -> None:
    assert f"PyTorch {VERSION} " in (ROOT / "README.md").read_text(encoding="utf-8")


def test_dropout() -> None:
    said = table()["products with dropout in f"]
    drop, ones = nn.Dropout(0.5), torch.ones(200)

    def of_one_run(value: torch.Tensor, product: Callable[[], torch.Tensor]) -> str:
        same = all(torch.equal(product(), value) for _ in range(4))
        return "of one run" if same else "new mask each"

    point = lz.Linearizer(drop).at(ones)
    assert of_one_run(point.value, lambda: point.jvp_fn(ones)) == said[0]
    value = drop(ones)
    assert of_one_run(value, lambda: torch.func.jvp(drop, (ones,), (ones,))[1]) == said[1]
    value, jvp_fn = torch.func.linearize(drop, ones)
    assert of_one_run(value, lambda: jvp_fn(ones)) == said[2]
    value, vjp_fn = torch.func.vjp(drop, ones)
    assert of_one_run(value, lambda: vjp_fn(ones)[0]) == said[3]


def test_running_statistics() -> None:
    """`docs/migrating.md`: torch.func.linearize moves them twice."""
    for tool, moves in ((torch.func.linearize, 2), (lz.func.linearize, 1)):
        norm = nn.BatchNorm1d(2)
        tool(norm, torch.randn(5, 2))
        assert norm.num_batches_tracked == moves


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="needs JAX")
def test_jax() -> None:
    import jax
    import numpy as np

    said = {row: cells[5] for row, cells in table().items()}
    runs = 0

    def f(x: Any) -> Any:
        nonlocal runs
        runs += 1
        return jax.numpy.sin(x) if x.sum().item() > 0 else x

    x = jax.numpy.ones(3)
    _, jvp_fn = jax.linearize(f, x)
    for _ in range(4):
        jv = jvp_fn(x)
    assert (runs, said["runs of f for k products"]) == (1, "1")
    assert jax.numpy.allclose(jax.linear_transpose(jvp_fn, x)(x)[0], jv)
    assert "`linear_transpose`" in said["gives"]
    with pytest.raises(jax.errors.ConcretizationTypeError):
        jax.jit(f)(x)
    assert said["branches on numbers, `.item()` in f"] == "yes, outside of `jit`"

    def callback(fn: Callable[..., Any], *args: Any) -> Any:
        shape = jax.ShapeDtypeStruct((3,), jax.numpy.float32)
        return jax.pure_callback(lambda *a: fn(*map(np.asarray, a)), shape, *args)

    @jax.custom_jvp
    def cube(x: Any) -> Any:
        return callback(lambda a: a**3, x)

    @cube.defjvp
    def cube_jvp(primals: Any, tangents: Any) -> Any:
        return cube(*primals), callback(lambda a, b: 3 * a**2 * b, *primals, *tangents)

    _, jvp_fn = jax.linearize(cube, x)
    assert jax.numpy.allclose(jvp_fn(x), 3.0)
    with pytest.raises(ValueError, match="transpose"):
        jax.linear_transpose(jvp_fn, x)(x)
    assert said["Function over NumPy"] == "J·v by a callback, no transpose"
