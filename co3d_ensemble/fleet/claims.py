"""Who does what within a round: one list of jobs and one atomic counter in torchrun's store.

torchrun starts all workers anew when one of them dies or a node comes or goes: a round. Facts of torch 2.13 that this rests on
(``torch/distributed/elastic``):

- The store at MASTER_ADDR:MASTER_PORT outlives rounds, so keys of earlier rounds are in it.
- No variable numbers the rounds: TORCHELASTIC_RESTART_COUNT is each agent's own count of failures, and joining nodes do not
  raise it.
- An agent keeps the address it learnt in its first round. If the node that served the store is lost, or a joining node becomes
  the first, workers would meet at different stores; TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment makes rank 0
  serve a new store every round, and the documented commands set it.

So a round is named by its leader, rank 0, and every other worker asks for that name with a word of its own that no earlier
leader can have answered. Whatever the store says, a job's folder is locked while somebody is at it.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, HashStore, Store, TCPStore, rendezvous

from co3d_ensemble.fleet.jobs import Job

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.05
STORE_ERRORS = (DistError, RuntimeError)  # of a store whose server is gone


class RoundError(RuntimeError):
    """This worker found no leader, or lost the store."""


def connect(environment: Mapping[str, str] = os.environ, *, timeout_seconds: float = 60.0) -> Store:
    """torchrun's store; alone (plain ``python``), one in memory."""
    if "MASTER_ADDR" not in environment:
        return HashStore()
    store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=timeout_seconds)))
    return store


def connect_again(environment: Mapping[str, str] = os.environ, *, timeout_seconds: float = 60.0) -> Store:
    """A second connection to the same store, for a thread of its own: calls on one connection wait for each other."""
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_seconds))


class Round:
    """The jobs of this round and what its workers tell each other; the same for all of them."""

    def __init__(self, store: Store, name: str, jobs: Sequence[Job], terms: Mapping[str, Any] | None = None) -> None:
        self.store, self.name, self.jobs, self.terms = store, name, list(jobs), dict(terms or {})

    @classmethod
    def new(cls, store: Store, jobs: Sequence[Job], terms: Mapping[str, Any] | None = None) -> Round:
        """A round that this process leads; ``terms``: whatever else its workers need to know."""
        return cls(store, uuid.uuid4().hex, jobs, terms)

    def _key(self, what: str) -> str:
        return f"fleet/{self.name}/{what}"

    def claim(self) -> Job | None:
        """The next job, which no other worker of the round gets; None when all are taken."""
        index = self.store.add(self._key("claimed"), 1) - 1
        return self.jobs[index] if index < len(self.jobs) else None

    def tell_ended(self) -> None:
        """One claimed job is done or given up."""
        self.store.add(self._key("ended"), 1)

    def all_ended(self) -> bool:
        return self.store.add(self._key("ended"), 0) >= len(self.jobs)

    def close(self, outcome: Mapping[str, Any]) -> None:
        """Lets the workers go, with the fleet's outcome."""
        self.store.set(self._key("outcome"), json.dumps(outcome))

    def outcome(self) -> dict[str, Any] | None:
        """None while the round goes on."""
        return json.loads(self.store.get(self._key("outcome"))) if self.store.check([self._key("outcome")]) else None

    def leave(self) -> None:
        self.store.add(self._key("left"), 1)

    def wait_until_left(self, workers: int, seconds: float) -> None:
        """The leader may serve the store: it goes last."""
        deadline = time.monotonic() + seconds
        while self.store.add(self._key("left"), 0) < workers and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)

    def as_json(self) -> str:
        return json.dumps({"name": self.name, "jobs": [job.as_json() for job in self.jobs], "terms": self.terms})

    @classmethod
    def from_json(cls, store: Store, text: str | bytes) -> Round:
        value = json.loads(text)
        return cls(store, value["name"], [Job.from_json(job) for job in value["jobs"]], value["terms"])


class Reception(threading.Thread):
    """The leader's answers to workers that ask for the round, until it is closed.

    Args:
        store: a connection of the thread's own.
    """

    def __init__(self, store: Store, round: Round) -> None:
        super().__init__(name="reception", daemon=True)
        self._store, self._answer = store, round.as_json()
        self._closed = threading.Event()

    def run(self) -> None:
        waiting: list[int] = []
        asked = 0
        try:
            while not self._closed.wait(POLL_SECONDS):
                total = self._store.add("fleet/asked", 0)
                waiting += range(asked + 1, total + 1)
                asked = total
                waiting = [number for number in waiting if not self._answered(number)]
        except STORE_ERRORS as error:
            if not self._closed.is_set():
                logger.warning("lost the store: %s", error)

    def _answered(self, number: int) -> bool:
        """False where the asking worker has not got to its word yet; one that died before it never will."""
        if not self._store.check([f"fleet/asks/{number}"]):
            return False
        word = self._store.get(f"fleet/asks/{number}").decode()
        if not self._store.check([f"fleet/answer/{word}"]):
            self._store.set(f"fleet/answer/{word}", self._answer)
        return True

    def close(self) -> None:
        self._closed.set()
        self.join()


def ask_for_round(store: Store, *, seconds: float, stopping: Callable[[], bool] = lambda: False) -> Round | None:
    """The round as its leader tells it; None when told to stop meanwhile.

    Raises:
        RoundError: no leader answered, or the store is gone.
    """
    word, deadline = uuid.uuid4().hex, time.monotonic() + seconds
    try:
        store.set(f"fleet/asks/{store.add('fleet/asked', 1)}", word)
        while not store.check([f"fleet/answer/{word}"]):
            if stopping():
                return None
            if time.monotonic() > deadline:
                raise RoundError(
                    f"the first worker of this round did not answer within {seconds:g} s at "
                    f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}; torchrun needs "
                    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment on every node"
                )
            time.sleep(POLL_SECONDS)
        return Round.from_json(store, store.get(f"fleet/answer/{word}"))
    except DistError as error:
        raise RoundError(f"lost the store: {error}") from error
