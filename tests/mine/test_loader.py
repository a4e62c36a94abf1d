"""Batches that depend on (seed, step) alone."""

from __future__ import annotations

import atexit
import itertools
import multiprocessing

import pytest
import torch
from torch.utils.data import Dataset

from co3d_ensemble.mine.loader import PairLoader, Steps
from co3d_ensemble.mine.pairs import Pair


class Numbered(Dataset[Pair]):
    """Pair i shows the value i; its translation is drawn."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Pair:
        picture = torch.full((3, 2, 2), float(index))
        return Pair(str(index), picture, picture, torch.eye(3), torch.eye(3), torch.eye(3), torch.rand(3))


def loader(n: int = 10, **options) -> PairLoader:
    return PairLoader(Numbered(n), **{"batch_size": 4, "seed": 3, **options})


def content(pair: Pair) -> list[tuple[str, float]]:
    return list(zip(pair.name, pair.t[:, 0].tolist()))


def test_a_batch_depends_on_seed_and_step_alone():
    whole = loader()
    first = [content(whole.batch(step)) for step in range(8)]
    resumed = loader()
    assert [content(resumed.batch(step)) for step in range(5, 8)] == first[5:]
    assert content(resumed.batch(2)) == first[2]  # also back in time
    assert content(loader(seed=4).batch(0)) != first[0]


def test_a_mirror_shows_about_half_of_the_pairs_and_draws_nothing_else():
    plain, other = loader(batch_size=100), loader(batch_size=100, mirror=True)
    before, after = plain.batch(0), other.batch(0)
    assert before.name == after.name
    changed = after.t[:, 0] < 0
    assert 30 < changed.sum() < 70
    assert torch.equal(after.t[:, 0].abs(), before.t[:, 0]) and torch.equal(after.t[:, 1:], before.t[:, 1:])


def test_workers_give_the_same_batches():
    read, own = loader(workers=1), loader()
    assert [content(read.batch(step)) for step in range(3)] == [content(own.batch(step)) for step in range(3)]


class Damaged(Numbered):
    def __getitem__(self, index: int) -> Pair:
        raise self.error


@pytest.mark.parametrize("error", [ValueError("a/b.png: unreadable"), FileNotFoundError("a/b.png is missing\nsecond line")])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_picture_is_told_in_its_own_words_also_by_a_worker(error, workers):
    pairs = Damaged(4)
    pairs.error = error
    batches = PairLoader(pairs, batch_size=4, seed=3, workers=workers)
    with pytest.raises(type(error)) as raised:
        batches.batch(0)
    batches.close()
    assert str(raised.value) == str(error)


def test_workers_end_with_the_process_also_where_an_error_holds_the_loader(monkeypatch):
    """They ignore SIGTERM, by which multiprocessing would end them at the exit before it waits for them."""
    at_exit = []
    monkeypatch.setattr(atexit, "register", lambda *call: at_exit.append(call))
    before = set(multiprocessing.active_children())
    held = loader(workers=1)
    held.batch(0)
    batches = held._batches  # as a traceback would
    assert set(multiprocessing.active_children()) > before
    for function, *arguments in at_exit:
        function(*arguments)
    assert set(multiprocessing.active_children()) == before and batches is not held._batches
    assert content(held.batch(1)) == content(loader().batch(1))
    held.close()


def test_the_default_generator_is_left_as_it_was():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    loader().batch(0)
    assert torch.equal(torch.rand(3), expected)


def test_processes_share_what_one_would_take_whatever_their_number():
    one = [content(loader().batch(step)) for step in range(3)]
    for size in (2, 4):
        for step in range(3):
            parts = [content(loader(rank=rank, size=size).batch(step)) for rank in range(size)]
            assert [len(part) for part in parts] == [4 // size] * size
            assert sorted(itertools.chain(*parts)) == sorted(one[step])


def test_every_pass_visits_every_pair_once_in_an_order_of_its_own():
    steps = itertools.islice(iter(Steps(0, n_pairs=6, batch_size=4, seed=0, rank=0, size=1)), 6)
    items = [item for batch in steps for item in batch]
    orders = [[index for _, index in items[start : start + 6]] for start in range(0, 24, 6)]
    assert all(sorted(order) == list(range(6)) for order in orders) and len({tuple(order) for order in orders}) == 4
    assert len({seed for seed, _ in items}) == 24  # a pair that comes again draws anew


def test_a_batch_that_cannot_be_shared_is_an_error():
    with pytest.raises(ValueError, match="training.batch_size=4: must be a multiple of the number of processes, 3"):
        loader(size=3)
