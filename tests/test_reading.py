"""Sets as people's tools write them: names of left and right, odd entries, layouts; each kind with the right value."""

import copy
import json
import math
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from scarcenet.data.check import check_poses, warn_findings
from scarcenet.data.coco import PoseSet, coco_json, parse_coco, read_coco
from scarcenet.data.labels import draw_labelled, read_corrected, with_unannotated
from scarcenet.data.layout import annotation_files, find_split, find_splits, foreign_source, image_folder, name_parts
from scarcenet.data.names import name_pairs, plain_name, schema_of, side_of, unpaired_sides
from scarcenet.data.repair import read_points, repair
from scarcenet.data.values import (
    FEW_SHARE,
    Findings,
    Ids,
    as_box,
    as_float,
    as_floats,
    as_int,
    describe,
    is_crowd,
    keypoint_box,
    with_flags,
)
from scarcenet.schema import AP10K
from scarcenet.utils.files import write_json

# ---- left and right

SPELLINGS = {  # the names of the tools, and people, that one meets; each line is one pair, the left one first
    "LFpaw RFpaw",
    "paw_FL paw_FR",
    "forelegL1 forelegR1",
    "eye.l eye.r",
    "lEye rEye",
    "Left-Eye Right-Eye",
    "paw1LH_top paw4RH_top",
    "paw1LH paw1RH",
    "leftear rightear",
    "hindpaw-l hindpaw-r",
    "shoulderLF shoulderRF",
    "earL earR",
    "L_ear R_ear",
    "l ear|r ear",
    "L Ear|R Ear",
    "Lear Rear",
    "lear rear",
    "LEye REye",
    "wristLeft wristRight",
    "leftFrontPaw rightFrontPaw",
    "LeftFrontPaw RightFrontPaw",
    "left front paw|right front paw",
    "FL_paw FR_paw",
    "HL_paw HR_paw",
    "BL_paw BR_paw",
    "ML_tarsus MR_tarsus",
    "FLpaw FRpaw",
    "flpaw frpaw",
    "pawlf pawrf",
    "RL RR",
    "LF RF",
    "eye1L eye1R",
    "leg_L_1 leg_R_1",
    "L1 R1",
    "EYE_LEFT EYE_RIGHT",
    "LEFT-EYE RIGHT-EYE",
    "earLeft_tip earRight_tip",
    "frontleftpaw frontrightpaw",
    "front.left.paw front.right.paw",
    "earleft earright",
    "eyel eyer",
    "hipl hipr",
    "ear(L) ear(R)",
    "Left Ear Base|Right Ear Base",
    "Lt_ear Rt_ear",
    "LPaw RPaw",
    "LHindpaw RHindpaw",
    "LFP RFP",
    "LE RE",
    "L_eye right_eye",
    "L_F_Paw right_front_paw",
    "left_ear-2 right_ear-2",
    "left right",
    "wing_tip_left wing_tip_right",
    "l-paw_tip r-paw_tip",
    "LeftLeg RightLeg",
    "tail_l1 tail_r1",
}
NO_PAIRS = [
    "ruler leftover ball bill lower_lip eyelid tail_l1 tail_l2",
    "rear tail nail skull shell collar shoulder heel ear",
    "lip rip lump rump lock rock leg reg lib rib light right_",
    "l r a b",
    "upright bright cleft copyright left_only",
    "left_ear right_eye",
    "earL1 earR2 earL3",
    "0 1 2 3",
    "L_ear left_ear R_ear",
    "spine_1 spine_2",
    "Ruler Ball Leftover Rightmost",
]


@pytest.mark.parametrize("text", sorted(SPELLINGS))
def test_spelling(text):
    left, right = text.split("|") if "|" in text else text.split()
    assert name_pairs([left, right]) == ((0, 1),)
    assert name_pairs(["nose", right, "tail", left, "back"]) == ((3, 1),)
    assert name_pairs([left, "nose"]) == name_pairs(["nose", right]) == ()


def test_all_spellings_at_once():
    """What one pair says does not lead another astray, as long as no name is there twice in other words."""
    several = [t.split() for t in ("LFpaw RFpaw", "eye.l eye.r", "leftear rightear", "hipl hipr", "HL_paw HR_paw")]
    names = [name for pair in several for name in pair]
    assert name_pairs(names) == ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))


@pytest.mark.parametrize("names", NO_PAIRS)
def test_no_pair_is_invented(names):
    assert name_pairs(names.split()) == ()


SETS = {  # those of ../shared/cases
    "digits_after": "eyeL1 eyeR1 nose neck tail forelegL1 forelegL2 forelegL3 forelegR1 forelegR2 forelegR3 "
    "hindlegL1 hindlegL2 hindlegL3 hindlegR1 hindlegR2 hindlegR3",
    "initials_before": "LEye REye Nose Neck Tail LFshoulder LFelbow LFpaw RFshoulder RFelbow RFpaw "
    "LHhip LHknee LHpaw RHhip RHknee RHpaw",
    "front_left": "eye_L eye_R nose neck tail FL_shoulder FL_elbow FL_paw FR_shoulder FR_elbow FR_paw "
    "HL_hip HL_knee HL_paw HR_hip HR_knee HR_paw",
    "sides_last": "eyeLeft eyeRight nose neck tail shoulderLeft elbowLeft pawLeft shoulderRight elbowRight pawRight "
    "hip-l knee-l hindpaw-l hip-r knee-r hindpaw-r",
    "leg_numbers": "eye1L eye1R nose neck tail shoulderLF elbowLF paw2LF shoulderRF elbowRF paw2RF "
    "hipLH kneeLH paw1LH hipRH kneeRH paw1RH",
    "numbered_legs": "eye1L eye1R nose neck tail shoulderLF elbowLF paw2LF shoulderRF elbowRF paw3RF "
    "hipLH kneeLH paw1LH hipRH kneeRH paw4RH",
    "ap10k": " ".join(AP10K.names),
}


@pytest.mark.parametrize("names", SETS.values(), ids=SETS)
def test_names_of_a_set(names):
    assert name_pairs(names.split()) == AP10K.flip_pairs and unpaired_sides(names.split(), AP10K.flip_pairs) == ()


def test_half_found_sides():
    names = SETS["front_left"].replace("HR_knee", "HR_kne").split()
    pairs = name_pairs(names)
    assert pairs == tuple(p for p in AP10K.flip_pairs if p != (12, 15))
    assert unpaired_sides(names, pairs) == ("HL_knee", "HR_kne")
    for name in ("left_ear", "earLeft", "L_ear", "lEye", "LEye", "forelegL1", "paw_FL", "leftpaw"):
        assert side_of(name) == "left", name
    for name in ("rear", "ruler", "leftover", "tail_l1", "l", "LR", "left_right", "bright", "L1", "eyel", "Lear", "FL"):
        assert side_of(name) == "", name
    # whatever is not clear on its own is no half of a pair
    assert unpaired_sides("rear tail_l1 nose left_ear right_ear".split(), ((3, 4),)) == ()


@pytest.mark.parametrize("spell", [str.upper, str.title, lambda n: n.replace("_", " "), lambda n: n.replace("_", "-")])
def test_ap10k_in_other_spellings(spell):
    names = [spell(name) for name in AP10K.names]
    assert schema_of("f", [dict(keypoints=names)]) is AP10K
    short = [n.replace("left_", "L_").replace("right_", "R_").replace("front", "F").replace("back", "B") for n in names]
    assert schema_of("f", [dict(keypoints=short)]) is AP10K
    assert plain_name("L_F_Paw") == plain_name("leftFrontPaw") == plain_name("left front paw") == "left_front_paw"


# ---- numbers in other forms


