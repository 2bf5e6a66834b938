"""What every test shares: one thread a process, no network, and the material beside the checkout.

Environment variables are set before torch or transformers can be imported; subprocesses inherit them.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

# The test workers already use every core; more threads only make them wait for each other.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
# Trainings here are trainings on the CPU; what a GPU does is measured by `make gpu`.
os.environ.setdefault("ACCELERATE_USE_CPU", "true")


def pytest_configure(config):
    """A test is about the CPU and sees no GPU, or is marked `gpu`, and then runs by `pytest -m gpu`.

    On a machine with a GPU each default would take it, and a first backward pass starts threads for it, after which no
    process can be forked.
    """
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


# Inductor's cache does not ask for which instructions a kernel was compiled: run under others, it ends the process.
if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    cache = Path(tempfile.gettempdir(), f"pyramidclip-inductor-{capability}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))

# Nothing is fetched from a hub and nothing is left in the user's caches. A test with a server of its own lifts the
# offline switch in the process that talks to it.
for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ.setdefault(variable, "1")

CHECKOUT = Path(__file__).resolve().parent.parent
SHARED = CHECKOUT.parent / "shared"

# Last, so that an installed pyramidclip_hf comes before the checkout's; conversion, training and tests are only here.
sys.path.append(str(CHECKOUT))


def one_thread():
    """What threads compute is not there in a forked process: whoever asks OpenMP for them waits for ever."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


os.register_at_fork(after_in_child=one_thread)


# A Hugging Face home for each test process. Made here and not in a hook: the conftest of a folder that was named on the
# command line imports huggingface_hub, which reads the variable then, before any hook runs.
HUGGING_FACE_HOME = tempfile.mkdtemp(prefix="pyramidclip-tests-")
os.environ["HF_HOME"] = HUGGING_FACE_HOME


def pytest_unconfigure(config):
    """Removes that home again."""
    shutil.rmtree(HUGGING_FACE_HOME, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def forking_stays_possible():
    """A first backward pass. After torch.compile or torch.export it would start threads, and then no test of this
    process could fork training processes any more."""
    import torch

    torch.ones(1, requires_grad=True).sum().backward()


def _shared_folder(*parts):
    folder = SHARED.joinpath(*parts)
    if not folder.is_dir():
        pytest.skip(f"needs {Path('..', 'shared', *parts)} beside the checkout")
    return folder


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The folder that holds setup.cfg."""
    return CHECKOUT


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """`../shared`; skips where it is absent."""
    return _shared_folder()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """`../shared/data`, vocabularies and sample files that are not committed; skips where it is absent."""
    return _shared_folder("data")
