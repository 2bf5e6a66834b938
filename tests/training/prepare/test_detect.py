"""`training.prepare.detect` with tiny detectors of each kind, made here with random weights, and with one that
misbehaves."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.prepare.small_data import (
    counts,
    make_vinvl,
    picture,
    problems,
    read_tars,
    records,
    run_step,
    tree,
    write_tar,
)
from training.data.records import sample_from_members
from training.data.shards import read_dataset_json
from training.prepare import detect
from training.prepare.steps import detectors
from training.prepare.steps.detectors import DetectorArguments, open_detector, prompted_name, queries_of
from training.prepare.steps.regions import Detections
from training.prepare.steps.work import Worker

pytest.importorskip("torchvision")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PYRAMIDCLIP_CACHE", str(tmp_path / "cache"))


def pil(number=0, size=(64, 48)):
    return Image.fromarray(np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), np.uint8))


def _backbone():
    from transformers import ResNetConfig

    return ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 12, 16, 24],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )


def detr(folder):
    from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessor

    torch.manual_seed(0)
    config = DetrConfig(
        backbone_config=_backbone(),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=7,
        num_labels=5,
    )
    config.id2label = {i: f"thing{i}" for i in range(5)}
    DetrForObjectDetection(config).save_pretrained(folder)
    DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(folder)
    return str(folder)


def rt_detr(folder):
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrImageProcessor

    torch.manual_seed(0)
    config = RTDetrConfig(
        backbone_config=_backbone(),
        encoder_hidden_dim=16,
        encoder_in_channels=[12, 16, 24],
        encoder_ffn_dim=16,
        d_model=16,
        num_queries=9,
        decoder_in_channels=[16, 16, 16],
        decoder_ffn_dim=16,
        decoder_layers=2,
        decoder_attention_heads=2,
        encoder_attention_heads=2,
        num_labels=5,
        anchor_image_size=None,
        eval_size=None,
    )
    config.id2label = {i: f"thing{i}" for i in range(5)}
    RTDetrForObjectDetection(config).save_pretrained(folder)
    RTDetrImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return str(folder)


def yolos(folder):
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[64, 96],
        patch_size=16,
        num_detection_tokens=6,
        num_labels=5,
    )
    YolosForObjectDetection(config).save_pretrained(folder)
    YolosImageProcessor(size={"height": 64, "width": 96}).save_pretrained(folder)
    return str(folder)


WORDS = ["cat", "dog", "tree", "sky", "red", "big", "striped"]


def owl(folder):
    from transformers import CLIPTokenizer, Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessor, Owlv2Processor

    torch.manual_seed(0)
    letters = sorted({letter for word in WORDS for letter in word})
    pieces = ["!", "<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokenizer = CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=16)
    text = {
        "vocab_size": len(pieces),
        "max_position_embeddings": 16,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"image_size": 64, "patch_size": 16}
    config = Owlv2Config(text_config={**text, **small}, vision_config={**vision, **small}, projection_dim=16)
    Owlv2ForObjectDetection(config).save_pretrained(folder)
    images = Owlv2ImageProcessor(size={"height": 64, "width": 64})
    Owlv2Processor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return str(folder)


def grounding_dino(folder):
    from transformers import (
        BertTokenizer,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessor,
        GroundingDinoProcessor,
        SwinConfig,
    )

    torch.manual_seed(0)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", *WORDS]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)})
    backbone = SwinConfig(
        image_size=64,
        patch_size=4,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=2,
        out_indices=[2, 3, 4],
    )
    text = {
        "vocab_size": len(vocabulary),
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    config = GroundingDinoConfig(
        backbone_config=backbone,
        text_config={**text, "model_type": "bert"},
        d_model=32,
        num_queries=8,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_feature_levels=4,
        fusion_dropout=0.0,
    )
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    images = GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    GroundingDinoProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return str(folder)


MAKERS = {
    "vinvl": make_vinvl,
    "detr": detr,
    "rt_detr": rt_detr,
    "yolos": yolos,
    "owlv2": owl,
    "grounding-dino": grounding_dino,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A function from the kind of detector to its folder, made when first asked for."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = MAKERS[kind](tmp_path_factory.mktemp(kind))
        return made[kind]

    return get


@pytest.fixture
def vocabulary(tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog\ntree\nsky\n")
    (tmp_path / "attributes.txt").write_text("red\nbig\nstriped\n")
    return {"names": str(tmp_path / "names.txt"), "attributes": str(tmp_path / "attributes.txt")}


def check_detections(found, width):
    assert found.boxes.min() >= 0 and found.boxes.max() <= 1 and found.features.shape == (len(found), width)
    assert all(isinstance(label, str) and label for label in found.labels)


def test_vinvl_provider_gives_what_the_model_gives(checkpoint):
    from pyramidclip_hf.vinvl import VinVLForObjectAttributeDetection, VinVLImageProcessor, phrases

    provider = open_detector(DetectorArguments(checkpoint("vinvl"), top=4))
    pictures = [pil(0), pil(1, (50, 90))]
    model = VinVLForObjectAttributeDetection.from_pretrained(checkpoint("vinvl"))
    processor = VinVLImageProcessor.from_pretrained(checkpoint("vinvl"))
    for found, image in zip(provider.detect(pictures), pictures):
        (expected,) = model(**processor([image], return_tensors="pt")).detections
        check_detections(found, provider.feature_size)
        # Rows of equal score may come in another order in a batch; each region has its own features.
        assert len(found) == 4 and found.labels == expected.label_names[:4]
        np.testing.assert_allclose(found.scores, expected.scores[:4], atol=1e-5)
        np.testing.assert_allclose(found.boxes, expected.normalized_boxes[:4], atol=1e-4)
        np.testing.assert_allclose(found.features, expected.features[:4], rtol=1e-3, atol=1e-3)
        assert [" ".join([*a, n]) for a, n in zip(found.attributes, found.labels)] == phrases(expected, model.config)[
            :4
        ]
    assert provider.made_by["maker"] == "vinvl" and provider.made_by["settings"]["top"] == 4


@pytest.mark.parametrize("kind", ["detr", "rt_detr"])
def test_boxes_are_traced_to_their_queries(checkpoint, kind):
    provider = open_detector(DetectorArguments(checkpoint(kind), features="queries", score_threshold=0.0))
    inputs = provider.processor(images=[pil(0), pil(1)], return_tensors="pt")
    with torch.no_grad():
        outputs = provider.model(**inputs)
    before = outputs.pred_boxes.clone()
    post_process = provider.processor.post_process_object_detection
    found = post_process(outputs, threshold=0.0)
    queries = queries_of(outputs, post_process, 0.0)
    assert torch.equal(outputs.pred_boxes, before)
    for i, (result, query) in enumerate(zip(found, queries)):
        x, y, w, h = outputs.pred_boxes[i, query].unbind(-1)
        expected = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1)
        torch.testing.assert_close(result["boxes"], expected)
        assert len(query) == outputs.logits.shape[1]
    states = detectors.query_states(outputs, provider.model)
    detections = provider.detect([pil(0), pil(1)])
    for i, one in enumerate(detections):
        check_detections(one, 16)
        distance = torch.cdist(torch.tensor(one.features), states[i]).min(1)
        assert distance.values.max() < 1e-5 and len(set(distance.indices.tolist())) == len(one)


@pytest.mark.parametrize("kind", ["detr", "rt_detr"])
def test_backbone_features_are_means_under_the_box(checkpoint, kind):
    provider = open_detector(DetectorArguments(checkpoint(kind), score_threshold=0.0))
    (found,) = provider.detect([pil(0)])
    check_detections(found, 24)
    assert provider.feature_size == 24

    # A map that holds its own coordinates: the mean under a box is the box's centre.
    def coordinates(width, height):
        y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
        return torch.stack([x, y])[None]

    boxes = torch.tensor([[0.25, 0.25, 0.75, 0.75], [0.2, 0.3, 0.6, 0.9]])
    provider.maps[:] = [coordinates(40, 30)]
    centres = provider._pooled(0, boxes, {})
    torch.testing.assert_close(centres, torch.tensor([[0.5, 0.5], [0.4, 0.6]]), atol=1e-3, rtol=0)
    # In a padded batch the picture fills the top left.
    mask = torch.zeros(1, 60, 80)
    mask[:, :60, :40] = 1
    centres = provider._pooled(0, boxes, {"pixel_mask": mask})
    torch.testing.assert_close(centres, torch.tensor([[0.25, 0.5], [0.2, 0.6]]), atol=1e-3, rtol=0)


def test_feature_size_chooses_the_map(checkpoint):
    provider = open_detector(DetectorArguments(checkpoint("rt_detr"), feature_size=16, score_threshold=0.0))
    assert provider.detect([pil(0)])[0].features.shape[1] == 16
    provider = open_detector(DetectorArguments(checkpoint("rt_detr"), feature_size=2048, score_threshold=0.0))
    with pytest.raises(ValueError, match=r"no feature map of 2048 channels: the backbone gives \[12, 16, 24\]"):
        provider.detect([pil(0)])


def test_yolos_has_queries_only(checkpoint):
    with pytest.raises(ValueError, match="--features queries"):
        open_detector(DetectorArguments(checkpoint("yolos")))
    provider = open_detector(DetectorArguments(checkpoint("yolos"), features="queries", score_threshold=0.0))
    (found,) = provider.detect([pil(0)])
    check_detections(found, 16)
    assert len(found) == 6


@pytest.mark.parametrize("kind", ["owlv2", "grounding-dino"])
def test_open_vocabulary(checkpoint, vocabulary, kind):
    settings = {"score_threshold": 0.0, "attribute_threshold": 0.0, "names_per_prompt": 3, **vocabulary}
    provider = open_detector(DetectorArguments(checkpoint(kind), **settings))
    found = provider.detect([pil(0), pil(1, (48, 64))])
    for one in found:
        width = {"owlv2": 16, "grounding-dino": 32}[kind]
        assert one.features.shape == (len(one), width) and len(one) and provider.feature_size == width
        assert set(one.labels) <= {"cat", "dog", "tree", "sky", ""}
        assert set(sum(one.attributes, [])) <= {"red", "big", "striped"}
        overlaps = _overlaps(one.boxes)
        assert overlaps[~np.eye(len(one), dtype=bool)].max(initial=0) <= 0.5 + 1e-6
    assert any(words for one in found for words in one.attributes)
    assert provider.made_by["settings"]["names"] == ["cat", "dog", "tree", "sky"]
    with pytest.raises(ValueError, match="--names FILE"):
        open_detector(DetectorArguments(checkpoint(kind)))


def _overlaps(boxes):
    low, high = np.maximum(boxes[:, None, :2], boxes[None, :, :2]), np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    both = np.clip(high - low, 0, None).prod(-1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    return both / np.maximum(areas[:, None] + areas[None] - both, 1e-12)


def test_attributes_belong_to_the_region_they_overlap(checkpoint, vocabulary):
    provider = open_detector(DetectorArguments(checkpoint("owlv2"), **vocabulary))
    regions = Detections([[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]], [0.9, 0.8], ["cat", "dog"], np.zeros((2, 4)))
    boxes = [[0, 0, 0.5, 0.45], [0.5, 0.5, 1, 1], [0, 0.02, 0.5, 0.5], [0, 0, 1, 1], [0.5, 0.5, 1, 0.95]]
    answer = Detections(boxes, [0.3, 0.5, 0.7, 0.9, 0.2], ["red", "big", "striped", "big", "big"], np.zeros((5, 4)))
    assert provider._attributes(regions, answer) == [["red", "striped"], ["big"]]


def test_names_that_come_back_in_pieces():
    assert prompted_name("red cat", ["cat", "red cat"]) == "red cat"
    assert prompted_name("cat dog", ["air conditioner", "cat", "dog"]) == "cat"
    assert prompted_name("conditioner", ["air conditioner", "cat"]) == "air conditioner"
    assert prompted_name("", ["cat"]) == ""


def test_what_is_no_detector_is_refused(tmp_path):
    from transformers import BertConfig

    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a 'bert': expected vinvl, one of"):
        open_detector(DetectorArguments(str(tmp_path)))


class Scripted:
    """A provider that gives what the width of the picture asks for."""

    feature_size = 4
    made_by = {"maker": "scripted"}

    def detect(self, pictures):
        return [self.one(picture.width) for picture in pictures]

    def one(self, width):
        boxes, scores, features = [[0, 0, 1, 1]] * 3, [0.5, 0.9, 0.7], np.arange(12.0).reshape(3, 4)
        if width == 20:
            return Detections([], [], [], np.zeros((0, 4)))
        if width == 21:
            features[1, 2] = np.nan
        if width == 22:
            features[:] = np.nan
        if width == 23:
            boxes = [[0.5, 0, 0.4, 1], [0, 0, 1, 1], [0, 0, 1.5, 1]]
        if width == 24:
            raise ValueError("too narrow for me")
        return Detections(boxes, scores, ["a", "b", "c"], features, [["x", "y"], [], ["z"]])


def packed(folder, widths=(30, 20, 21, 22, 23, 24, 31)):
    samples = [(f"w{width}", {"jpg": picture(width, (width, 10)), "txt": b"a"}) for width in widths]
    samples.insert(3, ("broken", {"jpg": picture(0, (100, 90))[:3000], "txt": b"a"}))
    samples.insert(5, ("huge", {"jpg": picture(0, (200, 100)), "txt": b"a"}))
    samples.insert(6, ("unfit", {"jpg": picture(0), "txt": b"\xff"}))
    write_tar(folder / "00000.tar", samples[:6])
    write_tar(folder / "00001.tar", samples[6:])
    return dict(samples)


def run(folder, provider=None, **options):
    arguments = detect.DetectArguments(str(folder), batch_size=options.pop("batch_size", 3), max_image_pixels=10_000)
    return detect.run(provider or Scripted(), arguments, options.pop("top", 2), Worker(), **options)


def test_what_detectors_do_wrong_is_named_and_the_rest_goes_on(tmp_path):
    before = packed(tmp_path / "data")
    run(tmp_path / "data")
    after, made = read_tars(tmp_path / "data"), records(tmp_path / "data")
    assert list(after) == list(before)
    for key, members in before.items():
        assert {s: d for s, d in after[key].items() if s in members} == members
    for key in ("w30", "w31"):
        assert [(r["label"], r["score"], r["attributes"]) for r in made[key]["regions"]] == [
            ("b", 0.9, []),
            ("c", 0.7, ["z"]),
        ]
        assert made[key]["tags"] == ["b", "z c"]
        assert sample_from_members(after[key], key, "").roi.tolist() == [[4, 5, 6, 7], [8, 9, 10, 11]]
    assert [r["label"] for r in made["w21"]["regions"]] == ["c", "a"] and [
        r["label"] for r in made["w23"]["regions"]
    ] == ["b"]
    assert made["w20"] == made["w22"] == {"regions": []}
    named = {(key, reason) for _, key, reason, _ in problems(tmp_path / "data", "regions")}
    assert named == {
        ("w20", "no-regions"),
        ("w21", "feature-not-finite"),
        ("w22", "feature-not-finite"),
        ("w22", "no-regions"),
        ("w23", "box-upside-down"),
        ("w23", "box-outside"),
        ("w24", "refused-by-detector"),
        ("broken", "bad-picture"),
        ("huge", "picture-too-large"),
        ("unfit", "bad-utf8"),
    }
    assert {k: counts(tmp_path / "data", "regions")[k] for k in ("in", "out", "rejected")} == {
        "in": 10,
        "out": 10,
        "rejected": 0,
    }
    described = read_dataset_json(tmp_path / "data")
    assert described["roi_feature_size"] == 4 and described["made_by"]["regions"] == {"maker": "scripted"}


def test_a_detector_that_refuses_everything_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(detect, "_REFUSALS_IN_A_ROW", 4)
    write_tar(tmp_path / "data" / "0.tar", [(f"k{i}", {"jpg": picture(i, (24, 10)), "txt": b"a"}) for i in range(6)])
    with pytest.raises(RuntimeError, match="refused 4 pictures in a row; the last one: too narrow"):
        run(tmp_path / "data")
    assert not list((tmp_path / "data").glob("*.partial"))


def test_two_kinds_are_not_mixed_unknowingly(tmp_path):
    packed(tmp_path / "data")
    run(tmp_path / "data")
    first = tree(tmp_path / "data")
    run(tmp_path / "data")
    assert tree(tmp_path / "data") == first
    other = Scripted()
    other.made_by = {"maker": "another"}
    with pytest.raises(
        ValueError, match="already has regions made by {'maker': 'scripted'}, not by {'maker': 'another'}"
    ):
        run(tmp_path / "data", other)
    assert tree(tmp_path / "data") == first
    run(tmp_path / "data", other, overwrite=True)
    assert read_dataset_json(tmp_path / "data")["made_by"]["regions"] == {"maker": "another"}


def test_unfinished_regions_are_marked(tmp_path):
    packed(tmp_path / "data")
    run(tmp_path / "data")

    class Stops(Scripted):
        made_by = {"maker": "stops"}

        def one(self, width):
            if width == 31:
                raise KeyboardInterrupt
            return super().one(width)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "data", Stops(), overwrite=True)
    assert read_dataset_json(tmp_path / "data")["unfinished"] == ["regions"]


def test_the_command(tmp_path, checkpoint):
    packed(tmp_path / "data")
    flags = [
        "--input_dir",
        str(tmp_path / "data"),
        "--detector",
        checkpoint("detr"),
        "--device",
        "cpu",
        "--score_threshold",
        "0",
    ]
    run_step(detect, [*flags, "--max_image_pixels", "10000"])
    described = read_dataset_json(tmp_path / "data")
    assert described["roi_feature_size"] == 24 and described["made_by"]["regions"]["maker"] == "detr"
    assert json.loads(read_tars(tmp_path / "data")["w30"]["json"])["regions"]
    with pytest.raises(ValueError, match="batch_size is 0"):
        run_step(detect, [*flags, "--batch_size", "0"])
