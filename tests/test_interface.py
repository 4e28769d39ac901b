"""The public interface: every name of `scarcenet.__all__`, its documentation, and what it says about bad input."""

import ast
import doctest
import inspect
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import scarcenet as sn
from scarcenet.data.coco import Labels
from scarcenet.data.labels import draw_labelled, reveal
from scarcenet.data.loader import load_crops, make_batch, seeded
from scarcenet.evaluate import evaluate_poses
from scarcenet.models.build import build_network, describe_network
from scarcenet.models.weights import public_state, read_model_info, save_weights, write_tensors
from scarcenet.predict.predictor import find_poses, match_keypoints, measure
from scarcenet.run.load import load_run_data
from scarcenet.utils.files import read_json

DOCUMENTED = [n for n in sn.__all__ if inspect.isclass(getattr(sn, n)) or inspect.isfunction(getattr(sn, n))]
QUICK = dict(
    labels=1,
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
    progress=False,
)


@pytest.fixture(scope="module")
def run(zoo, tmp_path_factory) -> sn.Run:
    """A small finished run."""
    return sn.train_run("demo", data=zoo, out=tmp_path_factory.mktemp("runs") / "a", **QUICK)


@pytest.fixture(scope="module")
def scope(run, zoo, tmp_path_factory) -> dict:
    """What the examples of the docstrings may use."""
    folder = tmp_path_factory.mktemp("examples")
    rules = sn.Config(network="hrnet_tiny", size=64, device="cpu")
    weights = folder / "some.safetensors"
    save_weights(build_network(rules, 17), weights, describe_network(rules, sn.AP10K))
    file = zoo / "annotations" / "ap10k-train-split1.json"
    poses = sn.read_coco(file)
    labels = Labels(*map(torch.as_tensor, reveal(poses, draw_labelled(poses, 1, seed=0))))
    crops = load_crops(poses.instances, rules.size)
    batch = make_batch(crops, labels, torch.arange(8), schema=sn.AP10K, rng=seeded(0))
    student, teacher = (build_network(rules, 17) for _ in range(2))
    return dict(
        run=run.folder,
        ledger=sn.open_ledger(run.folder),
        folder=folder,
        zoo=zoo,
        weights=weights,
        file=file,
        poses=poses,
        batch=batch,
        student=student,
        teacher=teacher,
        rules=rules,
        schema=sn.AP10K,
        np=np,
        torch=torch,
    )


# ---- names


