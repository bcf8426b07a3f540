"""A fast selection of the conformance run; `make conformance` runs all of it."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("expecttest", reason="PyTorch's operator database needs it")

from conformance.runner import Task, run

OPERATORS = """
    add sum mul div.no_rounding_mode pow where amax cumprod logsumexp prod var std_mean sort
    gather index_put scatter_reduce.amax masked_fill cat unfold roll as_strided
    matmul einsum trace cdist linalg.solve linalg.svd linalg.eigh linalg.norm linalg.vector_norm
    cholesky fft.rfft view_as_complex abs sgn logcumsumexp
    nn.functional.conv2d nn.functional.max_pool2d nn.functional.interpolate.bilinear
    nn.functional.grid_sample nn.functional.layer_norm nn.functional.batch_norm
    nn.functional.dropout nn.functional.silu nn.functional.cross_entropy
    nn.functional.scaled_dot_product_attention nn.functional.group_norm to as_strided_scatter
""".split()
COMPLEX = "mul div.no_rounding_mode linalg.svd matmul fft.fft abs sgn prod nn.functional.conv2d"
TASKS = [
    *(Task(name, "float64", 2) for name in OPERATORS),
    *(Task(name, "complex128", 2) for name in COMPLEX.split()),
]


@pytest.fixture(scope="module")
def results() -> dict[Task, dict[str, Any]]:
    # In a process of its own: importing the database, which takes seconds, changes global
    # settings of torch.
    return dict(run(TASKS, jobs=1, seconds=300))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: f"{task.operator}-{task.dtype}")
def test_operator_conforms(task: Task, results: dict[Task, dict[str, Any]]) -> None:
    result = results[task]
    if "is not in the database" in result["reason"]:
        pytest.skip(result["reason"])
    assert result["outcome"] in ("right", "refused"), result
    assert sum(result["counts"].values()) > 0
