"""What is remembered of single graph nodes: used where it holds, and nowhere else."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import linearize as lz
from linearize._record import walk
from linearize._record.node_programs import NODE_PROGRAMS
from tests.support.comparing import compare
from tests.support.functions import randn as rand

D, C = torch.float64, torch.complex128


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    NODE_PROGRAMS.clear()
    yield
    NODE_PROGRAMS.clear()


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the nodes that were called to be recorded."""
    names: list[str] = []
    call = walk.Walk.listened

    def noted(self: Any, node: Any, *more: Any) -> Any:
        names.append(node.name())
        return call(self, node, *more)

    monkeypatch.setattr(walk.Walk, "listened", noted)
    return names


def steps(u: torch.Tensor) -> torch.Tensor:
    for _ in range(20):
        u = u - 0.1 * u * (u - u.roll(1)) + 0.05 * (u.roll(1) - 2 * u + u.roll(-1))
    return u


def test_a_node_is_called_once_for_all_of_its_kind(called: list[str]) -> None:
    here = lz.Linearizer(steps).at(rand(30) * 0.1)
    nodes = len(here.vjp_fn.program.equations)
    assert 0 < len(called) < 20
    assert nodes > 200
    called.clear()
    lz.Linearizer(steps).at(rand(30, seed=1)).vjp_fn(rand(30))
    assert called == []


def test_what_is_remembered_gives_the_same() -> None:
    x, u = rand(30) * 0.1, rand(30, seed=2)
    first = lz.Linearizer(steps, simplify=False).at(x).vjp_fn(u)[0]
    again = lz.Linearizer(steps, simplify=False).at(x).vjp_fn(u)[0]
    t = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(steps(t), t, u)
    torch.testing.assert_close(first, expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(first, again)


def filtered(x: torch.Tensor) -> torch.Tensor:
    return torch.conv1d(x, rand(1, 1, 3))


PAIRS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], Callable[..., Any], tuple[Any, ...]]]
PAIRS = {
    # Nodes of `add` and `mul` know the dtypes of what was added without showing them.
    "real beside complex, then complex": (
        lambda x, z: x + z,
        (rand(3), rand(3, dtype=C)),
        lambda y, z: y + z,
        (rand(3, dtype=C), rand(3, dtype=C, seed=1)),
    ),
    "broadcast or not": (
        lambda x, y: x * y,
        (rand(3), rand(2, 3)),
        lambda x, y: x * y,
        (rand(2, 3), rand(2, 3, seed=1)),
    ),
    "other static arguments": (lambda x: x.roll(1), (rand(4),), lambda x: x.roll(2), (rand(4),)),
    "other exponents": (lambda x: x**2, (rand(4),), lambda x: x**3, (rand(4),)),
    "lazily conjugated": (
        lambda z: torch.view_as_real(z * 2),
        (rand(3, dtype=C),),
        lambda z: torch.view_as_real((z * 2).conj().resolve_conj()).sum(0),
        (rand(3, dtype=C),),
    ),
    "transposed": (
        lambda a, b: (a @ b).sin(),
        (rand(3, 3), rand(3, 3, seed=1)),
        lambda a, b: (a @ b).t().sin(),
        (rand(3, 3), rand(3, 3, seed=1)),
    ),
    "one of two constant": (
        lambda x, y: x * y,
        (rand(3), rand(3, seed=1)),
        lambda x: x * rand(3, seed=2),
        (rand(3),),
    ),
    "the same tensor twice": (
        lambda x, y: x * y,
        (rand(3), rand(3, seed=1)),
        lambda x, y: x * x + y,
        (rand(3), rand(3, seed=1)),
    ),
    # Within forward mode a constant filter's tangent is a zero without memory, which a second
    # convolution saves.
    "zeros without memory": (
        lambda x, d: torch.func.jvp(filtered, (x,), (d,))[1],
        (rand(1, 1, 5), rand(1, 1, 5, seed=1)),
        filtered,
        (rand(1, 1, 5),),
    ),
    "a sum that is used twice": (
        lambda x: (lambda s: s.sin() * s)(x.sum(0)),
        (rand(2, 3),),
        lambda x: (lambda s: s.sin() * s)(x.sum(1)),
        (rand(2, 3),),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_nodes_that_differ_are_told_apart(name: str) -> None:
    f, x, g, y = PAIRS[name]
    compare(f, *x)
    compare(g, *y)
    compare(f, *x)


def test_formulas_that_look_at_gradients_see_possible_ones() -> None:
    """Complex singular vectors have free phases, and PyTorch checks that nothing sees them."""
    z = rand(3, 2, dtype=C)

    def f(z: torch.Tensor) -> torch.Tensor:
        u, s, vh = torch.linalg.svd(z, full_matrices=False)
        return (u * s.sin()) @ vh

    for _ in range(2):
        compare(f, z)


def test_nothing_of_a_point_is_held() -> None:
    def used() -> list[weakref.ref[Any]]:
        x, w = rand(5), rand(5, 5)
        here = lz.Linearizer(lambda x: torch.tanh(w @ x) * w[0]).at(x)
        here.vjp_fn(rand(5))
        here.jvp_fn(rand(5))
        return [weakref.ref(t) for t in (x, w, here, here.value)]

    alive = used()
    gc.collect()
    assert [ref() for ref in alive] == [None] * 4
    assert len(NODE_PROGRAMS) > 0


def test_no_cycle_keeps_what_a_graph_saved() -> None:
    """Without the garbage collector all goes with its owner."""
    x, w = rand(5), rand(5, 5)
    gc.collect()
    gc.disable()
    try:
        here = lz.Linearizer(lambda x: torch.tanh(w @ x) * w[0]).at(x)
        for _ in range(6):
            here.vjp_fn(rand(5))
            here.jvp_fn(rand(5))
        alive = [weakref.ref(r.tensor) for r in here.jvp_fn.program.residuals()]
        assert alive
        del here
        assert [ref() for ref in alive if ref() is not w] == [None] * len(alive)
    finally:
        gc.enable()


def test_a_changed_residual_is_noticed() -> None:
    w = rand(4)

    def f(x: torch.Tensor) -> torch.Tensor:
        return x * w

    lz.Linearizer(f).at(rand(4)).vjp_fn(rand(4))  # remembers the node
    here = lz.Linearizer(f).at(rand(4))
    w.mul_(2)
    with pytest.raises(lz.errors.StalenessError):
        here.vjp_fn(rand(4))
