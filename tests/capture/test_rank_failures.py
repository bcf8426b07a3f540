"""Ranks that fail, at each stage: every rank is told why, nobody hangs, and all go on."""

from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as fc
import torch.distributed.nn.functional as dnn

import linearize as lz
import linearize.distributed as lzd
from linearize.errors import AdjointError, SpaceError, UnsupportedError
from tests.support.ranks import F64, expect, over_all, rand, together

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")


class Fails(torch.autograd.Function):
    """Twice its argument; fails where it is told to."""

    told = ""

    @staticmethod
    def forward(x):
        return x * 2

    @staticmethod
    def jvp(ctx, v):
        if Fails.told == "jvp":
            raise ValueError("no luck")
        return v * (3 if Fails.told == "wrong" else 2)

    @staticmethod
    def backward(ctx, u):
        if Fails.told == "backward":
            raise ValueError("no luck")
        return u * 2

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass


class NoJvp(Fails):
    """Has a backward alone, which cannot be seen through."""

    jvp = torch.autograd.Function.jvp

    @staticmethod
    def backward(ctx, u):
        return torch.from_numpy(2 * u.numpy())


def f(x):
    y = dnn.all_reduce(x.sin())
    y = Fails.apply(y * x)
    return torch.cat(dnn.all_gather(y)) * dnn.all_reduce(y.sum())


def differences(f, x, v, step=1e-6):
    with torch.no_grad():
        return (f(x + step * v) - f(x - step * v)) / (2 * step)


def stale(f, x, v, here_too):
    """Linearize, change a residual in place on one rank, and ask for a product."""
    weight = torch.ones(4, dtype=F64)
    here = lz.Linearizer(lambda x: f(x * weight)).at(x)
    here.jvp_fn(v)
    if here_too:
        weight.mul_(2)
    return here.jvp_fn(v)


def failures(rank, world):
    """One rank fails at each stage: all get the error, and go on with the same group."""
    bad = rank == world - 1
    last = f"rank {world - 1}: "
    x, v = rand(4, seed=rank), rand(4, seed=10 + rank)

    def after_f(x):
        y = f(x)
        if bad:
            raise ValueError("no data")
        return y

    expect(last + "ValueError: no data", lambda: lz.Linearizer(after_f).at(x))
    here = lz.Linearizer(f).at(x)
    expected = differences(f, x, v)
    good = lambda: torch.testing.assert_close(here.jvp_fn(v), expected)  # noqa: E731
    good()
    # An argument that does not fit, before anything else.
    expect(last + "SpaceError", lambda: here.jvp_fn(v[:3] if bad else v))
    good()
    expect(last + "StructureError", lambda: here.vjp_fn(*([None] * (1 + bad))))
    good()
    # A residual that was changed.
    expect(last + "StalenessError", lambda: stale(f, x, v, bad))
    good()
    # User code in the middle of a product, early and late, one vector and several.
    for _ in range(5):
        Fails.told = "jvp" if bad else ""
        expect(last + "ValueError: no luck", lambda: here.jvp_fn(v))
        expect(last + "ValueError: no luck", lambda: here.jvp_fn.batched(torch.stack([v, v])))
        Fails.told = ""
        good()
    # Another product, another point, another number of vectors.
    u = rand(*expected.shape, seed=rank)
    expect("different things", lambda: here.vjp_fn(u) if bad else here.jvp_fn(v))
    good()
    there = lz.Linearizer(f).at(x)
    expect("different things", lambda: (there if bad else here).jvp_fn(v))
    expect("different things", lambda: here.jvp_fn.batched(torch.stack([v] * (2 + bad))))
    good()
    # A linearization that was closed.
    if bad:
        there.close()
    expect(last + "ClosedError", lambda: there.jvp_fn(v))
    # A collective whose argument depends on the primals on some ranks only.
    expect(
        "different things",
        lambda: lz.Linearizer(lambda x: dnn.all_reduce(x.detach() if bad else x) * x).at(x),
    )
    # All ranks alike: each has its own error.
    with pytest.raises(SpaceError):
        here.jvp_fn(v[:3])
    with pytest.raises(UnsupportedError, match="max"):
        lz.Linearizer(lambda x: dnn.all_reduce(x, dist.ReduceOp.MAX)).at(x)
    with pytest.raises(UnsupportedError, match="autograd does not see it"):
        lz.Linearizer(lambda x: dist.all_reduce(x.clone())).at(x)
    with pytest.raises(UnsupportedError, match="has no derivative"):
        lz.Linearizer(lambda x: fc.broadcast(x * 2, 0, dist.group.WORLD)).at(x)
    good()


