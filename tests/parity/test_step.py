"""One whole training step of the original, through the step that training takes."""
from dataclasses import replace
from functools import cache

import pytest
import torch

from scarcenet.affine import from_view, mirror, mirrored, similarity, swap_sides
from scarcenet.config import ORIGINAL
from scarcenet.data.loader import Batch, View
from scarcenet.heatmap import encode, heatmap_loss
from scarcenet.schema import AP10K
from scarcenet.small_loss import keep_rate
from scarcenet.step import scarce_step
from scarcenet.mean_teacher import ramp

# Views are stored in half precision, so that an argmax or a rank may once in a while fall differently:
SLACK = 0.01           # of the keypoints


def centres(maps: torch.Tensor) -> torch.Tensor:
    """Positions (B, K, 2) in heatmap px, some of them beyond the edge, for which the original draws `maps` (B, K, h, w)."""
    h, w = maps.shape[-2:]
    y, x = torch.meshgrid(torch.arange(-8.0, h + 6), torch.arange(-8.0, w + 6), indexing="ij")
    candidates = torch.stack((x, y), -1).flatten(0, 1)[None]                             # (1, n, 2)
    drawn = encode(candidates, torch.ones(candidates.shape[:2]), (h, w), 1, rounded=True)[0].flatten(2)[0]
    off = (drawn ** 2).sum(1) - 2 * maps.flatten(2) @ drawn.T                            # squared distance, up to a constant
    return candidates[0][off.argmin(-1)]


def test_centres_are_found_beyond_the_edge():
    at = torch.tensor([[[0.0, 0], [-5, 3], [36, 31], [17, -2], [-7, 37]]])
    maps = encode(at, torch.ones(1, 5), (32, 32), 1, rounded=True)[0]
    found = centres(maps)
    # rounding towards zero makes -1 and 0 one position
    assert torch.equal(encode(found, torch.ones(1, 5), (32, 32), 1, rounded=True)[0], maps)
    assert torch.equal(found.clamp(min=0), at.clamp(min=0)) and (maps.amax((-2, -1)) > 0).all()


@pytest.fixture(scope="module")
def step(golden, network, tiny):
    """Runs the step with the original's choices, or with `changes` to them."""
    size, count = golden["student_view"].shape[-1], len(golden["student_view"])

    def affine(name):
        last = torch.tensor([0.0, 0, 1], dtype=torch.float64).expand(count, 1, 3)
        view = torch.cat((golden[f"{name}_matrix"], last), 1)
        flip = mirror(golden["image_width"].double() - 1)
        return torch.where(golden[f"{name}_flip"][:, None, None], view @ flip, view).float()

    strong, weak = affine("student"), affine("weak")
    plain = similarity(golden["crop_center"], golden["crop_scale"][:, 0] * 200, torch.zeros(count), size)
    batch = Batch(
        strong=View(golden["student_view"], strong), weak=View(golden["weak_view"], weak), plain=View(golden["teacher_view"], plain),
        xy=from_view(centres(golden["label_heatmap"]) * 4, strong, AP10K.swap),
        weight=swap_sides(golden["label_weight"], mirrored(strong), AP10K.swap), labelled=golden["is_labelled"], index=torch.arange(count))
    rules = replace(ORIGINAL, size=size, agree_px=float(golden["agree_px"]), truth_weight=float(golden["true_label_weight"]),
                    consistency=float(golden["consistency_weight"]))

    @cache
    def run(**changes):
        student, teacher = network().train(), network(golden, "teacher/").train()
        return scarce_step(student, teacher, batch, int(golden["epoch"]), replace(rules, **changes), AP10K)
    run.batch = batch
    return run


def in_strong_order(values, step):
    return swap_sides(values, mirrored(step.batch.strong.affine), AP10K.swap)


def other_maps(ours, theirs):
    """(B, K): which maps differ."""
    return (ours - theirs).abs().amax((-2, -1)) > 1e-3


def test_the_batch_is_the_originals(step, golden):
    """The labels that were recovered from their heatmaps draw these heatmaps, and carry the flags that are stored."""
    batch = step.batch
    assert torch.equal((batch.weight > 0), golden["visible"] > 0)
    maps, weight = encode(centres(golden["label_heatmap"]) * 4, golden["label_weight"], golden["label_heatmap"].shape[-2:], rounded=True)
    assert torch.equal(weight, golden["label_weight"])
    assert not other_maps(maps, golden["label_heatmap"]).any()


def test_prediction(step, golden):
    torch.testing.assert_close(step().prediction, golden["student_heatmap"], atol=5e-3, rtol=0)


def test_small_loss(step, golden):
    ours = in_strong_order(step().reliable, step)
    assert (ours != golden["small_loss_mask"]).float().mean() <= SLACK
    valid = int((golden["label_weight"] > 0).sum())
    assert int(ours.sum()) == int(valid * keep_rate(int(golden["epoch"])))


def test_supervised_term(step, golden):
    ours = step()
    differ = (ours.weight != golden["sup_weight"]) | other_maps(ours.target, golden["sup_target"]) & (golden["sup_weight"] > 0)
    assert differ.float().mean() <= SLACK
    assert ours.supervised.item() == pytest.approx(float(golden["sup_loss"]), rel=0.02 if differ.any() else 1e-4)
    exactly = heatmap_loss(ours.prediction, golden["sup_target"], golden["sup_weight"])
    assert float(exactly) == pytest.approx(float(golden["sup_loss"]), rel=1e-4)


def test_consistency_term(step, golden):
    ours, weight = step(), ramp(int(golden["epoch"]), float(golden["consistency_weight"]))
    differ = (ours.teacher_weight != golden["con_weight"]) | other_maps(ours.teacher_target, golden["con_target"]) & (golden["con_weight"] > 0)
    assert differ.float().mean() <= SLACK
    assert ours.consistency.item() == pytest.approx(weight * float(golden["con_loss"]), rel=0.02 if differ.any() else 1e-4)
    exactly = heatmap_loss(ours.prediction, golden["con_target"], golden["con_weight"])
    assert float(exactly) == pytest.approx(float(golden["con_loss"]), rel=1e-4)
    assert ours.loss.item() == pytest.approx((ours.supervised + ours.consistency).item(), rel=1e-6)


@pytest.mark.parametrize("change", [dict(agree_px=0.0), dict(agree_bias=0.0), dict(mixed_sides=False), dict(truth_weight=1.0)],
                         ids=lambda c: next(iter(c)))
def test_every_choice_shows(step, golden, change):
    """The stored step tells the original's choices from others: it would be no test of them otherwise."""
    ours = step(**change)
    differ = (ours.weight != golden["sup_weight"]) | other_maps(ours.target, golden["sup_target"]) & (golden["sup_weight"] > 0)
    assert differ.float().mean() > SLACK


def test_teacher_sees_only_confident_labels(step, golden):
    assert (step(consistency_confident=False).teacher_weight != golden["con_weight"]).float().mean() > SLACK
