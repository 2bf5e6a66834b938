"""The samples of a data set in a fixed order, whatever string names it; what is refused."""

import pytest

from tests.training.prepare.small_data import Served, picture
from training.data.records import Sample
from training.data.samples import ShardSamples
from training.data.shards import ShardWriter, write_dataset_json


@pytest.fixture
def folder(tmp_path):
    """Eight samples in shards of three: part-0.tar, part-1.tar, part-2.tar."""
    folder = tmp_path / "data"
    for number in range(3):
        with ShardWriter(folder / f"part-{number}.tar") as writer:
            for i in range(3 * number, min(3 * number + 3, 8)):
                writer.write(Sample(f"k{i}", picture(i), "jpg", caption=f"text {i}"))
    write_dataset_json(folder, {}, None, {})
    return folder


def captions(data):
    return [sample.caption for sample in ShardSamples(str(data))]


TEXTS = [f"text {i}" for i in range(8)]


def test_samples_in_order_over_shards(folder):
    assert captions(folder) == TEXTS
    samples = ShardSamples(str(folder), 5)
    assert len(samples) == 5 and samples[4].key == "k4"
    assert [sample.key for sample in samples[1:4]] == ["k1", "k2", "k3"]
    with pytest.raises(IndexError, match="sample 5 of .*, which has 5"):
        samples[5]


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [("part-*.tar", 0, 8), ("part-[12].tar", 3, 8), ("part-{0..1}.tar", 0, 6), ("part-2.tar", 6, 8)],
)
def test_globs_and_ranges_as_in_training(folder, name, first, last):
    assert captions(folder / name) == TEXTS[first:last]


def test_a_list_keeps_its_order(folder, tmp_path):
    listing = tmp_path / "some.txt"
    listing.write_text(f"# the last and the first\n{folder}/part-2.tar\n\ndata/part-0.tar\n")
    assert captions(listing) == TEXTS[6:] + TEXTS[:3]
    listing.write_text("data/part-{0..2}.tar\n")
    assert captions(listing) == TEXTS


def test_a_tar_of_any_name(folder):
    (folder / "part-0.tar").rename(folder / "scenes")
    assert captions(folder / "scenes") == TEXTS[:3]


@pytest.mark.loopback
def test_urls(folder, tmp_path):
    with Served(folder) as served:
        assert captions(served.url) == TEXTS
        assert captions(f"{served.url}/part-1.tar") == TEXTS[3:6]
        assert captions(f"{served.url}/part-{{0..2}}.tar") == TEXTS
        (tmp_path / "mixed.txt").write_text(f"{served.url}/part-1.tar\ndata/part-0.tar\n")
        assert captions(tmp_path / "mixed.txt") == TEXTS[3:6] + TEXTS[:3]


def test_many_shards_are_not_open_at_a_time(folder, monkeypatch):
    monkeypatch.setattr("training.data.samples._OPEN_UNITS", 1)
    samples = ShardSamples(str(folder))
    first = samples._reader(0)
    assert samples._reader.cache_info().currsize == 1
    assert [sample.caption for sample in samples] == TEXTS
    assert samples._reader.cache_info().currsize == 1
    assert first.read(0)  # who still holds one can read


def test_a_caption_without_a_picture_is_refused(tmp_path):
    with ShardWriter(tmp_path / "a.tar") as writer:
        writer.write_members("k0", {"txt": b"a text"})
    with pytest.raises(ValueError, match="'k0': no-image.*caption without a picture"):
        ShardSamples(str(tmp_path))[0]
    manifest = tmp_path / "pairs.jsonl"
    manifest.write_text('{"image": "3.png", "caption": "a text"}\n')
    with pytest.raises(ValueError, match="'3.png': no-image.*caption without a picture"):
        ShardSamples(str(manifest))[0]


def test_missing_data_says_what_is_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere.*shards \(\*.tar.*sub-folder of pictures"):
        ShardSamples(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="has no shards"):
        ShardSamples(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        # Where one of several is missing, a score would be over fewer samples than were named.
        ("part-{0..3}.tar", FileNotFoundError, "names .*part-3.tar, which is not there"),
        ("part-9*.tar", FileNotFoundError, "no folder or file .*part-9.*expected a folder with"),
        ("part-{2..0}.tar", ValueError, "range {2..0} is empty, expected the smaller number first"),
        ("part-{0..999999999}.tar", ValueError, "stands for more shards than the 1,000,000 that a data set may have"),
        ("many.txt", ValueError, "part-{0..1000}-{000..999}.tar: stands for more shards than the 1,000,000"),
        ("part-0*", ValueError, "also matches .*part-0.tar.index.json, which is no tar"),
        ("../d*", ValueError, "also matches .*data, which is a folder: expected a glob of tars"),
        ("missing.txt", FileNotFoundError, "no list of shards at .*missing.txt"),
        ("gone.txt", FileNotFoundError, "1 of 2 tars are not there, first .*part-7.tar; expected one tar, path or URL"),
        ("empty.txt", ValueError, "empty.txt lists nothing; expected one tar"),
        ("twice.txt", ValueError, "twice.txt names .*part-0.tar twice; here every sample counts once"),
        ("empty.jsonl", ValueError, "has no lines"),
    ],
)
def test_names_that_are_not_clear(folder, name, error, message):
    (folder / "gone.txt").write_text("part-0.tar\npart-7.tar\n")
    (folder / "empty.txt").write_text("# nothing yet\n")
    (folder / "many.txt").write_text("part-{0..1000}-{000..999}.tar\n")
    (folder / "twice.txt").write_text("part-0.tar\npart-1.tar\npart-0.tar\n")
    (folder / "empty.jsonl").write_text("\n")
    with pytest.raises(error, match=message):
        ShardSamples(f"{folder}/{name}")


def test_a_star_behind_a_url():
    with pytest.raises(ValueError, match=r"a URL takes a range, as in {00000..00099}.tar, but no \*"):
        ShardSamples("https://host.invalid/part-*.tar")
