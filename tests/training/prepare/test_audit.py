"""The audit: numbers against a straightforward count, bad samples, stopping and going on, bounded memory."""

import collections
import io
import itertools
import json
import os
import sys
import time

import numpy as np
import pytest
from PIL import Image

from pyramidclip_hf import PyramidCLIPTokenizer
from tests.training.prepare.small_data import (
    FEATURES,
    make_sample,
    picture,
    problems,
    run_step,
    write_shards,
    write_tar,
)
from training.data.shard_index import index_path, load_index
from training.data.shards import ShardReader, ShardWriter
from training.data.sources import open_data_set
from training.prepare import audit as module
from training.prepare import pack
from training.prepare.audit import audit, main
from training.prepare.auditing.counts import AuditCounts, RepeatCounter
from training.prepare.auditing.drawing import draw
from training.prepare.auditing.report import as_text, summarise

TEXTS = {"caption": lambda n: ["a red fox", "A  red fox", f"picture {n}"][n % 3], "long": " ".join(["word"] * 90)}


def spoil(number):
    """Captions that repeat but for case and blanks; every tenth too long; sizes that differ."""

    def change(members):
        text = TEXTS["long"] if number % 10 == 9 else TEXTS["caption"](number)
        file = io.BytesIO()
        Image.new("RGB", (40 * (1 + number % 4), 90)).save(file, "PNG")
        return {**{k: v for k, v in members.items() if k != "jpg"}, "png": file.getvalue(), "txt": text.encode()}

    return change


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    bad = {3: lambda m: {**m, "jpg": m["jpg"][:300]}, 17: lambda m: {**m, "txt": b" "}}
    changes = {n: spoil(n) for n in range(30)} | bad
    return write_shards(tmp_path_factory.mktemp("data") / "scenes", range(30), spoil=changes)


def tags_of(sample):
    """As training takes them: the names of the regions, most confident first."""
    ranked = sorted(sample.regions or (), key=lambda region: -region.score)
    return [f"red {region.label}" for region in ranked] or sample.tags


def audited(shards, **options):
    sources = [open_data_set(str(shards))]
    tally, repeats = audit(sources, progress=False, **options)
    return summarise(sources, tally, repeats, 8), tally


def test_numbers_equal_a_straightforward_count(shards):
    report, tally = audited(shards)
    good = [n for n in range(30) if n not in (3, 17)]
    samples = {n: make_sample(n) for n in good}
    texts = {
        "caption": [TEXTS["long"] if n % 10 == 9 else TEXTS["caption"](n) for n in good],
        "summary": [samples[n].summary for n in good if samples[n].summary],
        "tags": [", ".join(tags_of(samples[n])) for n in good if samples[n].tags],
    }
    tokenizer = PyramidCLIPTokenizer()
    for level, there in texts.items():
        ids = [tuple(tokenizer(text, truncation=True, max_length=77)["input_ids"]) for text in there]
        found = report["texts"][level]
        assert found["texts"] == len(there) and found["exact"]
        assert found["repeated"] == pytest.approx(1 - len(set(ids)) / len(ids))
        assert found["mean_tokens"] == pytest.approx(np.mean([len(row) for row in ids]))
    assert report["texts"]["caption"]["truncated"] == pytest.approx(sum(n % 10 == 9 for n in good) / len(good))
    assert report["texts"]["tags"]["truncated"] == 0
    assert ["a red fox", sum(n % 3 == 0 and n % 10 != 9 for n in good)] in report["texts"]["caption"]["most_frequent"]
    has = {
        "summary": lambda s: s.summary is not None,
        "tags": lambda s: s.tags is not None,
        "regions": lambda s: s.roi is not None,
    }
    for first, second in itertools.product(has, has):
        share = np.mean([has[first](s) and has[second](s) for s in samples.values()])
        i, j = report["levels"].index(first), report["levels"].index(second)
        assert report["both_present"][i][j] == pytest.approx(share)
    widths = collections.Counter(40 * (1 + n % 4) for n in good)
    sides = dict(zip(report["shorter_side"]["edges"], report["shorter_side"]["counts"]))
    assert sides[32] == widths[40] and sides[64] == sum(widths.values()) - widths[40]
    assert sum(report["aspect"]["counts"]) == len(good) == sum(c["samples"] for c in report["combinations"])
    assert report["regions"]["feature_widths"] == {FEATURES: sum(s.roi is not None for s in samples.values())}
    assert report["samples"] == 30 == tally.samples


