"""Average precision: rescoring, OKS-NMS and COCO's evaluation with AP-10K's sigmas, as in all of our tables."""

import json

import numpy as np
import pytest

from scarcenet.data.coco import read_coco
from scarcenet.evaluate import average_precision, coco_results
from scarcenet.schema import AP10K


def test_average_precision(parity):
    truth = read_coco(parity / "ap_ground_truth.json", schema=AP10K)
    predictions = json.loads((parity / "ap_predictions.json").read_text())
    expected = json.loads((parity / "ap_expected.json").read_text())
    row = {i: n for n, i in enumerate(truth.column("id").tolist())}
    predicted = truth.subset([row[p["annotation_id"]] for p in predictions])
    points = np.array([p["keypoints"] for p in predictions]).reshape(len(predictions), len(AP10K), 3)
    box_score = np.array([p["box_score"] for p in predictions])
    results = coco_results(predicted, points[..., :2], points[..., 2], box_score=box_score)
    found = average_precision(truth, results)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name