@pytest.mark.parametrize("value", [7, 7.0, "7", "7.0", " 7 ", "07"])
def test_ids_are_numbers(value):
    assert as_int(value) == 7


@pytest.mark.parametrize("value", [None, True, 7.5, "a7", "", [7], {}, float("nan"), float("inf"), "nan", 1e400])
def test_what_is_no_id(value):
    assert as_int(value) is None


def test_ids_of_letters_are_numbered_behind_all_others():
    ids = Ids(["3", "b", 10.0, "a", None, [1], "b"])
    assert [ids(v) for v in ("3", 3, 10, "10", "b", "a", "c", None, [1])] == [3, 3, 10, 10, 11, 12, None, None, None]
    assert ids.new() == 13


def test_numbers_in_other_forms():
    assert as_float("1.5") == 1.5 and as_float(True) is None and as_float("nan") is None and as_float(10**400) is None
    assert as_box(["1", 2, 3.5, 4]) == (1, 2, 3.5, 4) and as_box([[1, 2], [3, 4]]) == (1, 2, 3, 4)
    assert [as_box(v) for v in (None, [], [1, 2, 3], [1, 2, 3, None], "1234", [1, 2, math.inf, 4], 5)] == [None] * 7
    np.testing.assert_array_equal(as_floats([[1, "2"], None, True, 10**400]), [1, 2, np.nan, 1, np.nan])
    assert as_floats("12") is None and as_floats(3) is None


@pytest.mark.parametrize(
    "value, crowd",
    [(v, True) for v in (1, 1.0, "1", True, "true", "True")]
    + [(v, False) for v in (0, "0", False, None, "", "false", 0.0, [], "no")],
)
def test_crowd_in_other_forms(value, crowd):
    assert is_crowd(value) is crowd


# ---- boxes of keypoints


def test_keypoint_box():
    xy, visible = np.array([[20.0, 30], [60, 30], [40, 70], [0, 0]]), np.array([2, 1, 2, 0])
    assert keypoint_box(xy, visible, 100, 100) == (16, 26, 48, 48)  # a tenth of the longer side, on each side
    x, y, w, h = keypoint_box(np.array([[0, 0], [99, 50], [50, 90]]), np.ones(3), 100, 100)
    assert (x, y) == (0, 0) and x + w == 100 and y + h == pytest.approx(99.9)  # inside the image
    assert keypoint_box(np.array([[50, 50]]), [2], 400, 100) == (25, 25, 50, 50)  # an eighth of the longer side
    assert keypoint_box(np.array([[50, 50], [54, 50]]), [2, 2], 400, 100)[2:] == (400 * FEW_SHARE, 400 * FEW_SHARE)
    small = keypoint_box(np.array([[50, 50], [51, 50], [50, 51]]), [2, 2, 2], 400, 400)
    assert small[2:] == (8, 8)  # px, at least
    x, y, w, h = keypoint_box(np.array([[500, 50], [510, 60], [505, 70]]), np.ones(3), 100, 100)
    assert x > 400 and min(w, h) > 0  # outside of the image, which `check` reports
    with pytest.raises(ValueError, match="at least one labelled keypoint"):
        keypoint_box(xy, np.zeros(4), 100, 100)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(-50, 450), st.floats(-50, 350)), min_size=1, max_size=17))
def test_keypoint_box_holds_the_keypoints(points):
    xy = np.array(points)
    x, y, w, h = keypoint_box(xy, np.ones(len(xy)), 400, 300)
    assert w > 0 and h > 0
    inside = (xy >= 0).all(1) & (xy <= [400, 300]).all(1)
    assert ((xy[inside] >= [x - 1e-6, y - 1e-6]) & (xy[inside] <= [x + w + 1e-6, y + h + 1e-6])).all()


# ---- odd entries


def content(images=4, names=("nose", "left_ear", "right_ear", "tail"), categories=1) -> dict:
    """One animal an image, each with all its keypoints."""
    pose = dict(keypoints=list(names), skeleton=[[1, 2]])
    points = [(40 + 20 * k, 30 + 15 * (k % 3), 2) for k in range(len(names))]
    flat = [v for point in points for v in point]
    return dict(
        images=[dict(id=7 + i, file_name=f"{i}.jpg", width=320, height=240) for i in range(images)],
        annotations=[
            dict(id=i + 1, image_id=7 + i, category_id=1 + i % categories, area=5000, iscrowd=0)
            | dict(bbox=[30, 20, 20 * len(names) + 10, 60], num_keypoints=len(names), keypoints=list(flat))
            for i in range(images)
        ],
        categories=[dict(id=c + 1, name=f"mole {c}", supercategory="moles", **pose) for c in range(categories)],
    )


def read(data, **how) -> PoseSet:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return parse_coco(Path("set.json"), json.loads(json.dumps(data)), **how)


def counts(poses) -> dict[str, int]:
    return {finding.kind: finding.count for finding in poses.findings}


def test_a_usual_file_has_no_findings():
    poses = read(content())
    assert poses.findings == () and poses.empty == () and len(poses) == 4
    for how in (dict(strict=True), dict(strict=False)):
        again = read(content(), **how)
        assert again.instances == poses.instances
        assert all(np.array_equal(a, b) for a, b in zip(again.truth, poses.truth, strict=True))


def change(number=1, part="annotations", **values):
    def edit(data):
        data[part][number].update(copy.deepcopy(values))

    return edit


def remove(*keys, part="annotations"):
    def edit(data):
        for entry in data[part]:
            for key in keys:
                entry.pop(key, None)

    return edit


def everywhere(part, key, form):
    def edit(data):
        for n, entry in enumerate(data[part]):
            entry[key] = form(entry[key], n)

    return edit


def keypoint(place, *values):
    def edit(data):
        data["annotations"][1]["keypoints"][place : place + len(values)] = values

    return edit


NAN = float("nan")
AS_IT_IS = {  # in another form: everything is read as in the file without the change, and nothing is counted
    "ids of images in quotes": everywhere("images", "id", lambda v, n: str(v)),
    "ids of images in quotes, and references half": lambda d: (
        everywhere("images", "id", lambda v, n: str(v))(d),
        everywhere("annotations", "image_id", lambda v, n: str(v) if n % 2 else v)(d),
    ),
    "ids of images as floats": everywhere("images", "id", lambda v, n: float(v)),
    "references as floats in quotes": everywhere("annotations", "image_id", lambda v, n: f"{v}.0"),
    "ids of categories in quotes": everywhere("categories", "id", lambda v, n: str(v)),
    "references to categories as floats": everywhere("annotations", "category_id", lambda v, n: float(v)),
    "ids of annotations in quotes": everywhere("annotations", "id", lambda v, n: str(v)),
    "no num_keypoints": remove("num_keypoints"),
    "num_keypoints that is wrong": change(num_keypoints=0),
    "no iscrowd": remove("iscrowd"),
    "iscrowd in quotes": everywhere("annotations", "iscrowd", lambda v, n: "0"),
    "iscrowd false": everywhere("annotations", "iscrowd", lambda v, n: False),
    "iscrowd null": everywhere("annotations", "iscrowd", lambda v, n: None),
    "area in quotes": everywhere("annotations", "area", lambda v, n: str(v)),
    "box in quotes": everywhere("annotations", "bbox", lambda v, n: [str(x) for x in v]),
    "sizes in quotes": everywhere("images", "width", lambda v, n: str(v)),
    "sizes as floats": everywhere("images", "height", lambda v, n: float(v)),
    "flags as floats": everywhere("annotations", "keypoints", lambda v, n: [float(x) for x in v]),
    "keypoints in quotes": everywhere("annotations", "keypoints", lambda v, n: [str(x) for x in v]),
    "keypoints as triples": everywhere("annotations", "keypoints", lambda v, n: np.reshape(v, (-1, 3)).tolist()),
    "backslashes": everywhere("images", "file_name", lambda v, n: ".\\" + v),
    "unused category without keypoints": lambda d: d["categories"].insert(0, {"id": 0, "name": "animals-Qg7R"}),
    "unused category, keypoints empty": lambda d: d["categories"].append(dict(id=9, name="box", keypoints=[])),
    "unused category with other keypoints": lambda d: d["categories"].append(dict(id=9, name="b", keypoints=["x"])),
    "no skeleton": remove("skeleton", part="categories"),
    "skeleton null": change(0, "categories", skeleton=None),
    "further columns": change(attributes={"track_id": 0}, segmentation=[], score=None),
}


