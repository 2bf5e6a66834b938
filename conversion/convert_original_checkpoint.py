"""From a released PyramidCLIP checkpoint to a folder that `from_pretrained` loads, and back.

    python -m conversion.convert_original_checkpoint --checkpoint FILE --output-dir DIR [--architecture NAME]
        [--check [FILE.npz]] [--overwrite]
    python -m conversion.convert_original_checkpoint --reverse --model DIR --output FILE

`--check` turns the written folder back into the released names and compares bit for bit, loads it with
`from_pretrained`, and looks for values that are not finite; with FILE.npz it also compares outputs with stored ones. A
folder that fails a check does not appear. fp16 and bf16 weights are widened to fp32, exactly; `--reverse` then gives
the fp32 values.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pyramidclip_command import CommandParser, answer_words, check_there, run_command
from pyramidclip_hf.architectures_pyramidclip import ARCHITECTURES


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line.

    Raises:
        ValueError: wrong words or combinations of them.
    """
    parser = CommandParser(prog="python -m conversion.convert_original_checkpoint", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="released checkpoint (.pth.tar, .pt)")
    parser.add_argument("--output-dir", type=Path, help="folder to write")
    parser.add_argument("--architecture", choices=sorted(ARCHITECTURES), help="by default read off the shapes")
    parser.add_argument("--vision-heads", type=int, help="attention heads of the image tower; by default width / 64")
    parser.add_argument("--text-heads", type=int, help="attention heads of the text tower; by default width / 64")
    parser.add_argument("--check", nargs="?", const=True, default=False, metavar="FILE.npz",
                        help="compare the result bit for bit, with FILE.npz also with stored outputs")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is already in the folder")
    parser.add_argument("--reverse", action="store_true", help="from a folder to a checkpoint file")
    parser.add_argument("--model", help="with --reverse: folder or Hub id")
    parser.add_argument("--output", type=Path, help="with --reverse: checkpoint file to write")
    arguments = parser.parse_args(argv)
    needed, foreign = ["checkpoint", "output_dir"], ["model", "output"]
    if arguments.reverse:
        needed, foreign = foreign, [*needed, "architecture", "check", "vision_heads", "text_heads"]
    for name in needed:
        if getattr(arguments, name) is None:
            parser.error(f"--{name.replace('_', '-')} is needed{' with --reverse' if arguments.reverse else ''}")
    for name in foreign:
        if getattr(arguments, name):
            parser.error(f"--{name.replace('_', '-')} is {'not for' if arguments.reverse else 'only for'} --reverse")
    if arguments.architecture and (arguments.vision_heads or arguments.text_heads):
        parser.error("--architecture fixes the heads; give it or --vision-heads and --text-heads")
    check_there("--checkpoint", arguments.checkpoint, "the released checkpoint")
    check_there("--model", arguments.model, "folder or Hub id", "id")
    return arguments


if __name__ == "__main__":
    answer_words(parse_arguments)

import numpy as np
import torch
from safetensors import safe_open

from conversion.architecture import check_checkpoint, config_from_shapes, describe
from conversion.checkpoint_file import as_float32, read_checkpoint, state_dict_of
from conversion.key_map import key_table, to_original, to_transformers
from conversion.model_folder import (
    assemble_model,
    check_output_folder,
    file_written_aside,
    make_processor,
    model_written_aside,
)
from pyramidclip_hf.configuration_pyramidclip import PyramidCLIPConfig
from pyramidclip_hf.hub import AUTHORS_WEIGHTS_LICENSE, build_model_card
from pyramidclip_hf.loading import load_dual_encoder
from pyramidclip_hf.modeling_pyramidclip import PyramidCLIPModel

Say = Callable[[str], object]


MAX_DIFFERENCE = 1e-4


# Rows of the key table compared at a time; the mapped file is let go in between, which bounds the memory.
_ROWS_AT_A_TIME = 16


# Stored output -> level, stored input -> model input.
OUTPUT_LEVELS = {
    "global_image_features": "global",
    "local_image_features": "local",
    "roi_image_features": "roi",
    "summary_text_features": "summary",
    "caption_text_features": "caption",
    "tag_text_features": "tags",
}


_INPUT_NAMES = {"global_pixel_values": "pixel_values", "caption_input_ids": "input_ids"}


class CheckFailed(ValueError):
    """A converted folder does not hold what the checkpoint holds; the message lists the differences."""


