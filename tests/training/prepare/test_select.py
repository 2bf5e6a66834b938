"""`training.prepare.select`: every rule against a plain loop over all samples; bytes, counts, continuing, bad input."""

import io
import json
import math
import random
import re
from collections import Counter
from dataclasses import fields

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.training.prepare.small_data import (
    counts,
    picture,
    problems,
    read_tars,
    run_step,
    tree,
    write_jsonl,
    write_pictures,
    write_shards,
    write_tar,
)
from training.data.shards import read_dataset_json
from training.data.sources import open_data_set
from training.prepare import select
from training.prepare.selecting.reading import KINDS, read_rules

TEXTS = [
    "a cat",
    "two dogs on a beach",
    "IMG_0012.jpg",
    "12345 67",
    "set 12",
    "Set 13",
    "a long text of seven words here",
    "cat",
]


def rules_file(folder, rules, **rest):
    path = folder / "rules.yaml"
    path.write_text(yaml.safe_dump({"rules": rules, **rest}, sort_keys=False))
    return path


def run(source, output, rules, *flags, **rest):
    output.parent.mkdir(parents=True, exist_ok=True)
    words = ["--input", source, "--output-dir", output, "--rules", rules_file(output.parent, rules, **rest), *flags]
    return run_step(select, words)


def sized(number, width, height, form="JPEG"):
    return picture(number, (width, height), form)


