"""Own animals: held-out images, boxes for images that have none, settings that fit, and runs that evaluate nothing."""

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import scarcenet as sn
from scarcenet.cli.main import main
from scarcenet.config import PRESETS
from scarcenet.data.boxes import alone, first_looks, look_wider, place_boxes, read_boxes, use_empty
from scarcenet.data.coco import Instance, parse_coco, read_coco
from scarcenet.data.splits import BOXES_FILE, hold_out, read_splits
from scarcenet.models.build import build_network
from scarcenet.predict.boxes import detector_boxes, load_detector, pose_boxes
from scarcenet.predict.predictor import find_poses
from scarcenet.run.load import load_run_data, warn_of_set
from scarcenet.run.settings import fit_settings, fitted_fields, passes
from scarcenet.utils.files import read_json, write_json

QUICK = dict(
    network="hrnet_tiny",
    backbone="",
    size=32,
    supervised_epochs=1,
    supervised_repeat=1,
    epochs=2,
    batch=8,
    views=1,
    device="cpu",
    precision="float32",
    keep_epochs=1,
    rampup_epochs=1,
    labelled_repeat=1,
)
FLAGS = [
    f"--{k.replace('_', '-')}={v}" if v != "" else f"--{k.replace('_', '-')}=" for k, v in QUICK.items()
]  # fmt: skip


