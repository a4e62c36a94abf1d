"""Rounds: every job is claimed once, whoever asks, and nobody takes an earlier round for the present one."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
from torch.distributed import HashStore, TCPStore

from co3d_ensemble.fleet.claims import Reception, Round, RoundError, ask_for_round
from co3d_ensemble.fleet.jobs import Job

JOBS = [Job(f"c/s/{i}", ("true",), "r") for i in range(40)]


@pytest.fixture
def server():
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))


def client(server):
    return TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=20))


def taken(round):
    return [job.name for job in iter(round.claim, None)]


def test_every_job_is_claimed_once_by_workers_in_competition(server):
    leader, found = Round.new(client(server), JOBS), []
    reception = Reception(client(server), leader)
    reception.start()

    def follow():
        found.extend(taken(ask_for_round(client(server), seconds=20)))

    followers = [threading.Thread(target=follow) for _ in range(4)]
    for follower in followers:
        follower.start()
    found.extend(taken(leader))
    for follower in followers:
        follower.join()
    reception.close()
    assert sorted(found) == sorted(job.name for job in JOBS)


def test_claims_come_in_the_order_of_the_list():
    assert taken(Round.new(HashStore(), JOBS)) == [job.name for job in JOBS]


def test_a_new_round_in_an_old_store_starts_from_its_own_list(server):
    store = client(server)
    old = Round.new(store, JOBS)
    taken(old)
    old.close({"code": 0})
    store.set(f"fleet/asks/{store.add('fleet/asked', 1)}", "somebody who died before the answer")
    new = Round.new(store, JOBS[:3])
    reception = Reception(client(server), new)
    reception.start()
    follower = ask_for_round(client(server), seconds=20)
    reception.close()
    assert follower.name == new.name != old.name and follower.outcome() is None
    assert taken(follower) == [job.name for job in JOBS[:3]]


def test_a_worker_that_died_between_its_number_and_its_word_holds_up_nobody(server):
    store = client(server)
    store.add("fleet/asked", 1)
    reception = Reception(client(server), Round.new(store, JOBS))
    reception.start()
    assert ask_for_round(client(server), seconds=20) is not None
    reception.close()


def test_without_a_leader_a_worker_says_what_to_do():
    with pytest.raises(RoundError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE"):
        ask_for_round(HashStore(), seconds=0.1)


def test_a_round_ends_when_all_its_jobs_have_and_everybody_learns_the_outcome():
    round = Round.new(HashStore(), JOBS[:2])
    assert not round.all_ended()
    round.tell_ended()
    round.tell_ended()
    assert round.all_ended() and round.outcome() is None
    round.close({"state": "done"})
    assert round.outcome() == {"state": "done"}
