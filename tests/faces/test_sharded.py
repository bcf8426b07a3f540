"""DTensors as primals, values, tangents and cotangents, on 2 and 4 ranks (gloo).

What one process computes of the whole tensors, by `torch.func`, is what they are held against.
"""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call

import linearize as lz
import linearize.distributed as lzd
import linearize.testing
from linearize.errors import DistributedError, SpaceError, StalenessError, UnsupportedError
from tests.support.ranks import F64, rand, together

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")

if dist.is_available():  # a spawned rank imports this module; others do not need DTensors
    with contextlib.suppress(ImportError):
        from torch.distributed.tensor import (
            DTensor,
            Partial,
            Replicate,
            Shard,
            distribute_tensor,
            init_device_mesh,
        )


# -- what is compared -------------------------------------------------------------------------


def full(tree):
    """Return whole tensors in place of DTensors."""
    return torch.utils._pytree.tree_map(
        lambda t: t.full_tensor() if isinstance(t, DTensor) else t, tree
    )


def like(whole, t):
    """Return a whole tensor as one that lies as `t` does."""
    return (
        distribute_tensor(whole, t.device_mesh, t.placements) if isinstance(t, DTensor) else whole
    )


def close(a, b, limit=1e-11):
    off = (full(a) - b).detach().abs().max() / (1 + b.detach().abs().max())
    assert off < limit, float(off)


def agrees(here, f, primals, whole, count=4, f_whole=None):
    """Hold products against those of whole tensors; `primals` say how they lie."""
    f = f_whole or f
    value, back = torch.func.vjp(f, *whole)
    J = torch.func.jacrev(f, tuple(range(len(whole))))(*whole)

    def forth(vs):
        return sum(torch.tensordot(M, v, v.dim()) for M, v in zip(J, vs, strict=True))

    close(here.value, value)
    for k in range(count):
        vs = [rand(*t.shape, seed=7 * k + i) for i, t in enumerate(whole)]
        u = rand(*value.shape, seed=900 + k)
        found = here.jvp_fn(*[like(v, p) for v, p in zip(vs, primals, strict=True)])
        close(found, forth(vs))
        grads = here.vjp_fn(like(u, here.value))
        for g, expected, p in zip(grads, back(u), primals, strict=True):
            close(g, expected)
            if isinstance(p, DTensor):
                assert g.placements == p.placements
                assert g.to_local().shape == p.to_local().shape
        if isinstance(here.value, DTensor):
            assert found.placements == here.value.placements


def two_layers(x, first, bias, second):
    return torch.tanh(x @ first + bias) @ second


WHOLE = [rand(6, 4, seed=1), rand(4, 8, seed=2) / 2, rand(8, seed=3), rand(8, 3, seed=4) / 2]


# -- scenes -----------------------------------------------------------------------------------


