"""Damaged and hostile files; python tests/campaign_fuzz.py has more of them. What was found once is here by itself."""

import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from campaign_fuzz import campaign
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from scarcenet.checkpoint import load_checkpoint, save_checkpoint, start
from scarcenet.config import PRESETS, Config, read_config
from scarcenet.data.coco import find_split, read_coco
from scarcenet.data.formats import read_labels
from scarcenet.data.hdf5 import open_hdf5
from scarcenet.data.images import broken_images
from scarcenet.experiments.ablation import read_grid
from scarcenet.models.weights import read_model_info, read_state
from scarcenet.record import read_table, write_table
from scarcenet.run.folder import read_metrics
from scarcenet.run.load import load_run_data
from scarcenet.utils.files import parse_json, read_json


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_some_damaged_files(tmp_path):
    """A few of each kind: no error but one line, no hang, no code run, nothing outside."""
    assert campaign(tmp_path / "fuzz", 240)["wrong"] == {}


def refused(file, read, says=""):
    """`read` ends with one line that names the file."""
    with pytest.raises(ValueError) as caught:
        read()
    line = str(caught.value)
    assert str(file) in line and says in line and "\n" not in line, line


def test_brackets_in_texts_are_no_depth():
    names = {"images": [{"file_name": f"frame[{n}.png", "note": '\\"['} for n in range(300)]}
    assert parse_json(json.dumps(names)) == names
    for closing in ('["]",' * 300, "[" * 300 + "]" * 300):  # nor do they hide any
        with pytest.raises(ValueError, match="expected at most 200 nested brackets"):
            parse_json(closing)


def test_json_that_is_deep(tmp_path):
    """However it is nested; a name with brackets is no nesting."""
    file = tmp_path / "a.json"
    for text in ("[" * 10_000, "[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900):
        file.write_text(text)
        refused(file, lambda: read_json(file), "brackets")
    file.write_text(json.dumps(["[a].png"] * 1000))
    assert read_json(file) == ["[a].png"] * 1000


def test_a_configuration_of_other_values(tmp_path):
    """Whatever is wrong with it, the file is named."""
    for change in ({"size": 33}, {"lr": float("nan")}, {"batch": []}, {"views": {}}, {"unknown": 1}):
        (tmp_path / "config.json").write_text(json.dumps(asdict(Config()) | change))
        refused(tmp_path / "config.json", lambda: read_config(tmp_path))
    for content in ([], None, 7):
        (tmp_path / "config.json").write_text(json.dumps(content))
        refused(tmp_path / "config.json", lambda: read_config(tmp_path))


def test_a_checkpoint_of_other_values(zoo, tmp_path):
    """Its place in the run, its optimiser, its pseudo-labels."""
    config = replace(PRESETS["demo"], network="hrnet_tiny", backbone="", size=32, data=str(zoo), labels=1, device="cpu")
    data, file = load_run_data(config, tmp_path).data, tmp_path / "c.safetensors"
    save_checkpoint(file, start(config, data))
    assert load_checkpoint(file, config, data).epoch == 0
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}
        place = json.loads(opened.metadata()["scarcenet"])
    places = [place | {"epoch": v} for v in (float("inf"), -1, "1", True, None)]
    places += [place | {"stage": v} for v in ("scarcenet", [], None)] + [place | {"scale": 1}, [], 3]
    for other in places:
        save_file(tensors, file, metadata={"scarcenet": json.dumps(other)})
        refused(file, lambda: load_checkpoint(file, config, data), "not a checkpoint of this run")
    for name, value in (("optimiser.x.step", 1.0), ("optimiser.999.step", 1.0), ("nothing", 1.0), ("pseudo.xy", 1.0)):
        save_file({**tensors, name: torch.full((2, 2), value)}, file, metadata={"scarcenet": json.dumps(place)})
        refused(file, lambda: load_checkpoint(file, config, data))


def test_weights_of_other_kinds(tmp_path):
    """Sparse or complex tensors, metadata without an end."""
    for odd in (torch.ones(2, 2).to_sparse(), torch.ones(2, dtype=torch.complex64)):
        torch.save({"final_layer.weight": odd}, tmp_path / "a.pth")
        refused(tmp_path / "a.pth", lambda: read_state(tmp_path / "a.pth"))
    for text in ("[" * 900 + "]" * 900, '{"schema": {"names": ' + "[" * 150 + "]" * 150 + "}}", '{"schema": 3}'):
        save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors", metadata={"scarcenet": text})
        refused(tmp_path / "a.safetensors", lambda: read_model_info(tmp_path / "a.safetensors"))


