import logging

import pytest
import torch

from co3d_ensemble.fields import compaction as module
from co3d_ensemble.fields.compaction import GRANULARITY, Compaction


def grid(share, n=20_000, seed=0):
    return torch.rand(n // 100, 100, generator=torch.Generator().manual_seed(seed)) < share


def test_without_a_capacity_the_index_is_that_of_the_occupied_samples():
    occupied = grid(0.3)
    assert torch.equal(Compaction()(occupied), occupied.reshape(-1).nonzero()[:, 0])


def test_an_adapted_index_starts_with_the_occupied_samples_and_is_padded_past_the_end():
    occupied, compaction = grid(0.3), Compaction()
    exact = compaction(occupied)
    compaction.adapt()
    index = compaction(occupied)
    assert len(index) == compaction.capacity and compaction.capacity % GRANULARITY == 0
    assert compaction.capacity >= 1.25 * len(exact)
    assert torch.equal(index[: len(exact)], exact)
    assert (index[len(exact) :] == occupied.numel()).all()


def test_what_does_not_fit_is_left_out_reported_and_fits_the_next_time(caplog):
    compaction = Compaction()
    compaction(grid(0.1))
    compaction.adapt()
    full = torch.ones(200, 100, dtype=torch.bool)
    assert len(compaction(full)) == compaction.capacity < full.numel()
    with caplog.at_level(logging.WARNING):
        compaction.adapt()
    assert "20000 occupied samples" in caplog.text
    assert compaction.capacity >= full.numel()


def test_the_capacity_follows_a_grid_that_empties():
    compaction = Compaction()
    compaction(grid(0.9))
    compaction.adapt()
    before = compaction.capacity
    compaction(grid(0.05))
    compaction.adapt()
    assert compaction.capacity < before


def test_nothing_seen_changes_nothing():
    compaction = Compaction()
    compaction.adapt()
    assert compaction.capacity is None


def test_without_a_kernel_for_fixed_sizes_the_index_stays_exact_and_one_line_says_so(monkeypatch, caplog):
    def missing(*args, **kwargs):
        raise NotImplementedError("Could not run 'aten::nonzero_static'")

    monkeypatch.setattr(torch, "nonzero_static", missing)
    module._has_static_nonzero.cache_clear()
    occupied, passes = grid(0.3), [Compaction(), Compaction()]
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            for compaction in passes:
                assert torch.equal(compaction(occupied), occupied.reshape(-1).nonzero()[:, 0])
                compaction.adapt()
    module._has_static_nonzero.cache_clear()  # the next test has the kernel
    assert [compaction.capacity for compaction in passes] == [None, None]
    assert len(caplog.records) == 1 and "no nonzero_static on cpu" in caplog.text


@pytest.mark.cuda
def test_an_adapted_index_does_not_wait_for_the_device():
    occupied, compaction = grid(0.3).cuda(), Compaction()
    compaction(occupied)
    compaction.adapt()
    torch.cuda.set_sync_debug_mode("error")
    try:
        compaction(occupied)
    finally:
        torch.cuda.set_sync_debug_mode("default")