def test_bad_samples_are_named(shards):
    report, tally = audited(shards)
    assert report["bad"] == {"count": 2, "reasons": {"bad-picture": 1, "no-caption": 1}}
    assert [(key, reason) for key, _, reason, _ in tally.bad] == [("0003", "bad-picture"), ("0017", "no-caption")]
    text = as_text(report, tally.bad)
    assert "part-000.tar: 0003: bad-picture" in text and "Bad samples: 2 of 30 (6.67%)" in text


def test_two_processes_count_the_same(shards):
    one, _ = audited(shards)
    two, _ = audited(shards, workers=2)
    assert json.dumps(one, sort_keys=True) == json.dumps(two, sort_keys=True)


def test_results_count_in_the_order_of_the_units(shards, tmp_path, monkeypatch):
    """And not in that of the processes that come first: sums of floats would differ in their last place."""
    audit_unit, saved = module.audit_unit, []

    def slow_at_first(data, unit, *rest):
        time.sleep(0.5 if unit is data.units[0] else 0)
        return audit_unit(data, unit, *rest)

    monkeypatch.setattr(module, "audit_unit", slow_at_first)
    monkeypatch.setattr(module, "save_part", lambda path, *_: saved.append(path))
    audited(shards, workers=2, parts=tmp_path)
    units = open_data_set(shards).units
    assert len(units) == 4 and saved == [module.part_path(tmp_path, unit, module.AS_BY_DEFAULT) for unit in units]


def test_continues_where_it_was_stopped(shards, tmp_path, monkeypatch):
    calls, audit_unit = [], module.audit_unit

    def stopped(data, unit, *rest):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(unit.name)
        return audit_unit(data, unit, *rest)

    monkeypatch.setattr(module, "audit_unit", stopped)
    with pytest.raises(KeyboardInterrupt):
        audited(shards, parts=tmp_path / "parts")
    monkeypatch.setattr(
        module, "audit_unit", lambda data, unit, *rest: calls.append(unit.name) or audit_unit(data, unit, *rest)
    )
    report, tally = audited(shards, parts=tmp_path / "parts")
    assert len(calls) == len(set(calls)) == 4
    monkeypatch.undo()
    expected, expected_tally = audited(shards)
    assert report == expected and tally.bad == expected_tally.bad
    assert AuditCounts.loads(tally.dumps()) == tally


def test_repeats_are_estimated_in_bounded_memory():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 60_000, np.uint64)[rng.zipf(1.3, 200_000) % 60_000]
    exact, bounded = RepeatCounter(), RepeatCounter(limit=20_000)
    for part in np.array_split(hashes, 50):
        exact.add(part)
        bounded.add(part)
        assert bounded._kept <= 20_000
    truth = 1 - len(np.unique(hashes)) / len(hashes)
    assert exact.result(10)["repeated"] == pytest.approx(truth) and exact.result(10)["exact"]
    # Texts that are not frequent, where sampling by hash says something.
    pairs = np.repeat(rng.integers(0, 2**63, 100_000, np.uint64), rng.integers(1, 4, 100_000))
    bounded = RepeatCounter(limit=20_000)
    bounded.add(pairs)
    assert not bounded.result(10)["exact"]
    assert bounded.result(10)["repeated"] == pytest.approx(1 - 100_000 / len(pairs), abs=0.02)