@pytest.fixture
def pairs():
    """(key, members, similarity) of 60 pairs in which everything repeats that can."""
    draw = random.Random(3)
    found = []
    for number in range(60):
        side = draw.choice([8, 16, 32])
        data = sized(draw.randrange(40), side * draw.choice([1, 2, 5]), side, draw.choice(["JPEG", "PNG", "WEBP"]))
        similarity = draw.choice([0.25, 0.3, 0.3, 0.35, round(draw.random(), 3)])
        suffix = {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp"}[data[:2]]
        members = {
            suffix: data,
            "txt": draw.choice(TEXTS).encode(),
            "json": json.dumps({"similarity": similarity}).encode(),
        }
        if number % 7 == 6:
            members = found[draw.randrange(number)][1]
            similarity = json.loads(members["json"])["similarity"]
        found.append((f"k{number:02d}", members, similarity))
    return found


@pytest.fixture
def source(tmp_path, pairs):
    folder = tmp_path / "in"
    for number, start in enumerate((0, 7, 30, 41)):
        end = (7, 30, 41, 60)[number]
        write_tar(folder / f"{number:05d}.tar", [(key, members) for key, members, _ in pairs[start:end]])
    return folder


def chosen(folder):
    return sorted(read_tars(folder))


def header(members):
    (data,) = (data for suffix, data in members.items() if suffix in ("jpg", "png", "webp"))
    with Image.open(io.BytesIO(data)) as opened:
        return opened.format, *opened.size


def text(members):
    return members["txt"].decode()


def image(members):
    return next(data for suffix, data in members.items() if suffix in ("jpg", "png", "webp"))


PLAIN = {
    "words": ({"rule": "words", "at_least": 2, "at_most": 5}, lambda m, s: 2 <= len(text(m).split()) <= 5),
    "number": ({"rule": "number", "field": "similarity", "at_least": 0.3}, lambda m, s: s >= 0.3),
    "between": (
        {"rule": "number", "field": "similarity", "at_least": 0.1, "at_most": 0.3},
        lambda m, s: 0.1 <= s <= 0.3,
    ),
    "without": (
        {"rule": "pattern", "without": ["(?i)^set", "dog"]},
        lambda m, s: text(m)[:3].lower() != "set" and "dog" not in text(m),
    ),
    "only": ({"rule": "pattern", "only": ["cat", "dog"]}, lambda m, s: "cat" in text(m) or "dog" in text(m)),
    "names": ({"rule": "junk", "file_names": True}, lambda m, s: text(m) not in ("IMG_0012.jpg", "12345 67")),
    "digits": ({"rule": "junk", "digits_at_most": 0.35}, lambda m, s: text(m) not in ("12345 67", "set 12", "Set 13")),
    "side": ({"rule": "picture", "shortest_side": 16}, lambda m, s: min(header(m)[1:]) >= 16),
    "aspect": ({"rule": "picture", "aspect_at_most": 2}, lambda m, s: max(header(m)[1:]) <= 2 * min(header(m)[1:])),
    "formats": ({"rule": "picture", "formats": ["jpeg", "png"]}, lambda m, s: header(m)[0] != "WEBP"),
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_rule_on_each_sample_leaves_what_a_loop_leaves_byte_for_byte(name, source, pairs, tmp_path):
    rule, keeps = PLAIN[name]
    expected = {key: members for key, members, similarity in pairs if keeps(members, similarity)}
    assert 5 < len(expected) < 58
    run(source, tmp_path / "out", {"it": rule})
    assert read_tars(tmp_path / "out") == expected
    assert counts(tmp_path / "out", "select") == {
        "in": 60, "out": len(expected), "rejected": 60 - len(expected), "rejected_it": 60 - len(expected)
    }  # fmt: skip


@pytest.mark.parametrize("order", ["highest", "lowest"])
@pytest.mark.parametrize("best", [1, 20, 59, 60])
def test_the_best_over_all_shards_are_those_of_sorting(order, best, source, pairs, tmp_path):
    run(source, tmp_path / "out", {"it": {"rule": "number", "field": "similarity", "best": best, "order": order}})
    values = {key: similarity for key, _, similarity in pairs}
    kept = chosen(tmp_path / "out")
    ranked = sorted(values.values(), reverse=order == "highest")
    assert sorted((values[key] for key in kept), reverse=order == "highest") == ranked[:best]
    # Ties at the border are broken alike, however the shards are cut.
    write_tar(tmp_path / "one" / "whole.tar", [(key, members) for key, members, _ in reversed(pairs)])
    run(
        tmp_path / "one",
        tmp_path / "b" / "out",
        {"it": {"rule": "number", "field": "similarity", "best": best, "order": order}},
    )
    assert chosen(tmp_path / "b" / "out") == kept


def test_a_sample_has_its_number_and_hangs_on_the_seed_and_the_keys_alone(source, pairs, tmp_path):
    sample = {"it": {"rule": "sample", "number": 20}}
    run(source, tmp_path / "a" / "out", sample, seed=1)
    run(source, tmp_path / "b" / "out", sample, seed=2)
    write_tar(tmp_path / "one" / "whole.tar", [(key, members) for key, members, _ in reversed(pairs)])
    run(tmp_path / "one", tmp_path / "c" / "out", sample, seed=1)
    first, second, third = (chosen(tmp_path / name / "out") for name in "abc")
    assert len(first) == len(second) == 20 and first == third != second
    run(source, tmp_path / "d" / "out", {"it": {"rule": "sample", "share": 0.5}}, seed=1)
    assert set(first) <= set(chosen(tmp_path / "d" / "out")) or 15 < len(chosen(tmp_path / "d" / "out")) < 20


@pytest.mark.parametrize("of", ["caption", "picture", "pair", "letters"])
@pytest.mark.parametrize("take", ["rest", "all"])
def test_repeats_are_those_of_a_count(of, take, source, pairs, tmp_path):
    def compared(members):
        if of == "letters":
            return "".join(letter for letter in text(members).lower() if letter.isalpha() or letter == " ").strip()
        return {"caption": text(members), "picture": image(members), "pair": (text(members), image(members))}[of]

    most = {"caption": 3, "letters": 3}.get(of, 1)
    total, seen, expected = Counter(compared(members) for _, members, _ in pairs), Counter(), []
    for key, members, _ in pairs:
        value = compared(members)
        seen[value] += 1
        if not value or (total[value] <= most if take == "all" else seen[value] <= most):
            expected.append(key)
    run(source, tmp_path / "out", {"it": {"rule": "repeats", "of": of, "most": most, "take": take}})
    assert chosen(tmp_path / "out") == expected and len(expected) < 60


def test_what_is_in_another_data_set_goes(source, pairs, tmp_path):
    other = [(f"x{number}", members) for number, (_, members, _) in enumerate(pairs[5:60:9])]
    write_tar(tmp_path / "other" / "0.tar", other)
    foreign = {image(members) for _, members in other}
    expected = [key for key, members, _ in pairs if image(members) not in foreign]
    against = [str(tmp_path / "other")]
    run(source, tmp_path / "out", {"it": {"rule": "repeats", "of": "picture", "most": 60, "against": against}})
    assert chosen(tmp_path / "out") == expected and 10 < len(expected) < 54


def test_near_duplicates_within_and_against(tmp_path):
    pytest.importorskip("imagehash", reason='needs ImageHash: pip install -e ".[select]"')
    rng = np.random.default_rng(1)
    originals = [
        Image.fromarray(rng.integers(0, 255, (9, 12, 3), np.uint8)).resize((240, 180), Image.Resampling.BICUBIC)
        for _ in range(8)
    ]

    def saved(shown, form, **options):
        file = io.BytesIO()
        shown.save(file, form, **options)
        return file.getvalue()

    samples = [(f"a{n}", {"png": saved(shown, "PNG"), "txt": b"one"}) for n, shown in enumerate(originals)]
    samples += [
        (f"b{n}", {"jpg": saved(shown.resize((120, 90)), "JPEG"), "txt": b"two"})
        for n, shown in enumerate(originals[:3])
    ]
    write_tar(tmp_path / "in" / "0.tar", samples[:6])
    write_tar(tmp_path / "in" / "1.tar", samples[6:])
    write_tar(tmp_path / "other" / "0.tar", [("o", {"webp": saved(originals[5], "WEBP"), "txt": b"three"})])
    rule = {"rule": "near_duplicates", "distance": 4, "against": [str(tmp_path / "other")]}
    run(tmp_path / "in", tmp_path / "out", {"near": rule})
    assert chosen(tmp_path / "out") == ["a0", "a1", "a2", "a3", "a4", "a6", "a7"]
    # A split keeps what looks alike on one side.
    run(tmp_path / "in", tmp_path / "s" / "out", {}, split={"share": 0.5})
    train, validation = (set(chosen(tmp_path / "s" / "out" / side)) for side in ("train", "validation"))
    assert len(train | validation) == 11 and not train & validation and 4 <= len(validation) <= 7
    for n in range(3):
        assert (f"a{n}" in train) == (f"b{n}" in train)
    for side in ("train", "validation"):
        assert open_data_set(tmp_path / "s" / "out" / side).samples == len(chosen(tmp_path / "s" / "out" / side))


def test_rules_are_asked_in_their_order(source, pairs, tmp_path):
    best = {"rule": "number", "field": "similarity", "best": 10}
    words = {"rule": "words", "at_least": 3}
    run(source, tmp_path / "a" / "out", {"best": best, "words": words})
    run(source, tmp_path / "b" / "out", {"words": words, "best": best})
    first, second = (counts(tmp_path / name / "out", "select") for name in "ab")
    assert first["out"] < second["out"] == 10 and first["rejected_best"] == 50
    rejected = [
        json.loads(line)
        for path in sorted((tmp_path / "b" / "out" / "reports" / "select").glob("*.rejected.jsonl"))
        for line in path.read_text().splitlines()
    ]
    short = [key for key, members, _ in pairs if len(text(members).split()) < 3]
    assert [one["key"] for one in rejected if one["rule"] == "words"] == short
    assert len(rejected) == 50
    told = read_dataset_json(tmp_path / "b" / "out")["made_by"]["select"]["rules"]
    assert [rule["name"] for rule in told["rules"]] == ["words", "best"] and told["rules"][1]["best"] == 10


def test_levels_and_dataset_json_go_on(tmp_path):
    write_shards(tmp_path / "in", range(20))
    before = read_dataset_json(tmp_path / "in")
    run(tmp_path / "in", tmp_path / "out", {"some": {"rule": "sample", "number": 7}})
    after = read_dataset_json(tmp_path / "out")
    assert after["roi_feature_size"] == before["roi_feature_size"] and "unfinished" not in after
    assert {**before["made_by"], "select": after["made_by"]["select"]} == after["made_by"]
    kept, all_of_them = read_tars(tmp_path / "out"), read_tars(tmp_path / "in")
    assert len(kept) == 7 and all(all_of_them[key] == members for key, members in kept.items())
    assert after["counts"]["samples"] == 7 == open_data_set(tmp_path / "out").samples


def test_small_parts_make_one_shard_and_the_number_of_processes_changes_nothing(source, tmp_path):
    rules = {"few": {"rule": "number", "field": "similarity", "at_least": 0.3}}
    run(source, tmp_path / "one" / "out", rules, "--samples-per-shard", "25")
    assert len(list((tmp_path / "one" / "out").glob("*.tar"))) == 2
    for part in (1, 0):
        parts = ["--samples-per-shard", "25", "--part-index", str(part), "--part-count", "2"]
        total = run(source, tmp_path / "two" / "out", rules, *parts)
        assert (total is None) == (part == 1)
    assert tree(tmp_path / "two" / "out") == tree(tmp_path / "one" / "out")


def test_a_run_that_broke_off_continues_to_the_same_bytes(source, tmp_path, monkeypatch):
    rules = {"few": {"rule": "repeats", "of": "letters", "most": 4}, "side": {"rule": "picture", "shortest_side": 16}}
    flags = ["--samples-per-shard", "5"]
    run(source, tmp_path / "whole" / "out", rules, *flags)
    for name, after in (("measure_part", 2), ("ShardWriter", 1)):
        real, calls = getattr(select, name), []

        def breaks(*arguments, real=real, calls=calls, after=after):
            calls.append(arguments)
            if len(calls) > after:
                raise KeyboardInterrupt
            return real(*arguments)

        monkeypatch.setattr(select, name, breaks)
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "cut" / "out", rules, *flags)
        monkeypatch.setattr(select, name, real)
    assert read_dataset_json(tmp_path / "cut" / "out")["unfinished"] == ["select"]
    run(source, tmp_path / "cut" / "out", rules, *flags)
    assert tree(tmp_path / "cut" / "out") == tree(tmp_path / "whole" / "out")


def test_other_rules_want_overwrite_and_leave_nothing_behind(source, tmp_path):
    run(
        source,
        tmp_path / "out",
        {"all": {"rule": "number", "field": "similarity", "at_least": 0.0}},
        "--samples-per-shard",
        "5",
    )
    narrow = {"few": {"rule": "number", "field": "similarity", "best": 3}}
    with pytest.raises(ValueError, match="other settings"):
        run(source, tmp_path / "out", narrow, "--samples-per-shard", "5")
    run(source, tmp_path / "out", narrow, "--samples-per-shard", "5", "--overwrite")
    assert len(chosen(tmp_path / "out")) == 3 and len(list((tmp_path / "out").glob("*.tar"))) == 1


def test_keys_alone_of_a_table_whose_pictures_are_elsewhere(tmp_path):
    rows = [
        {"URL": f"https://x.org/{n}.jpg", "TEXT": f"text {n}", "similarity": n % 7 / 10, "id": f"a{n}"}
        for n in range(30)
    ]
    rows[4]["similarity"] = None
    table = write_jsonl(tmp_path / "in" / "meta.jsonl", rows)
    rules = {"best": {"rule": "number", "field": "similarity", "at_least": 0.4, "missing": "reject"}}
    columns = ["--image-column", "URL", "--key-column", "id", "--samples-per-shard", "8"]
    run(table, tmp_path / "out", rules, "--keys-only", *columns)
    expected = [row["id"] for row in rows if (row["similarity"] or 0) >= 0.4]
    assert (tmp_path / "out" / "keys.txt").read_text().split() == expected
    assert not list((tmp_path / "out").glob("*.tar"))
    total = counts(tmp_path / "out", "select")
    assert (total["in"], total["out"], total["rejected_best"]) == (30, len(expected), 30 - len(expected))


def test_a_table_beside_pictures_becomes_shards(tmp_path):
    data = write_pictures(tmp_path / "in", 9)
    (tmp_path / "in" / "3.jpg").write_bytes(b"nothing")
    rows = [{"image": f"{n}.jpg", "caption": f"{'long ' * n}text", "id": f"k{min(n, 7)}"} for n in range(9)]
    rows[2]["caption"] = ""
    table = write_jsonl(tmp_path / "in" / "table.jsonl", rows)
    run(
        table,
        tmp_path / "out",
        {"short": {"rule": "words", "at_least": 2}},
        "--key-column",
        "id",
        "--samples-per-shard",
        "2",
    )
    assert {key: members["jpg"] for key, members in read_tars(tmp_path / "out").items()} == {
        f"k{n}": data[n] for n in (1, 4, 5, 6, 7)
    }
    assert [(key, reason) for _, key, reason, _ in problems(tmp_path / "out", "select")] == [
        ("k2", "no-caption"), ("k3", "no-picture-format"), ("k7", "duplicate-key")
    ]  # fmt: skip


def test_a_dry_run_writes_no_shards_and_says_what_each_rule_takes(source, pairs, tmp_path, capsys):
    rules = {"words": {"rule": "words", "at_least": 3}, "best": {"rule": "number", "field": "similarity", "best": 4}}
    assert run(source, tmp_path / "out", rules, "--dry-run") is None
    short = sum(len(text(members).split()) < 3 for _, members, _ in pairs)
    said = capsys.readouterr().out
    assert f"words: takes {short}, leaves {60 - short}" in said and f"best: takes {56 - short}, leaves 4" in said
    page = (tmp_path / "out" / "selection.html").read_text()
    assert page.count("<figure>") == 10 + 10 + 4 and page.count("data:image/jpeg;base64,") == 24
    assert (
        "<script" not in page and "http" not in page and f"<td>words</td><td>{short}</td><td>{60 - short}</td>" in page
    )
    shown = page.partition("<h2>words</h2>")[2].partition("<h2>")[0]
    keys = re.findall(r"<small>(k\d\d)", shown)
    assert len(keys) == 10 and all(len(text(members).split()) < 3 for key, members, _ in pairs if key in keys)
    assert not list((tmp_path / "out").glob("*.tar")) and not (tmp_path / "out" / "dataset.json").exists()
    run(source, tmp_path / "out", rules)
    assert len(chosen(tmp_path / "out")) == 4


BAD_RULES = {
    "no kind of rule 'numbr', expected one of number, sample, words": {"x": {"rule": "numbr"}},
    "rule x: expected a mapping with `rule: KIND`": {"x": 3},
    "unknown key 'at_last' in .*rule x; did you mean at_least": {"x": {"rule": "words", "at_last": 3}},
    "rule x: at_least: .*expected a whole number, got 'three'": {"x": {"rule": "words", "at_least": "three"}},
    "rule x: at_least: expected a finite number, got nan": {
        "x": {"rule": "number", "field": "a", "at_least": math.nan}
    },
    "rule x: at_least 5 is above at_most 3": {"x": {"rule": "words", "at_least": 5, "at_most": 3}},
    "rule x: expected at_least, at_most or best": {"x": {"rule": "number", "field": "similarity"}},
    "rule x: at_least: a cosine is between -1 and 1, got 30": {
        "x": {"rule": "similarity", "model": "a/b", "at_least": 30}
    },
    "rule x: field: expected the name": {"x": {"rule": "number", "at_least": 1}},
    r"rule x: without: '\(' is no regular expression": {"x": {"rule": "pattern", "without": ["("]}},
    "rule x: formats: expected jpeg, png or webp, got gif": {"x": {"rule": "picture", "formats": ["gif"]}},
    "rule x: distance: expected 0 to 12 bits, got 40": {"x": {"rule": "near_duplicates", "distance": 40}},
    "rule x: expected either number or share": {"x": {"rule": "sample"}},
    "no rules; expected `rules:`": {},
}


@pytest.mark.parametrize("message", BAD_RULES)
def test_a_wrong_rule_is_named(message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_rules(str(rules_file(tmp_path, BAD_RULES[message])))


@pytest.mark.parametrize("rules", [[], [{"rule": "words"}], "words"])
def test_rules_that_are_no_mapping(rules, tmp_path):
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"rules": rules}))
    with pytest.raises(ValueError, match="rules: expected a mapping"):
        read_rules(str(path))
    with pytest.raises(ValueError, match=f"--rules {tmp_path}: expected a YAML file, and it is a folder"):
        read_rules(str(tmp_path))