@pytest.fixture
def project(zoo, tmp_path) -> Path:
    """A set with a train split only; eight of its images have annotations, without boxes."""
    root = tmp_path / "project"
    (root / "annotations").mkdir(parents=True)
    shutil.copytree(zoo / "data", root / "images")
    content = read_json(zoo / "annotations" / "ap10k-train-split1.json")
    kept = {image["id"] for image in content["images"][:8]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    for annotation in content["annotations"]:
        del annotation["bbox"]
    write_json(root / "annotations" / "train.json", content)
    return root


def label_some(project: Path, videos: int) -> dict:
    """Give the images of `project` the names of so many videos."""
    file = project / "annotations" / "train.json"
    content = read_json(file)
    for n, image in enumerate(content["images"]):
        image["video"] = f"video{n % videos}"
    write_json(file, content)
    return content


# ---- held-out images


def test_hold_out_is_a_draw_of_images(project):
    poses = read_coco(project / "annotations" / "train.json")
    rest, held = hold_out(poses, 0.25, seed=0)
    again, _ = hold_out(poses, 0.25, seed=0)
    assert rest.instances == again.instances and rest.empty == again.empty
    images = [set(part.column("image_id").tolist()) for part in (rest, held)]
    assert not images[0] & images[1] and images[0] | images[1] == set(poses.column("image_id").tolist())
    assert len(images[1]) == 2 and len(images[0]) == 6
    assert len(rest.empty) == len(poses.empty) and not held.empty
    assert rest.truth.xy.shape[0] == len(rest) and np.isfinite(held.truth.xy).all()


def test_hold_out_keeps_videos_together(project):
    label_some(project, videos=4)
    poses = read_coco(project / "annotations" / "train.json")
    rest, held = hold_out(poses, 0.25, seed=1)
    videos = [{i.video for i in part.instances} for part in (rest, held)]
    assert len(videos[1]) == 1 and not videos[0] & videos[1]


def test_hold_out_of_one_image_is_refused(project):
    poses = read_coco(project / "annotations" / "train.json")
    one = poses.subset(poses.column("image_id") == poses.instances[0].image_id)
    with pytest.raises(ValueError, match="too few labelled images to hold some out: 1; use --holdout 0"):
        hold_out(one, 0.5, seed=0)


def test_splits_of_the_set_come_first(zoo, tmp_path):
    """A set that has val and test is evaluated on them, whatever share is to be held out."""
    config = sn.Config(data=str(zoo), holdout=0.5)
    assert read_splits(config, tmp_path).evaluated.keys() == {"val", "test"}
    assert len(read_splits(config, tmp_path).train) == len(read_splits(sn.Config(data=str(zoo)), tmp_path).train)


def test_val_alone_or_test_alone(zoo, tmp_path):
    for name in ("val", "test"):
        root = tmp_path / name
        (root / "annotations").mkdir(parents=True)
        (root / "data").symlink_to(zoo / "data")
        for split in ("train", name):
            shutil.copy(zoo / "annotations" / f"ap10k-{split}-split1.json", root / "annotations" / f"{split}.json")
        assert read_splits(sn.Config(data=str(root), holdout=0.5), tmp_path).evaluated.keys() == {name}


# ---- boxes


def crowded(poses) -> np.ndarray:
    """(N,) bool: there is another animal in the instance's image."""
    images = poses.column("image_id")
    return np.array([(images == image).sum() > 1 for image in images])


def test_the_whole_image(project):
    """Of animals that are alone in their image; several would share one crop, with other labels each."""
    content = read_json(project / "annotations" / "train.json")
    content["annotations"].append(content["annotations"][0] | {"id": 9999})
    write_json(project / "annotations" / "train.json", content)
    poses = read_coco(project / "annotations" / "train.json")
    wide = look_wider(poses, alone(poses))
    assert crowded(poses).any() and not crowded(poses).all()
    for before, after, other in zip(poses.instances, wide.instances, crowded(poses), strict=True):
        assert before.box_source == "keypoints" and after.box == before.box
        assert after.crop_box == (None if other else (0, 0, after.width, after.height))
    used = use_empty(poses)
    assert len(poses.empty) > 0 and not used.empty and len(used.unannotated) == len(poses.empty)
    for image in used.unannotated:
        assert image.box == (0, 0, image.width, image.height)


def test_an_own_box_stays_what_the_network_looks_at(zoo):
    poses = read_coco(zoo / "annotations" / "ap10k-train-split1.json")
    assert not alone(poses).any()


def test_boxes_of_a_file_reach_their_images(project, zoo):
    """By the images' names, whatever ids they have in that file; several animals an image, and none twice."""
    content = read_json(zoo / "annotations" / "ap10k-train-split1.json")
    for image in content["images"]:
        image["id"] += 1000
        image["file_name"] = "elsewhere\\" + image["file_name"]
    for annotation in content["annotations"]:
        annotation["image_id"] += 1000
    boxes = project / "boxes.json"
    write_json(boxes, content)
    poses = read_coco(project / "annotations" / "train.json")
    placed = place_boxes(poses, read_boxes(boxes, poses), "file")
    names = {(i.file.name, i.box) for i in placed.unannotated}
    expected = {
        (image["file_name"].rpartition("\\")[2], tuple(map(float, a["bbox"])))
        for image in content["images"]
        for a in content["annotations"]
        if a["image_id"] == image["id"]
    }
    labelled = {i.file.name for i in poses.instances}
    assert names == {(name, box) for name, box in expected if name not in labelled}
    assert len({i.id for i in placed.instances + placed.unannotated}) == len(placed) + len(placed.unannotated)


@pytest.mark.parametrize(
    "content, line",
    [
        ([], "no box of its 0 entries is in"),
        ("text", "expected COCO annotations or a list of results"),
        ([{"image_id": 1, "bbox": [0, 0, 0, 5]}, {"bbox": None}, 3], "no box of its 3 entries is in"),
        ([{"image_id": 987654, "bbox": [0, 0, 9, 5]}], "1 are of other images"),
        ([{"image_id": 1, "bbox": [0, 0, 9, 5], "score": 0.1}], "a score of 0.5 or more"),
    ],
)
def test_files_without_boxes(project, content, line):
    file = project / "boxes.json"
    write_json(file, content)
    with pytest.raises(ValueError, match=line):
        read_boxes(file, read_coco(project / "annotations" / "train.json"))


class Sees(torch.nn.Module):
    """Finds every keypoint where the image is brightest, four view px to a heatmap px."""

    def __init__(self, keypoints: int):
        super().__init__()
        self.keypoints = keypoints
        self.seen: list[int] = []
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images):
        self.seen.append(len(images))
        light = images.mean(1, keepdim=True)
        maps = torch.nn.functional.max_pool2d(light, 4)
        maps = maps / maps.amax((2, 3), keepdim=True).clamp_min(1e-6)
        return maps.clamp_min(0).expand(-1, self.keypoints, -1, -1)


