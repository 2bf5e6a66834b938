"""Which pictures the words of a command mean, and reading them ahead of the model."""

import time

import pytest

from pyramidclip_hf.picture_files import find_pictures, read_ahead
from tests.pyramidclip_hf.commands.plain import BROKEN, good_ones, run


def test_folders_globs_files_and_stdin(pictures, monkeypatch):
    everything = good_ones(pictures) | {str(pictures / name) for name in BROKEN}
    assert set(find_pictures([str(pictures)])) == everything
    in_a = {str(pictures / name) for name in ("a/red.png", "a/green.webp", "a/noise.PNG")}
    assert set(find_pictures([str(pictures / "a")])) == in_a
    assert find_pictures([str(pictures / "*.jpg")]) == [str(pictures / "blue.jpg")]
    assert set(find_pictures([str(pictures / "**" / "*.jpg")])) == {path for path in everything if path.endswith("jpg")}
    # Named outright, a file counts whatever it is called, and each counts once.
    named = [str(pictures / "notes.txt"), str(pictures / "blue.jpg")]
    assert find_pictures([*named, str(pictures / "*.jpg")]) == named
    assert find_pictures(["-", named[1]], ["with space.jpg\n", "\n", f"{named[1]}\r\n"]) == ["with space.jpg", named[1]]
    assert find_pictures([str(pictures)]) == find_pictures([str(pictures)])


@pytest.mark.parametrize("missing", ["no/such/folder", "nothing-*.jpg"])
def test_what_is_not_there_is_an_error(missing, pictures, capsys, model_dir):
    code, out, err = run(capsys, "classify", "--model", model_dir, pictures / missing, "--labels", "cat")
    assert (code, out) == (2, "") and missing in err and err.count("\n") == 1


def test_reading_ahead_keeps_the_order_and_its_bound():
    begun, seen = [], []

    def read(item):
        begun.append(item)
        time.sleep(0.02 if item == "0" else 0)
        return int(item) ** 2

    for item, value in read_ahead(map(str, range(50)), read, workers=4, ahead=8):
        assert len(begun) <= len(seen) + 8 + 2
        seen.append((item, value))
    assert seen == [(str(number), number**2) for number in range(50)]
