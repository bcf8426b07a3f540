"""The benchmark of stiff equations: both solvers do the same work."""

import numpy as np
import pytest
import torch

import linearize as lz
import linearize.sparse
from benchmarks import stiff


def test_both_forms_of_the_equations_agree_and_the_pattern_is_theirs():
    y = stiff.start(40) + 0.1 * np.random.default_rng(0).normal(size=40)
    np.testing.assert_allclose(stiff.by_torch(0, y), stiff.by_numpy(0, y))
    here = lz.Linearizer(stiff.brusselator).at(torch.from_numpy(y))
    found, told = lz.sparse.pattern(here), stiff.pattern(40)
    assert (found != told.astype(bool)).nnz == 0
    J = lz.sparse.jacobian(here, layout="scipy")
    step = 1e-6 * np.eye(40)
    differences = [(stiff.by_numpy(0, y + h) - stiff.by_numpy(0, y - h)) / 2e-6 for h in step]
    np.testing.assert_allclose(J.toarray(), np.stack(differences, 1), atol=1e-5)


def test_solvers_reach_the_same_end(capsys: pytest.CaptureFixture[str]):
    ends = [solve().y[:, -1] for solve in stiff.solvers(20).values()]
    for end in ends[1:]:
        np.testing.assert_allclose(end, ends[0], rtol=1e-3)
    assert stiff.main(["--equations", "20", "--repeat", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("Jacobians") == 4
    assert "20 equations" in printed
