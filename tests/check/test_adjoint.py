"""Programs check themselves: pushforward and pullback are adjoint, or an error names why not."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch.autograd import Function

import linearize as lz
from linearize._check.proof import Proof
from linearize._execute.executor import Executor
from linearize._programs.program import Equation, Program
from linearize._programs.values import Var
from linearize._reuse.structure import PROVED
from linearize._spaces.space import TensorSpec
from linearize._torch.names import aten
from linearize._transpose import rules
from linearize.errors import AdjointError, LinearizeError, OptionError


class Scale(Function):
    """2x, whose methods count their calls; `wrong` makes its jvp another map."""

    calls: ClassVar[list[str]] = []
    wrong = False

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        Scale.calls.append("backward")
        return 2 * grad

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor) -> torch.Tensor:
        Scale.calls.append("jvp")
        return (3 if Scale.wrong else 2) * tangent


class Rounded(Function):
    """A straight-through estimator whose jvp tells the truth."""

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x.round()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(tangent)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    Scale.calls = []
    Scale.wrong = False
    PROVED.clear()  # other tests have functions of the same structure


def broken(monkeypatch: pytest.MonkeyPatch, op: Any) -> None:
    """Give an operation a transpose that is twice the right one."""
    right = rules.rule_for(op)
    assert right is not None

    def twice(e: Any, eq: Any, cts: Any) -> Any:
        return [
            (v, e.emit(aten.mul.Scalar, (ct, 2.0), v.spec)) for v, ct in right(e, eq, cts) or []
        ]

    monkeypatch.setitem(rules._RULES, op, twice)


X = torch.linspace(-1, 1, 6, dtype=torch.float64)
A = torch.linspace(1, 3, 24, dtype=torch.float64).sin().reshape(4, 6)


def test_a_wrong_rule_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, aten.roll.default)
    here = lz.Linearizer(lambda x: (A @ x.sin().roll(1)).cos()).at(X)
    with pytest.raises(AdjointError, match=r"first to part is roll, from RollBackward"):
        here.jvp_fn(X)
    with pytest.raises(AdjointError):  # and no number the next time either
        here.jvp_fn(X)
    here.vjp_fn(torch.ones(4, dtype=torch.float64))


def test_a_wrong_rule_beside_opaque_calls_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, aten.roll.default)
    here = lz.Linearizer(lambda x: Scale.apply(x.sin()).roll(2) * Scale.apply(x)).at(X)
    with pytest.raises(AdjointError, match=r"first to part is roll"):
        here.jvp_fn(X)
    assert Scale.calls == ["jvp", "jvp"]  # for the product, none for the check


def test_never_checks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, aten.roll.default)
    here = lz.Linearizer(lambda x: x.roll(1), check="never").at(X)
    torch.testing.assert_close(here.jvp_fn(X), 2 * X.roll(1))


def test_once_per_structure(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    run = Proof.run
    monkeypatch.setattr(Proof, "run", lambda *args: (runs.append(1), run(*args))[1])
    lin = lz.Linearizer(lambda x: (A @ x.sin()).cos())
    for k in range(4):
        here = lin.at(X + k)
        for _ in range(4):
            here.jvp_fn(X)
            here.vjp_fn(torch.ones(4, dtype=torch.float64))
    assert lin.stats().recorded == 1
    assert len(runs) == 1


def products(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that every run of a program is entered in."""
    found: list[str] = []
    run = Executor.__call__

    def counted(self: Executor, *args: Any, **kwargs: Any) -> Any:
        found.append(self.program.name)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(Executor, "__call__", counted)
    return found


def test_the_check_costs_one_pullback_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = Scale.apply(A @ x.sin()).cos()
        return y * Scale.apply(x).sum()

    names = products(monkeypatch)
    lz.Linearizer(f).at(X).jvp_fn(X)
    assert names == ["pullback", "pushforward"]
    assert Scale.calls == ["jvp", "jvp"]
    lz.Linearizer(f).at(X + 1).jvp_fn(X)
    assert names == ["pullback", "pushforward", "pushforward"]


