"""Single functions: heatmaps, losses, schedules, affines, flips, the confidence cut, the moving average."""

import pytest
import torch
from torch import nn

from scarcenet.affine import apply, flip_affine, invert, is_flipped, similarity, swap_left_right, to_view, warp
from scarcenet.heatmap import decode, encode, heatmap_loss, keypoint_loss, quarter_offset
from scarcenet.mean_teacher import ema_decay, ema_update, sigmoid_rampup
from scarcenet.pseudo_labels import confidence_cut
from scarcenet.schema import AP10K
from scarcenet.small_loss import keep_rate, select_small_loss

near = torch.testing.assert_close
VIEW, MAP = 256, 64  # px, of functions.npz


def test_encode(functions):
    maps, weight = encode(
        functions["encode_keypoints"],
        functions["encode_visible"].double(),
        (MAP, MAP),
        stride=VIEW / MAP,
        quantize_targets=True,
    )
    near(weight.float(), functions["encode_weight"], atol=0, rtol=0)
    # where the weight is 0, the map is empty in the official code as in ours
    near(maps.float(), functions["encode_heatmap"], atol=1e-6, rtol=0)


def test_loss(functions):
    value = heatmap_loss(functions["loss_output"], functions["loss_target"], functions["loss_weight"])
    assert float(value) == pytest.approx(float(functions["loss_value"]), rel=1e-5)


def small_loss_case(functions):
    """The losses, the valid keypoints, and the official code's mask for each keep rate."""
    masks = {float(name.rpartition("_")[2]): t for name, t in functions.items() if name.startswith("smallloss_mask_")}
    loss = keypoint_loss(functions["loss_output"], functions["loss_target"], functions["loss_weight"])
    return loss, functions["loss_weight"] > 0, masks


def test_small_loss(functions):
    loss, valid, masks = small_loss_case(functions)
    assert masks.keys() - {1.0}
    for keep, mask in masks.items():
        if keep < 1:
            assert torch.equal(select_small_loss(loss, valid, keep), mask), keep


def test_small_loss_keeps_all_at_rate_one(functions):
    """The method: the int(n x keep) smallest of the n keypoints with weight > 0, which is all of them at keep rate 1.

    There the official code's threshold drops the single largest loss, and marks a keypoint of weight 0 in its stead.
    Ours follows the method.
    """
    loss, valid, masks = small_loss_case(functions)
    ours = select_small_loss(loss, valid, 1.0)
    assert torch.equal(ours, valid)
    differ = (ours != masks[1.0]) & valid
    largest = torch.where(valid, loss, -1).flatten().argmax()
    assert not differ.flatten().index_fill(0, largest, False).any()


def test_schedules(functions):
    columns = (functions[name].tolist() for name in ("epochs", "keep_rate", "consistency_weight"))
    for epoch, keep, weight in zip(*columns, strict=True):
        assert keep_rate(epoch) == pytest.approx(keep, abs=1e-9)
        assert sigmoid_rampup(epoch) == pytest.approx(weight, abs=1e-9)


def crops(functions, degrees, size):
    """The affines of the stored crops, in double precision; scales are in units of 200 px."""
    side = functions["affine_scale"][:, 0].double() * 200
    return similarity(functions["affine_center"].double(), side, degrees, size)


def test_affine(functions):
    degrees = functions["affine_rotation_deg"]
    # the official code computes them in single precision
    near(crops(functions, degrees, VIEW)[:, :2], functions["affine_matrix"], atol=2e-3, rtol=1e-4)
    near(invert(crops(functions, 0 * degrees, MAP))[:, :2], functions["affine_inverse_64"], atol=2e-3, rtol=1e-4)


def test_decode(functions):
    maps = functions["decode_heatmap"]
    plain, quarter = decode(maps, 1), decode(maps, 1, quarter_offset)
    near(plain.xy, functions["decode_argmax"], atol=0, rtol=0)
    near(plain.score, functions["decode_score"], atol=1e-6, rtol=0)
    back = invert(crops(functions, 0 * functions["affine_rotation_deg"], MAP))[: len(maps)].float()
    near(apply(back, plain.xy), functions["decode_image_plain"], atol=1e-3, rtol=1e-5)
    near(apply(back, quarter.xy), functions["decode_image_quarter"], atol=1e-3, rtol=1e-5)


def test_confidence_cut(functions):
    assert torch.equal(confidence_cut(functions["conf"], 0.4), functions["conf_keep_40"])


def test_flip_keypoints(functions):
    xy, visible = functions["encode_keypoints"], functions["encode_visible"]
    flip = flip_affine(functions["flip_width"].double() - 1).expand(len(xy), 3, 3)
    near(to_view(xy, flip, AP10K), functions["flip_keypoints"], atol=1e-6, rtol=0)
    assert torch.equal(swap_left_right(visible, is_flipped(flip), AP10K), functions["flip_visible"])
    assert AP10K.flip_pairs == tuple(map(tuple, functions["flip_pairs"].tolist()))


def test_flip_back_heatmap(functions):
    expected = functions["flip_back_heatmap"]
    flip = flip_affine(torch.tensor([expected.shape[-1] - 1.0])).expand(len(expected), 3, 3)
    maps = functions["decode_heatmap"][: len(expected)]
    found = swap_left_right(warp(maps, flip, maps.shape[-2:]), is_flipped(flip), AP10K)
    near(found, expected, atol=2e-3, rtol=2e-3)  # both are stored in half precision


def test_ema(functions):
    before, student, after = (functions[f"ema_{n}"] for n in ("before", "student", "after"))
    for step in range(len(before)):
        old, new = (nn.ParameterList([weights[step].clone()]) for weights in (before, student))
        ema_update(old, new, ema_decay(step))
        near(old[0].data, after[step], atol=1e-6, rtol=1e-6)
