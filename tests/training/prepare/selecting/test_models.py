"""Rules that ask a model: similarities against a plain loop, kept in the records, never computed twice; bad models."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from pyramidclip_hf.modeling_pyramidclip import PyramidCLIPModel
from pyramidclip_hf.processing_pyramidclip import PyramidCLIPProcessor
from tests.training.prepare.small_data import jpeg, problems, read_tars, records, run_step, tree, write_tar
from tests.training.to_evaluate import save_tiny_model
from training.prepare import select
from training.prepare.selecting.candidates import Candidate
from training.prepare.selecting.encoders import Encoder
from training.prepare.sources import RawPair

WORDS = ["a red house", "the sea at night", "two dogs", "a very long text about nothing in particular", "snow"]


def save_tiny_clip(folder):
    """A `CLIPModel` of Transformers with our tokenizer and its own image processor, as `CLIPProcessor` saves them."""
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    tokenizer = PyramidCLIPProcessor.from_pretrained(save_tiny_model(folder.parent / "ours")).tokenizer
    text = {**tower, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(1)
    config = CLIPConfig(text_config=text, vision_config={**tower, "image_size": 32, "patch_size": 8}, projection_dim=24)
    CLIPModel(config).save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {"clip": save_tiny_clip(folder / "clip"), "ours": str(folder / "ours")}


@pytest.fixture
def source(tmp_path):
    """Three shards of 90 pairs in all, two of which have no picture that can be read."""
    pairs = [(f"k{n:03d}", {"jpg": jpeg(n), "txt": f"{WORDS[n % 5]} {n}".encode()}) for n in range(90)]
    pairs[7][1]["jpg"] = jpeg(7)[:-300]
    pairs[70][1]["json"] = b'{"width": 60}'
    for number, (start, end) in enumerate([(0, 70), (70, 71), (71, 90)]):
        write_tar(tmp_path / "in" / f"{number:05d}.tar", pairs[start:end])
    return tmp_path / "in"


def run(source, output, rules, *flags):
    output.parent.mkdir(parents=True, exist_ok=True)
    path = output.parent / "rules.yaml"
    path.write_text(yaml.safe_dump({"rules": rules}, sort_keys=False))
    words = ["--input", source, "--output-dir", output, "--rules", path, "--device", "cpu", *flags]
    return run_step(select, words)


def looped(folder, kind, source):
    """{key: cosine} one pair after the other, by the classes' own `forward`."""
    found = {}
    if kind == "ours":
        model, processor = PyramidCLIPModel.from_pretrained(folder), PyramidCLIPProcessor.from_pretrained(folder)
    else:
        model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    model.eval()
    for key, members in read_tars(source).items():
        if key == "k007":
            continue
        opened = Image.open(io.BytesIO(members["jpg"])).convert("RGB")
        inputs = processor(images=opened, text=[members["txt"].decode()], return_tensors="pt")
        with torch.no_grad():
            if kind == "ours":
                picture, text = model.encode_image(inputs["pixel_values"]), model.encode_text(inputs["input_ids"])
            else:
                outputs = model(**inputs)
                picture, text = outputs.image_embeds, outputs.text_embeds
        found[key] = torch.nn.functional.cosine_similarity(picture, text).item()
    return found


@pytest.mark.parametrize("kind", ["ours", "clip"])
def test_similarities_are_those_of_a_loop_and_decide_and_are_kept(kind, models, source, tmp_path):
    expected = looped(models[kind], kind, source)
    middle = float(np.median(list(expected.values())))
    rule = {"rule": "similarity", "model": models[kind], "at_least": middle}
    run(source, tmp_path / "out", {"fits": rule})
    kept = records(tmp_path / "out")
    # One at the border may fall on either side, by its last digits.
    assert set(kept) ^ {key for key, value in expected.items() if value >= middle} <= {
        key for key, value in expected.items() if abs(value - middle) < 1e-5
    }
    assert 40 < len(kept) < 50
    maker = Encoder(models[kind]).told
    assert maker.startswith(f"{kind}@")
    for key, record in kept.items():
        assert record["similarity"] == pytest.approx(expected[key], abs=1e-5) and record["similarity_model"] == maker
    assert (kept.get("k070") or {"width": 60})["width"] == 60
    assert [(key, reason) for _, key, reason, _ in problems(tmp_path / "out", "select")] == [("k007", "bad-picture")]
    before, after = read_tars(source), read_tars(tmp_path / "out")
    assert all(after[key][name] == before[key][name] for key in after for name in ("jpg", "txt"))
    # The best, exactly; by a number that the records now have, without the model; and byte for byte the same.
    run(tmp_path / "out", tmp_path / "b" / "out", {"best": {**rule, "at_least": None, "best": 20}})
    best = records(tmp_path / "b" / "out")
    ranked = sorted((record["similarity"] for record in kept.values()), reverse=True)
    assert sorted((record["similarity"] for record in best.values()), reverse=True) == ranked[:20]
    run(tmp_path / "out", tmp_path / "c" / "out", {"best": {"rule": "number", "field": "similarity", "best": 20}})
    assert read_tars(tmp_path / "b" / "out") == read_tars(tmp_path / "c" / "out")


