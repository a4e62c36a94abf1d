"""In which precision networks multiply: what ``auto`` means on a device.

``precision: auto | float32 | bfloat16`` is the same setting for every network of this package. ``auto`` is bfloat16 where the
device multiplies it natively and float32 elsewhere: a CPU that has to emulate bfloat16 needs many times longer than in float32.
"""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

import torch

AUTO = "auto"
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PRECISION_CHOICES = (AUTO, *PRECISIONS)
PRECISION_HELP = "auto: bfloat16 where the device multiplies it natively, else float32 | float32 | bfloat16"

NATIVE_CUDA_CAPABILITY = (8, 0)  # Ampere, the first tensor cores that take bfloat16
# names that ONEDNN_MAX_CPU_ISA may have of instruction sets that lack products of bfloat16
ISAS_WITHOUT_BFLOAT16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")


def check_precision(precision: str) -> None:
    """Raises ValueError, naming the value, for a precision that there is not."""
    if precision not in PRECISION_CHOICES:
        raise ValueError(f"precision={precision!r}: expected one of {', '.join(PRECISION_CHOICES)}")


def multiplies_bfloat16(device: torch.device | str) -> bool:
    """Whether the device has instructions for products of bfloat16 numbers that torch uses.

    CUDA: capability 8.0 or higher. x86: AVX512_BF16 or AMX, unless ``ONEDNN_MAX_CPU_ISA`` forbids them to the library that torch
    multiplies bfloat16 with. (``ATEN_CPU_CAPABILITY`` has no say in its products.) ARM: the BF16 extension. Other devices: no.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= NATIVE_CUDA_CAPABILITY
    return device.type == "cpu" and _cpu_multiplies_bfloat16()


def bfloat16_words(device: torch.device | str) -> str:
    """The device by what decides, such as "a CPU with AVX512_BF16 and AMX" or "a GPU of compute capability 7.5"."""
    device = torch.device(device)
    if device.type == "cuda":
        return "a GPU of compute capability {}.{}".format(*torch.cuda.get_device_capability(device))
    if device.type != "cpu":
        return f"a device of type {device.type}"
    if not _is_x86():
        return f"an ARM CPU {'with' if _cpu_multiplies_bfloat16() else 'without'} BF16"
    if _cpu_multiplies_bfloat16():
        return "a CPU with AVX512_BF16 or AMX"
    if _x86_has_bfloat16() and _isa_limit():
        return f"a CPU that ONEDNN_MAX_CPU_ISA={_isa_limit()} keeps from its AVX512_BF16 and AMX"
    return "a CPU without AVX512_BF16 and AMX"


@functools.cache  # the library reads its variable once per process, too
def _cpu_multiplies_bfloat16() -> bool:
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None) if torch.backends.mkldnn.is_available() else None
    if supported is None or not supported():  # on ARM that is the answer; on x86 it says AVX512, which may emulate
        return False
    if not _is_x86():
        return True
    return _x86_has_bfloat16() and _isa_limit() not in ISAS_WITHOUT_BFLOAT16


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def _x86_has_bfloat16() -> bool:
    """From torch, or from the kernel's flags where this torch (2.4) does not tell."""
    asked = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    if None not in asked:
        return any(ask() for ask in asked)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _isa_limit() -> str:
    """What the environment lets the library use at most, upper case; "" where it says nothing. The second name is the older one."""
    return (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "").upper()


def settled_precision(precision: str, device: torch.device | str) -> str:
    """``float32`` or ``bfloat16``: ``auto`` as it is meant on the device, the others as they are.

    Raises:
        ValueError: another precision.
    """
    check_precision(precision)
    if precision != AUTO:
        return precision
    return "bfloat16" if multiplies_bfloat16(device) else "float32"


def compute_dtype(precision: str, device: torch.device | str) -> torch.dtype:
    """The dtype of autocast on the device; float32 stands for no autocast."""
    return PRECISIONS[settled_precision(precision, device)]


def autocast(device: torch.device | str, dtype: torch.dtype) -> torch.autocast:
    """Autocast to ``dtype``; for float32 a region without any, also inside one with."""
    return torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype != torch.float32)