@pytest.mark.parametrize("edit", AS_IT_IS.values(), ids=AS_IT_IS)
def test_read_as_it_is(edit):
    data = content()
    usual = read(data)
    edit(data)
    poses = read(data)
    assert poses.findings == ()
    if poses.schema.skeleton:
        assert poses.schema == usual.schema
    assert [(i.id, i.image_id, i.box, i.category, i.width) for i in poses.instances] == [
        (i.id, i.image_id, i.box, i.category, i.width) for i in usual.instances
    ]
    assert [i.file for i in poses.instances] == [i.file for i in usual.instances]
    assert all(np.array_equal(a, b) for a, b in zip(poses.truth, usual.truth, strict=True))


# edit -> (kind, count), and what is left: (instances, unannotated, annotation 2's labelled keypoints, its box's source)
HULL = (4, 0, 4, "keypoints")
GONE = (3, 0, None, None)
ODD = {
    "no box": (remove("bbox"), ("annotations without a box", 4), HULL),
    "box null": (change(bbox=None), ("annotations without a box", 1), HULL),
    "box empty": (change(bbox=[]), ("annotations without a box", 1), HULL),
    "box of no width": (change(bbox=[9, 9, 0, 5]), ("annotations with a box of no width or height", 1), HULL),
    "box of no height": (change(bbox=[9, 9, 5, 0]), ("annotations with a box of no width or height", 1), HULL),
    "box of negative width": (change(bbox=[9, 9, -5, 5]), ("annotations with a box of no width or height", 1), HULL),
    "box of NaN": (change(bbox=[NAN, 9, 5, 5]), ("annotations with a box that is not four numbers", 1), HULL),
    "box of three": (change(bbox=[9, 9, 5]), ("annotations with a box that is not four numbers", 1), HULL),
    "box of words": (change(bbox=["a", 9, 5, 5]), ("annotations with a box that is not four numbers", 1), HULL),
    "neither box nor keypoints": (
        change(bbox=[0, 0, 0, 0], keypoints=[], area=0),
        ("annotations with neither box nor keypoints", 1),
        GONE,
    ),
    "nothing at all": (
        lambda d: (d["annotations"][1].pop("bbox"), d["annotations"][1].pop("keypoints")),
        ("annotations with neither box nor keypoints", 1),
        GONE,
    ),
    "flags all 0 and no box": (
        change(bbox=[1, 1, 0, 0], keypoints=[5, 5, 0] * 4),
        ("annotations with neither box nor keypoints", 1),
        GONE,
    ),
    "keypoint NaN, labelled": (
        keypoint(3, NAN, NAN, 2),
        ("labelled keypoints that are not numbers", 1),
        (4, 0, 3, "file"),
    ),
    "keypoint infinite": (
        keypoint(3, math.inf, 5, 2),
        ("labelled keypoints that are not numbers", 1),
        (4, 0, 3, "file"),
    ),
    "keypoint null": (keypoint(3, None, None, 2), ("labelled keypoints that are not numbers", 1), (4, 0, 3, "file")),
    "keypoint huge": (keypoint(3, 10**400, 5, 2), ("labelled keypoints that are not numbers", 1), (4, 0, 3, "file")),
    "keypoint of words": (keypoint(3, "x", "y", 2), ("labelled keypoints that are not numbers", 1), (4, 0, 3, "file")),
    "flag 3": (keypoint(3, 9, 9, 3), ("flags other than 0, 1 and 2", 1), (4, 0, 4, "file")),
    "flag a high score": (keypoint(3, 9, 9, 0.9), ("flags other than 0, 1 and 2", 1), (4, 0, 4, "file")),
    "flag a low score": (keypoint(3, 9, 9, 0.1), ("flags other than 0, 1 and 2", 1), (4, 0, 3, "file")),
    "flag -1": (keypoint(3, 9, 9, -1), ("flags other than 0, 1 and 2", 1), (4, 0, 3, "file")),
    "flag null": (keypoint(3, 9, 9, None), ("flags other than 0, 1 and 2", 1), (4, 0, 3, "file")),
    "too few keypoints": (
        change(keypoints=[9, 9, 2]),
        ("keypoint lists of another length than 12", 1),
        (3, 1, None, None),
    ),
    "too many keypoints": (
        change(keypoints=[9] * 15),
        ("keypoint lists of another length than 12", 1),
        (3, 1, None, None),
    ),
    "keypoints a text": (change(keypoints="none"), ("keypoint lists of another length than 12", 1), (3, 1, None, None)),
    "keypoints without flags": (
        change(keypoints=[9, 9, 0, 0, 20, 20, 30, 30]),
        ("keypoint lists without flags", 1),
        (4, 0, 3, "file"),
    ),
    "area negative": (change(area=-3), ("areas that are not positive numbers", 1), (4, 0, 4, "file")),
    "area a truth value": (change(area=True), ("areas that are not positive numbers", 1), (4, 0, 4, "file")),
    "area a word": (change(area="big"), ("areas that are not positive numbers", 1), (4, 0, 4, "file")),
    "area NaN": (change(area=NAN), ("areas that are not positive numbers", 1), (4, 0, 4, "file")),
    "no such image": (change(image_id=99), ("annotations of an unknown image", 1), GONE),
    "no image": (change(image_id=None), ("annotations of an unknown image", 1), GONE),
    "image a list": (change(image_id=[8]), ("annotations of an unknown image", 1), GONE),
    "no such category, but there is one": (
        change(category_id=5),
        ("annotations of an unknown category", 1),
        (4, 0, 4, "file"),
    ),
    "no category, but there is one": (
        change(category_id=None),
        ("annotations of an unknown category", 1),
        (4, 0, 4, "file"),
    ),
    "id twice": (change(id=1), ("annotations without an id of their own", 1), (4, 0, None, None)),
    "no id": (change(id=None), ("annotations without an id of their own", 1), (4, 0, None, None)),
    "annotation twice": (
        lambda d: d["annotations"].append(copy.deepcopy(d["annotations"][1])),
        ("duplicate annotations", 1),
        (4, 0, 4, "file"),
    ),
    "annotation is no object": (
        lambda d: d["annotations"].append(3),
        ("entries under annotations that are not objects", 1),
        (4, 0, 4, "file"),
    ),
    "image twice": (
        lambda d: d["images"].append(copy.deepcopy(d["images"][1])),
        ("duplicate images", 1),
        (4, 0, 4, "file"),
    ),
    "image under two ids": (
        lambda d: (d["images"].append(dict(d["images"][1], id=50)), d["annotations"][1].update(image_id=50)),
        ("duplicate images", 1),
        (4, 0, 4, "file"),
    ),
    "one id of two images": (
        lambda d: d["images"].append(dict(d["images"][1], file_name="other.jpg")),
        ("image ids with two files", 1),
        GONE,
    ),
    "image without a name": (change(1, "images", file_name=None), ("images without a file name", 1), GONE),
    "image without an id": (change(1, "images", id=None), ("images without an id", 1), GONE),
    "image without a size, and no file": (
        change(1, "images", width=None),
        ("images without width and height", 1),
        GONE,
    ),
    "bone beyond the keypoints": (
        change(0, "categories", skeleton=[[1, 2], [3, 9]]),
        ("skeleton edges to unknown keypoints", 1),
        (4, 0, 4, "file"),
    ),
    "bone of one": (
        change(0, "categories", skeleton=[[1, 2], [3]]),
        ("skeleton edges to unknown keypoints", 1),
        (4, 0, 4, "file"),
    ),
    "flip_pairs beyond the keypoints": (
        change(0, "categories", flip_pairs=[[1, 9]]),
        ("flip_pairs that are not pairs of keypoints", 1),
        (4, 0, 4, "file"),
    ),
    "sigmas of another number": (
        change(0, "categories", sigmas=[0.1]),
        ("sigmas that do not match the keypoints", 1),
        (4, 0, 4, "file"),
    ),
    "helper category": (
        lambda d: (
            d["categories"].append(dict(id=9, name="animal_bbox", keypoints=[])),
            d["annotations"][1].update(category_id=9, keypoints=[]),
        ),
        ("annotations of a category without keypoints", 1),
        (3, 1, None, None),
    ),
}


