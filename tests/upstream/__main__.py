"""Runs transformers' own common test mixins against these classes: `make test-upstream`, or

    python -m tests.upstream [pytest arguments]

A complete run (no arguments) that passes also writes `SKIPPED.md`: what was skipped, how often, and why.
The mixins are in transformers' source distribution on PyPI. It lacks three modules that they import; the shims written
here stand in, without any test of their own. Nothing of the distribution is kept in this repository.
"""

import collections
import re
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


class SkipReasons:
    """A pytest plugin that counts outcomes and keeps the reason of each skip."""

    def __init__(self):
        self.outcomes = collections.Counter()
        self.tests = collections.defaultdict(set)

    def pytest_runtest_logreport(self, report):
        if hasattr(report, "context"):  # a subtest; its test is counted
            return
        if report.when == "call" or report.skipped:
            self.outcomes[report.outcome] += 1
        if report.skipped:
            reason = report.longrepr[2].removeprefix("Skipped: ").partition("\n")[0]
            test = re.sub(r"_\d\d?_.*", "_*", report.nodeid.rpartition("::")[2])
            self.tests[reason].add(test)

    def write(self, path: Path) -> None:
        """The list, most tests first."""
        lines = [
            f"# What transformers {transformers.__version__}'s common tests skip for these classes",
            "",
            f"Written by `make test-upstream`: {self.outcomes['passed']} passed, {self.outcomes['skipped']} skipped, "
            f"{self.outcomes['failed']} failed.",
            "Reasons in tests/upstream/suite_*.py are ours; all others are the mixins' own.",
            "",
            "| reason | tests |",
            "|---|---|",
        ]
        ours = "".join(suite.read_text() for suite in Path(__file__).parent.glob("suite_*.py"))
        for reason, tests in sorted(self.tests.items(), key=lambda entry: (entry[0] not in ours, entry[0])):
            whose = "ours: " if reason in ours else ""
            lines.append(f"| {whose}{reason.replace('|', '/')} | {', '.join(sorted(tests))} |")
        path.write_text("\n".join(lines) + "\n")


def main() -> int:
    """Fetches the mixins and hands over to pytest."""
    sys.path[:0] = [str(fetch_mixins()), str(CHECKOUT)]
    suites = sorted(str(path) for path in Path(__file__).parent.glob("suite_*.py"))
    # The mixins use markers of their own, which --strict-markers would refuse.
    options = ["-q", "-p", "no:cacheprovider", "--override-ini=addopts=--import-mode=importlib", "-W", "ignore"]
    reasons = SkipReasons()
    code = pytest.main([*options, *suites, *sys.argv[1:]], plugins=[reasons])
    if code == 0 and len(sys.argv) == 1:
        reasons.write(Path(__file__).with_name("SKIPPED.md"))
    return code


if __name__ == "__main__":
    sys.exit(main())
