"""What batches hold: the samples' texts, pixels, regions and captions, of the levels that are wanted."""

import functools
import io
import json

import numpy as np
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from tests.training.data.same_batches import equal
from tests.training.prepare.small_data import jpeg, make_sample, write_shards
from training.data.pixels import Normalisation
from training.data.views import view_boxes


def ranked(sample):
    """Its regions, most confident first."""
    return sorted(sample.regions or (), key=lambda region: -region.score)


def test_batch_holds_what_the_samples_say(shards, reader, processor):
    data = reader(shards, seed=3)
    batches = list(data.batches(1))
    assert len(batches) == data.batches_per_epoch == 44 // 8
    assert len({key for batch in batches for key in batch["sample_keys"]}) == 40
    for batch in batches[:2]:
        samples = [make_sample(int(key)) for key in batch["sample_keys"]]
        encoded = processor(
            text=[s.caption for s in samples],
            summary=[s.summary for s in samples],
            tags=[s.tags and [f"red {region.label}" for region in ranked(s)] or s.tags for s in samples],
            padding="max_length",
            return_tensors="pt",
        )
        for key in ("input_ids", "summary_input_ids", "tag_input_ids", "has_summary", "has_tags"):
            assert torch.equal(batch[key], encoded[key]), key
            assert batch[key].dtype == encoded[key].dtype
        assert batch["input_ids"].shape == (8, 77)
        for row, sample in enumerate(samples):
            count = len(sample.regions or ())
            assert batch["roi_mask"][row].tolist() == [True] * count + [False] * (batch["roi_mask"].shape[1] - count)
            scores = [region.score for region in sample.regions or ()]
            order = sorted(range(count), key=lambda i: -scores[i])
            for place, i in enumerate(order):
                expected = np.concatenate([sample.roi[i].astype(np.float32), np.float32(sample.regions[i].box)])
                assert np.array_equal(batch["roi_features"][row, place].numpy(), expected)
            assert not batch["roi_features"][row, count:].any()
        assert max(len(s.regions or ()) for s in samples) == batch["roi_mask"].shape[1]


def test_pixels_are_the_processors_normalisation_of_the_crop(shards, reader, processor):
    data = reader(shards, batch=4, seed=3, window_samples=44)
    images = processor.image_processor
    normalise = Normalisation(images.image_mean, images.image_std)
    made = next(data.batches(0))
    batch = made | {name: normalise(made[name]) for name in ("pixel_values", "local_pixel_values")}
    for row, key in enumerate(batch["sample_keys"]):
        picture = Image.open(io.BytesIO(jpeg(int(key))))
        boxes = view_boxes(60, 48, data.maker.settings.views, 3, 0, int(key))
        for level, name in (("global", "pixel_values"), ("local", "local_pixel_values")):
            crop = picture.crop(tuple(round(v) for v in boxes[level])).resize((32, 32), Image.BICUBIC)
            expected = processor.image_processor(crop, return_tensors="pt")["pixel_values"][0]
            # One of 255 levels of rounding between PIL's and torch's filter.
            assert (batch[name][row] - expected).abs().max() < 1.01 / 255 / 0.26
            assert (batch[name][row] - expected).abs().mean() < 0.002


def test_bytes_become_what_workers_normalised_before_in_one_operation():
    """All 256 values of each channel, against fp64 and against a pass a channel in fp32; any layout."""
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    before = torch.empty(values.shape)
    for channel in range(3):
        torch.mul(values[:, channel], 1 / (255 * std[channel]), out=before[:, channel])
        before[:, channel] -= mean[channel] / std[channel]
    centre, spread = (torch.tensor(one, dtype=torch.float64).view(3, 1, 1) for one in (mean, std))
    exact = (values.double() / 255 - centre) / spread
    normalise = Normalisation(mean, std)
    normalise(values)
    with Operations() as seen:
        found = normalise(values)
    assert seen.names == ["aten.addcmul.default"]
    assert found.dtype == torch.float32 and normalise(found) is found
    # Values reach 2.6, of which the last place is 2.4e-7.
    assert (found - before).abs().max() < 2.5e-7 and (found - exact).abs().max() < 5e-7
    last = values.contiguous(memory_format=torch.channels_last)
    assert torch.equal(normalise(last), found)


