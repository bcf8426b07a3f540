"""`linearize.testing.check_linearization`: it passes what is right and names what is not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import linearize as lz
from linearize.errors import CheckFailure, MissingDerivativeError
from linearize.testing import Report, check_linearization
from tests.support.functions import rand


@pytest.fixture(autouse=True)
def random_state() -> Iterator[None]:
    """Seeding in a test must not reach the next one."""
    with torch.random.fork_rng(devices=[]):
        yield


def cube(
    jvp_factor: float = 3.0, backward_factor: float = 3.0, name: str = "Cube", **more: Any
) -> Any:
    """A Function for x³ over NumPy, with derivatives that can be wrong."""

    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.x = x.numpy(force=True).copy()
        return torch.from_numpy(ctx.x**3)

    def jvp(ctx: Any, v: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(jvp_factor * ctx.x**2 * v.numpy(force=True))

    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(backward_factor * ctx.x**2 * g.numpy(force=True))

    members = {"forward": forward, "jvp": jvp, "backward": backward, **more}
    kept = {k: staticmethod(v) for k, v in members.items() if v is not None}
    return type(name, (torch.autograd.Function,), kept)


RIGHT: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "sin": (torch.sin, (rand(3),)),
    "single precision": (torch.sin, (rand(3, dtype=torch.float32),)),
    "tree": (lambda d, n: {"y": d["a"] * d["b"] ** n}, ({"a": rand(2), "b": rand(2)}, 3)),
    "integer leaf": (lambda x, i: (x[i], i), (rand(3), torch.tensor([0, 2]))),
    "complex": (lambda z: z.conj() * z.sum(), (rand(3, dtype=torch.complex64),)),
    "layer norm": (lambda x: F.layer_norm(x, (4,)), (rand(2, 4),)),
    "constant": (lambda x: torch.ones(2).double(), (rand(3),)),
    "large numbers": (lambda x: x**2, (1e6 * rand(3),)),
    "opaque Function": (cube().apply, (rand(3),)),
    # One step of finite differences cannot suit both parameters.
    "sizes apart": (
        lambda p: p[0] / (p[1] + torch.linspace(0.02, 1, 5).double()),
        (torch.tensor([500.0, 0.05]).double(),),
    ),
}


@pytest.mark.filterwarnings("ignore::linearize.errors.IndependenceWarning")
@pytest.mark.parametrize("name", RIGHT)
def test_right_functions_pass(name: str) -> None:
    f, primals = RIGHT[name]
    report = check_linearization(f, *primals)
    assert isinstance(report, Report)
    assert report.runs == 1
    assert report.jvp_error < 1e-5
    assert report.adjoint_error < 1e-8
    assert len(report.functions) == ("Function" in name)


def test_smaller_steps_do_not_excuse_a_wrong_derivative() -> None:
    wrong = cube(jvp_factor=3.0003)
    scale = torch.tensor([1e3, 1e-2, 1.0]).double()
    with pytest.raises(CheckFailure, match=r"Cube\.jvp"):
        check_linearization(lambda x: wrong.apply(x / scale), scale * rand(3))


def test_the_report_lists_functions_in_order() -> None:
    first, second = cube(name="First"), cube(name="Second")
    report = check_linearization(lambda x: second.apply(first.apply(x) * 0.1) + x, rand(3))
    assert report.functions == ("First", "Second")


@pytest.mark.parametrize(
    ("factors", "words"),
    [
        ({"jvp_factor": 2.0}, ["Wrong.jvp"]),
        ({"backward_factor": 2.0}, ["Wrong.backward"]),
        ({"jvp_factor": 2.0, "backward_factor": 2.0}, ["Wrong.jvp", "Wrong.backward"]),
        ({"jvp_factor": -3.0}, ["Wrong.jvp"]),
        ({"jvp_factor": 0.0, "backward_factor": 0.0}, ["Wrong.jvp", "Wrong.backward"]),
        ({"jvp_factor": 3.001}, ["Wrong.jvp"]),
        ({"backward_factor": float("nan")}, ["Wrong.backward"]),
    ],
)
def test_the_function_at_fault_is_named(factors: Any, words: list[str]) -> None:
    wrong, right = cube(name="Wrong", **factors), cube(name="Right")
    with pytest.raises(CheckFailure) as caught:
        check_linearization(lambda x: right.apply(wrong.apply(right.apply(x))), 1 + rand(3) / 9)
    for word in words:
        assert word in str(caught.value)
    assert "Right" not in str(caught.value)
    assert ("Wrong.jvp" in str(caught.value)) == ("Wrong.jvp" in words)
    assert ("Wrong.backward" in str(caught.value)) == ("Wrong.backward" in words)
    assert isinstance(caught.value, AssertionError)


def test_a_wrong_backward_without_jvp_is_named() -> None:
    """J·v then comes from transposing it: both products are wrong, and adjoint."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            return g * ctx.saved_tensors[0].sin()

    with pytest.raises(CheckFailure, match=r"Wrong\.backward"):
        check_linearization(lambda x: Wrong.apply(x * 2), rand(3))