def test_a_field_that_is_not_there_names_shard_key_and_fields(source, tmp_path):
    rule = {"rule": "number", "field": "aesthetic", "at_least": 5}
    with pytest.raises(ValueError, match=r"00000.tar, key 'k00': the field aesthetic is not there.*similarity"):
        run(source, tmp_path / "out", {"x": rule})


@pytest.mark.parametrize("value", [math.nan, None, "high", True, math.inf])
def test_a_score_that_is_no_number_is_named_or_goes(value, tmp_path):
    samples = [
        (f"k{n}", {"jpg": picture(n), "txt": b"a text", "json": json.dumps({"similarity": one}).encode()})
        for n, one in enumerate([0.5, value, 0.2])
    ]
    write_tar(tmp_path / "in" / "0.tar", samples)
    rule = {"rule": "number", "field": "similarity", "best": 2}
    with pytest.raises(ValueError, match=r"0.tar, key 'k1': the field similarity is .*missing: reject"):
        run(tmp_path / "in", tmp_path / "a" / "out", {"x": rule})
    run(tmp_path / "in", tmp_path / "b" / "out", {"x": {**rule, "missing": "reject"}})
    assert chosen(tmp_path / "b" / "out") == ["k0", "k2"]


@pytest.mark.parametrize(
    "rule", [{"rule": "number", "field": "similarity", "best": 61}, {"rule": "sample", "number": 61}]
)
def test_more_than_there_is_is_refused(rule, source, tmp_path):
    with pytest.raises(ValueError, match=r"rule x: .*61 .*leave 60"):
        run(source, tmp_path / "out", {"x": rule})


