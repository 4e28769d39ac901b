"""The walking zoo: what its films say about each frame is true, smooth, the same for a seed, and in its files."""

import gc
import itertools
import weakref
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import cv2
import numpy as np
import pytest

from scarcenet.cli import main as cli
from scarcenet.schema import AP10K
from scarcenet.utils import video as video_module
from scarcenet.utils.files import read_json
from scarcenet.utils.video import open_mp4
from scarcenet.zoo import walk
from scarcenet.zoo.gait import DUTY, METRES, herd, stride, striding
from scarcenet.zoo.walk import camera_at, film_frame, make_film, walk_frames, write_walk

SMALL = dict(size=(160, 120))
FLIP = [AP10K.flip_indices[k] for k in range(len(AP10K))]
PAWS = [k for k, name in enumerate(AP10K.names) if "paw" in name]


@pytest.fixture(scope="module")
def frames():
    """Frames and truth of three animals, half a second apart: some hidden, some partly outside."""
    film = make_film(seed=8, species=["sheep", "dog"], animals=3, size=(320, 240), fps=2)
    return [film_frame(film, n) for n in range(12)]


def decode(file: Path) -> list[np.ndarray]:
    """All frames of a video, RGB."""
    capture = cv2.VideoCapture(str(file))
    found = []
    while True:
        good, frame = capture.read()
        if not good:
            capture.release()
            return found
        found.append(frame[..., ::-1])


def projected(film, frames: int) -> np.ndarray:
    """(frames, animals, 17, 2) keypoints in image px, wherever they are, without drawing anything."""
    n, herd_size = np.arange(frames) / film.fps, range(len(film.walkers))
    return np.array(
        [
            [camera_at(film, t).project(striding(film.walkers[i], film.course, i, t).keypoints)[0] for i in herd_size]
            for t in n
        ]
    )


def test_the_same_seed_gives_the_same_film(tmp_path):
    """Every byte of truth, and every pixel before the encoder; another seed gives others."""
    options = dict(frames=4, animals=2, **SMALL)
    one, two = (write_walk(tmp_path / name / "walk.mp4", seed=3, **options) for name in ("a", "b"))
    other = write_walk(tmp_path / "c" / "walk.mp4", seed=4, **options)
    assert one.coco.read_bytes() == two.coco.read_bytes() != other.coco.read_bytes()
    if one.slp:
        assert one.slp.read_bytes() == two.slp.read_bytes() != other.slp.read_bytes()
    for n, (pixels, found) in enumerate(walk_frames(4, seed=3, animals=2, **SMALL)):
        again, truth = film_frame(one.film, n)
        assert (again == pixels).all() and all(np.array_equal(a, b) for a, b in zip(found, truth, strict=True))
    painted = film_frame(one.film, 3)[0]
    walk.painted.cache_clear()  # what stands about is not remembered, only kept
    assert (film_frame(make_film(seed=3, animals=2, **SMALL), 3)[0] == painted).all()


def test_frames_are_streamed():
    """A frame that is not held by the reader is gone."""
    stream = walk_frames(10**5, **SMALL)
    pixels, found = next(stream)
    assert pixels.shape == (120, 160, 3) and pixels.dtype == np.uint8 and found.frame == 0
    held = weakref.ref(pixels)
    del pixels
    next(stream)
    gc.collect()
    assert held() is None


@pytest.mark.parametrize("camera", ("follow", "pan"))
@pytest.mark.parametrize("name", METRES)
def test_keypoints_move_smoothly(name, camera):
    """The trunk by hundredths of a height from frame to frame, paws by no more than a swing takes; none of it jerks."""
    film = make_film(species=[name], seed=1, camera=camera)
    xy = projected(film, 150)[:, 0]
    cameras = [camera_at(film, n / film.fps) for n in range(150)]
    bodies = [striding(film.walkers[0], film.course, 0, n / film.fps) for n in range(150)]
    z = np.array([c.project(b.keypoints.mean(0))[1] for c, b in zip(cameras, bodies, strict=True)])
    height = np.array([c.focal for c in cameras]) / z  # px
    step = np.sqrt((np.diff(xy, axis=0) ** 2).sum(-1)) / height[1:, None]
    w, swing = film.walkers[0], 1 - DUTY[film.walkers[0].gait]
    pace = film.course.pace / film.fps
    fastest = 1.5 * w.cycle / (swing * w.cycle / pace)  # of a foot in the middle of its swing
    trunk = np.setdiff1d(np.arange(17), PAWS)
    assert step[:, PAWS].max() < 1.6 * fastest + 0.05
    assert step[:, [3, 4]].max() < pace + 0.05  # neck and root of the tail
    jerk = np.sqrt((np.diff(xy[:, trunk], n=2, axis=0) ** 2).sum(-1)) / height[2:, None]
    assert jerk[:, [2, 3]].max() < 0.03 and jerk.max() < 0.15


