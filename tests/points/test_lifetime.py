"""What is kept, by whom, and that it goes: proved with weak references.

A tensor made from a NumPy array keeps that array alive for as long as anything shares its
memory, aliases and saved tensors included; a weak reference to the array tells when the
memory is let go.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import tracemalloc
import weakref
from typing import Any

import numpy as np
import pytest
import torch

import linearize as lz
from tests.support.functions import rand


class Traced:
    """Makes tensors and tells which are still in memory."""

    def __init__(self) -> None:
        self.refs: dict[str, weakref.ref[Any]] = {}

    def tensor(self, name: str, value: torch.Tensor) -> torch.Tensor:
        array = np.array(value.numpy(force=True))
        self.refs[name] = weakref.ref(array)
        return torch.from_numpy(array)

    def alive(self) -> set[str]:
        gc.collect()
        return {name for name, ref in self.refs.items() if ref() is not None}


def test_closures_outlive_what_made_them() -> None:
    traced = Traced()
    x, v = rand(3), rand(3, seed=1)
    lin = lz.Linearizer(lambda x: x * traced.tensor("factor", 2 * torch.ones(3).double()))
    here = lin.at(x)
    jvp_fn, vjp_fn = here.jvp_fn, here.vjp_fn
    gone = [weakref.ref(lin), weakref.ref(here)]
    del lin, here
    gc.collect()
    assert [r() for r in gone] == [None, None]
    torch.testing.assert_close(jvp_fn(v), 2 * v)
    del jvp_fn
    assert traced.alive() == {"factor"}
    torch.testing.assert_close(vjp_fn(v)[0], 2 * v)
    del vjp_fn
    assert traced.alive() == set()


def test_a_closure_keeps_f_no_longer_than_the_run() -> None:
    class F:
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return x.sin()

    f = F()
    gone = weakref.ref(f)
    jvp_fn = lz.Linearizer(f).at(rand(3)).jvp_fn
    del f
    gc.collect()
    assert gone() is None
    assert jvp_fn(rand(3)).shape == (3,)


@pytest.mark.parametrize("which", ["jvp_fn", "vjp_fn"])
def test_a_closure_keeps_exactly_what_it_needs(which: str) -> None:
    """PyTorch saves the activation for the weight's gradient; no product here needs that."""
    traced = Traced()
    weight = torch.nn.Parameter(rand(3, 3))

    def f(x: torch.Tensor) -> torch.Tensor:
        factor = traced.tensor("factor", torch.full((3,), 2.0).double())
        constant = traced.tensor("only for the weight's gradient", torch.ones(3).double())
        return (x * factor) @ weight + constant @ weight

    product = getattr(lz.Linearizer(f).at(rand(3)), which)
    result = product(rand(3, seed=1))
    expected = 2 * rand(3, seed=1)
    if which == "jvp_fn":
        torch.testing.assert_close(result, expected @ weight.detach())
    else:
        torch.testing.assert_close(result[0], 2 * (weight.detach() @ rand(3, seed=1)))
    assert traced.alive() == {"factor"}
    del product
    assert traced.alive() == set()


@pytest.mark.parametrize("use", ["nothing", "jvp", "vjp", "both", "grad", "printed"])
def test_nothing_survives_a_point(use: str) -> None:
    traced = Traced()
    contexts: list[weakref.ref[Any]] = []

    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            contexts.append(weakref.ref(ctx))
            ctx.factor = traced.tensor("attribute", torch.ones(3).double())
            saved = traced.tensor("saved", torch.ones(3).double())
            forward = traced.tensor("saved for forward", torch.ones(3).double())
            ctx.save_for_backward(saved)
            ctx.save_for_forward(forward)
            return x * ctx.factor

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            return g * ctx.factor * ctx.saved_tensors[0]

        @staticmethod
        def jvp(ctx: Any, v: torch.Tensor) -> torch.Tensor:
            return v * ctx.factor

    def f(x: torch.Tensor) -> torch.Tensor:
        return Scale.apply(x * traced.tensor("built-in", torch.ones(3).double())).exp()

    x = rand(3)
    lin = lz.Linearizer(f)
    here = lin.at(x)
    v = rand(3).requires_grad_(use == "grad")
    if use in ("jvp", "both"):
        here.jvp_fn(v)
    if use in ("vjp", "both"):
        here.vjp_fn(v)
    if use == "grad":
        torch.autograd.grad(here.jvp_fn(v).sum(), v)
    if use == "printed":
        str(here.program)
    assert {"attribute", "saved", "built-in"} <= traced.alive()
    assert contexts[0]() is not None
    gone = weakref.ref(here)
    del here
    assert gone() is not None  # the memo keeps it
    del x
    gc.collect()
    assert gone() is None
    assert traced.alive() == set()
    assert contexts[0]() is None
    assert lin.stats().points == 0


