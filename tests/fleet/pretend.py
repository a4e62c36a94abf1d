"""A fleet whose jobs pretend to train: ``pretend.py FOLDER KEY=VALUE...`` is ``launch/train_all_sequences.py`` with the jobs that
``FOLDER/pretend.json`` lists. For tests of claims, deaths and restarts, under torchrun or not.

A job counts to its number of steps and writes the count, and a sum that depends on every step, to a checkpoint now and then.
"""

from __future__ import annotations

import json
import os
import sys
import time
import types
from pathlib import Path

STEP_SECONDS = 0.01


def replace(path, text):
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def train(output, name, steps, every, how):
    """What a child does; ``how`` is ``well`` or how it fails."""
    import signal

    run = Path(output) / name
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    checkpoint = run / "checkpoints" / "last.pt"
    step, total = json.loads(checkpoint.read_text()) if checkpoint.exists() else (0, 0)
    with open(run / "steps.log", "a") as log:
        log.write(f"start {step}\n")
        log.flush()
        while step < steps and not stopped:
            if how == "bad":
                sys.exit("error: a sequence that cannot be trained")
            if how == "crash" and step == steps // 2:
                os.kill(os.getpid(), signal.SIGSEGV)
            time.sleep(STEP_SECONDS)
            step, total = step + 1, (31 * total + step) % 1_000_003
            log.write(f"{step}\n")
            log.flush()
            if step % every == 0:
                replace(checkpoint, json.dumps([step, total]))
    replace(checkpoint, json.dumps([step, total]))
    if stopped:
        sys.exit(143)
    replace(run / "checkpoints" / "best.pt", json.dumps([step, total]))
    replace(run / "results.json", json.dumps({"metrics": {"psnr_masked": float(total)}, "steps": steps}))
    with open(run / "finished.log", "a") as log:
        log.write("finished\n")


def main(folder, arguments):
    from co3d_ensemble.fleet import run
    from co3d_ensemble.fleet.jobs import Job, longest_first
    from co3d_ensemble.fleet.settings import FleetConfig, split_arguments
    from co3d_ensemble.scripts import run_with_settings

    spec = json.loads((Path(folder) / "pretend.json").read_text())

    def make_plan(settings, overrides):
        jobs = []
        for name, (steps, how) in spec["jobs"].items():
            command = (sys.executable, "-S", __file__, "--child", settings.output_dir, name, str(steps), str(spec["every"]), how)
            jobs.append(Job(name, command, "recipe", steps * STEP_SECONDS))
        return types.SimpleNamespace(jobs=longest_first(jobs))

    plan = types.ModuleType("co3d_ensemble.fleet.plan")
    plan.make_plan = make_plan
    sys.modules["co3d_ensemble.fleet.plan"] = plan

    def finish(jobs, terms, settings, arguments, stopping):
        with open(Path(settings.output_dir) / "finish.log", "a") as log:
            log.write(f"{os.environ.get('RANK', 0)}\n")

    run.finish = finish
    own, overrides = split_arguments(arguments)
    return run_with_settings(own, FleetConfig, "", lambda settings: run.run_fleet(settings, overrides, arguments))


if __name__ == "__main__":
    if sys.argv[1] == "--child":
        output, name, steps, every, how = sys.argv[2:]
        train(output, name, int(steps), int(every), how)
    else:
        sys.exit(main(sys.argv[1], sys.argv[2:]))
