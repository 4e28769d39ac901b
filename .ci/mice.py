"""Add a pair of trainings to nbs/measured/mice-preset.csv: `python .ci/mice.py SET LABELS SEED pose|image OUT`.

SET is a set in this library's layout with the splits train and test, as `scarcenet import SOURCE --out SET --unlabelled
VIDEO --frames 60` and a test split give it. Of its labelled training images, LABELS drawn with SEED keep their labels.
Preset mine is trained on it, and the supervised baseline with as many steps. OUT/rows.csv gets a row for each of the
networks, and for each box that the test images are looked at in: the annotated one, the whole image, and, with `pose`,
the hull of what is found there.
"""

import csv
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from scarcenet.config import PRESETS
from scarcenet.data.coco import PoseSet
from scarcenet.data.loader import load_crops
from scarcenet.evaluate import evaluate_poses
from scarcenet.experiments.baseline import matched_supervised
from scarcenet.heatmap import Keypoints
from scarcenet.predict.boxes import pose_boxes, predict_in_boxes
from scarcenet.predict.network import predict
from scarcenet.predict.predictor import Predictor
from scarcenet.run.folder import open_run
from scarcenet.run.load import load_run_data
from scarcenet.run.settings import fit_settings
from scarcenet.run.train_run import train_in_folder
from scarcenet.utils.files import read_json, write_json

COLUMNS = ("set", "labels", "seed", "boxes", "looked", "network", "AP", "PCK", "error_px", "median_px", "precision")


def keep_labels(source: Path, home: Path, labels: int, seed: int) -> None:
    """A copy of the set `source` in `home`, in which `labels` training images, drawn with `seed`, have their labels."""
    (home / "annotations").mkdir(parents=True)
    (home / "images").symlink_to((source / "images").resolve())
    write_json(home / "annotations" / "test.json", read_json(source / "annotations" / "test.json"))
    train = read_json(source / "annotations" / "train.json")
    known = sorted({a["image_id"] for a in train["annotations"]})
    kept = set(np.random.default_rng(seed).permutation(known)[:labels].tolist())
    train["annotations"] = [a for a in train["annotations"] if a["image_id"] in kept]
    write_json(home / "annotations" / "train.json", train)


def looks(pose: Predictor, test: PoseSet, boxes: str) -> dict[str, Callable[[], Keypoints]]:
    """Where a network may look at the test images: name -> what it then finds."""
    given = dict(schema=pose.schema)
    whole = [(0.0, 0.0, float(i.width), float(i.height)) for i in test.instances]

    def found(places: list) -> Keypoints:
        return predict_in_boxes(pose.model, test.instances, places, pose.config, **given)

    ways = {
        "annotated": lambda: predict(pose.model, load_crops(test.instances, pose.size), pose.config, **given),
        "image": lambda: found(whole),
    }
    if boxes == "pose":
        ways["pose"] = lambda: found(pose_boxes(pose.model, test.instances, pose.config, **given))
    return ways


if __name__ == "__main__":
    source, labels, seed, boxes, out = (
        Path(sys.argv[1]),
        int(sys.argv[2]),
        int(sys.argv[3]),
        sys.argv[4],
        Path(sys.argv[5]),
    )
    home = out / f"{source.name}-{labels}-{seed}"
    keep_labels(source, home / "set", labels, seed)
    mine = replace(PRESETS["mine"], data=str(home / "set"), seed=seed, boxes=boxes, device="cpu", precision="bf16-eval")
    run = home / "run"
    config = fit_settings(mine, open_run(run, mine))
    data = load_run_data(config, open_run(run, config))
    train_in_folder(config, run, data)
    longer = matched_supervised(config, int(data.data.labels.labelled.sum()), len(data.train))
    base = open_run(home / "baseline", longer)
    train_in_folder(longer, base, load_run_data(longer, base))

    test = data.evaluated["test"]
    networks = {"stage 1": (run, "supervised"), "baseline": (base, "supervised")}
    networks |= {name: (run, name) for name in ("student", "teacher")}
    rows = []
    for network, (folder, name) in networks.items():
        for looked, find in looks(Predictor(folder, name, device="cpu"), test, boxes).items():
            poses = find()
            scores = evaluate_poses(test, poses.xy.numpy(), poses.score.numpy())["overall"]
            distance = np.linalg.norm(poses.xy.numpy() - test.truth.xy, axis=-1)[test.truth.visible > 0]
            told = [f"{scores[n]:.4f}" for n in ("AP", "PCK")]
            told += [f"{scores['error_px']:.3f}", f"{np.median(distance):.3f}", config.precision]
            rows.append([source.name, labels, seed, boxes, looked, network, *told])
    new = not (out / "rows.csv").exists()
    with open(out / "rows.csv", "a", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows(([COLUMNS] if new else []) + rows)
