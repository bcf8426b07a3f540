"""An f that communicates: collectives inside f on 2 and 4 ranks (gloo).

Each collective is held against central differences of f as it is, and against J as one process
would have it: the sums of inner products over all ranks.
"""

import gc
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as fc
import torch.distributed.nn.functional as dnn

import linearize as lz
from linearize.errors import SpaceError, UnsupportedError
from tests.support.ranks import F64, expect, over_all, rand, together

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")


# -- functions --------------------------------------------------------------------------------


def empty(*shape):
    return torch.empty(*shape, dtype=F64)


def functions(rank, world):
    """Give functions of four numbers, each by another collective; beside them, their names."""
    everyone = dist.group.WORLD
    last = world - 1
    split = [1 + r % 2 for r in range(world)]  # how many numbers a rank gets from each

    def uneven(x):
        sent = torch.cat([x.sin()[:n] * (i + 1) for i, n in enumerate(split)])
        own = split[rank]
        return dnn.all_to_all_single(empty(world * own), sent, [own] * world, split) ** 2

    def reduced(x):
        y = dnn.reduce(x.sin(), last)
        return y.cos() * x if rank == last else x * x

    def gathered(x):
        parts = dnn.gather(x.sin(), 0)
        return torch.stack(parts).prod(0) * x if rank == 0 else x * x

    def in_a_loop(x):
        for _ in range(3):
            x = x + 0.1 * torch.sin(dnn.all_reduce(x)) * torch.cat(dnn.all_gather(x)).sum()
        return x

    def averaged(x):
        y = dnn.all_reduce(x * x, dist.ReduceOp.AVG)
        return torch.sin(fc.all_reduce(y * x, "avg", everyone))

    yield ("all_reduce", "all_reduce"), lambda x: torch.sin(dnn.all_reduce(x * x)) * x
    yield ("all_reduce", "all_reduce"), averaged
    yield ("all_gather", "reduce_scatter"), lambda x: torch.cat(dnn.all_gather(x.cos())).sin()
    yield (
        ("reduce_scatter", "all_gather"),
        lambda x: dnn.reduce_scatter(empty(4), [x.sin() * (i + 1) for i in range(world)]) ** 2,
    )
    yield ("broadcast", "reduce"), lambda x: dnn.broadcast(x.sin(), last) * x
    yield ("reduce", "broadcast"), reduced
    yield ("gather", "scatter"), gathered
    yield (
        ("scatter", "gather"),
        lambda x: dnn.scatter([x.sin() * (i + 1) for i in range(world)], last) * x,
    )
    yield (
        ("all_to_all", "all_to_all"),
        lambda x: torch.cat(
            dnn.all_to_all(
                [empty(2) for _ in range(world)], [x[:2].sin() * i for i in range(world)]
            )
        ),
    )
    yield ("all_to_all", "all_to_all"), uneven
    yield ("all_reduce", "all_reduce"), lambda x: fc.all_reduce(x.sin(), "sum", everyone) * x
    yield (
        ("all_gather", "reduce_scatter"),
        lambda x: fc.all_gather_single_autograd(x.cos()[None], 0, everyone).sin(),
    )
    yield (
        ("reduce_scatter", "all_gather"),
        lambda x: fc.reduce_scatter_single_autograd(x.cos().repeat(world), "sum", 0, everyone) * x,
    )
    yield (
        ("all_to_all", "all_to_all"),
        lambda x: fc.wait_tensor(
            fc.all_to_all_single_autograd(x.cos(), None, None, everyone)
        ).sin(),
    )
    yield ("all_gather", "reduce_scatter"), in_a_loop


def differences(f, x, v, step=1e-6):
    with torch.no_grad():
        return (f(x + step * v) - f(x - step * v)) / (2 * step)


# -- scenes -----------------------------------------------------------------------------------


