"""Linearize a PyTorch function once at a point, and apply its Jacobian many times.

>>> import torch, linearize as lz
>>> here = lz.Linearizer(torch.sin).at(torch.zeros(2))
>>> here.jvp_fn(torch.ones(2))
tensor([1., 1.])
"""

from . import errors, inside, operators
from ._functions import register_jvp
from ._memo import Stats
from .errors import LinearizeError
from .linearization import Linearization
from .linearizer import Linearizer

__version__ = "0.1.0"

__all__ = [
    "Linearization",
    "LinearizeError",
    "Linearizer",
    "Stats",
    "errors",
    "inside",
    "operators",
    "register_jvp",
]
