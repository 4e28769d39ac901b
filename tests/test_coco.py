"""The COCO reader and the draw of labels: AP-10K's layout, any other K, every kind of broken file, and no leak."""

import copy
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scarcenet.data.check import check_poses
from scarcenet.data.coco import PoseSet, Truth, coco_json, read_coco
from scarcenet.data.labels import (
    draw_labelled,
    labelled_families,
    read_corrected,
    read_id_list,
    reveal,
    with_unannotated,
)
from scarcenet.data.layout import find_split
from scarcenet.data.names import name_pairs, schema_of
from scarcenet.schema import AP10K
from scarcenet.utils.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("SCARCENET_DATA", ROOT / "../shared/data"))
PARITY = Path(os.environ.get("SCARCENET_PARITY", ROOT / "../shared/parity"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real images: {DATA} (SCARCENET_DATA) is not there")
needs_parity = pytest.mark.skipif(
    not PARITY.is_dir(), reason=f"no numbers of the official code: {PARITY} (SCARCENET_PARITY) is not there"
)


def animals(images=60, species=6, families=3, names=AP10K.names, seed=0):
    """A COCO keypoint file's content: one or two animals an image.

    Every 20th annotation has no keypoints, every 25th is a crowd.
    """
    rng = np.random.default_rng(seed)
    pose = dict(keypoints=list(names), skeleton=[[1, 2]])
    data = dict(
        images=[dict(id=100 + i, file_name=f"{100 + i:012d}.jpg", width=320, height=240) for i in range(images)],
        categories=[
            dict(id=c + 1, name=f"species {c}", supercategory=f"family {c % families}", **pose) for c in range(species)
        ],
        annotations=[],
    )
    for image in data["images"]:
        for _ in range(rng.integers(1, 3)):
            n = len(data["annotations"]) + 1
            xy, flags = rng.uniform(20, 200, (len(names), 2)).round(1), rng.integers(0, 3, (len(names), 1))
            points = np.concatenate([xy, flags], 1)
            points[0, 2] = 2
            points *= (points[:, 2:] > 0) & (n % 20 != 0)
            x, y, w, h = rng.uniform(10, 100, 4).round(1).tolist()
            data["annotations"].append(
                dict(
                    id=n,
                    image_id=image["id"],
                    category_id=1 + (image["id"] % species),
                    bbox=[x, y, w, h],
                    area=w * h,
                    iscrowd=int(n % 25 == 0),
                    num_keypoints=int((points[:, 2] > 0).sum()),
                    keypoints=points.ravel().tolist(),
                )
            )
    return data


@pytest.fixture
def folder(tmp_path):
    """AP-10K's layout: three splits of three numbers, 54 species in 23 families, `data/`."""
    for number in (1, 2, 3):
        for n, split in enumerate(("train", "val", "test")):
            file = tmp_path / f"annotations/ap10k-{split}-split{number}.json"
            write_json(file, animals(162, 54, 23, seed=3 * number + n))
    (tmp_path / "data").mkdir()
    return tmp_path


def poses_of(tmp_path, data, **how) -> PoseSet:
    write_json(tmp_path / "set.json", data)
    return read_coco(tmp_path / "set.json", **how)


def test_a_file_and_a_folder_find_the_same_images(tmp_path):
    """`read_coco` of a file, as `check` calls it, and of a folder's split, as training does.

    The `data/` of another set, one folder up, is not taken for theirs.
    """
    for name in ("mice/train.json", "rats/annotations/train.json"):
        write_json(tmp_path / name, animals(2))
    for images in ("data", "mice/images", "rats/images"):
        (tmp_path / images).mkdir()
    for name in ("mice", "rats"):
        file, images = find_split(tmp_path / name, "train")
        assert read_coco(file).folder == read_coco(file, images).folder == tmp_path / name / "images"


def test_ap10k_layout(folder):
    for number in (1, 2, 3):
        for split in ("train", "val", "test"):
            file, images = find_split(folder, split, number)
            assert file.name == f"ap10k-{split}-split{number}.json" and images == folder / "data"
            raw, poses = json.loads(file.read_text()), read_coco(file)  # the images' folder is found by itself
            assert poses.schema is AP10K
            assert len(set(poses.column("category"))) == 54 and len(set(poses.column("family"))) == 23
            assert poses.instances[0].file == folder / "data" / "000000000100.jpg"
            crowds = [a for a in raw["annotations"] if a["iscrowd"]]
            unannotated = [a for a in raw["annotations"] if not a["iscrowd"] and not any(a["keypoints"])]
            assert [i.id for i in poses.crowds] == [a["id"] for a in crowds]
            assert unannotated and [i.id for i in poses.unannotated] == [a["id"] for a in unannotated]
            kept = [a for a in raw["annotations"] if not a["iscrowd"] and any(a["keypoints"])]
            points = np.array([a["keypoints"] for a in kept]).reshape(-1, 17, 3)
            assert [i.id for i in poses.instances] == [a["id"] for a in kept]
            np.testing.assert_allclose(poses.truth.xy, points[..., :2], rtol=1e-6)
            assert (poses.truth.visible == points[..., 2]).all()
            np.testing.assert_array_equal(poses.column("box"), [a["bbox"] for a in kept])
            assert np.unique(poses.column("image_id"), return_counts=True)[1].max() == 2  # several animals an image


def test_split_names(tmp_path):
    write_json(tmp_path / "annotations/val.json", animals(3))
    (tmp_path / "images").mkdir()
    assert find_split(tmp_path, "val") == (tmp_path / "annotations/val.json", tmp_path / "images")
    with pytest.raises(FileNotFoundError, match="no split 'test'"):
        find_split(tmp_path, "test")


@pytest.mark.parametrize(
    "names, pairs",
    [
        (("nose", "left_ear", "right_ear", "back", "tail"), ((1, 2),)),
        (("Nose", "L_Eye", "R_Eye", "R F Paw", "L F Paw"), ((1, 2), (4, 3))),
        (("eyeL", "eyeR", "tailBase", "leftWing", "rightWing"), ((0, 1), (3, 4))),
        (tuple("abklmqrs"), ()),
        (("a", "b", "left_only"), ()),
        (("fin-left", "fin-right"), ((0, 1),)),
    ],
)
def test_any_keypoints(tmp_path, names, pairs):
    data = animals(names=names)
    data["images"][0]["file_name"] = "sub folder/Ünïcode näme.PNG"
    for n, image in enumerate(data["images"][1:]):
        image["file_name"] = f"{n}.jpeg"
    poses = poses_of(tmp_path, data)
    assert poses.truth.xy.shape[1:] == (len(names), 2)
    assert poses.schema.names == names and poses.schema.flip_pairs == pairs and poses.schema.skeleton == ((0, 1),)
    assert poses.instances[0].file.name == "Ünïcode näme.PNG"


def test_schema_in_category():
    category = dict(name="x", keypoints=["a", "b", "c"], flip_pairs=[[0, 2]], skeleton=[[1, 3]], sigmas=[0.1, 0.2, 0.3])
    schema = schema_of("f", [category])
    assert (schema.flip_pairs, schema.skeleton, schema.sigmas) == (((0, 2),), ((0, 2),), (0.1, 0.2, 0.3))
    no_pairs = category | dict(keypoints=["left", "right", "c"], flip_pairs=[])
    assert schema_of("f", [no_pairs]).flip_pairs == ()
    assert schema_of("f", [dict(keypoints=list(AP10K.names), skeleton=[], flip_pairs=[])]) is AP10K
    assert name_pairs(AP10K.names) == AP10K.flip_pairs
    # a file's own sigmas count, also for AP-10K's names
    ours = schema_of("f", [dict(keypoints=list(AP10K.names), sigmas=[0.5] * 17)])
    assert ours.sigmas == (0.5,) * 17 and ours.flip_pairs == AP10K.flip_pairs
    # the left one is the first of a pair, whatever the order in the file
    right_first = dict(keypoints=["right_ear", "left_ear", "x", "y"], flip_pairs=[[0, 1], [3, 2]])
    assert schema_of("f", [right_first]).flip_pairs == ((1, 0), (3, 2))


BROKEN = {
    "box without area": ("annotations", "bbox", [1, 2, 0, 5], "annotation 1: bbox: expected width and height above 0"),
    "box of three": ("annotations", "bbox", [1, 2, 3], "annotation 1: bbox: expected 4"),
    "no box": ("annotations", "bbox", None, "annotation 1: bbox: expected 4"),
    "infinite box": ("annotations", "bbox", [1, 2, float("inf"), 5], "annotation 1: bbox: expected 4 finite"),
    "box of words": ("annotations", "bbox", ["a", 2, 3, 5], "annotation 1: bbox"),
    "nan keypoint": ("annotations", "keypoints", [np.nan] + [1] * 50, "annotation 1: keypoints: expected 51 finite"),
    "too few keypoints": ("annotations", "keypoints", [1] * 48, "annotation 1: keypoints: expected 51"),
    "too many keypoints": ("annotations", "keypoints", [1] * 54, "annotation 1: keypoints: expected 51"),
    "huge keypoint": ("annotations", "keypoints", [10**400] + [1] * 50, "annotation 1: keypoints"),
    "flag of 3": ("annotations", "keypoints", [1, 1, 3] * 17, "annotation 1: keypoints: expected flags 0, 1 or 2"),
    "crowd in words": ("annotations", "iscrowd", "0", "annotation 1: iscrowd: expected 0 or 1, got '0'"),
    "negative area": ("annotations", "area", -3, "annotation 1: area: expected 0 or more, got -3"),
    "unknown image": ("annotations", "image_id", 5, "annotation 1: image_id 5"),
    "no image": ("annotations", "image_id", None, "annotation 1: image_id None"),
    "unknown category": ("annotations", "category_id", [1], r"annotation 1: category_id \[1\]"),
    "duplicate annotation": ("annotations", "id", 2, r"annotations\[1\]: duplicate id 2"),
    "duplicate image": ("images", "id", 101, r"images\[1\]: duplicate id 101"),
    "id of letters": ("images", "id", "a", r"images\[0\]: expected an integer id, got 'a'"),
    "duplicate category id": ("categories", "id", 2, r"categories\[1\]: duplicate id 2"),
    "duplicate category name": ("categories", "name", "species 1", "duplicate category name 'species 1'"),
    "no width": ("images", "width", None, "image 100: width, height"),
    "zero height": ("images", "height", 0, "image 100: .* 1 px or more, got 320 and 0"),
    "no keypoint names": ("categories", "keypoints", None, "category 'species 0' has no list of keypoint names"),
    "other K": ("categories", "keypoints", ["nose"], r"'species 1' has other keypoints \(17\) than 'species 0' \(1\)"),
    "absolute name": ("images", "file_name", "/etc/passwd", "image 100: file_name: .* got '/etc/passwd'"),
    "parent name": ("images", "file_name", "a/../../b.jpg", "image 100: file_name"),
    "windows name": ("images", "file_name", "..\\b.jpg", "image 100: file_name"),
    "drive": ("images", "file_name", "C:\\b.jpg", "image 100: file_name"),
    "no name": ("images", "file_name", None, "image 100: file_name: .* got None"),
    "zero byte": ("images", "file_name", "a\0b.jpg", "image 100: file_name"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_entry(tmp_path, case):
    """What the strict reader refuses; tests/test_reading.py has what the usual one makes of it."""
    part, key, value, message = BROKEN[case]
    data = animals()
    data[part][0][key] = value
    with pytest.raises(ValueError, match=message) as caught:
        poses_of(tmp_path, data, strict=True)
    assert str(caught.value).startswith(str(tmp_path / "set.json")) and "\n" not in str(caught.value)


def test_duplicate_keypoint(tmp_path):
    with pytest.raises(ValueError, match="set.json: category 'species 0': duplicate keypoint 'a'"):
        poses_of(tmp_path, animals(names=("a", "b", "a")))


def corrected(tmp_path, data, change) -> tuple:
    """A set, and the labels that it takes from its own annotations after `change`."""
    poses = poses_of(tmp_path, data)
    change(data)
    write_json(tmp_path / "corrected.json", data)
    return poses, read_corrected(tmp_path / "corrected.json", poses)


def two_in_one_image() -> dict:
    """Two animals side by side in an image, and an image of the same name in another folder."""
    data = animals(images=2, species=1)

    def points(x):
        return np.column_stack([np.full(17, float(x)), np.arange(17.0), np.full(17, 2)]).ravel().tolist()

    first = data["annotations"][0]
    data["annotations"] = [
        first | dict(id=n + 1, image_id=100 + n // 2, bbox=[x, 10.0, 30.0, 30.0], keypoints=points(x), iscrowd=0)
        for n, x in enumerate((5, 90, 5, 90))
    ]
    for image, name in zip(data["images"], ("left/1.jpg", "right/1.jpg"), strict=True):
        image["file_name"] = name
    return data


def test_corrected_labels_belong_to_boxes(tmp_path):
    """Not to ids, which a labelling tool may give anew; nor to another folder's image of the same name."""

    def renumber(data):
        for a in data["annotations"]:
            a["id"] = 1 + a["id"] % 4

    poses, labels = corrected(tmp_path, two_in_one_image(), renumber)
    assert labels.labelled.all() and np.array_equal(labels.xy, poses.truth.xy)

    # a box that was drawn anew elsewhere is identified by its id
    def move_a_box(data):
        data["annotations"][1]["bbox"] = [200.0, 100.0, 30.0, 30.0]

    poses, labels = corrected(tmp_path, two_in_one_image(), move_a_box)
    assert np.array_equal(labels.xy, poses.truth.xy)

    # without folders a name identifies an image only if no other has the same
    def lose_folders(data):
        for image in data["images"]:
            image["file_name"] = Path(image["file_name"]).name

    with pytest.raises(ValueError, match="annotation 1 .1.jpg.: no animal of"):
        corrected(tmp_path, two_in_one_image(), lose_folders)
    one = two_in_one_image()
    one["images"][1]["file_name"] = "right/2.jpg"
    poses, labels = corrected(tmp_path, one, lose_folders)
    assert np.array_equal(labels.xy, poses.truth.xy)


@pytest.mark.parametrize(
    "key, value",
    [
        ("flip_pairs", [[0, 9]]),
        ("flip_pairs", [[0]]),
        ("flip_pairs", 3),
        ("skeleton", [[0, 1]]),
        ("sigmas", [0.1]),
        ("sigmas", ["a", "b", "c"]),
        ("sigmas", [0.1, 0.1, float("nan")]),
        ("sigmas", [0.1, 0, 0.1]),
        ("flip_pairs", [[0.0, 1.0]]),
    ],
)
def test_broken_schema(tmp_path, key, value):
    data = animals(names=("a", "b", "c"))
    data["categories"][0][key] = value
    with pytest.raises(ValueError, match="set.json: category 'species 0': "):
        poses_of(tmp_path, data, strict=True)


@pytest.mark.parametrize("text", ["", "{", json.dumps(animals(5))[:-200], "\x00\x01", "[" * 200_000])
def test_broken_json(tmp_path, text):
    (tmp_path / "set.json").write_text(text)
    with pytest.raises(ValueError, match="set.json: broken JSON"):
        read_coco(tmp_path / "set.json")


@pytest.mark.parametrize(
    "data",
    [
        [],
        3,
        None,
        {},
        {"images": [], "annotations": [], "categories": []},
        {"images": {}, "annotations": 1},
        {"version": "4.0", "shapes": []},
        {"images": [1], "annotations": [2], "categories": [3]},
    ],
)
@pytest.mark.parametrize("strict", [False, True])
def test_foreign_json(tmp_path, data, strict):
    with pytest.raises(ValueError, match="set.json: "):
        poses_of(tmp_path, data, strict=strict)


def test_boxes_only_coco(tmp_path):
    """A detection file: COCO, but its categories have no keypoints."""
    data = animals()
    for category in data["categories"]:
        del category["keypoints"]
    for strict in (False, True):
        with pytest.raises(ValueError, match="not a COCO keypoint file"):
            poses_of(tmp_path, data, strict=strict)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        read_coco(tmp_path / "nowhere.json")
    with pytest.raises(FileNotFoundError, match="directory"):
        read_coco(tmp_path)


def test_missing_supercategory_and_area(tmp_path):
    data = animals()
    del data["categories"][0]["supercategory"]
    data["annotations"][0]["keypoints"] = [float(v) for v in data["annotations"][0]["keypoints"]]
    del data["annotations"][1]["area"]
    poses = poses_of(tmp_path, data)
    assert set(poses.column("family")[poses.column("category") == "species 0"]) == {"species 0"}  # a family of its own
    x, y, w, h = poses.instances[1].box
    assert poses.truth.area[1] == pytest.approx(w * h)


def test_subset_and_empty(tmp_path):
    poses = poses_of(tmp_path, animals())
    mask = poses.column("family") == "family 1"
    part = poses.subset(mask)
    assert len(part) == mask.sum() and part.instances == tuple(i for i in poses.instances if i.family == "family 1")
    assert (part.truth.xy == poses.truth.xy[mask]).all()
    nothing = poses.subset([])
    assert len(nothing) == 0 and nothing.truth.xy.shape == (0, 17, 2) and nothing.column("box").shape == (0, 4)
    data = animals(3)
    for a in data["annotations"]:
        a["keypoints"] = []
    assert len(poses_of(tmp_path, data)) == 0


def test_write_and_read(tmp_path):
    poses = poses_of(tmp_path, animals(names=("left_a", "right_a", "c")))
    scores = np.random.default_rng(0).random((len(poses), 3)).astype(np.float32)
    write_json(tmp_path / "deeper/again.json", coco_json(poses, keypoint_scores=scores))
    again = read_coco(tmp_path / "deeper/again.json", poses.folder)
    assert again.instances == poses.instances and again.schema == poses.schema
    assert all(np.array_equal(a, b) for a, b in zip(again.truth, poses.truth, strict=True))
    back = [a["keypoint_scores"] for a in read_json(tmp_path / "deeper/again.json")["annotations"]]
    np.testing.assert_allclose(back, scores)
    assert [f.name for f in (tmp_path / "deeper").iterdir()] == ["again.json"]  # no temporary file is left


def test_write_is_all_or_nothing(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", [1])
    real = Path.write_text

    def full(file, text, **how):
        real(file, text[:3], **how)
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError):
        write_json(tmp_path / "a.json", [1, 2, 3])
    assert read_json(tmp_path / "a.json") == [1] and [f.name for f in tmp_path.iterdir()] == ["a.json"]


def test_report(tmp_path):
    data = animals(20)
    inside, partly, wholly, stray, *_ = [a for a in data["annotations"] if a["id"] % 20 and a["id"] % 25]
    for a in data["annotations"]:
        a["bbox"] = [0, 0, 321, 240]  # within the pixel that rounding may cost
    partly["bbox"], wholly["bbox"], stray["keypoints"][:3] = [300, 10, 30, 30], [330, 10, 30, 30], [10, 250, 2]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / data["images"][0]["file_name"]).touch()
    report = check_poses(poses_of(tmp_path / "set", data))
    assert report.odd["boxes partly outside the image"] == [partly["id"]]
    assert report.odd["boxes wholly outside the image"] == [wholly["id"]]
    assert report.odd["keypoints outside the image"] == [stray["id"]]
    assert len(report.odd["missing images"]) == 19
    assert report.sides[0] == "left_eye / right_eye" and len(report.sides) == 7
    # animals that have a box and no keypoints are checked, too
    for a in data["annotations"]:
        if a["id"] % 20 == 0:
            a["bbox"] = [330, 10, 30, 30]
    poses = poses_of(tmp_path / "set", data)
    moved = check_poses(poses)
    assert len(moved.odd["boxes wholly outside the image"]) == 1 + len(poses.unannotated) > 1
    assert moved.size["instances"] == len(poses) + len(poses.unannotated)
    assert moved.size["with keypoints"] == len(poses)
    assert sum(report.categories.values()) == sum(report.families.values()) == report.size["instances"]
    text = str(report)
    assert "20 images" in text and f"boxes wholly outside the image: 1, first {wholly['id']}" in text


# ---- labels


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), small=st.integers(1, 6), more=st.integers(0, 6))
def test_draw_is_nested_and_by_image(tmp_path_factory, seed, small, more):
    poses = poses_of(tmp_path_factory.mktemp("draw"), animals(images=60, species=6))
    few, many = draw_labelled(poses, small, seed), draw_labelled(poses, small + more, seed)
    assert (few <= many).all()
    assert (few == draw_labelled(poses, small, seed)).all()
    image, category = poses.column("image_id"), poses.column("category")
    for c in set(category):
        assert len(set(image[few & (category == c)])) == min(small, len(set(image[category == c])))
    assert (few == np.isin(image, image[few])).all()  # all the animals of an image, or none


def test_draw_ignores_the_order_and_the_other_categories(tmp_path):
    poses = poses_of(tmp_path, animals())
    few = draw_labelled(poses, 2, 5)
    order = np.random.default_rng(0).permutation(len(poses))
    assert (draw_labelled(poses.subset(order), 2, 5) == few[order]).all()
    part = poses.column("family") == "family 0"
    assert (draw_labelled(poses.subset(part), 2, 5) == few[part]).all()
    assert not (draw_labelled(poses, 2, 6) == few).all()
    assert draw_labelled(poses, 10**6, 0).all()
    with pytest.raises(ValueError, match="1 or more images per category, got 0"):
        draw_labelled(poses, 0, 0)


def test_mixed_image_counts_for_both_categories(tmp_path):
    data = animals(images=12, species=2)
    first = [a for a in data["annotations"] if a["image_id"] == 100][0]
    data["annotations"].append(copy.deepcopy(first) | dict(id=999, category_id=3 - first["category_id"]))
    poses = poses_of(tmp_path, data)
    for seed in range(20):
        few = draw_labelled(poses, 2, seed)
        both = few[poses.column("image_id") == 100]
        assert both.all() or not both.any()


def test_id_list(tmp_path):
    poses = poses_of(tmp_path, animals())
    ids = poses.column("image_id")
    write_json(tmp_path / "list", [100, 103, 100, 7])
    chosen = read_id_list(tmp_path / "list", poses)
    assert (chosen.labelled == np.isin(ids, [100, 103])).all() and chosen.repeated == (100,) and chosen.unknown == (7,)
    for bad, message in (
        ({"a": 1}, "expected a JSON array"),
        ([1.5], "expected a JSON array"),
        (["100"], "expected a JSON array"),
        ([True], "expected a JSON array"),
        ([7, 8], "none of its 2 image ids"),
        ([], "none of its 0 image ids"),
    ):
        write_json(tmp_path / "list", bad)
        with pytest.raises(ValueError, match=message):
            read_id_list(tmp_path / "list", poses)


def test_families(tmp_path):
    poses = poses_of(tmp_path, animals())
    assert (labelled_families(poses, ["family 0", "family 2"]) == (poses.column("family") != "family 1")).all()
    with pytest.raises(ValueError, match="no family 'Bovidae'; there are family 0, family 1, family 2"):
        labelled_families(poses, ["Bovidae"])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000))