def test_pose_boxes_find_the_animal(tmp_path):
    """A white square in a large dark image: the second look's box lies around it."""
    from PIL import Image

    pixels = np.zeros((240, 320, 3), np.uint8)
    pixels[150:162, 200:212] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    box = (0.0, 0.0, 320.0, 240.0)
    instance = Instance(
        id=1, image_id=1, file=tmp_path / "a.png", width=320, height=240, box=box, category="a", family="a"
    )
    schema = sn.KeypointSchema(("a", "b"))
    config = sn.Config(size=64, device="cpu", precision="float32")
    (found,) = pose_boxes(Sees(2), [instance], config, schema=schema)
    x, y, w, h = found
    assert x <= 206 <= x + w and y <= 156 <= y + h
    assert max(w, h) < 120


def test_unsure_networks_leave_the_image(tmp_path, zoo):
    poses = read_coco(zoo / "annotations" / "ap10k-train-split1.json")
    images = [replace(i, box=(0.0, 0.0, float(i.width), float(i.height))) for i in poses.instances[:3]]
    config = sn.Config(network="hrnet_tiny", size=32, device="cpu")
    model = build_network(config, 17)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert pose_boxes(model, images, config, schema=poses.schema) == [i.box for i in images]


DETECTOR = "fasterrcnn_mobilenet_v3_large_320_fpn"


@pytest.fixture
def made_weights(tmp_path, monkeypatch):
    """Weights where torchvision's loader looks for them: a detector that takes everything for a dog."""
    from torchvision import models

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    weights = models.get_model_weights(DETECTOR).DEFAULT
    torch.manual_seed(0)
    model = models.get_model(DETECTOR, weights=None, weights_backbone=None)
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.weight.zero_()
        model.roi_heads.box_predictor.cls_score.bias.zero_()
        model.roi_heads.box_predictor.cls_score.bias[weights.meta["categories"].index("dog")] = 9
    folder = Path(torch.hub.get_dir(), "checkpoints")
    folder.mkdir(parents=True)
    torch.save(model.state_dict(), folder / Path(weights.url).name)


def test_detector(made_weights, zoo):
    """Torchvision's own loader and network, with weights made here."""
    poses = read_coco(zoo / "annotations" / "ap10k-train-split1.json")
    config = sn.Config(detector=DETECTOR, device="cpu")
    results = detector_boxes(poses.instances[:2], config)
    assert {r["image_id"] for r in results} <= {i.image_id for i in poses.instances[:2]} and results
    assert all(r["score"] >= 0.5 and min(r["bbox"][2:]) > 0 for r in results)
    with pytest.raises(ValueError, match="found no sheep in 2 images; use other --boxes"):
        detector_boxes(poses.instances[:2], replace(config, detector_classes=("sheep",)))


def test_detectors_that_do_not_exist(made_weights):
    with pytest.raises(ValueError, match="detector 'yolo': expected one of .*fasterrcnn"):
        load_detector("yolo")
    with pytest.raises(ValueError, match="expected classes of COCO .*giraffe.*got 'rat'"):
        load_detector(DETECTOR, ["rat"])
    with pytest.raises(ValueError, match="COCO's mouse is a computer mouse"):
        load_detector(DETECTOR, ["mouse"])


def test_names_without_their_folder_are_not_mistaken(tmp_path):
    """A box of vb/2.png is none of va/2.png; a bare name that is there once on both sides is."""
    images = [
        dict(id=1, file_name="va/2.png", width=64, height=48),
        dict(id=2, file_name="va/3.png", width=64, height=48),
    ]
    content = dict(images=images, annotations=[], categories=[dict(id=1, name="a", keypoints=["x", "y"])])
    content["annotations"] = [
        dict(id=1, image_id=1, category_id=1, keypoints=[5, 5, 2, 20, 20, 2], bbox=[0, 0, 30, 30])
    ]
    poses = parse_coco(tmp_path / "a.json", content, tmp_path)
    other = [dict(id=7, file_name="vb/2.png"), dict(id=8, file_name="va/2.png"), dict(id=9, file_name="3.png")]
    boxes = [dict(image_id=key, bbox=[key, 1, 9, 9]) for key in (7, 8, 9)]
    write_json(tmp_path / "boxes.json", dict(images=other, annotations=boxes))
    assert read_boxes(tmp_path / "boxes.json", poses) == {1: [(8, 1, 9, 9)], 2: [(9, 1, 9, 9)]}


