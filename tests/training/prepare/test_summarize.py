"""`training.prepare.summarize`: a tiny T5 and a tiny causal model with a real tokenizer, made here with random
weights."""

from pathlib import Path

import pytest
import torch
from transformers import ViTConfig

from pyramidclip_hf.configuration_pyramidclip import PyramidCLIPConfig
from tests.training.prepare.small_data import (
    counts,
    make_language_model,
    picture,
    problems,
    read_tars,
    records,
    run_step,
    tree,
    write_tar,
)
from training.data.shards import read_dataset_json
from training.prepare import summarize
from training.prepare.steps.first_clause import first_clause
from training.prepare.summarize import SummaryCache, SummaryConfig, open_summarizer

LONG = [
    "a ginger cat sits on the red sofa and looks out of the window at the birds",
    "two dogs run along the beach at sunset while a child throws a yellow ball into the water near them",
    "the old stone bridge over the river in autumn with orange trees on both sides of it and mist",
    "a plate of pasta with tomato sauce and basil stands on a wooden table next to a glass of red wine",
    "an empty street at night after the rain with neon signs of shops reflected in the wet asphalt",
    "a man in a blue shirt repairs a bicycle in a small workshop full of tools and spare wheels " * 2,
    "children play football on a dusty field behind the school while their teacher watches from the shade of a tree",
]
SHORT = ["a cat", "two dogs on the beach"]


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return make_language_model(tmp_path_factory.mktemp("t5"), LONG)


@pytest.fixture(scope="module")
def gpt(tmp_path_factory):
    return make_language_model(tmp_path_factory.mktemp("gpt"), LONG, causal=True)


def config(model, **changes):
    return SummaryConfig(**{"model": model, "num_beams": 2, "max_new_tokens": 8, "batch_size": 3, **changes})


def shards(folder, captions=(*LONG, *SHORT), step=4):
    samples = [(f"k{i}", {"jpg": picture(i, (8, 8)), "txt": text.encode()}) for i, text in enumerate(captions)]
    for number, start in enumerate(range(0, len(samples), step)):
        write_tar(folder / f"{number:05d}.tar", samples[start : start + step])
    return folder


def run(folder, *flags):
    return run_step(summarize, ["--input_dir", str(folder), "--device", "cpu", *map(str, flags)])


FAST = ["--num_beams", "2", "--max_new_tokens", "8", "--batch_size", "3"]


