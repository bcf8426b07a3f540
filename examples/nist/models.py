"""The model functions of the NIST StRD problems, in two kinds.

Ten problems are plain torch expressions. Eight go through custom `torch.autograd.Function`s that
leave torch for NumPy and bring their derivatives along by hand, as a simulator, a compiled
kernel or a measuring device would: autograd sees one opaque node. They are written in the various
styles in which such Functions are found:

===========================  =========  ==============================================
Function                     style      what is kept for the derivatives
===========================  =========  ==============================================
`SaturatingExponential`      old        arrays as attributes of ``ctx``
`ExponentialTerm`            old        as above; two inputs, used three times a graph
`KowalikOsborne`             old        ``save_for_backward`` and ``save_for_forward``
`LogisticGrowth`             new        numbers and arrays on ``ctx``; three inputs
`GaussianPeak`               new        ``save_for_backward`` and ``save_for_forward``
`QuantumDefect`              new        the Jacobian, saved both ways
===========================  =========  ==============================================

Old style means ``forward(ctx, ...)``, new style a separate ``setup_context``. Everything is in
float64. A model may overflow far from the solution; it then returns inf or nan without noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import Function

__all__ = [
    "MODELS",
    "ExponentialTerm",
    "GaussianPeak",
    "KowalikOsborne",
    "LogisticGrowth",
    "Model",
    "QuantumDefect",
    "SaturatingExponential",
]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Model:
    """A model function and how it is written.

    Attributes
    ----------
    kind
        ``"torch"`` for a plain expression, ``"NumPy"`` for a custom Function over NumPy.
    predict
        Maps parameters of shape (p,) and a predictor of shape (m,) to a response of shape (m,).
    """

    kind: Literal["torch", "NumPy"]
    predict: Callable[[Tensor, Tensor], Tensor]


def _numpy(tensor: Tensor) -> Array:
    """Leave torch: the tensor's numbers as an array, unknown to autograd."""
    array: Array = tensor.detach().numpy()
    return array


def _quiet() -> np.errstate:
    return np.errstate(over="ignore", divide="ignore", invalid="ignore")


class SaturatingExponential(Function):
    """``b1 (1 - exp(-b2 x))`` with b of shape (2,) and x of shape (m,)."""

    @staticmethod
    def forward(ctx: Any, b: Tensor, x: Tensor) -> Tensor:
        b1, b2 = _numpy(b)
        t = _numpy(x)
        with _quiet():
            ctx.by_b1 = -np.expm1(-b2 * t)
            ctx.by_b2 = b1 * t * np.exp(-b2 * t)
            return torch.from_numpy(b1 * ctx.by_b1)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        d1, d2 = _numpy(tangents[0])
        return torch.from_numpy(d1 * ctx.by_b1 + d2 * ctx.by_b2)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Tensor, None]:
        u = _numpy(cotangents[0])
        return torch.tensor([u @ ctx.by_b1, u @ ctx.by_b2], dtype=torch.float64), None


class ExponentialTerm(Function):
    """``a exp(-k x)`` with amplitude a and rate k of shape (), and x an array of shape (m,)."""

    @staticmethod
    def forward(ctx: Any, amplitude: Tensor, rate: Tensor, x: Array) -> Tensor:
        with _quiet():
            ctx.decay = np.exp(-rate.item() * x)
            value = amplitude.item() * ctx.decay
            ctx.by_rate = -x * value
        return torch.from_numpy(value)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        d_amplitude, d_rate, _ = tangents
        return torch.from_numpy(d_amplitude.item() * ctx.decay + d_rate.item() * ctx.by_rate)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Tensor, Tensor, None]:
        u = _numpy(cotangents[0])
        return torch.tensor(u @ ctx.decay), torch.tensor(u @ ctx.by_rate), None


