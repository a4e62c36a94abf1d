import logging

import pytest
import torch

from co3d_ensemble.fields import compaction as module
from co3d_ensemble.fields.compaction import GRANULARITY, REFIT_READS, Compaction


def grid(share, n=20_000, seed=0):
    return torch.rand(n // 100, 100, generator=torch.Generator().manual_seed(seed)) < share


def with_capacity(capacity):
    compaction = Compaction()
    compaction.capacity = capacity
    return compaction


def test_without_a_capacity_the_index_is_that_of_the_chosen_samples_of_all_rays():
    chosen = grid(0.3)
    index, whole = Compaction()(chosen)
    assert torch.equal(index, chosen.reshape(-1).nonzero()[:, 0]) and whole is None


def test_an_index_with_room_starts_with_the_chosen_samples_and_is_padded_past_the_end():
    chosen, compaction = grid(0.3), Compaction()
    exact, _ = compaction(chosen)
    assert compaction.follow()
    index, whole = compaction(chosen)
    assert len(index) == compaction.capacity and compaction.capacity % GRANULARITY == 0
    assert compaction.capacity >= 1.25 * len(exact)
    assert torch.equal(index[: len(exact)], exact)
    assert (index[len(exact) :] == chosen.numel()).all()
    assert whole.all() and compaction.left_out == 0


def test_a_batch_that_just_fits_is_whole():
    chosen = grid(0.3)
    exact = chosen.reshape(-1).nonzero()[:, 0]
    index, whole = with_capacity(len(exact))(chosen)
    assert torch.equal(index, exact) and whole.all()


def test_nothing_chosen_leaves_padding_and_every_ray_whole():
    index, whole = with_capacity(7)(torch.zeros(5, 4, dtype=torch.bool))
    assert (index == 20).all() and len(index) == 7 and whole.all()


@pytest.mark.parametrize("first", [0, 3, 150, 199])
def test_what_does_not_fit_is_left_out_in_whole_rays_in_a_circle_from_any_ray_on(monkeypatch, first):
    monkeypatch.setattr(module, "random_ray", lambda n_rays, device: torch.tensor([first]))
    chosen = grid(0.3)
    compaction = with_capacity(1000)
    index, whole = compaction(chosen)
    counts, expected, room = chosen.sum(dim=1).tolist(), set(), 1000
    for step in range(1, 200):  # the same as a loop over rays
        ray = (first + step) % 200
        if counts[ray] > room:
            break
        expected.add(ray)
        room -= counts[ray]
    assert set(whole.nonzero()[:, 0].tolist()) == expected
    assert len(index) == 1000 == len(set(index.tolist())) and chosen.reshape(-1)[index].all()
    kept = torch.zeros(chosen.numel(), dtype=torch.bool).index_fill_(0, index, True).view(chosen.shape)
    assert torch.equal(kept[whole], chosen[whole])
    assert compaction.left_out == chosen.sum() - 1000


def test_every_ray_is_left_out_equally_often_whatever_its_place():
    chosen = torch.ones(50, 8, dtype=torch.bool)
    compaction, kept, n = with_capacity(8 * 15), torch.zeros(50), 3000
    torch.manual_seed(0)
    for _ in range(n):
        kept += compaction(chosen).whole
    share = kept / n
    assert share.mean().item() == pytest.approx(15 / 50)
    assert (share - 0.3).abs().max() < 5 * (0.3 * 0.7 / n) ** 0.5


def test_a_step_without_room_is_reported_and_the_room_grows_at_once_with_some_to_spare(caplog):
    compaction = with_capacity(GRANULARITY)
    full = torch.ones(200, 100, dtype=torch.bool)
    compaction(full)
    with caplog.at_level(logging.WARNING):
        assert compaction.follow()
    assert "20000 samples to evaluate and room for 4096" in caplog.text
    assert compaction.capacity >= 1.5 * full.numel()
    compaction(full)
    assert not compaction.follow() and compaction.left_out == 0


def test_a_room_that_is_nearly_full_grows_before_anything_is_left_out(caplog):
    compaction = with_capacity(GRANULARITY)
    compaction(torch.ones(1, GRANULARITY - 10, dtype=torch.bool))
    assert compaction.follow() and compaction.capacity > GRANULARITY and not caplog.records


def test_counts_that_grow_by_a_sixth_at_every_read_always_have_room_in_few_shapes(caplog):
    compaction, count, changes = Compaction(), 1000.0, 0
    while count < 200_000:
        compaction(torch.ones(1, int(count), dtype=torch.bool))
        changes += compaction.follow()
        count *= 7 / 6
    assert not caplog.records and changes <= 15


def test_the_room_follows_a_grid_that_empties():
    compaction = with_capacity(30 * GRANULARITY)
    for _ in range(REFIT_READS):
        compaction(grid(0.05))
        compaction.follow()
    assert compaction.capacity == GRANULARITY


def test_small_changes_of_the_count_keep_the_room_as_it_is():
    compaction = Compaction()
    changes = 0
    for seed in range(2 * REFIT_READS):
        compaction(grid(0.3, seed=seed))
        changes += compaction.follow()
    assert changes == 1


def test_nothing_seen_changes_nothing_and_a_restart_takes_what_it_needs_again():
    compaction = Compaction()
    assert not compaction.follow() and compaction.capacity is None
    compaction(grid(0.3))
    assert compaction.follow()
    compaction.restart()
    assert compaction.capacity is None and not compaction.follow()


def test_a_count_that_is_on_its_way_is_read_when_it_has_arrived_and_none_is_lost():
    class Slow(module._LateReader):
        arrived = False

        def take(self):
            return super().take() if self.arrived else None

    compaction = with_capacity(GRANULARITY)
    compaction._reader = Slow()
    for n in (100, 9000, 200):
        compaction(torch.ones(1, n, dtype=torch.bool))
        assert not compaction.follow()
    compaction._reader.arrived = True
    assert not compaction.follow()  # the 100 of the first step
    assert compaction.follow() and compaction.capacity >= 1.5 * 9000


@pytest.mark.cuda
def test_an_index_of_fixed_size_and_its_room_do_not_wait_for_the_device(never_waits):
    chosen, compaction = grid(0.3).cuda(), Compaction()
    compaction(chosen)
    while not compaction.follow():
        torch.cuda.synchronize()
    compaction(chosen), compaction.follow()
    with never_waits():
        for _ in range(5):
            compaction(chosen)
            compaction.follow()
    torch.cuda.synchronize()
    index, whole = compaction(chosen)
    exact = chosen.reshape(-1).nonzero()[:, 0]
    assert torch.equal(index[: len(exact)], exact) and bool(whole.all())
