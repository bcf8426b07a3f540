"""Small Jacobians as matrices: when they take over, and that nobody notices but by the price."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch.autograd import Function
from torch.autograd.functional import jacobian

import linearize as lz
from benchmarks.cases import transformer
from linearize._execute.thresholds import MATRIX_FROM as LEAST
from linearize._forms import dense as _dense
from linearize._programs.price import matrix_price, price
from linearize._programs.program import Emitter, Program
from linearize._programs.values import Var
from linearize._reuse.shared import SHARED
from linearize._reuse.structure import PROVED
from linearize._spaces.space import TensorSpec
from linearize._transpose.transpose import transpose
from linearize.errors import OptionError, StalenessError

N = 24
X = torch.linspace(-1, 1, N, dtype=torch.float64)
V = torch.linspace(1, 2, N, dtype=torch.float64).cos()


def steps(x: torch.Tensor) -> torch.Tensor:
    """Some steps of an explicit scheme: a long program with a small Jacobian."""
    for _ in range(10):
        x = x + 0.1 * (x.roll(1) - 2 * x + x.roll(-1)) - 0.05 * x * (x - x.roll(1))
    return x


J = jacobian(steps, X)


def is_matrix(program: Any) -> bool:
    return any(eq.name == "mv" for eq in program.equations)


def test_the_matrix_takes_over_in_both_directions() -> None:
    runs = 0

    def f(x: torch.Tensor) -> torch.Tensor:
        nonlocal runs
        runs += 1
        return steps(x)

    lin = lz.Linearizer(f)
    here = lin.at(X)
    for k in range(LEAST - 1):
        torch.testing.assert_close(here.jvp_fn(V + k), J @ (V + k))
    assert not is_matrix(here.program.pushforward)
    assert lin.stats().dense == 0
    for k in range(4):
        torch.testing.assert_close(here.jvp_fn(V + k), J @ (V + k))
        torch.testing.assert_close(here.vjp_fn(V + k)[0], J.T @ (V + k))
    for k in range(4):
        torch.testing.assert_close(here.vjp_fn(V + k)[0], J.T @ (V + k))
    assert is_matrix(here.program.pushforward)
    assert is_matrix(here.program.pullback)
    assert "matrix of pushforward" in str(here.program)
    assert lin.stats().dense == 1
    # One matrix for both.
    (forth,), (back,) = (p.residuals() for p in (here.program.pushforward, here.program.pullback))
    assert forth.tensor.data_ptr() == back.tensor.data_ptr()
    assert runs == 1
    # The next point need not find out again that the matrix is worth it.
    there = lin.at(X + 1)
    other = jacobian(steps, X + 1)
    for k in range(LEAST // 2 + 4):
        torch.testing.assert_close(there.jvp_fn(V + k), other @ (V + k))
        torch.testing.assert_close(there.vjp_fn(V + k)[0], other.T @ (V + k))
    assert is_matrix(there.program.pushforward)
    assert is_matrix(there.program.pullback)
    assert lin.stats().dense == 2
    # Nor does it write the matrix out before as many products were asked for as that costs.
    few = lin.at(X + 2)
    for k in range(5):
        few.jvp_fn(V + k)
    assert not is_matrix(few.program.pushforward)


def test_a_matrix_that_is_there_is_used() -> None:
    lin = lz.Linearizer(steps)
    here = lin.at(X)
    torch.testing.assert_close(here.jacobian.materialize(), J)
    for k in range(5):
        torch.testing.assert_close(here.jvp_fn(V + k), J @ (V + k))
        torch.testing.assert_close(here.vjp_fn(V + k)[0], J.T @ (V + k))
    assert lin.stats().dense == 1
    assert is_matrix(here.program.pushforward)
    assert is_matrix(here.program.pullback)


@pytest.mark.parametrize("products", [40, 200])
def test_no_clock_decides(products: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs give the same bits, whatever time they take."""

    def clock(*_: Any) -> Any:
        raise AssertionError("somebody looks at the clock")

    for name in ("time", "perf_counter", "monotonic", "process_time"):
        monkeypatch.setattr(f"time.{name}", clock)

    def run() -> list[torch.Tensor]:
        SHARED.clear()  # as at the start of a process
        PROVED.clear()
        lin = lz.Linearizer(steps)
        found = []
        for point in range(3):
            here = lin.at(X + point)
            for k in range(products):
                found += [here.jvp_fn(V + k), here.vjp_fn(V - k)[0]]
        return found

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


def used(f: Any, *primals: Any, **options: Any) -> tuple[lz.Linearizer, lz.Linearization]:
    """Return a point after many products."""
    lin = lz.Linearizer(f, **options)
    here = lin.at(*primals)
    cotangent = torch.utils._pytree.tree_map(torch.ones_like, here.value)
    for _ in range(LEAST + 4):
        here.vjp_fn(cotangent)
        here.jvp_fn(*primals)
    return lin, here


