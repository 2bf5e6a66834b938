"""The released detector's 841 entries, and the command that converts them."""

import json

import pytest
import torch

from conversion.convert_vinvl import check_checkpoint, config_from_shapes, convert, main, read_label_map, released_names
from pyramidclip_hf.vinvl import VinVLConfig, VinVLForObjectAttributeDetection, VinVLImageProcessor

AGAIN = "attribute.feature_extractor.head.layer4."
FIRST = "roi_heads.box.feature_extractor.head.layer4."
ANCHORS = "rpn.anchor_generator.cell_anchors.0"
ANCHOR_TABLE = [
    [-15, -4, 30, 19], [-38, -16, 53, 31], [-84, -40, 99, 55], [-176, -88, 191, 103], [-360, -184, 375, 199],
    [-8, -8, 23, 23], [-24, -24, 39, 39], [-56, -56, 71, 71], [-120, -120, 135, 135], [-248, -248, 263, 263],
    [-3, -14, 18, 29], [-14, -36, 29, 51], [-36, -80, 51, 95], [-80, -168, 95, 183], [-168, -344, 183, 359],
]  # fmt: skip


def released_entries(
    layers=(3, 8, 36, 3), groups=32, per_group=8, stem=64, classes=1595, attributes=525, embedding=256, hidden=512
):
    """Name -> shape of the released file, written down from its published listing."""
    entries = {}

    def norm(name, channels):
        entries.update({f"{name}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")})

    def stage(prefix, index):
        width, out = groups * per_group * 2**index, stem * 4 * 2**index
        for block in range(layers[index]):
            into = out if block else (out // 2 if index else stem)
            entries[f"{prefix}{block}.conv1.weight"] = (width, into, 1, 1)
            entries[f"{prefix}{block}.conv2.weight"] = (width, width // groups, 3, 3)
            entries[f"{prefix}{block}.conv3.weight"] = (out, width, 1, 1)
            for bn, channels in (("bn1", width), ("bn2", width), ("bn3", out)):
                norm(f"{prefix}{block}.{bn}", channels)
            if block == 0:
                entries[f"{prefix}0.downsample.0.weight"] = (out, into, 1, 1)
                norm(f"{prefix}0.downsample.1", out)

    entries["backbone.body.stem.conv1.weight"] = (stem, 3, 7, 7)
    norm("backbone.body.stem.bn1", stem)
    for index in range(3):
        stage(f"backbone.body.layer{index + 1}.", index)
    channels, features = stem * 16, stem * 32
    entries[ANCHORS] = (15, 4)
    entries |= {"rpn.head.conv.weight": (channels, channels, 3, 3), "rpn.head.conv.bias": (channels,)}
    entries |= {"rpn.head.cls_logits.weight": (15, channels, 1, 1), "rpn.head.cls_logits.bias": (15,)}
    entries |= {"rpn.head.bbox_pred.weight": (60, channels, 1, 1), "rpn.head.bbox_pred.bias": (60,)}
    stage(FIRST, 3)
    for name, rows, columns in (
        ("roi_heads.box.predictor.cls_score", classes, features),
        ("roi_heads.box.predictor.bbox_pred", 4 * classes, features),
        ("attribute.predictor.fc_attr", hidden, features + embedding),
        ("attribute.predictor.attr_score", attributes, hidden),
    ):
        entries |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    entries["attribute.predictor.cls_embedding.weight"] = (classes, embedding)
    stage(AGAIN, 3)
    return entries


SMALL = {
    "layers": (1, 2, 1, 1), "groups": 2, "per_group": 4, "stem": 8, "classes": 5, "attributes": 4, "embedding": 3,
    "hidden": 6,
}  # fmt: skip


@pytest.fixture
def small_checkpoint():
    """A released file at reduced width; the tensors of the second names are the first ones, as saved."""
    generator = torch.Generator().manual_seed(0)
    entries = released_entries(**SMALL)
    tensors = {name: torch.rand(shape, generator=generator) + 0.1 for name, shape in entries.items()}
    for name in tensors:
        if name.startswith(AGAIN):
            tensors[name] = tensors[name.replace(AGAIN, FIRST)]
    tensors[ANCHORS] = torch.tensor(ANCHOR_TABLE).float()
    return tensors


@pytest.fixture
def labelmap(tmp_path):
    """Four classes, three attributes, in no order."""
    path = tmp_path / "labelmap.json"
    labels = {"zebra": 4, "air conditioner": 1, "horse": 2, "sky": 3}
    path.write_text(json.dumps({"label_to_idx": labels, "attribute_to_idx": {"wet": 2, "above": 1, "young": 3}}))
    return path


def words(checkpoint, labelmap, output, *more):
    return ["--checkpoint", str(checkpoint), "--labelmap", str(labelmap), "--output-dir", str(output), *more]


def run(*arguments):
    assert main(words(*arguments)) == 0


def test_the_full_size_model_has_exactly_the_released_entries():
    entries = released_entries()
    assert len(entries) == 841
    # The examples of the published listing.
    assert entries["backbone.body.layer1.0.conv1.weight"] == (256, 64, 1, 1)
    assert entries["backbone.body.layer1.0.conv2.weight"] == (256, 8, 3, 3)
    assert entries["backbone.body.layer1.0.downsample.0.weight"] == (256, 64, 1, 1)
    assert entries["backbone.body.layer2.0.conv1.weight"] == (512, 256, 1, 1)
    assert entries["backbone.body.layer2.0.conv2.weight"] == (512, 16, 3, 3)
    assert entries["backbone.body.layer3.0.conv2.weight"] == (1024, 32, 3, 3)
    assert entries[FIRST + "0.conv1.weight"] == (2048, 1024, 1, 1)
    assert entries[FIRST + "0.conv2.weight"] == (2048, 64, 3, 3)
    assert entries[FIRST + "0.conv3.weight"] == (2048, 2048, 1, 1)
    assert entries["roi_heads.box.predictor.bbox_pred.weight"] == (6380, 2048)
    assert entries["attribute.predictor.fc_attr.weight"] == (512, 2304)
    again = {name for name in entries if name.startswith(AGAIN)}
    assert len(again) == 50
    with torch.device("meta"):
        model = VinVLForObjectAttributeDetection(VinVLConfig())
    state = model.state_dict()
    names = released_names(state)
    assert len(set(names.values())) == len(state) == 790
    assert {released: tuple(state[name].shape) for name, released in names.items()} == {
        name: shape for name, shape in entries.items() if name not in again | {ANCHORS}
    }
    numbers = sum(tensor.numel() for tensor in state.values())
    assert round(numbers / 1e6, 1) == 148.3 and round(numbers * 4 / 2**20) == 566


def test_the_released_names_are_read_in_order(data_dir):
    labels, attributes = read_label_map(data_dir / "vg_vinvl_labelmap.json")
    assert (len(labels), len(attributes)) == (1595, 525)
    assert (labels[1], labels[1594], attributes[1], attributes[524]) == ("ad", "zucchini", "above", "young")


def test_the_configuration_of_the_released_file_is_the_default():
    labels, attributes = ({number: f"name {number}" for number in range(count)} for count in (1595, 525))
    tensors = {name: torch.empty(shape, device="meta") for name, shape in released_entries().items()}
    config = config_from_shapes(tensors, labels, attributes)
    difference = config.to_diff_dict().keys() - {"model_type", "transformers_version"}
    assert {
        name for name in difference if getattr(config, name, None) != getattr(VinVLConfig(), name, None)
    } == {"id2label", "label2id", "id2attribute"}  # fmt: skip


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_converted_weights_arrive_in_their_places(small_checkpoint, labelmap, tmp_path, wrapped, prefix, capsys):
    tensors = {prefix + name: tensor for name, tensor in small_checkpoint.items()}
    torch.save({"model": tensors, "iteration": 7} if wrapped else tensors, tmp_path / "vinvl.pth")
    run(tmp_path / "vinvl.pth", labelmap, tmp_path / "out")
    model, info = VinVLForObjectAttributeDetection.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    for name, released in released_names(model.state_dict()).items():
        assert torch.equal(model.state_dict()[name], small_checkpoint[released]), name
    config = model.config
    assert config.id2label == {0: "__background__", 1: "air conditioner", 2: "horse", 3: "sky", 4: "zebra"}
    assert config.label2id["zebra"] == 4
    assert config.id2attribute == {0: "__no_attribute__", 1: "above", 2: "wet", 3: "young"}
    processor = VinVLImageProcessor.from_pretrained(tmp_path / "out")
    assert dict(processor.size) == {"shortest_edge": 600, "longest_edge": 1000}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "model.safetensors", "preprocessor_config.json",
    }  # fmt: skip
    assert "fp16" not in capsys.readouterr().out


def test_half_precision_becomes_fp32_and_is_said(small_checkpoint, labelmap, tmp_path, capsys):
    torch.save({name: tensor.half() for name, tensor in small_checkpoint.items()}, tmp_path / "vinvl.pth")
    run(tmp_path / "vinvl.pth", labelmap, tmp_path / "out")
    model = VinVLForObjectAttributeDetection.from_pretrained(tmp_path / "out")
    expected = small_checkpoint["rpn.head.conv.weight"].half().float()
    assert model.dtype == torch.float32 and torch.equal(model.rpn.conv.weight, expected)
    assert "fp16" in capsys.readouterr().out


def test_missing_unused_and_misshapen_are_all_listed(small_checkpoint, labelmap, tmp_path, refused):
    del small_checkpoint["rpn.head.conv.bias"], small_checkpoint[AGAIN + "0.bn1.weight"]
    small_checkpoint["backbone.body.layer1.0.bn1.num_batches_tracked"] = torch.tensor(1)
    small_checkpoint["attribute.predictor.fc_attr.bias"] = torch.zeros(7)
    torch.save(small_checkpoint, tmp_path / "vinvl.pth")
    text = refused(main, words(tmp_path / "vinvl.pth", labelmap, tmp_path / "out"), "one consistent size")
    assert f"missing: {AGAIN}0.bn1.weight, rpn.head.conv.bias" in text
    assert "unused: backbone.body.layer1.0.bn1.num_batches_tracked" in text
    assert "misshapen: attribute.predictor.fc_attr.bias is (7,), expected (6,)" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (AGAIN + "0.conv3.weight", "must share the fourth stage"),
        (ANCHORS, "other anchors"),
    ],
)
def test_what_is_dropped_must_be_what_it_should_be(small_checkpoint, labelmap, name, message):
    labels, attributes = read_label_map(labelmap)
    config = config_from_shapes(small_checkpoint, labels, attributes)
    check_checkpoint(small_checkpoint, config)
    small_checkpoint[name] = small_checkpoint[name] + 1e-3
    with pytest.raises(ValueError, match=message) as error:
        check_checkpoint(small_checkpoint, config)
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"label_to_idx": {"a": 1, "b": 2, "c": 3}, "attribute_to_idx": {"x": 1, "y": 2, "z": 3}}, "names 3 classes"),
        ({"label_to_idx": {"a": 1, "b": 2, "c": 3, "d": 4}, "attribute_to_idx": {"x": 1}}, "names 1 attributes"),
        ({"label_to_idx": {"a": 0, "b": 1, "c": 2, "d": 3}, "attribute_to_idx": {"x": 1}}, "must be 1 to 4"),
        ({"label_to_idx": {"a": 1, "b": 1, "c": 2, "d": 3}, "attribute_to_idx": {"x": 1}}, "must be 1 to 4"),
        ({"label_to_idx": {"a": "1"}}, "label_to_idx"),
        ({"label_to_idx": {"a": 1, "b": 2, "c": 3, "d": 4}}, "attribute_to_idx"),
        ([], "label_to_idx"),
    ],
)
def test_label_maps_that_do_not_fit(small_checkpoint, labelmap, tmp_path, refused, content, message):
    labelmap.write_text(json.dumps(content))
    torch.save(small_checkpoint, tmp_path / "vinvl.pth")
    refused(main, words(tmp_path / "vinvl.pth", labelmap, tmp_path / "out"), message)
    assert not (tmp_path / "out").exists()


