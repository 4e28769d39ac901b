"""Importing a set: frames of videos by number, splits, names, and what happens when something breaks."""

import csv
import errno
import json
import os
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from warm import Warm

from scarcenet.cli.main import main
from scarcenet.data import importing
from scarcenet.data.coco import coco_json, read_coco
from scarcenet.data.images import read_image
from scarcenet.data.importing import import_set, needs_import, split_groups
from scarcenet.data.label_source import Animal, LabelSource, SourceImage
from scarcenet.data.sources import (
    choose_frames,
    count_frames,
    find_images,
    find_videos,
    natural,
    open_video,
    read_frames,
    spread,
)
from scarcenet.utils import files
from scarcenet.utils.files import read_json, write_json

CODECS = [("clip.mp4", "mp4v"), ("clip.avi", "MJPG")]
SIZE = (64, 96)  # height, width


def write_video(file: Path, frames, codec: str = "") -> Path:
    """(H, W, 3) uint8 frames as a video."""
    writer = None
    for frame in frames:
        if writer is None:
            codec = codec or dict(mp4="mp4v", avi="MJPG")[file.suffix[1:]]
            writer = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*codec), 25, frame.shape[1::-1])
        writer.write(frame[..., ::-1])
    writer.release()
    return file


def numbered(n: int) -> np.ndarray:
    """A frame that shows `n` as twelve black or white squares, which survive any codec."""
    bits = np.array([n >> k & 1 for k in range(12)], np.uint8).reshape(2, 6) * 255
    return np.repeat(np.kron(bits, np.ones((32, 16), np.uint8))[..., None], 3, 2)


