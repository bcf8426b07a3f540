"""An f that communicates: collectives inside f on 2 and 4 ranks (gloo), or NCCL.

Each collective is held against one process that has all parts, where it is a sum or a choice of
tensors, and against central differences of f as it is.
"""

import dataclasses
import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as fc
import torch.distributed.nn.functional as dnn

import linearize as lz
from linearize.errors import MissingDerivativeError, UnsupportedError
from tests.support.ranks import F64, over_all, rand, together

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")
#: As many products as let every form of a program take over.
PRODUCTS = 40


# -- functions --------------------------------------------------------------------------------


def empty(*shape):
    return torch.empty(*shape, dtype=F64)


def flat(got):
    parts = got if isinstance(got, (list, tuple)) else [got]
    return torch.cat([p.reshape(-1) for p in parts])


@dataclasses.dataclass
class Case:
    """A function of four numbers on each rank, with one collective in it."""

    names: tuple[str, str]
    #: What is done by all ranks, and what one process makes of the arguments of all.
    exchange: Callable[[Any], Any]
    whole: Callable[[list[Any]], list[Any]]
    #: What a rank hands in.
    before: Callable[[int, torch.Tensor], Any] = lambda rank, x: x.sin() * (rank + 1)
    #: Who gets something.
    at: Callable[[int], bool] = lambda rank: True

    def own(self, rank, x):
        return self.after(rank, x, self.exchange(self.before(rank, x)))

    def together(self, xs):
        got = self.whole([self.before(rank, x) for rank, x in enumerate(xs)])
        return [self.after(rank, x, g) for rank, (x, g) in enumerate(zip(xs, got, strict=True))]

    def after(self, rank, x, got):
        if not self.at(rank):
            return x * x
        got = flat(got)
        return torch.cat([got.square(), got.sum() * x.cos()])


def cases(rank, world):
    everyone = dist.group.WORLD
    last = world - 1
    split = [1 + r % 2 for r in range(world)]  # how many numbers a rank gets from each
    own = split[rank]

    def several(rank, x):
        return [x[:2].sin() * (rank + i + 1) for i in range(world)]

    def uneven(rank, x):
        return torch.cat([x.sin()[:n] * (i + rank + 1) for i, n in enumerate(split)])

    def summed(factor=1.0):
        return lambda ts: [sum(ts) * factor for _ in ts]

    def stacked(ts):
        return [torch.stack(ts) for _ in ts]

    def scattered(ts, factor=1.0):
        return [sum(t[r] for t in ts) * factor for r in range(world)]

    def in_rows(rank, x):
        return x.cos().repeat(world) * (rank + 1)

    def rows(ts, factor=1.0):
        return scattered([t.chunk(world) for t in ts], factor)

    def swapped(ts):
        return [[t[r] for t in ts] for r in range(world)]

    def swapped_uneven(ts):
        return swapped([t.split(split) for t in ts])

    all_reduce, gather = ("all_reduce", "all_reduce"), ("all_gather", "reduce_scatter")
    scatter, swap = ("reduce_scatter", "all_gather"), ("all_to_all", "all_to_all")
    avg = dist.ReduceOp.AVG
    yield Case(all_reduce, dnn.all_reduce, summed())
    yield Case(all_reduce, lambda t: dnn.all_reduce(t, avg), summed(1 / world))
    yield Case(gather, dnn.all_gather, stacked)
    yield Case(scatter, lambda ts: dnn.reduce_scatter(empty(2), ts), scattered, several)
    yield Case(
        ("broadcast", "reduce"), lambda t: dnn.broadcast(t, last), lambda ts: [ts[last]] * world
    )
    yield Case(
        ("reduce", "broadcast"),
        lambda t: dnn.reduce(t, last),
        summed(),
        at=lambda rank: rank == last,
    )
    yield Case(
        ("gather", "scatter"), lambda t: dnn.gather(t, 0), stacked, at=lambda rank: rank == 0
    )
    yield Case(
        ("scatter", "gather"), lambda ts: dnn.scatter(ts, last), lambda ts: ts[last], several
    )
    yield Case(
        swap, lambda ts: dnn.all_to_all([empty(2) for _ in range(world)], ts), swapped, several
    )
    yield Case(
        swap,
        lambda t: dnn.all_to_all_single(empty(world * own), t, [own] * world, split),
        swapped_uneven,
        uneven,
    )
    # The functional ones, of which the names have changed.
    gathered = named("all_gather_single_autograd", "all_gather_tensor_autograd")
    reduced = named("reduce_scatter_single_autograd", "reduce_scatter_tensor_autograd")
    yield Case(all_reduce, lambda t: fc.all_reduce(t, "sum", everyone), summed())
    yield Case(all_reduce, lambda t: fc.all_reduce(t, "avg", everyone), summed(1 / world))
    yield Case(gather, lambda t: gathered(t, 0, everyone), stacked)
    yield Case(gather, lambda t: gathered(t.reshape(2, 2), 1, everyone), side_by_side)
    yield Case(scatter, lambda t: reduced(t, "sum", 0, everyone), rows, in_rows)
    yield Case(
        swap,
        lambda t: fc.wait_tensor(fc.all_to_all_single_autograd(t, [own] * world, split, everyone)),
        swapped_uneven,
        uneven,
    )


