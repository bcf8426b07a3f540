"""Single passes: what they make of programs, and that it is the same map."""

from __future__ import annotations

import gc
import math
import random
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

import linearize as lz
from linearize._execute.binding import BoundProgram
from linearize._execute.executor import runner
from linearize._execute.thresholds import COSTLY_AT
from linearize._programs.program import Emitter, Program
from linearize._programs.residuals import Residual
from linearize._programs.values import Constant, Var
from linearize._simplify.moves import merge_moves
from linearize._simplify.products import scale_products
from linearize._spaces.space import TensorSpec
from linearize._torch.names import aten
from tests.support.comparing import compare
from tests.support.functions import randn

D = torch.float64


def simplified(f: Callable[..., Any], *primals: torch.Tensor) -> tuple[BoundProgram, BoundProgram]:
    """Return both programs as they are run in the end, compared with references on the way."""
    pair = compare(f, *primals).program
    return pair.pushforward, pair.pullback


def names(program: Program | BoundProgram) -> Counter[str]:
    return Counter(eq.name for eq in program.equations)


# -- matrix products ----------------------------------------------------------------------------


def test_layers_by_their_parameters_take_what_a_hand_would_write() -> None:
    x = randn(5, 4)

    def f(w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, w1, b1).tanh(), w2, b2).tanh()

    there, back = simplified(f, randn(3, 4), randn(3), randn(2, 3), randn(2))
    found = names(there)
    assert (found["addmm"], found["mm"], found["mul.Tensor"], found["addcmul"]) == (3, 0, 0, 0)
    found = names(back)
    assert (found["mm"], found["add.Tensor"], found["mul.Tensor"]) == (3, 0, 0)
    # What both directions keep is one copy of what the graph keeps.
    kept = {r.tensor.untyped_storage().data_ptr() for p in (there, back) for r in p.residuals()}
    assert len(kept) <= 5


def test_attention_adds_products_where_they_are_made() -> None:
    there, _ = simplified(
        lambda q, k: (q @ k.mT).softmax(-1) @ q, randn(2, 5, 3), randn(2, 5, 3, seed=1)
    )
    assert names(there)["baddbmm"] == 2
    assert names(there)["add.Tensor"] == 0


def test_a_diagonal_matrix_is_not_multiplied_as_a_matrix() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve(randn(6, 6) + torch.diag(x.exp()), randn(6))

    for program in simplified(f, randn(6)):
        found = names(program)
        assert found["mm"] == found["diagonal_backward"] == found["diagonal"] == 0


@pytest.mark.parametrize(
    "f",
    [
        lambda x: ((x @ randn(3, 3)).t() @ randn(4, 2)).t(),
        lambda x: (x.t() @ x).t() + (x.t() @ x),
        lambda x: 2 * (x @ randn(3, 5)) - (x @ randn(3, 5, seed=1)) / 3 + x.sum(),
        lambda x: (
            torch.baddbmm(x.sum() + torch.zeros(2, 2, 2, dtype=D), *2 * [x.new_ones(2, 2, 2)])
            * x.sum()
        ),
        lambda x: torch.diag(x[:, 0]) @ x + torch.diagonal(x @ x.t()).sum(),
        lambda x: torch.diag_embed(x, 1)[0] @ randn(4, 2),
        lambda x: (x @ randn(3, 4)).diagonal(1) * 2,
    ],
)
def test_products_in_other_places_stay_the_same(f: Callable[..., Any]) -> None:
    simplified(f, randn(4, 3))


def test_transposes_and_permutations_cancel() -> None:
    there, back = simplified(
        lambda x: x.permute(2, 0, 1).mT.permute(1, 2, 0).mT * 3, randn(2, 3, 4)
    )
    for program in (there, back):
        assert len(program.equations) <= 2