def test_a_ledger_of_other_columns(tmp_path):
    import pyarrow as pa

    file = tmp_path / "a.parquet"
    for column in (pa.array(["x"]), pa.array([None], pa.int32()), pa.array([1.5]), pa.array([[1]])):
        write_table(file, pa.table({"instance": column}))
        refused(file, lambda: read_table(file, {"instance": "integer"}), "expected a complete column of integer")
    refused(file, lambda: read_table(file, {"decision": "integer"}), "decision")


def test_tables_of_other_cells(tmp_path):
    """metrics.csv, and the rows of a study."""
    head = "stage,epoch,epochs,loss,seconds\n"
    for row in (
        "supervised,1,2,x,1",
        "supervised,1.5,2,0.1,1",
        f"supervised,{'9' * 5000},2,0.1,1",
        "other,1,2,0.1,1",
        "supervised,1",
        "supervised,1,2,,1,7",
    ):
        (tmp_path / "metrics.csv").write_text(head + row + "\n")
        refused(tmp_path / "metrics.csv", lambda: read_metrics(tmp_path / "metrics.csv"))
    (tmp_path / "metrics.csv").write_bytes(b"\xff\xfe\x00")
    refused(tmp_path / "metrics.csv", lambda: read_metrics(tmp_path / "metrics.csv"))
    for row in ("1,0,a,x", "1,0", "1,b,a,0.5", f"1,{'9' * 5000},a,0.5"):
        (tmp_path / "study.csv").write_text("labels,seed,method,teacher_AP\n" + row + "\n")
        refused(tmp_path / "study.csv", lambda: read_grid(tmp_path / "study.csv"))


def test_images_that_claim_much(zoo, tmp_path):
    """An image of 10^5 x 10^5 px by its header; a decoder's own errors."""
    instance = read_coco(*find_split(zoo, "train")).instances[0]
    png = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(png)
    data = bytearray(png.read_bytes())
    data[16:24] = (10**5).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    png.write_bytes(data)
    huge = replace(instance, file=png, width=10**5, height=10**5)
    (line,) = broken_images([huge]).values()
    assert str(png) in line and "\n" not in line and "more than 134 megapixels" in line


def test_ids_and_keypoints_beyond_all_bounds(zoo, tmp_path):
    """Ids that no table can hold are none; a thousand keypoints are enough for an animal."""
    file = find_split(zoo, "train")[0]
    content = json.loads(file.read_text())
    content["annotations"][0]["id"] = 10**30
    (tmp_path / "a.json").write_text(json.dumps(content))
    poses = read_coco(tmp_path / "a.json", images=zoo / "data")
    assert len(poses) == len(content["annotations"]) and poses.column("id").dtype == np.int64
    for category in content["categories"]:
        category["keypoints"] = [str(n) for n in range(5000)]
    (tmp_path / "a.json").write_text(json.dumps(content))
    refused(tmp_path / "a.json", lambda: read_coco(tmp_path / "a.json", images=zoo / "data"))
    (tmp_path / "data.yaml").write_text("kpt_shape: [1000000000, 3]\ntrain: images\n")
    refused(tmp_path / "data.yaml", lambda: read_labels(tmp_path / "data.yaml"), "kpt_shape")
    (tmp_path / "data.yaml").write_text("kpt_shape: [1, 3]\nnames: {--5: a, ²: b}\nflip_idx: !!int _\n")
    refused(tmp_path, lambda: read_labels(tmp_path / "data.yaml"))


def test_label_studio_with_sizes_that_are_lists(zoo, tmp_path):
    image = next((zoo / "data").iterdir())
    shutil.copy(image, tmp_path)
    item = dict(
        type="keypointlabels", original_width=[], original_height={}, value=dict(x=1, y=1, keypointlabels=["a"])
    )
    task = dict(data=dict(img=image.name), annotations=[dict(result=[item])])
    other = dict(data=dict(img=image.name), annotations=7)  # no list of annotations
    (tmp_path / "tasks.json").write_text(json.dumps([task, other]))
    assert read_labels(tmp_path / "tasks.json").names == ("a",)


def test_an_h5_that_claims_much(tmp_path):
    """A dataset of 8 GB of which nothing is stored."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as content:
        content.create_dataset("table", (10**9,), "f8", chunks=(10**6,))

    def read():
        with open_hdf5(tmp_path / "a.h5"):
            pass

    refused(tmp_path / "a.h5", read, "states 8000000000 bytes")
    with h5py.File(tmp_path / "b.h5", "w") as content:
        content["frame_numbers"] = 7

    def slice_it():
        with open_hdf5(tmp_path / "b.h5") as content:
            content["frame_numbers"][:]

    refused(tmp_path / "b.h5", slice_it, "Illegal slicing")


def test_names_are_no_html(tmp_path):
    """Where a page shows names of a set, they are text."""
    from scarcenet.run.figures import html_table

    assert "<script>" not in html_table({"<script>a</script>": {"AP": 1.0}}, ("AP",), "<script>")
