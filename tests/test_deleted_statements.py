"""`python -m tests.deleted_statements` on two statements of which it is known what becomes of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deleted_statements import statements

CHECKOUT = Path(__file__).resolve().parent.parent


def test_what_can_be_deleted():
    source = 'def double(x):\n    """Twice x."""\n    y = 2 * x\n    if y:\n        raise ValueError\n    return y\n'
    assert statements(source) == [(3, 3, "y = 2 * x"), (5, 5, "raise ValueError"), (6, 6, "return y")]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_one_is_missed_and_one_is_not_reached(tmp_path):
    """The tour's tests read first sentences, and never call its `main`."""
    texts = {"lines = [HEAD]": "missed", "sys.stdout.write(tour())": "not reached"}
    lines = {line: text for line, _, text in statements((CHECKOUT / "tests/tour.py").read_text()) if text in texts}
    words = ["tests/tour.py", "--tests", "tests/test_tour.py", "--output", str(tmp_path), "--lines", *map(str, lines)]
    subprocess.run([sys.executable, "-m", "tests.deleted_statements", *words], cwd=CHECKOUT, check=True)
    found = map(json.loads, (tmp_path / "mutants.jsonl").read_text().splitlines())
    assert {one["statement"]: one["outcome"] for one in found} == texts