def failure_in_f(rank, world):
    """A rank fails before its first collective: the others wait for the group's timeout."""
    short = dist.new_group(timeout=timedelta(seconds=3))
    bad = rank == world - 1

    def f(x):
        if bad:
            raise ValueError("no data")
        return dnn.all_reduce(x, group=short)

    if bad:
        with pytest.raises(ValueError, match="no data"):
            lz.Linearizer(f).at(rand(4))
    else:
        expect(f"rank {world - 1}: ValueError: no data", lambda: lz.Linearizer(f).at(rand(4)))
    # PyTorch closes a group at a timeout; with another one all go on.
    x, v = rand(4, seed=rank), rand(4, seed=10 + rank)
    here = lz.Linearizer(lambda x: dnn.all_reduce(x.sin())).at(x)
    torch.testing.assert_close(here.jvp_fn(v), over_all(x.cos() * v))


def first_products(rank, world):
    """A rank fails in its first product, in recording, or lacks a method."""
    bad, last = rank == world - 1, f"rank {world - 1}: "
    x, v = rand(4, seed=rank), rand(4, seed=10 + rank)
    expected = differences(f, x, v)
    for check in ("structure", "always"):
        here = lz.Linearizer(f, check=check).at(x)
        for told in ("jvp", "backward") if check == "always" else ("jvp",):
            Fails.told = told if bad else ""
            expect(last + "ValueError: no luck", partial(here.jvp_fn, v))
        Fails.told = ""
        for _ in range(4):
            torch.testing.assert_close(here.jvp_fn(v), expected)

    def lacks(x):
        return dnn.all_reduce(NoJvp.apply(x) if bad else x.sin()) * x

    for check in ("structure", "always"):
        here = lz.Linearizer(lacks, check=check).at(x)
        back = None
        for _ in range(2):
            expect(last + "MissingDerivativeError", partial(here.jvp_fn, v))
            again = here.vjp_fn(v)[0]  # which can be had
            back = again if back is None else back
            torch.testing.assert_close(again, back)
        torch.testing.assert_close(
            over_all(back @ v), over_all(v @ differences(lacks, x, v)), rtol=1e-6, atol=1e-6
        )
        expect(last + "MissingDerivativeError", here.check)
    here = lz.Linearizer(lacks, opaque="materialize").at(x)
    for _ in range(4):
        torch.testing.assert_close(here.jvp_fn(v), differences(lacks, x, v))


def checks(rank, world):
    """A rank fails in a check, or is the one where the products are not adjoint."""
    bad, last = rank == world - 1, f"rank {world - 1}: "
    x, v = rand(4, seed=rank), rand(4, seed=10 + rank)
    expected = differences(f, x, v)
    here = lz.Linearizer(f).at(x)
    for told in ("jvp", "backward"):
        Fails.told = told if bad else ""
        expect(last + "ValueError: no luck", here.check)
        expect(last + "ValueError: no luck", lambda: lz.testing.check_linearization(f, x))
        Fails.told = ""
        torch.testing.assert_close(here.jvp_fn(v), expected)
    Fails.told = "wrong" if bad else ""
    with pytest.raises(AdjointError, match=r"the first to part is Fails\.jvp"):
        here.check()
    there = lz.Linearizer(f, check="always").at(x)
    for _ in range(3):
        with pytest.raises(AdjointError, match="not adjoint"):
            there.jvp_fn(v)
        Fails.told = ""  # it stays a failure
    here.check()
    lz.testing.check_linearization(f, x)
    torch.testing.assert_close(here.jvp_fn(v), expected)
    expect("different things", lambda: here.check() if bad else here.jvp_fn(v))
    torch.testing.assert_close(here.jvp_fn(v), expected)


