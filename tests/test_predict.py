"""Predictions: what comes in, where the network looks, what is written, drawn, and taken up again."""

import errno
import json
import os
import subprocess
import sys
import threading
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

import scarcenet as sn
from scarcenet.cli.main import main
from scarcenet.data.loader import crop_images
from scarcenet.data.sources import choose_frames, read_frames
from scarcenet.heatmap import evaluation_offset
from scarcenet.models.build import build_network, describe_network
from scarcenet.models.weights import save_weights
from scarcenet.predict import draw, follow, stream
from scarcenet.predict.draw import Pen, draw_poses
from scarcenet.predict.frames import ahead, find_sources, video_names
from scarcenet.predict.network import PoseNetwork, cut_crops, flip_test, predict
from scarcenet.predict.poses import PoseTable
from scarcenet.pseudo_labels import flip_views, predict_multiview
from scarcenet.schema import side_colours
from scarcenet.utils.files import write_json
from scarcenet.zoo.dataset import image_at
from scarcenet.zoo.walk import write_walk

CONFIG = sn.Config(network="hrnet_tiny", size=32, device="cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A weights file that describes itself, of a network that was not trained."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("net") / "net.safetensors"
    save_weights(build_network(CONFIG, 17), file, describe_network(CONFIG, sn.AP10K))
    return file


@pytest.fixture(scope="module")
def pose(weights) -> sn.Predictor:
    """It takes batches of 16 frames."""
    return sn.Predictor(weights, device="cpu", config=replace(CONFIG, batch=8))


@pytest.fixture(scope="module")
def walk(tmp_path_factory) -> Path:
    """A film of 70 frames of two walking animals, with its truth beside it."""
    file = tmp_path_factory.mktemp("walk") / "herd.mp4"
    write_walk(file, frames=70, size=(128, 96), animals=2, camera="pan", seed=1)
    return file


class Bright(torch.nn.Module):
    """Finds the reddest, the greenest and the bluest place."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.looks = []

    def forward(self, images):
        self.looks.append(len(images))
        others = (images.sum(1, keepdim=True) - images) / 2
        return torch.nn.functional.avg_pool2d((images - others).clamp_min(0) / 4, 8, stride=4, padding=2).clamp_max(1)


def dots(middle: tuple[float, float], size: int = 8) -> np.ndarray:
    """A frame of 160 x 240 px with a red, a green and a blue dot around a place; without any for size 0."""
    frame = np.full((160, 240, 3), 50, np.uint8)
    for k, (dx, dy) in enumerate(((0, -20), (20, 15), (-20, 15))):
        x, y = int(middle[0] + dx), int(middle[1] + dy)
        frame[max(0, y - size // 2) : max(0, y + size // 2), max(0, x - size // 2) : max(0, x + size // 2)] = (
            np.eye(3)[k] * 255
        )
    return frame


SCHEMA = sn.KeypointSchema(("red", "green", "blue"), flip_pairs=((1, 2),), skeleton=((0, 1), (0, 2)))


def dot_network(mirror: bool = False) -> PoseNetwork:
    return PoseNetwork(Bright(), sn.Config(size=96, device="cpu", mirror=mirror), SCHEMA)


def clip_of(path: Path, frames, fps: float = 25, codec: str = "MJPG") -> Path:
    """A video of some frames (H, W, 3) RGB."""
    frames = list(frames)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), fps, frames[0].shape[1::-1])
    for frame in frames:
        writer.write(frame[..., ::-1])
    writer.release()
    return path


# ---- the network


@pytest.mark.parametrize("mirror", [True, False])
def test_the_flip_test_is_that_of_evaluation(mirror):
    """The same crops: the same poses, and the distance of the two answers that one gets from both by hand."""
    config = replace(CONFIG, mirror=mirror)
    model = build_network(config, 17).eval()
    images = [image_at(0, i).pixels for i in range(5)]
    crops = crop_images(images, None, 32)
    expected = predict(model, crops, config, schema=sn.AP10K, shared=False)
    found = flip_test(model, crops, config, schema=sn.AP10K)
    assert np.allclose(found.score, expected.score, atol=1e-5)
    near = np.abs(found.xy - expected.xy.numpy()).max(-1) < 0.05
    assert near.mean() > 0.97  # an untrained network's maps are flat: of two equal peaks, either may be the higher
    assert np.isnan(found.disagreement).all() == (not mirror)
    if mirror:
        ask = partial(predict_multiview, model, crops, schema=sn.AP10K, refine=evaluation_offset(False), shared=False)
        plain, flipped = (ask(lambda crop, v=v: flip_views(crop, 32)[v : v + 1]).xy.numpy() for v in (0, 1))
        by_hand = np.linalg.norm(plain - flipped, axis=-1)
        assert (np.abs(found.disagreement - by_hand) < 0.1).mean() > 0.95


def test_crops_of_a_part_are_those_of_the_whole():
    """In grey values; and in affines, bit by bit."""
    rng = np.random.default_rng(0)
    images = [cv2.resize(image_at(0, i).pixels, (640, 480)) for i in range(4)]
    boxes = np.concatenate((rng.uniform(-50, 400, (4, 2)), rng.uniform(40, 300, (4, 2))), 1)
    old, new = crop_images(images, boxes, 64), cut_crops(images, boxes, 64)
    assert torch.equal(old.affine, new.affine) and torch.equal(old.crop, new.crop)
    assert (old.pixels.float() - new.pixels.float()).abs().mean() < 1
    outside = cut_crops(images[:1], np.array([[2000, 2000, 50, 50.0]]), 64)
    assert not outside.pixels.any()


@pytest.mark.parametrize("shape", [(2, 200), (200, 2), (1, 3000), (3, 40000), (1, 1)])
def test_crops_of_a_strip(shape):
    """However thin: shrunk to a pixel and no further, as `crop_images` does."""
    strip = np.full((*shape, 3), 200, np.uint8)
    box = np.array([[0, 0, shape[1], shape[0]]], float)
    old, new = crop_images([strip], box, 32), cut_crops([strip], box, 32)
    assert new.pixels.any() and (old.pixels.float() - new.pixels.float()).abs().mean() < 1


# ---- what comes in


def test_all_kinds_of_sources(pose, walk, tmp_path):
    (tmp_path / "sub").mkdir()
    for n, name in enumerate(("img2.png", "img10.png", "sub/a.jpg")):
        Image.fromarray(image_at(0, n).pixels).save(tmp_path / name)
    clip_of(tmp_path / "clip.avi", [image_at(0, 0).pixels] * 3)
    whole = list(pose.predict(tmp_path, boxes="image"))
    assert [(Path(p.file).name, p.frame) for p in whole] == [
        *(("clip.avi", n) for n in range(3)),
        *(("img2.png", 0), ("img10.png", 0), ("a.jpg", 0)),
    ]
    for p in whole:
        assert p.xy.shape == (1, 17, 2) and p.score.shape == p.disagreement.shape == (1, 17)
        assert p.box.shape == (1, 4) and p.id.tolist() == [1] and p.names == sn.AP10K.names
    assert len(list(pose.predict(str(tmp_path / "*.png"), boxes="image"))) == 2
    assert len(list(pose.predict([tmp_path / "img2.png", tmp_path / "sub"], boxes="image"))) == 2
    image = image_at(0, 0).pixels
    for source, frames in (
        (image, 1),
        ([image, image[:50]], 2),
        (np.stack([image] * 3), 3),
        (Image.fromarray(image), 1),
    ):
        found = pose.predict(source, boxes="image")
        assert found.frames == frames and [p.frame for p in found][-1] == (2 if frames == 3 else 0)


def test_a_stream_finds_what_a_call_finds():
    """For boxes that are the image: nearly the same crops, nearly the same poses."""
    network = dot_network(mirror=True)
    images = [dots((60 + 3 * n, 60 + n)) for n in range(20)]
    crops = crop_images(images, None, 96)
    called = predict(network.model.model, crops, network.config, schema=SCHEMA, shared=False)
    for n, streamed in enumerate(stream.Predictions(network, images, "image")):
        assert np.abs(streamed.xy[0] - called.xy[n].numpy()).max() < 1
        assert np.abs(streamed.score[0] - called.score[n].numpy()).max() < 0.05


def test_a_call_has_all_fields(pose):
    image = image_at(0, 0).pixels
    found = pose(image, [[1, 2, 30, 40], [5, 6, 70, 80]])
    assert found.box.tolist() == [[1, 2, 30, 40], [5, 6, 70, 80]] and found.id.tolist() == [1, 2]
    assert (found.frame, found.file) == (0, "") and np.isnan(found.disagreement).all()
    several = pose([image, image[:50]])
    assert several.box.tolist() == [[0, 0, *image.shape[1::-1]], [0, 0, image.shape[1], 50]]
    assert several.id.tolist() == [1, 1]


def test_one_torn_image_does_not_cost_a_folder(pose, tmp_path):
    for n in range(3):
        Image.fromarray(image_at(0, n).pixels).save(tmp_path / f"{n}.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:400])
    with pytest.warns(UserWarning, match="1.png: not an image.*left out"):
        found = list(pose.predict(tmp_path, boxes="image"))
    assert [Path(p.file).name for p in found] == ["0.png", "2.png"]
    with pytest.raises(ValueError, match="1.png: not an image"):
        list(pose.predict(tmp_path / "1.png", boxes="image"))
    (tmp_path / "2.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="2 of 3 images cannot be read and are left out"):
        assert len(list(pose.predict(tmp_path, boxes="image"))) == 1


def test_a_video_that_was_cut_short(pose, tmp_path):
    file = clip_of(tmp_path / "cut.avi", [image_at(0, n % 8).pixels[:110, :110] for n in range(60)])
    index = file.read_bytes().rfind(b"idx1")
    file.write_bytes(file.read_bytes()[: index // 2])
    with pytest.warns(UserWarning, match=r"cut.avi: expected 60 frames as the video states, got \d+; cut short"):
        found = list(pose.predict(file, boxes="image"))
    assert 10 < len(found) < 60
    file.write_bytes(b"RIFF")
    with pytest.raises(ValueError, match="cut.avi: video cannot be opened"):
        pose.predict(file)


def test_a_stream_that_was_cut_short(pose, tmp_path):
    """A transport stream says nowhere how long it was; but most cuts go through one of its packets."""
    file = clip_of(tmp_path / "cut.ts", [image_at(0, n % 8).pixels[:96, :96] for n in range(40)], codec="mp2v")
    content = file.read_bytes()
    assert len(content) % 188 == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert len(list(pose.predict(file, boxes="image"))) == 40
        list(choose_frames(file, 2))
    file.write_bytes(content[: len(content) // 2 // 188 * 188 + 100])
    with pytest.warns(UserWarning, match=r"cut.ts: video ends within a packet, after \d+ frames; cut short"):
        assert 5 < len(list(pose.predict(file, boxes="image"))) < 40
    with pytest.warns(UserWarning, match="cut.ts: video ends within a packet; cut short"):
        list(choose_frames(file, 2))


def test_one_video_that_is_none_does_not_cost_a_folder(pose, tmp_path):
    clip_of(tmp_path / "a.avi", [image_at(0, 0).pixels] * 2)
    (tmp_path / "b.mp4").write_bytes(b"nothing")
    with pytest.warns(UserWarning, match="b.mp4: video cannot be opened.*left out"):
        assert len(list(pose.predict(tmp_path, boxes="image"))) == 2


def test_a_name_that_no_table_can_hold_is_left_out(tmp_path):
    """Before anything is predicted, and not when the result is written."""
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    odd = tmp_path / os.fsdecode(b"bad\xff.png")
    try:
        odd.write_bytes((tmp_path / "good.png").read_bytes())
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    with pytest.warns(UserWarning, match="bad_.png: a name that is not valid UTF-8.*1 of 2 files left out"):
        assert [source.name for source in find_sources(tmp_path)] == ["good.png"]
    with pytest.raises(ValueError, match="bad_.png: .* rename the file$"):
        find_sources(odd)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("nowhere.mp4", "no such file"),
        ("notes.txt", "expected an image, a video or a folder, got .txt"),
        ("empty", "expected images or videos in it"),
        ([], "got none"),
        (np.zeros((4, 4)), "expected an image"),
        (np.zeros((0, 4, 4, 3), np.uint8), "got none"),
    ],
    ids=["nothing", "text", "empty", "no sources", "floats", "no frames"],
)
def test_sources_that_are_none(source, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("notes.txt").write_text("a")
    with pytest.raises((ValueError, FileNotFoundError), match=says) as error:
        find_sources(source)
    assert "\n" not in str(error.value)


def test_the_reader_leaves_no_thread_behind(pose, walk):
    before = threading.active_count()
    for n, _ in enumerate(pose.predict(walk, boxes="image")):
        if n == 20:
            break
    for _ in ahead(iter(range(1000))):
        break
    assert threading.active_count() == before
    with pytest.raises(ZeroDivisionError):
        list(ahead(1 / n for n in (1, 0)))


# ---- where it looks


def test_the_last_pose_is_followed():
    """Through a moving clip: boxes around the dots; lost, the whole frame; found again; fewer than two looks each."""
    network = dot_network()
    network.model.model.looks.clear()  # those of the trial passes that fold its batch norms
    frames = [dots((70 + n, 80 + 20 * np.sin(n / 10)), size=0 if 40 <= n < 50 else 14) for n in range(80)]
    found = list(stream.Predictions(network, np.stack(frames), "pose"))
    box = np.concatenate([p.box for p in found])
    lost = [n for n in range(80) if box[n].tolist() == [0, 0, 240, 160]]
    assert lost == list(range(40, 50))
    for n in sorted({*range(80)} - {*lost}):
        middle = np.array((70 + n, 80 + 20 * np.sin(n / 10)))
        assert np.abs(found[n].xy[0] - (middle + [(0, -20), (20, 15), (-20, 15)])).max() < 7  # inside of its dot
        assert box[n][2:].max() < 110
    assert sum(network.model.model.looks) < 2 * 80


def test_images_do_not_follow_each_other():
    """Two images are no video: the box of the first is not where the second is looked at."""
    network = dot_network()
    found = list(stream.Predictions(network, [dots((60, 60)), dots((190, 110))], "pose"))
    alone = list(stream.Predictions(network, [dots((190, 110))], "pose"))
    assert np.allclose(found[1].xy, alone[0].xy) and np.allclose(found[1].box, alone[0].box)


def test_boxes_of_a_file(pose, walk):
    """Several animals a frame, their boxes, and numbers that stay."""
    truth = json.loads(walk.with_suffix(".json").read_text())
    found = list(pose.predict(walk, boxes=str(walk.with_suffix(".json"))))
    assert len(found) == 70
    kept = {}
    for p in found:
        boxes = {tuple(np.float32(a["bbox"])): a for a in truth["annotations"] if a["image_id"] == p.frame + 1}
        for box, i in zip(p.box, p.id, strict=True):
            kept.setdefault(int(i), []).append(boxes[tuple(box)]["track_id"])
    assert set(kept) == {1, 2}
    assert all(len(set(tracks)) == 1 for tracks in kept.values())


def test_boxes_of_a_file_by_image_names(pose, tmp_path):
    (tmp_path / "new").mkdir()
    for n in range(3):
        Image.fromarray(image_at(0, n).pixels).save(tmp_path / "new" / f"{n}.png")
    images = [dict(id=7 + n, file_name=f"old\\{n}.png") for n in range(2)]
    boxes = [[1, 2, 30, 40], [50, 50, 20, 30]]
    write_json(
        tmp_path / "boxes.json",
        dict(
            images=images,
            annotations=[dict(image_id=7, bbox=box) for box in boxes]
            + [dict(image_id=8, bbox=[0, 0, 9, 9], score=0.1), dict(image_id=8, bbox=[0, 0, 0, 9])],
        ),
    )
    found = list(pose.predict(tmp_path / "new", boxes=tmp_path / "boxes.json"))
    assert [p.box.tolist() for p in found] == [boxes, [], []] and found[0].id.tolist() == [1, 2]
    assert found[1].xy.shape == (0, 17, 2)
    write_json(tmp_path / "boxes.json", dict(images=[dict(id=7, file_name="other.png")], annotations=[
        dict(image_id=7, bbox=[1, 2, 3, 4])]))  # fmt: skip
    with pytest.raises(ValueError, match="boxes.json: no box is in one of the images; .*by name, such as 0.png"):
        list(pose.predict(tmp_path / "new", boxes=tmp_path / "boxes.json"))


@pytest.mark.parametrize(
    ("content", "says"), [([dict(image_id=1, bbox=[1, 2, 3, 4])], "ids alone"), (dict(images=[]), "no box in it")]
)
def test_files_without_boxes(pose, tmp_path, content, says):
    write_json(tmp_path / "boxes.json", content)
    with pytest.raises(ValueError, match=says):
        pose.predict(image_at(0, 0).pixels, boxes=tmp_path / "boxes.json")
    with pytest.raises(FileNotFoundError, match="expected image, pose, detector, or a COCO file"):
        pose.predict(image_at(0, 0).pixels, boxes="elsewhere")


def test_a_detector_sees_each_frame_once(pose, walk, monkeypatch):
    """Several classes for one animal are one box; a frame without an animal has no pose, and is a frame."""
    seen = []

    class Fake:
        def __init__(self, config, device):
            assert config.detector == "fasterrcnn_resnet50_fpn_v2"

        def find(self, image):
            seen.append(image)
            n = len(seen) - 1
            boxes = [[10 + n, 10, 40, 40], [11 + n, 11, 40, 38], [70 - n / 2, 40, 30, 30]]
            boxes = np.array([] if n == 3 else boxes if n < 10 else boxes[::-1], np.float32).reshape(-1, 4)
            return boxes, np.ones(len(boxes))

    monkeypatch.setattr(follow, "Detector", Fake)
    found = list(pose.predict(walk, boxes="detector"))
    assert len(seen) == 70 and all(np.array_equal(a, b) for a, (_, b) in zip(seen, read_frames(walk), strict=True))
    assert [len(p.id) for p in found[:6]] == [2, 2, 2, 0, 2, 2]
    left = [p.box[p.id == 1][0, 0] for p in found if len(p.id) and p.frame < 30]
    assert np.abs(np.diff(left)).max() < 3


@pytest.mark.parametrize(
    ("trained", "chosen", "warns"),
    [("image", "image", 0), ("pose", "pose", 0), ("", "pose", 1), ("detector", "pose", 1)],
)
def test_boxes_by_default_are_those_of_the_training(pose, trained, chosen, warns):
    own = sn.Predictor(pose.file, device="cpu", config=replace(pose.config, boxes=trained))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert own.predict(image_at(0, 0).pixels).boxes == chosen
    assert [str(w.message).startswith("boxes: using pose (the network was trained with") for w in caught] == [
        True
    ] * warns


# ---- what is written


@pytest.fixture(scope="module")
def several(pose, walk) -> sn.Predictions:
    """Predictions of two animals in a video."""
    found = pose.predict(walk, boxes=str(walk.with_suffix(".json")))
    found.to_dataframe()
    return found


@pytest.fixture(scope="module")
def single(pose, walk) -> sn.Predictions:
    """Predictions of one animal in a video."""
    found = pose.predict(walk, boxes="pose")
    found.to_dataframe()
    return found


def arrays(found: sn.Predictions, animals: int) -> np.ndarray:
    """(frames, animals, K, 3) x, y, score; nan for no animal."""
    poses = list(found)
    values = np.full((len(poses), animals, len(found.names), 3), np.nan)
    for p in poses:
        values[p.frame, p.id - 1] = np.concatenate((p.xy, p.score[..., None]), -1)
    return values


@pytest.mark.parametrize("animals", [1, 2])
def test_deeplabcut_csv_and_h5(request, tmp_path, animals):
    found = request.getfixturevalue("single" if animals == 1 else "several")
    expected = arrays(found, animals)
    levels = ["scorer", *(["individuals"] if animals > 1 else []), "bodyparts", "coords"]
    table = pd.read_csv(found.save(tmp_path / "a.csv"), header=list(range(len(levels))), index_col=0)
    assert list(table.columns.names) == levels and table.index.tolist() == list(range(70))
    assert table.columns[:3].get_level_values("coords").tolist() == ["x", "y", "likelihood"]
    assert np.allclose(table.to_numpy().reshape(expected.shape), expected, atol=1e-4, equal_nan=True)
    pytest.importorskip("tables")
    stored = pd.read_hdf(found.save(tmp_path / "a.h5"))
    assert stored.columns.equals(table.columns) and stored.index.tolist() == list(range(70))
    assert np.allclose(stored.to_numpy().reshape(expected.shape), expected, atol=1e-6, equal_nan=True)


def test_without_pytables_h5_is_refused(single, tmp_path, monkeypatch):
    from scarcenet.predict import save

    monkeypatch.setattr(save, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="a.h5: DeepLabCut's .h5 needs PyTables: pip install tables"):
        single.save(tmp_path / "a.h5")
    assert not list(tmp_path.iterdir())


def test_coco(several, walk, tmp_path):
    """pycocotools reads annotations and results; names, sides and frames are those of the film's own truth."""
    file = several.save(tmp_path / "a.json")
    coco = COCO(str(file))
    truth = json.loads(walk.with_suffix(".json").read_text())
    assert [i["file_name"] for i in coco.dataset["images"]] == [i["file_name"] for i in truth["images"]]
    assert all(i["video"] == "herd.mp4" and (i["width"], i["height"]) == (128, 96) for i in coco.dataset["images"])
    (category,) = coco.dataset["categories"]
    assert tuple(category["keypoints"]) == sn.AP10K.names
    expected = arrays(several, 2)
    for annotation in coco.dataset["annotations"]:
        values = expected[annotation["image_id"] - 1, annotation["track_id"] - 1]
        points = np.array(annotation["keypoints"]).reshape(-1, 3)
        assert np.allclose(points[:, :2], values[:, :2], atol=1e-3) and set(points[:, 2]) <= {1, 2}
        assert np.allclose(annotation["keypoint_scores"], values[:, 2], atol=1e-4)
        assert len(annotation["keypoint_disagreements"]) == 17
    results = coco.loadRes(str(several.save(tmp_path / "results.json")))
    assert len(results.dataset["annotations"]) == len(coco.dataset["annotations"])
    first = json.loads((tmp_path / "results.json").read_text())[0]
    assert first["keypoints"][2] == pytest.approx(expected[0, 0, 0, 2], abs=1e-3)


def test_coco_of_images_is_read_as_a_set(pose, zoo, tmp_path):
    """Predictions are labels again, for the same images."""
    file = pose.predict(zoo / "data", boxes="image").save(tmp_path / "a.json")
    poses = sn.read_coco(file, zoo / "data")
    assert len(poses) == 36 and poses.schema == sn.AP10K


def test_parquet(several, tmp_path):
    table = pd.read_parquet(several.save(tmp_path / "a.parquet"))
    pd.testing.assert_frame_equal(table, several.to_dataframe(), check_dtype=False)
    assert {"file", "frame", "id", "box_w", "nose_x", "nose_y", "nose_score", "nose_disagreement"} <= set(table)
    assert table["nose_disagreement"].notna().all()


def test_sleap_and_nwb(several, single, tmp_path):
    sio = pytest.importorskip("sleap_io")
    for found, animals in ((single, 1), (several, 2)):
        expected = arrays(found, animals)
        labels = sio.load_slp(str(found.save(tmp_path / f"{animals}.slp")), open_videos=False)
        assert labels.skeletons[0].node_names == list(sn.AP10K.names) and len(labels.skeletons[0].symmetries) == 7
        assert len(labels.tracks) == (2 if animals == 2 else 0)
        for frame in labels:
            for n, instance in enumerate(frame.predicted_instances):
                i = n if animals == 1 else int(instance.track.name.removeprefix("animal")) - 1
                assert np.allclose(instance.numpy(), expected[frame.frame_idx, i, :, :2])
                assert np.allclose(instance.points["score"], expected[frame.frame_idx, i, :, 2])
        labels = sio.load_nwb(str(found.save(tmp_path / f"{animals}.nwb")))
        read = np.sort([i.numpy()[:, 0].sum() for frame in labels for i in frame.predicted_instances])
        assert np.allclose(read, np.sort(expected[..., 0].sum(-1).ravel()), rtol=1e-4)


def test_nwb_has_exact_times(pose, tmp_path):
    """Of 29.97 frames a second, sleap-io would make 29."""
    pytest.importorskip("sleap_io")
    h5py = pytest.importorskip("h5py")
    clip = clip_of(tmp_path / "clip.avi", [image_at(0, 0).pixels] * 12, fps=30000 / 1001)
    file = pose.predict(clip, boxes="image").save(tmp_path / "a.nwb")
    with h5py.File(file) as content:
        times = content["processing/SLEAP_VIDEO_000_clip/track=animal1/nose/timestamps"][:]
    assert np.allclose(times, np.arange(12) * 1001 / 30000, atol=1e-5)


def test_sleap_of_images(pose, tmp_path):
    sio = pytest.importorskip("sleap_io")
    for n in range(3):
        Image.fromarray(image_at(0, n).pixels).save(tmp_path / f"{n}.png")
    labels = sio.load_slp(str(pose.predict(tmp_path, boxes="image").save(tmp_path / "a.slp")), open_videos=False)
    assert [frame.frame_idx for frame in labels] == [0, 1, 2] and len(labels.videos) == 1
    for name, says in (
        ("a.nwb", "NWB holds the poses of videos"),
        ("a.txt", "expected a folder, or a name that ends in .csv"),
    ):
        with pytest.raises(ValueError, match=says):
            pose.predict(tmp_path, boxes="image").save(tmp_path / name)
    with pytest.raises(ValueError, match="got an array"):
        pose.predict(image_at(0, 0).pixels, boxes="image").save(tmp_path / "b.slp")


def test_movement_reads_all(single, several, tmp_path):
    load = pytest.importorskip("movement.io.load")
    for found, animals in ((single, 1), (several, 2)):
        expected = arrays(found, animals)
        for name, software in (("a.csv", "DeepLabCut"), ("a.h5", "DeepLabCut"), ("a.slp", "SLEAP")):
            file = found.save(tmp_path / f"{animals}{name}")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                data = load.load_dataset(file, source_software=software, fps=25)
            assert dict(data.sizes) == dict(time=70, space=2, keypoints=17, individuals=animals)
            assert data.keypoints.values.tolist() == list(sn.AP10K.names)
            position = data.position.transpose("time", "individuals", "keypoints", "space").values
            assert np.allclose(position, expected[..., :2], atol=1e-3, equal_nan=True)
            confidence = data.confidence.transpose("time", "individuals", "keypoints").values
            assert np.allclose(confidence, expected[..., 2], atol=1e-3, equal_nan=True)


@pytest.fixture
def films(tmp_path) -> Path:
    """Two videos of one name in two folders, one that is alone, and two images."""
    root = tmp_path / "films"
    for n, name in enumerate(("monday/clip.avi", "tuesday/clip.avi", "other.avi")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        clip_of(root / name, [image_at(0, n + k).pixels[:100, :100] for k in range(18 + n)])
    for n in range(2):
        Image.fromarray(image_at(0, n).pixels).save(root / f"img{n}.png")
    return root


FILMS = {"monday/clip": 18, "tuesday/clip": 19, "other": 20, "images": 2}  # the name of each file, and its frames


def test_each_video_has_a_file_of_its_own(pose, films, tmp_path):
    """It is the file that the video would have alone, byte by byte; and movement reads it."""
    out = tmp_path / "poses"
    assert pose.predict(films, boxes="pose").save(out) == out
    assert {f.relative_to(out).as_posix() for f in out.rglob("*") if f.is_file()} == {f"{name}.csv" for name in FILMS}
    for name, frames in FILMS.items():
        source = films / f"{name}.avi" if name != "images" else sorted(films.glob("*.png"))
        alone = pose.predict(source, boxes="pose").save(tmp_path / "alone" / f"{name}.csv")
        assert (out / f"{name}.csv").read_bytes() == alone.read_bytes()
        assert len(pd.read_csv(alone, header=[0, 1, 2], index_col=0)) == frames
    load = pytest.importorskip("movement.io.load")
    data = load.load_dataset(out / "tuesday" / "clip.csv", source_software="DeepLabCut", fps=25)
    assert data.sizes["time"] == 19


@pytest.mark.parametrize("format", ["h5", "json", "results.json", "slp", "parquet"])
def test_each_video_in_each_format(pose, films, tmp_path, format):
    pytest.importorskip({"h5": "tables", "slp": "sleap_io"}.get(format, "json"))
    out = pose.predict(films, boxes="image").save(tmp_path / "poses", format=format)
    for name, frames in FILMS.items():
        file = out / f"{name}.{format}"
        if format == "slp":
            found = pytest.importorskip("sleap_io").load_slp(str(file), open_videos=False)
        elif format == "json":
            content = json.loads(file.read_text())
            found = content["images"]
            assert [i["id"] for i in found] == [a["image_id"] for a in content["annotations"]]
        elif format == "results.json":
            found = json.loads(file.read_text())
            assert [a["image_id"] for a in found] == [*range(1, frames + 1)]
        else:
            found = {"h5": pd.read_hdf, "parquet": pd.read_parquet}[format](file)
        assert len(found) == frames


def test_videos_are_not_joined_into_one_table(pose, films, tmp_path):
    found = pose.predict(films, boxes="image")
    for name in ("a.csv", "a.h5", "a.nwb"):
        if name == "a.nwb":
            pytest.importorskip("sleap_io")
        with pytest.raises(ValueError, match=f"{name}: expected one video, got 5 videos and images; give a folder, a/"):
            found.save(tmp_path / name)
    with pytest.raises(ValueError, match="a.csv: a file's ending sets its format"):
        found.save(tmp_path / "a.csv", format="h5")
    with pytest.raises(ValueError, match="clip.mat: expected a folder, or a name that ends in"):
        found.save(tmp_path / "poses", format="mat")
    assert [f.name for f in tmp_path.iterdir()] == ["films"]
    table = pd.read_parquet(found.save(tmp_path / "a.parquet"))
    assert table["file"].nunique() == 5
    names = {
        i["file_name"].rpartition("/")[0] for i in json.loads(found.save(tmp_path / "a.json").read_text())["images"]
    }
    assert names == {"monday/clip", "tuesday/clip", "other", ""}


@pytest.mark.parametrize("ending", ["csv", "json", "parquet"])
def test_an_output_with_a_name_as_long_as_the_disk_allows(pose, tmp_path, ending):
    out = tmp_path / f"{'a' * (254 - len(ending))}.{ending}"
    pose.predict([image_at(0, 0).pixels], boxes="image").save(out)
    assert out.is_file() and len(list(tmp_path.iterdir())) == 1


def test_a_folder_goes_on(pose, films, tmp_path):
    """With its drawings, in the folder of the videos itself; what another left there stays."""
    whole = pose.predict(films, boxes="pose").save(tmp_path / "whole")
    (films / "mine.csv").write_text("mine")
    drawn = tmp_path / "drawn"
    with pytest.raises(KeyboardInterrupt, match="films: 20 of 59 frames are done; go on with resume"):
        interrupted(pose.predict(films, boxes="pose"), 3).save(films, draw=drawn)
    done = {f.relative_to(films).as_posix() for f in films.rglob("*.csv")}
    assert "monday/clip.csv" in done and "tuesday/clip.csv" not in done
    with pytest.raises(ValueError, match="already exists"):
        pose.predict(films, boxes="pose").save(films)
    pose.predict(films, boxes="pose").save(films, draw=drawn, resume=True)
    for name in FILMS:
        assert (films / f"{name}.csv").read_bytes() == (whole / f"{name}.csv").read_bytes()
    films_drawn = {f.relative_to(drawn).as_posix() for f in drawn.rglob("*") if f.is_file()}
    assert films_drawn == {"monday/clip.mp4", "tuesday/clip.mp4", "other.mp4", "img0.jpg", "img1.jpg"}
    assert (films / "mine.csv").read_text() == "mine" and not list(films.glob(".*"))
    with pytest.raises(ValueError, match="films: already finished; nothing to resume"):
        pose.predict(films, boxes="pose").save(films, resume=True)


def test_names_of_videos():
    names = ("a/clip.mp4", "b/clip.mp4", "b/clip.avi", "b/Clip2.avi", "c.mp4")
    found = video_names([Path(name) for name in names])
    assert list(found.values()) == ["a/clip", "b/clip.mp4", "b/clip.avi", "Clip2", "c"]


def test_nothing_is_overwritten(single, pose, walk, tmp_path):
    single.save(tmp_path / "a.csv")
    for again in (single, pose.predict(walk, boxes="pose")):
        with pytest.raises(ValueError, match="a.csv: already exists"):
            again.save(tmp_path / "a.csv")
    with pytest.raises(ValueError, match="a.csv: already finished; nothing to resume"):
        pose.predict(walk, boxes="pose").save(tmp_path / "a.csv", resume=True)
    (tmp_path / "drawn").mkdir()
    (tmp_path / "drawn" / "mine.txt").write_text("a")
    with pytest.raises(ValueError, match="drawn: already exists"):
        single.save(tmp_path / "b.csv", draw=tmp_path / "drawn")
    assert {f.name for f in tmp_path.iterdir()} == {"a.csv", "drawn"}


# ---- interrupted


def interrupted(predictions: sn.Predictions, after: int) -> sn.Predictions:
    """The same, but Ctrl-C is pressed before batch `after`."""
    look, count = predictions.looker, iter(range(10**6))

    def stop(frames):
        if next(count) == after:
            raise KeyboardInterrupt
        return look(frames)

    stop.restore = look.restore
    predictions.looker = stop
    return predictions


@pytest.mark.parametrize("boxes", ["image", "pose", "file"])
@pytest.mark.parametrize("ending", ["csv", "json"])
def test_what_was_interrupted_goes_on(pose, walk, tmp_path, boxes, ending):
    boxes = str(walk.with_suffix(".json")) if boxes == "file" else boxes
    whole = pose.predict(walk, boxes=boxes).save(tmp_path / f"whole.{ending}")
    out = tmp_path / f"out.{ending}"
    with pytest.raises(KeyboardInterrupt, match="32 of 70 frames are done; go on with resume"):
        interrupted(pose.predict(walk, boxes=boxes), 2).save(out)
    if ending == "csv":
        rows = pd.read_csv(out, header=[0, 1, 2], index_col=0)
        assert len(rows.index[-1:]) and out.read_text().splitlines()[-1].startswith("31,")
    else:
        assert len(json.loads(out.read_text())["images"]) == 32
    with pytest.raises(ValueError, match="already exists"):
        pose.predict(walk, boxes=boxes).save(out)
    with pytest.raises(KeyboardInterrupt):
        interrupted(pose.predict(walk, boxes=boxes), 1).save(out, resume=True)
    assert pose.predict(walk, boxes=boxes).save(out, resume=True).read_bytes() == whole.read_bytes()
    assert {f.name for f in tmp_path.iterdir()} == {whole.name, out.name}


def test_a_power_cut(pose, walk, tmp_path):
    """Nothing but the rows is left, and the last batch is torn."""
    whole, out, rest = (tmp_path / name for name in ("whole.csv", "out.csv", ".out.csv.rows"))
    pose.predict(walk, boxes="pose").save(whole)
    with pytest.raises(KeyboardInterrupt):
        interrupted(pose.predict(walk, boxes="pose"), 3).save(out)
    out.unlink()
    os.truncate(rest, rest.stat().st_size - 77)
    with pytest.raises(ValueError, match="unfinished; go on with resume"):
        pose.predict(walk, boxes="pose").save(out)
    assert pose.predict(walk, boxes="pose").save(out, resume=True).read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("name", ["out.csv", "out"])
def test_two_predictions_into_one_output(pose, walk, tmp_path, name):
    """The second is told of the first, with `resume` too, and changes nothing; a folder can be the drawing's too."""
    out, drawn = tmp_path / name, tmp_path / "out"
    found = pose.predict(walk, boxes="pose")
    look, said = found.looker, []

    def second(frames):
        for resume in (False, True):
            with pytest.raises(ValueError, match=f"{name}: in use by process {os.getpid()} on") as error:
                pose.predict(walk, boxes="pose").save(out, draw=drawn, resume=resume)
            said.append(error)
        return look(frames)

    second.restore, found.looker = look.restore, second
    assert found.save(out, draw=drawn) == out and said
    assert not list(tmp_path.rglob(".*")) and len(list(tmp_path.rglob("*.csv"))) == 1


def test_it_goes_on_with_the_same_things_only(pose, walk, tmp_path):
    out = tmp_path / "out.csv"
    with pytest.raises(KeyboardInterrupt):
        interrupted(pose.predict(walk, boxes="pose"), 2).save(out)
    with pytest.raises(ValueError, match="interrupted with other boxes"):
        pose.predict(walk, boxes="image").save(out, resume=True)
    clip = clip_of(tmp_path / "clip.avi", [image_at(0, 0).pixels] * 2)
    with pytest.raises(ValueError, match="interrupted with other images or videos"):
        pose.predict(clip, boxes="pose").save(out, resume=True)
    other = tmp_path / "other.safetensors"
    save_weights(build_network(replace(CONFIG, seed=1), 17), other, describe_network(CONFIG, sn.AP10K))
    with pytest.raises(ValueError, match="interrupted with other network"):
        sn.Predictor(other, device="cpu", config=pose.config).predict(walk, boxes="pose").save(out, resume=True)


def test_an_iteration_that_is_left_is_taken_up(pose, walk, tmp_path, single):
    """Frames that were found while iterating are not found again by `save`."""
    found = pose.predict(walk, boxes="pose")
    for p in found:
        if p.frame == 20:
            break
    looks, ask = [], found.looker.network

    def count(images, boxes):
        looks.append(len(images))
        return ask(images, boxes)

    count.schema, found.looker.network = ask.schema, count
    found.save(tmp_path / "a.csv")
    assert looks and sum(looks) <= 3 * (70 - 32)
    assert (tmp_path / "a.csv").read_bytes() == single.save(tmp_path / "b.csv").read_bytes()
    assert len(list(found)) == 70


# ---- drawings


def test_a_drawing_shows_the_poses(single, walk, tmp_path):
    """A drawn video has every frame, at the same size, and differs where the pose is."""
    file = single.draw(tmp_path / "drawn.mp4")
    before, after = (np.stack([frame for _, frame in read_frames(f)]) for f in (walk, file))
    assert before.shape == after.shape
    with pytest.raises(ValueError, match="already exists"):
        single.draw(file)


def test_drawn_and_saved_in_one_go(pose, walk, tmp_path):
    boxes = str(walk.with_suffix(".json"))
    pose.predict(walk, boxes=boxes).save(tmp_path / "a.csv", draw=tmp_path / "a.mp4")
    assert sum(1 for _ in read_frames(tmp_path / "a.mp4")) == 70


def test_an_interrupted_drawing_is_a_video(pose, walk, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        interrupted(pose.predict(walk, boxes="pose"), 2).save(tmp_path / "a.csv", draw=tmp_path / "a.mp4")
    assert sum(1 for _ in read_frames(tmp_path / "a.mp4")) == 32
    pose.predict(walk, boxes="pose").save(tmp_path / "a.csv", draw=tmp_path / "a.mp4", resume=True)
    assert sum(1 for _ in read_frames(tmp_path / "a.mp4")) == 70


def test_an_interrupted_drawing_alone_is_a_part(pose, walk, tmp_path):
    with pytest.raises(KeyboardInterrupt, match="a.mp4: a part, 32 of 70 frames; to draw all, remove it"):
        interrupted(pose.predict(walk, boxes="pose"), 2).draw(tmp_path / "a.mp4")
    assert sum(1 for _ in read_frames(tmp_path / "a.mp4")) == 32


class FullDisk:
    """An open file on a disk that is full."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk(pose, walk, tmp_path, monkeypatch, capsys):
    """The rows' file is named; no half drawing is there; with room again it goes on to the same end."""
    whole = pose.predict(walk, boxes="pose").save(tmp_path / "whole.csv")
    out, drawn, append = tmp_path / "out.csv", tmp_path / "out.mp4", PoseTable.append
    words = [str(w) for w in ("predict", pose.file, walk, "--boxes", "pose", "--out", out, "--draw", drawn)]

    def full(table, rows):
        if table.items >= 32:
            table.stream = FullDisk(table.stream)
        append(table, rows)

    with monkeypatch.context() as patch:
        patch.setattr(PoseTable, "append", full)
        assert main(words) == 1
    advice = "cannot be written (No space left on device); make room, or choose another disk; then go on with --resume"
    assert capsys.readouterr().err == f"scarcenet: {tmp_path / '.out.csv.rows'}: {advice}\n"
    assert {f.name for f in tmp_path.iterdir()} == {"whole.csv", ".out.csv.rows"}
    assert main([*words, "--resume"]) == 0
    assert out.read_bytes() == whole.read_bytes() and sum(1 for _ in read_frames(drawn)) == 70


def test_a_drawing_that_fails_is_no_file(pose, walk, tmp_path, monkeypatch):
    """Nor do the frames that follow become one; the error names the drawing."""
    count = iter(range(100))

    def fail(*_, **__):
        if next(count) == 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(draw, "draw_poses", fail)
    with pytest.raises(OSError, match="cannot be written .No space left on device.; make room.*a.mp4"):
        pose.predict(walk, boxes="image").draw(tmp_path / "a.mp4")
    assert not list(tmp_path.iterdir())


def test_only_its_own_drawing_is_written_anew(pose, walk, tmp_path, capsys):
    """Neither a source nor a file that it did not begin is overwritten, with `resume` either."""
    film, other = tmp_path / "film.mp4", tmp_path / "other.mp4"
    film.write_bytes(walk.read_bytes())
    other.write_bytes(b"mine")
    with pytest.raises(ValueError, match="film.mp4: is one of the sources"):
        pose.predict(film, boxes="pose").save(tmp_path / "a.csv", draw=film, resume=True)
    with pytest.raises(KeyboardInterrupt):
        interrupted(pose.predict(film, boxes="pose"), 2).save(tmp_path / "a.csv", draw=tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="interrupted with other drawing"):
        pose.predict(film, boxes="pose").save(tmp_path / "a.csv", draw=other, resume=True)
    with pytest.raises(ValueError, match="already exists"):
        pose.predict(film, boxes="pose").draw(other)
    assert main(["predict", str(pose.file), str(film), "--draw", str(other), "--resume"]) == 1
    assert "a drawing alone starts over" in capsys.readouterr().err
    assert film.read_bytes() == walk.read_bytes() and other.read_bytes() == b"mine"


def test_labels_and_predictions_name_a_frame_alike(pose, walk, tmp_path):
    """Boxes of frames that an import took are found in the video."""
    pytest.importorskip("sleap_io")
    sn.import_set([walk.with_suffix(".slp")], tmp_path / "labels", unlabelled=[walk], frames=5)
    names = {f.relative_to(tmp_path / "labels/images").as_posix() for f in (tmp_path / "labels/images").rglob("*.png")}
    (source,) = find_sources(walk)
    assert names & {source.frame_name(n) for n in range(70)}


def test_a_folder_of_drawings(pose, walk, tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for name in ("a.png", "a.jpg", "sub/b.png"):
        Image.fromarray(image_at(0, 1).pixels).save(tmp_path / "in" / name)
    clip_of(tmp_path / "in" / "clip.avi", [image_at(0, 0).pixels[:100, :102]] * 5)
    pose.predict(tmp_path / "in", boxes="image").draw(tmp_path / "out")
    drawn = {f.relative_to(tmp_path / "out").as_posix() for f in (tmp_path / "out").rglob("*") if f.is_file()}
    assert drawn == {"a.png.jpg", "a.jpg.jpg", "sub/b.jpg", "clip.mp4"}
    sizes = [frame.shape for _, frame in read_frames(tmp_path / "out" / "clip.mp4")]
    assert sizes == [(100, 102, 3)] * 5
    for path, says in (
        ("x.avi", "expected a name that ends in .mp4"),
        ("x.mp4", "expected one video for an .mp4, got 4 videos and images"),
    ):
        with pytest.raises(ValueError, match=says):
            pose.predict(tmp_path / "in", boxes="image").save(tmp_path / "x.json", draw=tmp_path / path)
        assert not (tmp_path / ".x.json.rows").exists()


def one_pose(score: float, schema: sn.KeypointSchema, side: int = 100) -> sn.Poses:
    angle = 2 * np.pi * np.arange(len(schema)) / len(schema)
    xy = side / 2 + side / 3 * np.stack((np.cos(angle), np.sin(angle)), -1)
    return sn.Poses(
        xy=xy[None].astype(np.float32),
        score=np.full((1, len(schema)), score, np.float32),
        names=schema.names,
        box=np.array([[0, 0, side, side]], np.float32),
        disagreement=np.zeros((1, len(schema)), np.float32),
        id=np.array([1]),
    )


def test_colours_opacity_and_size():
    pen = Pen(SCHEMA)
    ink = {}
    for score in (0.02, 0.2, 0.7):
        image = np.full((100, 100, 3), 128, np.uint8)
        draw_poses(image, one_pose(score, SCHEMA), pen)
        ink[score] = np.abs(image.astype(int) - 128).sum()
    assert ink[0.02] == 0 < ink[0.2] < 0.6 * ink[0.7]
    sure = one_pose(1, SCHEMA)
    x, y = np.rint(sure.xy[0, 1]).astype(int)
    assert image[y, x].tolist() == list(pen.dots[1]) == [0xC2, 0x18, 0x07]  # the left one
    share = []
    for side in (200, 800, 1600):
        image = np.full((side, side, 3), 128, np.uint8)
        draw_poses(image, one_pose(1, SCHEMA, side), pen)
        share.append((image != 128).any(-1).mean())
    assert max(share) < 5 * min(share)
    far = sure._replace(xy=sure.xy + 10**6)
    draw_poses(image, far, pen, numbers=True)  # outside of the frame


def test_keypoints_without_sides_have_colours_of_their_own():
    colours = side_colours(sn.KeypointSchema(tuple(f"k{n}" for n in range(20))))
    assert len(set(colours)) == 20
    assert len(set(side_colours(SCHEMA))) == 3


# ---- the command


def scarcenet(*words) -> int:
    return main([str(w) for w in words])


def test_the_command(weights, walk, tmp_path, capsys):
    out, drawn = tmp_path / "a.csv", tmp_path / "a.mp4"
    assert scarcenet("predict", weights, walk, "--out", out, "--draw", drawn) == 0
    said = capsys.readouterr()
    assert (
        "70 frames, 17 keypoints, boxes: pose" in said.out and "boxes: using pose (the network was trained" in said.err
    )
    python = sn.Predictor(weights, device="cpu").predict(walk, boxes="pose").save(tmp_path / "b.csv")
    assert out.read_text().splitlines()[:3] == python.read_text().splitlines()[:3]
    tables = (pd.read_csv(file, header=[0, 1, 2], index_col=0).to_numpy() for file in (out, python))
    assert np.allclose(*tables, atol=0.01) and sum(1 for _ in read_frames(drawn)) == 70
    assert scarcenet("predict", weights, walk, "--draw", tmp_path / "only", "--boxes", "image") == 0
    assert [f.name for f in (tmp_path / "only").iterdir()] == ["herd.mp4"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("nowhere.mp4", "--out", "a.csv"), "nowhere.mp4: no such file"),
        (("WALK",), "got neither"),
        (("WALK", "--out", "a.xlsx"), "expected a folder, or a name that ends in .csv"),
        (("WALK", "--out", "a.csv", "--format", "h5"), "a file's ending sets its format"),
        (("WALK", "--out", "there.csv"), "there.csv: already exists"),
        (("WALK", "--out", "a.csv", "--draw", "a.mov"), "a.mov: expected a name that ends in .mp4"),
        (("WALK", "--out", "a.csv", "--boxes", "none.json"), "boxes 'none.json'"),
        (("WALK", "--out", "a.csv", "--boxes", "detector", "--detector", "yolo"), "detector 'yolo': expected one of"),
        (("WALK", "--out", "a.csv", "--device", "cuda:7"), "device cuda:7"),
        (("WALK", "--out", "a.csv", "--network", "coach"), "network 'coach': expected one of"),
    ],
    ids=["no video", "no output", "ending", "format", "there", "codec", "boxes", "detector", "device", "network"],
)
def test_bad_input_is_one_line(weights, walk, tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    Path("there.csv").write_text("mine")
    assert scarcenet("predict", weights, *(walk if w == "WALK" else w for w in words)) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "boxes: using pose (" not in line]
    assert len(lines) == 1 and says in lines[0]
    assert [f.name for f in tmp_path.iterdir()] == ["there.csv"] and Path("there.csv").read_text() == "mine"


@pytest.mark.parametrize("command", ["predict", "export"])
def test_a_video_in_the_place_of_the_run(command, walk, tmp_path, capsys):
    words = [walk, *([walk] if command == "predict" else []), "--out", tmp_path / "a.onnx"]
    assert scarcenet(command, *words[:-1], tmp_path / ("a.csv" if command == "predict" else "a.onnx")) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "herd.mp4: expected the folder of a run or a weights file, then images" in said


def test_a_network_is_written_as_onnx_alone(weights, tmp_path, capsys):
    pytest.importorskip("onnx")
    assert scarcenet("export", weights, "--out", tmp_path / "net.pt") == 1
    assert "net.pt: expected a name that ends in .onnx" in capsys.readouterr().err


def test_no_such_run(tmp_path, walk, capsys):
    assert scarcenet("predict", tmp_path / "run", walk, "--out", tmp_path / "a.csv") == 1
    assert "run" in capsys.readouterr().err


@pytest.mark.slow
def test_memory_does_not_grow(weights, tmp_path):
    """A longer video needs no more memory than a short one, and both less than 1.5 GiB."""
    frames = [cv2.resize(image_at(0, n).pixels, (640, 480)) for n in range(8)]
    program = """
import resource, sys
from pathlib import Path
import scarcenet as sn
found = sn.Predictor(sys.argv[1], device="cpu").predict(sys.argv[2], boxes="image")
found.save(sys.argv[3], draw=sys.argv[4])
status = Path("/proc/self/status")  # on Linux, getrusage counts what the parent held when it started this process
if status.exists():
    print(next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024)
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024))
"""
    peaks = []
    for count in (64, 640):
        clip = clip_of(tmp_path / f"{count}.avi", (frames[n % 8] for n in range(count)))
        words = [weights, clip, tmp_path / f"{count}.csv", tmp_path / f"{count}.mp4"]
        done = subprocess.run(
            [sys.executable, "-c", program, *map(str, words)], capture_output=True, text=True, check=True
        )
        peaks.append(float(done.stdout.splitlines()[-1]))
    assert peaks[1] < 1.15 * peaks[0] and max(peaks) < 1536