@pytest.mark.parametrize("how", ["close", "scope", "point scope", "clear", "linearizer closed"])
def test_closing_lets_go_at_once(how: str) -> None:
    traced = Traced()
    x = rand(3)
    lin = lz.Linearizer(lambda x: (x * traced.tensor("r", torch.ones(3).double())).exp())
    with lin if how == "scope" else torch.no_grad():
        here = lin.at(x)
        jvp_fn = here.jvp_fn
        jvp_fn(x)
        here.vjp_fn(x)
        if how == "close":
            here.close()
        elif how == "point scope":
            with here:
                pass
        elif how == "linearizer closed":
            lin.close()
        elif how == "clear":
            lin.clear()
            assert traced.alive() == {"r"}  # still held by the caller
            del here, jvp_fn
    assert traced.alive() == set()


def test_the_value_is_released_when_a_scope_closes() -> None:
    """The point may be held by the caller: all that it keeps for the user goes all the same."""
    traced = Traced()

    def f(x: torch.Tensor) -> Any:
        return x + 1, traced.tensor("value", torch.ones(3).double())

    with lz.Linearizer(f) as lin:
        here = lin.at(rand(3))
        here.vjp_fn(None)
        assert traced.alive() == {"value"}
    assert here.closed
    assert traced.alive() == set()


