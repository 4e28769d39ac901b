"""ScarceNet: animal pose estimation from a few labelled images and many unlabelled ones.

Everything that `__all__` lists is the public interface. Its parts are imported when they are first used, so that
`import scarcenet` takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what `_HOME` says, for editors and type checkers
    from .config import Config as Config, PRESETS as PRESETS
    from .data.coco import PoseSet as PoseSet, read_coco as read_coco
    from .data.formats import read_labels as read_labels
    from .data.importing import import_set as import_set
    from .evaluate import evaluate_poses as evaluate_poses
    from .heatmap import decode as decode, encode as encode, heatmap_loss as heatmap_loss
    from .ledger.explorer import explore as explore
    from .ledger.ledger import Ledger as Ledger, open_ledger as open_ledger
    from .ledger.suggest import suggest as suggest
    from .mean_teacher import (
        consistency_mask as consistency_mask,
        ema_decay as ema_decay,
        ema_update as ema_update,
        sigmoid_rampup as sigmoid_rampup,
    )
    from .predict.poses import Poses as Poses
    from .predict.predictor import Predictor as Predictor
    from .predict.stream import Predictions as Predictions
    from .relabel import (
        Decision as Decision,
        agreement_distance as agreement_distance,
        agreement_offset as agreement_offset,
        decide as decide,
        loss_weight as loss_weight,
        relabel_targets as relabel_targets,
    )
    from .run.train_run import Run as Run, train_run as train_run
    from .schema import AP10K as AP10K, KeypointSchema as KeypointSchema
    from .small_loss import keep_rate as keep_rate, select_small_loss as select_small_loss
    from .step import Step as Step, scarcenet_step as scarcenet_step, supervised_step as supervised_step

__version__ = "0.2.0"

# public name -> the module that defines it
_HOME = {
    # train, predict, investigate
    "train_run": "run.train_run",
    "Run": "run.train_run",
    "Predictor": "predict.predictor",
    "Predictions": "predict.stream",
    "Poses": "predict.poses",
    "open_ledger": "ledger.ledger",
    "Ledger": "ledger.ledger",
    "explore": "ledger.explorer",
    "suggest": "ledger.suggest",
    # settings and data
    "Config": "config",
    "PRESETS": "config",
    "KeypointSchema": "schema",
    "AP10K": "schema",
    "import_set": "data.importing",
    "read_labels": "data.formats",
    "read_coco": "data.coco",
    "PoseSet": "data.coco",
    "evaluate_poses": "evaluate",
    # the step and its parts
    "supervised_step": "step",
    "scarcenet_step": "step",
    "Step": "step",
    "encode": "heatmap",
    "decode": "heatmap",
    "heatmap_loss": "heatmap",
    "keep_rate": "small_loss",
    "select_small_loss": "small_loss",
    "agreement_offset": "relabel",
    "agreement_distance": "relabel",
    "Decision": "relabel",
    "decide": "relabel",
    "relabel_targets": "relabel",
    "loss_weight": "relabel",
    "consistency_mask": "mean_teacher",
    "sigmoid_rampup": "mean_teacher",
    "ema_decay": "mean_teacher",
    "ema_update": "mean_teacher",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    """A public name, from the module that defines it (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