@pytest.mark.parametrize("kind", ["t5", "gpt"])
def test_a_batch_gives_what_each_caption_gives_alone_without_padding(kind, request, tmp_path):
    summarizer = open_summarizer(config(request.getfixturevalue(kind)), cache=tmp_path / "c.sqlite")
    made = summarizer.summarize(LONG)
    assert len(set(made.values())) > 3, "a model that always says the same would prove nothing"
    for caption in LONG:
        prompt = (summarize.CAUSAL_PROMPT if kind == "gpt" else summarize.SEQ2SEQ_PROMPT).format(caption=caption)
        ids = torch.tensor([summarizer.tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            out = summarizer.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                num_beams=2,
                max_new_tokens=8,
                no_repeat_ngram_size=3,
                early_stopping=True,
                do_sample=False,
                pad_token_id=0,
            )
        out = out[0, ids.shape[1] :] if kind == "gpt" else out[0]
        assert made[caption] == " ".join(summarizer.tokenizer.decode(out, skip_special_tokens=True).split())


def test_every_batch_has_one_shape_a_length_class(t5, tmp_path, monkeypatch):
    summarizer = open_summarizer(config(t5), cache=tmp_path / "c.sqlite")
    shapes, generate = [], summarizer.model.generate
    monkeypatch.setattr(
        summarizer.model, "generate", lambda **k: shapes.append(tuple(k["input_ids"].shape)) or generate(**k)
    )
    summarizer.summarize(LONG)
    assert {rows for rows, _ in shapes} == {3} and all(length % 16 == 0 for _, length in shapes)
    lengths = [-(-len(summarizer._token_ids(caption)) // 16) * 16 for caption in LONG]
    expected = sum(-(-lengths.count(length) // 3) for length in set(lengths))
    assert len(set(lengths)) > 1 and len(shapes) == expected


def test_a_slow_type_is_said(t5, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    for dtype in ("auto", "bfloat16"):
        open_summarizer(config(t5, dtype=dtype), cache=tmp_path / f"{dtype}.sqlite")
    assert capsys.readouterr().err.count("--dtype bfloat16: this processor has no bfloat16 arithmetic") == 1


def test_no_text_is_summarised_twice(t5, tmp_path, monkeypatch):
    first = open_summarizer(config(t5), cache=tmp_path / "c.sqlite").summarize(LONG[:4])
    again = open_summarizer(config(t5), cache=tmp_path / "c.sqlite")
    seen, generate = [], again._generate
    monkeypatch.setattr(again, "_generate", lambda ids: seen.append(len(ids)) or generate(ids))
    both = again.summarize(LONG)
    assert sum(seen) == len(LONG) - 4 and {k: both[k] for k in LONG[:4]} == first
    # The order and the neighbours change nothing.
    fresh = open_summarizer(config(t5), cache=tmp_path / "other.sqlite").summarize(LONG[::-1])
    assert fresh == both
    # Other settings, or another model under the same name, are other summaries.
    assert open_summarizer(config(t5, max_new_tokens=9)).key("x") != again.key("x")
    weights = Path(t5) / "generation_config.json"
    before = weights.read_bytes()
    weights.write_bytes(before + b"\n")
    try:
        assert open_summarizer(config(t5)).key("x") != again.key("x")
    finally:
        weights.write_bytes(before)


def test_cache_keeps_the_first_answer(tmp_path):
    cache = SummaryCache(tmp_path / "c.sqlite")
    cache.put([(b"a", "one"), (b"b", "two")])
    SummaryCache(tmp_path / "c.sqlite").put([(b"a", "other"), (b"c", "three")])
    assert cache.get([b"a", b"c", b"x"]) == {b"a": "one", b"c": "three"}
    assert len(cache.get([b"a"] * 1 + [str(i).encode() for i in range(1200)])) == 1


def test_shards_get_summaries_and_nothing_else_changes(t5, tmp_path):
    folder = shards(tmp_path / "data", [*LONG, *SHORT, LONG[0]])
    before = read_tars(folder)
    run(folder, "--model", t5, *FAST)
    after, made = read_tars(folder), records(folder)
    assert {k: {s: d for s, d in m.items() if s != "json"} for k, m in after.items()} == before
    expected = open_summarizer(config(t5), cache=tmp_path / "own.sqlite").summarize([*LONG, *SHORT])
    assert [record["summary"] for record in made.values()] == [expected[text] for text in [*LONG, *SHORT, LONG[0]]]
    assert [made[f"k{i}"]["summary"] for i in (7, 8)] == SHORT
    described = read_dataset_json(folder)
    assert (
        described["made_by"]["summary"]["maker"] == Path(t5).name
        and described["made_by"]["summary"]["settings"]["num_beams"] == 2
    )
    assert counts(folder, "summary")["summaries"] == 10
    with pytest.raises(ValueError, match="--overwrite"):
        run(folder, "--model", "first-clause")


def test_a_full_cache_and_an_empty_one_give_the_same_bytes(t5, tmp_path):
    run(shards(tmp_path / "one"), "--model", t5, *FAST, "--cache", tmp_path / "a.sqlite")
    run(shards(tmp_path / "two"), "--model", t5, *FAST, "--cache", tmp_path / "b.sqlite")
    run(shards(tmp_path / "three", step=2), "--model", t5, *FAST, "--cache", tmp_path / "c.sqlite")
    run(shards(tmp_path / "four"), "--model", t5, *FAST, "--cache", tmp_path / "c.sqlite")
    assert tree(tmp_path / "one") == tree(tmp_path / "two") == tree(tmp_path / "four")


def test_dry_run_prints_pairs_and_writes_nothing(t5, tmp_path, capsys):
    folder = shards(tmp_path / "data")
    before = tree(folder)
    run(folder, "--model", t5, *FAST, "--dry_run", 6)
    out = capsys.readouterr().out
    assert out.count("before: ") == out.count("after: ") == 6 and f"before: {LONG[5].strip()}\n" in out
    assert tree(folder) == before


def test_bad_samples_are_named_and_go_on(tmp_path):
    samples = [
        ("a", {"jpg": picture(0), "txt": b"A cat on a mat. Buy now"}),
        ("b", {"jpg": picture(0), "txt": b"\xff"}),
        ("c", {"jpg": picture(0)}),
    ]
    write_tar(tmp_path / "data" / "0.tar", samples)
    run(tmp_path / "data", "--model", "first-clause")
    assert read_tars(tmp_path / "data") == {
        "a": samples[0][1] | {"json": b'{"summary":"A cat on a mat"}'},
        **dict(samples[1:]),
    }
    assert problems(tmp_path / "data", "summary") == [
        ("kept", "b", "bad-utf8", None),
        ("kept", "c", "no-caption", None),
    ]
    assert read_dataset_json(tmp_path / "data")["made_by"]["summary"] == {"maker": "first-clause"}


def test_long_captions_are_cut_before_the_prompt_is(gpt, tmp_path):
    summarizer = open_summarizer(config(gpt, max_input_tokens=120), cache=tmp_path / "c.sqlite")
    ids = summarizer._token_ids("cat " * 400)
    short = summarizer._token_ids("cat")
    assert len(short) < 110 < len(ids) <= 120 and ids[-4:] == short[-4:]


def test_a_chat_template_is_followed(gpt, tmp_path):
    summarizer = open_summarizer(config(gpt, prompt="the {caption}"), cache=tmp_path / "c.sqlite")
    summarizer.tokenizer.chat_template = "{% for m in messages %}dogs {{ m['content'] }} birds{% endfor %}"
    plain = summarizer.tokenizer("dogs the red cat birds", add_special_tokens=False)["input_ids"]
    assert summarizer._token_ids("red cat") == plain


def test_wrong_settings_are_told(tmp_path):
    with pytest.raises(ValueError, match="num_beams=0"):
        run(tmp_path, "--model", "first-clause", "--num_beams", 0)
    with pytest.raises(ValueError, match="{caption}"):
        run(tmp_path, "--model", "first-clause", "--prompt", "summarize")
    with pytest.raises(FileNotFoundError, match=r"no \*\.tar in"):
        run(tmp_path, "--model", "first-clause")


@pytest.mark.parametrize("kind", [PyramidCLIPConfig, ViTConfig])
def test_a_model_that_writes_no_text_is_a_sentence(kind, tmp_path, capsys):
    """Of transformers' own kinds and of others; not a list of the two hundred that do."""
    kind().save_pretrained(tmp_path / "model")
    words = ["--input-dir", str(shards(tmp_path / "shards")), "--model", str(tmp_path / "model"), "--device", "cpu"]
    assert summarize.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"is of the kind {kind.model_type!r}, which writes no text: expected" in line and len(line) < 400


@pytest.mark.parametrize(
    ("caption", "clause"),
    [
        ("A cat sitting on a mat, looking out of the window. Buy now at www.shop.com", "A cat sitting on a mat"),
        ("Women's Red Dress Size: XL - Free Shipping | eBay", "Women's Red Dress"),
        ("vintage oak table 120 x 60 cm, SKU 48213-B, best price", "vintage oak table"),
        ("a1b2c3d4e5f6.jpg old tractor in a field - stock photo", "old tractor in a field"),
        ("Photo by @john of the harbour at dusk; 1920x1080 wallpaper", "the harbour at dusk"),
        ("$19.99 ceramic mug 330 ml with handle, blue, dishwasher safe", "ceramic mug"),
        ("DSC_0042 9f86d081884c7d659a2feaa0 wooden boat on a lake", "wooden boat on a lake"),
        ("Portrait of Dr. Smith in his garden. Oil on canvas", "Portrait of Dr. Smith in his garden"),
        ("IMG_2342.JPG", "IMG_2342.JPG"),
        ("cat", "cat"),
        ("NA", "NA"),
        ("  two\n dogs ", "two dogs"),
        ("红色的猫", "红色的猫"),
    ],
)
def test_first_clause(caption, clause):
    assert first_clause(caption) == clause


def test_first_clause_is_quick_on_text_made_to_break_it():
    import time

    start = time.perf_counter()
    for text in ("a-" * 500_000, "1x" * 500_000, "(" * 1_000_000, "deadbeef" * 100_000):
        first_clause(text)
    assert time.perf_counter() - start < 20  # without the limit on length it takes hours