def test_a_large_box_of_a_labelled_animal_is_that_animal(project):
    """Its keypoints' hull may be much smaller; other animals of the image are added."""
    poses = read_coco(project / "annotations" / "train.json")
    row = int(np.flatnonzero(~crowded(poses))[0])
    i = poses.instances[row]
    x, y, w, h = i.box
    around = (x - w, y - h, 4 * w, 4 * h)
    assert not place_boxes(poses, {i.image_id: [around]}, "file").unannotated
    beside = (x + 2 * w, y, w, h)
    assert [a.box for a in place_boxes(poses, {i.image_id: [around, beside]}, "file").unannotated] == [beside]


@pytest.mark.parametrize("boxes", ["", "image", "pose"])
def test_held_back_keypoints_choose_no_crop(project, tmp_path, boxes):
    """With labels for some images only, the others' hulls are truth: moved, they change nothing that training sees."""
    content = read_json(project / "annotations" / "train.json")
    for annotation in content["annotations"]:
        annotation["category_id"] = content["categories"][0]["id"]
    write_json(project / "annotations" / "train.json", content)
    moved = json.loads(json.dumps(content))
    config = sn.Config(data=str(project), labels=2, boxes=boxes, device="cpu", size=32)
    before = load_run_data(config, tmp_path)
    hidden = {i.id for i in before.train.subset(~before.labelled).instances}
    for annotation in moved["annotations"]:
        if annotation["id"] in hidden:
            annotation["keypoints"] = [v / 2 if n % 3 < 2 else v for n, v in enumerate(annotation["keypoints"])]
    write_json(project / "annotations" / "train.json", moved)
    after = load_run_data(config, tmp_path)
    assert hidden and not np.array_equal(before.train.truth.xy, after.train.truth.xy)
    assert torch.equal(before.data.crops.affine, after.data.crops.affine)
    assert torch.equal(before.data.crops.pixels, after.data.crops.pixels)
    assert all(torch.equal(a, b) for a, b in zip(before.data.labels, after.data.labels, strict=True))


def test_pose_learns_from_labelled_animals_twice(project, tmp_path):
    """Close and in the whole image, with the same labels; unlabelled ones once; they count once."""
    data = load_run_data(sn.Config(data=str(project), labels=2, boxes="pose", device="cpu", size=32), tmp_path)
    once = first_looks(data.train.instances)
    copies = np.flatnonzero(~once)
    assert len(copies) and data.labelled[copies].all()
    for row in copies:
        first = next(n for n, i in enumerate(data.train.instances) if i.box == data.train.instances[row].box)
        assert data.train.instances[row].crop_box and not data.train.instances[first].crop_box
        assert torch.equal(data.data.labels.xy[row], data.data.labels.xy[first])
    assert len({i.id for i in data.train.instances}) == len(data.train)


def test_pose_where_every_image_is_annotated(project, tmp_path):
    content = read_json(project / "annotations" / "train.json")
    used = {a["image_id"] for a in content["annotations"]}
    content["images"] = [image for image in content["images"] if image["id"] in used]
    write_json(project / "annotations" / "train.json", content)
    run = sn.train_run("mine", data=project, boxes="pose", out=tmp_path / "run", progress=False, **QUICK)
    assert run.best == "teacher" and not (run.folder / BOXES_FILE).exists()


def test_pose_from_given_weights(project, tmp_path):
    """Without stage 1, the boxes are what the given network finds."""
    first = sn.train_run(
        "mine", data=project, boxes="pose", out=tmp_path / "a", progress=False, **QUICK | {"epochs": 0}
    )
    settings = QUICK | dict(supervised_epochs=0, weights=str(first.folder / "supervised.safetensors"))
    run = sn.train_run("mine", data=project, boxes="pose", out=tmp_path / "b", progress=False, **settings)
    assert (run.folder / BOXES_FILE).is_file()