def test_copies_are_kept_where_strides_matter() -> None:
    """Circular padding writes through views of its result."""

    def f(x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, (1, 2, 1, 0), mode="circular")

    here = lz.Linearizer(f).at(randn(1, 2, 5, 5))
    eye = torch.eye(96, dtype=D).reshape(96, 1, 2, 6, 8)
    rows = torch.stack([torch.autograd.functional.vjp(f, randn(1, 2, 5, 5), u)[1] for u in eye])
    for turned in (False, True, False, True, True):
        u = randn(1, 2, 6, 8)
        if turned:
            u = u.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
        expected = torch.tensordot(u.flatten(), rows, 1)
        torch.testing.assert_close(here.vjp_fn(u)[0], expected)
    for v in (
        randn(1, 2, 5, 5),
        randn(5, 5, 2, 1).permute(3, 2, 1, 0),
        randn(1, 1, 1, 1).expand(1, 2, 5, 5),
    ):
        torch.testing.assert_close(here.jvp_fn(v), f(v))


# -- reshapes and permutations ------------------------------------------------------------------


def attention(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Attend as `nn.MultiheadAttention` does: the first dimension is the place in the sequence."""
    batch, length, width = x.shape
    y = (x.transpose(0, 1) @ w).unflatten(-1, (3, width)).movedim(-2, 0)
    q, k, v = (y[i].reshape(length, batch * 2, width // 2).transpose(0, 1) for i in range(3))
    p = (q @ k.mT / 3).softmax(-1)
    y = (p @ v).transpose(0, 1).reshape(length * batch, width) @ out
    return x + y.view(length, batch, width).transpose(0, 1)


def test_attention_does_not_go_back_and_forth_between_orders() -> None:
    there, back = simplified(lambda x: attention(x, randn(4, 12), randn(4, 4)), randn(3, 5, 4))
    for program in (there, back):
        found = names(program)
        # What the rows of matrix products are does not matter to them, and the sum is made there.
        assert found["addmm"] == 1
        assert found["add.Tensor"] == 0
    assert len(there.equations) <= 24
    assert len(back.equations) <= 18


def test_attention_by_its_parameters() -> None:
    simplified(lambda w, out: attention(randn(3, 5, 4), w, out), randn(4, 12), randn(4, 4))


def chain_of_moves(seed: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a random chain of reshapes, permutations and matrix products."""

    def f(x: torch.Tensor) -> torch.Tensor:
        draw = random.Random(seed)
        for _ in range(draw.randint(3, 9)):
            kind = draw.choice(["cut", "join", "permute", "one", "product", "batch", "stack"])
            shape = list(x.shape)
            if kind == "cut":
                d = draw.randrange(x.dim())
                for n in (2, 3):
                    if shape[d] % n == 0:
                        shape[d : d + 1] = [shape[d] // n, n]
                        break
                x = x.reshape(shape)
            elif kind == "join" and x.dim() > 1:
                d = draw.randrange(x.dim() - 1)
                x = x.reshape([*shape[:d], shape[d] * shape[d + 1], *shape[d + 2 :]])
            elif kind == "permute":
                x = x.permute(draw.sample(range(x.dim()), x.dim()))
            elif kind == "one":
                x = x.unsqueeze(draw.randrange(x.dim() + 1))
            elif kind == "product":
                n = shape[-1]
                x = (x.reshape(-1, n) @ randn(n, n)).reshape(shape)
            elif kind == "batch" and x.dim() > 2:
                n = shape[-1]
                x = (
                    x.reshape(-1, *shape[-2:])
                    @ randn(1, n, n).expand(math.prod(shape[:-2]), n, n).clone()
                ).reshape(shape)
            elif kind == "stack" and x.numel() < 500:
                x = torch.stack([x.mT, x.mT * 2], draw.randrange(x.dim())) if x.dim() > 1 else x
        return x

    return f


@pytest.mark.parametrize("seed", range(60))
def test_chains_of_moves_stay_the_same(seed: int) -> None:
    """The map is linear: f itself is the reference."""
    f = chain_of_moves(seed)
    x = randn(4, 6, 3)
    here = lz.Linearizer(f, simplify=False).at(x)
    for program, v in ((here.program.pushforward, x), (here.program.pullback, randn(*f(x).shape))):
        numbers = program.numbers()
        moved = merge_moves(program.program, numbers)
        moved.check()
        assert len(moved.equations) <= len(program.equations)
        (got,), (expected,) = runner(BoundProgram.of(moved, numbers))([v]), runner(program)([v])
        torch.testing.assert_close(got, expected)
    simplified(f, x)
    torch.testing.assert_close(lz.Linearizer(f).at(x).jvp_fn(x), f(x))


@pytest.mark.parametrize("of_argument", [False, True])
def test_a_common_factor_of_products_is_multiplied_once(of_argument: bool) -> None:
    e, a, b, x = Emitter(), randn(4, 3), randn(4, 5), randn(6, 4)
    v = Var(TensorSpec.of(x))
    y = v if of_argument else e.emit(aten.cumsum.default, (v, 0), v.spec)
    results = []
    for factor in (a, b):
        spec = TensorSpec.of(x @ factor)
        product = e.emit(aten.mm.default, (y, e.constant(factor)), spec)
        results.append(e.emit(aten.mul.Scalar, (product, 0.5), spec))
    program = Program([v], e.equations, results, [r.spec for r in results])
    scaled = scale_products(program)
    assert names(scaled)["mul.Scalar"] == (2 if of_argument else 1)
    z = x if of_argument else x.cumsum(0)
    for got, factor in zip(runner(BoundProgram.of(scaled, e.numbers))([x]), (a, b), strict=True):
        torch.testing.assert_close(got, z @ factor / 2)


def test_rows_that_repeat_are_not_written_out() -> None:
    """A bias is added by the operation that multiplies; norms scale and shift in one more."""
    x = randn(5, 4)
    there, _ = simplified(
        lambda w, b, g, c: F.layer_norm(F.linear(x, w, b), (3,), g, c),
        randn(3, 4),
        randn(3),
        randn(3, seed=1),
        randn(3, seed=2),
    )
    assert names(there)["expand"] == 0
    assert (names(there)["addmm"], names(there)["addcmul"]) == (1, 1)
    simplified(
        lambda b, c: b.expand(4, 4) @ randn(4, 4) + c[:, None].expand(4, 4), randn(4), randn(4)
    )


# -- rows ---------------------------------------------------------------------------------------

N = 50


def rotate(w: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Turn points around axes, each by its own."""
    angle = ((w * w).sum(-1, keepdim=True) + 1e-12).sqrt()
    axis = w / angle
    across = torch.linalg.cross(axis, p)
    along = axis * (axis * p).sum(-1, keepdim=True)
    return p * angle.cos() + across * angle.sin() + along * (1 - angle.cos())


def project(x: torch.Tensor) -> torch.Tensor:
    a, b = (x[:, :2] / x[:, 2:]).unbind(1)
    r2 = a * a + b * b
    radial = 1 + r2 * (0.1 + r2 * 0.02)
    return torch.stack([a * radial + 0.01 * a * b, b * radial + 0.02 * b * b], 1)


CAMERA = torch.arange(N) % 7
POINT = torch.arange(N) % 20


def reproject(w: torch.Tensor, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return project(rotate(w[CAMERA], x[POINT]) + t[CAMERA] + torch.tensor([0, 0, 9], dtype=D))


def test_what_is_done_row_by_row_becomes_a_matrix_for_each_row() -> None:
    primals = randn(7, 3), randn(7, 3, seed=1), randn(20, 3)
    recorded = lz.Linearizer(reproject, simplify=False).at(*primals)
    assert len(recorded.jvp_fn.program.equations) > 60
    there, back = simplified(reproject, *primals)
    (matrices,) = {r for r in there.residuals() if r.source == "rows"}
    assert {r for r in back.residuals() if r.source == "rows"} == {matrices}
    assert matrices.tensor.shape == (2, 9, N)
    assert len(there.equations) <= 11
    assert len(back.equations) <= 13


def test_matrices_of_rows_are_made_anew_at_each_point() -> None:
    lin = lz.Linearizer(reproject)
    for seed in range(4):
        primals = randn(7, 3, seed=seed), randn(7, 3, seed=seed + 1), randn(20, 3, seed=seed)
        fresh = lz.Linearizer(reproject, simplify=False).at(*primals)
        here = lin.at(*primals)
        for call in range(4):
            v = [randn(*p.shape, seed=10 * seed + call) for p in primals]
            torch.testing.assert_close(here.jvp_fn(*v), fresh.jvp_fn(*v))
            u = randn(N, 2, seed=call)
            torch.testing.assert_close(here.vjp_fn(u), fresh.vjp_fn(u))
    stats = lin.stats()
    assert (stats.recorded, stats.reused) == (1, 3)


@pytest.mark.parametrize("first", ["jvp_fn", "vjp_fn"])
def test_both_directions_keep_the_same_matrices_of_rows(first: str) -> None:
    """At the first point and at later ones, whichever direction comes first."""
    lin = lz.Linearizer(reproject)
    for seed in range(3):
        primals = randn(7, 3, seed=seed), randn(7, 3, seed=seed + 1), randn(20, 3, seed=seed)
        here = lin.at(*primals)
        for call in range(COSTLY_AT + 1):
            v = tuple(randn(*p.shape, seed=call) for p in primals)
            u = randn(N, 2, seed=call)
            calls = {
                "jvp_fn": lambda v=v: here.jvp_fn(*v),  # noqa: B023
                "vjp_fn": lambda u=u: here.vjp_fn(u),  # noqa: B023
            }
            got = {first: calls.pop(first)()}
            got |= {name: call() for name, call in calls.items()}
            _, jv = torch.autograd.functional.jvp(reproject, primals, v)
            _, ju = torch.autograd.functional.vjp(reproject, primals, u)
            torch.testing.assert_close(got["jvp_fn"], jv)
            torch.testing.assert_close(got["vjp_fn"], ju)
        assert rows_of(here.jvp_fn.program) == rows_of(here.vjp_fn.program)
        assert len(rows_of(here.jvp_fn.program)) == 1


def rows_of(program: BoundProgram) -> set[int]:
    return {id(r.tensor) for r in program.residuals() if r.source == "rows"}


def test_matrices_of_rows_are_not_mistaken_for_others_by_chance() -> None:
    """Where nothing turns, what points and shifts do is the same; elsewhere it is not."""
    lin = lz.Linearizer(reproject)
    still = torch.zeros(7, 3, dtype=D), randn(7, 3, seed=1), randn(20, 3)
    turned = randn(7, 3), randn(7, 3, seed=1), randn(20, 3)
    for primals in (still, turned, turned):
        here = lin.at(*primals)
        for call in range(COSTLY_AT + 1):
            v = tuple(randn(*p.shape, seed=call) for p in primals)
            u = randn(N, 2, seed=call)
            _, jv = torch.autograd.functional.jvp(reproject, primals, v)
            _, ju = torch.autograd.functional.vjp(reproject, primals, u)
            torch.testing.assert_close(here.jvp_fn(*v), jv)
            torch.testing.assert_close(here.vjp_fn(u), ju)


ROWS: dict[str, Callable[..., Any]] = {
    "what depends on other rows stays outside": lambda x: project(
        rotate(x, x.roll(1, 0)).cumsum(0) + rotate(x.flip(0), x) + 40
    ),
    "a row's sum goes out beside": lambda x: (project(x + 5), project(x + 5).sum(1), x.sum(0)),
    "matrices shared by all rows": lambda x: project((x @ randn(3, 3)).tanh() @ randn(3, 3) + 5),
    "matrices of each row": lambda x: project(
        (torch.einsum("ni,nj->nij", x, x) @ rotate(x, x + 1)[..., None])[..., 0] + 5
    ),
    "joined and cut": lambda x: project(torch.cat([x[:, 1:], x[:, :1] ** 2], 1) + 5)[:, [1, 0]],
    "dimensions around the first": lambda x: project(x.t().contiguous().t() + 5).t().sin().t(),
    "rows that are also columns": lambda x: x @ x.t() @ project(rotate(x, x) + 5),
    "permuted within the rows": lambda x: (
        (x[:, :, None] * x[:, None, :]).mT.permute(0, 2, 1).sum(2) * x.sum(1, keepdim=True)
        + rotate(x, x)
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows(name: str) -> None:
    simplified(ROWS[name], 0.3 * randn(N, 3))


def test_few_rows_and_wide_rows_are_left_alone() -> None:
    for x in (randn(5, 3), torch.cat([randn(N, 3)] * 20, 1)):
        there, _ = simplified(lambda x: project(rotate(x[:, :3], x[:, -3:]) + 5), 0.3 * x)
        assert any(r.source == "rows" for r in there.residuals()) == (len(x) > 5)


def test_a_changed_residual_of_rows_is_noticed() -> None:
    shift = randn(N, 3)
    here = lz.Linearizer(lambda x: project(rotate(x, shift) + 5)).at(randn(N, 3))
    for _ in range(4):
        here.jvp_fn(randn(N, 3))
    shift.mul_(2)
    with pytest.raises(lz.errors.StalenessError):
        here.jvp_fn(randn(N, 3))


def test_what_is_only_watched_is_not_kept() -> None:
    """Its numbers are freed with their owner; as long as that lives, changes are noticed."""

    def steady(shift: torch.Tensor) -> lz.Linearization:
        here = lz.Linearizer(lambda x: (x * shift).sin() * 3).at(randn(N, 3))
        for _ in range(4):
            here.jvp_fn(randn(N, 3))
            here.vjp_fn(randn(N, 3))
        return here

    shift = randn(N, 3)
    here = steady(shift)
    memory = StorageWeakRef(shift.untyped_storage())
    (entry,) = [t for t in here.residuals() if t.note == "watched"]
    assert (entry.shape, entry.nbytes) == ((N, 3), 0)
    expected = here.jvp_fn(randn(N, 3))
    del shift
    gc.collect()
    assert memory.expired()
    torch.testing.assert_close(here.jvp_fn(randn(N, 3)), expected)

    shift = randn(N, 3)
    here = steady(shift)
    shift.mul_(2)
    for product in (here.jvp_fn, here.vjp_fn):
        with pytest.raises(lz.errors.StalenessError, match=r"\[50,3\].*MulBackward0"):
            product(randn(N, 3))


# -- what both directions keep ------------------------------------------------------------------


def folded(program: BoundProgram) -> set[int]:
    """Return the addresses of the folded diagonals of a program."""
    return {r.tensor.data_ptr() for r in program.residuals() if r.source == "folded diagonals"}


def test_both_directions_keep_the_same_folded_diagonals() -> None:
    """A chain of diagonals is one number for each entry, whoever multiplies by it first."""
    x = randn(5, 4)
    here = lz.Linearizer(lambda x: (x.sin() * 1.1).exp().tanh() @ x.new_ones(4, 2)).at(x)
    for _ in range(5):
        jv, (ju,) = here.jvp_fn(x), here.vjp_fn(randn(5, 2))
    e = (x.sin() * 1.1).exp()
    d = (1 - e.tanh() ** 2) * e * 1.1 * x.cos()
    torch.testing.assert_close(jv, (d * x).sum(1, keepdim=True).expand(5, 2))
    torch.testing.assert_close(ju, d * randn(5, 2).sum(1, keepdim=True))
    assert folded(here.jvp_fn.program) == folded(here.vjp_fn.program)
    assert len(folded(here.jvp_fn.program)) == 1


def test_one_diagonal_is_the_same_tensor_at_later_points_too() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return 3 * F.gelu(x @ x.new_ones(4, 4)) @ x.new_ones(4, 2)

    lin = lz.Linearizer(f)
    for seed in range(3):
        x = randn(5, 4, seed=seed)
        here = lin.at(x)
        for _ in range(5):
            jv, ju = here.jvp_fn(x), here.vjp_fn(randn(5, 2))
        torch.testing.assert_close(jv, torch.autograd.functional.jvp(f, x, x)[1])
        torch.testing.assert_close(ju[0], torch.autograd.functional.vjp(f, x, randn(5, 2))[1])
        assert folded(here.jvp_fn.program) == folded(here.vjp_fn.program)
        assert len(folded(here.jvp_fn.program)) == 1


def test_what_is_equal_at_one_point_is_not_at_another() -> None:
    """Two tensors of the graph are one at the first point; the programs do not rely on it."""

    def f(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a, b = x.tanh(), y.tanh()
        return torch.cat([(3 * a.exp()).cumsum(0), (3 * b.exp()).cumsum(0)])

    lin = lz.Linearizer(f)
    for seeds in ((0, 0), (0, 1), (1, 2)):
        x, y = (randn(5, 4, seed=seed) for seed in seeds)
        here = lin.at(x, y)
        for _ in range(5):
            jv, ju = here.jvp_fn(y, x), here.vjp_fn(randn(10, 4))
        torch.testing.assert_close(jv, torch.autograd.functional.jvp(f, (x, y), (y, x))[1])
        expected = torch.autograd.functional.vjp(f, (x, y), randn(10, 4))[1]
        torch.testing.assert_close(ju, expected)
        assert len(folded(here.jvp_fn.program)) == (1 if seeds[0] == seeds[1] else 2)


def test_small_numbers_are_not_taken_for_equal() -> None:
    a = torch.tensor([1.0, 1e-12, 3e-12], dtype=D)
    b = torch.tensor([1.0, 2e-12, 3e-12], dtype=D)

    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([(x * a * 2).cumsum(0), (x * b * 2).cumsum(0)])

    there, _ = simplified(f, randn(3))
    assert len(folded(there)) == 2


@pytest.mark.parametrize(
    "f",
    [
        lambda x: F.linear(F.linear(x, randn(6, 4)).relu(), randn(3, 6)),
        lambda x: F.max_pool1d((x @ randn(4, 4)).relu(), 2),
    ],
)
def test_a_mask_is_read_where_the_graph_keeps_it(f: Callable[..., Any]) -> None:
    """In another shape, if it stands between reshapes, but not as a tensor of its own."""
    there, back = simplified(f, randn(2, 5, 4))
    masks = []
    for program in (there, back):
        assert not any(r.source == "folded diagonals" for r in program.residuals())
        (mask,) = [eq.args[1] for eq in program.equations if eq.name == "threshold_backward"]
        masks.append(program.numbers()[mask].untyped_storage().data_ptr())
    assert masks[0] == masks[1]


def test_nothing_is_remembered_of_points_that_are_gone() -> None:
    points = []
    for f, primals in (
        (reproject, (randn(7, 3), randn(7, 3, seed=1), randn(20, 3))),
        (lambda x: (x.sin() * 2).exp() @ x.new_ones(4, 2), (randn(3, 4),)),
    ):
        here = lz.Linearizer(f).at(*primals)
        for _ in range(5):
            here.vjp_fn(here.jvp_fn(*primals))
        points.append(here)
    pools = [here.jvp_fn._pool for here in points]
    for pool in pools:
        assert {type(x) for x in pool.values()} == {Constant, Residual}
    kept = [r for pool in pools for r in pool.values() if isinstance(r, Residual)]
    gone = [weakref.ref(x) for x in (*pools, *kept)]
    del here, points, pools, pool, kept
    gc.collect()
    assert all(ref() is None for ref in gone)


def test_long_chains_are_not_remembered_link_by_link() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        for _ in range(500):
            x = x + torch.sin(x) * 1e-4
        return x

    here = lz.Linearizer(f).at(randn(4))
    for _ in range(5):
        here.vjp_fn(here.jvp_fn(randn(4)))
    gc.collect()
    assert len(here.jvp_fn._pool) < 500