def placements_of_every_kind(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    many = {
        "one": [Replicate()] * 4,
        "tensor-parallel": [Replicate(), Shard(1), Shard(0), Shard(0)],
        "data-parallel": [Shard(0), Replicate(), Replicate(), Replicate()],
        "uneven": [Shard(1), Shard(0), Shard(0), Shard(1)],
    }
    for name, places in many.items():
        primals = [distribute_tensor(t, mesh, [p]) for t, p in zip(WHOLE, places, strict=True)]
        runs = []

        def f(*args, runs=runs):
            runs.append(1)
            return two_layers(*args)

        lin = lz.Linearizer(f)
        here = lin.at(*primals)
        agrees(here, two_layers, primals, WHOLE, count=40 if name == "tensor-parallel" else 4)
        assert len(runs) == 1
        here.check()
        there = [p * 1.1 for p in primals]
        agrees(lin.at(*there), two_layers, primals, [1.1 * t for t in WHOLE])
        assert len(runs) == 2
        assert lin.stats().reused == (name != "uneven"), lin.stats()
        said = here.program.explain()
        assert ("no matrix" in said) == ("all_" in said or "all_" in str(here.program))
        assert ("anew at each point" in said) == (name == "uneven")
        close(here.value, two_layers(*WHOLE))


def collectives_of_products(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    places = [Replicate(), Shard(1), Shard(0), Shard(0)]
    primals = [distribute_tensor(t, mesh, [p]) for t, p in zip(WHOLE, places, strict=True)]
    here = lz.Linearizer(two_layers).at(*primals)
    # As many as f has: one sum over the ranks.
    assert str(here.program.pushforward).count("all_reduce(") == 1
    assert str(here.program.pullback).count("all_reduce(") == 1
    primals[1] = distribute_tensor(WHOLE[1], mesh, [Replicate()])
    primals[0] = distribute_tensor(WHOLE[0], mesh, [Shard(0)])
    primals[2:] = [distribute_tensor(t, mesh, [Replicate()]) for t in WHOLE[2:]]
    here = lz.Linearizer(two_layers).at(*primals)
    assert "all_reduce(" not in str(here.program.pushforward)  # each rank its own rows
    assert str(here.program.pullback).count("all_reduce(") == 3  # three parameters


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8, dtype=F64), nn.Linear(8, 5, dtype=F64)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


class Layer(nn.Module):
    """A transformer layer whose heads may be split."""

    def __init__(self, heads=4, width=8):
        super().__init__()
        self.heads, self.size = heads, width // heads

        def linear(a, b):
            return nn.Linear(a, b, dtype=F64)

        self.before, self.between = nn.LayerNorm(width, dtype=F64), nn.LayerNorm(width, dtype=F64)
        self.q, self.k, self.v = linear(width, width), linear(width, width), linear(width, width)
        self.out = linear(width, width)
        self.up, self.down = linear(width, 12), linear(12, width)

    def attend(self, x):
        def split(t):
            return t.unflatten(-1, (-1, self.size)).transpose(1, 2)

        q, k, v = split(self.q(x)), split(self.k(x)), split(self.v(x))
        weights = torch.softmax(q @ k.transpose(-1, -2) / self.size**0.5, -1)
        return self.out((weights @ v).transpose(1, 2).flatten(-2))

    def forward(self, x):
        x = x + self.attend(self.before(x))
        return x + self.down(torch.nn.functional.gelu(self.up(self.between(x))))


def parallel_modules(rank, world):
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (world,))
    torch.manual_seed(0)
    whole = Mlp()
    state = {k: v.detach().clone() for k, v in whole.named_parameters()}
    x = rand(7, 6)

    def f_whole(x, *p):
        return functional_call(whole, dict(zip(state, p, strict=True)), (x,))

    for local in (True, False):  # plain tensors at both ends, or a DTensor at the end
        torch.manual_seed(0)
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel(use_local_output=local)}
        split = parallelize_module(Mlp(), mesh, plan)
        parameters = dict(split.named_parameters())

        def f(x, *p, split=split):
            return functional_call(split, dict(zip(state, p, strict=True)), (x,))

        primals = [x, *(p.detach() for p in parameters.values())]
        here = lz.Linearizer(f).at(*primals)
        assert isinstance(here.value, DTensor) != local
        agrees(
            here, None, primals, [x, *state.values()], count=40 if local else 4, f_whole=f_whole
        )
        here.check()
        lin = lz.Linearizer(split)  # DTensors inside of f only
        for point in (x, 2 * x):
            agrees(lin.at(point), None, [point], [point], f_whole=whole)
        assert lin.stats().reused == 1, (local, lin.stats())


def sequence_parallel(rank, world):
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (world,))
    torch.manual_seed(0)
    whole = Layer()
    torch.manual_seed(0)
    split = Layer()
    names = list(dict(whole.named_parameters()))
    along = Shard(1)  # the sequence

    def col():
        return ColwiseParallel(use_local_output=False)

    def row():
        return RowwiseParallel(output_layouts=along, use_local_output=False)

    split = parallelize_module(
        split,
        mesh,
        {
            "before": SequenceParallel(),
            "between": SequenceParallel(),
            **{name: col() for name in ("q", "k", "v", "up")},
            "out": row(),
            "down": row(),
        },
    )
    x = rand(2, 6, 8)
    inputs = distribute_tensor(x, mesh, [along])

    def call(m):
        return lambda x, *p: functional_call(m, dict(zip(names, p, strict=True)), (x,))

    primals = [inputs, *(p.detach() for p in dict(split.named_parameters()).values())]
    whole_primals = [x, *(p.detach() for p in dict(whole.named_parameters()).values())]
    lin = lz.Linearizer(call(split))
    here = lin.at(*primals)
    agrees(here, None, primals, whole_primals, count=6, f_whole=call(whole))
    agrees(
        lin.at(*[1.1 * p for p in primals]),
        None,
        primals,
        [1.1 * p for p in whole_primals],
        f_whole=call(whole),
    )