def operators(rank, world):
    """An argument that does not fit an operator, on one rank."""
    bad, last = rank == world - 1, f"rank {world - 1}: "
    x, v = rand(4, seed=rank), rand(4, seed=10 + rank)
    here = lz.Linearizer(f).at(x)
    J, u = here.jacobian, rand(len(here.value), seed=20 + rank)
    expected = differences(f, x, v)
    for call in (
        lambda: J @ (v[:3] if bad else v),
        lambda: J @ (v.float() if bad else v),
        lambda: J(v.float() if bad else v),
        lambda: J @ (v[:3, None] if bad else v[:, None]),
        lambda: J.T @ (u[1:] if bad else u),
        lambda: J.gram() @ (v[:3] if bad else v),
        lambda: (2 * J + J) @ (v[:3] if bad else v),
    ):
        expect(last + "SpaceError", call)
        torch.testing.assert_close(J @ v, expected)
    expect(last, lambda: lzd.dot(here.in_space, v[:3] if bad else v, v))
    expect(last, lambda: lzd.norm(here.in_space, v[:3] if bad else v))
    torch.testing.assert_close(lzd.dot(J.out_space, expected, u), over_all(expected @ u))
    with pytest.raises(SpaceError):  # on all alike
        J @ v[:3]
    if bad:
        here.close()
    expect(last + "ClosedError", here.check)


def alike(rank, world):
    """What ranks decide for themselves does not part them: zeros, structures, what is alive."""
    bad = rank == world - 1
    x, y, v = (rand(4, seed=10 * i + rank) for i in range(3))
    zero = torch.zeros_like(v)

    def two(x, y):
        return dnn.all_reduce((x * y).sin()) * x, dnn.all_reduce(y * 2)

    here = lz.Linearizer(two, check="always").at(x, y)
    for k in range(40):
        pair = [None if (k + rank) % 3 == i else v for i in (0, 1)]
        full = [zero if t is None else t for t in pair]
        torch.testing.assert_close(here.jvp_fn(*pair), here.jvp_fn(*full))
        torch.testing.assert_close(here.vjp_fn(tuple(pair)), here.vjp_fn(tuple(full)))

    def of_rank(x, k):
        for _ in range(1 + k * (rank + 1) % 3):
            x = x.sin() * x
        return dnn.all_reduce(x)

    for check in ("structure", "always"):
        lin = lz.Linearizer(of_rank, argnums=0, check=check)
        for k in range(6):
            there = lin.at(x, k)
            expected = differences(lambda x, k=k: of_rank(x, k), x, v)
            for _ in range(4):
                torch.testing.assert_close(there.jvp_fn(v), expected)
                (back,) = there.vjp_fn(v)
                torch.testing.assert_close(over_all(back @ v), over_all(v @ expected))
        there = lz.Linearizer(lambda x: dnn.all_reduce(x.sin()), check=check).at(x)
        jvp_fn = there.jvp_fn
        if bad:
            del there
        for _ in range(4):
            torch.testing.assert_close(jvp_fn(v), over_all(x.cos() * v))


def grid(rank, world):
    """Word of a failure gets from a row of a grid to all others."""
    rows = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    columns = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    row, column = rows[rank // 2], columns[rank % 2]

    def g(x):
        y = dnn.all_reduce(x.sin(), group=row)
        return torch.cat(dnn.all_gather(y * x, group=column)).cos()

    x, v = rand(4, seed=rank), rand(4, seed=10 + rank)
    # The rank in the other row and column knows that there is a failure, and where.
    expect(f"rank {world - 1}", lambda: stale(g, x, v, rank == world - 1))
    torch.testing.assert_close(lz.Linearizer(g).at(x).jvp_fn(v), differences(g, x, v))


# -- tests ------------------------------------------------------------------------------------

SCENES = failures, failure_in_f, first_products, checks, operators, alike


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("scene", SCENES, ids=lambda s: s.__name__)
def test_ranks(scene, world, tmp_path):
    together(world, tmp_path, scene)


def test_grid(tmp_path):
    together(4, tmp_path, grid)