def test_nothing_of_f_stays_behind_when_it_raises() -> None:
    traced = Traced()

    class OwnError(Exception):
        pass

    def f(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = x * traced.tensor("residual", torch.ones(3).double())
        y.sin().exp()
        raise OwnError

    lin = lz.Linearizer(f)
    x = traced.tensor("primal", rand(3))
    object_ = weakref.ref(x)
    for _ in range(3):
        with pytest.raises(OwnError):
            lin.at(x, w=rand(3))
    del x, _
    assert traced.alive() == set()
    assert object_() is None


def test_primals_are_not_kept_alive_by_the_memo() -> None:
    """Not even where the graph saves the primal itself, or f returns it."""
    lin = lz.Linearizer(lambda x, n, w=None: (x * x * w, x, n, w), argnums=0)
    x, n, w = rand(3), torch.arange(3), rand(3)
    gone = [weakref.ref(t) for t in (x, n, w)]
    lin.at(x, n, w=w).jvp_fn(x)
    del x
    gc.collect()
    assert gone[0]() is None
    assert lin.stats().points == 0
    del n, w
    gc.collect()
    assert [r() for r in gone] == [None] * 3


def test_temporaries_of_f_are_freed_after_the_run() -> None:
    traced = Traced()

    def f(x: torch.Tensor) -> torch.Tensor:
        temporary = traced.tensor("temporary", torch.ones(3).double())
        return x + temporary

    here = lz.Linearizer(f).at(rand(3))
    assert traced.alive() == set()
    assert here.jvp_fn(torch.ones(3).double()).tolist() == [1, 1, 1]


def test_the_graph_of_the_run_goes_once_both_programs_are_there() -> None:
    """Contexts of built-in nodes save more than the programs need: here x for w's gradient."""
    traced = Traced()
    w = torch.nn.Parameter(rand(3))

    def f(x: torch.Tensor) -> torch.Tensor:
        return x * traced.tensor("constant", torch.ones(3).double()) + (
            w * traced.tensor("for w only", torch.ones(3).double())
        )

    here = lz.Linearizer(f).at(rand(3))
    here.jvp_fn(rand(3))
    here.vjp_fn(rand(3))
    assert traced.alive() == {"constant"}


def test_results_with_history_keep_only_their_product() -> None:
    traced = Traced()
    v = rand(3).requires_grad_()
    y = (
        lz.Linearizer(lambda x: x * traced.tensor("r", torch.full((3,), 2.0).double()))
        .at(rand(3))
        .jvp_fn(v)
    )
    assert traced.alive() == {"r"}
    (grad,) = torch.autograd.grad(y.sum(), v)
    assert grad.tolist() == [2, 2, 2]
    del y
    assert traced.alive() == set()


def count(kind: type) -> int:
    gc.collect()
    return sum(type(o) is kind for o in gc.get_objects())


@pytest.mark.parametrize("products", [False, True])
def test_many_points_do_not_grow_memory(products: bool) -> None:
    lin = lz.Linearizer(lambda x: x.sin() * x)
    runs = 300 if products else 2500

    def loop(n: int) -> None:
        for _ in range(n):
            x = torch.ones(3)
            here = lin.at(x)
            if products:
                here.jvp_fn(x)
                here.vjp_fn(x)

    loop(100)  # caches of PyTorch and of this library fill
    tensors, objects = count(torch.Tensor), len(gc.get_objects())
    tracemalloc.start()
    try:
        loop(200)
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        loop(200)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 8000  # 200 points of some hundred bytes at least
    loop(runs)
    assert count(torch.Tensor) <= tensors + 5
    assert len(gc.get_objects()) <= objects + 125
    assert lin.stats().misses == 500 + runs
    assert lin.stats().points <= 1


def test_many_points_at_living_primals_stay_within_maxsize() -> None:
    lin = lz.Linearizer(lambda x: x.sin() * x, maxsize=4)
    primals = [torch.ones(3) for _ in range(300)]
    held = [weakref.ref(lin.at(x)) for x in primals]
    gc.collect()
    assert sum(r() is not None for r in held) == 4


def test_many_points_within_a_scope_do_not_grow_memory() -> None:
    """A scope refers weakly to what it will close."""
    with lz.Linearizer(torch.sin, maxsize=1) as lin:
        refs = [weakref.ref(lin.at(torch.ones(3))) for _ in range(200)]
        gc.collect()
        assert sum(r() is not None for r in refs) <= 1


def test_by_value_points_stay_within_maxsize() -> None:
    lin = lz.Linearizer(torch.sin, match="value", maxsize=3)
    refs = [weakref.ref(lin.at(torch.full((2,), float(i)))) for i in range(50)]
    gc.collect()
    assert [r() is not None for r in refs] == [False] * 47 + [True] * 3


def test_nothing_slow_is_loaded_for_a_product() -> None:
    """PyTorch's compiler takes a second to import, and is not needed."""
    script = """
import sys, torch, linearize
here = linearize.Linearizer(lambda x: torch.linalg.pinv(x).sin()).at(torch.eye(3))
here.jvp_fn(torch.eye(3)), here.vjp_fn(torch.eye(3))
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


class Holding(torch.autograd.Function):
    """2x; its context keeps something that tells whether it is still there."""

    kept: weakref.ref[Any]

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.token = Traced()
        Holding.kept = weakref.ref(ctx.token)
        return 2 * x

    @staticmethod
    def jvp(ctx: Any, v: torch.Tensor) -> torch.Tensor:
        return 2 * v

    @staticmethod
    def backward(ctx: Any, u: torch.Tensor) -> torch.Tensor:
        return 2 * u


@pytest.mark.parametrize("times", [1, 5])
@pytest.mark.parametrize("maxsize", [0, 8])
def test_a_point_goes_without_the_collector(times: int, maxsize: int) -> None:
    """Garbage in cycles would let a loop over points grow until the collector runs."""

    def f(x: torch.Tensor) -> torch.Tensor:
        w = torch.full((3,), 2.0, dtype=torch.float64)
        saved.append(weakref.ref(w))
        return (Holding.apply(x).sin() * w).exp()  # type: ignore[no-untyped-call]

    saved: list[weakref.ref[torch.Tensor]] = []

    def once(k: int) -> None:
        here = lz.Linearizer(f, maxsize=maxsize).at(rand(3, seed=k))
        for _ in range(times):
            here.jvp_fn(rand(3, seed=1))
            here.vjp_fn(rand(3, seed=2))

    once(0)  # what is made once in a process
    gc.collect()
    gc.disable()
    try:
        for k in range(3):
            once(k)
            assert Holding.kept() is None
            assert saved[-1]() is None
    finally:
        gc.enable()
