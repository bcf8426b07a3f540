"""Equal numbers that are kept once."""

from __future__ import annotations

import pytest
import torch

from linearize._programs.numbers import Numbers
from linearize._programs.residuals import Residual, check_memory
from linearize._simplify.equal_numbers import keep_once
from linearize.errors import StalenessError


def test_memory_that_is_taken_over_is_not_taken_for_freed() -> None:
    """The other tensor may be a part of a larger storage."""
    numbers = Numbers()
    large = numbers.constant(torch.arange(10.0)[2:7])
    small = numbers.constant(torch.arange(10.0)[2:7].clone())
    keep_once([large, small], numbers)
    first, second = numbers.residual(large), numbers.residual(small)
    assert first.tensor is second.tensor
    check_memory([first, second])


def test_a_tensor_that_is_replaced_is_watched_from_then_on() -> None:
    r = Residual(torch.arange(10.0)[2:7])
    r.replace(r.tensor.clone())
    check_memory([r])
    r.check()
    r.tensor.add_(1)
    with pytest.raises(StalenessError, match="changed in place"):
        r.check()