def solvers(rank, world):
    """CG and Newton-GMRES, written for tensors, run on DTensors as they are."""
    mesh = init_device_mesh("cpu", (world,))
    x, first, bias, second = (
        distribute_tensor(t, mesh, [p])
        for t, p in zip(WHOLE, [Shard(0), Replicate(), Replicate(), Replicate()], strict=True)
    )

    def f(w):
        return two_layers(x, w, bias, second)

    J = lz.Linearizer(f).at(first).jacobian
    M = torch.func.jacrev(lambda w: two_layers(WHOLE[0], w, *WHOLE[2:]))(WHOLE[1]).reshape(18, 32)
    A = J.gram() + 0.1 * lz.operators.identity(J.in_space)
    b = rand(4, 8, seed=9)
    found = conjugate_gradients(A, like(b, first))
    close(
        found, torch.linalg.solve(M.T @ M + 0.1 * torch.eye(32, dtype=F64), b.ravel()).view(4, 8)
    )
    v, w = like(rand(4, 8, seed=5), first), like(rand(4, 8, seed=6), first)
    close(lzd.dot(J.in_space, v, w), (full(v) * full(w)).sum())
    close(J.in_space.norm(v), full(v).norm())
    drawn = J.in_space.random(torch.Generator().manual_seed(rank))
    close(drawn.to_local(), full(drawn).to(F64))

    start = distribute_tensor(torch.zeros(12, dtype=F64), mesh, [Shard(0)])
    target = distribute_tensor(rand(12, seed=3) / 4, mesh, [Shard(0)])
    mix = distribute_tensor(rand(12, 12, seed=4) / 8, mesh, [Shard(0)])

    def g(x):
        return x + (mix @ torch.sin(x)) - target

    lin, root = lz.Linearizer(g), start
    for _ in range(8):
        here = lin.at(root)
        root = root - gmres(here.jacobian, here.value)
    assert float(here.value.norm().full_tensor()) < 1e-12
    assert lin.stats().recorded == 1


def conjugate_gradients(A, b):
    x = torch.zeros_like(b)
    r, p = b.clone(), b.clone()
    rr = (r * r).sum()
    for _ in range(60):
        Ap = A @ p
        step = rr / (p * Ap).sum()
        x, r = x + step * p, r - step * Ap
        before, rr = rr, (r * r).sum()
        p = r + rr / before * p
        if float(full(rr)) < 1e-26:
            break
    return x


def gmres(A, b, steps=12):
    beta = b.norm()
    basis, columns = [b / beta], []
    for _ in range(steps):
        w = A @ basis[-1]
        column = []
        for q in basis:
            column.append((q * w).sum())
            w = w - column[-1] * q
        column.append(w.norm())
        columns.append([float(full(h)) for h in column])
        if columns[-1][-1] < 1e-12:
            break
        basis.append(w / column[-1])
    H = torch.zeros(len(columns) + 1, len(columns), dtype=F64)
    for j, column in enumerate(columns):
        H[: len(column), j] = torch.tensor(column, dtype=F64)
    right = torch.zeros(len(columns) + 1, 1, dtype=F64)
    right[0] = float(full(beta))
    y = torch.linalg.lstsq(H, right).solution[:, 0]
    return sum(float(c) * q for c, q in zip(y, basis, strict=False))


