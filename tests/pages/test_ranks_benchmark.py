"""The benchmark of ranks: what it counts, and the model that takes it to more of them."""

import math

import pytest
import torch.distributed as dist

from benchmarks import ranks, scaling
from tests.support.ranks import together

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")


def counted(rank, world):
    """A product sends what f sends; going back a gathering is a scattering of as much."""
    ranks.GRID, ranks.WIDTH, ranks.HIDDEN, ranks.BATCH = 12, 6, 8, 4
    ranks.WARM, ranks.ROUNDS = 8, 1
    row, batch = 8 * 12, 8 * 4 * 6
    expected = {
        "grid, borders gathered": ([("all_gather", 2 * row)], [("reduce_scatter", 4 * row)]),
        "grid, `isend` and `irecv`": ([("isend", row)], [("isend", row)]),
        "layers, tensor-parallel": ([("all_reduce", batch)] * 2, [("all_reduce", batch)] * 2),
    }
    for case in ranks.CASES:
        found = ranks.measured(case)
        forth, back = expected[case.name]
        assert found["f"] == forth
        for name, messages in zip(scaling.PRODUCTS, (forth, back), strict=True):
            sent = [m for m in found[name]["messages"] if m[0] != "agree"]
            assert sent == messages
            agreeing = [m for m in found[name]["messages"] if m[0] == "agree"]
            # Where custom Functions communicate among themselves nobody has to agree.
            assert len(agreeing) == (case.name != "grid, `isend` and `irecv`")
            assert found[name]["local"] > 0
            assert found[name]["whole"] > 0


def test_counts(tmp_path):
    together(2, tmp_path, counted)


def test_formulas():
    network = scaling.Network(latency=1.0, byte=0.1)
    assert network.time("all_reduce", 10, 1) == 0
    assert network.time("all_reduce", 10, 8) == pytest.approx(3 * (1 + 1))
    assert network.time("all_reduce", 1000, 8) == pytest.approx(6 + 2 * 7 / 8 * 100)
    assert network.time("all_gather", 10, 5) == pytest.approx(3 + 4)
    assert network.time("reduce_scatter", 40, 4) == pytest.approx(2 + 3)
    assert 2 * network.time("isend", 10, 4) == pytest.approx(1 + 2)


def test_local_work_is_fitted():
    work = scaling.Work.fitted({p: 2.0 + 6.0 / p for p in (1, 2, 4)})
    assert work.time(1024) == pytest.approx(2 + 6 / 1024)
    assert work.time(4, larger=10) == pytest.approx(2 + 15)


def made_up(world, kept):
    """What ranks find whose products take as long as the model has it."""
    network = scaling.Network(1e-3, 1e-9)
    ping = {m: network.time("all_reduce", m, 2) for m in scaling.PINGS}
    kinds = {
        "grid, borders gathered": ("all_gather", "reduce_scatter"),
        "grid, `isend` and `irecv`": ("isend", "isend"),
        "layers, tensor-parallel": ("all_reduce", "all_reduce"),
    }
    found = {"ping": ping}
    for name, pair in kinds.items():
        found[name] = {"kept": kept // world, "f": [(pair[0], 100)]}
        for product, kind in zip(scaling.PRODUCTS, pair, strict=True):
            messages = [("agree", 64), (kind, 100)]
            local = 1e-3 + 1e-2 / world
            told = sum(network.time(k, m, world) for k, m in messages)
            found[name][product] = {
                "messages": messages,
                "local": local,
                "whole": local + told,
                "processor": (local, local),
            }
    return [found] * world


def test_page():
    found = {world: made_up(world, 4096) for world in ranks.WORLDS}
    lines = list(ranks.table(found))
    assert [line[2] for line in lines[1:4]] == ["4,096", "2,048", "1,024"]
    ratios = [float(line[-1]) for line in list(scaling.checked(found))[1:]]
    assert len(ratios) == 18
    assert all(math.isclose(r, 1, rel_tol=0.01) for r in ratios)
    page = scaling.page(found)
    assert page.count("| 4,096 |") == len(scaling.PROBLEMS)
    # Borders that all ranks get are more with more ranks, those of neighbours are not.
    by_name = {p.name: list(scaling.foretold(found, p))[1:] for p in scaling.PROBLEMS}
    gathered, sent = (
        [float(line[2]) for line in by_name[name]]
        for name in ("grid, borders gathered", "grid, `isend` and `irecv`")
    )
    assert gathered[-1] > 10 * gathered[2]
    assert sent[-1] < 3 * sent[2]  # the message by which ranks agree