@pytest.mark.parametrize("v", [torch.zeros(6), torch.ones(6), torch.eye(6)[2]])
def test_a_tangent_that_tells_nothing_is_no_proof(
    monkeypatch: pytest.MonkeyPatch, v: torch.Tensor
) -> None:
    """A roll by the wrong shift moves ones to where they are."""
    right = rules.rule_for(aten.roll.default)

    def again(e: Any, eq: Any, cts: Any) -> Any:
        assert right is not None
        return [
            (x, e.emit(aten.roll.default, (ct, [1]), x.spec)) for x, ct in right(e, eq, cts) or []
        ]

    monkeypatch.setitem(rules._RULES, aten.roll.default, again)
    here = lz.Linearizer(lambda x: x.roll(1).sin()).at(X)
    with pytest.raises(AdjointError, match="first to part is roll"):
        here.jvp_fn(v.double())


def test_batched_first_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, aten.roll.default)
    here = lz.Linearizer(lambda x: x.roll(1).sin()).at(X)
    with pytest.raises(AdjointError):
        here.jvp_fn.batched(torch.stack([X, X]))


def test_some_tangents_first_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, aten.roll.default)
    here = lz.Linearizer(lambda x, y: x.roll(1).sin() + y).at(X, X)
    with pytest.raises(AdjointError):
        here.jvp_fn(None, X)


def test_products_that_go_elsewhere_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, aten.roll.default)
    here = lz.Linearizer(lambda x: x.roll(1).sin()).at(X)
    with pytest.raises(AdjointError):
        here.jacobian.gram() @ X
    with pytest.raises(AdjointError):  # the derivative of a vjp is another pushforward
        here.vjp_fn(X.clone().requires_grad_())[0].sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_a_wrong_rule_is_found_among_many_numbers(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """⟨u, J·v⟩ is small beside ‖u‖·‖J·v‖ where there are many entries."""
    broken(monkeypatch, aten.roll.default)
    x = torch.linspace(-1, 1, 200_000).to(dtype)
    here = lz.Linearizer(lambda x: x.roll(1).sin()).at(x)
    with pytest.raises(AdjointError):
        here.jvp_fn(x)
    with pytest.raises(AdjointError):
        lz.Linearizer(lambda x: x.roll(1).sin()).at(x).jvp_fn.batched(torch.stack([x, x]))


def test_the_random_state_is_left_alone() -> None:
    state = torch.get_rng_state()
    here = lz.Linearizer(lambda x: x.roll(1).sin()).at(X)
    here.jvp_fn.batched(torch.stack([X, X]))
    here.check()
    assert torch.equal(state, torch.get_rng_state())


def test_a_matrix_close_to_singular_passes() -> None:
    n = 30
    i = torch.arange(n, dtype=torch.float32)
    hilbert = 1 / (i[:, None] + i + 1) + 1e-6 * torch.eye(n)

    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve(hilbert * (1 + 0.1 * x), x).sin()

    here = lz.Linearizer(f, check="always").at(torch.linspace(0, 1, n))
    here.jvp_fn(torch.linspace(1, 2, n))
    here.check()


def test_by_default_user_code_is_called_for_products_only() -> None:
    here = lz.Linearizer(lambda x: Scale.apply(x.sin()).exp()).at(X)
    for _ in range(4):
        here.jvp_fn(X)
        here.vjp_fn(X)
    assert Scale.calls == ["jvp", "backward"] * 4


def test_a_wrong_jvp_is_named_at_every_point() -> None:
    lin = lz.Linearizer(lambda x: Scale.apply(x.sin()).exp(), check="always")
    torch.testing.assert_close(lin.at(X).jvp_fn(X), 2 * X.cos() * (2 * X.sin()).exp() * X)
    assert sorted(Scale.calls) == ["backward", "jvp", "jvp"]  # one of each for the check
    Scale.wrong = True
    second = lin.at(X + 1)
    for _ in range(4):
        with pytest.raises(AdjointError, match=r"Scale\.jvp.* not the adjoint of .*Scale\.backw"):
            second.jvp_fn(X)
        with pytest.raises(AdjointError, match="Scale"):
            second.vjp_fn(X)


def test_the_first_function_at_fault_is_named() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return Rounded.apply(Scale.apply(3 * x)) * Rounded.apply(x)  # type: ignore[no-any-return]

    here = lz.Linearizer(f).at(X)
    with pytest.raises(AdjointError, match=r"Rounded\.jvp"):
        here.check()


def test_a_straight_through_estimator_is_left_alone() -> None:
    here = lz.Linearizer(Rounded.apply).at(X)
    for _ in range(4):
        torch.testing.assert_close(here.jvp_fn(X), 0 * X)
        torch.testing.assert_close(here.vjp_fn(X)[0], X)
    with pytest.raises(AdjointError, match=r"Rounded\.jvp"):
        here.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.bfloat16])
