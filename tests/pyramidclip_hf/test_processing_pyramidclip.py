"""The processor: the plain CLIP call, the whole pyramid, missing levels, saving, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor

from pyramidclip_hf import PyramidCLIPConfig
from pyramidclip_hf.image_processing_pyramidclip import PyramidCLIPImageProcessor
from pyramidclip_hf.processing_pyramidclip import PyramidCLIPProcessor
from pyramidclip_hf.tokenization_pyramidclip import PyramidCLIPTokenizer

LONG = "word " * 100
BOX = [0.1, 0.2, 0.6, 0.9]


@pytest.fixture(scope="module")
def processor():
    return PyramidCLIPProcessor(PyramidCLIPImageProcessor(size=32), roi_feature_size=6)


def picture(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 56, 3), dtype=np.uint8))


def features(count, width=6):
    return np.arange(count * width, dtype=np.float32).reshape(count, width)


def boxes(count):
    return np.tile(np.array(BOX, dtype=np.float32), (count, 1))


def test_without_arguments():
    inputs = PyramidCLIPProcessor()(images=picture(), text="a photo of a cat", return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 224, 224)
    assert inputs["input_ids"].tolist() == [[49406, 320, 1125, 539, 320, 2368, 49407]]


def test_plain_clip_call(processor):
    texts = ["a photo of a cat", "wow!!"]
    inputs = processor(images=picture(), text=texts, return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"} == set(processor.model_input_names)
    direct = PyramidCLIPTokenizer()(texts, padding=True, return_tensors="pt")
    assert torch.equal(inputs["input_ids"], direct["input_ids"])
    assert torch.equal(inputs["attention_mask"], direct["attention_mask"])
    expected = processor.image_processor(picture(), return_tensors="pt")["pixel_values"]
    assert torch.equal(inputs["pixel_values"], expected)
    assert set(processor(text="a cat")) == {"input_ids", "attention_mask"}
    assert processor(text="a cat")["input_ids"] == [49406, 320, 2368, 49407]
    assert set(processor(images=[picture(), picture(1)])) == {"pixel_values"}
    assert processor(text=texts, padding="max_length", return_tensors="np")["input_ids"].shape == (2, 77)
    assert processor(text=texts, text_kwargs={"padding": "max_length", "max_length": 9})["input_ids"][1][4:] == [0] * 5
    assert processor(images=picture(), images_kwargs={"size": 16}, return_tensors="pt")["pixel_values"].shape[2:] == (
        16,
        16,
    )


def test_the_whole_pyramid(processor):
    inputs = processor(
        images=[picture(0), picture(1), picture(2)],
        text=["a cat", "a photo of a dog", "two birds"],
        summary=["cat", None, "  "],
        tags=[["red cat", "", "green tree"], "dog", None],
        local_images=[picture(3), picture(4), picture(5)],
        regions=[(features(2), boxes(2)), None, {"features": features(1), "boxes": boxes(1)}],
        return_tensors="pt",
    )
    assert set(inputs) == {
        "pixel_values", "input_ids", "attention_mask", "summary_input_ids", "has_summary", "tag_input_ids", "has_tags",
        "local_pixel_values", "roi_features", "roi_mask",
    }  # fmt: skip
    tokenizer = processor.tokenizer
    encoded = tokenizer(["cat", "", ""], padding=True, return_tensors="pt")["input_ids"]
    assert torch.equal(inputs["summary_input_ids"], encoded)
    assert inputs["has_summary"].dtype == torch.bool
    assert inputs["has_summary"].tolist() == [True, False, False]
    encoded = tokenizer(["red cat, green tree", "dog", ""], padding=True, return_tensors="pt")["input_ids"]
    assert torch.equal(inputs["tag_input_ids"], encoded)
    assert inputs["has_tags"].tolist() == [True, True, False]
    assert torch.equal(
        inputs["local_pixel_values"][2], processor(images=picture(5), return_tensors="pt")["pixel_values"][0]
    )
    assert inputs["roi_features"].dtype == torch.float32
    assert inputs["roi_features"].shape == (3, 2, 10)
    assert inputs["roi_mask"].tolist() == [[True, True], [False, False], [True, False]]
    assert inputs["roi_features"][0, 1].tolist() == pytest.approx([6, 7, 8, 9, 10, 11, *BOX])
    assert inputs["roi_features"][~inputs["roi_mask"]].abs().sum() == 0


def test_texts_alone_pad_each_level_to_its_own_longest(processor):
    inputs = processor(text=["a", "b"], summary=["one two three", None], tags=[None, None], return_tensors="np")
    lengths = [inputs[name].shape[1] for name in ("input_ids", "summary_input_ids", "tag_input_ids")]
    assert lengths == [3, 5, 2]
    assert inputs["has_tags"].tolist() == [False, False]


def test_one_sample(processor):
    rows = np.concatenate([features(3), boxes(3)], axis=1)
    for regions in (rows, (features(3), boxes(3)), [rows]):
        inputs = processor(
            images=picture(), text="a cat", summary="cat", tags=["cat", "red mat"], regions=regions, return_tensors="pt"
        )
        assert inputs["roi_features"].shape == (1, 3, 10)
        assert inputs["summary_input_ids"].shape[0] == inputs["tag_input_ids"].shape[0] == 1
    together = processor.tokenizer("cat, red mat", return_tensors="pt")["input_ids"]
    assert torch.equal(inputs["tag_input_ids"], together)
    assert processor(text="a cat", summary=[None], return_tensors="pt")["has_summary"].tolist() == [False]
    assert processor(tags=["cat", "dog"], return_tensors="pt")["tag_input_ids"].shape[0] == 2


def test_no_regions_at_all_still_give_one_masked_row(processor):
    inputs = processor(regions=[None, (features(0), boxes(0))], return_tensors="pt")
    assert inputs["roi_features"].shape == (2, 1, 10)
    assert not inputs["roi_mask"].any()


def test_truncation_is_the_default_and_is_told_a_level(processor):
    inputs = processor(
        text=[LONG, "b"], summary=["a", LONG], tags=[None, "dog"], return_truncation=True, return_tensors="pt"
    )
    assert inputs["input_ids"].shape[1] == inputs["summary_input_ids"].shape[1] == 77
    assert inputs["input_ids"][0, -1] == 49407
    assert inputs["truncated"].tolist() == [True, False]
    assert inputs["summary_truncated"].tolist() == [False, True]
    assert inputs["tag_truncated"].tolist() == [False, False]
    assert "truncated" not in processor(text=[LONG])


def test_save_and_load(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    PyramidCLIPConfig().save_pretrained(tmp_path)
    call = {"images": picture(), "text": ["wow!!", "a cat"], "tags": [None, "cat"], "return_tensors": "pt"}
    expected = processor(**call)
    for loaded in (PyramidCLIPProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is PyramidCLIPProcessor
        assert type(loaded.tokenizer) is PyramidCLIPTokenizer
        assert loaded.roi_feature_size == 6
        assert loaded.to_dict() == processor.to_dict()
        inputs = loaded(**call)
        assert all(torch.equal(inputs[key], expected[key]) for key in expected)
    nested = json.loads((tmp_path / "processor_config.json").read_text())["image_processor"]
    assert json.loads((tmp_path / "preprocessor_config.json").read_text()) == nested
    (tmp_path / "processor_config.json").unlink()
    assert AutoImageProcessor.from_pretrained(tmp_path).to_dict() == processor.image_processor.to_dict()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "at least one of images, text"),
        ({"text": []}, "at least one text"),
        ({"text": ["a", None]}, "NoneType at place 1"),
        ({"text": ["a", "b"], "summary": ["a"]}, r"lengths \{'text': 2, 'summary': 1\}"),
        ({"text": ["a", "b"], "summary": "a"}, r"lengths \{'text': 2, 'summary': 1\}"),
        ({"text": ["a"], "tags": [[3]]}, "tags to be strings, got 3"),
        ({"images": []}, "at least one picture"),
        ({"images": ["x", "y"], "regions": [None]}, "lengths"),
        ({"regions": [(features(2), boxes(3))]}, r"regions\[0\] must be features"),
        ({"regions": [None, (features(2, 5), boxes(2))]}, r"regions\[1\] has shape \(2, 9\).*roi_feature_size"),
        ({"regions": [(features(1), boxes(1) * 100)]}, "fractions of the uncropped"),
        ({"regions": [(features(1), boxes(1)[:, ::-1])]}, "fractions of the uncropped"),
        ({"regions": [(features(1) * np.nan, boxes(1))]}, "non-finite"),
    ],
)
def test_what_is_refused(processor, call, message):
    with pytest.raises(ValueError, match=message):
        processor(**call)


def test_a_wrong_region_width_is_refused():
    with pytest.raises(ValueError, match="positive integer"):
        PyramidCLIPProcessor(roi_feature_size=0)