# ---- settings that fit


@pytest.mark.parametrize("labelled, unlabelled", [(3, 0), (8, 52), (40, 1), (30, 3000), (500, 500)])
@pytest.mark.parametrize("gpu", [False, True])
def test_settings_for_every_size(labelled, unlabelled, gpu):
    fields = fitted_fields(labelled=labelled, instances=labelled + unlabelled, gpu=gpu)
    config = replace(PRESETS["mine"], **fields)
    backward, _ = passes(config, labelled=labelled, instances=labelled + unlabelled)
    least = 16 * (500 + (200 if unlabelled else 0))  # images, of both stages
    assert backward >= least
    assert backward <= 2.2 * max(least, 8 * (1.5 * unlabelled + 2 * labelled))
    assert config.epochs == 0 if not unlabelled else config.epochs >= 8


def test_given_epochs_decide_what_depends_on_them(project, tmp_path):
    config = replace(PRESETS["mine"], data=str(project), epochs=20, boxes="image", device="cpu", size=32)
    fitted = fit_settings(replace(config, network="hrnet_tiny", backbone=""), tmp_path)
    assert (fitted.epochs, fitted.keep_epochs, fitted.rampup_epochs, fitted.evaluate_every) == (20, 12, 8, 5)


# ---- whole runs


def scarcenet(*words) -> int:
    return main([str(w) for w in words])


def test_mine_holds_out_and_says_so(project, tmp_path, capsys):
    """From a set without boxes and without val and test to a page; then every command that looks at the run."""
    run = tmp_path / "run"
    assert scarcenet("train", "mine", "--data", project, "--out", run, *FLAGS) == 0
    said = capsys.readouterr()
    assert "settings chosen:" in said.out and "min" in said.out and "2 held-out images" in said.out
    assert "held out for evaluation: frames of the same video" in said.err
    summary = read_json(run / "summary.json")
    assert summary["held_out"] == 2 and summary["networks"]["teacher"].keys() == {"val"}
    overall = summary["networks"]["teacher"]["val"]["overall"]
    assert 0 < overall["error_px"] < 1000
    page = (run / "index.html").read_text()
    assert "Held-out images" in page and "error_px" in page
    config = read_json(run / "config.json")
    assert config["fit_to_data"] and config["boxes"] in ("pose", "image") and config["epochs"] == 2
    assert scarcenet("eval", run, "--split", "val", "--device", "cpu") == 0
    assert f"{overall['AP']:.3f}" in capsys.readouterr().out
    assert scarcenet("eval", run, "--device", "cpu") == 0
    assert f"{overall['AP']:.3f}" in capsys.readouterr().out
    assert scarcenet("eval", run, "--split", "test", "--device", "cpu") == 1
    assert "split 'test': expected one of train, val" in capsys.readouterr().err
    assert scarcenet("pseudo", run, "--out", tmp_path / "pseudo.json", "--device", "cpu") == 0
    assert scarcenet("report", run, "--out", tmp_path / "report.html") == 0
    assert scarcenet("accepted", run, "--out", tmp_path / "accepted.json") == 0
    assert len(sn.open_ledger(run).instances) == len(
        find_poses(sn.open_ledger(run).config, run, split="train", unannotated=True)
    )


