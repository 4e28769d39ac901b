"""Evaluation: the official code's numbers, pycocotools' OKS, and properties of AP, PCK and the quality of labels."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scarcenet.data.coco import Instance, PoseSet, Truth, coco_json, read_coco
from scarcenet.evaluate import (
    average_precision,
    coco_curves,
    coco_results,
    evaluate_poses,
    format_table,
    hits,
    label_quality,
    oks,
    oks_nms,
    pck,
    rescore,
    summarise,
)
from scarcenet.schema import AP10K, KeypointSchema

ROOT = Path(__file__).resolve().parents[1]
PARITY = Path(os.environ.get("SCARCENET_PARITY", ROOT / "../shared/parity"))
needs_parity = pytest.mark.skipif(
    not PARITY.is_dir(), reason=f"no numbers of the official code: {PARITY} (SCARCENET_PARITY) is not there"
)


def make_poses(n=60, k=17, species=5, families=3, images=None, seed=0) -> PoseSet:
    """`n` animals with `k` keypoints each in `images` images; None: about two of three are alone in theirs."""
    rng = np.random.default_rng(seed)
    schema = AP10K if k == 17 else KeypointSchema(tuple(f"k{i}" for i in range(k)))
    boxes = np.concatenate([rng.uniform(0, 200, (n, 2)), rng.uniform(30, 200, (n, 2))], 1)
    image = rng.integers(0, images or int(n * 0.8), n)
    category = rng.integers(0, species, n)
    instances = tuple(
        Instance(
            id=i + 1,
            image_id=int(image[i]),
            file=Path(f"{image[i]}.jpg"),
            width=400,
            height=400,
            box=tuple(boxes[i].tolist()),
            category=f"species {category[i]}",
            family=f"family {category[i] % families}",
            category_id=int(category[i]) + 1,
        )
        for i in range(n)
    )
    visible = rng.choice([0, 1, 2], (n, k), p=[0.2, 0.2, 0.6]).astype(np.uint8)
    visible[:, 0] = 2
    xy = (boxes[:, None, :2] + rng.random((n, k, 2)) * boxes[:, None, 2:]).astype(np.float32)
    xy *= visible[..., None] > 0
    return PoseSet(schema, instances, Truth(xy, visible, boxes[:, 2:].prod(1) * 0.7), Path("made up"))


def predict(poses, noise=0.05, seed=1):
    """Predictions with `noise` in units of each animal's size, and random scores."""
    rng = np.random.default_rng(seed)
    error = rng.normal(size=poses.truth.xy.shape) * noise * np.exp(rng.normal(size=(len(poses), 1, 1)))
    return poses.truth.xy + error * np.sqrt(poses.truth.area)[:, None, None], rng.random(poses.truth.visible.shape)


@needs_parity
def test_the_official_codes_numbers():
    """Through the functions that `evaluate_poses` is made of."""
    poses = read_coco(PARITY / "ap_ground_truth.json", schema=AP10K)
    predictions = json.loads((PARITY / "ap_predictions.json").read_text())
    expected = json.loads((PARITY / "ap_expected.json").read_text())
    row = {i: n for n, i in enumerate(poses.column("id").tolist())}
    points = np.array([p["keypoints"] for p in predictions]).reshape(len(predictions), len(AP10K), 3)
    box_score = np.array([p["box_score"] for p in predictions])
    found = poses.subset([row[p["annotation_id"]] for p in predictions])
    got = average_precision(poses, coco_results(found, points[..., :2], points[..., 2], box_score=box_score))
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize("k", [5, 17, 18])
def test_oks_is_pycocotools(k):
    from pycocotools.cocoeval import COCOeval

    poses = make_poses(40, k, images=1)
    xy, _ = predict(poses)
    annotations = coco_json(poses)["annotations"]
    evaluator = COCOeval(iouType="keypoints")
    evaluator.params.kpt_oks_sigmas, evaluator.params.maxDets = np.array(poses.schema.sigmas), [len(poses)]
    evaluator._gts[0, 0] = annotations
    evaluator._dts[0, 0] = [
        dict(keypoints=np.concatenate([p, np.ones((k, 1))], 1).ravel().tolist(), score=-n) for n, p in enumerate(xy)
    ]
    ours = oks(xy[:, None], poses.truth.xy, poses.truth.visible, poses.truth.area, poses.schema.sigmas)
    np.testing.assert_allclose(ours, evaluator.computeOks(0, 0), atol=1e-5)
    np.testing.assert_allclose(np.diag(ours), oks(xy, *poses.truth, poses.schema.sigmas))
    assert oks(xy[0], xy[0], np.zeros(k), 100.0, poses.schema.sigmas) == 0