def side_by_side(ts):
    return [torch.cat([t.reshape(2, 2) for t in ts], 1) for _ in ts]


def named(*names):
    return next(getattr(fc, name) for name in names if hasattr(fc, name))


def differences(f, x, v, step=1e-6):
    with torch.no_grad():
        return (f(x + step * v) - f(x - step * v)) / (2 * step)


def near(a, b):
    assert torch.allclose(a, b, rtol=1e-10, atol=1e-10), (a, b)


# -- scenes -----------------------------------------------------------------------------------


def each_collective(rank, world):
    mine = slice(4 * rank, 4 * rank + 4)
    for case in cases(rank, world):
        runs = []
        lin = lz.Linearizer(lambda x, case=case, runs=runs: runs.append(1) or case.own(rank, x))
        for point, products in enumerate((PRODUCTS, 4)):
            x = rand(4 * world, seed=7 * point)
            values = case.together(list(x.split(4)))
            ends = torch.tensor([0, *[len(y) for y in values]]).cumsum(0).tolist()
            rows = slice(ends[rank], ends[rank + 1])
            J = torch.autograd.functional.jacobian(
                lambda x, case=case: torch.cat(case.together(list(x.split(4)))), x
            )
            here = lin.at(x[mine])
            near(here.value, values[rank])
            v, u = rand(4 * world, seed=20), rand(ends[-1], seed=21)
            torch.testing.assert_close(
                here.jvp_fn(v[mine]), differences(partial(case.own, rank), x[mine], v[mine])
            )
            for k in range(products):
                v, u = rand(4 * world, seed=30 + k), rand(ends[-1], seed=90 + k)
                near(here.jvp_fn(v[mine]), (J @ v)[rows])
                near(here.vjp_fn(u[rows])[0], (J.T @ u)[mine])
            for _ in range(3):
                many = here.jvp_fn.batched(torch.stack([v, -2 * v, 0 * v])[:, mine])
                near(many, torch.stack([J @ v, -2 * J @ v, 0 * J @ v])[:, rows])
                (many,) = here.vjp_fn.batched(torch.stack([u, -2 * u])[:, rows])
                near(many, torch.stack([J.T @ u, -2 * J.T @ u])[:, mine])
            assert here.jvp_fn(None).eq(0).all()
            for _ in range(3):
                near(here.jacobian.gram() @ v[mine], (J.T @ (J @ v))[mine])
            here.check()
        assert len(runs) == 2
        assert lin.stats().reused == 1
        forth, back = (str(p) for p in (here.program.pushforward, here.program.pullback))
        assert f"= {case.names[0]}(" in forth
        assert f"= {case.names[1]}(" in back


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
    for _ in range(PRODUCTS):
        near(here.jvp_fn(v[mine]), (J @ v)[mine])
        near(here.vjp_fn(u[mine])[0], (J.T @ u)[mine])
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