def test_mine_goes_on_like_an_uninterrupted_run(project, tmp_path, monkeypatch):
    """Interrupted in both stages, and between them where boxes are found: equal bits."""
    from scarcenet.run import train_run as module

    settings = QUICK | dict(data=project, boxes="pose", progress=False, supervised_epochs=2)
    whole = sn.train_run("mine", out=tmp_path / "whole", **settings)
    saved = module.save_checkpoint
    for stop in (1, 2, 3):
        out, count = tmp_path / f"stopped{stop}", iter(range(99))

        def kill_after(file, state, stop=stop, count=count):
            saved(file, state)
            if next(count) == stop - 1:
                raise KeyboardInterrupt

        monkeypatch.setattr(module, "save_checkpoint", kill_after)
        with pytest.raises(KeyboardInterrupt):
            sn.train_run("mine", out=out, **settings)
        monkeypatch.setattr(module, "save_checkpoint", saved)
        run = sn.train_run("mine", out=out, resume=True, **settings)
        assert (out / BOXES_FILE).read_bytes() == (whole.folder / BOXES_FILE).read_bytes()
        for name in ("supervised", "student", "teacher"):
            assert (out / f"{name}.safetensors").read_bytes() == (whole.folder / f"{name}.safetensors").read_bytes()
        assert run.summary["networks"] == whole.summary["networks"]


@pytest.mark.parametrize("epochs", [0, 2])
def test_all_labels_and_nothing_to_evaluate(project, tmp_path, capsys, epochs):
    run = tmp_path / "run"
    flags = [f for f in FLAGS if not f.startswith("--epochs")] + [f"--epochs={epochs}"]
    assert scarcenet("train", "mine", "--data", project, "--holdout", 0, "--out", run, *flags) == 0
    said = capsys.readouterr()
    assert "nothing was evaluated" in said.out and "held out for" not in said.err
    summary = read_json(run / "summary.json")
    assert summary["networks"][summary["best"]] == {} and summary["held_out"] == 0
    assert "Nothing was evaluated" in (run / "index.html").read_text()
    assert (run / "figures" / "curves.png").is_file() and not (run / "figures" / "best.png").exists()
    assert sn.Predictor(run, device="cpu")(np.zeros((48, 64, 3), np.uint8)).xy.shape == (1, 17, 2)
    assert scarcenet("pseudo", run, "--out", tmp_path / "pseudo.json", "--device", "cpu") == 0
    if epochs:
        assert scarcenet("report", run, "--out", tmp_path / "report.html") == 0
        assert scarcenet("explain", run, "--instance", 20, "--keypoint", "nose") == 0


def test_boxes_given_by_a_file(project, zoo, tmp_path):
    boxes = zoo / "annotations" / "ap10k-train-split1.json"
    config = sn.Config(data=str(project), boxes=str(boxes), labels="all", device="cpu", size=32)
    data = load_run_data(config, tmp_path)
    assert len(data.train) == len(read_json(boxes)["annotations"]) and not data.evaluated
    assert set(data.train.column("box_source").tolist()) == {"keypoints", "file"}


def test_labels_of_a_file_are_not_held_out(project, tmp_path):
    """Neither corrected labels nor an id list lose what they name."""
    content = read_json(project / "annotations" / "train.json")
    used = sorted({a["image_id"] for a in content["annotations"]})
    write_json(tmp_path / "ids.json", used[:4])
    corrected = content | {"annotations": [a for a in content["annotations"] if a["image_id"] in used[:4]]}
    write_json(tmp_path / "corrected.json", corrected)
    for labels in ("ids.json", "corrected.json"):
        config = sn.Config(data=str(project), labels=str(tmp_path / labels), holdout=0.25, device="cpu")
        train, known, evaluated = read_splits(config, tmp_path)
        assert set(train.subset(known.labelled).column("image_id").tolist()) == set(used[:4])
        assert not set(evaluated["val"].column("image_id").tolist()) & set(used[:4])


def test_a_failed_run_leaves_nothing_for_other_settings(project, tmp_path):
    """Data that an earlier attempt imported, or boxes that it found, are of its own settings."""
    run = tmp_path / "run"
    settings = QUICK | dict(boxes="pose", progress=False)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        sn.train_run("mine", data=project, out=run, weights="nowhere.pth", **settings)
    (run / BOXES_FILE).write_text("[]")
    (run / "data").mkdir()
    sn.train_run("mine", data=project, out=run, **settings)
    assert read_json(run / BOXES_FILE) and not (run / "data").exists()