@pytest.mark.parametrize("edit, kind, left", ODD.values(), ids=ODD)
def test_odd_entry(edit, kind, left):
    data = content()
    usual = read(data)
    edit(data)
    poses = read(data)
    instances, unannotated, keypoints, source = left
    assert counts(poses)[kind[0]] == kind[1]
    (found,) = [finding for finding in poses.findings if finding.kind == kind[0]]
    assert len(found.first) == min(3, found.count) and all(found.first) and found.done
    assert (len(poses), len(poses.unannotated)) == (instances, unannotated)
    # the others are as they were
    for i in (1, 3, 4):
        (n,) = [n for n, instance in enumerate(poses.instances) if instance.id == i]
        assert poses.instances[n].box_source == ("keypoints" if kind == ("annotations without a box", 4) else "file")
        assert np.array_equal(poses.truth.xy[n], usual.truth.xy[i - 1]) and poses.truth.visible[n].all()
    if keypoints:
        (n,) = [n for n, instance in enumerate(poses.instances) if instance.id == 2]
        assert (poses.truth.visible[n] > 0).sum() == keypoints and poses.instances[n].box_source == source
        assert not poses.truth.xy[n][poses.truth.visible[n] == 0].any()
        x, y, w, h = poses.instances[n].box
        if source == "keypoints":
            assert poses.instances[n].box == keypoint_box(poses.truth.xy[n], poses.truth.visible[n], 320, 240)
        if kind[0].startswith("areas"):
            assert poses.truth.area[n] == w * h
    # `check` counts it, training warns of it once, and the strict reader refuses what is wrong
    assert f"{kind[0]}: {kind[1]}, first {found.first[0]}" in str(check_poses(poses))
    with pytest.warns(UserWarning) as caught:
        warn_findings(poses)
    assert f"{kind[0]}: {kind[1]} ({found.done})" in str(caught[0].message)
    # the repaired content is what the strict reader takes
    whole, _ = repair(json.loads(json.dumps(data)), "set.json", Path())
    again = parse_coco(Path("set.json"), whole, strict=True)
    assert again.instances == poses.instances and again.findings == ()


@pytest.mark.parametrize("x, y", [(NAN, NAN), (-1, -1), (None, None), (1e30, 2), ("", "")])
def test_a_keypoint_under_flag_0_is_not_labelled(x, y):
    data = content()
    data["annotations"][1]["keypoints"][3:6] = [x, y, 0]
    poses = read(data)
    assert poses.findings == () and poses.truth.visible[1].tolist() == [2, 0, 2, 2] and not poses.truth.xy[1, 1].any()


def test_unusual_flags():
    data = content()
    data["annotations"][1]["keypoints"][2::3] = [True, 1.0, 3, 0.4]
    poses = read(data)
    assert poses.truth.visible[1].tolist() == [1, 1, 2, 0]
    assert [(f.count, f.first) for f in poses.findings] == [(2, ("annotation 2, right_ear", "annotation 2, tail"))]


def test_missing_area_is_the_boxs():
    for edit in (remove("area"), everywhere("annotations", "area", lambda v, n: (None, 0, "", 0.0)[n])):
        data = content()
        edit(data)
        poses = read(data)
        assert poses.truth.area.tolist() == [5400.0] * 4 and poses.findings == ()
    data = content()
    remove("area", "bbox")(data)
    poses = read(data)
    x, y, w, h = keypoint_box(poses.truth.xy[0], poses.truth.visible[0], 320, 240)
    assert poses.instances[0].box == (x, y, w, h) and poses.truth.area[0] == pytest.approx(w * h)


@pytest.mark.parametrize(
    "skeleton, bones",
    [
        ([[0, 1], [1, 2]], ((0, 1), (1, 2))),  # counts from 0
        ([[1, 2], [2, 4]], ((0, 1), (1, 3))),  # from 1, as COCO does
        ([[1, 2], [2, 9]], ((0, 1),)),
        ([["nose", "tail"]], ((0, 3),)),
        ([["1", "2"]], ((0, 1),)),
        ([[1.0, 2.0]], ((0, 1),)),
        (7, ()),
        ([7, None, [], [1, 2, 3]], ()),
        ({}, ()),
    ],
)
def test_a_skeleton_never_refuses_labels(skeleton, bones):
    data = content()
    data["categories"][0]["skeleton"] = skeleton
    poses = read(data)
    assert poses.schema.skeleton == bones and len(poses) == 4


@pytest.mark.parametrize(
    "given, pairs",
    [
        ([[1, 2]], ((1, 2),)),
        ([[2, 1]], ((1, 2),)),
        ([["left_ear", "right_ear"]], ((1, 2),)),
        ([[1.0, 2.0]], ((1, 2),)),
        ([], ()),
        ([[1, 9]], ((1, 2),)),  # those of the names
        ([[1, 1]], ((1, 2),)),
        (3, ((1, 2),)),
        ([[0, 3]], ((0, 3),)),
    ],
)
def test_flip_pairs_of_a_file(given, pairs):
    data = content()
    data["categories"][0]["flip_pairs"] = given
    assert read(data).schema.flip_pairs == pairs


def test_flip_pairs_that_are_given():
    assert read(content(), flip_pairs=("nose:tail",)).schema.flip_pairs == ((0, 3),)
    assert read(content(), flip_pairs=("Right-Ear:leftEar",)).schema.flip_pairs == ((1, 2),)  # the left one first
    colon = content(names=("a:l", "a:r", "b"))
    assert read(colon, flip_pairs=("a:l:a:r",)).schema.flip_pairs == ((0, 1),)
    for wrong in ("nose", "nose:trunk", "nose:nose", ":", ""):
        with pytest.raises(ValueError, match="expected LEFT:RIGHT, two of nose, left_ear, right_ear, tail"):
            read(content(), flip_pairs=(wrong,))
    with pytest.raises(ValueError, match="at most once"):
        read(content(), flip_pairs=("nose:tail", "nose:left_ear"))
    ap10k = read(content(names=AP10K.names), flip_pairs=("nose:neck",))
    assert ap10k.schema.flip_pairs == ((2, 3),) and ap10k.schema.sigmas == AP10K.sigmas