class KowalikOsborne(Function):
    """``b1 (x² + b2 x) / (x² + b3 x + b4)`` with b of shape (4,) and x of shape (m,)."""

    @staticmethod
    def forward(ctx: Any, b: Tensor, x: Tensor) -> Tensor:
        b1, b2, b3, b4 = _numpy(b)
        t = _numpy(x)
        with _quiet():
            value = b1 * t * (t + b2) / (t * (t + b3) + b4)
        ctx.save_for_backward(b, x)
        ctx.save_for_forward(b, x)
        return torch.from_numpy(value)

    @staticmethod
    def _partials(b: Tensor, x: Tensor) -> tuple[Array, Array, Array, Array]:
        b1, b2, b3, b4 = _numpy(b)
        t = _numpy(x)
        with _quiet():
            denominator = t * (t + b3) + b4
            by_b1 = t * (t + b2) / denominator
            by_b2 = b1 * t / denominator
            by_b4 = -b1 * by_b1 / denominator
            return by_b1, by_b2, by_b4 * t, by_b4

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        b, x = ctx.saved_tensors
        db = _numpy(tangents[0])
        columns = KowalikOsborne._partials(b, x)
        return torch.from_numpy(np.stack(columns, axis=1) @ db)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Tensor, None]:
        b, x = ctx.saved_tensors
        u = _numpy(cotangents[0])
        return torch.from_numpy(np.stack(KowalikOsborne._partials(b, x)) @ u), None


class LogisticGrowth(Function):
    """``b1 / (1 + exp(b2 - b3 x))`` with three inputs of shape () and x an array (m,)."""

    @staticmethod
    def forward(b1: Tensor, b2: Tensor, b3: Tensor, x: Array) -> Tensor:
        with _quiet():
            return torch.from_numpy(b1.item() / (1.0 + np.exp(b2.item() - b3.item() * x)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        b1, b2, b3, x = inputs
        with _quiet():
            odds = np.exp(b2.item() - b3.item() * x)
            ctx.share = 1.0 / (1.0 + odds)
            ctx.slope = b1.item() * ctx.share / (1.0 + 1.0 / odds)
        ctx.x = x

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        d1, d2, d3 = (tangent.item() for tangent in tangents[:3])
        return torch.from_numpy(d1 * ctx.share + (d3 * ctx.x - d2) * ctx.slope)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        u = _numpy(cotangents[0])
        u_slope = u * ctx.slope
        return (
            torch.tensor(u @ ctx.share),
            torch.tensor(-u_slope.sum()),
            torch.tensor(u_slope @ ctx.x),
            None,
        )


class GaussianPeak(Function):
    """``(b1 / b2) exp(-((x - b3) / b2)² / 2)`` with b of shape (3,) and x of shape (m,)."""

    @staticmethod
    def forward(b: Tensor, x: Tensor) -> Tensor:
        b1, b2, b3 = _numpy(b)
        with _quiet():
            return torch.from_numpy(b1 / b2 * np.exp(-0.5 * ((_numpy(x) - b3) / b2) ** 2))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs, output)
        ctx.save_for_forward(*inputs, output)

    @staticmethod
    def _partials(b: Tensor, x: Tensor, value: Tensor) -> Array:
        _, b2, b3 = _numpy(b)
        peak = _numpy(value)
        with _quiet():
            z = (_numpy(x) - b3) / b2
            by_b1 = np.exp(-0.5 * z**2) / b2
            return np.stack([by_b1, peak * (z**2 - 1.0) / b2, peak * z / b2])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return torch.from_numpy(_numpy(tangents[0]) @ GaussianPeak._partials(*ctx.saved_tensors))

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Tensor, None]:
        u = _numpy(cotangents[0])
        return torch.from_numpy(GaussianPeak._partials(*ctx.saved_tensors) @ u), None


class QuantumDefect(Function):
    """``b1 - b2 x - arctan(b3 / (x - b4)) / π`` with b of shape (4,) and x of shape (m,)."""

    @staticmethod
    def forward(b: Tensor, x: Tensor) -> Tensor:
        b1, b2, b3, b4 = _numpy(b)
        t = _numpy(x)
        with _quiet():
            return torch.from_numpy(b1 - b2 * t - np.arctan(b3 / (t - b4)) / np.pi)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        b, x = inputs
        _, _, b3, b4 = _numpy(b)
        t = _numpy(x)
        with _quiet():
            distance = t - b4
            weight = 1.0 / (np.pi * (distance**2 + b3**2))
            columns = [np.ones_like(t), -t, -distance * weight, -b3 * weight]
        jacobian = torch.from_numpy(np.stack(columns, axis=1))
        ctx.save_for_backward(jacobian)
        ctx.save_for_forward(jacobian)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (jacobian,) = ctx.saved_tensors
        return torch.from_numpy(_numpy(jacobian) @ _numpy(tangents[0]))

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Tensor, None]:
        (jacobian,) = ctx.saved_tensors
        return torch.from_numpy(_numpy(cotangents[0]) @ _numpy(jacobian)), None