def test_inputs_that_cannot_be_chosen_from(source, tmp_path):
    rule = {"x": {"rule": "words", "at_least": 2}}
    with pytest.raises(ValueError, match="holds the input"):
        run(source, source, rule)
    with pytest.raises(FileNotFoundError, match="--rules .*none.yaml: there is no such file"):
        run_step(select, ["--input", source, "--output-dir", tmp_path / "out", "--rules", tmp_path / "none.yaml"])
    others = {"x": {"rule": "repeats", "of": "pair", "against": ["data/missing"]}}
    with pytest.raises(ValueError, match="^against: data/missing is no file or folder here: .*prepare.pack"):
        run(source, tmp_path / "out", others)  # as --input it would be looked for on the Hub
    (source / "dataset.json").write_text(json.dumps({"format": 1, "unfinished": ["regions"]}))
    with pytest.raises(ValueError, match="regions has begun and not ended"):
        run(source, tmp_path / "out", rule)


def test_the_page_names_each_rule_and_each_setting(checkout):
    page = (checkout / "docs" / "prepare.md").read_text().partition("## select")[2].partition("\n## ")[0]
    for kind, rule in KINDS.items():
        assert f"| `{kind}` |" in page
        row = next(line for line in page.splitlines() if line.startswith(f"| `{kind}` |"))
        assert [one.name for one in fields(rule) if f"`{one.name}`" not in row] == []


@pytest.mark.parametrize("name", ["laion99m", "laion15m", "noisy"])
def test_ready_rules_can_be_read(name, checkout):
    selection = read_rules(str(checkout / "training" / "configs" / "select" / f"{name}.yaml"))
    assert selection.rules


def test_rules_that_leave_nothing_are_said(source, tmp_path, capsys):
    path = rules_file(tmp_path, {"words": {"rule": "words", "at_least": 200}})
    words = ["--input", source, "--output-dir", tmp_path / "out", "--rules", path]
    assert select.main([str(word) for word in words]) == 2
    assert "error: the rules leave none of the " in capsys.readouterr().err
    write_tar(tmp_path / "bare.tar", [])
    words[1] = tmp_path / "bare.tar"
    words[3] = tmp_path / "of-nothing"
    assert select.main([str(word) for word in words]) == 2
    assert capsys.readouterr().err.endswith("bare.tar\n")
