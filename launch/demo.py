"""The main job on generated data: photographs, training of an ensemble, evaluation, submission, pictures (under five minutes on two cores).

    python launch/demo.py                         # writes demo_output/
    python launch/demo.py output=OUT steps=300    # elsewhere, shorter

A finished demo is not trained again; delete the folder to start over. An interrupted one goes on.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import co3d_ensemble  # noqa: F401  (before torch, see co3d_ensemble/base/threads.py)

# isort: split
import torch

from co3d_ensemble.base.quoting import override
from co3d_ensemble.challenge.scoring import format_table, load_ground_truth
from co3d_ensemble.composition import compose_ensemble
from co3d_ensemble.data.co3d import CO3DIndex
from co3d_ensemble.data.synthetic import SyntheticConfig, generate_dataset
from co3d_ensemble.ensemble import format_members, train_ensemble
from co3d_ensemble.functional.metrics import psnr_masked
from co3d_ensemble.scripts import run_script, run_with_settings
from co3d_ensemble.settings import setting
from co3d_ensemble.submission import export_submission

CATEGORY, SUBSET = "mug", "manyview_dev_0"
SHARES = {"nerf": 0.4, "tensorf": 0.6}  # of the time for training


@dataclass
class DemoConfig:
    output: str = setting("demo_output", "folder of everything that is written", literal=True)
    minutes: float = 2.8  # of training, for both members together
    steps: int | None = None  # of every member, whatever that takes, in place of the minutes
    device: str = "auto"


def mean_colour_psnr(root: Path) -> float:
    """psnr_masked of the target frames' exact masks filled with the object's mean colour: what shape alone is worth."""
    subset = CO3DIndex(root).subset(CATEGORY, SUBSET)
    truths = [load_ground_truth(record) for record in subset.targets]
    colour = torch.cat([truth.rgb[:, truth.mask[0] > 0.5] for truth in truths], dim=1).mean(dim=1)
    scores = [psnr_masked((truth.mask > 0.5) * colour[:, None, None], truth.rgb, truth.mask) for truth in truths]
    return float(torch.stack(scores).mean())


def demo(options: DemoConfig) -> int:
    started, output = time.perf_counter(), Path(options.output)
    root = output / "dataset"
    if not (root / "category_to_subset_name_list.json").exists():
        print(f"photographing a generated {CATEGORY} into {root}", flush=True)
        generate_dataset(root, {CATEGORY: [SUBSET]}, SyntheticConfig())
    overrides = ["experiment=ensemble_demo", override("dataset_root", root), f"category={CATEGORY}", f"subset_name={SUBSET}"]
    overrides += [override("output_dir", output), f"device={options.device}"]
    if options.steps is not None:
        overrides += ["training.budget_minutes=null", f"training.max_steps={options.steps}"]
    else:
        overrides += [f"members.{name}.overrides.training.budget_minutes={share * options.minutes}" for name, share in SHARES.items()]
    config, members = compose_ensemble(overrides)
    status, results = train_ensemble(config, members)
    if results is None:
        return status
    exported = export_submission(root, output, sequence_set="dev", models=[config.name], device=options.device)
    folder = output / CATEGORY / SUBSET
    print(f"\nthe submission's own bytes, at the photographs' size:\n{format_table(exported['results'])}\n")
    print(f"target frames never seen in training:\n{format_members(results, config.name)}")
    print(f"for comparison, their exact masks filled with the object's mean colour: psnr_masked {mean_colour_psnr(root):.2f} dB")
    print(f"submission: {exported['archive']}")
    print(f"members and ensemble: {', '.join(str(folder / name) for name in (*members, config.name))} (tensorboard --logdir {output})")
    print(f"pictures (target | members | ensemble | depth | mask | error | disagreement): {folder / config.name / 'targets.png'}")
    print(f"{time.perf_counter() - started:.0f} seconds")
    return 0


def main(arguments: list[str]) -> int:
    return run_with_settings(arguments, DemoConfig, __doc__, demo)


if __name__ == "__main__":
    run_script(main)