def test_categories():
    """One list of keypoints for all that are used; names and families are made where they are missing."""
    data = content(categories=2)
    data["categories"][0].update(name=None, supercategory="none")
    del data["categories"][1]["supercategory"]
    poses = read(data)
    assert set(poses.column("category")) == {"category 1", "mole 1"} == set(poses.column("family"))
    data = content(categories=2)
    data["categories"][1]["name"] = "mole 0"  # two ids of one name are one category
    poses = read(data)
    assert set(poses.column("category")) == {"mole 0"} and set(poses.column("category_id")) == {1}
    for odd in (None, [], {"a": 1}, " "):
        data = content()
        data["categories"][0]["id"] = odd
        poses = read(data)
        assert len(poses) == 4 and set(poses.column("category")) == {"mole 0"}
        found = {"categories without an id of their own": 1, "annotations of an unknown category": 4}
        assert counts(poses) == found
        data = content(categories=2)
        for category in data["categories"]:
            category["id"] = odd
        with pytest.raises(ValueError, match=r"^set.json: categories: expected whole numbers as the ids"):
            read(data)
    data = content(categories=2)
    data["categories"][1]["keypoints"] = ["nose"]
    with pytest.raises(ValueError, match=r"^set.json: category 'mole 1' has other keypoints \(1\) than 'mole 0' \(4\)"):
        read(data)
    for annotation in data["annotations"][1::2]:
        annotation["keypoints"] = []  # nothing but boxes: unlabelled animals
    poses = read(data)
    assert len(poses) == len(poses.unannotated) == 2
    assert counts(poses) == {"annotations of a category without keypoints": 2}
    data = content(categories=2)
    data["annotations"][1]["category_id"] = 77  # of which of the two is not known
    assert counts(read(data)) == {"annotations of an unknown category": 1} and len(read(data)) == 3


def test_helper_category_among_several():
    """The animals of a helper category have no kind: "animal"."""
    data = content(categories=2)
    data["categories"].append(dict(id=9, name="animal_bbox", keypoints=[], skeleton=[]))
    data["annotations"][1].update(category_id=9, keypoints=[], num_keypoints=0)
    poses = read(data)
    (box,) = poses.unannotated
    assert (box.id, box.category, box.box) == (2, "animal", (30, 20, 90, 60))
    assert "animal_bbox" not in str(check_poses(poses).categories)
    both = with_unannotated(poses)
    assert len(both) == 4 and not draw_labelled(both, 99, 0)[3]


def test_names_as_numbers():
    data = content(names=("0", "1", "2", "3"))
    data["categories"][0]["keypoints"] = [0, 1, 2, 3]
    poses = read(data)
    assert poses.schema.names == ("0", "1", "2", "3") and poses.schema.flip_pairs == () and len(poses) == 4
    data["categories"][0]["keypoints"] = ["nose", None, "ear", "tail"]
    with pytest.raises(ValueError, match="no list of keypoint names: not a COCO keypoint file"):
        read(data)


def test_text_ids():
    data = content()
    everywhere("images", "id", lambda v, n: f"frame-{n}")(data)
    everywhere("annotations", "image_id", lambda v, n: f"frame-{n}")(data)
    everywhere("categories", "id", lambda v, n: "mole")(data)
    everywhere("annotations", "category_id", lambda v, n: "mole")(data)
    poses = read(data)
    assert poses.column("image_id").tolist() == [0, 1, 2, 3] and set(poses.column("category")) == {"mole 0"}
    assert [i.file.name for i in poses.instances] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]


def test_images_without_annotation():
    data = content(images=6)
    data["annotations"] = data["annotations"][:4]
    data["images"][5]["video"] = "a.mp4"
    for how in (dict(strict=True), {}):
        poses = read(data, **how)
        assert [(i.id, i.image_id, i.box, i.box_source, i.category, i.video) for i in poses.empty] == [
            (-12, 11, (0, 0, 320, 240), "image", "mole 0", ""),
            (-13, 12, (0, 0, 320, 240), "image", "mole 0", "a.mp4"),
        ]
        assert len(poses) == 4 and not poses.unannotated and poses.subset([0]).empty == poses.empty
    assert "images without annotation: 2, not used; use them with --boxes image, pose or detector" in str(
        check_poses(poses)
    )
    with pytest.warns(UserWarning, match="images without annotation: 2, not used") as caught:
        warn_findings(poses)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_findings(poses, boxes="image")
    data = content(images=6, categories=2)
    data["annotations"] = data["annotations"][:4]
    assert {i.category for i in read(data).empty} == {"animal"}
    data["annotations"] = []
    assert len(read(data)) == 0 and len(read(data).empty) == 6
    ids = [i.id for i in read(content(images=3) | dict(annotations=[])).empty]
    negative = content(images=3)
    for image, number in zip(negative["images"], (-4, 0, 5), strict=True):
        image["id"] = number
    negative["annotations"] = [dict(negative["annotations"][0], id=-9, image_id=0)]
    more = [i.id for i in read(negative).empty]
    assert len(set(ids)) == 3 and max(ids) < 0 and len({*more, -9}) == 3 and max(more) < 0
    # an image whose only annotation says nothing is one without annotation
    data = content()
    data["annotations"][1].update(bbox=[0, 0, 0, 0], keypoints=[])
    assert [i.image_id for i in read(data).empty] == [8]


def test_upright_and_video_reach_the_instances():
    data = content()
    data["images"][0]["video"] = "day1.mp4"
    poses = read(data, upright=True)
    assert all(i.upright for i in poses.instances) and not any(i.upright for i in read(data).instances)
    assert [i.video for i in poses.instances] == ["day1.mp4", "", "", ""]
    data["annotations"][0]["bbox_source"] = "detector"
    poses = read(data)
    assert [i.box_source for i in poses.instances] == ["detector", "file", "file", "file"]
    again = read(coco_json(poses))
    assert again.instances == poses.instances
    data["annotations"][0]["bbox_source"] = ["?"]
    assert read(data).instances[0].box_source == "file"


def test_all_lists_of_another_length_are_refused():
    """It is the category's list of names that is wrong, and with it every label."""
    data = content()
    for annotation in data["annotations"]:
        annotation["keypoints"] += [1, 2, 2]
    with pytest.raises(ValueError, match="^set.json: annotation 1: keypoints: expected 12 numbers for 4 names, got 15"):
        read(data)


def test_nothing_is_left():
    data = content()
    everywhere("annotations", "image_id", lambda v, n: v + 1000)(data)
    with pytest.raises(
        ValueError, match="^set.json: nothing is left of its 4 annotations: annotations of an unknown image"
    ):
        read(data)


WEIRD = st.sampled_from(
    [
        None,
        True,
        False,
        0,
        -1,
        3,
        7,
        1.5,
        10**400,
        NAN,
        math.inf,
        "",
        "7",
        "x",
        "\0",
        [],
        [1],
        {},
        {"a": 1},
        [[]],
        [None],
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**30), WEIRD), min_size=1, max_size=6))
def test_whatever_is_in_a_file(changes):
    """Entries at random places are replaced: the set is read, or refused in one line; nothing impossible comes out."""
    data = content(categories=2)
    for where, value in changes:
        here = data
        while True:
            keys = list(here) if isinstance(here, dict) else list(range(len(here)))
            if not keys:
                break
            key, where = keys[where % len(keys)], where // len(keys)
            inner = here[key]
            if not isinstance(inner, (dict, list)) or not inner or where % 5 == 0 and here is not data:
                here[key] = copy.deepcopy(value)
                break
            here = inner
    before = copy.deepcopy(data)
    try:
        poses = parse_coco(Path("set.json"), data)
    except ValueError as error:
        assert str(error).startswith("set.json: ") and "\n" not in str(error)
        return
    assert repr(data) == repr(before)  # what was read is not changed
    assert np.isfinite(poses.truth.xy).all() and np.isin(poses.truth.visible, (0, 1, 2)).all()
    assert not poses.truth.xy[poses.truth.visible == 0].any() and (poses.truth.area > 0).all()
    every = poses.instances + poses.unannotated + poses.crowds + poses.empty
    assert all(min(i.box[2:]) > 0 and np.isfinite(i.box).all() and min(i.width, i.height) >= 1 for i in every)
    assert len({i.id for i in every}) == len({(i.id, i.image_id) for i in every})
    str(check_poses(poses))