def trees_batches_and_gradients(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    A, b = rand(6, 4, seed=1), rand(4, seed=2)

    def whole(p):
        y = p["A"] @ p["b"]
        return {"y": y, "n": (y * y).mean(), "own": p["own"] * 2}

    tree = {
        "A": distribute_tensor(A, mesh, [Shard(0)]),
        "b": distribute_tensor(b, mesh, [Replicate()]),
        "own": rand(3, seed=rank),
    }
    here = lz.Linearizer(whole).at(tree)
    assert here.value["n"].placements == (Replicate(),)  # a mean over the ranks is made whole
    V = {"A": rand(5, 6, 4, seed=4), "b": rand(5, 4, seed=5), "own": rand(5, 3, seed=6 + rank)}
    stack = {
        "A": distribute_tensor(V["A"], mesh, [Shard(1)]),
        "b": distribute_tensor(V["b"], mesh, [Replicate()]),
        "own": V["own"],
    }

    def one(v):
        return torch.autograd.functional.jvp(
            lambda A, b: tuple(whole({"A": A, "b": b, "own": b})[k] for k in ("y", "n")),
            (A, b),
            (v["A"], v["b"]),
            create_graph=True,
        )[1]

    each = [one({k: t[i] for k, t in V.items()}) for i in range(5)]
    expected = {k: torch.stack([e[i] for e in each]) for i, k in enumerate(("y", "n"))}
    expected["own"] = 2 * V["own"]
    for size in (None, 2):
        found = here.jvp_fn.batched(stack, chunk_size=size)
        for key in expected:
            close(found[key], expected[key])
        assert found["y"].placements == (Shard(1),)
    assert "float64[6,4] (Shard(dim=0)) on" in repr(here)
    # Tangents are differentiable, and those of other placements are moved.
    v = {k: t[0] for k, t in V.items()}
    mine = {
        "A": distribute_tensor(v["A"], mesh, [Replicate()]).requires_grad_(),
        "b": distribute_tensor(v["b"], mesh, [Replicate()]).requires_grad_(),
        "own": v["own"],
    }
    loss = (here.jvp_fn(mine)["y"] ** 2).sum() + here.jvp_fn(mine)["n"] ** 2
    loss.redistribute(mesh, [Replicate()]).backward()
    v["A"].requires_grad_(), v["b"].requires_grad_()
    (one(v)[0].square().sum() + one(v)[1] ** 2).backward()
    close(mine["A"].grad, v["A"].grad)
    close(mine["b"].grad, v["b"].grad)


def every_option(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    x = distribute_tensor(rand(6, 4), mesh, [Shard(0)])
    w = distribute_tensor(rand(4, 3, seed=2), mesh, [Replicate()])

    def f(x, w):
        return torch.tanh(x @ w)

    whole = [rand(6, 4), rand(4, 3, seed=2)]
    options = [
        {"check": "always"},
        {"check": "never"},
        {"trace": True},
        {"match": "value"},
        {"maxsize": 0, "simplify": False},
        {"has_aux": True},
    ]
    for given in options:
        g = (lambda x, w: (f(x, w), x.shape)) if "has_aux" in given else f
        lin = lz.Linearizer(g, **given)
        here = lin.at(x, w)
        agrees(here, None, [x, w], whole, f_whole=f)
        assert here.nbytes > 0
        assert "all_reduce" in str(here.summary()) or "mm" in str(here.summary())
        assert here.residuals()
        assert lin.at(x, w) is not here  # f runs again: no point is remembered
    with lin.at(x, w) as here:
        v, u = like(rand(6, 4, seed=3), x), like(rand(6, 3, seed=4), here.value)
        one = here.jacobian
        close((one.T @ (one @ (v, w)))[0], full(one.gram() @ (v, w))[0])
        close((2 * one @ (v, w)), 2 * full(here.jvp_fn(v, w)))
        assert here.jvp_fn(v, None).placements == (Shard(0),)
        close(here.jvp_fn(v, None) + here.jvp_fn(None, w), full(here.jvp_fn(v, w)))
        assert u.placements == (Shard(0),)


def refused(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    x = distribute_tensor(rand(6, 4), mesh, [Shard(0)])
    here = lz.Linearizer(torch.sin).at(x)
    everywhere = pytest.raises(SpaceError, match=r"\[6,4\].*Shard")
    with everywhere:
        here.jvp_fn(distribute_tensor(rand(6, 5), mesh, [Shard(0)]))
    with pytest.raises(SpaceError, match="distribute_tensor"):
        here.jvp_fn(rand(6, 4))
    with pytest.raises(SpaceError, match="plain tensor"):
        lz.Linearizer(lambda t: t * 2).at(rand(6)).jvp_fn(
            distribute_tensor(rand(6), mesh, [Shard(0)])
        )
    close(here.jvp_fn(x), full(x).cos() * full(x))  # and it goes on
    if rank == 0:
        with pytest.raises(DistributedError, match="pullback"):
            here.jvp_fn(x)
    else:
        with pytest.raises(DistributedError, match="pushforward"):
            here.vjp_fn(x)
    partial = DTensor.from_local(rand(3), mesh, [Partial()])
    with pytest.raises(UnsupportedError, match="Partial"):
        lz.Linearizer(torch.sin).at(partial)
    with pytest.raises(UnsupportedError, match="rows of the matrix"):
        here.jacobian.materialize()
    with pytest.raises(UnsupportedError, match=r"gathered.*Shard"):
        lzd.gathered(here.jacobian)
    with pytest.raises(UnsupportedError, match="ravel"):
        here.in_space.ravel(x)
    with pytest.raises(SpaceError, match="distribute_tensor"):
        here.jacobian @ rand(12)
    with pytest.raises(UnsupportedError, match="communicates"):
        lz.func.jvp(torch.sin, (x,), (x,))
    with pytest.raises(UnsupportedError, match="check_linearization"):
        lz.testing.check_linearization(torch.sin, x)
    with pytest.raises(UnsupportedError, match="jacobian"):
        lzd.jacobian(torch.sin, x)

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            return t * t

        @staticmethod
        def backward(ctx, g):
            return g

    with pytest.raises(UnsupportedError, match="Square"):
        lz.Linearizer(Square.apply).at(x)

    # A plain tensor that each rank uses in its own way, and is said to be alike.
    y = distribute_tensor(rand(4), mesh, [Replicate()])
    wrong = lz.Linearizer(lambda t: t.to_local() * (1.0 + rank)).at(y)
    with pytest.raises(UnsupportedError, match="grad_placements"):
        wrong.vjp_fn(rand(4))
    right = lz.Linearizer(lambda t: t.to_local(grad_placements=[Partial()]) * (1.0 + rank)).at(y)
    v = rand(4, seed=2)
    close(right.jvp_fn(like(v, y)), (1.0 + rank) * v)
    close(right.vjp_fn(v)[0], sum(1.0 + r for r in range(world)) * v)

    # What was changed in place since.
    t = distribute_tensor(rand(4), mesh, [Shard(0)])
    here = lz.Linearizer(lambda t: t * t).at(t)
    here.jvp_fn(t), here.vjp_fn(t)
    t.add_(1.0)
    with pytest.raises((StalenessError, DistributedError), match="changed in place"):
        here.jvp_fn(t)


def fully_sharded(rank, world):
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))
    model = Mlp()
    fully_shard(model, mesh=mesh)
    with pytest.raises(UnsupportedError, match="fully_shard"):
        lz.Linearizer(model).at(rand(7, 6))
    primals = {k: p.detach() for k, p in model.named_parameters()}
    with pytest.raises(UnsupportedError, match="fully_shard"):
        lz.Linearizer(lambda p: functional_call(model, p, (rand(7, 6),))).at(primals)


def two_dimensions(rank, world):
    """Rows over one dimension of a mesh, features over the other."""
    mesh = init_device_mesh("cpu", (2, world // 2))
    places = [
        [Shard(0), Replicate()],
        [Replicate(), Shard(1)],
        [Replicate(), Shard(0)],
        [Replicate(), Shard(0)],
    ]
    primals = [distribute_tensor(t, mesh, p) for t, p in zip(WHOLE, places, strict=True)]
    lin = lz.Linearizer(two_layers)
    agrees(lin.at(*primals), two_layers, primals, WHOLE, count=8)
    agrees(lin.at(*[p * 1.1 for p in primals]), two_layers, primals, [1.1 * t for t in WHOLE])
    assert lin.stats().reused == 1
    J = lin.at(*primals).jacobian
    v = [
        like(rand(*t.shape, seed=i), p)
        for i, (t, p) in enumerate(zip(WHOLE, primals, strict=True))
    ]
    close(J.in_space.dot(tuple(v), tuple(v)), sum(full(t).square().sum() for t in v))


SCENES = (
    placements_of_every_kind,
    collectives_of_products,
    parallel_modules,
    sequence_parallel,
    solvers,
    trees_batches_and_gradients,
    every_option,
    refused,
    fully_sharded,
)


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_two_ranks(tmp_path, scene):
    together(2, tmp_path, scene)


def test_four_ranks(tmp_path):
    together(4, tmp_path, two_dimensions)
