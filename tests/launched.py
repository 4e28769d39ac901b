"""The program that test_processes.py starts, with accelerate's launcher or as a single process.

`python launched.py ZOO OUT` trains for three epochs of stage 3 and saves what was computed.
"""

import sys
from pathlib import Path

import torch
from torch import nn

from scarcenet.checkpoint import start
from scarcenet.config import Config
from scarcenet.data.coco import Labels, find_split, read_coco
from scarcenet.data.labels import draw_labelled, reveal
from scarcenet.data.loader import TrainingSet, load_crops
from scarcenet.train import fit
from scarcenet.utils.distributed import is_main_process, world_size

# batch norms keep the statistics they start with, since those of half a batch are not those of the whole
nn.BatchNorm2d.train = lambda self, mode=True: nn.Module.train(self, False)


def main(zoo: Path, out: Path) -> None:
    torch.set_num_threads(1)
    poses = read_coco(*find_split(zoo, "train")).subset(range(24))
    config = Config(
        network="hrnet_tiny",
        size=64,
        sigma=1.0,
        device="cpu",
        supervised_epochs=1,
        supervised_batch=8,
        views=2,
        epochs=3,
        batch=24,
        keep_epochs=2,
        keep_floor=0.5,
        agree_px=2.0,
        lr=1e-3,
        ema=0.9,
    )
    labels = Labels(*map(torch.as_tensor, reveal(poses, draw_labelled(poses, 1, seed=0))))
    data = TrainingSet(poses.schema, load_crops(poses.instances, config.size), labels)
    state = start(config, data)
    for network in (state.student, state.teacher):
        # A sum over half a batch has other last bits than the sum over the whole, and an argmax between two peaks of
        # equal height would depend on them. In double precision they are far below what a float32 map can show.
        network.double().register_forward_pre_hook(lambda _, images: (images[0].double(),))
    outcome = {"processes": world_size()}
    for epoch in fit(config, data, state):
        if epoch.stage == "supervised":
            outcome["before"] = {name: weight.clone() for name, weight in epoch.state.student.state_dict().items()}
        key = f"{epoch.stage} {epoch.epoch}"
        outcome[f"{key} losses"] = [epoch.loss, epoch.supervised, epoch.consistency]
        if epoch.record:
            outcome[f"{key} record"] = epoch.record._asdict()
    outcome |= {
        "pseudo": epoch.state.pseudo._asdict(),
        "steps": epoch.state.step,
        "student": epoch.state.student.state_dict(),
        "teacher": epoch.state.teacher.state_dict(),
    }
    if is_main_process():
        torch.save(outcome, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
