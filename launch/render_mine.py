"""Moves the camera around one photograph: a video, pictures, and its multiplane image for web viewers.

    python launch/render_mine.py image=photo.jpg fov=60 checkpoint=outputs/mine/RUN
    python launch/render_mine.py image=photo.jpg checkpoint=outputs/mine/RUN trajectory=spiral planes=64 output_scale=2
    python launch/render_mine.py image=photo.jpg checkpoint=outputs/mine/RUN video=false     # pictures and planes only

Needs a run of launch/train_mine.py, whose best weights are used, or a checkpoint file of MINE's authors with its params.yaml beside
it (or preset=mine_realestate10k and the like). The photograph passes the network once, every view is rendered from its planes.
Written to <output_dir>/<name of the photograph>: video.mp4, rgb.png and depth.png (the multiplane image from
the photograph's own camera; near red, far blue), mpi/ (an RGBA PNG per plane and mpi.json with camera and conventions) and
render.json (what was done). The path has no unit of length: amplitude says how far the nearest surface moves.

Exit codes: 0 done, 1 an error that the message explains, 2 wrong arguments, 130 Ctrl-C.
"""

from __future__ import annotations

from co3d_ensemble.mine.render_photo import RenderConfig, render_photo
from co3d_ensemble.scripts import run_script, run_with_settings
from co3d_ensemble.settings import settings_with_help


def show(settings: RenderConfig) -> int:
    report = render_photo(settings)
    size = f"{report['width']} x {report['height']} pixels, {report['planes']} planes"
    print(f"{size}, field of view {report['fov_degrees']:.1f} degrees ({report['fov_from']}), zoom {report['zoom']:.2f}")
    for file in (*report["files"], "render.json"):
        print(f"{report['folder']}/{file}")
    return 0


def main(arguments: list[str]) -> int:
    listed = "\n".join(f"  {key}={default}\n      {text}" for key, default, text in settings_with_help(RenderConfig))
    return run_with_settings(arguments, RenderConfig, f"{__doc__}\nSettings:\n\n{listed}\n", show)


if __name__ == "__main__":
    run_script(main)