def convert(
    checkpoint: str | Path,
    output_dir: str | Path,
    *,
    architecture: str | None = None,
    vision_heads: int | None = None,
    text_heads: int | None = None,
    check: bool | str | Path = False,
    overwrite: bool = False,
    say: Say = print,
) -> PyramidCLIPConfig:
    """Converts one checkpoint file.

    Args:
        checkpoint: file with `{"state_dict": {...}}` or the tensors themselves, under the released names, optionally
            behind `module.` or `_orig_mod.`.
        output_dir: folder to write; it appears whole or not at all.
        architecture: a named one; by default the shapes decide.
        vision_heads: attention heads of the image tower, by default width / 64.
        text_heads: those of the text tower.
        check: see the module.
        overwrite: replace a model in `output_dir`.
        say: receives the messages.

    Returns:
        The model's configuration.

    Raises:
        ValueError: the file is no such checkpoint (every missing, unused and misshapen tensor is listed), or a check
            failed.
        OSError: a file is missing, the folder holds a model already, or the disk is full.
    """
    checkpoint, output_dir = Path(checkpoint), Path(output_dir)
    check_output_folder(output_dir, overwrite)
    state_dict, widened = as_float32(state_dict_of(read_checkpoint(checkpoint), checkpoint), checkpoint)
    if widened:
        say(f"{widened} of {len(state_dict)} tensors were fp16 or bf16 and are converted to fp32 (exact).")
    if architecture is None:
        config = config_from_shapes(state_dict, vision_heads, text_heads)
    else:
        config = PyramidCLIPConfig.from_architecture(architecture)
    check_checkpoint(state_dict, config)
    say(f"{checkpoint.name}: {describe(config)}")
    with model_written_aside(output_dir) as folder:
        _write_folder(folder, config, state_dict, checkpoint.name, output_dir.name, say)
        if check:
            compare_folder(folder, state_dict, config, say)
        del state_dict
        if check:
            check_loaded(folder, None if check is True else Path(check), say)
    say(f"Written to {output_dir}.")
    return config


def _write_folder(
    folder: Path, config: PyramidCLIPConfig, state_dict: dict[str, torch.Tensor], source: str, name: str, say: Say
) -> None:
    # transformers would cast nothing here, and the tensors stay where they are mapped until they are written.
    model = assemble_model(config, to_transformers(state_dict, config))
    model.save_pretrained(folder)
    del model
    processor, warning = make_processor(config)
    processor.save_pretrained(folder)
    if warning:
        say(f"Warning: {warning}")
    card = build_model_card(
        config,
        model_name=name,
        provenance=f"Converted, tensor for tensor, from the file `{source}`, which has the format that the paper's "
        "authors released.",
        training_data="The authors released weights trained on 143 million pairs from the web, on YFCC15M-V1 and on "
        "YFCC15M-V2. The file itself does not say which of them it is.",
        license="unknown",
        license_text=AUTHORS_WEIGHTS_LICENSE,
    )
    card.save(folder / "README.md")


def compare_folder(
    folder: Path, state_dict: Mapping[str, torch.Tensor], config: PyramidCLIPConfig, say: Say = print
) -> None:
    """Turns the folder's weights back and compares with the checkpoint bit for bit.

    Raises:
        CheckFailed: the differing tensors.
    """
    table = key_table(config)
    differing: list[str] = []
    seen: set[str] = set()
    for start in range(0, len(table), _ROWS_AT_A_TIME):
        rows = table[start : start + _ROWS_AT_A_TIME]
        with safe_open(folder / "model.safetensors", "pt") as weights:
            seen |= {name for row in rows for name in row.ours}
            for row in rows:
                back = row.join({name: weights.get_tensor(name) for name in row.ours})
                if not _same_bits(back, state_dict[row.original]):
                    differing.append(row.original)
            unknown = sorted(set(weights.keys()) - seen) if start + len(rows) == len(table) else []
    if differing or unknown:
        raise CheckFailed(f"Reversed, these tensors differ: {differing}; these are not the checkpoint's: {unknown}.")
    say(f"Reversed: all {len(table)} tensors are equal bit for bit.")


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    # As bytes: NaN equals itself then, and -0.0 does not equal 0.0.
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))


