"""How fast is this code beside the official one? `python .ci/official_speed.py CLONE [--json FILE]`.

CLONE is a clone of https://github.com/chaneyddtt/ScarceNet (df4fa6b); its code wants `pip install yacs json_tricks`.
Steps of the last stage, with their data, and pseudo-labels of the paper's network at 256 px, on animals of the zoo. The
official code and this one take turns, each time in a new process with two threads; the first step or call does not
count. Three things are changed so that the official code runs here: `.cuda()` does nothing, pycocotools reads the
annotations, and `np.float` is `float`. `experiments/benchmark` shows the result, `nbs/measured/official.json`.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch

from scarcenet.config import DEMO, OFFICIAL, Config
from scarcenet.data.coco import find_split
from scarcenet.experiments.benchmark import passes, set_up, works
from scarcenet.experiments.study import OFFICIAL_RULES
from scarcenet.utils.device import describe
from scarcenet.utils.files import read_json, write_json
from scarcenet.zoo.dataset import write_zoo

CODE = "official code"
RULES = "float32, the official rules"
STEP = (CODE, "float32", "bfloat16", RULES)
PSEUDO = (CODE, "float32", "bfloat16", "float32, compiled", "bfloat16, compiled")
ANIMALS = 12
SETTINGS = "experiments/ap10k/hrnet/w32_256x192_adam_lr1e-3.yaml"  # in the clone


def own_config(variant: str, batch: int) -> Config:
    """The paper's network in one of the variants."""
    paper: dict[str, Any] = dict(network="mbhrnet_w32", backbone="", size=256, sigma=2.0, views=5, device="cpu")
    paper["precision"] = "bf16" if variant.startswith("bfloat16") else "float32"
    paper["compile"] = "default" if variant.endswith("compiled") else ""
    rules = {name: getattr(OFFICIAL, name) for name in OFFICIAL_RULES} if variant == RULES else {}
    return replace(DEMO, **paper, **rules, batch=batch)


def time_own(what: str, variant: str, batch: int, times: int, folder: Path) -> list[float]:
    """Seconds an image of `times` steps or calls, and of one before them."""
    subject = set_up(own_config(variant, batch), folder / f"own-{os.getpid()}", max(batch, 8))
    call = works(subject)["ScarceNet step"] if what == "step" else passes(subject)[what]
    images = batch if what == "step" else len(subject.data.crops)
    return [seconds(call) / images for _ in range(1 + times)]


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def as_ap10k(folder: Path) -> None:
    """The zoo where the official code looks for AP-10K; every other image labelled, the others with noisy labels."""
    write_zoo(folder / "zoo", train=ANIMALS, val=1, test=1)
    file, images = find_split(folder / "zoo", "train")
    assert images is not None, "the zoo's images are files"
    shutil.copytree(images, folder / "data")
    for name in ("annotations", "data/label_list", "data/pseudo_labels/5shots"):
        (folder / name).mkdir(parents=True)
    for split in ("train", "val", "test"):
        shutil.copy(file, folder / f"annotations/ap10k-{split}-split1.json")
    content, rng = read_json(file), np.random.default_rng(0)
    (folder / "data/label_list/annotation_list_5").write_text(json.dumps([i["id"] for i in content["images"]][::2]))
    pseudo = {}
    for n, animal in enumerate(content["annotations"]):
        keypoints = np.reshape(animal["keypoints"], (-1, 3)).astype(np.float32)
        keypoints[:, :2] += 3 * rng.normal(size=(len(keypoints), 2))
        keypoints[:, 2] = rng.random(len(keypoints))
        pseudo[n] = keypoints
    np.save(folder / "data/pseudo_labels/5shots/pseudo_labels_train.npy", np.array(pseudo, dtype=object))


def prepare_official(clone: Path, folder: Path) -> Any:
    """Make the official code run here; its settings."""
    import pycocotools.coco
    import pycocotools.cocoeval

    sys.path.insert(0, str(clone / "lib"))
    os.chdir(folder)  # it looks for labels in the current folder
    np.float = float  # type: ignore[attr-defined]
    for kind in (torch.Tensor, torch.nn.Module):
        kind.cuda = lambda self, *_, **__: self  # type: ignore[method-assign, assignment]
    suppression: Any = ModuleType("nms.nms")  # compiled code, which neither steps nor pseudo-labels call
    suppression.oks_nms = suppression.soft_oks_nms = None
    sys.modules |= {"nms": ModuleType("nms"), "nms.nms": suppression, "xtcocotools": ModuleType("xtcocotools")}
    sys.modules |= {"xtcocotools.coco": pycocotools.coco, "xtcocotools.cocoeval": pycocotools.cocoeval}
    cfg = __import__("config").cfg
    cfg.merge_from_file(str(clone / SETTINGS))
    changes = ["LABEL_PER_CLASS", 5, "MODEL.INIT_WEIGHTS", False, "DATASET.ROOT", f"{folder}/"]
    cfg.merge_from_list(changes)
    return cfg