@pytest.mark.parametrize(
    "options", [{"dense_limit": 0}, {"dense_limit": None}, {"dense_limit": N * N * 8 - 1}]
)
def test_never_above_the_limit(options: Any) -> None:
    lin, here = used(steps, X, **options)
    assert lin.stats().dense == 0
    assert not is_matrix(here.program.pushforward)


def test_programs_as_recorded_stay_as_recorded() -> None:
    assert used(steps, X, simplify=False)[0].stats().dense == 0


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(OptionError, match="dense_limit must not be negative"):
        lz.Linearizer(steps, dense_limit=-1)


def test_a_matrix_that_costs_more_is_not_taken() -> None:
    """One multiplication, of 400 numbers, and a matrix of 160,000."""

    def f(x: torch.Tensor) -> torch.Tensor:
        return x.sin().flip(0)

    x = torch.linspace(0, 1, 400, dtype=torch.float64)
    here = lz.Linearizer(f).at(x)
    for k in range(210):
        v = x + k
        torch.testing.assert_close(here.jvp_fn(v), (x.cos() * v).flip(0))
    assert not is_matrix(here.program.pushforward)


def test_the_rule_is_as_said() -> None:
    """Prices on paper: what takes 0.7 of them is taken, what takes more is not."""
    spec = TensorSpec((40,), torch.float64, X.device)
    made = _dense.Dense.of([spec], [spec], 1 << 20, lambda: None, transpose)
    assert made is not None

    def program(count: int) -> Program:
        v = first = Var(spec)
        e = Emitter()
        for _ in range(count):
            v = e.emit(torch.ops.aten.neg.default, (v,), spec)
        return Program([first], e.equations, [v], [spec])

    pays = [made.pays(program(n)) for n in range(1, 9)]
    assert pays == sorted(pays)  # from some length on
    at = pays.index(True) + 1
    matrix = matrix_price(made.spec)
    assert matrix <= 0.7 * price(program(at))
    assert matrix > 0.7 * price(program(at - 1))


def test_long_vectors_wait_for_half_the_rows() -> None:
    spec = TensorSpec((300,), torch.float32, X.device)
    wide = TensorSpec((500,), torch.float32, X.device)
    made = _dense.Dense.of([wide], [spec], 1 << 20, lambda: None, transpose)
    assert made is not None
    assert made.due == 150
    assert made.spec.shape == (300, 500)


def test_a_wrong_matrix_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = _dense._columns
    monkeypatch.setattr(_dense, "_columns", lambda *args: 1.001 * columns(*args))
    lin, here = used(steps, X)
    torch.testing.assert_close(here.jvp_fn(V), J @ V)
    torch.testing.assert_close(here.vjp_fn(V)[0], J.T @ V)
    assert lin.stats().dense == 0


class Twice(Function):
    """2x, counting the calls of its methods."""

    calls: ClassVar[list[str]] = []

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        Twice.calls.append("backward")
        return 2 * grad

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor) -> torch.Tensor:
        Twice.calls.append("jvp")
        return 2 * tangent


def test_custom_functions_are_called_once_for_each_product() -> None:
    Twice.calls = []
    lin, _ = used(lambda x: Twice.apply(steps(x)), X)
    assert lin.stats().dense == 0
    assert Twice.calls == ["backward", "jvp"] * (LEAST + 4)


