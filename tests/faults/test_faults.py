"""The table of faults: a few each time, all of them with `make test-faults`, and the page that says how many."""

from pathlib import Path

import pytest

from tests.faults.page import PAGE, page, read_counts
from tests.faults.suite import Suite


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    return Suite(tmp_path_factory.mktemp("faults"))


def written(suite: Suite, name: str) -> int:
    """The number of the first operation on a file or folder of that name."""
    return next(number for number, (_, path) in enumerate(suite.operations, 1) if Path(path).name == name)


def test_killed_while_a_checkpoint_is_complete_and_not_in_its_place(suite: Suite) -> None:
    number = next(n for n, (event, path) in enumerate(suite.operations, 1) if event == "os.rename" and "step-" in path)
    assert suite.kill(number) == "continued to the same bits"


def test_killed_while_the_log_is_made(suite: Suite) -> None:
    """What lay beside it then was never removed."""
    number = next(n for n, (_, path) in enumerate(suite.operations, 1) if path.startswith(".metrics.jsonl"))
    assert suite.kill(number + 1) == "continued to the same bits"


def test_no_room_for_the_optimizer_of_a_checkpoint(suite: Suite) -> None:
    assert suite.fill(written(suite, "optimizer.pt")) == "continued to the same bits"


def test_a_flipped_bit_in_a_checkpoint(suite: Suite) -> None:
    assert suite.flip(0).startswith("found")


def test_the_page_is_that_of_its_figures(suite: Suite) -> None:
    """What became of all faults that there are here, the long test below compares."""
    text, jobs = PAGE.read_text(encoding="utf-8"), suite.jobs()
    counts = read_counts(text)
    assert page(counts, len(jobs)) == text
    for kind in ("kill", "fill", "flip"):
        done = sum(times for (one, _), times in counts.items() if one == kind)
        assert 0 < done <= sum(one == kind for one, _ in jobs)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["kill", "fill", "flip"])
def test_every_fault_ends_as_the_page_says(suite: Suite, kind: str) -> None:
    found = {suite.do(job) for job in suite.jobs() if job[0] == kind}
    assert found == {end for one, end in read_counts(PAGE.read_text(encoding="utf-8")) if one == kind}