def test_no_leak(tmp_path_factory, seed):
    """Whatever the keypoints of unlabelled instances are, the labels that training gets are the same, bit by bit."""
    poses = poses_of(tmp_path_factory.mktemp("leak"), animals())
    labelled = draw_labelled(poses, 2, seed)
    labels, rng = reveal(poses, labelled), np.random.default_rng(seed)
    xy, visible, area = (a.copy() for a in poses.truth)
    xy[~labelled] = rng.normal(size=xy[~labelled].shape)
    visible[~labelled] = rng.integers(0, 3, visible[~labelled].shape)
    other = replace(poses, truth=Truth(xy, visible, area))
    assert other.instances == poses.instances
    assert all(np.array_equal(a, b) for a, b in zip(reveal(other, labelled), labels, strict=True))
    assert not labels.xy[~labelled].any() and not labels.weight[~labelled].any()
    assert (labels.weight[labelled] == (poses.truth.visible[labelled] > 0)).all()
    np.testing.assert_array_equal(labels.xy[labelled], poses.truth.xy[labelled])
    labels.xy[:] = -1  # nor is the truth written through the labels
    assert (poses.truth.xy >= 0).all()


def test_reveal_wants_a_mask(tmp_path):
    poses = poses_of(tmp_path, animals(5))
    for wrong in (np.ones(len(poses) + 1, bool), np.arange(len(poses)), [True]):
        with pytest.raises(ValueError, match="labelled: expected"):
            reveal(poses, wrong)