def test_rescore():
    score = np.array([[0.9, 0.5, 0.2, 0.1], [0.2, 0.1, 0.0, 0.2], [1.0, 1, 1, 1]])
    np.testing.assert_allclose(rescore(score), [0.7, 0, 1])  # .2 itself does not count
    np.testing.assert_allclose(rescore(score, np.array([0.5, 1, 0.1])), [0.35, 0, 0.1])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), threshold=st.sampled_from([0.3, 0.6, 0.9]))
def test_nms_is_the_greedy_one(seed, threshold):
    rng = np.random.default_rng(seed)
    n, sigmas = 30, np.array([0.1, 0.05, 0.2])
    image, area, score = rng.integers(0, 4, n), rng.uniform(50, 150, n), rng.permutation(n) / n
    xy = rng.choice(rng.uniform(0, 40, (5, 3, 2)), n) + rng.normal(0, 1.5, (n, 3, 2))

    def coincide(i, j):
        return image[i] == image[j] and oks(xy[i], xy[j], np.ones(3), (area[i] + area[j]) / 2, sigmas) > threshold

    kept = []
    for i in np.argsort(-score):  # the plain, slow way
        if not any(coincide(i, j) for j in kept):
            kept.append(i)
    found = oks_nms(xy, score, area, image_id=image, sigmas=sigmas, threshold=threshold)
    assert set(np.flatnonzero(found)) == set(kept)


def test_ids_may_begin_with_0():
    poses = make_poses()
    from_0 = replace(poses, instances=tuple(replace(i, id=i.id - 1) for i in poses.instances))
    assert evaluate_poses(from_0, *predict(poses))["overall"] == evaluate_poses(poses, *predict(poses))["overall"]


def test_perfect_and_hopeless():
    poses = make_poses()
    ones = np.ones(poses.truth.visible.shape)
    metrics = evaluate_poses(poses, poses.truth.xy, ones)["overall"]
    # instances of other images never meet; those in one image are apart
    assert metrics["AP"] == metrics["AR"] == metrics["PCK"] == 1
    assert evaluate_poses(poses, poses.truth.xy + 1e5, ones)["overall"]["AP"] == 0


def test_groups_equal_evaluating_their_rows_alone():
    poses = make_poses(200, species=7, families=3)
    xy, score = predict(poses)
    metrics = evaluate_poses(poses, xy, score, labelled_families=["family 1"])
    family, category = poses.column("family"), poses.column("category")
    for rows, part in (
        (family == "family 0", metrics["family"]["family 0"]),
        (family != "family 1", metrics["other families"]),
        (category == "species 3", metrics["category"]["species 3"]),
    ):
        alone = evaluate_poses(poses.subset(rows), xy[rows], score[rows])["overall"]
        assert alone == pytest.approx(part)
    assert metrics["overall"]["AP"] == pytest.approx(np.mean([m["AP"] for m in metrics["category"].values()]))
    assert metrics["overall"]["instances"] == sum(m["instances"] for m in metrics["family"].values()) == 200


def test_metrics_go_through_json():
    poses = make_poses(10, 5)
    poses.truth.visible[:, 4] = 0  # a keypoint that is never annotated
    metrics = evaluate_poses(poses, *predict(poses))
    assert metrics["keypoint"]["k4"] == {"PCK": None, "error_px": None, "annotated": 0}
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    empty = evaluate_poses(poses.subset([]), np.zeros((0, 5, 2)), np.zeros((0, 5)))
    assert empty["overall"]["PCK"] is None and empty["overall"]["instances"] == 0


def test_prints_nothing(capsys):
    evaluate_poses(make_poses(10), *predict(make_poses(10)))
    assert capsys.readouterr() == ("", "")


def test_what_falls_on_an_animal_without_keypoints_is_ignored():
    """As pycocotools does with the whole file: such an animal is no miss, and a detection on it no false alarm."""
    poses = make_poses(15, 5, species=1, images=1)  # COCO counts 20 results an image
    xy, score = predict(poses, 0.01)
    results = coco_results(poses, xy, score)
    stray = dict(image_id=0, category_id=1, keypoints=[1050.0, 1050, 1] * 5, score=2.0)
    assert average_precision(poses, [*results, stray])["AP"] < average_precision(poses, results)["AP"]
    unannotated = replace(poses.instances[0], id=99, box=(1000.0, 1000.0, 100.0, 100.0))
    with_box = replace(poses, unannotated=(unannotated,))
    assert average_precision(with_box, [*results, stray]) == pytest.approx(average_precision(poses, results))