def test_what_was_computed_is_not_computed_again(models, source, tmp_path, monkeypatch):
    rules = {"fits": {"rule": "similarity", "model": models["ours"], "best": 40}}
    run(source, tmp_path / "whole" / "out", rules)
    real, seen = Encoder.pictures, []

    def pictures(self, candidates):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(len(candidates))
        return real(self, candidates)

    monkeypatch.setattr(Encoder, "pictures", pictures)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "cut" / "out", rules)
    assert seen == [64, 6]  # the first shard
    seen[:] = [0] * 3
    run(source, tmp_path / "cut" / "out", rules)
    assert seen[3:] == [1, 19]
    assert tree(tmp_path / "cut" / "out") == tree(tmp_path / "whole" / "out")
    # Other bounds, and other rules beside it, cost no second look by the model.
    seen[:] = [0] * 3
    rules["fits"] |= {"best": 20}
    run(source, tmp_path / "cut" / "out", {"words": {"rule": "words", "at_least": 2}, **rules}, "--overwrite")
    assert seen == [0] * 3 and len(records(tmp_path / "cut" / "out")) == 20


def test_a_model_that_scored_the_records_is_not_asked_again_and_another_is_refused(models, source, tmp_path):
    rule = {"rule": "similarity", "model": models["ours"], "best": 30}
    run(source, tmp_path / "a" / "out", {"fits": rule})
    scored = tmp_path / "a" / "out"
    with pytest.raises(
        ValueError, match=r"the record has the field similarity already, .* by ours@\w+ and not by clip"
    ):
        run(scored, tmp_path / "b" / "out", {"fits": {**rule, "model": models["clip"], "best": 5}})
    run(scored, tmp_path / "b" / "out", {"fits": {**rule, "model": models["clip"], "best": 5, "field": "by_clip"}})
    assert {"similarity", "similarity_model", "by_clip", "by_clip_model"} <= set(
        next(iter(records(tmp_path / "b" / "out").values()))
    )
    write_tar(tmp_path / "laion" / "0.tar", [("a", {"jpg": jpeg(1), "txt": b"one", "json": b'{"similarity": 0.3}'})])
    with pytest.raises(ValueError, match=r"0.tar, key 'a': the record has the field similarity already, 0.3 by nobody"):
        run(tmp_path / "laion", tmp_path / "c" / "out", {"fits": {**rule, "best": 1}})


def spoilt(models, kind, folder, change):
    """A copy of a model, changed."""
    shutil.copytree(models[kind], folder)
    change(folder)
    return str(folder)


def other_size(folder):
    for path in folder.glob("*processor_config.json"):
        content = json.loads(path.read_text())
        content.get("image_processor", content)["crop_size"] = {"height": 16, "width": 16}
        path.write_text(json.dumps(content))


def without_processor(folder):
    for path in folder.glob("*processor_config.json"):
        path.unlink()


def nan_weights(folder):
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor * float("nan") for name, tensor in weights.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )


BAD_MODELS = {
    "its processor is missing|image processor is missing": without_processor,
    r"the processor beside it is that of another model: it makes pictures of \(3, 16, 16\)": other_size,
    "pictures from key 'k000' of .*00000.tar on: .*finite numbers, got NaN": nan_weights,
    "model .*: .*cannot be loaded|weights is missing|the weights": lambda folder: (
        folder / "model.safetensors"
    ).unlink(),
}


@pytest.mark.parametrize("kind", ["ours", "clip"])
@pytest.mark.parametrize("message", BAD_MODELS)
def test_a_model_that_cannot_be_asked_is_named(kind, message, models, source, tmp_path):
    folder = spoilt(models, kind, tmp_path / "bad", BAD_MODELS[message])
    with pytest.raises(ValueError, match=message):
        run(source, tmp_path / "out", {"fits": {"rule": "similarity", "model": folder, "best": 1}})


@pytest.mark.parametrize("kind", ["ours", "clip"])
@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "tokenizer.json"])
def test_a_damaged_file_of_a_model_is_named(kind, name, models, source, tmp_path):
    def cut(folder):
        (folder / name).write_bytes((folder / name).read_bytes()[:20])

    folder = spoilt(models, kind, tmp_path / "bad", cut)
    with pytest.raises(ValueError, match=f"model {folder}: .*{name} is no JSON mapping .*copy or download it again"):
        run(source, tmp_path / "out", {"fits": {"rule": "similarity", "model": folder, "best": 1}})


