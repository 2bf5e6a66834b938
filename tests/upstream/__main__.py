"""Runs transformers' own common test mixins against these classes: `make test-upstream`, or

    python -m tests.upstream [pytest arguments]

The mixins are in transformers' source distribution on PyPI. It lacks three modules that they import; the shims written
here stand in, without any test of their own. Nothing of the distribution is kept in this repository.
"""

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
import transformers
from PIL import Image

CHECKOUT = Path(__file__).resolve().parents[2]
CACHE = CHECKOUT / ".cache" / f"transformers-tests-{transformers.__version__}"

SHIMS = {
    "__init__.py": "",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    '''torch.export has tests of our own.'''\n",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    '''No class here generates text.'''\n",
    "utils/__init__.py": "",
    "utils/test_configuration_utils.py": (
        "config_common_kwargs = {'return_dict': False, 'output_hidden_states': True, 'dtype': 'float16',\n"
        "    'chunk_size_feed_forward': 3, 'architectures': ['Model'], 'problem_type': 'regression',\n"
        "    'id2label': {0: 'a', 1: 'b', 2: 'c'}, 'label2id': {'a': 0, 'b': 1, 'c': 2}}\n"
    ),
}
# The mixins name pictures on the Hub; one drawn here stands in for each.
LOCAL_PICTURES = (
    "from pathlib import Path\n\n\ndef url_to_local_path(url):\n    return str(Path(__file__).with_name('any.png'))\n"
)


def fetch_mixins() -> Path:
    """A folder whose package `transformers_tests` holds the mixins; downloads once."""
    package = CACHE / "transformers_tests"
    if (package / "test_modeling_common.py").exists():
        return CACHE
    with tempfile.TemporaryDirectory() as folder:
        wanted = f"transformers=={transformers.__version__}"
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--no-binary",
            ":all:",
            "-d",
            folder,
            wanted,
        ]
        subprocess.run(command, check=True)
        (archive,) = Path(folder).glob("*.tar.gz")
        package.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as tar:
            for member in tar.getmembers():
                parts = Path(member.name).parts
                if member.isfile() and len(parts) == 3 and parts[1] == "tests":
                    (package / parts[2]).write_bytes(tar.extractfile(member).read())
    for name, text in SHIMS.items():
        (package / name).parent.mkdir(exist_ok=True)
        (package / name).write_text(text)
    Image.new("RGB", (64, 48), (200, 30, 90)).save(CACHE / "any.png")
    (CACHE / "fetch_hub_objects_for_ci.py").write_text(LOCAL_PICTURES)
    return CACHE


def main() -> int:
    """Fetches the mixins and hands over to pytest."""
    sys.path[:0] = [str(fetch_mixins()), str(CHECKOUT)]
    suites = sorted(str(path) for path in Path(__file__).parent.glob("suite_*.py"))
    # The mixins use markers of their own, which --strict-markers would refuse.
    options = ["-q", "-p", "no:cacheprovider", "--override-ini=addopts=--import-mode=importlib", "-W", "ignore"]
    return pytest.main([*options, *suites, *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