class Operations(TorchDispatchMode):
    """The names of the operations inside the block."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        self.names.append(str(operation))
        return operation(*arguments, **(keywords or {}))


def test_only_named_levels_are_made(shards, reader, monkeypatch):
    clip = next(reader(shards, levels=("global", "caption")).batches(0))
    assert set(clip) == {"pixel_values", "input_ids", "sample_keys"}
    everything = next(reader(shards).batches(0))
    assert torch.equal(clip["pixel_values"], everything["pixel_values"])
    no_pictures = next(reader(shards, levels=("roi", "tags")).batches(0))
    assert set(no_pictures) == {"roi_features", "roi_mask", "tag_input_ids", "has_tags", "sample_keys"}


def test_eos_pooling_pads_to_the_longest(shards, reader):
    batch = next(reader(shards, settings={"pooling": "eos"}).batches(0))
    lengths = (batch["input_ids"] != 0).sum(1)
    assert batch["input_ids"].shape[1] == lengths.max() < 20
    short = next(reader(shards, settings={"pooling": "eos", "max_length": 4}).batches(0))
    assert short["input_ids"].shape[1] == 4 and (short["input_ids"].max(1).values == 49407).all()


def test_fixed_lengths_and_all_regions_only_add_padding(shards, reader):
    usual = next(reader(shards, settings={"pooling": "eos"}).batches(0))
    longest = {name: usual[name].shape[1] for name in ("input_ids", "summary_input_ids", "tag_input_ids")}
    lengths = (min(longest.values()), max(longest.values()) + 3)
    assert min(longest.values()) < max(longest.values())
    fixed = next(reader(shards, settings={"pooling": "eos", "text_lengths": lengths, "all_regions": True}).batches(0))
    for name, length in longest.items():
        assert fixed[name].shape[1] == lengths[length > lengths[0]]
        assert torch.equal(fixed[name][:, :length], usual[name]) and not fixed[name][:, length:].any()
    count = usual["roi_mask"].shape[1]
    assert fixed["roi_mask"].shape[1] == 10 > count
    for name in ("roi_features", "roi_mask"):
        assert torch.equal(fixed[name][:, :count], usual[name]) and not fixed[name][:, count:].any()
    beyond = next(reader(shards, settings={"pooling": "eos", "text_lengths": (4,), "max_length": 30}).batches(0))
    assert beyond["input_ids"].shape[1] == 30


def test_most_confident_regions_are_kept_and_their_tags(shards, reader, processor):
    full, two = (next(reader(shards, settings={"max_regions": n}).batches(0)) for n in (10, 2))
    assert two["roi_features"].shape[1] == 2
    assert torch.equal(full["roi_features"][:, :2], two["roi_features"])
    texts = processor.tokenizer.batch_decode(two["tag_input_ids"], skip_special_tokens=True)
    for key, text, there in zip(two["sample_keys"], texts, two["has_tags"].tolist()):
        sample = make_sample(int(key))
        if there and sample.regions:
            assert text.replace(" ", "").split(",") == [f"red{region.label}" for region in ranked(sample)[:2]]


def test_a_tag_comes_as_often_as_objects_are_called_so_unless_told_otherwise(tmp_path, reader, processor):
    def three(stored, members):
        objects = [("dog", [], 0.1), ("cat", ["red"], 0.9), ("dog", [], 0.5)]
        regions = [
            {"box": [0, 0, 1, 1], "score": score, "label": label, "attributes": words}
            for label, words, score in objects
        ]
        return {"jpg": members["jpg"], "txt": b"a", "json": json.dumps({"regions": regions, "tags": stored}).encode()}

    expected = {
        # What `tags` holds -> as read, and with drop_repeated_tags.
        ("dog", "red cat"): ("red cat , dog , dog", "red cat , dog"),
        ("cat", "dog", "dog"): ("cat , dog , dog", "cat , dog"),
        ("sunny", "sunny", "outdoors"): ("sunny , sunny , outdoors", "sunny , outdoors"),
    }
    for number, (stored, found) in enumerate(expected.items()):
        spoil = dict.fromkeys(range(8), functools.partial(three, stored))
        folder = write_shards(tmp_path / f"data{number}", range(8), spoil=spoil)
        for drop in (False, True):
            made = reader(folder, levels=("global", "tags"), settings={"drop_repeated_tags": drop})
            texts = processor.tokenizer.batch_decode(next(made.batches(0))["tag_input_ids"], skip_special_tokens=True)
            assert {text.strip() for text in texts} == {found[drop]}


def test_several_captions(tmp_path, reader, processor):
    def several(members):
        return {**members, "json": json.dumps({"captions": ["one", "two", "three"]}).encode()}

    folder = write_shards(tmp_path / "data", range(16), spoil=dict.fromkeys(range(16), several))
    data = reader(folder, levels=("global", "caption"), batch=16)
    texts = [
        processor.tokenizer.batch_decode(next(data.batches(epoch))["input_ids"], skip_special_tokens=True)
        for epoch in range(4)
    ]
    assert {text.strip() for epoch in texts for text in epoch} == {"one", "two", "three"}
    assert equal(list(data.batches(2)), list(reader(folder, levels=("global", "caption"), batch=16).batches(2)))