class Sum(torch.autograd.Function):
    """Communicates in its backward, and has no jvp."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def backward(ctx, u):
        return over_all(u)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass


class Around(Sum):
    @staticmethod
    def backward(ctx, u):
        return send_around(u, -1)


class FunctionalSum(Sum):
    @staticmethod
    def backward(ctx, u):
        return fc.all_reduce(u, "sum", dist.group.WORLD)


def not_derived(rank, world):
    """What one rank sees of a method that communicates is not the whole of it."""
    x, u = rand(4, seed=rank), rand(4, seed=10 + rank)
    for function, back in (
        (Sum, over_all(u)),
        (FunctionalSum, over_all(u)),
        (Around, send_around(u, -1)),
    ):
        for opaque in ("error", "materialize"):
            alone = lz.Linearizer(function.apply, opaque=opaque).at(x)
            beside = lz.Linearizer(
                lambda x, function=function: dnn.all_reduce(function.apply(x)), opaque=opaque
            ).at(x)
            for here in (alone, beside):
                for _ in range(2):
                    with pytest.raises(MissingDerivativeError, match="communicates with other"):
                        here.jvp_fn(u)
            near(alone.vjp_fn(u)[0], back)


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
        mapped = torch.vmap(here.jvp_fn)(torch.stack([v, 2 * v]))
        torch.testing.assert_close(mapped, torch.stack([expected, 2 * expected]))
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


def dtypes(rank, world):
    """Complex and single numbers, single precision, and what has no derivative."""

    def of_complex(z):
        return dnn.all_reduce(z * z) * z.conj() + torch.cat(dnn.all_gather(z.exp()))[:4]

    def of_number(x):
        count = fc.all_reduce(torch.tensor([rank]), "max", dist.group.WORLD)  # just runs
        everything = [None] * world
        dist.all_gather_object(everything, rank)
        assert int(count) == everything[-1]
        far = torch.stack(dnn.all_gather(x * x)) * dnn.all_reduce(x.detach().exp())
        return far * dnn.broadcast(x.sin(), 0)

    z, v = (torch.complex(rand(4, seed=s + rank), rand(4, seed=s + 7 + rank)) for s in (0, 30))
    number = rand(1, seed=rank)[0], rand(1, seed=9 + rank)[0]
    for f, (x, t) in ((of_complex, (z, v)), (of_number, number)):
        here = lz.Linearizer(f).at(x)
        expected = differences(f, x, t)
        if f is of_number:  # the detached sum is held
            held = dnn.all_reduce(x.exp())
            expected = differences(
                lambda x, held=held: (
                    torch.stack(dnn.all_gather(x * x)) * held * dnn.broadcast(x.sin(), 0)
                ),
                x,
                t,
            )
        u = torch.randn_like(expected)
        for _ in range(5):
            torch.testing.assert_close(here.jvp_fn(t), expected)
            (back,) = here.vjp_fn(u)
            torch.testing.assert_close(
                over_all((back.conj() * t).real.sum()), over_all((u.conj() * expected).real.sum())
            )
    x, v = rand(4, seed=rank).float(), rand(4, seed=9 + rank).float()
    here = lz.Linearizer(lambda x: dnn.all_reduce(x.sin())).at(x)
    torch.testing.assert_close(here.jvp_fn(v), over_all(x.cos() * v))


def refusals(rank, world):
    """What PyTorch's own backward is not right for is refused by name, on all ranks alike."""
    everyone, most = dist.group.WORLD, dist.ReduceOp.MAX
    for word, f in (
        ("all_reduce: a reduction by max", lambda x: dnn.all_reduce(x, most)),
        ("by min", lambda x: dnn.all_reduce(x, dist.ReduceOp.MIN)),
        ("by product", lambda x: dnn.all_reduce(x, dist.ReduceOp.PRODUCT)),
        ("reduce: a reduction by max", lambda x: dnn.reduce(x, 0, most)),
        ("by max", lambda x: fc.all_reduce(x * 1, "max", everyone)),
        ("autograd does not see it", lambda x: dist.all_reduce(x.clone())),
        ("has no derivative", lambda x: fc.broadcast(x * 2, 0, everyone)),
    ):
        with pytest.raises(UnsupportedError, match=word):
            lz.Linearizer(f).at(rand(4, seed=rank)).jvp_fn(rand(4))


def many_products(rank, world):
    """Thousands of products: nothing grows, nothing is left pending."""
    x, v = rand(4, seed=rank), rand(4, seed=10 + rank)
    here = lz.Linearizer(lambda x: dnn.all_reduce(x.sin()) * x).at(x)
    u = rand(4, seed=20 + rank)
    expected = differences(lambda x: dnn.all_reduce(x.sin()) * x, x, v)
    sizes = []
    for _ in range(5):
        for _ in range(1000):
            forward, (back,) = here.jvp_fn(v), here.vjp_fn(u)
        torch.testing.assert_close(forward, expected)
        torch.testing.assert_close(over_all(back @ v), over_all(u @ expected))
        gc.collect()
        sizes.append(len(gc.get_objects()))
    assert sizes[-1] - sizes[1] < 100
    assert torch._C._distributed_c10d._get_work_registry_size() == 0


# -- tests ------------------------------------------------------------------------------------

SCENES = (
    each_collective,
    one_process,
    of_its_own,
    not_derived,
    different_graphs,
    dtypes,
    refusals,
)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("scene", SCENES, ids=lambda s: s.__name__)
def test_ranks(scene, world, tmp_path):
    together(world, tmp_path, scene)


def test_groups(tmp_path):
    together(4, tmp_path, groups)


@pytest.mark.gpu
@pytest.mark.parametrize("scene", [each_collective, one_process, dtypes], ids=lambda s: s.__name__)
def test_nccl(scene, tmp_path):
    together(torch.cuda.device_count(), tmp_path, scene, backend="nccl")


@pytest.mark.slow
def test_ten_thousand_products(tmp_path):
    together(2, tmp_path, many_products, seconds=500)