def each_collective(rank, world):
    for names, f in functions(rank, world):
        runs = []
        lin = lz.Linearizer(lambda x, f=f, runs=runs: runs.append(1) or f(x))
        for point in range(2):
            x, v = rand(4, seed=7 * point + rank), rand(4, seed=20 + rank)
            here = lin.at(x)
            expected = differences(f, x, v)
            u = rand(*expected.shape, seed=30 + rank)
            back = here.vjp_fn(u)[0]
            torch.testing.assert_close(over_all(back @ v), over_all(u.ravel() @ expected.ravel()))
            for _ in range(2 if point else 6):
                torch.testing.assert_close(here.jvp_fn(v), expected)
                torch.testing.assert_close(here.vjp_fn(u)[0], back)
            forward = here.jvp_fn(v)
            for _ in range(2):
                many = here.jvp_fn.batched(torch.stack([v, -2 * v, 0 * v]))
                torch.testing.assert_close(many, torch.stack([forward, -2 * forward, 0 * forward]))
                (many,) = here.vjp_fn.batched(torch.stack([u, -2 * u]))
                torch.testing.assert_close(many, torch.stack([back, -2 * back]))
            assert here.jvp_fn(None).eq(0).all()
            torch.testing.assert_close(here.jacobian.gram() @ v, here.vjp_fn(forward)[0])
            here.check()
        assert len(runs) == 2
        assert lin.stats().reused == 1
        forth, back = (str(p) for p in (here.program.pushforward, here.program.pullback))
        assert f"= {names[0]}(" in forth
        assert f"= {names[1]}(" in back