def test_other_files_are_named(small_checkpoint, labelmap, tmp_path, refused):
    torch.save({"visual.proj": torch.zeros(2, 2)}, tmp_path / "clip.pth")
    refused(main, words(tmp_path / "clip.pth", labelmap, tmp_path / "out"), "no VinVL detector")
    refused(main, words(tmp_path / "absent.pth", labelmap, tmp_path / "out"), "no such file or folder")
    torch.save(small_checkpoint, tmp_path / "vinvl.pth")
    (tmp_path / "labels.txt").write_text("zebra")
    refused(main, words(tmp_path / "vinvl.pth", tmp_path / "labels.txt", tmp_path / "out"), "no JSON")


def test_a_checkpoint_with_code_in_it_is_not_run(small_checkpoint, labelmap, tmp_path, refused):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"model": small_checkpoint, "optimizer": Trap()}, tmp_path / "vinvl.pth")
    refused(main, words(tmp_path / "vinvl.pth", labelmap, tmp_path / "out"), "nothing")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def test_a_model_in_the_folder_stays_unless_asked(small_checkpoint, labelmap, tmp_path, refused):
    torch.save(small_checkpoint, tmp_path / "vinvl.pth")
    output = tmp_path / "out"
    run(tmp_path / "vinvl.pth", labelmap, output)
    (output / "notes.txt").write_text("mine")
    before = (output / "model.safetensors").read_bytes()
    small_checkpoint["rpn.head.conv.bias"] += 1
    torch.save(small_checkpoint, tmp_path / "vinvl.pth")
    refused(main, words(tmp_path / "vinvl.pth", labelmap, output), "--overwrite")
    assert (output / "model.safetensors").read_bytes() == before
    run(tmp_path / "vinvl.pth", labelmap, output, "--overwrite")
    model = VinVLForObjectAttributeDetection.from_pretrained(output)
    assert torch.equal(model.rpn.conv.bias, small_checkpoint["rpn.head.conv.bias"])
    assert (output / "notes.txt").read_text() == "mine"


def test_a_failure_while_writing_leaves_nothing(small_checkpoint, labelmap, tmp_path, monkeypatch):
    def full_disk(self, folder, *args, **kwargs):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(VinVLForObjectAttributeDetection, "save_pretrained", full_disk)
    torch.save(small_checkpoint, tmp_path / "vinvl.pth")
    with pytest.raises(OSError, match="No space left"):
        convert(tmp_path / "vinvl.pth", labelmap, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labelmap.json", "vinvl.pth"]