def test_instances_without_keypoints_are_unlabelled(tmp_path):
    poses = poses_of(tmp_path, animals())
    full = with_unannotated(poses)
    assert len(full) == len(poses) + len(poses.unannotated) and full.instances[len(poses) :] == poses.unannotated
    assert not draw_labelled(full, 10**6, 0)[len(poses) :].any()
    assert not labelled_families(full, ["family 0", "family 1", "family 2"])[len(poses) :].any()
    # an image in which no animal has keypoints is not drawn, so that all N labelled images have some
    assert (draw_labelled(full, 3, 1)[: len(poses)] == draw_labelled(poses, 3, 1)).all()


# ---- real data

MISPLACED = {"animals/annotations/train.json": [993, 1113]}  # each has the box of another animal of its image


@needs_data
@pytest.mark.parametrize(
    "name, k, instances",
    [
        ("animals/annotations/train.json", 17, 1796),
        ("animals/annotations/val.json", 17, 280),
        ("animals/annotations/test.json", 17, 548),
        ("livestock/annotations/train.json", 18, 630),
        ("livestock/annotations/val.json", 18, 90),
        ("livestock/annotations/test.json", 18, 180),
        ("livestock/annotations/ap10k_sheep.json", 18, 42),
    ],
)
def test_real_data(name, k, instances):
    poses = read_coco(DATA / name)
    raw = json.loads((DATA / name).read_text())
    assert len(poses) == instances and len(poses.schema) == k and (poses.schema is AP10K) == (k == 17)
    points = np.array([a["keypoints"] for a in raw["annotations"]]).reshape(-1, k, 3)
    np.testing.assert_allclose(poses.truth.xy, points[..., :2] * (points[..., 2:] > 0), rtol=1e-6)
    if k == 18:
        assert poses.schema.flip_pairs == ((9, 11), (10, 12), (14, 16), (15, 17))
    odd = check_poses(poses).odd
    assert odd.pop("boxes without most of their keypoints") == MISPLACED.get(name, [])
    assert not any(odd.values()) and not poses.findings and not poses.empty
    assert read_coco(*find_split(DATA / name.split("/")[0], Path(name).stem)).instances == poses.instances


@needs_parity
@pytest.mark.parametrize("name", ["5", "10", "15", "20", "25", "Bovidae"])
def test_lists_of_the_official_code(tmp_path, name):
    """AP-10K itself is not at hand: a set is made that has the images of the list, and one more."""
    file = PARITY / "label_lists" / f"annotation_list_{name}"
    ids = read_json(file)
    data = animals(images=len(set(ids)) + 1, species=2, names=("a", "b"))
    renamed = dict(zip((i["id"] for i in data["images"]), [*dict.fromkeys(ids), -1], strict=True))
    for image in data["images"]:
        image["id"] = renamed[image["id"]]
    data["annotations"] = [a | dict(image_id=renamed[a["image_id"]], iscrowd=0) for a in data["annotations"]]
    poses = poses_of(tmp_path, data)
    chosen = read_id_list(file, poses)
    assert (chosen.labelled == (poses.column("image_id") != -1)).all() and not chosen.unknown
    assert set(chosen.repeated) == {i for i in ids if ids.count(i) > 1}
    assert len(ids) == len(set(ids)) + sum(ids.count(i) - 1 for i in chosen.repeated)
