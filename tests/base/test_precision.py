"""What ``precision: auto`` becomes, with devices that are only pretended."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import pytest
import torch

from co3d_ensemble.base import precision as policy

ASK = policy._cpu_multiplies_bfloat16.__wrapped__  # what the fixture of all tests puts aside


@pytest.fixture
def cpu(monkeypatch):
    """Sets what this process believes of its CPU: ``cpu(machine, library=..., avx512_bf16=..., amx=...)``."""

    def pretend(machine="x86_64", *, library=True, avx512_bf16=False, amx=False):
        monkeypatch.setattr(policy.platform, "machine", lambda: machine)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: library is not None)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: library)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)

    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(policy, "_cpu_multiplies_bfloat16", functools.cache(ASK))
    return pretend


@pytest.mark.parametrize(
    ("facts", "native"),
    [
        ({"avx512_bf16": True}, True),
        ({"amx": True}, True),
        ({"avx512_bf16": True, "amx": True}, True),
        ({}, False),  # AVX512 without BF16: the library takes it, and emulates
        ({"library": False}, False),  # AVX2
        ({"library": None, "avx512_bf16": True}, False),  # a torch without the library
        ({"machine": "aarch64"}, True),
        ({"machine": "arm64", "library": False}, False),
    ],
)
def test_a_cpu_is_native_where_it_has_the_instructions_and_torch_the_library(cpu, facts, native):
    cpu(**facts)
    assert policy.multiplies_bfloat16("cpu") is native
    assert policy.settled_precision("auto", "cpu") == ("bfloat16" if native else "float32")
    assert policy.compute_dtype("auto", "cpu") is (torch.bfloat16 if native else torch.float32)


@pytest.mark.parametrize("variable", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
@pytest.mark.parametrize(
    ("limit", "native"), [("avx2", False), ("AVX512_CORE", False), ("AVX512_CORE_BF16", True), ("AVX512_CORE_AMX", True), ("", True)]
)
def test_a_cpu_whose_instructions_are_forbidden_is_not_native(cpu, monkeypatch, variable, limit, native):
    monkeypatch.setenv(variable, limit)
    cpu(avx512_bf16=True, amx=True)
    assert policy.multiplies_bfloat16("cpu") is native


@pytest.mark.parametrize(("flags", "native"), [("fpu avx2", False), ("fpu avx512f avx512_bf16", True), ("amx_bf16", True)])
def test_the_kernels_flags_decide_where_torch_cannot_tell(cpu, monkeypatch, tmp_path, flags, native):
    cpu()
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t:\n")
    monkeypatch.setattr(policy, "Path", lambda _: tmp_path / "cpuinfo")
    assert policy.multiplies_bfloat16("cpu") is native


@pytest.mark.parametrize(("capability", "native"), [((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 1), True)])
def test_a_gpu_is_native_from_capability_8_on(monkeypatch, capability, native):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert policy.multiplies_bfloat16("cuda:1") is native


def test_other_devices_are_not_native():
    assert not policy.multiplies_bfloat16("meta")


@pytest.mark.parametrize(
    ("facts", "limit", "words"),
    [
        ({"avx512_bf16": True}, "", "a CPU with AVX512_BF16 or AMX"),
        ({}, "", "a CPU without AVX512_BF16 and AMX"),
        ({"amx": True}, "avx2", "a CPU that ONEDNN_MAX_CPU_ISA=AVX2 keeps from its AVX512_BF16 and AMX"),
        ({"machine": "aarch64"}, "", "an ARM CPU with BF16"),
        ({"machine": "aarch64", "library": False}, "", "an ARM CPU without BF16"),
    ],
)
def test_a_cpu_is_told_by_what_decides(cpu, monkeypatch, facts, limit, words):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    cpu(**facts)
    assert policy.bfloat16_words("cpu") == words


def test_a_gpu_is_told_by_its_capability(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert policy.bfloat16_words("cuda") == "a GPU of compute capability 7.5"


@pytest.mark.parametrize("native", [True, False])
def test_what_is_said_is_what_is_done(monkeypatch, native):
    monkeypatch.setattr(policy, "multiplies_bfloat16", lambda device: native)
    assert [policy.settled_precision(name, "cpu") for name in ("float32", "bfloat16")] == ["float32", "bfloat16"]


def test_an_unknown_precision_is_refused_by_value():
    with pytest.raises(ValueError, match="precision='half': expected one of auto, float32, bfloat16"):
        policy.settled_precision("half", "cpu")


def test_the_variable_of_a_real_process_is_obeyed():
    code = "from co3d_ensemble.base.precision import settled_precision; print(settled_precision('auto', 'cpu'))"
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "float32" or os.uname().machine not in ("x86_64", "amd64")
