import math

import pytest
import torch

from co3d_ensemble.fields.encoding import encoding_width, harmonic_encoding


def test_encoding_is_all_sines_all_cosines_then_the_input():
    x = [0.3, -1.7]
    expected = [math.sin(2**k * v) for v in x for k in range(3)] + [math.cos(2**k * v) for v in x for k in range(3)] + x
    result = harmonic_encoding(torch.tensor([x], dtype=torch.float64), 3)
    assert result[0].tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n_harmonics", [0, 1, 10])
def test_width_is_that_of_the_encoding(n_harmonics):
    assert harmonic_encoding(torch.zeros(2, 3), n_harmonics).shape == (2, encoding_width(3, n_harmonics))