# ---- images


@pytest.fixture
def place(tmp_path):
    """images/, with some files below it, and the name of an annotation file."""
    for name in ("0.jpg", "sub/1.jpg", "sub/upload/2.jpg", "a b.jpg", "deep/0a1b2c3d.jpg"):
        file = tmp_path / "set" / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48)).save(file)
    Image.new("RGB", (64, 48)).save(tmp_path / "secret.jpg")
    (tmp_path / "set" / "annotations").mkdir()
    return tmp_path / "set" / "annotations" / "train.json"


@pytest.mark.parametrize(
    "name, found",
    [
        ("0.jpg", "0.jpg"),
        ("./0.jpg", "0.jpg"),
        ("images/0.jpg", "0.jpg"),
        ("images\\0.jpg", "0.jpg"),
        ("my_set/images/sub/1.jpg", "sub/1.jpg"),
        ("sub\\1.jpg", "sub/1.jpg"),
        ("C:\\pictures\\images\\sub\\1.jpg", "sub/1.jpg"),
        ("\\\\server\\share\\sub\\1.jpg", "sub/1.jpg"),
        ("/somewhere/images/0.jpg", "0.jpg"),
        ("../images/0.jpg", "0.jpg"),
        ("sub/../0.jpg", "0.jpg"),
        ("/data/sub/upload/2.jpg", "sub/upload/2.jpg"),
        ("http://localhost:8080/data/0.jpg", "0.jpg"),
        ("https://host/data/0.jpg?token=3", "0.jpg"),
        ("s3://bucket/sub/1.jpg", "sub/1.jpg"),
        ("/data/local-files/?d=images/sub/1.jpg", "sub/1.jpg"),
        ("/data/local-files/?d=images%5Csub%5C1.jpg", "sub/1.jpg"),
        ("a%20b.jpg", "a b.jpg"),
        ("/data/upload/1/0a1b2c3d-0.jpg", "0.jpg"),
    ],
)
def test_images_are_found_by_the_end_of_their_names(place, name, found):
    data = content(images=1)
    data["images"][0].update(file_name=name, width=64, height=48)
    write_json(place, data)
    poses = read_coco(place)
    assert poses.instances[0].file == place.parents[1] / "images" / found and poses.findings == ()


@pytest.mark.parametrize(
    "name", ["../../secret.jpg", "images/../../../secret.jpg", "..\\..\\secret.jpg", "/secret.jpg"]
)
def test_no_name_leads_out_of_the_folder(place, name):
    data = content(images=1)
    data["images"][0].update(file_name=name)
    write_json(place, data)
    poses = read_coco(place)
    folder = place.parents[1] / "images"
    assert poses.instances[0].file == folder / "secret.jpg" and not poses.instances[0].file.exists()
    assert counts(poses) == {"file names outside the images' folder": 1}
    assert check_poses(poses).odd["missing images"] == [str(folder / "secret.jpg")]
    with pytest.raises(ValueError, match="expected a file in the images' folder"):
        read_coco(place, strict=True)


def test_images_whose_folders_are_lost(place):
    """Two images of one name, of which one is there: it is not known which, so neither is used."""
    data = content(images=4)
    for image, name in zip(data["images"], ("left/0.jpg", "right/0.jpg", "sub/1.jpg", "images/sub/1.jpg"), strict=True):
        image.update(file_name=name)
    write_json(place, data)
    poses = read_coco(place)
    assert poses.column("id").tolist() == [3, 4] and set(poses.column("image_id")) == {9}
    assert counts(poses) == {
        "images with different names but the same file": 1,
        "duplicate images": 1,
        "annotations of an unknown image": 2,
    }


@pytest.mark.parametrize("name", ["", ".", "..", "/", "C:\\", "a\0.jpg", None, 7, ["0.jpg"]])
def test_names_of_no_file(place, name):
    data = content(images=2)
    data["images"][0].update(file_name=name)
    write_json(place, data)
    poses = read_coco(place)
    assert len(poses) == 1 and counts(poses)["images without a file name"] == 1


def test_name_parts():
    assert name_parts("a/b.jpg") == ("a", "b.jpg") and name_parts("x/../..\\b.jpg") == ("b.jpg",)
    assert name_parts("..") == name_parts("") == name_parts("a\0") == ()


def test_a_linked_folder_is_followed(tmp_path, place):
    """As ever: images often lie on another disk."""
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (64, 48)).save(tmp_path / "elsewhere" / "9.jpg")
    (place.parents[1] / "images" / "linked").symlink_to(tmp_path / "elsewhere")
    data = content(images=1)
    data["images"][0].update(file_name="x/linked/9.jpg")
    write_json(place, data)
    assert read_coco(place).instances[0].file == place.parents[1] / "images" / "linked" / "9.jpg"


@pytest.mark.parametrize(
    "stated", [{}, {"width": 0, "height": 0}, {"width": "?", "height": None}, {"width": NAN, "height": 5}]
)
def test_size_from_the_header(place, stated):
    data = content(images=2)
    for image, name in zip(data["images"], ("0.jpg", "sub/1.jpg"), strict=True):
        image.pop("width"), image.pop("height")
        image.update(stated, file_name=name)
    turned, exif = Image.new("RGB", (64, 48)), Image.Exif()
    exif[0x0112] = 6
    turned.save(place.parents[1] / "images" / "sub" / "1.jpg", exif=exif)
    write_json(place, data)
    poses = read_coco(place)
    assert [(i.width, i.height) for i in poses.instances] == [(64, 48), (64, 48)]
    assert [(f.kind, f.done) for f in poses.findings] == [
        ("images without width and height", "size read from the file")
    ]
    upright = read_coco(place, upright=True)
    assert [(i.width, i.height) for i in upright.instances] == [(64, 48), (48, 64)]


def test_the_folder_of_the_images(tmp_path):
    file = tmp_path / "set" / "annotations" / "person_keypoints_val.json"
    for folder in ("images/val", "data_of_others"):
        (tmp_path / "set" / folder).mkdir(parents=True)
    (tmp_path / "set/images/val/0.jpg").touch()
    (tmp_path / "data").mkdir()
    (tmp_path / "data/0.jpg").touch()  # of another set
    assert image_folder(file, ["0.jpg"]) == tmp_path / "set/images/val"
    assert image_folder(file, ["val/0.jpg"]) == tmp_path / "set/images"
    assert image_folder(file, ["nowhere.jpg"]) == image_folder(file) == tmp_path / "set/images"
    assert image_folder(file, ["0.jpg"], tmp_path / "data") == tmp_path / "data"
    assert image_folder(tmp_path / "set" / "train.json", ["0.jpg"]) == tmp_path / "set" / "images"


# ---- layouts


def lay(root, *files):
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".json"):
            write_json(root / name, content())
        elif name.endswith("/"):
            (root / name).mkdir(parents=True, exist_ok=True)
        else:
            (root / name).touch()
    return root


