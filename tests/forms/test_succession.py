"""When forms take over: what betters a map pays for itself, and what was learned is kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.autograd.functional import jacobian
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import linearize as lz
from linearize._check import proof
from linearize._execute.thresholds import COSTLY_AT, NEVER
from linearize._forms.succession import Left
from linearize._programs.price import price, price_of_many
from linearize._programs.program import Emitter, Program
from linearize._programs.values import Var
from linearize._reuse.shared import SHARED
from linearize._reuse.structure import PROVED
from linearize._simplify import worth
from linearize._simplify.worth import pays
from linearize._spaces.compare import all_close, rounding
from linearize._spaces.space import TensorSpec

aten = torch.ops.aten


class Counter(TorchDispatchMode):
    """Counts bytes that operations read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = f(*args, **(kwargs or {}))
        if not f.is_view:
            leaves = tree_leaves((args, kwargs, result))
            self.bytes += sum(t.nbytes for t in leaves if isinstance(t, torch.Tensor))
        return result


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Begin as a process does."""
    SHARED.clear()
    PROVED.clear()
    yield
    SHARED.clear()


def work(f: Callable[..., Any], x: torch.Tensor, pairs: int, **options: Any) -> list[list[int]]:
    """Return the bytes moved at each of three points, after each pair of products."""
    lin = lz.Linearizer(f, **options)
    found = []
    for k in range(3):
        here = lin.at(x + k)
        u = torch.ones_like(here.value).cumsum(0)
        with Counter() as counter:
            row = []
            for _ in range(pairs):
                here.jvp_fn(x)
                here.vjp_fn(u)
                row.append(counter.bytes)
        found.append(row)
    return found


def network() -> tuple[Callable[..., Any], torch.Tensor]:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
    head = torch.nn.Linear(32, 300)
    return lambda x: head(layer(x)), torch.randn(2, 16, 32)


def stencil() -> tuple[Callable[..., Any], torch.Tensor]:
    # Under a mode of somebody else's, points whose graphs hold numbers are recorded anew.
    a, b = torch.tensor([0.1, 0.05], dtype=torch.float64)

    def f(x: torch.Tensor) -> torch.Tensor:
        for _ in range(6):
            x = x + a * (x.roll(1) - x + x.roll(-1)) - b * x * (x - x.roll(1))
        return x

    return f, torch.linspace(0, 1, 5000, dtype=torch.float64)


@pytest.mark.parametrize("case", [network, stencil])
def test_checking_and_simplifying_pay(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # What the check does is else not seen by modes.
    monkeypatch.setattr(proof, "unobserved", contextlib.nullcontext)
    f, x = case()
    ours = work(f, x, 12)
    SHARED.clear()
    plain = work(f, x, 12, check="never", simplify=False)
    first, second, later = (
        [a / b for a, b in zip(*rows, strict=True)] for rows in zip(ours, plain, strict=True)
    )
    # One pullback more at the very first product, which checks it.
    assert max(first[:2]) <= 2.4
    assert max(first[2:]) <= 1.3
    # The second point takes the programs over, which is checked once.
    assert max(second) <= 1.3
    assert max(later) <= 1.3


def test_what_saves_nothing_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    simplify = worth.simplify
    monkeypatch.setattr(worth, "simplify", lambda *a: (tried.append(1), simplify(*a))[1])
    x = torch.linspace(0, 1, 9, dtype=torch.float64)
    for k in range(4):
        here = lz.Linearizer(lambda x: x.cumsum(0)).at(x + k)
        for i in range(6):
            torch.testing.assert_close(here.jvp_fn(x + i), (x + i).cumsum(0))
    assert len(tried) == 1


def test_zeros_that_are_rounding_are_no_reason_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bias of the keys has no influence: its gradient is what rounding leaves."""
    tried = []
    simplify = worth.simplify
    monkeypatch.setattr(worth, "simplify", lambda *a: (tried.append(1), simplify(*a))[1])
    torch.manual_seed(1)
    x, q = torch.randn(6, 8), torch.randn(6, 8)

    def f(w: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return (q @ (x @ w + bias).T).softmax(-1) @ x

    w, bias = torch.randn(8, 8), torch.randn(8)
    _, by_bias = jacobian(f, (w, bias))
    assert by_bias.abs().max() < 1e-5
    lin = lz.Linearizer(f)
    for k in range(3):
        here = lin.at(w + k, bias)
        whole, _ = jacobian(f, (w + k, bias))
        for _ in range(5):
            u = torch.randn(6, 8)
            grad, none = here.vjp_fn(u)
            torch.testing.assert_close(grad, torch.tensordot(u, whole, 2), rtol=1e-4, atol=1e-4)
            assert none.abs().max() < 1e-4
    assert len(tried) == 1


def test_agreement_is_relative_to_the_whole() -> None:
    a, large = torch.tensor([1e-9, 3e-9]), torch.tensor([1.0, 2.0])
    assert all_close([a, large], [-a, large], rounding)
    assert not all_close([a], [-a], rounding)
    assert not all_close([1e-3 * large, large], [1.001e-3 * large, large], rounding)
    assert not all_close([None, large], [a, large], rounding)
    assert all_close([None, large], [None, large], rounding)
    nan = torch.tensor([float("nan"), 1.0])
    assert all_close([nan, large], [nan, large], rounding)
    assert not all_close([nan, large], [a, large], rounding)
    assert not all_close([a, large * float("inf")], [-a, large * float("inf")], rounding)


def chain(count: int, size: int) -> Program:
    spec = TensorSpec((size,), torch.float64, torch.device("cpu"))
    v = first = Var(spec)
    e = Emitter()
    for _ in range(count):
        v = e.emit(aten.neg.default, (v,), spec)
    return Program([first], e.equations, [v], [spec])


def test_prices() -> None:
    assert price(chain(0, 10)) == 0
    assert price(chain(2, 10)) == pytest.approx(2 * price(chain(1, 10)))
    assert price(chain(1, 10**6)) > 100 * price(chain(1, 10))
    # Many arguments at once are launched once.
    assert price_of_many(chain(3, 10), 1) == pytest.approx(price(chain(3, 10)))
    assert price_of_many(chain(3, 10), 16) < 2 * price(chain(3, 10))
    assert price_of_many(chain(3, 10**6), 16) > 15 * price(chain(3, 10**6))
    assert pays(chain(3, 10), chain(2, 10))
    assert not pays(chain(3, 10), chain(3, 10))
    assert not pays(chain(2, 10), chain(3, 10))


def test_what_costs_much_waits_until_it_is_paid_for() -> None:
    saved = price(chain(4, 10)) - price(chain(1, 10))
    left = Left(chain(1, 10), cost=20 * saved)
    assert left.due(chain(4, 10)) == 20
    assert Left(chain(1, 10), cost=saved).due(chain(4, 10)) == COSTLY_AT
    assert left.due(chain(1, 10)) == NEVER
