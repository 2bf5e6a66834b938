"""docs/tour.md against the files it lists, and what `tests.tour` makes of docstrings and imports."""

import subprocess

import pytest

from tests import tour


@pytest.fixture(scope="module")
def tracked():
    try:
        return tour.tracked_files()
    except subprocess.CalledProcessError:
        pytest.skip("needs a git checkout")


def test_the_tour_is_what_the_files_say(tracked):
    assert tour.PAGE.read_text(encoding="utf8") == tour.tour(), "run `python -m tests.tour --write`"


def test_every_file_says_what_it_is(tracked):
    filled = [name for name in tracked if (tour.CHECKOUT / name).stat().st_size or name in tour.DESCRIPTIONS]
    assert not [name for name in filled if not tour.description(name)]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Draws it. Then more.\n\nAnd more.", "Draws it"),
        ("Two lines\nof one sentence.", "Two lines of one sentence"),
        ("Gradient caching (Gao et al. 2021), exactly. More.", "Gradient caching (Gao et al. 2021), exactly"),
        ("Writes `a.md`, in version 1.2 too: see there.", "Writes `a.md`, in version 1.2 too: see there"),
        ("Measures: python -m tests.bench", "Measures"),
    ],
)
def test_first_sentences(text, sentence):
    assert tour.first_sentence(text) == sentence


def test_a_module_stands_below_what_it_imports(tracked):
    ordered = tour.in_reading_order([name for name in tracked if name.rpartition("/")[0] == "pyramidclip_hf"])
    first, *rest = (name.rpartition("/")[2].removesuffix(".py") for name in ordered)
    assert first == "__init__"
    assert rest.index("configuration_pyramidclip") < rest.index("loss_pyramidclip") < rest.index("modeling_pyramidclip")
    assert rest.index("modeling_pyramidclip") < rest.index("explain")


def test_folders_follow_the_readme(tracked):
    tree = {"a": "", "a/b": "", "c": ""}
    assert tour.folders_in_order({"", "c", "c/x", ".ci", "a/b/y", "a/b", "a/z", "a"}, tree) == [
        "", "a", "a/z", "a/b", "a/b/y", "c", "c/x", ".ci",
    ]  # fmt: skip
