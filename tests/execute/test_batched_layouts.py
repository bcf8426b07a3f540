"""Products, one or many, of numbers that PyTorch stores conjugated, negated or narrow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import linearize as lz

F64 = torch.float64


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=F64, generator=generator).to(dtype)


def complex_of(x: torch.Tensor) -> torch.Tensor:
    return torch.complex(x, x**2)


CONJUGATED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "conj": lambda x: (complex_of(x).conj() * (1 + 2j)).abs(),
    "imag of conj": lambda x: complex_of(x).conj().imag * 2,
    "real and imag": lambda x: complex_of(x).conj().real * complex_of(x).conj().imag,
    "polar": lambda x: torch.polar(x.exp(), x).conj().imag,
    "hfft": lambda x: torch.fft.hfft(complex_of(x)),
    "ihfft": lambda x: torch.fft.ihfft(x).imag,
    "irfft": lambda x: torch.fft.irfft(complex_of(x).conj()),
    "rfft": lambda x: torch.fft.rfft(x).conj().imag,
    "mH": lambda x: (complex_of(x)[None].mH @ complex_of(x)[None]).imag,
    "view_as_real": lambda x: torch.view_as_real(complex_of(x).conj().resolve_conj()) ** 2,
    "sgn": lambda x: complex_of(x).conj().sgn().imag,
}


@pytest.mark.parametrize("name", CONJUGATED)
def test_products_of_conjugates_one_by_one_and_in_stacks(name: str) -> None:
    f = CONJUGATED[name]
    x = numbers(5).exp()
    jacobian = torch.autograd.functional.jacobian(f, x)
    here = lz.Linearizer(f).at(x)
    flat = jacobian.reshape(-1, 5)
    for seed in range(4):
        v, u = numbers(5, seed=seed), numbers(*here.value.shape, seed=seed + 9)
        torch.testing.assert_close(here.jvp_fn(v).reshape(-1), flat @ v)
        torch.testing.assert_close(here.vjp_fn(u)[0], flat.T @ u.reshape(-1))
    units = torch.eye(len(flat), dtype=F64).reshape(-1, *here.value.shape)
    for chunk in (None, 2):
        torch.testing.assert_close(here.vjp_fn.batched(units, chunk_size=chunk)[0], flat)
        rows = here.jvp_fn.batched(torch.eye(5, dtype=F64), chunk_size=chunk)
        torch.testing.assert_close(rows.reshape(5, -1), flat.T)


@pytest.mark.parametrize("chunk_size", [None, 1, 7])
def test_stacks_of_nothing(chunk_size: int | None) -> None:
    here = lz.Linearizer(lambda x: (x.sin()[:2], x.sum())).at(numbers(3))
    first, second = here.jvp_fn.batched(numbers(0, 3), chunk_size=chunk_size)
    assert first.shape == (0, 2)
    assert second.shape == (0,)
    (back,) = here.vjp_fn.batched((numbers(0, 2), numbers(0)), chunk_size=chunk_size)
    assert back.shape == (0, 3)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "group": lambda: nn.GroupNorm(2, 4),
    "group, no weight": lambda: nn.GroupNorm(2, 4, affine=False),
    "layer": lambda: nn.LayerNorm(3),
    "batch": lambda: nn.BatchNorm1d(4, track_running_stats=False),
    "batch, evaluated": lambda: nn.BatchNorm1d(4).eval(),
    "instance": lambda: nn.InstanceNorm1d(4, affine=True),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("with_parameters", [False, True])
def test_norms_of_narrow_numbers_with_wide_weights(
    name: str, dtype: torch.dtype, with_parameters: bool
) -> None:
    module = NORMS[name]()
    wide = NORMS[name]().double()
    parameters = {k: numbers(*p.shape, seed=3).float() for k, p in module.named_parameters()}
    if with_parameters and not parameters:
        return

    def of(module: nn.Module) -> Any:
        def f(x: torch.Tensor, p: dict[str, torch.Tensor]) -> torch.Tensor:
            return torch.func.functional_call(module, p, (x,))

        return f

    def double(tree: Any) -> Any:
        return {k: t.double() for k, t in tree.items()}

    x, v = numbers(2, 4, 3, dtype=dtype), numbers(2, 4, 3, seed=1, dtype=dtype)
    dp = {k: numbers(*p.shape, seed=5).float() for k, p in parameters.items()}
    if with_parameters:
        here = lz.Linearizer(of(module)).at(x, parameters)
        tangents: tuple[Any, ...] = (v, dp)
    else:
        here = lz.Linearizer(lambda x: of(module)(x, parameters)).at(x)
        tangents = (v,)
        dp = {k: torch.zeros_like(p) for k, p in dp.items()}
    want = torch.func.jvp(of(wide), (x.double(), double(parameters)), (v.double(), double(dp)))[1]
    u = numbers(2, 4, 3, seed=8, dtype=dtype)
    back = torch.func.vjp(of(wide), x.double(), double(parameters))[1](u.double())
    tol = {"rtol": 0.05, "atol": 0.05}
    for _ in range(4):
        torch.testing.assert_close(here.jvp_fn(*tangents).double(), want, **tol)
        got = here.vjp_fn(u)
        torch.testing.assert_close(got[0].double(), back[0], **tol)
        for k in parameters if with_parameters else ():
            torch.testing.assert_close(got[1][k].double(), back[1][k], **tol)


class Plain(torch.Tensor):
    """A subclass that does nothing of its own."""


class Noting(torch.Tensor):
    seen: list[str] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(getattr(func, "__name__", ""))
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("kind", [Plain, Noting, nn.Parameter])
def test_products_at_points_of_a_subclass_are_plain_tensors(kind: Any) -> None:
    lin = lz.Linearizer(lambda x: x.sin() * x.sum() / x.exp())
    v = numbers(3, seed=1)
    for shift in (0.0, 1.0, 2.0):
        x = numbers(3) + shift
        want = torch.func.jvp(lambda x: x.sin() * x.sum() / x.exp(), (x,), (v,))[1]
        here = lin.at(x.as_subclass(kind))
        for _ in range(4):
            got, back = here.jvp_fn(v), here.vjp_fn(v)[0]
            assert type(got) is torch.Tensor
            assert type(back) is torch.Tensor
            torch.testing.assert_close(got, want)