def test_twins_in_a_batch_as_in_drawn_batches():
    rng = np.random.default_rng(1)
    hashes = rng.integers(0, 300, 2000).astype(np.uint64)
    counter = RepeatCounter()
    counter.add(hashes)
    drawn = []
    for _ in range(300):
        batch = rng.permutation(hashes)[:64]
        _, inverse, counts = np.unique(batch, return_inverse=True, return_counts=True)
        drawn.append((counts[inverse] > 1).mean())
    assert counter.result(64)["twin_in_batch"] == pytest.approx(np.mean(drawn), abs=0.01)


def test_command(shards, tmp_path, capsys):
    assert (
        main([str(shards), "--output-dir", str(tmp_path / "out"), "--workers", "1", "--batch-size", "8", "--json"]) == 0
    )
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out" / "audit.json").read_text())
    assert Image.open(tmp_path / "out" / "audit.png").size[0] > 1000
    assert "twin in a batch of 8" in (tmp_path / "out" / "audit.txt").read_text()
    lines = [json.loads(line) for line in (tmp_path / "out" / "bad-samples.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["0003", "0017"]
    assert not (tmp_path / "out" / "parts").exists()
    assert main([str(shards), "--workers", "1"]) == 0
    assert "Both present" in capsys.readouterr().out


def test_missing_matplotlib_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pyramidclip-hf\[eval\]"):
        draw({}, tmp_path / "x.png")


def test_a_damaged_header_is_told_by_pack_and_audit(tmp_path):
    samples = [(f"{i}", {"jpg": picture(i), "txt": b"words"}) for i in range(6)]
    path = write_tar(tmp_path / "in" / "0.tar", samples)
    data = bytearray(path.read_bytes())
    data[data.index(b"3.jpg\0") + 148] ^= 1
    path.write_bytes(data)
    run_step(pack, ["--input", tmp_path / "in", "--output_dir", tmp_path / "out"])
    assert (None, "truncated-shard") in [(key, reason) for _, key, reason, _ in problems(tmp_path / "out", "pack")]
    assert main([str(tmp_path / "in"), "--output-dir", str(tmp_path / "audit")]) == 0
    report = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert report["samples"] == 3 and report["bad"]["reasons"] == {"truncated-shard": 1}


def test_checksums_on_demand_find_later_damage_in_a_tar_of_others(tmp_path, capsys):
    samples = [(f"{i}", {"jpg": picture(i), "txt": b"words"}) for i in range(4)]
    path = write_tar(tmp_path / "in" / "0.tar", samples)
    assert main([str(tmp_path / "in"), "--json"]) == 0
    assert ShardReader(path).index.sums is None
    assert main([str(tmp_path / "in"), "--add-checksums", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["bad"]["count"] == 0
    reader, stat = ShardReader(path), os.stat(path)
    assert reader.index.sums.all()
    at = reader.index.spans[2, reader.index.suffixes.index("txt"), 0]
    # As a disk does it: the file system knows of no change.
    text = next((tmp_path / "cache" / "indexes").iterdir())
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    text.write_text(
        text.read_text().replace(f'"ctime_ns": {stat.st_ctime_ns}', f'"ctime_ns": {os.stat(path).st_ctime_ns}')
    )
    assert main([str(tmp_path / "in"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bad"]["reasons"] == {"damaged-member": 1}


def test_an_index_that_differs_from_its_tar_where_opening_does_not_look_is_told(tmp_path, capsys):
    """A sample of three members, of which the index knows two."""
    with ShardWriter(tmp_path / "0.tar") as writer:
        for i in range(40):
            writer.write_members(f"{i}", {"jpg": picture(i), "txt": b"words", "json": b"{}"})
    index = load_index(tmp_path / "0.tar")
    index.spans[20, index.suffixes.index("json")] = (-1, -1)
    index_path(tmp_path / "0.tar").write_text(index.dumps())
    assert main([str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bad"]["reasons"] == {"stale-index": 1}