def time_official(what: str, batch: int, times: int, clone: Path, folder: Path) -> list[float]:
    """Seconds an image of `times` steps or animals, and of one before them."""
    from torchvision import transforms

    cfg = prepare_official(clone, folder)
    import dataset_animal  # type: ignore[import-not-found]
    import models  # type: ignore[import-not-found]
    from core.function1 import train_mt_update  # type: ignore[import-not-found]
    from core.loss import JointsMSELoss  # type: ignore[import-not-found]
    from utils.augmentation_pool import RandAugmentMC  # type: ignore[import-not-found]
    from utils.consistency import prediction_check  # type: ignore[import-not-found]
    from utils.utils import get_optimizer  # type: ignore[import-not-found]

    student, teacher = (models.pose_hrnet_part.get_pose_net(cfg, is_train=True) for _ in range(2))
    if what == "pseudo-labels":
        data = dataset_animal.ap10k(cfg, cfg.DATASET.ROOT, "train", False)
        student.eval()

        def label(n: int) -> None:
            image, _, _, meta = data[n % len(data)]
            box = (np.asarray(meta[name])[None] for name in ("center", "scale"))
            prediction_check(torch.as_tensor(image), student, data, *box, 5)

        return [seconds(partial(label, n)) for n in range(1 + times)]

    # what its command's options are where none is given
    given = dict(const_weight=2.0, consistency_rampup=10, dist_thre=0.6, update_epoch=-1, topkrampdown=30, minrate=0.8)
    options = SimpleNamespace(**given, sf_aggre=0.1, rf_aggre=20, percentage=0.4, true_label_w=2.0)
    plain = [transforms.ToTensor(), transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
    strong = transforms.Compose([RandAugmentMC(n=2, m=10, num_cutout=6), *plain])
    views = (strong, transforms.Compose(plain))
    whole = dataset_animal.ap10k_mt_v3(cfg, options, cfg.DATASET.ROOT, "train", True, *views)
    part = torch.utils.data.Subset(whole, [n % len(whole) for n in range(batch * (1 + times))])
    stamps = []

    def batches() -> Iterator:
        stamps.append(time.perf_counter())
        for images in torch.utils.data.DataLoader(part, batch_size=batch, shuffle=True):
            yield images
            stamps.append(time.perf_counter())

    class Loader:
        __iter__ = staticmethod(batches)
        __len__ = staticmethod(lambda: 1 + times)

    writer = {"writer": SimpleNamespace(add_scalar=lambda *_: None), "train_global_steps": 0}
    networks = (torch.nn.DataParallel(student), torch.nn.DataParallel(teacher))
    rest = (JointsMSELoss(True), get_optimizer(cfg, student), 0, "", "", writer)
    train_mt_update(cfg, options, Loader(), whole, *networks, *rest)
    return [(end - start) / batch for start, end in zip(stamps, stamps[1:], strict=False)]


def measure(words: list[str]) -> float:
    """One process; the median of its seconds an image."""
    command = [sys.executable, __file__, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path)
    parser.add_argument("--rounds", type=int, default=3, help="processes of each row")
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 8, 16], help="of a step")
    parser.add_argument("--times", type=int, default=4, help="steps or calls of a process")
    parser.add_argument("--json", type=Path, help="write the seconds into this file")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)  # what, variant, batch, folder: one process
    args = parser.parse_args()
    torch.set_num_threads(2)
    clone = args.clone.resolve()
    if args.one:
        what, variant, batch, folder = args.one[0], args.one[1], int(args.one[2]), Path(args.one[3])
        if variant == CODE:
            times = args.times if what == "step" else 3 * args.times
            taken = time_official(what, batch, times, clone, folder)
        else:
            taken = time_own(what, variant, batch, args.times, folder)
        return print(median(taken[1:]))
    rows: dict[str, tuple[str, int, tuple[str, ...]]] = {
        f"step, batch of {batch}": ("step", batch, STEP) for batch in args.batches
    }
    rows |= {"pseudo-labels, 10 views": ("pseudo-labels", 8, PSEUDO)}
    found: dict[str, dict[str, list[float]]] = {name: {} for name in rows}
    with TemporaryDirectory() as data:
        as_ap10k(Path(data))
        for _ in range(args.rounds):
            for name, (what, batch, variants) in rows.items():
                for variant in variants:
                    one = [str(clone), "--times", str(args.times), "--one", what, variant, str(batch), data]
                    found[name].setdefault(variant, []).append(round(measure(one), 3))
                    print(f"{name}: {variant}: {found[name][variant][-1]:.2f} s an image", flush=True)
    setting = dict(device=describe(torch.device("cpu")), network="mbhrnet_w32", size=256, views=10)
    if args.json:
        write_json(args.json, setting | {"seconds": found})


if __name__ == "__main__":
    main()
