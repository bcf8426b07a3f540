"""Linearize a PyTorch function once at a point, and apply its Jacobian many times.

>>> import torch, linearize as lz
>>> here = lz.Linearizer(torch.sin).at(torch.zeros(2))
>>> here.jvp_fn(torch.ones(2))
tensor([1., 1.])
"""

from . import errors, inspection, operators
from ._capture.custom import register_jvp
from ._points.linearization import Linearization
from ._points.linearizer import Linearizer
from ._points.memo import Stats
from .errors import LinearizeError

__version__ = "0.1.0"

__all__ = [
    "Linearization",
    "LinearizeError",
    "Linearizer",
    "Stats",
    "errors",
    "inspection",
    "operators",
    "register_jvp",
]