def test_several_primals_and_outputs() -> None:
    def f(x: torch.Tensor, y: torch.Tensor) -> Any:
        z = steps(x) + steps(y).sum()
        return {"sum": z.sum(), "part": steps(z[:5]).reshape(5, 1), "same": x * 1}

    y = torch.linspace(0, 1, 3, dtype=torch.float64)
    lin, here = used(f, X, y)
    assert lin.stats().dense == 1
    blocks = jacobian(lambda *a: tuple(f(*a).values()), (X, y))
    dy = y.cos()
    got = here.jvp_fn(V, dy)
    for (name, t), (by_x, by_y) in zip(got.items(), blocks, strict=True):
        torch.testing.assert_close(t, by_x @ V + by_y @ dy, msg=name)
    part = here.jvp_fn(None, dy)
    torch.testing.assert_close(part["sum"], blocks[0][1] @ dy)
    u = {"sum": torch.tensor(2.0).double(), "part": y[:, None].repeat(2, 1)[:5], "same": V}
    expected = [
        sum((b.T.flatten(1) @ u[k].flatten()) if k == "same" else
            torch.tensordot(u[k], b, u[k].dim()) for k, b in zip(u, column, strict=True))
        for column in zip(*blocks, strict=True)
    ]  # fmt: skip
    for a, b in zip(here.vjp_fn(u), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_wide_and_tall_from_either_side() -> None:
    def wide(x: torch.Tensor) -> torch.Tensor:
        return steps(x)[:3] * steps(x)[3:6]

    lin, here = used(wide, X)
    assert lin.stats().dense == 1
    torch.testing.assert_close(here.jvp_fn(V), jacobian(wide, X) @ V)
    torch.testing.assert_close(here.vjp_fn(V[:3])[0], jacobian(wide, X).T @ V[:3])

    def tall(x: torch.Tensor) -> torch.Tensor:
        return steps(torch.cat([x, x * x, x.sin()]))

    lin, here = used(tall, X[:4])
    assert lin.stats().dense == 1
    torch.testing.assert_close(here.jvp_fn(V[:4]), jacobian(tall, X[:4]) @ V[:4])


def test_complex_numbers_that_are_conjugated() -> None:
    """The derivative is linear over the real numbers only."""

    def f(z: torch.Tensor) -> torch.Tensor:
        for _ in range(8):
            z = z + 0.1 * z.conj() * z.roll(1) + 0.1 * z.roll(-1)
        return z

    z = torch.complex(X, X.cos())
    lin, here = used(f, z)
    assert lin.stats().dense == 1
    eps = 1e-6
    v = torch.complex(V, V.sin())
    torch.testing.assert_close(
        here.jvp_fn(v), (f(z + eps * v) - f(z - eps * v)) / (2 * eps), rtol=1e-7, atol=1e-7
    )
    w = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(f(w), w, v)
    torch.testing.assert_close(here.vjp_fn(v)[0], expected)


def test_batched_mapped_and_differentiated_after_the_takeover() -> None:
    lin, here = used(steps, X)
    assert lin.stats().dense == 1
    rows = torch.stack([V, V + 1, V * V])
    torch.testing.assert_close(here.jvp_fn.batched(rows), rows @ J.T)
    torch.testing.assert_close(torch.vmap(here.jvp_fn)(rows), rows @ J.T)
    torch.testing.assert_close(here.vjp_fn.batched(rows)[0], rows @ J)
    v = V.clone().requires_grad_()
    (grad,) = torch.autograd.grad(here.jvp_fn(v), v, X)
    torch.testing.assert_close(grad, J.T @ X)
    (grad,) = torch.autograd.grad(here.vjp_fn(v)[0], v, X)
    torch.testing.assert_close(grad, J @ X)
    assert not here.jvp_fn(V).requires_grad


def test_a_result_is_the_callers_own() -> None:
    _, here = used(steps, X)
    first = here.jvp_fn(V)
    first.zero_()
    torch.testing.assert_close(here.jvp_fn(V), J @ V)


def test_what_the_program_read_is_still_watched() -> None:
    w = torch.linspace(1, 2, N, dtype=torch.float64)
    lin, here = used(lambda x: steps(x * w), X)
    assert lin.stats().dense == 1
    w.mul_(2)
    with pytest.raises(StalenessError):
        here.jvp_fn(V)
    with pytest.raises(StalenessError):
        here.vjp_fn(V)


def test_the_random_state_is_left_alone() -> None:
    state = torch.get_rng_state()
    assert used(steps, X)[0].stats().dense == 1
    assert torch.equal(state, torch.get_rng_state())


def test_a_gram_product_is_one_matrix() -> None:
    here = lz.Linearizer(steps).at(X)
    normal = here.jacobian.gram()
    for _ in range(LEAST + 4):
        torch.testing.assert_close(normal @ V, J.T @ (J @ V))


def test_single_precision_stays_single() -> None:
    lin, here = used(steps, X.float())
    assert lin.stats().dense == 1
    result = here.jvp_fn(V.float())
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), J @ V, rtol=1e-4, atol=1e-5)
    half = used(steps, X.bfloat16())[0]
    assert half.stats().dense == 0


def test_a_small_layer_of_dear_operations_goes_by_its_matrix() -> None:
    """Normalisations, softmax and small batched products take longer than their launches."""
    case = next(c for c in transformer.CASES if c.size == "small" and "input" in c.name)
    problem = case.make(torch.float32)
    lin = lz.Linearizer(problem.f)
    here = lin.at(*problem.primals)
    (x,) = problem.primals
    for _ in range(x.numel() // 2 + 2):
        got = here.jvp_fn(v := torch.randn_like(x))
    assert lin.stats().dense == 1
    torch.testing.assert_close(got, torch.func.jvp(problem.f, (x,), (v,))[1], rtol=1e-4, atol=1e-4)
