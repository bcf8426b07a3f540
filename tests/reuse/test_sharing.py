"""Programs that all of the process share: new `Linearizer`s for graphs that were met before."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

import linearize as lz
import linearize.func
from linearize._reuse.shared import SHARED, Shared

D = torch.float64


def point(seed: int, n: int = 5) -> torch.Tensor:
    return torch.randn(n, dtype=D, generator=torch.Generator().manual_seed(seed))


def f(x: torch.Tensor) -> torch.Tensor:
    return (x.sin() * x.flip(0)).cumsum(0)


def jacobian(fn: Any, x: torch.Tensor) -> torch.Tensor:
    found = torch.autograd.functional.jacobian(fn, x)
    assert isinstance(found, torch.Tensor)
    return found


def check(here: lz.Linearization, fn: Any, x: torch.Tensor, times: int = 1) -> None:
    j = jacobian(fn, x)
    for k in range(times):
        v = point(100 + k, len(x))
        torch.testing.assert_close(here.jvp_fn(v), j @ v)
        torch.testing.assert_close(here.vjp_fn(v)[0], j.T @ v)


def test_a_new_linearizer_takes_over_what_another_one_recorded() -> None:
    for k, times in enumerate((6, 1, 1, 6)):
        runs = 0

        def counted(x: torch.Tensor) -> torch.Tensor:
            nonlocal runs
            runs += 1
            return f(x)

        lin = lz.Linearizer(counted)
        x = point(k)
        check(lin.at(x), f, x, times)
        stats = lin.stats()
        assert (stats.recorded, stats.reused) == ((1, 0) if k == 0 else (0, 1))
        assert runs == 1


def test_the_function_itself_does_not_matter_but_its_graph_does() -> None:
    check(lz.Linearizer(f).at(point(0)), f, point(0))

    def same(x: torch.Tensor) -> torch.Tensor:
        return torch.cumsum(torch.mul(torch.sin(x), torch.flip(x, [0])), 0)

    def other(x: torch.Tensor) -> torch.Tensor:
        return (x.cos() * x.flip(0)).cumsum(0)

    for fn, x, reused in (
        (same, point(1), 1),
        (other, point(1), 0),
        (f, point(1, 6), 0),
        (f, point(1).float().double(), 1),
    ):
        lin = lz.Linearizer(fn)
        check(lin.at(x), fn, x, 3)
        assert lin.stats().reused == reused


def test_constants_are_those_of_the_new_function() -> None:
    for k in range(4):
        w, b = point(k), 1.0 + k % 2

        def fn(x: torch.Tensor, w: torch.Tensor = w, b: float = b) -> torch.Tensor:
            return (w * x.sin() * b).cumsum(0)

        lin = lz.Linearizer(fn)
        check(lin.at(point(k)), fn, point(k), 5)
        # So is a Python number that only scales.
        assert lin.stats().reused == int(k > 0)


@pytest.mark.parametrize("first", [{}, {"simplify": False}])
def test_other_options_have_programs_of_their_own(first: dict[str, Any]) -> None:
    x = point(0)
    check(lz.Linearizer(f, **first).at(x), f, x, 6)
    second = {} if first else {"simplify": False}
    lin = lz.Linearizer(f, **second)
    here = lin.at(x)
    check(here, f, x, 6)
    assert lin.stats().reused == 0
    names = [eq.name for eq in here.program.pushforward.equations]
    plain = lz.Linearizer(f, simplify=False).at(x).program.pushforward
    assert (len(names) == len(plain.equations)) == (not second.get("simplify", True))


def test_what_one_compiles_the_other_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linearize._forms.compiled.worth", lambda program: True)
    x, calls = point(0), 0

    def wide(x: torch.Tensor) -> torch.Tensor:
        return f(x).cumsum(0) * f(x.flip(0))

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        def run(*args: torch.Tensor) -> Any:
            nonlocal calls
            calls += 1
            return graph.forward(*args)

        return run

    first = lz.Linearizer(wide).at(x)
    check(first, wide, x, 6)
    first.compile(backend=backend)
    check(first, wide, x, 6)
    assert calls
    second = lz.Linearizer(wide).at(x)
    before = calls
    check(second, wide, x, 6)
    assert calls == before
    first.jvp_fn(x)
    assert calls == before + 1


def test_what_a_later_one_simplifies_serves_those_after_it() -> None:
    x = point(0)
    check(lz.Linearizer(f).at(x), f, x)  # recorded only
    check(lz.Linearizer(f).at(x), f, x, 6)  # simplified
    here = lz.Linearizer(f).at(x)
    check(here, f, x)
    (plan,) = here.jvp_fn._plans.values()
    assert plan._succession.settled


def test_functions_of_torch_func_share_them_too() -> None:
    for k in range(3):
        x, v = point(k), point(k + 50)
        y, jvp_fn = lz.func.linearize(f, x)
        torch.testing.assert_close(y, f(x))
        torch.testing.assert_close(jvp_fn(v), jacobian(f, x) @ v)
        y, vjp_fn = lz.func.vjp(f, x)
        torch.testing.assert_close(vjp_fn(v)[0], jacobian(f, x).T @ v)
    assert len(SHARED._known) == 1


class Twice(torch.autograd.Function):
    """2x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def jvp(ctx: Any, v: torch.Tensor) -> torch.Tensor:
        return 2 * v

    @staticmethod
    def backward(ctx: Any, u: torch.Tensor) -> torch.Tensor:
        return 2 * u


def test_custom_functions_are_not_kept() -> None:
    lin = lz.Linearizer(lambda x: Twice.apply(x).sin())
    lin.at(point(0)).jvp_fn(point(1))
    assert len(SHARED._known) == 0

    def used() -> weakref.ref[type]:
        made = type("Local", (Twice,), {})
        lz.Linearizer(lambda x: made.apply(x).sin()).at(point(0)).jvp_fn(point(1))
        return weakref.ref(made)

    gone = used()
    gc.collect()
    assert gone() is None


def test_neither_tensors_nor_functions_are_kept() -> None:
    class Model:
        def __init__(self) -> None:
            self.w = point(3)

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return (self.w * x).sin().cumsum(0)

    model = Model()
    lin = lz.Linearizer(model)
    check(lin.at(point(0)), model, point(0), 6)
    gone = weakref.ref(model), weakref.ref(model.w)
    del model, lin
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    assert len(SHARED._known) == 1


def test_the_number_of_nodes_is_bounded() -> None:
    store = Shared(most=10)
    for n in range(2, 30):
        here = lz.Linearizer(f)
        here.at(point(0, n)).jvp_fn(point(1, n))
        (known,) = here._structures._known
        store.keep("policy", known)
    assert store._known.currsize <= 10

    def deep(x: torch.Tensor) -> torch.Tensor:
        for _ in range(20):
            x = x.sin()
        return x

    lin = lz.Linearizer(deep)
    lin.at(point(0)).jvp_fn(point(1))
    (known,) = lin._structures._known
    store.keep("policy", known)  # larger than all that may be kept
    assert store.find("policy", known.signature) is None
    store.clear()
    assert store._known.currsize == 0