def test_a_split_without_keypoints_is_left_out(project, tmp_path):
    content = read_json(project / "annotations" / "train.json")
    write_json(project / "annotations" / "test.json", content | {"annotations": []})
    config = sn.Config(data=str(project), labels="all", holdout=0.25)
    with pytest.warns(UserWarning, match="no instance with keypoints to evaluate on; split test is not evaluated"):
        assert read_splits(config, tmp_path).evaluated.keys() == {"val"}


def test_a_project_is_trained_on_directly(zoo, tmp_path, capsys):
    """A DeepLabCut project as --data; the run keeps its own copy, so the project may go."""
    poses = read_coco(zoo / "annotations" / "ap10k-train-split1.json")
    frames = tmp_path / "project" / "labeled-data" / "walk"
    frames.mkdir(parents=True)
    rows, names = [], poses.schema.names
    for part, cells in (("bodyparts", names), ("coords", ("x", "y"))):
        columns = [cells[n // 2] if part == "bodyparts" else cells[n % 2] for n in range(2 * len(names))]
        rows.append(",".join([part, *columns]))
    rows.insert(0, ",".join(["scorer", *["me"] * 2 * len(names)]))
    for n in range(6):
        shutil.copy(poses.instances[n].file, frames / f"img{n}.jpg")
        cells = np.where(poses.truth.visible[n, :, None] > 0, poses.truth.xy[n], np.nan).reshape(-1)
        texts = ["" if np.isnan(v) else f"{v:.3f}" for v in cells] if n < 4 else [""] * len(cells)
        rows.append(",".join([f"labeled-data/walk/img{n}.jpg", *texts]))
    (frames / "CollectedData_me.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "project" / "config.yaml").write_text("Task: walk\nscorer: me\n")
    run = tmp_path / "run"
    assert scarcenet("train", "mine", "--data", tmp_path / "project", "--out", run, *FLAGS) == 0
    assert "1 held-out images" in capsys.readouterr().out
    summary = read_json(run / "summary.json")
    assert summary["labelled"] == 3 and summary["instances"] == 5
    shutil.rmtree(tmp_path / "project")
    assert scarcenet("eval", run, "--split", "val", "--device", "cpu") == 0
    assert scarcenet("pseudo", run, "--out", tmp_path / "pseudo.json", "--device", "cpu") == 0
    assert scarcenet("report", run, "--out", tmp_path / "report.html") == 0


def test_comparisons_need_both_splits(project, tmp_path, capsys):
    assert scarcenet("ablate", "demo", "--data", project, "--labels", "all", "--out", tmp_path / "a", *FLAGS) == 1
    assert "no test split; comparing methods" in capsys.readouterr().err


def test_images_without_annotation_are_named(project, tmp_path, capsys):
    config = sn.Config(data=str(project), labels="all", device="cpu", size=32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = load_run_data(config, tmp_path)
        warn_of_set(config, data)
    assert len(data.train) == len({i.id for i in data.train.instances}) and len(data.train.empty)
    assert any("without annotation" in str(w.message) and "--boxes" in str(w.message) for w in caught)


# ---- the choice of boxes


def test_only_the_boxes_of_the_set(project, tmp_path, capsys):
    """`mine` chooses, unless the flag says that images without annotation are not wanted."""
    for boxes, chosen in (("", {"image", "pose"}), ("set", {"set"})):
        config = replace(PRESETS["mine"], data=str(project), boxes=boxes, labels="all", device="cpu", size=32)
        fitted = fit_settings(config, tmp_path)
        assert fitted.boxes in chosen
    train, _, _ = read_splits(fitted, tmp_path)
    assert train.empty and all(i.box_source == "keypoints" for i in train.instances)
    capsys.readouterr()


@pytest.mark.parametrize("boxes", ["images", "poses", "nowhere.json"])
def test_a_choice_of_boxes_that_does_not_exist(project, tmp_path, capsys, boxes):
    words = ["train", "mine", "--data", str(project), "--out", str(tmp_path / "run"), "--boxes", boxes, *FLAGS]
    assert scarcenet(*words) == 1
    error = capsys.readouterr().err
    assert f"boxes '{boxes}': expected set, image, pose, detector, or a COCO file with boxes" in error
    assert error.count("\n") == 1


def some_boxes(project: Path, file: Path, count: int) -> int:
    """A file with a box for `count` of the images without annotation; how many are left."""
    poses = read_coco(project / "annotations" / "train.json")
    write_json(file, [dict(image_id=i.image_id, bbox=[5, 5, 50, 60]) for i in poses.empty[:count]])
    return len(poses.empty) - count


def test_a_file_says_for_how_many_images_it_has_no_box(project, tmp_path):
    left = some_boxes(project, tmp_path / "boxes.json", 3)
    config = sn.Config(**{**QUICK, "data": str(project), "labels": "all", "boxes": str(tmp_path / "boxes.json")})
    data = load_run_data(config, tmp_path)
    assert len(data.train.empty) == left
    with pytest.warns(UserWarning, match=rf"for which --boxes .*boxes.json has no box: {left}, first .*; not used"):
        warn_of_set(config, data)


def test_pseudo_labels_for_images_without_annotation(project, tmp_path, capsys):
    """`pseudo --data` of images that the run has not seen: in boxes as it was trained, or as --boxes says."""
    run = str(tmp_path / "run")
    common = ["--data", str(project), *FLAGS, "--labels", "all"]
    assert scarcenet("train", "demo", "--out", run, *common, "--boxes", "image") == 0
    new = tmp_path / "new"
    (new / "annotations").mkdir(parents=True)
    (new / "images").symlink_to(project / "images")
    content = read_json(project / "annotations" / "train.json")
    content["images"], content["annotations"] = content["images"][-5:], []
    write_json(new / "annotations" / "train.json", content)
    left = some_boxes(new, tmp_path / "boxes.json", 2)
    whole = {i["id"]: [0, 0, i["width"], i["height"]] for i in content["images"]}
    capsys.readouterr()

    def pseudo(name: str, *flags: str) -> list[dict]:
        file = tmp_path / f"{name}.json"
        assert scarcenet("pseudo", run, "--data", str(new), "--out", str(file), "--device", "cpu", *flags) == 0
        return read_json(file)["annotations"]

    for name, flags in (("own", []), ("image", ["--boxes", "image"])):
        found = pseudo(name, *flags)
        assert {a["image_id"]: a["bbox"] for a in found} == whole and len(found) == 5
        assert "without annotation" not in capsys.readouterr().err
    assert len(pseudo("pose", "--boxes", "pose")) == 5
    capsys.readouterr()
    assert [a["bbox"] for a in pseudo("file", "--boxes", str(tmp_path / "boxes.json"))] == [[5, 5, 50, 60]] * 2
    assert f"has no box: {left}" in capsys.readouterr().err
    words = ["pseudo", run, "--data", str(new), "--out", str(tmp_path / "none.json"), "--boxes"]
    for boxes, says in (("set", "no animal has a box"), ("images", "boxes 'images': expected set, image")):
        assert scarcenet(*words, boxes) == 1
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1
    # the set of the training, in other boxes than it was trained in
    file = tmp_path / "again.json"
    assert scarcenet("pseudo", run, "--out", str(file), "--device", "cpu", "--boxes", "set") == 0
    assert len({a["image_id"] for a in read_json(file)["annotations"]}) == 8
    assert scarcenet("pseudo", run, "--out", str(tmp_path / "all.json"), "--device", "cpu") == 0
    assert len({a["image_id"] for a in read_json(tmp_path / "all.json")["annotations"]}) == 24


def test_a_training_says_how_to_leave_a_missing_image_out(project, tmp_path, capsys):
    gone = next(i.file for i in read_coco(project / "annotations" / "train.json").instances)
    gone.unlink()
    words = ["--data", str(project), *FLAGS, "--labels", "all"]
    assert scarcenet("train", "demo", "--out", str(tmp_path / "a"), *words) == 1
    error = capsys.readouterr().err
    assert f"{gone}: no such image; scarcenet import SET --out NEW makes a set without such images" in error
    assert scarcenet("import", str(project), "--out", str(tmp_path / "new")) == 0
    assert "images that are not there: 1, skipped" in capsys.readouterr().out
    assert scarcenet("check", str(tmp_path / "new")) == 0