def _box_bod(b: Tensor, x: Tensor) -> Tensor:
    return _call(SaturatingExponential, b, x)


def _eckerle(b: Tensor, x: Tensor) -> Tensor:
    return _call(GaussianPeak, b, x)


def _lanczos(b: Tensor, x: Tensor) -> Tensor:
    b1, k1, b2, k2, b3, k3 = b.unbind()
    t = _numpy(x)
    return (
        _call(ExponentialTerm, b1, k1, t)
        + _call(ExponentialTerm, b2, k2, t)
        + _call(ExponentialTerm, b3, k3, t)
    )


def _mgh09(b: Tensor, x: Tensor) -> Tensor:
    return _call(KowalikOsborne, b, x)


def _rat42(b: Tensor, x: Tensor) -> Tensor:
    return _call(LogisticGrowth, *b.unbind(), _numpy(x))


def _roszman(b: Tensor, x: Tensor) -> Tensor:
    return _call(QuantumDefect, b, x)


def _chwirut(b: Tensor, x: Tensor) -> Tensor:
    return torch.exp(-b[0] * x) / (b[1] + b[2] * x)


def _dan_wood(b: Tensor, x: Tensor) -> Tensor:
    return b[0] * x ** b[1]


def _gauss(b: Tensor, x: Tensor) -> Tensor:
    baseline = b[0] * torch.exp(-b[1] * x)
    first = b[2] * torch.exp(-(((x - b[3]) / b[4]) ** 2))
    second = b[5] * torch.exp(-(((x - b[6]) / b[7]) ** 2))
    return baseline + first + second


def _kirby(b: Tensor, x: Tensor) -> Tensor:
    return (b[0] + x * (b[1] + x * b[2])) / (1.0 + x * (b[3] + x * b[4]))


def _misra1a(b: Tensor, x: Tensor) -> Tensor:
    return -b[0] * torch.expm1(-b[1] * x)


def _misra1b(b: Tensor, x: Tensor) -> Tensor:
    return b[0] * (1.0 - (1.0 + b[1] * x / 2.0) ** -2)


def _misra1c(b: Tensor, x: Tensor) -> Tensor:
    return b[0] * (1.0 - (1.0 + 2.0 * b[1] * x) ** -0.5)


def _misra1d(b: Tensor, x: Tensor) -> Tensor:
    return b[0] * b[1] * x / (1.0 + b[1] * x)


def _call(function: type[Function], *arguments: object) -> Tensor:
    """Apply a custom Function with one output (`apply` itself has no types)."""
    result: Tensor = function.apply(*arguments)
    return result


MODELS: dict[str, Model] = {
    "BoxBOD": Model("NumPy", _box_bod),
    "Chwirut1": Model("torch", _chwirut),
    "Chwirut2": Model("torch", _chwirut),
    "DanWood": Model("torch", _dan_wood),
    "Eckerle4": Model("NumPy", _eckerle),
    "Gauss1": Model("torch", _gauss),
    "Gauss3": Model("torch", _gauss),
    "Kirby2": Model("torch", _kirby),
    "Lanczos1": Model("NumPy", _lanczos),
    "Lanczos2": Model("NumPy", _lanczos),
    "Lanczos3": Model("NumPy", _lanczos),
    "MGH09": Model("NumPy", _mgh09),
    "Misra1a": Model("torch", _misra1a),
    "Misra1b": Model("torch", _misra1b),
    "Misra1c": Model("torch", _misra1c),
    "Misra1d": Model("torch", _misra1d),
    "Rat42": Model("NumPy", _rat42),
    "Roszman1": Model("NumPy", _roszman),
}
