"""The stand-ins for PyTorch3D's compiled ops against naive loops, and the cases in which they stand back."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from co3d_ensemble.plugin import compat

REPOSITORY = Path(__file__).resolve().parents[2]
on_stand_ins = pytest.mark.skipif(not compat.install(), reason="PyTorch3D is compiled here: there are no stand-ins to test")


def run_python(source: str) -> str:
    """Output of ``source`` in a fresh interpreter in the repository."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(source)], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def sample_pdf_as_a_loop(bins, weights, uniforms, eps):
    """Rules of the compiled op, one sample at a time: walk the bins until the rest of u fits into one."""
    samples = []
    for edges, row, us in zip(bins.tolist(), weights.tolist(), uniforms.tolist(), strict=True):
        total = sum(row) + eps
        line = []
        for u in us:
            rest, index = u * total, 0
            while index < len(row) - 1 and rest > row[index]:
                rest -= row[index]
                index += 1
            low, high = edges[index], edges[index + 1]
            if rest > row[index]:
                line.append(high)
            elif row[index] > eps:
                line.append(low + rest / row[index] * (high - low))
            else:
                line.append(low)
        samples.append(line)
    return torch.tensor(samples, dtype=bins.dtype)


def test_sample_pdf_matches_the_rules_written_as_a_loop():
    generator = torch.Generator().manual_seed(0)
    bins = torch.rand(64, 12, dtype=torch.float64, generator=generator).sort(dim=-1).values
    weights = torch.rand(64, 11, dtype=torch.float64, generator=generator)
    weights[weights < 0.3] = 0.0  # empty bins, at the ends as well
    weights[0] = 0.0
    weights[1] = 1e-7  # all lighter than eps
    uniforms = torch.rand(64, 40, dtype=torch.float64, generator=generator)
    uniforms[:, 0], uniforms[:, 1] = 0.0, 1.0 - 1e-12
    outputs = uniforms.clone()
    compat.sample_pdf(bins, weights, outputs, 1e-5)
    torch.testing.assert_close(outputs, sample_pdf_as_a_loop(bins, weights, uniforms, 1e-5), rtol=0, atol=1e-9)


def test_sample_pdf_puts_samples_where_the_weight_is():
    bins = torch.linspace(0, 4, 5, dtype=torch.float64)[None]
    weights = torch.tensor([[0.0, 0.0, 2.0, 0.0]], dtype=torch.float64)
    outputs = torch.tensor([[0.25, 0.5, 0.75]], dtype=torch.float64)
    compat.sample_pdf(bins, weights, outputs, 1e-12)
    torch.testing.assert_close(outputs, torch.tensor([[2.25, 2.5, 2.75]], dtype=torch.float64))


@on_stand_ins
def test_pytorch3d_sample_pdf_goes_through_the_stand_in():
    from pytorch3d.renderer.implicit.sample_pdf import sample_pdf

    bins, weights = torch.linspace(0, 4, 5)[None], torch.tensor([[0.0, 0.0, 2.0, 0.0]])
    samples = sample_pdf(bins, weights, 8, det=True, eps=1e-5)
    expected = sample_pdf_as_a_loop(bins, weights, torch.linspace(0, 1, 8)[None], 1e-5)
    torch.testing.assert_close(samples, expected, rtol=0, atol=1e-4)


FIRST = [0, 3, 4]  # groups of 3, 1 and 4 rows
N_ROWS = 8


def packed_to_padded_as_a_loop(rows, first, max_size):
    padded = torch.zeros(len(first), max_size, rows.shape[1], dtype=rows.dtype)
    for group, start in enumerate(first):
        end = first[group + 1] if group + 1 < len(first) else len(rows)
        for place in range(min(end - start, max_size)):
            padded[group, place] = rows[start + place]
    return padded


@pytest.mark.parametrize("max_size", [4, 6])
def test_packed_to_padded_matches_a_loop_and_comes_back(max_size):
    rows = torch.randn(N_ROWS, 5, generator=torch.Generator().manual_seed(0))
    first = torch.tensor(FIRST)
    padded = compat.packed_to_padded(rows, first, max_size)
    assert torch.equal(padded, packed_to_padded_as_a_loop(rows, FIRST, max_size))
    assert torch.equal(compat.padded_to_packed(padded, first, N_ROWS), rows)


