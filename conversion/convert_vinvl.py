"""From the released VinVL detector (`vinvl_vg_x152c4.pth`) and its label map to a folder that `from_pretrained` loads.

    python -m conversion.convert_vinvl --checkpoint FILE --labelmap JSON --output-dir DIR [--overwrite]

The sizes are read off the shapes. Every entry of the file is accounted for: most are renamed; the second set of names
for the fourth stage must hold the same values, and the anchor table must equal the recomputed one; both are then
dropped.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from pyramidclip_command import CommandParser, answer_words, check_there, run_command


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line.

    Raises:
        ValueError: wrong words.
    """
    parser = CommandParser(prog="python -m conversion.convert_vinvl", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="vinvl_vg_x152c4.pth")
    parser.add_argument("--labelmap", type=Path, required=True, help="VG-SGG-dicts-vgoi6-clipped.json")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is already in the folder")
    arguments = parser.parse_args(argv)
    check_there("--checkpoint", arguments.checkpoint, "vinvl_vg_x152c4.pth")
    check_there("--labelmap", arguments.labelmap, "VG-SGG-dicts-vgoi6-clipped.json")
    return arguments


if __name__ == "__main__":
    answer_words(parse_arguments)

import torch

from conversion.checkpoint_file import as_float32, read_checkpoint, state_dict_of
from conversion.model_folder import check_output_folder, model_written_aside
from pyramidclip_hf.files import parse_json, read_utf8
from pyramidclip_hf.vinvl import VinVLConfig, VinVLForObjectAttributeDetection, VinVLImageProcessor
from pyramidclip_hf.vinvl.boxes_vinvl import cell_anchors

# Beginnings of the names: ours and the released ones.
_PREFIXES = (
    ("backbone.", "backbone.body."),
    ("rpn.", "rpn.head."),
    ("roi_head.layer4.", "roi_heads.box.feature_extractor.head.layer4."),
    ("roi_head.", "roi_heads.box.predictor."),
    ("attribute_head.", "attribute.predictor."),
)


_FOURTH_STAGE = "roi_heads.box.feature_extractor.head.layer4."


# The attribute head shared its extractor with the box head, so the file names it twice.
_FOURTH_STAGE_AGAIN = "attribute.feature_extractor.head.layer4."


_ANCHORS = "rpn.anchor_generator.cell_anchors.0"


def convert(
    checkpoint: str | Path,
    labelmap: str | Path,
    output_dir: str | Path,
    *,
    overwrite: bool = False,
    say: Callable[[str], object] = print,
) -> VinVLConfig:
    """Converts one checkpoint file.

    Args:
        checkpoint: file with the tensors under the released names, bare or as `{"model": {...}}`, optionally behind
            `module.`; fp16 and bf16 are widened to fp32.
        labelmap: JSON file with `label_to_idx` and `attribute_to_idx`.
        output_dir: folder to write, model and image processor; it appears whole or not at all.
        overwrite: replace a model in `output_dir`.
        say: receives the messages.

    Returns:
        The model's configuration.

    Raises:
        ValueError: not such a checkpoint (every missing, unused and misshapen tensor is listed), no such label map, or
            the two do not fit each other.
        OSError: a file is missing, the folder holds a model already, or the disk is full.
    """
    checkpoint, output_dir = Path(checkpoint), Path(output_dir)
    check_output_folder(output_dir, overwrite)
    labels, attributes = read_label_map(labelmap)
    state_dict, widened = as_float32(state_dict_of(read_checkpoint(checkpoint), checkpoint), checkpoint)
    if widened:
        say(f"{widened} of {len(state_dict)} tensors were fp16 or bf16 and are converted to fp32 (exact).")
    config = config_from_shapes(state_dict, labels, attributes)
    check_checkpoint(state_dict, config)
    with torch.device("meta"):
        model = VinVLForObjectAttributeDetection(config)
    names = released_names(model.state_dict())
    model.load_state_dict({name: state_dict[released] for name, released in names.items()}, assign=True)
    say(
        f"{checkpoint.name}: {len(state_dict)} entries, of which {len(names)} are kept; the others are second names, "
        f"checked equal, and the anchors. {len(labels) - 1} classes, {len(attributes) - 1} attributes, "
        f"{config.feature_size} numbers a region."
    )
    with model_written_aside(output_dir) as folder:
        model.save_pretrained(folder)
        VinVLImageProcessor().save_pretrained(folder)
    say(f"Written to {output_dir}.")
    return config


def read_label_map(path: str | Path) -> tuple[dict[int, str], dict[int, str]]:
    """Names of classes and attributes by id, 0 (background, no attribute) included.

    Raises:
        ValueError: no JSON, no such mappings, or ids that are not 1 .. n.
    """
    try:
        content = parse_json(read_utf8(path))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error
    found: list[dict[int, str]] = []
    for key, zero in (("label_to_idx", "__background__"), ("attribute_to_idx", "__no_attribute__")):
        mapping = content.get(key) if isinstance(content, Mapping) else None
        if not isinstance(mapping, Mapping) or not all(type(i) is int for i in mapping.values()):
            raise ValueError(f"{path} must map names to numbers under {key!r}, as the detector's label map does.")
        names = {i: name for name, i in sorted(mapping.items(), key=lambda item: item[1])}
        if not names or list(names) != list(range(1, len(mapping) + 1)):
            raise ValueError(f"{path}: the ids under {key!r} must be 1 to {len(mapping)}, each once.")
        found.append({0: zero, **names})
    labels, attributes = found
    return labels, attributes


