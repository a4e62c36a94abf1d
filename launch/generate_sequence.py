"""Generates sequences in CO3Dv2 layout: demo data with known geometry, cameras, masks and depth.

    python launch/generate_sequence.py data/synthetic
    python launch/generate_sequence.py data/synthetic --categories mug,truck --subsets manyview_dev_0,manyview_test_0
    python launch/generate_sequence.py data/noisy --categories bear --mask-noise 0.03 --pose-noise 0.01 --size 96x128

Every category gets one sequence per subset. Categories named after an object (mug, bear, truck, plant) show it.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from co3d_ensemble.data.synthetic import OBJECTS, SyntheticConfig, generate_dataset
from co3d_ensemble.scripts import configure_logging, reported, run_script


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    defaults = SyntheticConfig()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", help="dataset root, created or added to")
    parser.add_argument("--categories", default="mug", help="comma-separated names (default: %(default)s)")
    parser.add_argument("--subsets", default="manyview_dev_0", help="comma-separated names (default: %(default)s)")
    parser.add_argument("--frames", default="40,5,5", metavar="KNOWN,VAL,UNSEEN", help="(default: %(default)s)")
    parser.add_argument("--size", default="128", metavar="SIDE or HxW", help="pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--object", default=defaults.object, help=f"auto, {', '.join(OBJECTS)}")
    parser.add_argument("--texture", default=defaults.texture, help="auto or a pattern")
    parser.add_argument("--scene-scale", type=float, default=defaults.scene_scale, help="radius of the object, world units")
    parser.add_argument("--mask-noise", type=float, default=defaults.mask_noise, help="boundary shift, share of a side")
    parser.add_argument("--pose-noise", type=float, default=defaults.pose_noise, help="radians, and camera distances")
    parser.add_argument("--supersample", type=int, default=defaults.supersample)
    parser.add_argument("--intrinsics-format", default=defaults.intrinsics_format)
    parser.add_argument("--image-format", default=defaults.image_format, help="jpg or png")
    return parser.parse_args(arguments)


def integers(text: str, separator: str, count: int, option: str) -> list[int]:
    parts = text.split(separator)
    if len(parts) != count or not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"{option}={text!r}: expected {count} integers separated by '{separator}'")
    return [int(part) for part in parts]


def generate(options: dict[str, Any]) -> int:
    root, categories, subsets = options.pop("root"), options.pop("categories"), options.pop("subsets").split(",")
    n_known, n_val, n_unseen = integers(options.pop("frames"), ",", 3, "--frames")
    size = options.pop("size")
    height, width = integers(size if "x" in size else f"{size}x{size}", "x", 2, "--size")
    config = SyntheticConfig(n_known=n_known, n_val=n_val, n_unseen=n_unseen, height=height, width=width, **options)
    generate_dataset(root, {category: subsets for category in categories.split(",")}, config)
    print(f"wrote {len(categories.split(',')) * len(subsets)} sequences of {n_known + n_val + n_unseen} frames to {root}")
    return 0


def main(arguments: Sequence[str]) -> int:
    options = vars(parse_arguments(arguments))
    configure_logging()
    return reported(lambda: generate(options))


if __name__ == "__main__":
    run_script(main)
