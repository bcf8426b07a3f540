"""The long run, scaled down: nothing that is alive grows in number."""

from __future__ import annotations

import torch
from soak import grown, page, soak


def test_a_short_soak() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        samples = list(soak(1000, 3000, samples=10))
    finally:
        torch.set_num_threads(threads)
    assert samples[-1].points == 1000
    assert 2900 <= samples[-1].products <= 3100
    settled = samples[2:]
    assert max(s.tensors for s in settled) <= min(s.tensors for s in settled) + 40
    assert max(s.objects for s in settled) <= 1.02 * min(s.objects for s in settled) + 500
    assert grown(samples) < 20  # megabytes; other tests share this process
    assert page(samples).count("\n") == 13
