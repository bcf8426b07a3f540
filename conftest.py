"""Set-up shared by all tests, those made of code blocks in pages and docstrings included."""

import gc
import os
from doctest import ELLIPSIS, NORMALIZE_WHITESPACE
from importlib.util import find_spec

import pytest
import torch

# Processes that run tests side by side share the cores, and so do the scripts that they start.
if (workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())

# A machine lent for its GPU may have torch and pytest only: no code blocks there.
if find_spec("sybil"):
    from sybil import Sybil
    from sybil.document import PythonDocStringDocument
    from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser
    from sybil.parsers.rest import DocTestParser
    from sybil.sybil import SybilCollection

    flags = ELLIPSIS | NORMALIZE_WHITESPACE
    pages = Sybil(
        parsers=[PythonCodeBlockParser(doctest_optionflags=flags), SkipParser()],
        patterns=["README.md", "docs/*.md"],
    )
    docstrings = Sybil(
        parsers=[DocTestParser(flags)],
        patterns=["linearize/**/*.py"],
        document_types={".py": PythonDocStringDocument},
    )
    # One namespace for each page and each module: its blocks run from top to bottom.
    pytest_collect_file = SybilCollection([pages, docstrings]).pytest()


@pytest.fixture(autouse=True)
def _apart() -> None:
    """Let no test take over programs that another one left."""
    from linearize._reuse.shared import SHARED

    SHARED.clear()


def pytest_collection_finish() -> None:
    """Let collections of garbage look at what tests make, not at all that was imported."""
    gc.collect()
    gc.freeze()


def pytest_report_header() -> list[str]:
    """Say what the results depend on, and whether the code blocks are run."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    blocks = [] if find_spec("sybil") else ["code blocks: not run, sybil is not installed"]
    return [f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device}", *blocks]


#: Where single files take long: on ranks, with compilers, in interpreters of their own.
_LONG = ("tests/pages/", "tests/whole/", "tests/faces/", "tests/capture/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes long; skip the tests marked ``gpu`` where there is no CUDA device.

    At the end a long file would keep one process busy, with nothing left for the others.
    """
    items.sort(key=lambda item: not item.nodeid.startswith(_LONG))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
