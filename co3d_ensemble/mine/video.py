"""Pictures to an mp4 file, through imageio-ffmpeg (the extra ``[video]``), which brings its own ffmpeg."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from torch import Tensor

from co3d_ensemble.files import replaced_atomically

QUALITIES = (1, 10)  # of imageio-ffmpeg's scale, 10 the best


def check_video() -> None:
    """Raises ``RuntimeError`` where no video can be written, so that nobody computes for one."""
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise RuntimeError("videos need imageio-ffmpeg: pip install 'co3d_ensemble[video]' (video=false does without)") from error
    imageio_ffmpeg.get_ffmpeg_exe()  # RuntimeError of its own where the package came without a program


def write_video(path: Path, frames: Iterable[Tensor], *, fps: float, quality: int = 8) -> int:
    """Writes H.264 that browsers and phones play (yuv420p); the file appears whole or not at all.

    Args:
        frames: uint8, shape (3, H, W), one even size for all, computed as they are asked for.
        fps: pictures per second.
        quality: 1 to 10.

    Returns:
        The number of frames.

    Raises:
        ValueError: no frame, or a size that is odd or changes.
        RuntimeError: no ffmpeg; see :func:`check_video`.
    """
    check_video()
    import imageio_ffmpeg

    count, writer, size = 0, None, None
    with replaced_atomically(path) as temporary:
        try:
            for frame in frames:
                height, width = frame.shape[-2:]
                if writer is None:
                    size = (width, height)
                    if width % 2 or height % 2:
                        raise ValueError(f"{path}: {width} x {height} pixels; a video's sides are even")
                    # the temporary file's name does not tell the format; faststart: plays before all of it is there
                    writer = imageio_ffmpeg.write_frames(
                        str(temporary),
                        size,
                        fps=fps,
                        quality=quality,
                        macro_block_size=2,
                        output_params=["-f", "mp4", "-movflags", "+faststart"],
                        ffmpeg_log_level="error",
                    )
                    writer.send(None)
                if (width, height) != size:
                    raise ValueError(f"{path}: frame {count} has {width} x {height} pixels, the first has {size[0]} x {size[1]}")
                writer.send(np.ascontiguousarray(frame.permute(1, 2, 0).numpy()))
                count += 1
        finally:
            if writer is not None:
                writer.close()
        if not count:
            raise ValueError(f"{path}: a video needs at least one frame")
    return count
