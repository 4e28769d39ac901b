"""One whole training step of the official code, through the step that training takes."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from scarcenet.affine import flip_affine, from_view, is_flipped, similarity, swap_left_right
from scarcenet.config import OFFICIAL
from scarcenet.data.loader import Batch, View
from scarcenet.heatmap import encode, heatmap_loss
from scarcenet.mean_teacher import sigmoid_rampup
from scarcenet.schema import AP10K
from scarcenet.small_loss import keep_rate
from scarcenet.step import scarcenet_step

# Views are stored in half precision, so that an argmax or a rank may once in a while fall differently:
SLACK = 0.01  # of the keypoints


def draw(xy: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The official code's maps (B, K, *size) of positions (B, K, 2) in heatmap px."""
    return encode(xy, torch.ones(xy.shape[:2]), size, stride=1, quantize_targets=True)[0]


def centres(maps: torch.Tensor) -> torch.Tensor:
    """Positions (B, K, 2) in heatmap px, or beyond the edge, for which the official code draws `maps` (B, K, h, w)."""
    h, w = maps.shape[-2:]
    y, x = torch.meshgrid(torch.arange(-8.0, h + 6), torch.arange(-8.0, w + 6), indexing="ij")
    candidates = torch.stack((x, y), -1).flatten(0, 1)[None]  # (1, n, 2)
    drawn = draw(candidates, (h, w))[0].flatten(1)  # (n, h x w)
    distance = (drawn**2).sum(1) - 2 * maps.flatten(2) @ drawn.T  # squared, up to a constant
    return candidates[0][distance.argmin(-1)]


def test_centres_are_found_beyond_the_edge():
    at = torch.tensor([[[0.0, 0], [-5, 3], [36, 31], [17, -2], [-7, 37]]])
    maps = draw(at, (32, 32))
    found = centres(maps)
    # rounding towards zero makes -1 and 0 one position
    assert torch.equal(draw(found, (32, 32)), maps)
    assert torch.equal(found.clamp(min=0), at.clamp(min=0)) and (maps.amax((-2, -1)) > 0).all()


@pytest.fixture(scope="module")
def step(golden, network, tiny):
    """Runs the step with the official code's choices, or with `changes` to them."""
    size, count = golden["student_view"].shape[-1], len(golden["student_view"])

    def affine(name):
        last = torch.tensor([0.0, 0, 1], dtype=torch.float64).expand(count, 1, 3)
        view = torch.cat((golden[f"{name}_matrix"], last), 1)
        flip = flip_affine(golden["image_width"].double() - 1)
        return torch.where(golden[f"{name}_flip"][:, None, None], view @ flip, view).float()

    strong, weak = affine("student"), affine("weak")
    plain = similarity(golden["crop_center"], golden["crop_scale"][:, 0] * 200, torch.zeros(count), size)
    batch = Batch(
        strong=View(golden["student_view"], strong),
        weak=View(golden["weak_view"], weak),
        plain=View(golden["teacher_view"], plain),
        xy=from_view(centres(golden["label_heatmap"]) * 4, strong, AP10K),
        weight=swap_left_right(golden["label_weight"], is_flipped(strong), AP10K),
        labelled=golden["is_labelled"],
        index=torch.arange(count),
    )
    rules = replace(
        OFFICIAL,
        size=size,
        agree_px=float(golden["agree_px"]),
        truth_weight=float(golden["true_label_weight"]),
        consistency=float(golden["consistency_weight"]),
    )

    @cache
    def run(**changes):
        student, teacher = network().train(), network(golden, "teacher/").train()
        changed = replace(rules, **changes)
        return scarcenet_step(student, teacher, batch, epoch=int(golden["epoch"]), rules=changed, schema=AP10K)

    run.batch = batch
    return run


def in_strong_order(values, step):
    return swap_left_right(values, is_flipped(step.batch.strong.affine), AP10K)


def maps_differ(ours, theirs):
    """(B, K): which maps differ."""
    return (ours - theirs).abs().amax((-2, -1)) > 1e-3


def supervised_differs(ours, golden):
    """(B, K): which keypoints have another weight or another target in the supervised term."""
    maps = maps_differ(ours.target, golden["sup_target"]) & (golden["sup_weight"] > 0)
    return (ours.weight != golden["sup_weight"]) | maps


def test_the_batch_is_the_official_codes(step, golden):
    """The labels that were recovered from their heatmaps draw these heatmaps, and have the stored flags."""
    batch = step.batch
    assert torch.equal(batch.weight > 0, golden["visible"] > 0)
    stored = golden["label_heatmap"]
    maps, weight = encode(centres(stored) * 4, golden["label_weight"], stored.shape[-2:], quantize_targets=True)
    assert torch.equal(weight, golden["label_weight"])
    assert not maps_differ(maps, stored).any()


def test_prediction(step, golden):
    torch.testing.assert_close(step().prediction, golden["student_heatmap"], atol=5e-3, rtol=0)


def test_small_loss(step, golden):
    ours = in_strong_order(step().reliable, step)
    assert (ours != golden["small_loss_mask"]).float().mean() <= SLACK
    valid = int((golden["label_weight"] > 0).sum())
    assert int(ours.sum()) == int(valid * keep_rate(int(golden["epoch"])))


def test_supervised_term(step, golden):
    ours = step()
    differ = supervised_differs(ours, golden)
    assert differ.float().mean() <= SLACK
    assert ours.supervised.item() == pytest.approx(float(golden["sup_loss"]), rel=0.02 if differ.any() else 1e-4)
    exactly = heatmap_loss(ours.prediction, golden["sup_target"], golden["sup_weight"])
    assert float(exactly) == pytest.approx(float(golden["sup_loss"]), rel=1e-4)


def test_consistency_term(step, golden):
    ours = step()
    maps = maps_differ(ours.teacher_target, golden["con_target"]) & (golden["con_weight"] > 0)
    differ = (ours.teacher_weight != golden["con_weight"]) | maps
    assert differ.float().mean() <= SLACK
    expected = sigmoid_rampup(int(golden["epoch"]), float(golden["consistency_weight"])) * float(golden["con_loss"])
    assert ours.consistency.item() == pytest.approx(expected, rel=0.02 if differ.any() else 1e-4)
    exactly = heatmap_loss(ours.prediction, golden["con_target"], golden["con_weight"])
    assert float(exactly) == pytest.approx(float(golden["con_loss"]), rel=1e-4)
    assert ours.loss.item() == pytest.approx((ours.supervised + ours.consistency).item(), rel=1e-6)


@pytest.mark.parametrize(
    "change",
    [dict(agree_px=0.0), dict(agree_bias=0.0), dict(mix_left_right=False), dict(truth_weight=1.0)],
    ids=lambda c: next(iter(c)),
)
def test_every_choice_shows(step, golden, change):
    """The stored step tells the official code's choices from others: it would be no test of them otherwise."""
    assert supervised_differs(step(**change), golden).float().mean() > SLACK


def test_teachers_term_is_for_confident_labels_only(step, golden):
    assert (step(consistency_confident=False).teacher_weight != golden["con_weight"]).float().mean() > SLACK
