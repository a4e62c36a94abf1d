"""MINE's losses against their formulas written as loops, and their gradients where the formulas degenerate."""

import math

import pytest
import torch

from co3d_ensemble.functional import metrics
from co3d_ensemble.functional.mpi_losses import (
    disparity_scale,
    edge_aware_smoothness,
    edge_threshold_smoothness,
    l1_loss,
    log_disparity_loss,
    ssim_loss,
    values_at_points,
)

F64 = torch.float64


def draw(*shape, seed=0):
    return torch.rand(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def pictures(height=6, width=5, batch=2):
    return draw(batch, 3, height, width), draw(batch, 3, height, width, seed=1)


def test_l1_is_the_mean_absolute_error_as_a_loop():
    rgb, target = pictures()
    errors = [abs(a - b) for a, b in zip(rgb.flatten().tolist(), target.flatten().tolist())]
    assert l1_loss(rgb, target).item() == pytest.approx(sum(errors) / (2 * 3 * 6 * 5), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bool, F64])
def test_pixels_outside_the_mask_have_no_error_but_stay_in_the_denominator(dtype):
    rgb, target = pictures()
    mask = (draw(2, 1, 6, 5, seed=2) > 0.4).to(dtype)
    total = 0.0
    for b in range(2):
        for y in range(6):
            for x in range(5):
                if mask[b, 0, y, x]:
                    total += sum(abs(rgb[b, c, y, x] - target[b, c, y, x]).item() for c in range(3))
    assert l1_loss(rgb, target, mask).item() == pytest.approx(total / 180, rel=1e-12)


def ssim_as_loops(x, y):
    """Mean over all pixels of a channel, windows cut at the border and renormalised."""
    height, width = x.shape
    values = []
    for row in range(height):
        for column in range(width):
            window = []
            for i in range(max(0, row - 5), min(height, row + 6)):
                for j in range(max(0, column - 5), min(width, column + 6)):
                    window.append((math.exp(-((i - row) ** 2 + (j - column) ** 2) / (2 * 1.5**2)), x[i, j].item(), y[i, j].item()))
            total = sum(w for w, _, _ in window)
            mx, my = (sum(w * v[k] for w, *v in window) / total for k in (0, 1))
            vx, vy = (sum(w * (v[k] - m) ** 2 for w, *v in window) / total for k, m in ((0, mx), (1, my)))
            cov = sum(w * (a - mx) * (b - my) for w, a, b in window) / total
            values.append((2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    return sum(values) / len(values)


def test_ssim_loss_is_one_minus_the_formula_written_as_loops_over_windows():
    rgb, target = draw(2, 2, 4, 13), draw(2, 2, 4, 13, seed=1)
    expected = sum(ssim_as_loops(rgb[b, c], target[b, c]) for b in range(2) for c in range(2)) / 4
    assert ssim_loss(rgb, target).item() == pytest.approx(1 - expected, rel=1e-9)


def test_away_from_the_border_it_is_the_metric():
    rgb, target = draw(1, 3, 21, 21), draw(1, 3, 21, 21, seed=1)
    middle = torch.zeros(1, 1, 21, 21, dtype=F64)
    middle[..., 10, 10] = 1
    rgb = torch.where(middle > 0, rgb, target)  # only windows around the middle differ, none of them cut
    whole = 1 - metrics.ssim(rgb[0], target[0])  # mean over 11 x 11 windows
    assert ssim_loss(rgb, target).item() * 21**2 == pytest.approx(whole.item() * 11**2, rel=1e-9)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 8), (8, 12)])
def test_ssim_of_equal_pictures_of_any_size_costs_nothing(height, width):
    rgb, target = pictures(height, width)
    assert ssim_loss(rgb, rgb).item() == pytest.approx(0, abs=1e-12)
    assert ssim_loss(rgb, target).item() > 0.1


def test_ssim_takes_the_target_for_the_prediction_outside_the_mask():
    rgb, target = pictures(9, 9)
    mask = draw(2, 1, 9, 9, seed=2) > 0.3
    assert ssim_loss(rgb, target, mask).item() == pytest.approx(ssim_loss(torch.where(mask, rgb, target), target).item())
    leaf = rgb.clone().requires_grad_()
    ssim_loss(leaf, target, mask).backward()
    assert (leaf.grad[~mask.expand_as(leaf)] == 0).all() and (leaf.grad[mask.expand_as(leaf)] != 0).all()


def test_ssim_is_computed_in_single_precision_under_autocast_and_of_16_bits():
    rgb, target = (picture.float() for picture in pictures(12, 12))
    plain = ssim_loss(rgb, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ssim_loss(rgb, target), plain)
    assert ssim_loss(rgb.bfloat16(), target.bfloat16()).dtype == torch.float32


