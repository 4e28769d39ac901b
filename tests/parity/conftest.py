"""The original's tensors and its tiny network, as this library reads them."""
import numpy as np
import pytest
import torch

from scarcenet.models.hrnet import mbhrnet
from scarcenet.schema import AP10K
from scarcenet.models.weights import load_weights


def read(file) -> dict[str, torch.Tensor]:
    """An npz file's arrays as tensors, half precision widened."""
    with np.load(file) as arrays:
        return {name: torch.from_numpy(arrays[name].astype(np.float32) if arrays[name].dtype == np.float16 else arrays[name])
                for name in arrays.files}


@pytest.fixture(scope="session")
def functions(parity):
    return read(parity / "functions.npz")


@pytest.fixture(scope="session")
def golden(parity):
    return read(parity / "golden_step.npz")


@pytest.fixture(scope="session")
def pseudo(parity):
    return read(parity / "pseudo_label.npz")


@pytest.fixture(scope="session")
def tiny(parity):
    return read(parity / "mbhrnet_tiny.npz")


@pytest.fixture(scope="session")
def network(tiny):
    """Makes the original's tiny MBHRNet, in eval mode, with the weights `prefix`/... of an archive (its own where None)."""
    def make(arrays=None, prefix="state/"):
        model = mbhrnet(len(AP10K), width=8, modules=(1, 1, 1), blocks=1)
        load_weights(model, {name.removeprefix(prefix): t for name, t in (arrays or tiny).items() if name.startswith(prefix)})
        return model.eval()
    return make