def test_a_straight_through_estimator_is_not_a_derivative() -> None:
    class Round(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.round()

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            return g

    with pytest.raises(CheckFailure, match=r"Round"):
        check_linearization(Round.apply, rand(3))


def test_wrong_in_one_of_several_arguments() -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x, y)
            return x * y

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> Any:
            _, y = ctx.saved_tensors
            return g * y, g * y

    with pytest.raises(CheckFailure, match=r"Wrong\.backward"):
        check_linearization(Wrong.apply, rand(3), rand(3, seed=1))
    check_linearization(lambda x: Wrong.apply(x, torch.full((3,), 2.0).double()), rand(3))


def test_functions_that_are_not_deterministic() -> None:
    with pytest.raises(CheckFailure, match="deterministic"):
        check_linearization(lambda x: x * torch.rand(3).double(), rand(3))


def test_state_that_grows_from_run_to_run() -> None:
    calls = iter(range(1000))
    with pytest.raises(CheckFailure, match="deterministic"):
        check_linearization(lambda x: x + next(calls), rand(3))


def test_a_product_that_changes_when_repeated() -> None:
    class Drifting(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.factor = 1.0
            return x * 1

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            return g

        @staticmethod
        def jvp(ctx: Any, v: torch.Tensor) -> torch.Tensor:
            ctx.factor += 1.0
            return v * (ctx.factor - 1.0)

    with pytest.raises(CheckFailure, match=r"jvp_fn .*second time"):
        check_linearization(Drifting.apply, rand(3))


def test_a_missing_method_is_said_plainly() -> None:
    with pytest.raises(MissingDerivativeError, match="Opaque"):
        check_linearization(cube(name="Opaque", jvp=None).apply, rand(3))
    report = check_linearization(
        cube(name="Opaque", jvp=None).apply, rand(3), opaque="materialize"
    )
    assert report.functions == ("Opaque",)


def test_nothing_outside_is_touched() -> None:
    x = rand(3, dtype=torch.float32).requires_grad_()
    before = x.detach().clone()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()  # noqa: NPY002 - the global one is meant
    check_linearization(lambda x: x**2, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert torch.equal(x, before)
    assert x.grad is None
    assert x.dtype == torch.float32


def test_dtype_none_leaves_primals_as_they_are() -> None:
    seen = set()

    def f(x: torch.Tensor) -> torch.Tensor:
        seen.add(x.dtype)
        return x * 2

    check_linearization(f, rand(3, dtype=torch.float32), dtype=None, rtol=1e-2, step=1e-2)
    assert seen == {torch.float32}
    seen.clear()
    check_linearization(f, rand(3, dtype=torch.float32))
    assert seen == {torch.float64}


def test_errors_of_the_function_itself_come_through() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        check_linearization(f, rand(3))
    with pytest.raises(lz.LinearizeError, match="no differentiable primal"):
        check_linearization(torch.sin, torch.tensor([1]))


def test_nan_in_a_later_result_is_the_fault_of_the_jvp() -> None:
    class Both(torch.autograd.Function):
        @staticmethod
        def forward(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x.sin(), x.cos()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_forward(*inputs)

        @staticmethod
        def jvp(ctx: Any, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            (x,) = ctx.saved_tensors
            return x.cos() * v, torch.full_like(x, torch.nan)

    with pytest.raises(CheckFailure, match=r"J·v differs .* by inf .*Both\.jvp differs"):
        check_linearization(Both.apply, rand(3), opaque="materialize")
