"""What each of several processes runs in test_processes.py: `python launched.py ZOO OUT`, started by accelerate's launcher or alone."""
import sys
from pathlib import Path

import torch
from torch import nn

from scarcenet.data.coco import Labels, find_split, read_coco
from scarcenet.config import Config
from scarcenet.data.loader import TrainingSet, load_canvases
from scarcenet.data.labels import draw_labelled, reveal
from scarcenet.utils.distributed import is_first, processes
from scarcenet.checkpoint import start
from scarcenet.train import fit

# batch norms keep the statistics they begin with: those of half a batch are not those of the whole
nn.BatchNorm2d.train = lambda self, mode=True: nn.Module.train(self, False)


def main(zoo: Path, out: Path) -> None:
    torch.set_num_threads(1)
    poses = read_coco(*find_split(zoo, "train"))
    poses = poses.subset(range(24))
    config = Config(network="tiny", size=64, sigma=1.0, device="cpu", supervised_epochs=1, supervised_batch=8, views=2, epochs=3, batch=24,
                    keep_epochs=2, keep_floor=0.5, agree_px=2.0, lr=1e-3, ema=0.9)
    labels = Labels(*map(torch.as_tensor, reveal(poses, draw_labelled(poses, 1, seed=0))))
    data = TrainingSet(poses.schema, load_canvases(poses.instances, config.size), labels)
    state = start(config, data)
    for network in (state.student, state.teacher):
        # the sum over half a batch ends in other last bits than that over the whole. In double precision they are far below what a map
        # of single ones can show; else one of a map's two peaks of equal height, which the next argmax takes, would hang on them
        network.double().register_forward_pre_hook(lambda _, pictures: (pictures[0].double(),))
    kept = {"processes": processes()}
    for epoch in fit(config, data, state):
        if epoch.stage == "supervised":
            kept["before"] = {name: weight.clone() for name, weight in epoch.state.student.state_dict().items()}
        place = f"{epoch.stage} {epoch.epoch}"
        kept[f"{place} losses"] = [epoch.loss, epoch.supervised, epoch.consistency]
        if epoch.record:
            kept[f"{place} record"] = epoch.record._asdict()
    kept |= {"pseudo": epoch.state.pseudo._asdict(), "steps": epoch.state.step,
             "student": epoch.state.student.state_dict(), "teacher": epoch.state.teacher.state_dict()}
    if is_first():
        torch.save(kept, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
