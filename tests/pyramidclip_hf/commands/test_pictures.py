"""Which pictures the words of a command mean, and reading them ahead of the model."""

import errno
import os
import tarfile
import time
from collections import Counter

import pytest
from PIL import Image, features

from pyramidclip_hf.picture_files import characters_that_lack, find_pictures, read_ahead, told_passed_over, unseen_file
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


def test_pictures_inside_of_shards(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, data in (("b.jpg", b"1"), ("b.txt", b"text"), ("a/c.png", b"2")):
            (tmp_path / "member").write_bytes(data)
            tar.add(tmp_path / "member", name)
    Image.new("RGB", (9, 9)).save(tmp_path / "z.jpg")
    shard, counted = str(tmp_path / "0.tar"), Counter()
    inside = [f"{shard}/b.jpg", f"{shard}/a/c.png"]
    for words in ([shard], [str(tmp_path / "*.tar")], ["-"]):
        assert find_pictures(words, [shard], shards=True) == inside
    assert find_pictures([str(tmp_path)], (), counted, shards=True) == [*inside, str(tmp_path / "z.jpg")]
    assert counted == {"": 1} and find_pictures([str(tmp_path)]) == [str(tmp_path / "z.jpg")]
    assert unseen_file(inside) is None and unseen_file([*inside, f"{shard[:-5]}1.tar/a.jpg"]) == f"{shard[:-5]}1.tar"
    assert unseen_file(["no.jpg", str(tmp_path / "z.jpg")]) is None and unseen_file(["no.jpg", "nor.jpg"]) == "no.jpg"
    (tmp_path / "0.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:700])
    with pytest.raises(ValueError, match=f"{shard}: is no uncompressed tar, or ends in the middle"):
        find_pictures([shard], shards=True)


def test_links_to_folders_are_followed_once_each(tmp_path):
    for name in ("data/own", "elsewhere/deep"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / name / "x.png")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "data")
    expected = [str(tmp_path / "data" / name / "x.png") for name in ("link/deep", "own")]
    assert find_pictures([str(tmp_path / "data")]) == expected


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch, capsys, model_dir):
    """Root may read all, so that the refusal is made up here."""
    for name in ("open", "shut"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (9, 9)).save(tmp_path / name / "x.png")
    scan = os.scandir

    def refusing(path):
        if str(path).endswith("shut"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    code, out, err = run(capsys, "classify", "--model", model_dir, tmp_path, "--labels", "cat", "dog")
    assert (code, out) == (2, "") and err == f"error: {tmp_path / 'shut'}: Permission denied\n"


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


def test_what_is_passed_over_is_counted_by_ending_with_the_reason(tmp_path, capsys, model_dir):
    for name in ("A.JPG", "b.heic", "c.HEIC", "noext", "d.txt", ".hidden.heic"):
        Image.new("RGB", (9, 9)).save(tmp_path / name, "JPEG")
    counted = Counter()
    assert find_pictures([str(tmp_path)], passed_over=counted) == [str(tmp_path / "A.JPG")]
    assert counted == {".heic": 2, "": 1, ".txt": 1}
    expected = "passed over: 2 .heic, 1 .txt, 1 without an ending; .heic: Pillow has no reader of its own"
    assert told_passed_over(Counter({".heic": 2, ".txt": 1, "": 1})).startswith(expected)
    code, out, err = run(capsys, "classify", "--model", model_dir, tmp_path, "--labels", "cat", "--quiet")
    assert code == 0 and out.count("\n") == 1 and "passed over: 2 .heic" in err and "pillow-heif" in err
    (tmp_path / "A.JPG").unlink()
    code, out, err = run(capsys, "classify", "--model", model_dir, tmp_path, "--labels", "cat")
    assert code == 2 and "passed over: 2 .heic" in err


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow was built without AVIF")
def test_avif_is_read(tmp_path, capsys, model_dir):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.avif")
    code, out, _ = run(capsys, "classify", "--model", model_dir, tmp_path, "--labels", "cat")
    assert code == 0 and out.startswith(str(tmp_path / "a.avif"))
    code, _, err = run(
        capsys, "classify", "--model", model_dir, tmp_path, "--labels", "cat", "--max-image-pixels", "1599"
    )
    assert code == 3 and "1599; make it smaller" in err


def test_characters_that_the_font_of_a_sheet_lacks():
    """Pillow's own has the letters of ASCII and few more."""
    assert characters_that_lack(["a red fox, 'quoted': 50% & more/less_(1).jpg"]) == ""
    assert characters_that_lack(["狐 a fox, 狐狸"]) == "狐狸"