def test_packed_to_padded_leaves_out_what_does_not_fit():
    rows = torch.arange(8.0)[:, None]
    assert torch.equal(compat.packed_to_padded(rows, torch.tensor(FIRST), 2), packed_to_padded_as_a_loop(rows, FIRST, 2))


def test_packing_through_pytorch3d_has_the_right_values_and_gradients():
    from pytorch3d.ops import packed_to_padded, padded_to_packed

    first = torch.tensor(FIRST)
    rows = torch.randn(N_ROWS, 2, dtype=torch.float32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    padded = packed_to_padded(rows, first, 4)
    weight = torch.randn(padded.shape, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad((padded * weight).sum(), rows)
    torch.testing.assert_close(padded, packed_to_padded_as_a_loop(rows.detach(), FIRST, 4))
    torch.testing.assert_close(gradient, torch.cat((weight[0, :3], weight[1, :1], weight[2, :4])))

    cells = padded.detach().requires_grad_()
    packed = padded_to_packed(cells, first, N_ROWS)
    (gradient,) = torch.autograd.grad((packed * rows.detach()).sum(), cells)
    torch.testing.assert_close(packed.detach(), rows.detach())
    torch.testing.assert_close(gradient, packed_to_padded_as_a_loop(rows.detach(), FIRST, 4))


@pytest.mark.parametrize("norm", [1, 2])
def test_nearest_neighbours_match_cdist(norm):
    from pytorch3d.ops import knn_points

    generator = torch.Generator().manual_seed(0)
    p1, p2 = torch.randn(2, 17, 3, generator=generator), torch.randn(2, 23, 3, generator=generator)
    found = knn_points(p1, p2, K=4, norm=norm)
    distance, index = torch.cdist(p1.double(), p2.double(), p=float(norm)).sort(dim=-1)
    assert torch.equal(found.idx, index[..., :4])
    torch.testing.assert_close(found.dists.double(), distance[..., :4] ** norm, rtol=1e-5, atol=1e-6)


def test_nearest_neighbours_stop_at_the_lengths():
    p1, p2 = torch.zeros(1, 3, 3), torch.tensor([[[3.0, 0, 0], [1, 0, 0], [0, 0, 0]]])
    index, distance = compat.knn_points_idx(p1, p2, torch.tensor([2]), torch.tensor([2]), 2, 3, -1)
    assert index.tolist() == [[[1, 0, 0], [1, 0, 0], [0, 0, 0]]]  # the third of p2 is padding, and so is the third of p1
    assert distance.tolist() == [[[1, 9, 0], [1, 9, 0], [0, 0, 0]]]


@on_stand_ins
def test_a_missing_op_raises_and_names_itself():
    from pytorch3d import _C

    with pytest.raises(compat.MissingCompiledOp, match="pytorch3d._C.rasterize_meshes has no stand-in"):
        _C.rasterize_meshes(1, 2, key=3)


@on_stand_ins
def test_install_twice_keeps_the_same_module():
    before = sys.modules["pytorch3d._C"]
    assert compat.install() and compat.install()
    assert sys.modules["pytorch3d._C"] is before


def test_version_is_a_tuple_of_numbers():
    assert compat.pytorch3d_version() >= (0, 7, 4)


def test_a_compiled_build_is_left_alone():
    assert (
        run_python("""
        import sys, types
        import pytorch3d
        class Compiled(types.ModuleType):
            MAX_UINT, MAX_INT, EPS = 2**32 - 1, 2**31 - 1, 1e-6
            def __getattr__(self, name):
                if name.startswith("__"):
                    raise AttributeError(name)
                return "the compiled op"
        compiled = Compiled("pytorch3d._C")
        sys.modules["pytorch3d._C"] = pytorch3d._C = compiled
        from co3d_ensemble.plugin import compat, RUNS_ON_STAND_INS
        print(compat.install(), RUNS_ON_STAND_INS, sys.modules["pytorch3d._C"] is compiled is pytorch3d._C, compiled.sample_pdf)
        """)
        == "False False True the compiled op"
    )


def test_without_pytorch3d_the_error_says_how_to_get_it():
    assert "make env" in run_python("""
        import importlib.util
        real = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *rest: None if name == "pytorch3d" else real(name, *rest)
        try:
            import co3d_ensemble.plugin
        except ModuleNotFoundError as error:
            print(error)
        """)
