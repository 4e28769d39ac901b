"""Pseudo-labels from one view and from five, through the function that stage 2 calls."""

import pytest
import torch

from scarcenet.affine import similarity
from scarcenet.config import OFFICIAL
from scarcenet.data.augment import jitter
from scarcenet.data.loader import CropCache
from scarcenet.pseudo_labels import flip_views, predict_multiview, with_flips
from scarcenet.schema import AP10K
from scarcenet.utils.device import prepare_model


@pytest.fixture(scope="module")
def crops(pseudo):
    """The stored crops are their own cached crops."""
    crops = pseudo["crops"]
    affine = similarity(pseudo["center"], pseudo["scale"][:, 0] * 200, torch.zeros(len(crops)), crops.shape[1])
    return CropCache(crops, affine, affine, crops.shape[1])


@pytest.fixture(params=[False, True], ids=["as it is", "folded"])
def predict(request, network):
    """`predict_multiview` of the official code's network, with its batch norms as they are, or folded."""

    def call(crops, make_views):
        model = prepare_model(network(), "float32", folding="once") if request.param else network()
        found = predict_multiview(model, crops, make_views, schema=AP10K, batch=10**6, shift_px=OFFICIAL.flip_shift_px)
        assert not request.param or model.folded
        return found

    return call


def heatmap_px(distance, pseudo, crops):
    """Image px -> heatmap px. A stored pseudo-label is an argmax, so these are distances on a grid."""
    return distance * (crops.size / 4 / (pseudo["scale"][:, 0] * 200))[:, None]


def test_one_view(predict, crops, pseudo):
    expected = pseudo["keypoints_1view"]
    found = predict(crops, lambda crop: flip_views(crop, crops.size))
    torch.testing.assert_close(found.xy, expected[..., :2], atol=1e-3, rtol=0)
    torch.testing.assert_close(found.score, expected[..., 2], atol=1e-3, rtol=0)


def stored_views(pseudo, crops):
    """`make_views` for `predict_multiview`: the stored (scale, rotation) of each view. The first is the crop itself."""
    scales, degrees = pseudo["transforms"].float().permute(2, 1, 0)  # (V, N) both

    def make(crop):
        still = torch.zeros(len(crop), dtype=torch.bool)
        views = [jitter(crop, s, d, still, crops.size) for s, d in zip(scales, degrees, strict=True)]
        return with_flips(torch.stack(views), crops.size)

    return make


def test_five_views(predict, crops, pseudo):
    expected = pseudo["keypoints_5views"]
    found = predict(crops, stored_views(pseudo, crops))
    off = heatmap_px((found.xy - expected[..., :2]).norm(dim=-1), pseudo, crops)
    # 1.01: a step of one pixel is 1.0000001 px long after its way through the image and back
    assert (off <= 1.01).float().mean() >= 0.92
    assert (off <= 1.51).float().mean() >= 0.96
    assert (found.score - expected[..., 2]).abs().max() <= 0.12


def test_flips_by_affine_are_not_shifted(network, crops, pseudo):
    """The official code's pseudo-labels lie too far left, since it flips arrays; flips that are affines mend that."""
    truth, visible = pseudo["truth"], pseudo["truth_visible"] > 0

    def shift_px(xy):
        error = heatmap_px((xy - truth)[..., 0], pseudo, crops)
        return float(error[visible & (error.abs() < 3)].mean())

    ours = predict_multiview(network(), crops, lambda crop: flip_views(crop, crops.size), schema=AP10K)
    assert abs(shift_px(ours.xy)) < abs(shift_px(pseudo["keypoints_1view"][..., :2]))
