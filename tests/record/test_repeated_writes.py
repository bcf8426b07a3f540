"""Writes of several entries to one place: the last one stays, and only it has a derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import linearize as lz

F64 = torch.float64


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=F64, generator=generator)


def i(*index: int) -> torch.Tensor:
    return torch.tensor(index)


def written(base: torch.Tensor, *where: Any, by: torch.Tensor) -> torch.Tensor:
    y = base * 1
    y[where] = by
    return y


#: All are linear in base and entries together, so that each is its own derivative.
WRITES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "index_put": lambda y, v: y.index_put((i(0, 0, 2),), v[:3]),
    "index_put, negative": lambda y, v: y.index_put((i(0, -4, 2),), v[:3]),
    "index_put, in place": lambda y, v: (y * 1).index_put_((i(1, 1, 1),), v[:3]),
    "index_put, two indices": lambda y, v: y.index_put((i(0, 0, 0), i(1, 1, 2)), v[0, :3]),
    "index_put, a grid": lambda y, v: y.index_put((i(0, 3)[:, None], i(1, 1)), v[:2, :2]),
    "index_put, second dimension": lambda y, v: torch.ops.aten.index_put(
        y, [None, i(1, 1)], v[:, :2]
    ),
    "index_put, a row for all": lambda y, v: y.index_put((i(0, 0, 2),), v[0]),
    "index_put, one number": lambda y, v: y.index_put((i(0, 0, 2),), v[0, 0]),
    "indexed assignment": lambda y, v: written(y, i(2, 0, 2), by=v[:3]),
    "indexed assignment, mask": lambda y, v: written(
        y, torch.tensor([True, False, True, False]), by=v[:2]
    ),
    "index_copy": lambda y, v: y.index_copy(0, i(3, 3, 1), v[:3]),
    "index_copy, last dimension": lambda y, v: y.index_copy(-1, i(0, 0, 1), v),
    "index_copy, a vector": lambda y, v: y[:, 0].index_copy(0, i(3, 3, 1), v[0]),
    "scatter": lambda y, v: y.scatter(0, torch.tensor([[0, 1, 2], [0, 2, 2]]), v[:2]),
    "scatter, last dimension": lambda y, v: y.scatter(-1, torch.tensor([[0, 0, 2]] * 4), v),
    "put": lambda y, v: y.put(i(0, 5, 5, 0), v[:2, :2]),
    "put, negative": lambda y, v: y.put(i(0, -12, 5, 1), v[:2, :2]),
    "index_fill": lambda y, v: y.index_fill(0, i(0, 0, 2), v[1, 1]),
    "index_fill, last dimension": lambda y, v: y.index_fill(-1, i(0, 0), v[1, 1]),
    "added": lambda y, v: y.index_put((i(0, 0, 2),), v[:3], accumulate=True),
    "each once": lambda y, v: y.index_put((i(0, 3, 2),), v[:3]),
}


@pytest.mark.parametrize("name", WRITES)
def test_only_the_last_entry_at_a_place_counts(name: str) -> None:
    f = WRITES[name]
    lin = lz.Linearizer(lambda y, v: f(y, v).sin())
    for shift in (0.0, 1.0):  # the second point takes the programs over
        y, v = numbers(4, 3) + shift, numbers(4, 3, seed=1) + shift
        here = lin.at(y, v)
        slope = f(y, v).cos()
        for seed in range(4):
            dy, dv = numbers(4, 3, seed=seed + 2), numbers(4, 3, seed=seed + 9)
            jv = f(dy, dv) * slope
            torch.testing.assert_close(here.jvp_fn(dy, dv), jv)
            u = numbers(*jv.shape, seed=seed + 5)
            back, into = here.vjp_fn(u)
            torch.testing.assert_close((u * jv).sum(), (back * dy).sum() + (into * dv).sum())
        here.check()
    assert lin.stats().reused == 1


def test_programs_of_writes_without_repetition_are_not_taken_over() -> None:
    index = [i(0, 1, 2), i(0, 0, 2), i(2, 1, 0), i(2, 2, 2)]
    for k in (0, 1, 2, 3, 1, 0):
        y, v = numbers(3, seed=k), numbers(3, seed=k + 9)
        z = y.index_put((index[k],), v)
        here = lz.Linearizer(lambda y, v, k=k: y.index_put((index[k],), v).sin()).at(y, v)
        for _ in range(3):
            torch.testing.assert_close(here.jvp_fn(y, v), z * z.cos())


def test_many_entries_left_to_chance_are_refused() -> None:
    count = 1 << 16
    index = torch.zeros(count, dtype=torch.long)
    before = torch.get_num_threads()
    f = lambda v: torch.zeros(3, dtype=F64).index_put((index,), v)  # noqa: E731
    try:
        torch.set_num_threads(2)
        with pytest.raises(lz.errors.UnsupportedError, match="left to chance"):
            lz.Linearizer(f).at(numbers(count)).vjp_fn(numbers(3))
    finally:
        torch.set_num_threads(before)
    constant = lz.Linearizer(lambda x: (x * 1).index_put((index,), torch.ones((), dtype=F64)))
    assert constant.at(numbers(3)).jvp_fn(torch.ones(3, dtype=F64)).tolist() == [0, 1, 1]


@pytest.mark.parametrize("name", ["index_put", "index_copy", "scatter", "put"])
def test_repeated_writes_into_a_part_are_refused(name: str) -> None:
    def f(y: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        y = y * 1
        part = y[1:3]
        if name == "index_put":
            part[:, i(2, 0, 2)] = v[:2]
        elif name == "index_copy":
            part.index_copy_(1, i(2, 0, 2), v[:2])
        elif name == "scatter":
            part.scatter_(1, torch.tensor([[0, 0, 1], [0, 1, 2]]), v[:2])
        else:
            part.put_(i(0, 0, 3), v[0])
        return y

    with pytest.raises(lz.errors.UnsupportedError, match="repeated indices"):
        lz.Linearizer(f).at(numbers(4, 3), numbers(4, 3)).vjp_fn(numbers(4, 3))


def test_writes_into_a_part_are_right_where_no_place_repeats() -> None:
    def f(y: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        y = y * 1
        y[1:3, i(2, 0)] = v[:2, :2]
        y[0:1].index_put_((i(0, 0),), v[2:4], accumulate=True)
        return y

    here = lz.Linearizer(f).at(numbers(4, 3), numbers(4, 3))
    for seed in range(4):
        dy, dv = numbers(4, 3, seed=seed), numbers(4, 3, seed=seed + 1)
        torch.testing.assert_close(here.jvp_fn(dy, dv), f(dy, dv))