def test_a_slow_type_is_said(models, source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    rule = {"rule": "similarity", "model": models["ours"], "best": 1, "dtype": "bfloat16"}
    run(source, tmp_path / "out", {"fits": rule})
    assert capsys.readouterr().err.count("dtype bfloat16: this processor has no bfloat16 arithmetic") == 1


def test_no_model_there(source, tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    for model, message in (
        (tmp_path / "none", "there is no such folder"),
        (tmp_path / "bert", "is of the kind 'bert'"),
    ):
        with pytest.raises(ValueError, match=f"model {model}:? {message}"):
            run(source, tmp_path / "out", {"fits": {"rule": "similarity", "model": str(model), "best": 1}})
    with pytest.raises(ValueError, match="rule fits: model: expected the folder or Hub name"):
        run(source, tmp_path / "out", {"fits": {"rule": "similarity", "best": 1}})
    with pytest.raises(ValueError, match="rule fits: field: caption is a level of the sample"):
        run(source, tmp_path / "out", {"fits": {"rule": "similarity", "best": 1, "model": "a/b", "field": "caption"}})


def saved(shown, form, **options):
    file = io.BytesIO()
    shown.save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["ours", "clip"])
def test_near_duplicates_by_a_model_within_and_against(kind, models, tmp_path):
    """Of three pictures there are smaller copies, and one is in an evaluation set, which has no captions."""
    pytest.importorskip("faiss", reason='needs FAISS: pip install -e ".[search]"')
    rng = np.random.default_rng(1)
    small = [Image.fromarray(rng.integers(0, 255, (2, 2, 3), np.uint8)) for _ in range(6)]
    originals = [shown.resize((240, 240), Image.Resampling.BICUBIC) for shown in small]
    samples = [(f"a{n}", {"png": saved(shown, "PNG"), "txt": b"one"}) for n, shown in enumerate(originals)]
    copies = [saved(shown.resize((120, 120)), "JPEG", quality=95) for shown in originals[:3]]
    samples += [(f"b{n}", {"jpg": data, "txt": b"two"}) for n, data in enumerate(copies)]
    write_tar(tmp_path / "in" / "0.tar", samples[:5])
    write_tar(tmp_path / "in" / "1.tar", samples[5:])
    write_tar(tmp_path / "eval" / "0.tar", [("o", {"webp": saved(originals[5], "WEBP", lossless=True), "cls": b"3"})])
    # By the model itself, which is not trained and finds all pictures alike: what is nearest to what.
    encoder, vectors = Encoder(models[kind]), {}
    for key, members in [*samples, ("o", {"png": saved(originals[5], "PNG")})]:
        data = next(data for suffix, data in members.items() if suffix != "txt")
        vectors[key] = encoder.pictures([Candidate(RawPair(key, "here", picture=data), 10**6)])[0]
    own = [key for key, _ in samples]
    cosines = {(a, b): float(vectors[a] @ vectors[b]) for a in own for b in [*own, "o"] if a != b}
    copied = {("a0", "b0"), ("a1", "b1"), ("a2", "b2"), ("a5", "o")}
    apart = max(value for pair, value in cosines.items() if pair not in copied and pair[::-1] not in copied)
    together = min(cosines[pair] for pair in copied)
    assert together - apart > 0.002, (together, apart)
    rule = {"rule": "near_duplicates", "model": models[kind], "cosine": min((together + apart) / 2, 0.998)}
    run(tmp_path / "in", tmp_path / "w" / "out", {"near": rule})
    assert sorted(read_tars(tmp_path / "w" / "out")) == ["a0", "a1", "a2", "a3", "a4", "a5"]
    run(tmp_path / "in", tmp_path / "out", {"near": {**rule, "against": [str(tmp_path / "eval")]}})
    assert sorted(read_tars(tmp_path / "out")) == ["a0", "a1", "a2", "a3", "a4"]
    (tmp_path / "eval" / "0.tar").unlink()
    write_tar(tmp_path / "eval" / "0.tar", [("o", {"webp": b"no picture", "cls": b"3"})])
    with pytest.raises(ValueError, match="against: .*eval: nothing in it can be used"):
        run(tmp_path / "in", tmp_path / "x" / "out", {"near": {**rule, "against": [str(tmp_path / "eval")]}})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "a/b"}, "expected model and cosine together"),
        ({"model": "a/b", "cosine": 0.9, "distance": 4}, "expected distance, .* or model and cosine, got both"),
        ({"cosine": 0.9}, "expected model and cosine together"),
        ({"model": "a/b", "cosine": 0.9999}, "cosine: expected more than 0, up to 0.998, got 0.9999"),
    ],
)
def test_near_duplicates_that_cannot_be_meant(settings, message, source, tmp_path):
    with pytest.raises(ValueError, match=f"rule near: {message}"):
        run(source, tmp_path / "out", {"near": {"rule": "near_duplicates", **settings}})
