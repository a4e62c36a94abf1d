"""The benchmark of busy cores: what a measured process is given, and that the busy one is gone afterwards."""

import subprocess
import types

import pytest

from benchmarks import busy_cores


@pytest.mark.parametrize(("waiting", "spins"), [(busy_cores.OWN, None), (busy_cores.SPINNING, "300000")])
def test_a_measured_process_has_its_threads_and_its_way_of_waiting(monkeypatch, waiting, spins):
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")  # of this process, not of the measured one
    seen = {}

    def run(command, env, **_):
        seen.update(command=command, env=env)
        return types.SimpleNamespace(returncode=0, stdout='told\n{"rays_per_second": 12.5}\n', stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    assert busy_cores.measured_in_a_process(["--seconds", "1"], "nerf_laptop", 2, waiting, False) == 12.5
    assert seen["command"][-4:] == ["--seconds", "1", "--one", "nerf_laptop"]
    assert seen["env"]["OMP_NUM_THREADS"] == "2" and seen["env"].get("GOMP_SPINCOUNT") == spins


def test_the_busy_process_runs_for_the_block_only(monkeypatch):
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: started.append(popen(*args, **kwargs)) or started[-1])
    with busy_cores.busy_process(True):
        assert started[0].poll() is None
    assert started[0].poll() is not None
    with busy_cores.busy_process(False):
        assert len(started) == 1
