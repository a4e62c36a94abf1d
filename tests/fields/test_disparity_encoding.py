"""Both forms of the encoding against their formulas, one number at a time."""

import math

import pytest
import torch

from co3d_ensemble.fields.disparity_encoding import disparity_encoding, disparity_encoding_width


def test_the_reference_form_is_the_disparity_and_then_sines_and_cosines_without_pi():
    encoded = disparity_encoding(torch.tensor([[0.3, 0.001]], dtype=torch.float64), 10)
    for d, row in zip((0.3, 0.001), encoded[0].tolist(), strict=True):
        expected = [d] + [wave(2**k * d) for k in range(10) for wave in (math.sin, math.cos)]
        assert row == pytest.approx(expected, rel=1e-12)


def test_the_slides_form_has_pi_and_not_the_disparity_itself():
    encoded = disparity_encoding(torch.tensor([0.3], dtype=torch.float64), 4, "slides")
    assert encoded[0].tolist() == pytest.approx([wave(2**k * math.pi * 0.3) for k in range(4) for wave in (math.sin, math.cos)])


@pytest.mark.parametrize(("form", "width"), [("reference", 21), ("slides", 20)])
def test_the_width_is_that_of_the_encoding(form, width):
    assert disparity_encoding_width(10, form) == width == disparity_encoding(torch.rand(2, 3), 10, form).shape[-1]


def test_an_unknown_form_is_named():
    with pytest.raises(ValueError, match="'pi'"):
        disparity_encoding(torch.ones(1), 2, "pi")