def test_right_products_pass(dtype: torch.dtype) -> None:
    x, a = X.to(dtype), A.to(dtype)

    def f(x: torch.Tensor) -> Any:
        y = a @ torch.sin(x)
        # Real-linear, but not complex-linear.
        return y.conj() * y.roll(1), (x * x.abs().mean()).real.sum()

    here = lz.Linearizer(f, check="always").at(x)
    here.check()
    here.jvp_fn(x)


def test_large_terms_that_cancel_pass() -> None:
    big = torch.full((50, 50), 1e9)

    def f(x: torch.Tensor) -> torch.Tensor:
        y = big @ x
        return y + x - y  # what is left of x is rounding

    here = lz.Linearizer(f, simplify=False).at(torch.linspace(0, 1, 50))
    here.jvp_fn(torch.ones(50))
    here.check()


def test_numbers_that_are_not_finite_pass() -> None:
    here = lz.Linearizer(torch.sqrt, check="always").at(torch.tensor([0.0, 1.0]))
    assert here.jvp_fn(torch.tensor([1.0, 1.0])).tolist() == [float("inf"), 0.5]


def test_a_missing_direction_leaves_nothing_to_compare() -> None:
    class OneWay(Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(grad.numpy() * 2)

    here = lz.Linearizer(OneWay.apply, check="always").at(X)
    torch.testing.assert_close(here.vjp_fn(X)[0], 2 * X)


def test_the_option() -> None:
    with pytest.raises(OptionError, match='"structure", "always" or "never"'):
        lz.Linearizer(torch.sin, check="sometimes")  # type: ignore[arg-type]


# -- programs that are not well formed --------------------------------------------------------

SPEC, SHORT = (TensorSpec((n,), torch.float64, torch.device("cpu")) for n in (3, 2))


def doubled(x: Var, y: Var) -> Equation:
    return Equation(aten.add.Tensor, (x, x), {}, (y,), "AddBackward0")


def test_a_variable_that_is_not_defined() -> None:
    a, b, c = Var(SPEC), Var(SPEC), Var(SPEC)
    with pytest.raises(LinearizeError, match=r"equation 0 \(add.Tensor\) reads an undefined"):
        Executor(Program([a], [doubled(b, c), doubled(a, b)], [c], [SPEC]))


def test_a_variable_that_is_defined_twice() -> None:
    a, b = Var(SPEC), Var(SPEC)
    with pytest.raises(
        LinearizeError, match=r"equation 1 \(add.Tensor\) defines a variable again"
    ):
        Executor(Program([a], [doubled(a, b), doubled(a, b)], [b], [SPEC]))
    with pytest.raises(LinearizeError, match="an input stands twice"):
        Executor(Program([a, a], [], [a], [SPEC]))


def test_a_result_outside_of_its_space() -> None:
    a, b = Var(SPEC), Var(SPEC)
    with pytest.raises(LinearizeError, match=r"an output is float64\[3\], expected float64\[2\]"):
        Executor(Program([a], [doubled(a, b)], [b], [SHORT]))
    with pytest.raises(LinearizeError, match="an output is never defined"):
        Executor(Program([a], [], [b], [SPEC]))


def test_a_value_outside_of_its_space() -> None:
    a, b = Var(SPEC), Var(SHORT)
    run = Executor(Program([a], [doubled(a, b)], [b], [SHORT]))
    with pytest.raises(
        LinearizeError, match=r"add.Tensor \(from AddBackward0\) gave float64\[3\]"
    ):
        run([torch.ones(3, dtype=torch.float64)])


def test_modes_see_the_product_only() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        names: ClassVar[list[str]] = []

        def __torch_dispatch__(
            self, op: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.names.append(str(op))
            return op(*args, **(kwargs or {}))

    here = lz.Linearizer(lambda x: A @ x, simplify=False).at(X)
    with Seen():
        here.jvp_fn(X)
    assert Seen.names.count("aten.mv.default") == 1


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_complex_numbers_in_half_precision_are_checked_too() -> None:
    """PyTorch cannot divide them, which weighs the sides of the check."""
    x = torch.linspace(0.5, 2, 5, dtype=torch.float64)
    here = lz.Linearizer(lambda x: (2 * x).chalf()).at(x)
    for _ in range(4):
        torch.testing.assert_close(here.jvp_fn(x), (2 * x).chalf())
        torch.testing.assert_close(here.vjp_fn(x.chalf())[0], 2 * x, rtol=1e-2, atol=1e-2)
    here.check()
