"""Pseudo-labels from one view and from five, through the function that stage 2 calls."""
import pytest
import torch

from scarcenet.affine import similarity
from scarcenet.config import ORIGINAL
from scarcenet.data.loader import Canvases
from scarcenet.pseudo_labels import flip_views, locate, with_mirrors
from scarcenet.schema import AP10K
from scarcenet.data.augment import jitter


@pytest.fixture(scope="module")
def canvases(pseudo):
    """The stored crops are their own canvases."""
    crops = pseudo["crops"]
    affine = similarity(pseudo["center"], pseudo["scale"][:, 0] * 200, torch.zeros(len(crops)), crops.shape[1])
    return Canvases(crops, affine, affine, crops.shape[1])


def label(network, canvases, make_views):
    return locate(network(), canvases, make_views, AP10K.swap, batch=10 ** 6, lean=ORIGINAL.mirror_lean)


def heatmap_px(distance, pseudo, canvases):
    """Image px -> heatmap px. A stored pseudo-label is an argmax, so these are distances on a grid."""
    return distance * (canvases.size / 4 / (pseudo["scale"][:, 0] * 200))[:, None]


def test_one_view(network, canvases, pseudo):
    expected = pseudo["keypoints_1view"]
    found = label(network, canvases, lambda crop: flip_views(crop, canvases.size))
    torch.testing.assert_close(found.xy, expected[..., :2], atol=1e-3, rtol=0)
    torch.testing.assert_close(found.score, expected[..., 2], atol=1e-3, rtol=0)


def stored_views(pseudo, canvases):
    """`make_views` for `locate`: the stored (scale, rotation) of each view. The first is the crop itself."""
    scale, degrees = pseudo["transforms"].float().unbind(-1)                 # (N, V)

    def make(crop):
        rows = slice(len(crop))            # `locate` asks for one row to count the views, then for all
        still = torch.zeros(len(crop), dtype=torch.bool)
        views = [jitter(crop, scale[rows, v], degrees[rows, v], still, canvases.size) for v in range(scale.shape[1])]
        return with_mirrors(torch.stack(views), canvases.size)
    return make


def test_five_views(network, canvases, pseudo):
    expected = pseudo["keypoints_5views"]
    found = label(network, canvases, stored_views(pseudo, canvases))
    off = heatmap_px((found.xy - expected[..., :2]).norm(dim=-1), pseudo, canvases)
    # 1.01: a step of one pixel is 1.0000001 px long after its way through the image and back
    assert (off <= 1.01).float().mean() >= 0.92
    assert (off <= 1.51).float().mean() >= 0.96
    assert (found.score - expected[..., 2]).abs().max() <= 0.12


def test_the_lean(network, canvases, pseudo):
    """Mirror images that know where their pixels are take the lean to the left out of the pseudo-labels (METHOD, last list, 10)."""
    truth, seen = pseudo["truth"], pseudo["truth_visible"] > 0

    def lean(xy):
        step = heatmap_px((xy - truth)[..., 0], pseudo, canvases)
        return float(step[seen & (step.abs() < 3)].mean())
    upright = locate(network(), canvases, lambda crop: flip_views(crop, canvases.size), AP10K.swap)
    assert abs(lean(upright.xy)) < abs(lean(pseudo["keypoints_1view"][..., :2]))
