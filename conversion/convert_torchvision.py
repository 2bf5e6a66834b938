"""Torchvision's supervised ResNet-50 as a model folder, for the paper's supervised rows (tables 5 and 12).

    python -m conversion.convert_torchvision --output-dir DIR [--checkpoint FILE] [--overwrite]

FILE is a `.pth` or `.safetensors` file under torchvision's names, of a ResNet-50, 101 or 152; by default the one that
`torchvision.models.resnet50(weights="IMAGENET1K_V1")` keeps in torch's cache. Nothing is downloaded. The folder is
transformers' own ResNet, which computes the same, with the pictures' mean and deviation that these weights know;
`--model DIR` of `training.finetune` and `training.detection` starts from it.
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pyramidclip_command import CommandParser, answer_words, check_there, run_command


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line.

    Raises:
        ValueError: wrong words.
        FileNotFoundError: what they name is not there.
    """
    parser = CommandParser(prog="python -m conversion.convert_torchvision", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="weights under torchvision's names; default: torch's cache")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is already in the folder")
    arguments = parser.parse_args(argv)
    check_there("--checkpoint", arguments.checkpoint, "weights under torchvision's names")
    return arguments


if __name__ == "__main__":
    answer_words(parse_arguments)

import torch
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification

from conversion.checkpoint_file import as_float32, read_checkpoint, state_dict_of
from conversion.model_folder import check_output_folder, model_written_aside
from pyramidclip_hf.image_processing_pyramidclip import PyramidCLIPImageProcessor
from pyramidclip_hf.processing_pyramidclip import PyramidCLIPProcessor

CACHED = "resnet50-0676ba61.pth"


# What torchvision's weights were trained and are measured with.
MEAN, STD, RESIZED, CROP = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 256, 224


# A ResNet-152 has 36 in a stage.
MOST_BLOCKS = 100


_NAMES = (
    (r"^conv1\.", "resnet.embedder.embedder.convolution."),
    (r"^bn1\.", "resnet.embedder.embedder.normalization."),
    (r"^fc\.", "classifier.1."),
    (r"^layer(\d)\.(\d+)\.", lambda found: f"resnet.encoder.stages.{int(found[1]) - 1}.layers.{found[2]}."),
    (r"\.conv(\d)\.", lambda found: f".layer.{int(found[1]) - 1}.convolution."),
    (r"\.bn(\d)\.", lambda found: f".layer.{int(found[1]) - 1}.normalization."),
    (r"\.downsample\.0\.", ".shortcut.convolution."),
    (r"\.downsample\.1\.", ".shortcut.normalization."),
)


def cached_checkpoint() -> Path:
    """Where torchvision keeps its ResNet-50.

    Raises:
        FileNotFoundError: it is not there.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / CACHED
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there, where torchvision keeps the weights of its ResNet-50. Fetch them with "
            "python -c \"import torchvision; torchvision.models.resnet50(weights='IMAGENET1K_V1')\", or name a file of "
            "them with --checkpoint"
        )
    return path


def renamed(name: str) -> str:
    """A name of torchvision's ResNet, as transformers calls it."""
    for pattern, new in _NAMES:
        name = re.sub(pattern, new, name)
    return name


def convert(state_dict: Mapping[str, torch.Tensor], where: str | Path) -> ResNetForImageClassification:
    """Transformers' ResNet with these weights, in evaluation mode.

    Args:
        state_dict: under torchvision's names.
        where: what they are from, for messages.

    Raises:
        ValueError: they are not those of a ResNet with bottlenecks, or not all of them.
    """
    depths = [
        len({name.split(".")[1] for name in state_dict if name.startswith(f"layer{stage}.")}) for stage in (1, 2, 3, 4)
    ]
    if not all(depths) or not {"conv1.weight", "layer1.0.conv3.weight", "fc.weight"} <= set(state_dict):
        raise ValueError(
            f"{where}: expected a ResNet-50, 101 or 152 under torchvision's names (conv1.weight, "
            f"layer1.0.conv3.weight, fc.weight), got {list(state_dict)[:4]}"
        )
    if state_dict["conv1.weight"].dim() != 4 or state_dict["fc.weight"].dim() != 2 or max(depths) > MOST_BLOCKS:
        raise ValueError(f"{where}: these are not the weights of a plain ResNet: blocks {depths}, or other dimensions")
    width = len(state_dict["conv1.weight"])
    config = ResNetConfig(
        embedding_size=width,
        hidden_sizes=[4 * width * 2**stage for stage in range(4)],
        depths=depths,
    )
    config.num_labels = len(state_dict["fc.weight"])
    # Nothing is made that the file does not hold.
    with torch.device("meta"):
        model = ResNetForImageClassification(config)
    try:
        named = {renamed(name): value for name, value in state_dict.items()}
        model.load_state_dict(named, assign=True)
    except RuntimeError as error:
        told = str(error).splitlines()[1:] or [str(error)]
        raise ValueError(f"{where}: these are not the weights of a plain ResNet: {told[0].strip()}") from error
    return model.eval()


def convert_torchvision(arguments: argparse.Namespace, say: Callable[[str], object] = print) -> None:
    """What the command line asks for.

    Raises:
        ValueError: the file is damaged, or of another model.
        OSError: nothing there, the folder holds a model already, the disk is full.
    """
    check_output_folder(arguments.output_dir, arguments.overwrite)
    path = arguments.checkpoint or cached_checkpoint()
    state_dict, _ = as_float32(state_dict_of(read_checkpoint(path), path), path)
    model = convert(state_dict, path)
    images = PyramidCLIPImageProcessor(
        size={"shortest_edge": RESIZED},
        crop_size={"height": CROP, "width": CROP},
        resample=Image.Resampling.BILINEAR,
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    with model_written_aside(arguments.output_dir) as folder:
        model.save_pretrained(folder)
        PyramidCLIPProcessor(images).save_pretrained(folder)
    say(f"A ResNet of {model.config.depths} blocks and {model.config.num_labels} classes: {arguments.output_dir}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(parse_arguments, convert_torchvision, argv)


if __name__ == "__main__":
    sys.exit(main())