def test_the_names_are_a_promise():
    assert len(set(sn.__all__)) == len(sn.__all__)
    for name in sn.__all__:
        assert getattr(sn, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sn.nothing


def test_no_name_is_a_module():
    """A module of the package becomes an attribute of it when it is imported, and would hide the name."""
    modules = {p.stem for p in Path(sn.__file__).parent.iterdir() if p.suffix == ".py" or p.is_dir()}
    assert not modules & set(sn.__all__)


@pytest.mark.parametrize("first", ["names", "modules"])
def test_in_both_orders_of_import(first):
    """Whether its modules are imported before or after, a public name is the same thing."""
    names = "import scarcenet as sn\nbefore = {n: getattr(sn, n) for n in sn.__all__}\n"
    modules = (
        "import importlib, pkgutil, scarcenet\n"
        "for m in pkgutil.walk_packages(scarcenet.__path__, 'scarcenet.'):\n"
        "    importlib.import_module(m.name) if not m.name.endswith('__main__') else None\n"
    )
    same = "assert all(getattr(sn, n) is before[n] for n in sn.__all__)\n"
    program = names + modules + same if first == "names" else modules + names + same
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_takes_nothing_along():
    heavy = "{'torch', 'numpy', 'cv2', 'matplotlib', 'pandas', 'timm'}"
    program = f"import sys, scarcenet; dir(scarcenet); assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


# ---- documentation


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_name_has_an_example_that_runs(name, scope):
    thing = getattr(sn, name)
    module = vars(sys.modules[thing.__module__])
    found = doctest.DocTestFinder(recurse=False).find(thing, name, globs={**module, **scope})
    examples = [test for test in found if test.examples]
    assert examples, "its docstring has no example (>>>)"
    for test in examples:
        said = []
        runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
        assert not runner.run(test, out=said.append).failed, "".join(said)


# ---- train, predict, ask


def test_a_run(run):
    assert run.best == "teacher" and list(run.networks) == ["supervised", "student", "teacher"]
    assert all(file.is_file() for file in run.networks.values())
    assert run.summary == read_json(run.folder / "summary.json")


def test_a_run_goes_on(zoo, tmp_path, monkeypatch):
    """Interrupted, and taken up with `resume`, it ends on the same weights."""
    from scarcenet.run import train_run as module

    whole = sn.train_run("demo", data=zoo, out=tmp_path / "whole", **QUICK)
    saved, calls = module.save_checkpoint, []

    def interrupted(*args):
        saved(*args)
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sn.train_run("demo", data=zoo, out=tmp_path / "cut", **QUICK)
    assert len(calls) == 2
    monkeypatch.setattr(module, "save_checkpoint", lambda *args: (calls.append(args), saved(*args)))
    again = sn.train_run("demo", data=zoo, out=tmp_path / "cut", resume=True, **QUICK)
    assert again.networks["teacher"].read_bytes() == whole.networks["teacher"].read_bytes()
    assert len(calls) == 3  # the third and last epoch alone: what was trained is not trained again


def test_predictor_and_evaluation_are_one_path(run, zoo):
    """From images and boxes the predictor gives what evaluation has scored: the same AP, from the same poses."""
    data = load_run_data(run.config, run.folder)
    test = data.evaluated["test"]
    pose = sn.Predictor(run.folder, device="cpu")
    assert pose.config.precision == "float32"  # the run's own
    found = sn.Predictor(run.folder)([i.file for i in test.instances], [i.box for i in test.instances])
    seen = pose.predict_crops(data.crops["test"])
    assert np.array_equal(found.xy, seen.xy) and np.array_equal(found.score, seen.score)
    scores = evaluate_poses(test, found.xy, found.score)["overall"]
    assert scores == run.summary["networks"]["teacher"]["test"]["overall"]


def test_one_file_is_enough(run, tmp_path):
    """A weights file away from its run, without any configuration."""
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(run.networks["teacher"].read_bytes())
    info = read_model_info(alone)
    assert (info.network, info.size, info.schema) == ("hrnet_tiny", 32, sn.AP10K) and info.version == sn.__version__
    image = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    there, here = sn.Predictor(run.folder, device="cpu"), sn.Predictor(alone, device="cpu")
    for a, b in zip(there(image)[:2], here(image)[:2], strict=True):
        assert np.array_equal(a, b)
    assert here.names == sn.AP10K.names and here.size == 32


def test_images_of_all_kinds(run, tmp_path):
    """An array, a path and a list of them; a box, or none for the whole image."""
    pose = sn.Predictor(run.folder, device="cpu")
    image = np.random.default_rng(1).integers(0, 255, (60, 80, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    whole = pose(image)
    assert whole.xy.shape == (1, 17, 2) and whole.score.shape == (1, 17)
    for same in (pose(tmp_path / "a.png"), pose(str(tmp_path / "a.png")), pose([image]), pose(image, [[0, 0, 80, 60]])):
        assert np.array_equal(same.xy, whole.xy)
    two = pose(image, [[0, 0, 80, 60], [10, 10, 30, 30]])
    assert two.xy.shape == (2, 17, 2)
    assert pose([], np.zeros((0, 4))).xy.shape == (0, 17, 2)


def reordered(schema: sn.KeypointSchema, order: list[int]) -> sn.KeypointSchema:
    """The same keypoints in another order."""
    place = {old: new for new, old in enumerate(order)}
    return sn.KeypointSchema(
        names=tuple(schema.names[i] for i in order),
        flip_pairs=tuple((place[a], place[b]) for a, b in schema.flip_pairs),
        skeleton=tuple((place[a], place[b]) for a, b in schema.skeleton),
        sigmas=tuple(schema.sigmas[i] for i in order),
        upper=tuple(sorted(place[i] for i in schema.upper)),
    )


def test_keypoints_are_matched_by_name(run):
    """The same names in another order have the same scores; other names are refused, with both lists."""
    poses = find_poses(run.config, run.folder)
    order = [*range(16, -1, -1)]
    turned = replace(
        poses,
        schema=reordered(poses.schema, order),
        truth=poses.truth._replace(xy=poses.truth.xy[:, order], visible=poses.truth.visible[:, order]),
    )
    pose, crops = sn.Predictor(run.folder, device="cpu"), load_crops(poses.instances, 32)
    straight, back = measure(pose, poses, crops), measure(pose, turned, crops)
    assert back["overall"] == pytest.approx(straight["overall"], rel=1e-6)
    assert back["keypoint"] == straight["keypoint"]
    other = replace(poses.schema, names=("beak", *poses.schema.names[1:]))
    with pytest.raises(ValueError, match="expected the 17 keypoints left_eye.*got the 17 keypoints beak"):
        measure(pose, replace(poses, schema=other), crops)


def test_names_are_compared_as_people_write_them():
    ears = sn.KeypointSchema(("leftEar", "rightEar"))
    assert match_keypoints(ears, sn.KeypointSchema(("right_ear", "left_ear")), "") == [1, 0]
    letters = sn.KeypointSchema(("A", "a", "b"))
    assert match_keypoints(letters, letters, "") == [0, 1, 2]
    with pytest.raises(ValueError, match="expected the 3 keypoints"):
        match_keypoints(letters, sn.KeypointSchema(("b", "a")), "")


def test_weights_of_other_keypoints_do_not_start_a_training(run, zoo, tmp_path):
    names = ("beak", *sn.AP10K.names[1:])
    config, file = run.config, tmp_path / "bird.safetensors"
    save_weights(build_network(config, 17), file, describe_network(config, replace(sn.AP10K, names=names)))
    with pytest.raises(ValueError, match="weights of other keypoints"):
        sn.train_run(replace(config, weights=str(file)), out=tmp_path / "run", progress=False)
    assert [f.name for f in (tmp_path / "run").iterdir()] == ["config.json"]  # so the folder may be used again


# ---- bad input: one line


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("open_it", [sn.Predictor, sn.open_ledger, sn.explore])
def test_no_such_run(open_it, tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        open_it(tmp_path / "nowhere")
    assert "nowhere" in one_line(error)


def test_a_file_that_says_nothing_of_itself(run, tmp_path):
    foreign = tmp_path / "foreign.safetensors"
    save_weights(build_network(run.config, 17), foreign)
    with pytest.raises(ValueError) as error:
        sn.Predictor(foreign)
    assert "foreign.safetensors" in one_line(error) and "does not describe its network" in str(error.value)
    pose = sn.Predictor(foreign, device="cpu", config=run.config, schema=sn.AP10K)
    assert pose(np.zeros((20, 20, 3), np.uint8)).xy.shape == (1, 17, 2)


def test_another_number_of_keypoints(run, tmp_path):
    """Metadata that promise five keypoints before weights for seventeen."""
    file = tmp_path / "five.safetensors"
    five = sn.KeypointSchema(("a", "b", "c", "d", "e"))
    save_weights(build_network(run.config, 17), file, describe_network(run.config, five))
    with pytest.raises(ValueError) as error:
        sn.Predictor(file, device="cpu")
    assert "five.safetensors" in one_line(error) and "5 keypoints" in str(error.value)


def test_damaged_files(run, tmp_path):
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(run.networks["teacher"].read_bytes()[:1000])
    with pytest.raises(ValueError) as error:
        sn.Predictor(torn)
    assert "torn.safetensors" in one_line(error)


@pytest.mark.parametrize(
    ("images", "boxes", "says"),
    [
        (None, None, "a sequence of images"),
        (np.zeros((20, 20, 3)), None, "uint8"),
        (np.zeros((20, 20), np.uint8), None, r"\(H, W, 3\)"),
        (["text.png"], None, "no such image"),
        (np.zeros((20, 20, 3), np.uint8), [[0, 0, 0, 5]], "expected a width and height above 0"),
        (np.zeros((20, 20, 3), np.uint8), [[0, 0, float("nan"), 5]], "finite"),
        (np.zeros((20, 20, 3), np.uint8), [0, 0, 5, 5], r"\(N, 4\)"),
        ([np.zeros((20, 20, 3), np.uint8)], [[0, 0, 5, 5]] * 2, "boxes: expected one for each of the 1 images, got 2"),
    ],
    ids=["nothing", "floats", "grey", "no file", "no area", "nan", "one box", "two boxes"],
)
def test_images_that_are_none(run, images, boxes, says):
    with pytest.raises(ValueError, match=says) as error:
        sn.Predictor(run.folder, device="cpu")(images, boxes)
    one_line(error)


def test_settings_that_do_not_exist(zoo, tmp_path, run):
    for config, changes, says in (
        ("demos", {}, "expected one of demo"),
        ("demo", {"colour": 1}, "colour"),
        ("demo", {"size": "32"}, "size: expected int, got '32'"),
        ("demo", {"epochs": 0.5}, "epochs: expected int, got 0.5"),
        ("demo", {"labels": None}, "labels: expected int or str, got None"),
    ):
        with pytest.raises(ValueError, match=says):
            sn.train_run(config, data=zoo, out=tmp_path / "new", **changes)
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="already exists"):
        sn.train_run("demo", data=zoo, out=run.folder, **QUICK)
    with pytest.raises(FileNotFoundError, match="empty: no such file or folder"):
        sn.train_run("demo", data=tmp_path / "empty", out=tmp_path / "new", **QUICK)
    with pytest.raises(ValueError, match="network 'coach': expected one of"):
        sn.Predictor(run.folder, "coach")


def test_the_command_and_the_module_are_one(tmp_path):
    from scarcenet.cli.main import COMMANDS

    helps = [
        subprocess.run([*how, "--help"], capture_output=True, text=True, check=True).stdout
        for how in ([sys.executable, "-m", "scarcenet"], [str(Path(sys.executable).with_name("scarcenet"))])
    ]
    assert helps[0] == helps[1] and all(name in helps[0] for name in COMMANDS)


def test_editors_see_what_there_is():
    """What `__init__` imports for type checkers is what it imports on demand."""
    source = ast.parse(Path(sn.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(source) if isinstance(node, ast.ImportFrom) and node.level]
    assert {alias.name: node.module for node in imports for alias in node.names} == sn._HOME


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"size": "big"}, "a size in px"),
        ({"mean": (0.5, 0.5, 0.5)}, "ImageNet's normalisation"),
        ({"colour": 1}, "colour"),
    ],
    ids=["size", "normalisation", "unknown"],
)
def test_metadata_that_describe_no_network(run, tmp_path, change, says):
    file, model = tmp_path / "odd.safetensors", build_network(run.config, 17)
    write_tensors(file, public_state(model), asdict(describe_network(run.config, sn.AP10K)) | change)
    with pytest.raises(ValueError, match=says) as error:
        sn.Predictor(file)
    assert "odd.safetensors" in one_line(error)


def test_one_file_is_enough_for_the_commands(run, zoo, tmp_path, capsys):
    """`eval` and `pseudo` of a weights file away from its run: only the set has to be named."""
    from scarcenet.cli import main as cli

    alone, labels, scores = (tmp_path / name for name in ("alone.safetensors", "labels.json", "scores.json"))
    alone.write_bytes(run.networks["teacher"].read_bytes())
    common = ["--data", str(zoo), "--device", "cpu"]
    assert cli.main(["eval", str(alone), *common, "--json", str(scores)]) == 0
    expected = run.summary["networks"]["teacher"]["test"]["overall"]["PCK"]
    assert read_json(scores)["alone"]["overall"]["PCK@0.1"] == pytest.approx(expected, abs=1e-6) and expected > 0
    assert cli.main(["pseudo", str(alone), *common, "--out", str(labels)]) == 0
    assert len(read_json(labels)["annotations"]) == run.summary["instances"]
    capsys.readouterr()