def number_of(frame: np.ndarray) -> int:
    return sum(int(frame[16 + 32 * (k // 6), 8 + 16 * (k % 6), 0] > 127) << k for k in range(12))


@pytest.fixture(scope="module", params=CODECS, ids=[codec for _, codec in CODECS])
def clip(request, tmp_path_factory) -> Path:
    """A video of 300 frames that show their numbers."""
    name, codec = request.param
    return write_video(tmp_path_factory.mktemp("clip") / name, map(numbered, range(300)), codec)


@pytest.fixture(scope="module")
def avi(tmp_path_factory) -> Path:
    return write_video(tmp_path_factory.mktemp("avi") / "session.avi", map(numbered, range(60)))


def truncated(video: Path, target: Path, share: float) -> Path:
    content = video.read_bytes()
    target.write_bytes(content[: int(share * len(content))])
    return target


def labelled_project(folder: Path, poses, rows: dict[str, list[int]]) -> Path:
    """A DeepLabCut project: for each video the rows of a set, one labelled image each."""
    for video, numbers in rows.items():
        home = folder / "labeled-data" / video
        home.mkdir(parents=True)
        with open(home / "CollectedData_Ann.csv", "w", newline="") as f:
            table = csv.writer(f)
            table.writerow(["scorer", *["Ann"] * 2 * len(poses.schema)])
            table.writerow(["bodyparts", *[name for name in poses.schema.names for _ in "xy"]])
            table.writerow(["coords", *"xy" * len(poses.schema)])
            for n in numbers:
                Image.open(poses.instances[n].file).save(home / f"img{n:04d}.png")
                seen = poses.truth.visible[n] > 0
                cells = [f"{v}" if s else "" for xy, s in zip(poses.truth.xy[n], seen, strict=True) for v in xy]
                table.writerow([f"labeled-data/{video}/img{n:04d}.png", *cells])
    return folder


@pytest.fixture(scope="module")
def poses(zoo):
    return read_coco(zoo / "annotations" / "ap10k-train-split1.json")


@pytest.fixture(scope="module")
def project(poses, tmp_path_factory) -> Path:
    """Three videos with 8, 4 and 2 labelled frames; images of one animal only."""
    ids = poses.column("image_id")
    alone = [n for n in range(len(poses)) if (ids == ids[n]).sum() == 1]
    rows = {"day1": alone[:8], "day2": alone[8:12], "day3": alone[12:14]}
    return labelled_project(tmp_path_factory.mktemp("dlc") / "mice", poses, rows)


def by_hand(images, points=2) -> LabelSource:
    """A source of some images, each with one animal."""
    names = tuple(f"p{k}" for k in range(points))
    xy = np.arange(2.0 * points).reshape(points, 2) * 5 + 3.25
    animals = tuple(Animal(n, xy + n, np.full(points, 2, np.uint8)) for n in range(len(images)))
    return LabelSource(Path("labels.csv"), "by hand", names, None, (), tuple(images), animals)


def frame_source(video: Path, frames) -> LabelSource:
    return by_hand([SourceImage(f"v/img{n}.png", video=video, frame=n, group=video.stem) for n in frames])


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- files


def test_endings_of_images_and_videos(tmp_path):
    images = [".jpg", ".jpe", ".JPEG", ".ppm", ".pgm", ".pbm", ".tif"]
    videos = [".mp4", ".flv", ".ts", ".MTS", ".m2ts", ".3gp", ".ogv"]
    for end in images + videos:
        (tmp_path / f"a{end}").touch()
    assert {f.suffix for f in find_images(tmp_path)} == set(images)
    assert {f.suffix for f in find_videos(tmp_path)} == set(videos)


def test_names_are_sorted_as_people_count(tmp_path):
    names = ["img10.png", "img9.PNG", "b/img1.jpeg", "IMG2.tif", ".hidden.png", "note.txt", "a.mp4", "aDLC_labeled.mp4"]
    (tmp_path / "b").mkdir()
    for name in names:
        (tmp_path / name).touch()
    assert [f.name for f in find_images(tmp_path)] == ["img1.jpeg", "IMG2.tif", "img9.PNG", "img10.png"]
    assert [f.name for f in find_images(f"{tmp_path}/**/*1*")] == ["img1.jpeg", "img10.png"]
    assert find_images(tmp_path / "note.txt") == []
    assert [f.name for f in find_videos(tmp_path)] == ["a.mp4"]
    with pytest.raises(FileNotFoundError, match="no such file"):
        find_images(tmp_path / "nowhere")
    assert natural("a2") < natural("a10") < natural("B1")


# ---- frames


def test_frames_by_number(clip):
    video = open_video(clip)
    assert (video.frames, video.fps, video.size) == (300, 25, SIZE)
    assert count_frames(clip) == 300
    wanted = [0, 1, 2, 37, 150, 299]
    assert [(n, number_of(f)) for n, f in read_frames(clip, wanted)] == [(n, n) for n in wanted]
    frames = dict(read_frames(clip))
    assert list(frames) == list(range(300)) and all(number_of(f) == n for n, f in frames.items())
    assert frames[0].shape == (*SIZE, 3) and frames[0].dtype == np.uint8
    assert list(read_frames(clip, [299, 300, 1000]))[-1][0] == 299  # it ends where the video does
    assert list(read_frames(clip, [])) == []


def test_frames_are_rgb(tmp_path):
    red = np.zeros((*SIZE, 3), np.uint8)
    red[..., 0] = 200
    _, frame = next(read_frames(write_video(tmp_path / "red.avi", [red] * 3)))
    assert frame[..., 0].min() > 150 and frame[..., 1:].max() < 50


def test_frame_numbers_that_do_not_increase(clip):
    for wanted in ([3, 2], [5, 5], [-1]):
        with pytest.raises(ValueError, match="expected increasing frame numbers"):
            list(read_frames(clip, wanted))


def test_reading_stops_when_nobody_asks_further(clip):
    """A generator: of a long video no more is decoded than is taken, and the file is let go."""
    frames = read_frames(clip)
    assert next(frames)[0] == 0
    frames.close()


@pytest.mark.parametrize("how", ["even", "kmeans"])
def test_frames_are_chosen_once_and_in_order(clip, how):
    chosen = [(n, number_of(f)) for n, f in choose_frames(clip, 24, how, seed=3)]
    assert len(chosen) == 24 and all(n == shown for n, shown in chosen)
    assert [n for n, _ in chosen] == sorted({n for n, _ in chosen})
    assert chosen == [(n, number_of(f)) for n, f in choose_frames(clip, 24, how, seed=3)]
    first = {n for n, _ in chosen[:5]}
    assert not first & {n for n, _ in choose_frames(clip, 24, how, seed=3, exclude=first)}
    assert len(list(choose_frames(clip, 500, how))) == 300  # all where there are fewer
    assert list(choose_frames(clip, 3, how, exclude=range(300))) == []


def test_even_frames_are_even(clip):
    numbers = [n for n, _ in choose_frames(clip, 30)]
    assert numbers == list(range(5, 300, 10))


def test_another_seed_chooses_others_by_appearance(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (100, *SIZE, 3), np.uint8)
    video = write_video(tmp_path / "noise.avi", noise)
    a, b = ([n for n, _ in choose_frames(video, 10, "kmeans", seed=seed)] for seed in (0, 1))
    assert a != b and len(a) == len(b) == 10


def test_kmeans_takes_one_of_each_scene(tmp_path):
    """Three still scenes of unequal length, of which evenly spaced frames miss the short one."""
    rng = np.random.default_rng(0)
    scenes = rng.integers(0, 255, (3, 8, 12, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    which = np.repeat([0, 1, 2], [100, 5, 60])
    for name in ("still.mp4", "still.avi"):
        video = write_video(tmp_path / name, (scenes[s] for s in which))
        for seed in range(3):
            assert sorted(which[n] for n, _ in choose_frames(video, 3, "kmeans", seed=seed)) == [0, 1, 2]
    assert 1 not in which[[n for n, _ in choose_frames(video, 3)]]


def test_equal_frames_are_no_problem(tmp_path):
    """A still video has one cluster, and yet as many frames as asked for."""
    video = write_video(tmp_path / "still.avi", [numbered(5)] * 20)
    assert len({n for n, _ in choose_frames(video, 6, "kmeans")}) == 6
    assert len(set(spread(np.zeros((9, 4)), 5, 0))) == 5


def test_a_long_video_is_looked_at_here_and_there(clip, monkeypatch):
    """Not more frames than the limit, and from all of it; where they do not fit in memory, a second pass reads them."""
    from scarcenet.data import sources

    looked = []
    monkeypatch.setattr(sources, "LOOKED_AT", 40)
    monkeypatch.setattr(sources, "shrink", lambda f: (looked.append(number_of(f)), f[::16, ::16, 0].ravel())[1])
    once = [(n, number_of(f)) for n, f in choose_frames(clip, 6, "kmeans")]
    assert looked == list(range(0, 300, 8)) and all(n == shown for n, shown in once)
    monkeypatch.setattr(sources, "KEPT_MB", 0.01)
    assert [(n, number_of(f)) for n, f in choose_frames(clip, 6, "kmeans")] == once
    # a file that does not say how long it is
    monkeypatch.setattr(sources, "open_video", lambda file: sources.Video(Path(file), 0, 0.0, SIZE))
    unknown = [(n, number_of(f)) for n, f in choose_frames(clip, 6, "kmeans")]
    assert len(unknown) == 6 and all(n == shown for n, shown in unknown) and max(n for n, _ in unknown) > 150
    assert [n for n, _ in choose_frames(clip, 30)] == list(range(5, 300, 10))


# ---- broken videos


def test_what_is_no_video(tmp_path, clip):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video\n" * 100)
    shutil.copy(clip, tmp_path / "frames_001.mp4")
    truncated(clip, tmp_path / "head_001.mp4", 0.002)
    for name in ("empty.mp4", "text.mp4", "head_001.mp4"):
        for call in (open_video, lambda f: list(read_frames(f)), lambda f: choose_frames(f, 3)):
            with pytest.raises(ValueError, match=name) as error:
                call(tmp_path / name)
            assert "ffmpeg" in one_line(error)
    with pytest.raises(FileNotFoundError, match="no such video"):
        open_video(tmp_path / "nowhere.mp4")
    assert open_video(tmp_path / "frames_001.mp4").frames == 300  # digits in a name are no pattern


def test_a_video_cut_short(tmp_path):
    """What can be read of it is used, and said; an .avi says its length at its start, so it promises too much."""
    whole = write_video(tmp_path / "whole.avi", map(numbered, range(200)))
    video = truncated(whole, tmp_path / "short.avi", 0.5)
    there = count_frames(video)
    assert open_video(video).frames == 200 and 60 < there < 140
    for how in ("even", "kmeans"):
        with pytest.warns(UserWarning, match=r"short.avi: expected 200 frames .* cut short") as caught:
            chosen = [(n, number_of(f)) for n, f in choose_frames(video, 30, how)]
        assert len(caught) == 1 and "\n" not in str(caught[0].message)
        assert len({n for n, _ in chosen}) == 30 and all(n == shown < there for n, shown in chosen)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(choose_frames(whole, 30, "kmeans"))) == 30


@pytest.mark.parametrize(
    ("count", "how", "says"), [(0, "even", "1 or more frames"), (3, "best", "expected even or kmeans")]
)
def test_choices_that_do_not_exist(clip, count, how, says):
    with pytest.raises(ValueError, match=says):
        choose_frames(clip, count, how)


# ---- splits


def test_frames_of_one_video_stay_together():
    groups = ["a"] * 50 + ["b"] * 30 + ["c"] * 12 + ["d"] * 8 + [""] * 10
    found = set()
    for seed in range(30):
        split = split_groups(groups, {"val": 0.1, "test": 0.1}, seed)
        assert all(len(set(split[np.array(groups) == g])) == 1 for g in "abcd")
        assert set(split) == {"train", "val", "test"} and (split == "train").sum() >= 50
        assert split.tolist() == split_groups(groups, {"val": 0.1, "test": 0.1}, seed).tolist()
        found.add(tuple(split))
    assert len(found) > 5


def test_shares_are_met_as_nearly_as_groups_allow():
    split = split_groups(["a"] * 90 + ["b"] * 10, {"val": 0.1}, 0)
    assert (split == "val").sum() == 10
    for seed in range(20):
        sizes = [(split_groups([""] * 40, {"val": 0.25, "test": 0.1}, seed) == name).sum() for name in ("val", "test")]
        assert sizes == [10, 4]
        assert (split_groups(["a"] * 40, {"val": 0.25}, seed) == "val").sum() == 10  # one video: images
        assert set(split_groups(["a", "b", "c"], {"val": 0.01, "test": 0.01}, seed)) == {"train", "val", "test"}
        # two videos cannot make three splits
        assert set(split_groups(["a"] * 9 + ["b"] * 9, {"val": 0.2, "test": 0.2}, seed)) == {"train", "val", "test"}


@pytest.mark.parametrize("shares", [{"val": 1.0}, {"val": 0.6, "test": 0.4}, {"val": -0.1}, {"val": float("nan")}])
def test_shares_that_cannot_be(shares):
    with pytest.raises(ValueError, match="val and test of 0 or more"):
        split_groups(["a"] * 9, shares, 0)


def test_many_images_are_split_at_once():
    start = time.perf_counter()
    split = split_groups([""] * 50_000, {"val": 0.1, "test": 0.1}, 0)
    assert (split == "val").sum() == (split == "test").sum() == 5000
    assert time.perf_counter() - start < 3


def test_too_few_to_split():
    assert split_groups([""], {}, 0).tolist() == ["train"]
    with pytest.raises(ValueError, match="expected more labelled images than splits .*, got 1"):
        split_groups([""], {"val": 0.5}, 0)


# ---- a set


def test_a_project_comes_out_as_it_went_in(project, poses, tmp_path):
    """Keypoints, names and images of a DeepLabCut project; boxes of its keypoints, which say what they are."""
    summary = import_set([project], tmp_path / "set")
    assert (summary.labelled, summary.unlabelled, summary.animals) == (14, 0, 14) and summary.splits == {"train": 14}
    new = read_coco(tmp_path / "set" / "annotations" / "train.json")
    assert new.schema.names == poses.schema.names and new.schema.flip_pairs == poses.schema.flip_pairs
    for instance, xy, visible in zip(new.instances, new.truth.xy, new.truth.visible, strict=True):
        n = int(instance.file.stem[3:])
        assert np.array_equal(xy, poses.truth.xy[n])
        assert np.array_equal(visible > 0, poses.truth.visible[n] > 0)
        source = project / "labeled-data" / instance.video / instance.file.name
        assert instance.file.read_bytes() == source.read_bytes()
        assert read_image(instance.file).shape[:2] == (instance.height, instance.width)
        assert instance.box_source == "keypoints"
        x, y, w, h = instance.box
        inside = xy[visible > 0]
        assert (inside >= (x, y)).all() and (inside <= (x + w, y + h)).all()
    content = read_json(tmp_path / "set" / "annotations" / "train.json")
    assert {a["bbox_source"] for a in content["annotations"]} == {"keypoints"}
    assert {i["video"] for i in content["images"]} == {"day1", "day2", "day3"}


def test_coco_through_the_door(zoo, poses, tmp_path):
    """A COCO set with boxes, species, skeleton and three splits keeps them."""
    summary = import_set([zoo], tmp_path / "set", val=0.2)
    assert list(summary.splits) == ["train", "val", "test"]
    assert any("--val and --test are ignored" in note for note in summary.notes)
    new = read_coco(tmp_path / "set" / "annotations" / "train.json")
    assert new.schema == poses.schema and len(new) == len(poses)
    assert new.column("category").tolist() == poses.column("category").tolist()
    assert new.column("family").tolist() == poses.column("family").tolist()
    assert np.array_equal(new.truth.xy, poses.truth.xy) and np.array_equal(new.truth.visible, poses.truth.visible)
    assert np.allclose(new.column("box"), poses.column("box"))
    ids = [i["id"] for s in summary.splits for i in read_json(tmp_path / "set" / f"annotations/{s}.json")["images"]]
    assert len(ids) == len(set(ids))


def test_areas_and_the_origin_of_boxes_are_kept(zoo, tmp_path):
    """OKS divides by the area: an imported set is measured as its source is."""
    content = read_json(zoo / "annotations" / "ap10k-val-split1.json")
    for n, annotation in enumerate(content["annotations"]):
        annotation["area"] = 100.5 + n
        annotation["bbox_source"] = ("file", "pose", "detector", "keypoints")[n % 4]
    content["annotations"][-1].pop("area")
    content["annotations"][-2].pop("bbox")
    shutil.copytree(zoo / "data", tmp_path / "data")
    write_json(tmp_path / "train.json", content)
    old = read_coco(tmp_path / "train.json")
    import_set([tmp_path / "train.json"], tmp_path / "set")
    new = read_coco(tmp_path / "set" / "annotations" / "train.json")
    assert len(old) > 4 and new.truth.area[0] == 100.5
    assert np.allclose(new.truth.area, old.truth.area) and np.allclose(new.column("box"), old.column("box"))
    assert new.column("box_source").tolist() == old.column("box_source").tolist()


def test_a_turned_image_of_a_coco_set(zoo, poses, tmp_path):
    """Its stated size fits the image after EXIF rotation only: there its keypoints are, and there it is written."""
    content = read_json(zoo / "annotations" / "ap10k-train-split1.json")
    entry = next(i for i in content["images"] if i["width"] != i["height"])
    content["images"] = [entry]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] == entry["id"]]
    pixels, exif = read_image(zoo / "data" / entry["file_name"]), Image.Exif()
    exif[0x0112] = 6
    entry["file_name"] = "turned.png"
    Image.fromarray(np.rot90(pixels)).save(tmp_path / "turned.png", exif=exif)
    write_json(tmp_path / "train.json", content)
    import_set([tmp_path / "train.json"], tmp_path / "set")
    new = read_coco(tmp_path / "set" / "annotations" / "train.json")
    assert np.array_equal(read_image(new.instances[0].file), pixels)
    assert (new.instances[0].height, new.instances[0].width) == pixels.shape[:2]


def test_a_sleap_project(poses, tmp_path):
    """Embedded in one file: .pkg.slp."""
    sleap_io = pytest.importorskip("sleap_io")
    skeleton = sleap_io.Skeleton([f"n{k}" for k in range(17)])
    rows = [0, 5, 9]
    frames = np.stack([cv2.resize(read_image(poses.instances[n].file), (128, 96)) for n in rows])
    video = write_video(tmp_path / "mouse.avi", frames)
    source = sleap_io.Video.from_filename(str(video))
    points = np.random.default_rng(0).uniform(5, 90, (len(rows), 17, 2))
    points[0, 3] = np.nan
    labels = sleap_io.Labels(
        [
            sleap_io.LabeledFrame(
                video=source, frame_idx=k, instances=[sleap_io.Instance.from_numpy(points[k], skeleton=skeleton)]
            )
            for k in range(len(rows))
        ]
    )
    labels.save(str(tmp_path / "labels.slp"))
    labels.save(str(tmp_path / "labels.pkg.slp"), embed=True)
    for name in ("labels.slp", "labels.pkg.slp"):
        import_set([tmp_path / name], tmp_path / f"set of {name}")
        new = read_coco(tmp_path / f"set of {name}" / "annotations" / "train.json")
        assert new.schema.names == tuple(f"n{k}" for k in range(17)) and len(new) == 3
        assert np.allclose(new.truth.xy, np.nan_to_num(points), atol=1e-3)
        assert (new.truth.visible > 0).tolist() == np.isfinite(points[..., 0]).tolist()
        pixels = [read_image(i.file) for i in new.instances]
        played = [frame for _, frame in read_frames(video)]
        assert all(np.array_equal(a, b) for a, b in zip(pixels, played, strict=True))


def test_frames_of_videos(avi, tmp_path):
    """Labelled frames by their numbers, and unlabelled ones between them, none twice."""
    source = frame_source(avi, [7, 30])
    summary = import_set([source], tmp_path / "set", unlabelled=[avi], frames=20)
    assert (summary.labelled, summary.unlabelled) == (2, 20)
    new = read_coco(tmp_path / "set" / "annotations" / "train.json")
    assert [number_of(read_image(i.file)) for i in new.instances] == [7, 30]
    assert [i.file.relative_to(new.folder).as_posix() for i in new.instances] == ["v/img7.png", "v/img30.png"]
    numbers = [int(i.file.stem.removeprefix("frame")) for i in new.empty]
    assert numbers == [number_of(read_image(i.file)) for i in new.empty] == sorted(numbers)
    assert len(numbers) == 20 and not {7, 30} & set(numbers)
    assert {i.video for i in new.instances + new.empty} == {"session"}
    assert new.empty[0].file.parent.name == "session" and len(new.empty[0].file.stem) == len("frame000123")


def test_a_labelled_image_of_the_video_is_not_taken_again(avi, tmp_path):
    """DeepLabCut's images have the frame's number in their names; others are known by their pixels."""
    frames = dict(read_frames(avi))
    images = []
    for n, name in ((11, "session/img0011.png"), (40, "other/first.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(frames[n]).save(tmp_path / name)
        images.append(SourceImage(name, file=tmp_path / name, group=name.split("/")[0]))
    summary = import_set([by_hand(images)], tmp_path / "set", unlabelled=[avi], frames=100)
    assert summary.unlabelled == 58
    assert [f.count for f in summary.findings if "already has" in f.kind] == [1]
    assert any("fewer than 100 frames" in f.kind for f in summary.findings)


def test_unlabelled_images(project, poses, zoo, tmp_path):
    """Folders with their folders, patterns, files; what is labelled is not taken again, nor anything twice."""
    more = tmp_path / "more"
    (more / "deep").mkdir(parents=True)
    for n in (-1, -2):
        shutil.copy(poses.instances[n].file, more / "deep" / f"{n + 2}.jpg")
    labelled = next((project / "labeled-data").glob("*/*.png"))
    shutil.copy(labelled, more / "copy.png")
    torn = truncated(poses.instances[0].file, more / "torn.jpg", 0.5)
    summary = import_set(
        [project], tmp_path / "set", unlabelled=[more, more / "deep" / "*.jpg", more / "deep" / "0.jpg"]
    )
    assert summary.unlabelled == 2 and (tmp_path / "set" / "images" / "more" / "deep" / "1.jpg").is_file()
    found = {f.kind: f for f in summary.findings}
    assert found["images that cannot be read"].count == 1
    assert str(torn) in found["images that cannot be read"].first[0]
    assert found["unlabelled images that the set already has"].count == 4
    new = read_coco(tmp_path / "set" / "annotations" / "train.json")
    assert len(new) == 14 and len(new.empty) == 2


def test_splits_of_a_set(project, tmp_path):
    """Whole videos; no unlabelled image outside of train."""
    extra = project / "labeled-data" / "day1" / "*.png"
    summary = import_set([project], tmp_path / "set", val=0.15, test=0.25, unlabelled=[extra], seed=1)
    videos = {}
    for name, count in summary.splits.items():
        part = read_coco(tmp_path / "set" / "annotations" / f"{name}.json")
        assert len(part) == count
        videos[name] = set(part.column("video"))
    assert sorted(v for names in videos.values() for v in names) == ["day1", "day2", "day3"] and not summary.notes
    one = labelled_project(tmp_path / "one", read_coco(tmp_path / "set/annotations/train.json"), {"day": [0, 1, 2, 3]})
    summary = import_set([one], tmp_path / "flat", val=0.25)
    assert summary.splits["val"] == 1 and "too high" in summary.notes[0]


def test_the_same_bytes(project, avi, tmp_path):
    options = dict(unlabelled=[avi], frames=7, choose="kmeans", val=0.2, seed=4)
    for name in "ab":
        import_set([project], tmp_path / name, **options)
    files = [sorted(f.relative_to(tmp_path / n).as_posix() for f in (tmp_path / n).rglob("*.*")) for n in "ab"]
    assert files[0] == files[1]
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files[0])
    assert "tmp" not in (tmp_path / "a" / "annotations" / "train.json").read_text()


def test_pairs_of_sides(tmp_path, avi):
    def pairs(source, **options):
        target = tmp_path / str(len(list(tmp_path.iterdir())))
        summary = import_set([source], target, **options)
        assert read_coco(target / "annotations" / "train.json").schema.flip_pairs == summary_pairs(summary)
        return summary.pairs

    def summary_pairs(summary):
        return tuple((summary.keypoints.index(a), summary.keypoints.index(b)) for a, b in summary.pairs)

    source = frame_source(avi, [3])
    assert pairs(source) == ()
    assert pairs(source, flip_pairs=["p0:p1"]) == (("p0", "p1"),)
    sided = LabelSource(**{**vars(source), "names": ("ear_l", "ear_r")})
    assert pairs(sided) == (("ear_l", "ear_r"),)
    assert pairs(LabelSource(**{**vars(sided), "flip_pairs": ()})) == ()  # the source says that there are none
    for wrong in ("p0", "p0:p7", "p0:p0"):
        with pytest.raises(ValueError, match="LEFT:RIGHT") as error:
            import_set([source], tmp_path / "wrong", flip_pairs=[wrong])
        one_line(error)
    assert not (tmp_path / "wrong").exists()


def test_names_stay_inside_and_apart(tmp_path, poses):
    files = [poses.instances[n].file for n in range(4)]
    names = ["../../a.jpg", "a.jpg", "A.jpg", r"C:\x\a.jpg"]
    source = by_hand([SourceImage(name, file=file) for name, file in zip(names, files, strict=True)])
    import_set([source], tmp_path / "set")
    found = sorted(f.relative_to(tmp_path / "set" / "images").as_posix() for f in find_images(tmp_path / "set"))
    assert len(found) == 4 and len({name.casefold() for name in found}) == 4
    assert list(tmp_path.rglob("a.jpg")) != [] and all(".." not in name for name in found)


def test_links_out_of_a_folder_are_counted(tmp_path, poses):
    """They are followed, as images often lie on another disk; but nobody should share a file without knowing."""
    home, disk = tmp_path / "home", tmp_path / "disk"
    home.mkdir(), disk.mkdir()
    for n, folder in enumerate((home, home, disk)):
        shutil.copy(poses.instances[n].file, folder / f"{n}.jpg")
    (home / "2.jpg").symlink_to(disk / "2.jpg")
    (tmp_path / "linked").symlink_to(home, target_is_directory=True)
    files = [home / "0.jpg", tmp_path / "linked" / "1.jpg", home / "2.jpg"]
    source = by_hand([SourceImage(file.name, file=file) for file in files])
    (found,) = import_set([source], tmp_path / "set", strict=True).findings
    assert (found.kind, found.count) == ("images that are links out of their folder", 1)
    assert found.first == (f"{home / '2.jpg'} -> {disk / '2.jpg'}",)
    assert not (tmp_path / "set" / "images" / "2.jpg").is_symlink()


def test_names_that_are_not_utf8_are_written_anew(tmp_path, poses):
    """A table of poses could not hold them; and a set that has one is read without it."""
    names = [os.fsdecode(b"day\xff/bad\xff.jpg"), "day_/bad_.jpg"]
    files = [poses.instances[n].file for n in range(2)]
    source = by_hand([SourceImage(name, file=file, group=name) for name, file in zip(names, files, strict=True)])
    told = import_set([source], tmp_path / "set", val=0, test=0)
    assert [(f.kind, f.count) for f in told.findings if "UTF-8" in f.kind] == [
        ("file names that are not valid UTF-8", 1)
    ]
    file = tmp_path / "set" / "annotations" / "train.json"
    content = read_json(file)
    assert [image["file_name"] for image in content["images"]] == ["day_/bad_.jpg", "day_/bad__2.jpg"]
    assert content["images"][0]["video"] == names[1]
    content["images"][0]["file_name"] = names[0]
    write_json(file, content)
    kinds = {f.kind: f.count for f in read_coco(file).findings}
    assert kinds["images without a file name in UTF-8"] == 1
    with pytest.raises(ValueError, match=r"image 1: file_name: .*bad\\udcff"):
        read_coco(file, strict=True)


def test_exif_turns_are_settled(tmp_path, poses):
    """An image with an EXIF orientation is written in the frame of its keypoints, without the note."""
    pixels = read_image(poses.instances[0].file)
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    for upright in (True, False):
        source = by_hand([SourceImage("t.png", file=tmp_path / "turned.png", upright=upright)])
        summary = import_set([source], tmp_path / f"set{upright}")
        written = Image.open(tmp_path / f"set{upright}" / "images" / "t.png")
        assert written.getexif().get(0x0112) is None
        assert np.array_equal(np.asarray(written), pixels[::-1, ::-1] if upright else pixels)
        assert any("EXIF" in f.kind for f in summary.findings)


# ---- when something breaks


def test_nothing_half(project, tmp_path, monkeypatch):
    """An error, or Ctrl-C, in the middle leaves nothing; neither does a full disk, which is one line."""
    from scarcenet.data import importing

    for error in (KeyboardInterrupt(), RuntimeError("bug")):

        def fail(*_, error=error, **__):
            assert any(tmp_path.iterdir())  # something has been written
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(importing, "write_annotations", fail)
            with pytest.raises(type(error)):
                import_set([project], tmp_path / "set")
        assert list(tmp_path.iterdir()) == []
    copy = shutil.copyfile
    full = OSError(errno.ENOSPC, "No space left on device")

    def copy_some(source, target):
        if len(list(Path(target).parent.iterdir())) > 3:
            raise full
        return copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", copy_some)
    with pytest.raises(ValueError, match="the disk is full") as error:
        import_set([project], tmp_path / "set")
    assert str(tmp_path / "set") in one_line(error) and list(tmp_path.iterdir()) == []


def test_an_output_that_exists(project, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="already exists"):
        import_set([project], tmp_path / "set")
    with pytest.raises(ValueError, match="already exists"):
        import_set([project], tmp_path / "set" / "mine.txt")
    assert [f.name for f in tmp_path.rglob("*")] == ["set", "mine.txt"]
    (tmp_path / "empty").mkdir()
    import_set([project], tmp_path / "empty")
    assert (tmp_path / "empty" / "annotations" / "train.json").is_file()


def test_what_cannot_be_imported(project, avi, tmp_path):
    (tmp_path / "nothing").mkdir()
    bad = truncated(avi, tmp_path / "bad.mp4", 0.001)
    cases = [
        (dict(sources=[]), ValueError, "one or more files"),
        (dict(unlabelled=[tmp_path / "nothing"]), ValueError, "expected an image, a video"),
        (dict(unlabelled=[tmp_path / "nowhere"]), FileNotFoundError, "nowhere"),
        (dict(unlabelled=[bad]), ValueError, "bad.mp4"),
        (dict(unlabelled=[avi], frames=0), ValueError, "frames: expected 1 or more"),
        (dict(unlabelled=[avi], choose="best"), ValueError, "expected even or kmeans"),
        (dict(val=0.7, test=0.3), ValueError, "val and test of 0 or more"),
    ]
    for options, kind, says in cases:
        with pytest.raises(kind, match=says) as error:
            import_set(**{"sources": [project], "out": tmp_path / "set", **options})
        one_line(error)
        assert not (tmp_path / "set").exists()
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        import_set([tmp_path / "nowhere.csv"], tmp_path / "set")
    one_line(error)


def test_frames_that_are_not_there(avi, tmp_path):
    """A label of a frame beyond the end costs itself; a video without any of its frames costs all of its labels."""
    summary = import_set([frame_source(avi, [5, 60, 99])], tmp_path / "set")
    assert summary.labelled == 1 and [(f.count, f.first[0]) for f in summary.findings] == [(2, "session.avi, frame 60")]
    lost = frame_source(truncated(avi, tmp_path / "lost.avi", 0.001), [5])
    with pytest.raises(ValueError, match="no labelled image could be read") as error:
        import_set([lost], tmp_path / "none")
    assert "lost.avi" in one_line(error) and not (tmp_path / "none").exists()


# ---- what is a source


def test_what_needs_an_import(project, zoo, poses, tmp_path):
    assert needs_import(project)
    assert needs_import(next(project.rglob("*.csv")))
    assert not needs_import(zoo)
    assert not needs_import(zoo / "annotations" / "ap10k-train-split1.json")
    (tmp_path / "coco").mkdir()
    write_json(tmp_path / "coco" / "any.json", coco_json(poses))
    assert not needs_import(tmp_path / "coco") and not needs_import(tmp_path / "coco" / "any.json")
    assert not needs_import(tmp_path / "nowhere")
    studio = tmp_path / "studio"
    studio.mkdir()
    task = dict(id=1, data={"img": "a.jpg"}, annotations=[dict(id=1, result=[])])
    write_json(studio / "export.json", [task])
    assert needs_import(studio / "export.json") and needs_import(studio)
    (tmp_path / "broken.json").write_text("{")
    assert not needs_import(tmp_path / "broken.json")


# ---- the command


def test_the_command(project, avi, tmp_path, capsys):
    out = tmp_path / "my_set"
    words = ["import", str(project), "--out", str(out), "--unlabelled", str(avi), "--frames", "6", "--val", "0.2"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "14 labelled images, 6 unlabelled" in said and "left_eye / right_eye" in said
    assert f"scarcenet train mine --data {out}" in said
    assert (out / "annotations" / "val.json").is_file()
    assert main(words) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "already exists" in error


# ---- real projects


@pytest.mark.parametrize(("name", "labels", "keypoints"), [("mouse_dlc", 36, 4), ("mouse_lp", 90, 17)])
def test_real_mice(real_data, tmp_path, name, labels, keypoints):
    if not (real_data / name).is_dir():
        pytest.skip(f"{name} is not there")
    video = next((real_data / name / "videos").iterdir())
    sets = {}
    for choose in ("even", "kmeans"):
        out = tmp_path / choose
        summary = import_set([real_data / name], out, unlabelled=[video], frames=24, choose=choose)
        assert (summary.labelled, summary.unlabelled) == (labels, 24) and len(summary.keypoints) == keypoints
        sets[choose] = read_coco(out / "annotations" / "train.json")
        assert len(sets[choose]) == labels and len(sets[choose].empty) == 24
        sizes = {(i.width, i.height) for i in sets[choose].empty}
        assert sizes == {(640, 480) if name == "mouse_dlc" else (396, 406)}
    chosen = [{i.file.name for i in poses.empty} for poses in sets.values()]
    assert chosen[0] != chosen[1]
    table = next(f for f in (real_data / name).rglob("CollectedData*.csv"))
    cells = list(csv.reader(table.read_text().splitlines()))[3:]
    annotated = sum(cell != "" for row in cells for cell in row[-2 * keypoints :]) // 2
    assert (sets["even"].truth.visible > 0).sum() == annotated
    assert json.loads((out / "annotations" / "train.json").read_text())["categories"][0]["name"] == "animal"


# ---- images that are not what the labels say


def test_images_of_another_size_are_left_out(zoo, tmp_path):
    """Counted with both sizes, as `check` and `train` refuse them; a size that fits after the EXIF turn is right."""
    content = read_json(zoo / "annotations" / "ap10k-train-split1.json")
    shutil.copytree(zoo / "data", tmp_path / "data")
    names = [i["file_name"] for i in content["images"]]
    Image.open(tmp_path / "data" / names[0]).reduce(2).save(tmp_path / "data" / names[0])
    write_json(tmp_path / "train.json", content)
    summary = import_set([tmp_path / "train.json"], tmp_path / "set")
    (found,) = (f for f in summary.findings if "another size" in f.kind)
    width, height = content["images"][0]["width"], content["images"][0]["height"]
    small = f"expected {width} x {height} px, got {-(-width // 2)} x {-(-height // 2)}"
    assert found.count == 1 and found.done == "skipped" and found.first[0].endswith(f"{names[0]}: {small}")
    new = read_coco(tmp_path / "set" / "annotations" / "train.json")
    assert names[0] not in {i.file.name for i in new.instances} and summary.images == len(names) - 1
    assert main(["check", str(tmp_path / "set")]) == 0 and main(["check", str(tmp_path / "train.json")]) == 1
    with pytest.raises(ValueError, match="of another size than stated: 1, first"):
        import_set([tmp_path / "train.json"], tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()


def test_frames_of_another_size_are_left_out(avi, tmp_path):
    source = frame_source(avi, [3, 5])
    first, second = source.images
    sized = LabelSource(**{**vars(source), "images": (first._replace(size=SIZE), second._replace(size=(480, 640)))})
    summary = import_set([sized], tmp_path / "set")
    assert summary.labelled == 1
    assert [f.first[0] for f in summary.findings] == [f"{avi}, frame 5: expected 640 x 480 px, got 96 x 64"]


def test_the_choice_of_a_frame_is_said(poses, tmp_path, capsys):
    """A turned square image and a table: the labels do not say which frame they count in."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 255, (48, 48, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    (tmp_path / "CollectedData_me.csv").write_text("scorer,me,me\nbodyparts,nose,nose\ncoords,x,y\na.png,9,12\n")
    for flag, turns, says in (
        (
            "auto",
            0,
            "keypoints read in the frame of the image as stored, written as PNG; --exif upright takes the other",
        ),
        ("stored", 0, "images with an EXIF orientation: 1, written as PNG, as stored, as the keypoints are"),
        ("upright", 3, "images with an EXIF orientation: 1, written as PNG, turned upright, as the keypoints are"),
    ):
        out = tmp_path / flag
        assert main(["import", str(tmp_path / "CollectedData_me.csv"), "--out", str(out), "--exif", flag]) == 0
        assert says in capsys.readouterr().out
        assert np.array_equal(read_image(out / "images" / "a.png"), np.rot90(pixels, turns))
    with pytest.raises(ValueError, match="images with an EXIF orientation that the labels do not settle"):
        import_set([tmp_path / "CollectedData_me.csv"], tmp_path / "strict", strict=True)


def test_labels_given_twice_hold_nothing_back_that_is_trained_on(project, tmp_path):
    """A project and its own tables: no image is in two splits, nor are the frames of one video."""
    tables = sorted(project.rglob("*.csv"))
    summary = import_set([project, *tables], tmp_path / "set", val=0.3)
    assert (summary.labelled, summary.animals) == (14, 14)
    assert {f.kind: f.count for f in summary.findings} == {
        "images that two sources have": 14,
        "animals that two sources label alike": 14,
    }
    parts = [read_coco(tmp_path / "set" / "annotations" / f"{name}.json") for name in ("train", "val")]
    assert not set(parts[0].column("video")) & set(parts[1].column("video")) and sum(map(len, parts)) == 14
    copy = tmp_path / "copied"
    shutil.copytree(project, copy)
    summary = import_set([project, copy], tmp_path / "both")
    assert {f.kind: f.count for f in summary.findings} == {"labelled images with exactly the pixels of another": 14}


# ---- imports that are killed


def import_until_killed(project, out, begun):
    """An import that stops in the middle, once it has made the file `begun`."""

    def wait(*_, **__):
        begun.touch()
        time.sleep(60)

    importing.write_annotations = wait
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    sys.exit(main(["import", str(project), "--out", str(out)]))


@pytest.mark.parametrize(("how", "code", "left"), [("SIGTERM", 143, 0), ("SIGINT", 130, 0), ("SIGKILL", -9, 1)])
def test_an_import_that_is_killed(project, tmp_path, how, code, left):
    """It clears away what it began, if it can; and if it cannot, the next import of the same name does."""
    begun = tmp_path / "begun"
    process = Warm(import_until_killed, project, tmp_path / "set", begun)
    while not begun.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    begun.unlink()
    process.send_signal(getattr(signal, how))
    _, error = process.communicate(timeout=30)
    assert process.returncode == code and "Traceback" not in error
    assert len(list(tmp_path.iterdir())) == left
    names = [f".set.{files._TAG}.{os.getppid()}.part", ".set.00000000.99999999.part", ".set.1.part"]
    others = [tmp_path / name for name in names]
    for other in others:  # of a process that is at work, of another machine, of another program
        other.mkdir()
    import_set([project], tmp_path / "set")
    assert {f.name for f in tmp_path.iterdir()} == {"set", *(f.name for f in others)}


def test_signals_are_as_before(project, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    import_set([project], tmp_path / "set")
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_flags_of_the_command(project, tmp_path, capsys):
    """--videos and --strict reach the reading."""
    moved = tmp_path / "moved"
    shutil.copytree(project, moved)
    (tmp_path / "disk").mkdir()
    shutil.move(moved / "labeled-data" / "day1", tmp_path / "disk" / "day1")
    (moved / "labeled-data" / "day1").mkdir()
    table = "CollectedData_Ann.csv"
    shutil.move(tmp_path / "disk" / "day1" / table, moved / "labeled-data" / "day1" / table)
    words = ["import", str(moved), "--out", str(tmp_path / "set")]
    assert main([*words, "--strict"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "rows whose image is not there: 8" in error and "--strict" in error
    assert main([*words, "--strict", "--videos", str(tmp_path / "disk")]) == 0
    assert "14 labelled images" in capsys.readouterr().out
    assert main([*words[:-1], str(tmp_path / "b"), "--videos", str(tmp_path / "gone")]) == 1
    assert "gone: no such folder" in capsys.readouterr().err