def check_loaded(folder: Path, stored: Path | None, say: Say = print) -> None:
    """Loads the folder as users do, looks at every value, and compares outputs with stored ones.

    Raises:
        CheckFailed: tensors that `from_pretrained` missed, values that are not finite, outputs too far off.
        ValueError: the file of stored outputs has another layout.
    """
    model, info = PyramidCLIPModel.from_pretrained(folder, output_loading_info=True)
    problems = {kind: sorted(names) for kind, names in info.items() if names}
    if problems:
        raise CheckFailed(f"from_pretrained reports {problems}.")
    broken = [name for name, tensor in model.state_dict().items() if not torch.isfinite(tensor).all()]
    if broken:
        raise CheckFailed(f"These tensors hold values that are not finite: {broken}.")
    say("Loaded with from_pretrained: every tensor is there, every value is finite.")
    if stored is None:
        return
    differences = output_differences(model, stored)
    for name, difference in differences.items():
        say(f"{name}: largest difference {difference:.2e}")
    wrong = [name for name, difference in differences.items() if not difference <= MAX_DIFFERENCE]
    if wrong:
        raise CheckFailed(f"{wrong} differ by more than {MAX_DIFFERENCE:g} from {stored}.")


@torch.no_grad()
def output_differences(model: PyramidCLIPModel, stored: Path) -> dict[str, float]:
    """Largest absolute difference of each stored output.

    Args:
        model: in eval mode.
        stored: an .npz with `input.NAME` arrays (`global_pixel_values`, `local_pixel_values`, `roi_features`,
            `summary_input_ids`, `input_ids`, `tag_input_ids`) and outputs `global_image_features` and so on: projected,
            not normalised.

    Raises:
        ValueError: no .npz, or no output in it that is known.
    """
    try:
        with np.load(stored, allow_pickle=False) as arrays:
            values = {name: torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in arrays.files}
    except (ValueError, EOFError, OSError, AttributeError) as error:
        raise ValueError(f"--check expects an .npz of stored inputs and outputs, got {stored} ({error}).") from error
    inputs = {name.removeprefix("input."): value for name, value in values.items() if name.startswith("input.")}
    inputs = {_INPUT_NAMES.get(name, name): value for name, value in inputs.items()}
    levels = {level: values[name] for name, level in OUTPUT_LEVELS.items() if name in values}
    if not levels:
        raise ValueError(f"{stored} holds none of the outputs {list(OUTPUT_LEVELS)}; it holds {list(values)[:12]}.")
    embeds = model.encode_levels(tuple(levels), **inputs)
    names = {level: name for name, level in OUTPUT_LEVELS.items()}
    return {
        names[level]: _largest_difference(embeds[level], wanted, f"{stored}: {names[level]}")
        for level, wanted in levels.items()
    }


def _largest_difference(ours: torch.Tensor, wanted: torch.Tensor, where: str) -> float:
    if ours.shape != wanted.shape:
        raise CheckFailed(f"{where} has shape {tuple(wanted.shape)}, the model gives {tuple(ours.shape)}.")
    return (ours.double() - wanted.double()).abs().max().item()


def reverse(model: str | Path, output: str | Path, *, overwrite: bool = False, say: Say = print) -> None:
    """Writes `{"epoch": 0, "state_dict": {...}}` under the released names; the folder does not keep the epoch.

    Args:
        model: folder or Hub id.
        output: file to write; it appears whole or not at all.
        overwrite: replace `output`.
        say: receives the messages.

    Raises:
        OSError: the file exists and `overwrite` is off, or the disk is full.
        ValueError: no model there, or not a whole one; tensors that a released checkpoint does not have.
    """
    output = Path(output)
    if output.exists() and not overwrite:
        raise FileExistsError(f"{output} exists; choose another file, or pass --overwrite to replace it.")
    loaded, _ = load_dual_encoder(str(model))
    state_dict = to_original(loaded.state_dict(), loaded.config)
    # contiguous() and not clone(): a tensor that the file maps is written from where it is.
    state_dict = {name: tensor.detach().contiguous() for name, tensor in state_dict.items()}
    with file_written_aside(output) as partial:
        torch.save({"epoch": 0, "state_dict": state_dict}, partial)
    say(f"{len(state_dict)} tensors written to {output}.")


def run(arguments: argparse.Namespace) -> None:
    """What the command line asks for."""
    if arguments.reverse:
        reverse(arguments.model, arguments.output, overwrite=arguments.overwrite)
        return
    convert(
        arguments.checkpoint,
        arguments.output_dir,
        architecture=arguments.architecture,
        vision_heads=arguments.vision_heads,
        text_heads=arguments.text_heads,
        check=arguments.check,
        overwrite=arguments.overwrite,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(parse_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