def test_edge_aware_smoothness_is_the_slides_formula_as_loops():
    disparity, image = 0.1 + draw(2, 1, 4, 5), draw(2, 3, 4, 5, seed=1)
    along = {0: [], 1: []}
    for b in range(2):
        mean = disparity[b].mean().item()
        for axis, (dy, dx) in enumerate(((0, 1), (1, 0))):
            for y in range(4 - dy):
                for x in range(5 - dx):
                    d = abs(disparity[b, 0, y, x] - disparity[b, 0, y + dy, x + dx]).item() / mean
                    i = sum(abs(image[b, c, y, x] - image[b, c, y + dy, x + dx]).item() for c in range(3)) / 3
                    along[axis].append(d * math.exp(-i))
    expected = sum(sum(values) / len(values) for values in along.values())
    assert edge_aware_smoothness(disparity, image).item() == pytest.approx(expected, rel=1e-12)


def test_edge_aware_smoothness_does_not_depend_on_the_unit_of_depth():
    disparity, image = 0.1 + draw(2, 1, 4, 5), draw(2, 3, 4, 5, seed=1)
    torch.testing.assert_close(edge_aware_smoothness(1000 * disparity, image), edge_aware_smoothness(disparity, image))


def sobel_as_loops(picture, y, x):
    """Horizontal and vertical response at a pixel of (H, W), edge pixels repeated."""
    height, width = picture.shape

    def at(i, j):
        return picture[min(max(i, 0), height - 1), min(max(j, 0), width - 1)].item()

    horizontal = sum(w * (at(y + i, x + 1) - at(y + i, x - 1)) for i, w in ((-1, 1), (0, 2), (1, 1)))
    vertical = sum(w * (at(y + 1, x + j) - at(y - 1, x + j)) for j, w in ((-1, 1), (0, 2), (1, 1)))
    return horizontal, vertical


def test_edge_threshold_smoothness_is_the_references_formula_as_loops():
    disparity, image = 0.1 + draw(2, 1, 5, 6), draw(2, 3, 5, 6, seed=1)
    ratio, least = 0.7, 0.5
    total = 0.0
    for b in range(2):
        for axis in (0, 1):
            pixels = [(y, x) for y in range(5) for x in range(6)]
            edge = [sum(abs(sobel_as_loops(image[b, c], y, x)[axis]) for c in range(3)) for y, x in pixels]
            slope = [abs(sobel_as_loops(disparity[b, 0], y, x)[axis]) for y, x in pixels]
            mean = sum(slope) / 30
            deviation = math.sqrt(sum((s - mean) ** 2 for s in slope) / 30 + 1e-5)
            for e, s in zip(edge, slope):
                total += max((s - mean) / deviation - least, 0) * (1 - min(e / (ratio * max(edge)), 1))
    result = edge_threshold_smoothness(disparity, image, edge_ratio=ratio, min_gradient=least)
    assert total > 0
    assert result.item() == pytest.approx(total / 60, rel=1e-12)


@pytest.mark.parametrize("smoothness", [edge_aware_smoothness, edge_threshold_smoothness])
@pytest.mark.parametrize("flat", ["disparity", "image", "both", "zero"])
def test_smoothness_and_its_gradient_are_finite_where_everything_is_flat(smoothness, flat):
    disparity, image = 0.1 + draw(1, 1, 4, 5), draw(1, 3, 4, 5, seed=1)
    if flat in ("disparity", "both"):
        disparity = torch.full_like(disparity, 0.4)
    if flat in ("image", "both"):
        image = torch.full_like(image, 0.4)
    if flat == "zero":
        disparity = torch.zeros_like(disparity)
    disparity.requires_grad_()
    loss = smoothness(disparity, image)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(disparity.grad).all()
    assert loss == 0 if flat in ("disparity", "both", "zero") else loss > 0


def test_smoothness_of_a_single_row_and_of_one_pixel():
    for height, width in ((1, 4), (4, 1), (1, 1)):
        disparity, image = 0.1 + draw(1, 1, height, width), draw(1, 3, height, width, seed=1)
        assert torch.isfinite(edge_aware_smoothness(disparity, image)) and torch.isfinite(edge_threshold_smoothness(disparity, image))


POINTS = torch.tensor(
    [
        [[0.5, 0.5, 2.0], [3.9, 2.99, 4.0], [1.2, 1.7, 0.0], [4.0, 1.0, 2.0], [-0.1, 1.0, 2.0], [2.5, 1.0, 1.0]],
        [[2.0, 0.0, 3.0], [1.0, 3.0, 2.0], [0.0, 0.0, 0.5], [2.2, 2.2, -1.0], [0.3, -0.2, 1.0], [3.999, 0.0, 8.0]],
    ],
    dtype=F64,
)
# pixel (row, column) and z of what counts in a picture of 3 x 4
COUNTED = [[(0, 0, 2.0), (2, 3, 4.0), (1, 2, 1.0)], [(0, 2, 3.0), (0, 0, 0.5), (0, 3, 8.0)]]