def one_process(rank, world):
    """Linearize all ranks' parts as one function, and take each rank's rows and columns."""
    parts = [rand(3, seed=r) for r in range(world)]
    x = torch.cat(parts)

    def whole(x):
        y = x
        for k in range(3):
            y = torch.sin(y) * y.square().sum() + y.roll(1) * (k + 1)
        return y

    def own(part):
        y = part
        for k in range(3):
            norm = dnn.all_reduce(y.square().sum())
            everything = torch.cat(dnn.all_gather(y))
            rolled = everything.roll(1)[3 * rank : 3 * rank + 3]
            y = torch.sin(y) * norm + rolled * (k + 1)
        return y

    J = torch.autograd.functional.jacobian(whole, x)
    mine = slice(3 * rank, 3 * rank + 3)
    here = lz.Linearizer(own).at(parts[rank])
    v, u = rand(3 * world, seed=50), rand(3 * world, seed=51)
    for _ in range(8):
        torch.testing.assert_close(here.jvp_fn(v[mine]), (J @ v)[mine], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(
            here.vjp_fn(u[mine])[0], (J.T @ u)[mine], rtol=1e-10, atol=1e-10
        )
    # A product is a function too: its derivative is the other product.
    w = v[mine].clone().requires_grad_()
    (grad,) = torch.autograd.grad(here.jvp_fn(w), w, u[mine])
    torch.testing.assert_close(grad, (J.T @ u)[mine])


class Ring(torch.autograd.Function):
    """Hands the last number on to the next rank, by a jvp and a backward of its own."""

    @staticmethod
    def forward(x):
        return send_around(x[-1:], +1)

    @staticmethod
    def jvp(ctx, v):
        return send_around(v[-1:], +1)

    @staticmethod
    def backward(ctx, u):
        return torch.cat([u.new_zeros(3), send_around(u, -1)])

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass


def send_around(t, step):
    rank, world = dist.get_rank(), dist.get_world_size()
    got = torch.empty_like(t)
    sent = dist.isend(t.contiguous(), (rank + step) % world)
    received = dist.irecv(got, (rank - step) % world)
    sent.wait(), received.wait()
    return got


def of_its_own(rank, world):
    """A Function that communicates by its own methods, beside collectives and integers."""

    def f(x):
        count = torch.tensor([4 + rank])
        dist.all_reduce(count, dist.ReduceOp.MAX)  # not differentiable: it just runs
        assert count == 4 + world - 1
        return torch.cat([Ring.apply(x.sin()), dnn.all_reduce(x * x)]) ** 2

    x, v, u = rand(4, seed=rank), rand(4, seed=10 + rank), rand(5, seed=20 + rank)
    here = lz.Linearizer(f).at(x)
    expected = differences(f, x, v)
    for _ in range(5):
        torch.testing.assert_close(here.jvp_fn(v), expected)
        back = here.vjp_fn(u)[0]
        torch.testing.assert_close(over_all(back @ v), over_all(u @ expected))


def different_graphs(rank, world):
    """Ranks compute different things around their collectives, and use them or not."""

    def f(x):
        a = dnn.all_reduce(x.sin())
        b = dnn.all_gather(x.cos())
        c = dnn.all_reduce(x * 2)
        if rank == 0:
            return c * x + b[1] * a  # in another order than elsewhere
        if rank == 1:
            return x * 3  # gives to the others, takes nothing
        return a + b[0] * x

    x, v, u = rand(4, seed=rank), rand(4, seed=10 + rank), rand(4, seed=20 + rank)
    for simplify in (True, False):
        here = lz.Linearizer(f, simplify=simplify).at(x)
        expected = differences(f, x, v)
        for _ in range(5):
            torch.testing.assert_close(here.jvp_fn(v), expected)
            back = here.vjp_fn(u)[0]
            torch.testing.assert_close(over_all(back @ v), over_all(u @ expected))
        many = here.jvp_fn.batched(torch.stack([v, 2 * v]))
        torch.testing.assert_close(many, torch.stack([expected, 2 * expected]))
        counts = {p: str(p).count("= all_") for p in (here.program.pushforward,)}
        assert set(counts.values()) == {3}


def groups(rank, world):
    """Rows and columns of a grid of four ranks, and a group that not all belong to."""
    rows = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    columns = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    row, column = rows[rank // 2], columns[rank % 2]

    def f(x):
        y = dnn.all_reduce(x.sin(), group=row)
        return torch.cat(dnn.all_gather(y * x, group=column)).cos()

    x, v = rand(4, seed=rank), rand(4, seed=10 + rank)
    here = lz.Linearizer(f, check="always").at(x)
    expected = differences(f, x, v)
    u = rand(*expected.shape, seed=20 + rank)
    for _ in range(6):
        torch.testing.assert_close(here.jvp_fn(v), expected)
        back = here.vjp_fn(u)[0]
        torch.testing.assert_close(over_all(back @ v), over_all(u @ expected))
    if rank // 2 == 1:  # two ranks go on without the others
        there = lz.Linearizer(lambda x: dnn.broadcast(x.sin(), 2, group=row) * x).at(x)
        torch.testing.assert_close(
            there.jvp_fn(v),
            differences(lambda x: dnn.broadcast(x.sin(), 2, group=row) * x, x, v),
        )
    expect(
        f"rank {world - 1}: StalenessError" if rank % 2 else f"rank {world - 1}",
        lambda: stale(f, x, v, rank == world - 1),
    )


def stale(f, x, v, here_too):
    """Linearize, change a residual in place on one rank, and ask for a product."""
    weight = torch.ones(4, dtype=F64)
    here = lz.Linearizer(lambda x: f(x * weight)).at(x)
    here.jvp_fn(v)
    if here_too:
        weight.mul_(2)
    return here.jvp_fn(v)


class Fails(torch.autograd.Function):
    """Fails in its jvp when it is told to."""

    told = False

    @staticmethod
    def forward(x):
        return x * 2

    @staticmethod
    def jvp(ctx, v):
        if Fails.told:
            raise ValueError("no luck")
        return v * 2

    @staticmethod
    def backward(ctx, u):
        return u * 2

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass


def failures(rank, world):
    """One rank fails at each stage: all get the error, and go on with the same group."""
    bad = rank == world - 1
    last = f"rank {world - 1}: "
    x, v = rand(4, seed=rank), rand(4, seed=10 + rank)

    def f(x):
        y = dnn.all_reduce(x.sin())
        y = Fails.apply(y * x)
        return torch.cat(dnn.all_gather(y)) * dnn.all_reduce(y.sum())

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
        Fails.told = bad
        expect(last + "ValueError: no luck", lambda: here.jvp_fn(v))
        expect(last + "ValueError: no luck", lambda: here.jvp_fn.batched(torch.stack([v, v])))
        Fails.told = False
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


def many_products(rank, world):
    """Thousands of products: nothing grows, nothing is left pending."""
    x, v = rand(4, seed=rank), rand(4, seed=10 + rank)
    here = lz.Linearizer(lambda x: dnn.all_reduce(x.sin()) * x).at(x)
    u = rand(4, seed=20 + rank)
    expected = differences(lambda x: dnn.all_reduce(x.sin()) * x, x, v)
    sizes = []
    for round_ in range(5):
        for _ in range(1000):
            forward, (back,) = here.jvp_fn(v), here.vjp_fn(u)
        torch.testing.assert_close(forward, expected)
        torch.testing.assert_close(over_all(back @ v), over_all(u @ expected))
        gc.collect()
        sizes.append(len(gc.get_objects()))
        if rank == 0:
            print(round_, sizes[-1])
    assert sizes[-1] - sizes[1] < 100


# -- tests ------------------------------------------------------------------------------------

SCENES = each_collective, one_process, of_its_own, different_graphs, failures, failure_in_f


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("scene", SCENES, ids=lambda s: s.__name__)
def test_ranks(scene, world, tmp_path):
    together(world, tmp_path, scene)


def test_groups(tmp_path):
    together(4, tmp_path, groups)


@pytest.mark.slow
def test_ten_thousand_products(tmp_path):
    together(2, tmp_path, many_products, seconds=500)
