"""Kills parts of a fleet at random until enough is killed and everything is done; compares with a fleet that is left alone.

    python benchmarks/fleet_chaos.py OUT --kills 100                   # pretended trainings on the real claims and torchrun
    python benchmarks/fleet_chaos.py OUT --kills 100 --real ROOT -- experiment=ensemble_laptop training.max_steps=200 ...

Workers under torchrun on loopback, `--nodes` agents with `--workers` each. A kill is SIGKILL to a child, to a worker, to an
agent, or to all of them; an agent that is gone is started again by the same command. At the end: every healthy job done and
trained to its end once, its results equal to the undisturbed fleet's, no temporary file. Exit 0 if so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from co3d_ensemble.base.quoting import override
from co3d_ensemble.scripts import run_script

REPOSITORY = Path(__file__).resolve().parent.parent
PRETEND = REPOSITORY / "tests" / "fleet" / "pretend.py"
TRAIN_ALL = REPOSITORY / "launch" / "train_all_sequences.py"
KINDS = ("child", "worker", "agent", "everything")
WEIGHTS = (6, 3, 1, 1)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Agents:
    """torchrun's agents on this machine, and the processes below them."""

    def __init__(self, script: Sequence[str], *, nodes: int, workers: int, log: Path) -> None:
        self.script, self.nodes, self.workers, self.log = list(script), nodes, workers, log
        self.processes: list[subprocess.Popen[bytes]] = []
        self.port = free_port()

    def start_missing(self) -> None:
        alive = [process for process in self.processes if process.poll() is None]
        if not alive:
            self.port = free_port()
        while len(alive) < self.nodes:
            alive.append(self._start())
        self.processes = alive

    def _start(self) -> subprocess.Popen[bytes]:
        options = ["--nnodes", f"1:{self.nodes}", "--nproc_per_node", str(self.workers), "--max-restarts", "1000", "--rdzv_backend", "c10d"]
        options += ["--rdzv_endpoint", f"localhost:{self.port}", "--rdzv_conf", "last_call_timeout=1", "--monitor-interval", "0.2"]
        path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "torch.distributed.run", *options, *self.script]
        with open(self.log, "ab") as file:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, start_new_session=True)

    def running(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def below(self, kind: str) -> list[int]:
        """Process ids of all workers, or of all their children."""
        parents = parents_by_pid()
        agents = {process.pid for process in self.processes if process.poll() is None}
        workers = [pid for pid, parent in parents.items() if parent in agents]
        return workers if kind == "worker" else [pid for pid, parent in parents.items() if parent in workers]

    def kill(self, kind: str, generator: random.Random) -> bool:
        """False where there is nothing of the kind to kill."""
        if kind == "everything":
            victims = [process.pid for process in self.processes if process.poll() is None]
            victims += [*self.below("worker"), *self.below("child")]
        elif kind == "agent":
            victims = [process.pid for process in self.processes if process.poll() is None]
        else:
            victims = self.below(kind)
        if not victims:
            return False
        for pid in victims if kind == "everything" else [generator.choice(sorted(victims))]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return True

    def stop(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def parents_by_pid() -> dict[int, int]:
    found = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (path / "stat").read_text().rpartition(")")[2].split()
                if fields[0] != "Z":
                    found[int(path.name)] = int(fields[1])
    return found


def torment(agents: Agents, *, kills: int, pause: float, generator: random.Random, seconds: float) -> Counter[str]:
    """Kills at random moments, about one per ``pause`` seconds, and starts again what has ended, until the fleet has ended by itself.

    What is drawn stays drawn until there is one to kill: a fleet that is still starting has no children.

    Raises:
        TimeoutError: it has not after ``seconds``.
    """
    done: Counter[str] = Counter()
    kind = None
    deadline = time.monotonic() + seconds
    agents.start_missing()
    while not all(process.poll() == 0 for process in agents.processes):
        if time.monotonic() > deadline:
            agents.stop()
            raise TimeoutError(f"{dict(done)} after {seconds} s: {agents.log}")
        if sum(done.values()) < kills:
            time.sleep(generator.uniform(0, 2 * pause))
            kind = kind or generator.choices(KINDS, WEIGHTS)[0]
            if agents.kill(kind, generator):
                done[kind] += 1
                kind = None
        time.sleep(0.2)
        if any(process.poll() not in (None, 0) for process in agents.processes):
            agents.start_missing()
    return done


def outcome(output: Path, reference: Path) -> list[str]:
    """What is wrong with the results of a tormented fleet; nothing, if all went well."""
    wrong = []
    jobs = [job["name"] for job in json.loads((reference / "fleet" / "jobs.json").read_text())["jobs"]]
    for name in jobs:
        folders = [root / "fleet" / "jobs" / name for root in (reference, output)]
        ends = [[kind for kind in ("done", "failed") if (folder / f"{kind}.json").exists()] for folder in folders]
        if ends[0] != ends[1] or len(ends[1]) != 1:
            wrong.append(f"{name}: {ends[1]}, undisturbed {ends[0]}")
        elif ends[1] == ["done"]:
            expected, found = (comparable(root / name / "results.json") for root in (reference, output))
            if expected != found:
                wrong.append(f"{name}: {found}, undisturbed {expected}")
            ends = times_trained_to_the_end(output / name)
            if ends != 1:
                wrong.append(f"{name}: trained to its end {ends} times")
    wrong += [f"left over: {path}" for path in output.rglob("*.tmp*")]
    for path in output.rglob("*.json"):
        try:
            json.loads(path.read_text())
        except ValueError as error:
            wrong.append(f"{path}: {error}")
    return wrong


def times_trained_to_the_end(run: Path) -> int:
    """Of a pretended job, 1 for any other: one that is killed between its end and the fleet's note of it starts again at its last step,
    which trains nothing."""
    if not (run / "finished.log").exists():
        return 1
    starts = [int(line.split()[1]) for line in (run / "steps.log").read_text().splitlines() if line.startswith("start ")]
    last = json.loads((run / "checkpoints" / "last.pt").read_text())[0]
    return max(1, len((run / "finished.log").read_text().splitlines()) - sum(start == last for start in starts))


def comparable(path: Path) -> Any:
    """A run's results without its time."""
    return {key: value for key, value in json.loads(path.read_text()).items() if key != "seconds"}


def pretended(folder: Path, n_jobs: int, seed: int) -> list[str]:
    """Jobs of one to three seconds with a checkpoint every fifth of one; two of them are sick. Returns the script's arguments."""
    generator = random.Random(seed)
    jobs = {f"thing{i}/manyview_dev_0/nerf": [generator.randint(100, 300), "well"] for i in range(n_jobs)}
    jobs["thing0/manyview_dev_0/nerf"][1], jobs["thing1/manyview_dev_0/nerf"][1] = "bad", "crash"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pretend.json").write_text(json.dumps({"jobs": jobs, "every": 20}))
    (folder / "category_to_subset_name_list.json").write_text("{}")
    return [str(PRETEND), str(folder), f"dataset_root={folder}", "grace_seconds=5", "join_seconds=60"]


def split_at_dashes(argv: list[str]) -> tuple[list[str], list[str]]:
    """What is before ``--`` and what is after it; argparse would not take the latter once an option stands between positionals."""
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=150, help="of the pretended ones (default: %(default)s)")
    parser.add_argument("--pause", type=float, default=4.0, help="mean seconds between kills (default: %(default)s)")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hours", type=float, default=3.0, help="give up after (default: %(default)s)")
    parser.add_argument("--real", metavar="ROOT", help="train on this data set with the settings after --")
    own, settings = split_at_dashes(list(argv))
    options = parser.parse_args(own)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.real:
        real = [override("dataset_root", options.real), "training.deterministic=true", "training.checkpoint_every_seconds=1"]
        script = [str(TRAIN_ALL), *real, "threads=1", *settings]
    else:
        script = pretended(options.output / "root", options.jobs, options.seed)
    generator, seconds = random.Random(options.seed), 3600 * options.hours
    reference, tormented = options.output / "undisturbed", options.output / "tormented"
    for folder in (reference, tormented):
        shutil.rmtree(folder, ignore_errors=True)
    shape = {"nodes": options.nodes, "workers": options.workers}
    began = time.monotonic()
    print("training undisturbed, for comparison", flush=True)
    undisturbed = Agents([*script, override("output_dir", reference)], log=options.output / "undisturbed.log", **shape)
    torment(undisturbed, kills=0, pause=1.0, generator=generator, seconds=seconds)
    alone = time.monotonic() - began
    print(f"undisturbed in {alone:.0f} s; now with {options.kills} kills", flush=True)
    agents = Agents([*script, override("output_dir", tormented)], log=options.output / "tormented.log", **shape)
    done = torment(agents, kills=options.kills, pause=options.pause, generator=generator, seconds=seconds)
    wrong, whole = outcome(tormented, reference), time.monotonic() - began
    told = ", ".join(f"{n} {kind}" for kind, n in done.items())
    print(f"{sum(done.values())} kills ({told}) in {whole - alone:.0f} s; undisturbed {alone:.0f} s")
    print("\n".join(wrong) or "every healthy job done once, results identical, nothing left over")
    return 1 if wrong else 0


if __name__ == "__main__":
    run_script(main)