def log_errors(disparity):
    return [[math.log(disparity[b, 0, y, x].item()) - math.log(1 / z) for y, x, z in COUNTED[b]] for b in range(2)]


def test_points_read_the_pixel_that_holds_them():
    values = draw(2, 1, 3, 4)
    read, there = values_at_points(values, POINTS)
    assert there.tolist() == [[True, True, False, False, False, True], [True, False, True, False, False, True]]
    for b in range(2):
        assert read[b][there[b]].tolist() == [values[b, 0, y, x].item() for y, x, _ in COUNTED[b]]


def test_the_scale_is_the_exponential_of_the_mean_log_ratio_as_a_loop():
    disparity = 0.1 + draw(2, 1, 3, 4)
    expected = [math.exp(sum(errors) / 3) for errors in log_errors(disparity)]
    assert disparity_scale(disparity, POINTS).tolist() == pytest.approx(expected, rel=1e-12)


def test_disparity_over_the_scale_is_in_the_points_unit_and_translation_over_it_in_the_predictions():
    truth = 0.1 + draw(1, 1, 3, 4)
    points = torch.tensor([[[x + 0.5, y + 0.5, 1 / truth[0, 0, y, x].item()] for y in range(3) for x in range(4)]], dtype=F64)
    scale = disparity_scale(2.5 * truth, points)
    assert scale.item() == pytest.approx(2.5)
    torch.testing.assert_close(2.5 * truth / scale, truth)
    # depths of the prediction are 2.5 times smaller, so is the baseline between its cameras
    assert (1 / (2.5 * truth)).mean().item() == pytest.approx((1 / truth / scale).mean().item())
    assert log_disparity_loss(2.5 * truth, points, scale).item() == pytest.approx(0, abs=1e-12)


def test_log_disparity_is_the_formula_with_the_absolute_value_as_a_loop():
    disparity, scale = 0.1 + draw(2, 1, 3, 4), torch.tensor([0.7, 1.9], dtype=F64)
    expected = [sum(abs(e - math.log(s)) for e in errors) / 3 for errors, s in zip(log_errors(disparity), scale.tolist())]
    assert log_disparity_loss(disparity, POINTS, scale).item() == pytest.approx(sum(expected) / 2, rel=1e-12)


def test_the_slides_sum_without_the_absolute_value_would_vanish_for_every_prediction():
    disparity = 0.1 + draw(2, 1, 3, 4)
    scale = disparity_scale(disparity, POINTS)
    signed = [sum(e - math.log(s) for e in errors) for errors, s in zip(log_errors(disparity), scale.tolist())]
    assert signed == pytest.approx([0, 0], abs=1e-12)
    assert log_disparity_loss(disparity, POINTS, scale) > 0.1


def test_pictures_without_points_cost_nothing_and_do_not_dilute_the_others():
    disparity = (0.1 + draw(2, 1, 3, 4)).requires_grad_()
    points = POINTS.clone()
    points[1, :, 2] = 0
    scale = disparity_scale(disparity, points)
    assert scale[1] == 1
    alone = log_disparity_loss(disparity[:1], points[:1], scale[:1])
    torch.testing.assert_close(log_disparity_loss(disparity, points, scale), alone)
    points[..., 2] = 0
    loss = log_disparity_loss(disparity, points, disparity_scale(disparity, points))
    loss.backward()
    assert loss == 0 and (disparity.grad == 0).all()


def test_points_where_nothing_was_rendered_do_not_count():
    disparity = (0.1 + draw(2, 1, 3, 4)).requires_grad_()
    holes = disparity * torch.ones(3, 4, dtype=F64).index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(0.0, dtype=F64))
    points = POINTS.clone()
    points[0, 0, 2] = points[1, 2, 2] = 0  # the points on that pixel
    torch.testing.assert_close(disparity_scale(holes, POINTS), disparity_scale(disparity, points))
    loss = log_disparity_loss(holes, POINTS, disparity_scale(holes, POINTS))
    torch.testing.assert_close(loss, log_disparity_loss(disparity, points, disparity_scale(disparity, points)))
    loss.backward()
    assert torch.isfinite(disparity.grad).all()


def test_gradients_match_finite_differences():
    rgb, target = pictures(4, 5)
    disparity = (0.1 + draw(2, 1, 3, 4)).requires_grad_()
    image = draw(2, 3, 3, 4, seed=1)
    leaf = rgb.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: l1_loss(x, target), (leaf,))
    assert torch.autograd.gradcheck(lambda x: ssim_loss(x, target), (leaf,))
    assert torch.autograd.gradcheck(lambda d: edge_aware_smoothness(d, image), (disparity,))
    assert torch.autograd.gradcheck(lambda d: edge_threshold_smoothness(d, image, edge_ratio=2.0, min_gradient=0.1), (disparity,))
    assert torch.autograd.gradcheck(lambda d: log_disparity_loss(d, POINTS, disparity_scale(d, POINTS)), (disparity,))