def test_what_falls_on_a_crowd_is_ignored():
    """As pycocotools does with the whole file: a pose inside a crowd's box is neither right nor wrong."""
    poses = make_poses(40, species=1, images=20)
    xy, score = predict(poses)
    alone = average_precision(poses, coco_results(poses, xy, score))["AP"]
    lost = replace(poses, truth=poses.truth._replace(xy=poses.truth.xy.copy()))
    lost.truth.xy[::2] += 5000  # half of the predictions are where no animal is
    without = average_precision(lost, coco_results(lost, xy, score))["AP"]
    crowd = tuple(replace(i, id=1000 + n, box=(0.0, 0.0, 400.0, 400.0)) for n, i in enumerate(poses.instances))
    herds = replace(lost, crowds=crowd)
    assert without < average_precision(herds, coco_results(herds, xy, score))["AP"] < alone


def test_a_herd_counts_whole():
    """COCO counts the best 20 results of an image: of 30 annotated animals, a third could not be found."""
    poses = make_poses(30, species=1, images=1)
    shift = 1000 * np.arange(30, dtype=np.float32)[:, None, None]
    apart = replace(poses, truth=poses.truth._replace(xy=poses.truth.xy + shift))
    scores = evaluate_poses(apart, apart.truth.xy, np.ones(apart.truth.visible.shape))["overall"]
    assert scores["AP"] == scores["AR"] == 1


def test_bad_predictions_are_named():
    poses = make_poses(6)
    xy, score = predict(poses)
    with pytest.raises(ValueError, match=r"predictions \(5, 17, 2\)"):
        coco_results(poses, xy[:5], score)
    xy[3, 2, 0] = np.nan
    with pytest.raises(ValueError, match="annotation 4: the prediction is not finite"):
        coco_results(poses, xy, score)


def test_nothing_found():
    poses = make_poses(6)
    assert average_precision(poses, [])["AP"] == 0
    assert summarise(coco_curves(poses, []), ["no such category"])["AP"] is None


@pytest.mark.parametrize("k", [5, 17, 18])
def test_pck(k):
    poses = make_poses(40, k)
    xy, _ = predict(poses, 0.1)
    right = total = 0
    for n, i in enumerate(poses.instances):  # the plain, slow way
        for p in range(k):
            if poses.truth.visible[n, p]:
                total += 1
                right += np.hypot(*(xy[n, p] - poses.truth.xy[n, p])) <= 0.2 * max(i.box[2:])
    assert pck(poses, xy, 0.2) == pytest.approx(right / total)
    assert np.isnan(hits(poses, xy)).sum() == (poses.truth.visible == 0).sum()


def test_label_quality():
    poses = make_poses(30)
    xy, score = predict(poses, 0.1)
    chosen, hit, annotated = score > 0.6, hits(poses, xy, 0.05), poses.truth.visible > 0
    quality = label_quality(poses, xy, chosen, 0.05)
    assert quality.precision == pytest.approx(hit[chosen & annotated].mean())
    assert quality.coverage == pytest.approx((chosen & annotated).sum() / annotated.sum())
    assert quality.count == (chosen & annotated).sum()
    assert label_quality(poses, xy, np.zeros_like(chosen)) == (None, 0, 0)
    # the parts of a partition add up to the whole
    parts = [label_quality(poses, xy, (score > a) & (score <= a + 0.25), 0.05) for a in (0, 0.25, 0.5, 0.75)]
    assert sum(p.count for p in parts) == annotated.sum() and sum(p.coverage for p in parts) == pytest.approx(1)
    assert sum(p.precision * p.count for p in parts) / annotated.sum() == pytest.approx(pck(poses, xy, 0.05))


def test_table_is_aligned():
    rows = {"a": {"AP": 0.5, "PCK": None, "instances": 3}, "longer name": {"AP": 1.0, "instances": 12345}}
    table = format_table(rows, ("AP", "PCK", "instances"))
    assert len({len(line) for line in table.splitlines()}) == 1
    assert table.splitlines()[2] == "| a           | 0.500 |   - |         3 |"


def test_two_thousand_instances_of_54_species_take_about_a_second():
    poses = make_poses(2000, species=54, families=23, images=1600)
    xy, score = predict(poses)
    start = time.process_time()
    evaluate_poses(poses, xy, score)
    assert time.process_time() - start < 5  # about 1 s; the margin is for busy machines