def config_from_shapes(
    state_dict: Mapping[str, torch.Tensor], labels: dict[int, str], attributes: dict[int, str]
) -> VinVLConfig:
    """The configuration of a checkpoint of any width.

    Args:
        state_dict: tensors under the released names.
        labels: names of the classes by id, 0 included.
        attributes: those of the attributes.

    Raises:
        ValueError: another model, or names that do not fit it.
    """

    def size(name: str, axis: int = 0) -> int:
        if name not in state_dict or state_dict[name].dim() <= axis:
            raise ValueError(
                f"This is no VinVL detector with attributes: {name!r} is missing or has too few dimensions. The first "
                f"names in the file are {list(state_dict)[:5]}."
            )
        return state_dict[name].shape[axis]

    heads = (
        ("classes", "background", labels, size("roi_heads.box.predictor.cls_score.weight")),
        ("attributes", "no attribute", attributes, size("attribute.predictor.attr_score.weight")),
    )
    for what, zero, names, rows in heads:
        if rows != len(names):
            raise ValueError(
                f"The label map does not fit the checkpoint: it names {len(names) - 1} {what}, and with {zero!r} the "
                f"checkpoint's head would have {len(names)} rows, but it has {rows}."
            )
    width_per_group = size("backbone.body.layer1.0.conv2.weight", 1)
    return VinVLConfig(
        layers=tuple(_depth(state_dict, f"backbone.body.layer{i}.") for i in (1, 2, 3))
        + (_depth(state_dict, _FOURTH_STAGE),),
        groups=size("backbone.body.layer1.0.conv2.weight") // width_per_group,
        width_per_group=width_per_group,
        stem_channels=size("backbone.body.stem.conv1.weight"),
        label_embedding_size=size("attribute.predictor.cls_embedding.weight", 1),
        attribute_hidden_size=size("attribute.predictor.fc_attr.weight"),
        id2label=labels,
        label2id={name: i for i, name in labels.items()},
        id2attribute=attributes,
    )


def _depth(state_dict: Mapping[str, torch.Tensor], prefix: str) -> int:
    """Blocks of a stage; at least 1, so that an absent stage is reported as missing tensors."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return max(1, len({found[1] for name in state_dict if (found := pattern.match(name))}))


def released_names(names: Iterable[str]) -> dict[str, str]:
    """Our name -> the released one, for each tensor of the model."""
    found = {}
    for name in names:
        ours, released = next(pair for pair in _PREFIXES if name.startswith(pair[0]))
        found[name] = released + name.removeprefix(ours)
    return found


def check_checkpoint(state_dict: Mapping[str, torch.Tensor], config: VinVLConfig) -> None:
    """Accounts for every entry: names, shapes, second names and anchors.

    Raises:
        ValueError: every missing, unused and misshapen tensor, listed; second names with other values; other anchors.
    """
    with torch.device("meta"):
        ours = VinVLForObjectAttributeDetection(config).state_dict()
    expected = {released: tuple(ours[name].shape) for name, released in released_names(ours).items()}
    again = {
        name.replace(_FOURTH_STAGE, _FOURTH_STAGE_AGAIN): name for name in expected if name.startswith(_FOURTH_STAGE)
    }
    expected |= {second: expected[first] for second, first in again.items()}
    expected[_ANCHORS] = (config.num_anchors, 4)
    missing, unused = sorted(expected.keys() - state_dict.keys()), sorted(state_dict.keys() - expected.keys())
    misshapen = [
        f"{name} is {tuple(state_dict[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in state_dict and tuple(state_dict[name].shape) != shape
    ]
    if missing or unused or misshapen:
        raise ValueError(
            "The checkpoint is no VinVL detector of one consistent size.\n"
            + "\n".join(
                f"  {what}: {', '.join(names) or 'none'}"
                for what, names in (("missing", missing), ("unused", unused), ("misshapen", misshapen))
            )
        )
    differing = [second for second, first in again.items() if not torch.equal(state_dict[second], state_dict[first])]
    if differing:
        raise ValueError(
            f"The attribute head must share the fourth stage of the box head, but these differ from it: {differing}."
        )
    anchors = torch.tensor(cell_anchors(config.anchor_sizes, config.anchor_ratios))
    if not torch.equal(state_dict[_ANCHORS], anchors):
        raise ValueError(
            f"The checkpoint was trained with other anchors than sizes {tuple(config.anchor_sizes)} and ratios "
            f"{tuple(config.anchor_ratios)} give. Its table {_ANCHORS!r}: {state_dict[_ANCHORS].tolist()}."
        )


def run(arguments: argparse.Namespace) -> None:
    """What the command line asks for."""
    convert(arguments.checkpoint, arguments.labelmap, arguments.output_dir, overwrite=arguments.overwrite)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(parse_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