@pytest.mark.parametrize("name", METRES)
def test_feet_stay_where_they_are_set_down(name):
    """In the plan exactly, on a circle too; and the four of them in the order of the gait."""
    for radius in (0, 2.8):
        (w,), course = herd(np.random.default_rng(2), [name], 1, radius)
        time = np.arange(0, 2, 0.005)
        places = []
        for t in time:
            p, here, yaw = stride(w, course, 0, t)
            turn = np.array([[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]])
            places.append(np.column_stack([p.feet[:, :2] @ turn.T + here, p.feet[:, 2]]))
        places = np.array(places)  # (n, 4, 3)
        down = places[..., 2] < w.measures.foot_r + 1e-9
        both = down[1:] & down[:-1]
        assert np.abs(np.diff(places[..., :2], axis=0))[both].max() < 1e-7
        assert np.abs(down.mean(0) - DUTY[w.gait]).max() < 0.25
        assert down.sum(1).max() == (4 if w.gait == "stand" else 3 if w.gait == "walk" else 2)


def test_visible_keypoints_lie_on_their_animal(frames):
    """In the mask, within a pixel; hidden ones do not count, and those outside say nothing."""
    seen = hidden = outside = 0
    for pixels, found in frames:
        h, w = pixels.shape[:2]
        for xy, shown, track in zip(found.keypoints, found.shown, found.tracks, strict=True):
            for (x, y), v in zip(xy, shown, strict=True):
                column, row = round(float(x)), round(float(y))
                if v == 2:
                    assert track in found.mask[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
                if v:
                    assert -0.5 < x < w - 0.5 and -0.5 < y < h - 0.5
                else:
                    assert x == y == 0
            seen, hidden, outside = (a + (shown == v).sum() for a, v in ((seen, 2), (hidden, 1), (outside, 0)))
    assert seen > 200 and hidden > 50 and outside > 5


def test_boxes_hold_their_animal(frames):
    for pixels, found in frames:
        h, w = pixels.shape[:2]
        for xy, shown, (x, y, wide, high), track in zip(*found[1:5], strict=True):
            assert x >= 0 and y >= 0 and x + wide <= w and y + high <= h
            rows, columns = np.nonzero(found.mask == track)
            if len(rows):
                assert x - 1 <= columns.min() and columns.max() <= x + wide and y - 1 <= rows.min()
                assert rows.max() <= y + high
            inside = xy[shown > 0]
            assert (inside > (x - 2, y - 2)).all() and (inside < (x + wide + 2, y + high + 2)).all()


@pytest.mark.parametrize("seed", range(4))
def test_left_is_left(seed):
    """Left keypoints lie to the left of right ones; the camera sees more of the side that it is on."""
    film = make_film(seed=seed, size=(320, 240), fps=2)
    w, course = film.walkers[0], film.course
    left = [k for k, name in enumerate(AP10K.names) if name.startswith("left")]
    seen = np.zeros(17)
    for n in range(10):
        _, _, yaw = stride(w, course, 0, n / film.fps)
        k = striding(w, course, 0, n / film.fps).keypoints
        apart = (k[left] - k[np.array(FLIP)[left]])[:, :2] @ (-np.sin(yaw), np.cos(yaw))
        assert (apart > 0).all()
        found = film_frame(film, n)[1]
        seen += (found.shown == 2).sum(0)
    near, far = seen[left].sum(), seen[np.array(FLIP)[left]].sum()
    assert near > far if film.side > 0 else near < far


def test_what_passes_in_front_hides(monkeypatch):
    """A keypoint behind a trunk or a bush is there, and hidden; without the thing it is seen, in the same place."""
    film = make_film(seed=1, species=["dog"], size=(320, 240))
    numbers = range(0, 54, 6)
    before = [film_frame(film, n)[1] for n in numbers]
    monkeypatch.setattr(walk, "things", lambda *_: [])
    without = [film_frame(film, n)[1] for n in numbers]
    hidden = 0
    for a, b in zip(before, without, strict=True):
        assert np.array_equal(a.keypoints, b.keypoints) and np.array_equal(a.boxes, b.boxes)
        assert (a.shown <= b.shown).all() and ((a.shown == 0) == (b.shown == 0)).all()
        assert (a.mask <= b.mask).all()
        for x, y in np.rint(a.keypoints[a.shown < b.shown]).astype(int):
            assert a.mask[y, x] == 0
            hidden += 1
    assert hidden > 10


def test_tracks_stay(frames):
    """An animal keeps its number and its category; the number of animals in a frame may change."""
    kinds = {}
    for _, found in frames:
        assert len(set(found.tracks.tolist())) == len(found.tracks)
        for track, category in zip(found.tracks.tolist(), found.categories.tolist(), strict=True):
            assert kinds.setdefault(track, category) == category
    assert set(kinds) == {1, 2, 3} and kinds[1] == kinds[3] != kinds[2]


def test_an_animal_out_of_sight_has_no_annotation():
    """A camera that looks past all of them: a frame without animals is a frame."""
    film = make_film(seed=0, **SMALL)
    gone = film._replace(course=film.course._replace(start=(40.0,)))
    pixels, found = film_frame(gone, 0)
    assert pixels.any() and found.keypoints.shape == (0, 17, 2) and found.boxes.shape == (0, 4)
    assert len(found.tracks) == 0 and not found.mask.any()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A short film of two animals and its files."""
    return write_walk(tmp_path_factory.mktemp("walk") / "walk.mp4", 14, animals=2, seed=5, species=["cat"], **SMALL)


def test_frame_n_of_the_video_shows_truth_n(written):
    """Decoded, it is closest to the drawn frame of the same number; and there are as many as were asked for."""
    back = decode(written.video)
    drawn = [pixels.astype(int) for pixels, _ in walk_frames(14, animals=2, seed=5, species=["cat"], **SMALL)]
    assert len(back) == 14
    off = np.array([[np.abs(b - d).mean() for d in drawn] for b in back])
    assert off.argmin(1).tolist() == list(range(14)) and off.diagonal().max() < 8


def test_the_file_of_truth(written):
    """Images are frames, annotations have tracks; numbers are those of the frames; pycocotools reads it."""
    from pycocotools.coco import COCO

    with redirect_stdout(StringIO()):
        coco = COCO(str(written.coco))
    assert [(i["video"], i["frame"]) for i in coco.dataset["images"]] == [("walk.mp4", n) for n in range(14)]
    assert coco.dataset["categories"][6]["name"] == "cat"
    for n in range(14):
        found = film_frame(written.film, n)[1]
        animals = coco.loadAnns(coco.getAnnIds(n + 1))
        assert [a["track_id"] for a in animals] == found.tracks.tolist()
        for a, xy, shown, box in zip(animals, found.keypoints, found.shown, found.boxes, strict=True):
            pose = np.array(a["keypoints"]).reshape(17, 3)
            assert np.abs(pose[:, :2] - xy).max() <= 0.0051 and (pose[:, 2] == shown).all()
            assert np.abs(np.array(a["bbox"]) - box).max() <= 0.0051 and a["category_id"] == 7


def test_sleap_reads_the_same_truth(written):
    """Points, what is hidden, tracks and frames of `.slp` are those of the COCO file."""
    sleap = pytest.importorskip("sleap_io")
    labels = sleap.load_slp(str(written.slp))
    content = read_json(written.coco)
    assert Path(labels.videos[0].filename).name == "walk.mp4" and len(labels) == 14
    assert labels.skeleton.node_names == list(AP10K.names)
    by_frame = {n: list(a) for n, a in itertools.groupby(content["annotations"], lambda a: a["image_id"] - 1)}
    for frame in labels:
        animals = by_frame.get(frame.frame_idx, [])
        assert [i.track.name for i in frame] == [f"cat {a['track_id']}" for a in animals]
        for instance, animal in zip(frame, animals, strict=True):
            pose = np.array(animal["keypoints"]).reshape(17, 3)
            there = pose[:, 2] > 0
            assert np.array_equal(instance.numpy(invisible_as_nan=False)[there], pose[there, :2])
            assert np.isnan(instance.numpy(invisible_as_nan=False)[~there]).all()
            assert instance.points["visible"].tolist() == (pose[:, 2] == 2).tolist()


def test_without_pyav_and_sleap(tmp_path, monkeypatch, capsys):
    """OpenCV writes the video; the missing file is told in one line."""
    monkeypatch.setattr(walk, "video_codec", lambda: "mp4v")
    monkeypatch.setattr(walk.importlib.util, "find_spec", lambda *_: None)
    assert cli.main(["zoo", "--video", str(tmp_path / "w.mp4"), "--frames", "5", "--size", "160x120"]) == 0
    said = capsys.readouterr().out
    assert "5 frames" in said and "mp4v" in said and "sleap-io" in said and len(said.splitlines()) <= 3
    assert len(decode(tmp_path / "w.mp4")) == 5 and {f.name for f in tmp_path.iterdir()} == {"w.mp4", "w.json"}


def test_the_command(tmp_path, capsys):
    line = [
        "zoo",
        "--video",
        str(tmp_path / "w.mp4"),
        "--frames",
        "3",
        "--fps",
        "12.5",
        "--size",
        "96x64",
        "--seed",
        "2",
    ]
    assert cli.main([*line, "--species", "cow", "fox", "--animals", "2", "--camera", "pan"]) == 0
    assert "w.json" in capsys.readouterr().out
    capture = cv2.VideoCapture(str(tmp_path / "w.mp4"))
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(12.5)
    capture.release()
    content = read_json(tmp_path / "w.json")
    assert (len(content["images"]), content["images"][0]["width"], content["images"][0]["height"]) == (3, 96, 64)
    assert {a["category_id"] for a in content["annotations"]} <= {1, 6}


@pytest.mark.parametrize(
    "flags, said",
    (
        (["--size", "641x480"], "multiples of 4"),
        (["--size", "wide"], "expected a size such as 640x480, got wide"),
        (["--species", "hors"], "got 'hors'"),
        (["--animals", "0"], "expected 1 to 6 animals, got 0"),
        (["--fps", "0"], "fps above 0"),
        (["--frames", "0"], "frames: expected 1 to 999999, got 0"),
        (["--seed", "-1"], "seed: expected 0 to 999999, got -1"),
    ),
)
def test_what_cannot_be_filmed(flags, said, tmp_path, capsys):
    """One line, exit code 1, and no file."""
    assert cli.main(["zoo", "--video", str(tmp_path / "w.mp4"), *flags]) == 1
    message = capsys.readouterr().err
    assert said in message and len(message.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_files_that_are_there_stay(tmp_path, capsys):
    """The video, or only its truth, is there already; another kind of video; neither a folder nor a video."""
    (tmp_path / "w.json").write_text("mine")
    assert cli.main(["zoo", "--video", str(tmp_path / "w.mp4"), "--frames", "2"]) == 1
    assert "w.json: already exists" in capsys.readouterr().err and (tmp_path / "w.json").read_text() == "mine"
    assert [f.name for f in tmp_path.iterdir()] == ["w.json"]
    assert cli.main(["zoo", "--video", str(tmp_path / "w.avi")]) == 1
    assert ".mp4" in capsys.readouterr().err
    assert cli.main(["zoo"]) == 1
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize("codec", ("mp4v", video_module.video_codec()))
def test_a_video_is_written_whole_or_not_at_all(codec, tmp_path):
    frame = np.zeros((64, 96, 3), np.uint8)
    with pytest.raises(KeyboardInterrupt), open_mp4(tmp_path / "v.mp4", 25, (96, 64), codec) as add:
        add(frame)
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="an even width and height"), open_mp4(tmp_path / "v.mp4", 25, (95, 64), codec):
        pass
    with pytest.raises(ValueError, match="expected a frame"), open_mp4(tmp_path / "v.mp4", 25, (96, 64), codec) as add:
        add(frame[:2])
    assert not list(tmp_path.iterdir())
    with open_mp4(tmp_path / "v.mp4", 29.97, (96, 64), codec) as add:
        for n in range(7):
            add(np.full_like(frame, 30 * n))
    assert [round(float(f.mean()) / 30) for f in decode(tmp_path / "v.mp4")] == list(range(7))
    assert [f.name for f in tmp_path.iterdir()] == ["v.mp4"]
