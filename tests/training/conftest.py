"""What several tests of training share."""

import pytest
import torch

from tests.training.runs import MODEL_CONFIG
from tests.training.to_evaluate import COUNTS, write_pictures
from training.linear_probe import LinearProbeArguments
from training.loop.initial_model import named_model


@pytest.fixture(scope="module")
def one_thread():
    """As forked processes have: a run that is continued with other threads is not bit-equal."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("model"))
    for part in named_model("ViT-B-32", MODEL_CONFIG, 0):
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def probe_args(tmp_path, tiny_model_folder):
    train, test = (write_pictures(tmp_path / name, COUNTS, seed) for seed, name in enumerate(("train", "test")))
    return LinearProbeArguments(
        model=tiny_model_folder, train_data=train, test_data=test, cache_dir=str(tmp_path / "cache"), cpu=True,
        batch_size=5,
        output=str(tmp_path / "probe.json"), validation_fraction=0.25,
    )  # fmt: skip