LAYOUTS = {
    "AP-10K": (
        "annotations/ap10k-train-split1.json annotations/ap10k-val-split1.json annotations/ap10k-test-split1.json "
        "data/",
        {"train": "annotations/ap10k-train-split1.json", "val": "annotations/ap10k-val-split1.json"},
        "data",
    ),
    "ours": (
        "annotations/train.json annotations/val.json annotations/test.json images/",
        {"train": "annotations/train.json", "val": "annotations/val.json", "test": "annotations/test.json"},
        "images",
    ),
    "train and val": ("train.json val.json images/", {"train": "train.json", "val": "val.json"}, "images"),
    "train alone": ("annotations/train.json images/", {"train": "annotations/train.json"}, "images"),
    "validation": ("train.json validation.json", {"train": "train.json", "val": "validation.json"}, None),
    "Roboflow": (
        "train/_annotations.coco.json valid/_annotations.coco.json test/_annotations.coco.json train/a.jpg README.txt",
        {"train": "train/_annotations.coco.json", "val": "valid/_annotations.coco.json"},
        "train",
    ),
    "Roboflow without test": (
        "train/_annotations.coco.json valid/_annotations.coco.json",
        {"train": "train/_annotations.coco.json", "val": "valid/_annotations.coco.json"},
        "train",
    ),
    "CVAT, one task": (
        "annotations/person_keypoints_default.json images/",
        {"train": "annotations/person_keypoints_default.json"},
        "images",
    ),
    "CVAT, subsets": (
        "annotations/person_keypoints_Train.json annotations/person_keypoints_Validation.json images/",
        {"train": "annotations/person_keypoints_Train.json", "val": "annotations/person_keypoints_Validation.json"},
        "images",
    ),
    "CVAT, instances": ("annotations/instances_default.json", {"train": "annotations/instances_default.json"}, None),
    "COCO": (
        "annotations/person_keypoints_train2017.json annotations/person_keypoints_val2017.json images/",
        {"train": "annotations/person_keypoints_train2017.json", "val": "annotations/person_keypoints_val2017.json"},
        "images",
    ),
    "one file": ("result.json images/", {"train": "result.json"}, "images"),
    "one file in annotations": ("annotations/mice.json data/", {"train": "annotations/mice.json"}, "data"),
    "names before": ("mice_train.json mice_val.json", {"train": "mice_train.json", "val": "mice_val.json"}, None),
    "a folder each": (
        "train/annotations.json val/annotations.json train/images/ val/images/",
        {"train": "train/annotations.json", "val": "val/annotations.json"},
        "train/images",
    ),
}


@pytest.mark.parametrize("files, splits, images", LAYOUTS.values(), ids=LAYOUTS)
def test_layout(tmp_path, files, splits, images):
    root = lay(tmp_path / "set", *files.split())
    found = find_splits(root)
    for split, file in splits.items():
        assert found[split][0] == root / file and find_split(root, split) == found[split]
    assert found["train"][1] == (root / images if images else None)
    assert ("test" in found) == any("test" in name for name in files.split())
    assert {file for file, _ in found.values()} <= set(annotation_files(root))
    assert find_splits(found["train"][0]) == {"train": (found["train"][0], None)}
    with pytest.raises(FileNotFoundError, match="no split 'other': looked for annotations/ap10k-other-split1.json"):
        find_split(root, "other")


def test_annotation_files(tmp_path):
    root = lay(
        tmp_path / "cvat",
        "annotations/person_keypoints_default.json",
        "annotations/instances_default.json",
        "annotations/person_keypoints_more.json",
    )
    names = ["person_keypoints_default.json", "person_keypoints_more.json"]
    assert [f.name for f in annotation_files(root)] == names
    root = lay(tmp_path / "mixed", "a.json", "b.json")
    write_json(root / "notes.json", {"by": "me"})
    assert [f.name for f in annotation_files(root)] == ["a.json", "b.json"]
    with pytest.raises(FileNotFoundError, match="no split 'train'"):
        find_splits(root)  # which of the two?
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        annotation_files(tmp_path / "nowhere")
    # another draw of AP-10K is not taken for the one that is asked for
    root = lay(tmp_path / "ap10k", "annotations/ap10k-train-split1.json")
    with pytest.raises(FileNotFoundError, match="ap10k-train-split2.json"):
        find_splits(root, 2)


def test_the_images_of_roboflow(tmp_path):
    for split in ("train", "valid", "test"):
        folder = tmp_path / "set" / split
        folder.mkdir(parents=True)
        data = content(images=2)
        data["categories"].insert(0, {"id": 0, "name": "moles", "supercategory": "none"})
        write_json(folder / "_annotations.coco.json", data)
        for n in range(2):
            Image.new("RGB", (320, 240)).save(folder / f"{n}.jpg")
    for split, name in (("train", "train"), ("val", "valid"), ("test", "test")):
        file, images = find_split(tmp_path / "set", split)
        for poses in (read_coco(file, images), read_coco(file)):
            assert not check_poses(poses).odd["missing images"] and poses.folder == tmp_path / "set" / name
            assert poses.findings == ()


