"""Features of labelled pictures: which they are, when they are used again."""

import numpy as np
import torch
from PIL import Image

from pyramidclip_hf.loading import load_model
from tests.rounding import assert_equal_to_rounding
from tests.training.tiny import WIDEST
from training.transfer import features as kept
from training.transfer.features import cached_features, picture_features
from training.transfer.parts import open_parts


def test_features_are_those_of_the_tower_and_of_the_embedding(probe_args):
    loaded = load_model(probe_args.model)
    model, processor = loaded.model, loaded.processor
    data = open_parts(probe_args)["test"].data
    for kind, width in (("backbone", 16), ("projected", 8)):
        found = picture_features(model.train(), processor, data, kind, batch_size=5)
        assert found.shape == (24, width) and found.dtype == torch.float32
        for number in (0, 7, 23):
            pixels = processor(images=data.read(number), return_tensors="pt")["pixel_values"]
            with torch.no_grad():
                pooled = model.eval().vision_model(pixel_values=pixels).pooler_output[0]
                expected = pooled if kind == "backbone" else model.visual_projection(pooled)
            assert_equal_to_rounding(found[number], expected, WIDEST)


def test_kept_features_are_used_again_and_never_for_anything_else(probe_args, tmp_path, monkeypatch):
    loaded = load_model(probe_args.model)
    model, processor = loaded.model, loaded.processor
    computed = []
    original = kept.picture_features
    monkeypatch.setattr(kept, "picture_features", lambda *arguments: computed.append(1) or original(*arguments))

    def features():
        before = len(computed)
        found = cached_features(model, processor, open_parts(probe_args)["test"], probe_args)
        return found, len(computed) - before

    first, fresh = features()
    assert fresh == 1
    again, fresh = features()
    assert fresh == 0 and np.array_equal(first, again)
    path = tmp_path / "test" / "green" / "03.png"
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)  # another picture
    changed, fresh = features()
    assert fresh == 1 and np.flatnonzero((changed != first).any(axis=1)).tolist() == [19]
    with torch.no_grad():
        model.vision_model.post_layernorm.bias[0] += 0.5  # another model
    shifted, fresh = features()
    assert fresh == 1
    assert_equal_to_rounding(shifted[:, 0] - changed[:, 0], 0.5, WIDEST)
    processor.image_processor.image_mean = [0.0, 0.0, 0.0]  # other preprocessing
    assert features()[1] == 1
    probe_args.features = "projected"
    assert features()[1] == 1
    with torch.no_grad():
        model.visual_projection.weight[0] += 1
    assert features()[1] == 1
    model.text_model.final_layer_norm.bias.data += 1  # pictures do not pass through it
    assert features()[1] == 0


def test_a_damaged_cache_is_computed_again(probe_args, tmp_path, capsys):
    loaded = load_model(probe_args.model)
    model, processor = loaded.model, loaded.processor
    part = open_parts(probe_args)["test"]
    first = cached_features(model, processor, part, probe_args)
    (path,) = (tmp_path / "cache").iterdir()
    path.write_bytes(path.read_bytes()[:40])
    assert np.array_equal(cached_features(model, processor, part, probe_args), first)
    assert "damaged" in capsys.readouterr().err
    assert np.array_equal(cached_features(model, processor, part, probe_args), first)
    assert "damaged" not in capsys.readouterr().err
