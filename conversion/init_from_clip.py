"""Start PyramidCLIP from a trained CLIP: the model folder that `training.pretrain --model DIR` continues from.

    python -m conversion.init_from_clip --model DIR_OR_HUB_ID_OR_FILE --output-dir DIR [--num-leff-layers N]
        [--pooling max|eos] [--allow-torchscript] [--overwrite]

By default (no LeFF, the text pooled at its end token) picture and text features equal the CLIP model's; only the region
branch is new. With `--num-leff-layers` the MLPs of the first blocks become LeFF, started as `leff_start` says; with
`--pooling max` texts are pooled as the released PyramidCLIP weights do. What is new, and how far features moved, is
printed.
"""

import argparse
import itertools
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pyramidclip_command import CommandParser, answer_words, check_there, run_command


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line.

    Raises:
        ValueError: wrong words.
    """
    parser = CommandParser(prog="python -m conversion.init_from_clip", description=__doc__)
    parser.add_argument("--model", required=True, help="Transformers or open_clip model (folder or Hub id), or a file "
                        "of weights under open_clip's and OpenAI's names")  # fmt: skip
    parser.add_argument("--output-dir", type=Path, required=True, help="folder to write")
    parser.add_argument("--num-leff-layers", type=int, default=0,
                        help="ViT: blocks, from the first, whose MLP becomes LeFF (paper: 9); default 0")  # fmt: skip
    parser.add_argument("--pooling", choices=("eos", "max"), default="eos",
                        help="of the text: at the end token, as CLIP, or the maximum over positions")  # fmt: skip
    parser.add_argument("--allow-torchscript", action="store_true",
                        help="open a TorchScript archive, as OpenAI's files are; only from trusted origin")  # fmt: skip
    parser.add_argument("--config", type=Path, help="for a file of weights: open_clip's JSON configuration")
    parser.add_argument(
        "--hidden-act", choices=("quick_gelu", "gelu"), help="for a file of weights; default quick_gelu"
    )
    parser.add_argument("--vision-heads", type=int, help="for a file of weights; default width / 64")
    parser.add_argument("--text-heads", type=int, help="for a file of weights; default width / 64")
    parser.add_argument("--roi-feature-size", type=int, default=2048, help="width of region features without the box")
    parser.add_argument("--seed", type=int, default=0, help="of the new parameters")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is already in the folder")
    arguments = parser.parse_args(argv)
    check_there("--model", arguments.model, "a folder, a Hub id, or a file of weights", "id")
    check_there("--config", arguments.config, "open_clip's JSON configuration")
    return arguments


if __name__ == "__main__":
    answer_words(parse_arguments)

import torch
import torch.nn.functional as F

from conversion.architecture import make_config
from conversion.clip_sources import ClipSource, read_clip
from conversion.leff_start import leff_from_mlp
from conversion.model_folder import check_output_folder, make_processor, model_written_aside
from pyramidclip_hf.configuration_pyramidclip import PyramidCLIPConfig
from pyramidclip_hf.hub import build_model_card
from pyramidclip_hf.modeling_pyramidclip import PyramidCLIPModel

_LICENSE = (
    "The weights come from the CLIP model named above, and its licence holds for them; it was not looked up here. "
    "State it before you pass this folder on."
)


def start_model(
    source: ClipSource, num_leff_layers: int = 0, pooling: str = "eos", roi_feature_size: int = 2048, seed: int = 0
) -> tuple[PyramidCLIPModel, list[str], list[str]]:
    """A PyramidCLIP model with the weights of a CLIP model.

    Args:
        source: of `read_clip`.
        num_leff_layers: blocks, from the first, whose MLP becomes LeFF.
        pooling: of the text.
        roi_feature_size: width of region features without their boxes.
        seed: of the new parameters that start at random.

    Returns:
        The model in eval mode, the names of its new tensors, the names of those that were changed to make room.

    Raises:
        ValueError: LeFF in a ResNet, or in more blocks than there are.
    """
    config = _target_config(source.config, num_leff_layers, pooling, roi_feature_size)
    torch.manual_seed(seed)
    model = PyramidCLIPModel(config)
    state_dict, changed = dict(source.state_dict), []
    for index in range(config.vision_config.num_leff_layers):
        prefix = f"vision_model.encoder.layers.{index}."
        block = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
        started = leff_from_mlp(block, config.vision_config.hidden_act)
        changed += [prefix + name for name in started if name in block]
        state_dict |= {prefix + name: tensor for name, tensor in started.items()}
    new = [name for name in model.state_dict() if name not in source.state_dict]
    random = [name for name in new if name not in state_dict]
    unexpected = model.load_state_dict(state_dict, strict=False).unexpected_keys
    if unexpected or not all(".roi_" in name for name in random):
        raise ValueError(f"These tensors have no place in the model: {unexpected}; these stayed random: {random}.")
    return model.eval(), new, changed


def _target_config(
    config: PyramidCLIPConfig, num_leff_layers: int, pooling: str, roi_feature_size: int
) -> PyramidCLIPConfig:
    sections = config.to_dict()
    if config.vision_config.tower == "resnet" and num_leff_layers:
        raise ValueError(
            f"LeFF is for the ViT: this is a ResNet, so --num-leff-layers must be 0, got {num_leff_layers}."
        )
    return make_config(
        text_config={**sections["text_config"], "pooling": pooling},
        vision_config={**sections["vision_config"], "num_leff_layers": num_leff_layers,
                       "num_picture_layers": num_leff_layers, "roi_feature_size": roi_feature_size},
        projection_dim=config.projection_dim,
    )  # fmt: skip


@torch.no_grad()
def feature_cosines(model: PyramidCLIPModel, source: ClipSource, pictures: int = 8) -> dict[str, torch.Tensor]:
    """How far features moved: cosines (pictures,) with the CLIP model's, on random pictures and random texts.

    "picture", "picture, train mode" (with the batch's statistics in BatchNorm; where there is LeFF), and "text".
    """
    plain, _, _ = start_model(source)
    generator = torch.Generator().manual_seed(0)
    vision, text = source.config.vision_config, source.config.text_config
    # Coarse patches of colour with noise are nearer to pictures than noise alone.
    coarse = torch.randn(pictures, vision.num_channels, 4, 4, generator=generator)
    pixels = F.interpolate(coarse, size=vision.image_size, mode="bicubic")
    pixels = pixels + 0.3 * torch.randn(pixels.shape, generator=generator)
    length = min(12, text.max_position_embeddings)
    ids = torch.randint(1, min(text.eos_token_id, text.bos_token_id or text.eos_token_id), (pictures, length),
                        generator=generator)  # fmt: skip
    ids[:, 0], ids[:, -1] = text.bos_token_id or 0, text.eos_token_id
    wanted = plain.encode_image(pixels)
    cosines = {"picture": F.cosine_similarity(model.encode_image(pixels), wanted)}
    if model.config.vision_config.num_leff_layers:
        statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
        cosines["picture, train mode"] = F.cosine_similarity(model.train().encode_image(pixels), wanted)
        for name, buffer in model.eval().named_buffers():
            buffer.copy_(statistics[name])
    return cosines | {"text": F.cosine_similarity(model.encode_text(ids), plain.encode_text(ids))}


def summarise(names: Sequence[str]) -> list[str]:
    """Names with the numbers of consecutive blocks folded: `layers.0-8.mlp.norm1.weight`."""
    folded: dict[str, list[int]] = {}
    for name in names:
        found = re.search(r"\.layers\.(\d+)\.", name)
        folded.setdefault(re.sub(r"\.layers\.\d+\.", ".layers.{}.", name), []).extend([int(found[1])] if found else [])
    lines = []
    for name, numbers in folded.items():
        for _, places in itertools.groupby(enumerate(numbers), key=lambda place: place[1] - place[0]):
            together = [number for _, number in places]
            lines.append(name.format(f"{together[0]}-{together[-1]}" if len(together) > 1 else together[0]))
        if not numbers:
            lines.append(name)
    return lines


def init_from_clip(arguments: argparse.Namespace, say: Callable[[str], object] = print) -> None:
    """What the command line asks for.

    Raises:
        ValueError: the model is no CLIP, or cannot be turned into what was asked.
        OSError: nothing there, no connection, the folder holds a model already, the disk is full.
    """
    check_output_folder(arguments.output_dir, arguments.overwrite)
    source = read_clip(
        arguments.model,
        config_file=arguments.config,
        hidden_act=arguments.hidden_act,
        vision_heads=arguments.vision_heads,
        text_heads=arguments.text_heads,
        allow_torchscript=arguments.allow_torchscript,
    )
    for note in source.notes:
        say(f"Note: {note}")
    model, new, changed = start_model(
        source, arguments.num_leff_layers, arguments.pooling, arguments.roi_feature_size, arguments.seed
    )
    _report(model, source, new, changed, say)
    processor, warning = make_processor(model.config, **source.image_settings)
    if warning:
        say(f"Warning: {warning}")
    on_the_hub = not Path(arguments.model).exists()
    origin = arguments.model if on_the_hub else Path(arguments.model).name
    card = build_model_card(
        model.config,
        model_name=arguments.output_dir.name,
        provenance=f"A start for training, made from the CLIP model `{origin}`; not trained further.",
        base_model=origin if on_the_hub else None,
        training_data="That of the CLIP model it was made from.",
        limits="The region branch is untrained: embeddings of regions mean nothing yet.",
        license_text=_LICENSE,
    )
    with model_written_aside(arguments.output_dir) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        card.save(folder / "README.md")
    say(f"Written to {arguments.output_dir}.")


def _report(
    model: PyramidCLIPModel, source: ClipSource, new: list[str], changed: list[str], say: Callable[[str], object]
) -> None:
    say("New:")
    for line in summarise(new):
        say(f"  {line}")
    if changed:
        say("Changed so that the new layers fit:")
        for line in summarise(changed):
            say(f"  {line}")
    for name, cosines in feature_cosines(model, source).items():
        say(f"{name} features: cosine with the CLIP model's {cosines.mean():.4f} (lowest {cosines.min():.4f})")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(parse_arguments, init_from_clip, argv)


if __name__ == "__main__":
    sys.exit(main())