FOREIGN = {
    "CollectedData_me.csv": "scarcenet import {path} --out my_set",
    "CollectedData_me.h5": "scarcenet import {path} --out my_set",
    "labels.slp": "scarcenet import {path} --out my_set",
    "labels.pkg.slp": "scarcenet import {path} --out my_set",
    "config.yaml": "scarcenet import {path} --out my_set",
    "data.yml": "scarcenet import {path} --out my_set",
    "000001.txt": "scarcenet import {path} --out my_set",
    "export.zip": "unpack it",
    "export.tar.gz": "unpack it",
    "metadata.pickle": "none is opened",
    "annotations.xml": "COCO Keypoints",
    "frame.png": "--unlabelled {path}",
    "video.MP4": "--unlabelled {path}",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_that_is_no_coco(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"\x80\x04 no JSON")
    says = FOREIGN[name].format(path=path)
    assert says in foreign_source(path) and foreign_source(path).startswith(f"{path}: ")
    for read_it in (read_coco, find_splits, annotation_files):
        with pytest.raises(ValueError) as caught:
            read_it(path)
        assert says in str(caught.value) and "\n" not in str(caught.value)


FOREIGN_FOLDERS = {
    "DeepLabCut": ("config.yaml labeled-data/video/CollectedData_me.csv", "a DeepLabCut project"),
    "Lightning Pose": ("CollectedData.csv labeled-data/video/img0.png", "a Lightning Pose project"),
    "csv": ("CollectedData.csv img0.png", "a table of keypoints"),
    "SLEAP": ("labels.v001.slp", "a SLEAP project"),
    "YOLO": ("data.yaml train/images/0.jpg train/labels/0.txt", "a YOLO pose set"),
    "YOLO without data.yaml": ("images/0.jpg labels/0.txt", "a YOLO pose set"),
    "images": ("0.jpg 1.png", "images without labels"),
    "videos": ("a.mp4", "images without labels"),
}


@pytest.mark.parametrize("files, what", FOREIGN_FOLDERS.values(), ids=FOREIGN_FOLDERS)
def test_a_folder_that_is_no_coco(tmp_path, files, what):
    root = lay(tmp_path / "set", *files.split())
    typed = f"--unlabelled {root}" if "images" in what else f"scarcenet import {root} --out my_set"
    for look in (find_splits, annotation_files):
        with pytest.raises(ValueError) as caught:
            look(root)
        assert what in str(caught.value) and typed in str(caught.value) and "\n" not in str(caught.value)
    (tmp_path / "empty").mkdir()
    assert foreign_source(tmp_path / "empty") == foreign_source(tmp_path / "nowhere") == ""


# ---- what is said before a training


def lines(poses, **how) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_findings(poses, **how)
    return [str(warning.message) for warning in caught]


def test_a_usual_set_is_not_warned_of():
    assert lines(read(content())) == []


def test_sets_without_pairs():
    numbers = read(content(names=("0", "1", "2")))
    (line,) = lines(numbers)
    assert "mirrored views swap no keypoints; give pairs with --flip-pairs" in line and "--no-mirror" in line
    assert lines(numbers, mirror=False) == [] and lines(read(content(names=("0", "1")), flip_pairs=("0:1",))) == []
    assert "left / right: none; mirrored views swap no keypoints" in str(check_poses(numbers))


def test_half_found_sides_are_warned_of():
    poses = read(content(names=SETS["front_left"].replace("HR_knee", "HR_kne").split()))
    (line,) = lines(poses)
    assert line.startswith("set.json: keypoints that name a side but have no partner: HL_knee, HR_kne")
    report = check_poses(poses)
    assert report.unpaired == ("HL_knee", "HR_kne") and len(report.sides) == 6
    assert "keypoints that name a side but have no partner: HL_knee, HR_kne" in str(report)
    assert lines(poses, mirror=False) == []


def test_several_kinds_in_one_line():
    data = content()
    data["annotations"][0].pop("bbox")
    data["annotations"][1]["image_id"] = 99
    data["annotations"][2]["area"] = -1
    (line,) = [line for line in lines(read(data)) if "odd entries" in line]
    assert "annotations of an unknown image: 1 (skipped)" in line and "`scarcenet check set.json` lists them" in line
    assert "annotations without a box: 1 (box computed from the keypoints)" in line and line.count("odd entries") == 1


def test_boxes_that_are_not_around_their_keypoints():
    data = content()
    data["annotations"][1]["bbox"] = [200, 150, 90, 60]
    data["annotations"][2]["keypoints"][:3] = [300, 200, 2]  # one of four is no reason
    data["annotations"][3]["keypoints"][:3] = [0, 0, 2]
    report = check_poses(read(data))
    assert report.odd["boxes without most of their keypoints"] == [2]
    assert report.odd["labelled keypoints at exactly 0, 0"] == [4]


# ---- corrected labels


def test_corrected_labels_are_read_as_forgivingly():
    poses = read(content())
    data = content()
    remove("bbox", "area", "num_keypoints", "iscrowd")(data)
    everywhere("images", "id", lambda v, n: str(v))(data)
    data["annotations"][0]["keypoints"][:3] = [NAN, NAN, 0]
    data["annotations"][1].update(keypoints=[])
    for n, annotation in enumerate(data["annotations"]):
        annotation["id"] = 100 + n
    with pytest.warns(UserWarning, match="corrected.json: odd entries: .*neither box nor keypoints"):
        labels = read_corrected("corrected.json", poses, json.loads(json.dumps(data)))
    assert labels.labelled.tolist() == [True, False, True, True]
    assert labels.weight[0].tolist() == [0, 1, 1, 1] and np.array_equal(labels.xy[2], poses.truth.xy[2])


# ---- the sets of ../shared/cases that need images


@pytest.fixture
def animals(zoo, tmp_path):
    shutil.copytree(zoo, tmp_path / "set")
    return tmp_path / "set"


def edit_all(root, edit):
    for file in sorted(root.glob("annotations/*.json")):
        data = json.loads(file.read_text())
        edit(data)
        write_json(file, data)


def test_label_studio(animals):
    """The images are found, although file_name repeats their folder's name."""
    (animals / "data").rename(animals / "images")
    edit_all(animals, lambda d: [i.update(file_name="images/" + i["file_name"]) for i in d["images"]])
    for split in ("train", "val", "test"):
        poses = read_coco(*find_split(animals, split))
        assert poses.findings == () and not check_poses(poses).odd["missing images"]
        assert poses.instances[0].file.parent == animals / "images"


def test_no_boxes(animals):
    usual = read_coco(*find_split(animals, "train"))
    edit_all(animals, lambda d: [a.pop("bbox") for a in d["annotations"]])
    poses = read_coco(*find_split(animals, "train"))
    assert len(poses) == len(usual) and set(poses.column("box_source")) == {"keypoints"}
    report = check_poses(poses)
    assert report.boxes == {"keypoints": len(poses)} and not any(report.odd.values())
    assert f"boxes computed from their keypoints, with a margin: {len(poses)}" in str(report)
    # about where the animal is
    ours, theirs = poses.column("box"), usual.column("box")
    low = np.maximum(ours[:, :2], theirs[:, :2])
    high = np.minimum(ours[:, :2] + ours[:, 2:], theirs[:, :2] + theirs[:, 2:])
    both = np.clip(high - low, 0, None).prod(1)
    iou = both / (ours[:, 2:].prod(1) + theirs[:, 2:].prod(1) - both)
    assert np.median(iou) > 0.6


def test_the_check_command(animals, capsys):
    """Each kind is named with its number, the first, and what was done; --strict refuses."""
    from scarcenet.cli import main as cli

    def spoil(data):
        data["annotations"][1].update(bbox=[0, 0, 0, 0], keypoints=[], num_keypoints=0)
        data["categories"].append({"id": 99, "name": "animal_bbox", "keypoints": []})

    edit_all(animals, spoil)
    assert cli.main(["check", str(animals)]) == 0
    out = capsys.readouterr().out
    assert out.count("annotations with neither box nor keypoints: 1, first annotation") == 3
    assert "left_eye / right_eye" in out
    assert cli.main(["check", str(animals), "--strict"]) == 1
    assert "no list of keypoint names" in capsys.readouterr().err
    assert cli.main(["check", str(animals), "--flip-pairs", "nose:neck"]) == 0
    assert "left / right: nose / neck\n" in capsys.readouterr().out


def test_exif_turned_images_are_counted(animals, capsys):
    from scarcenet.cli import main as cli

    data = json.loads((animals / "annotations/ap10k-train-split1.json").read_text())
    file, exif = animals / "data" / data["images"][0]["file_name"], Image.Exif()
    exif[0x0112] = 3
    Image.open(file).convert("RGB").rotate(180).save(file, exif=exif)
    for frame in ("stored", "upright"):
        assert cli.main(["check", str(animals), "--exif", frame]) == 0
        out = capsys.readouterr().out
        assert out.count("images whose EXIF orientation the stated size does not settle: 1") == 1
        assert f"frame of the {frame} image; choose with --exif stored or upright" in out
        (line,) = lines(read_coco(*find_split(animals, "train"), upright=frame == "upright"))
        assert f"settle: 1, keypoints are read in the frame of the {frame} image; choose with --exif" in line


def test_lists_of_two_numbers_a_keypoint():
    """2K numbers are x, y of K keypoints; unless each third is a flag: then they are of fewer keypoints."""
    k = 6
    xy = np.arange(2.0 * k) + 10
    assert np.array_equal(with_flags(xy, k).reshape(k, 3)[:, :2].ravel(), xy)
    assert with_flags(xy, k)[2::3].tolist() == [2] * k
    half = np.concatenate([xy[:4], np.zeros(8)])  # four keypoints that were not labelled
    assert with_flags(half, k)[2::3].tolist() == [2, 2, 0, 0, 0, 0]
    assert with_flags(np.zeros(12), k).tolist() == [0] * 18
    for flags in ([2, 2, 2, 2], [1, 2, 0, 0]):
        fewer = np.array([[10 + n, 20 + n, flag] for n, flag in enumerate(flags)]).ravel()
        assert with_flags(fewer, k) is None and with_flags(fewer, 4) is fewer
    assert with_flags(xy[:-1], k) is None
    found = Findings()
    points = read_points(["annotation 1"], [xy.tolist()], list("abcdef"), "a.json", found)
    assert points.shape == (1, k, 3)
    assert describe(found.all()) == (
        "keypoint lists without flags: 1 (read as x, y of each keypoint: visible, but for those at 0, 0)"
    )
    with pytest.raises(ValueError, match="expected 18 numbers for 6 names, got 12"):
        read_points(["annotation 1"], [[10, 20, 2] * 4], list("abcdef"), "a.json", found)
