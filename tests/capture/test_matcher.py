"""A graph that a matcher takes for a known one has its signature."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from linearize._capture.capture import capture
from linearize._capture.matcher import Matcher
from linearize._capture.signature import signature


class Cube(torch.autograd.Function):
    """A custom Function."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, u: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * u


T = torch.Tensor
D = torch.float64
ROW = torch.linspace(1, 2, 4, dtype=D)
SQUARE = torch.linspace(-1, 1, 16, dtype=D).reshape(4, 4)
OTHER = torch.linspace(-1, 2, 16, dtype=D).reshape(4, 4)
LONG = torch.linspace(-1, 3, 40, dtype=D)
WIDE = torch.complex(SQUARE, OTHER)
LEAF = torch.ones(4, 4, dtype=D, requires_grad=True)
PLACES = torch.tensor([0, 2, 1, 3])


def in_place(x: T, c: T) -> T:
    y = x * 1.0
    y += c
    return y


#: Functions of x and y, both of shape (4, 4). Neighbours differ in one thing.
FUNCTIONS: dict[str, Callable[[T, T], T]] = {
    # classes and edges
    "sin": lambda x, y: x.sin() * y,
    "cos": lambda x, y: x.cos() * y,
    "of the other": lambda x, y: y.sin() * x,
    "of one": lambda x, y: x.sin() * x,
    "detached": lambda x, y: x.sin() * y.detach(),
    "with a leaf that is no primal": lambda x, y: x.sin() * LEAF,
    "added leaf": lambda x, y: x.sin() + LEAF,
    "added constant": lambda x, y: x.sin() + LEAF.detach(),
    "first chunk": lambda x, y: x.chunk(2)[0].exp().sum() * y,
    "second chunk": lambda x, y: x.chunk(2)[1].exp().sum() * y,
    "three in a row": lambda x, y: torch.cat([x, y, x]).exp()[:4],
    "another three": lambda x, y: torch.cat([x, x, y]).exp()[:4],
    # what nodes take
    "a row is added": lambda x, y: (x[0] + ROW).exp().sum() * y,
    "rows are added": lambda x, y: (x[0] + SQUARE).exp().sum() * y,
    "in place": lambda x, y: in_place(x, SQUARE).exp() * y,
    "in another dtype": lambda x, y: x.float().sum().double() * y,
    "in half": lambda x, y: x.half().sum().double() * y,
    # static arguments
    "sum of rows": lambda x, y: x.exp().sum(0) * y,
    "sum of columns": lambda x, y: x.exp().sum(1) * y,
    "rolled": lambda x, y: x.roll(1, 0) * y,
    "rolled on": lambda x, y: x.roll(2, 0) * y,
    "squared": lambda x, y: x.pow(2) * y,
    "squared as a float": lambda x, y: x.pow(2.0) * y,
    "cut at zero": lambda x, y: F.threshold(x, 0.0, 0.0) * y,
    "cut at minus zero": lambda x, y: F.threshold(x, -0.0, 0.0) * y,
    "added twice": lambda x, y: torch.add(x, y, alpha=2),
    "added thrice": lambda x, y: torch.add(x, y, alpha=3),
    # numbers
    "doubled": lambda x, y: x * 2.0 + y,
    "tripled": lambda x, y: x * 3.0 + y,
    "doubled by an int": lambda x, y: x * 2 + y,
    "by a tensor": lambda x, y: x * torch.tensor(2.0, dtype=D) + y,
    "by another tensor": lambda x, y: x * torch.tensor(3.0, dtype=D) + y,
    "by minus zero": lambda x, y: x * -0.0 + y,
    "by zero": lambda x, y: x * 0.0 + y,
    # how saved tensors lie
    "by a matrix": lambda x, y: x @ SQUARE + y,
    "by a transposed one": lambda x, y: x @ SQUARE.T + y,
    "by a part": lambda x, y: x * LONG[:16].view(4, 4) + y,
    "by a scattered part": lambda x, y: x * LONG[:32:2].view(4, 4) + y,
    "by a complex one": lambda x, y: (x * WIDE).real + y,
    "by its conjugate": lambda x, y: (x * WIDE.conj()).real + y,
    "by its imaginary part": lambda x, y: x * WIDE.conj().resolve_conj().imag + y,
    "by the negative of that": lambda x, y: x * WIDE.conj().imag + y,
    "by a sparse one": lambda x, y: torch.sparse.mm(SQUARE.to_sparse(), x) + y,
    # who shares memory
    "one twice": lambda x, y: (x * SQUARE) * (y * SQUARE),
    "two": lambda x, y: (x * SQUARE) * (y * OTHER),
    "overlapping": lambda x, y: (x * LONG[:16].view(4, 4)) * (y * LONG[4:20].view(4, 4)),
    "overlapping less": lambda x, y: (x * LONG[:16].view(4, 4)) * (y * LONG[8:24].view(4, 4)),
    "apart": lambda x, y: (x * LONG[:16].view(4, 4)) * (y * LONG[20:36].view(4, 4)),
    "further apart": lambda x, y: (x * LONG[:16].view(4, 4)) * (y * LONG[24:].view(4, 4)),
    "empty": lambda x, y: (x * SQUARE)[:0].exp().sum() * (x[:0] * SQUARE[:0]).sum() + x * y,
    # indices, of which some are missing
    "taken": lambda x, y: x[PLACES] * y,
    "taken along another": lambda x, y: x[:, PLACES] * y,
    "taken in pairs": lambda x, y: x[PLACES, PLACES] * y,
    # what is not for matchers
    "written": lambda x, y: x.index_copy(0, PLACES, y),
    "written twice": lambda x, y: x.index_copy(0, PLACES // 2, y),
    "custom": lambda x, y: Cube.apply(x) * y,  # type: ignore[no-untyped-call]
}


def graph_of(f: Callable[[T, T], T], x: T, y: T) -> tuple[Any, Any]:
    captured = capture(f, (x, y), {}, range(2))
    return captured.graph(), (captured.out_space.tensors, captured.in_space.tensors)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_match_is_a_signature_of_equal_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    known: dict[str, Any] = {}
    for name, f in FUNCTIONS.items():
        x, y = (torch.rand(4, 4, dtype=D, generator=generator) for _ in range(2))
        graph, specs = graph_of(f, x, y)
        of = signature(graph, specs)
        known[name] = graph, specs, of, None if of is None else Matcher.of(graph, specs)
    without = {name for name, (*_, matcher) in known.items() if matcher is None}
    assert without == {"written", "written twice", "custom", "by a sparse one"}
    for mine, (_, _, of, matcher) in known.items():
        for theirs, (graph, specs, other, _) in known.items():
            if matcher is not None and matcher(graph, specs) is not None:
                assert of == other, (mine, theirs)
            if mine == theirs and matcher is not None:
                assert matcher(*graph_of(FUNCTIONS[mine], y, x)) is not None, mine


def test_what_differs_is_not_matched() -> None:
    """Neighbours above, by name: so that nothing is compared in vain."""
    same = {("by a tensor", "by another tensor"), ("apart", "further apart"), ("two", "two")}
    for mine, theirs in zip(list(FUNCTIONS)[:-1], list(FUNCTIONS)[1:], strict=True):
        graph, specs = graph_of(FUNCTIONS[mine], SQUARE, OTHER)
        matcher = Matcher.of(graph, specs)
        if matcher is not None:
            found = matcher(*graph_of(FUNCTIONS[theirs], SQUARE, OTHER))
            assert (found is not None) <= ((mine, theirs) in same), (mine, theirs)


def test_other_spaces_are_not_matched() -> None:
    graph, specs = graph_of(FUNCTIONS["sin"], SQUARE, OTHER)
    matcher = Matcher.of(graph, specs)
    assert matcher is not None
    assert matcher(*graph_of(FUNCTIONS["sin"], SQUARE.float(), OTHER.float())) is None
    assert matcher(*graph_of(FUNCTIONS["sin"], SQUARE[:2], OTHER[:2])) is None


def test_it_gives_what_the_graph_saved() -> None:
    def f(x: T, y: T) -> T:
        return x[PLACES].sin() * y

    matcher = Matcher.of(*graph_of(f, SQUARE, OTHER))
    assert matcher is not None
    graph, specs = graph_of(f, OTHER, SQUARE)
    found = matcher(graph, specs)
    assert found is not None
    for (place, name, position), t in found.items():
        value = getattr(graph.order[place], name)
        expected = value if position is None else value[position]
        assert (t is None and expected is None) or torch.equal(t, expected)  # type: ignore[arg-type]
    assert sum(t is not None for t in found.values()) == 4


def test_what_was_changed_is_not_matched() -> None:
    def f(x: T, y: T) -> T:
        return x.sin() * y

    x = SQUARE.clone()
    matcher = Matcher.of(*graph_of(f, x, OTHER))
    graph, specs = graph_of(f, x, OTHER)
    assert matcher is not None
    x.add_(1)
    assert matcher(graph, specs) is None


def test_it_keeps_no_tensor_alive() -> None:
    def f(x: T, y: T) -> T:
        kept.append(weakref.ref(z := x.sin()))
        return z.exp() * y

    kept: list[weakref.ref[T]] = []
    matcher = Matcher.of(*graph_of(f, SQUARE, OTHER))
    gc.collect()
    assert matcher is not None
    assert kept[0]() is None
