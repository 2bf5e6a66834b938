"""Model folders and files that appear whole or not at all.

What is written goes into a hidden folder on the same disk and is renamed when complete, so a full disk, an error or an
interrupt leaves what was there before.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from pyramidclip_hf.configuration_pyramidclip import PyramidCLIPConfig
from pyramidclip_hf.files import folder_written_aside, settle, written_aside
from pyramidclip_hf.image_processing_pyramidclip import PyramidCLIPImageProcessor
from pyramidclip_hf.modeling_pyramidclip import PyramidCLIPModel
from pyramidclip_hf.processing_pyramidclip import PyramidCLIPProcessor
from pyramidclip_hf.tokenization_pyramidclip import PyramidCLIPTokenizer

CLIP_VOCABULARY_SIZE = 49408
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")


def check_output_folder(folder: Path, overwrite: bool) -> None:
    """Refuses a folder that holds a model, and a path that is no folder, before any work is done.

    Raises:
        FileExistsError: a model is there and `overwrite` is off.
        NotADirectoryError: a file is there.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--output-dir must be a folder, {folder} is a file.")
    found = [name for pattern in ("config.json", *_WEIGHTS) for name in sorted(folder.glob(pattern))]
    if found and not overwrite:
        raise FileExistsError(
            f"{folder} already holds a model ({found[0].name}); choose another folder, or pass --overwrite."
        )


@contextlib.contextmanager
def model_written_aside(folder: Path) -> Iterator[Path]:
    """A folder to fill with a model; it becomes `folder` when the block ends, and vanishes when the block fails.

    In a `folder` that exists, files of the same name and old weights are replaced, everything else stays.

    Yields:
        The empty folder.

    Raises:
        OSError: the disk is full or refuses; `folder` is as it was.
    """
    with _disk_errors_named(folder):
        if not folder.is_dir():
            with folder_written_aside(folder) as aside:
                yield aside
            return
        aside = folder / ".partial"
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            yield aside
            settle(aside)
            _replace_files(aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def file_written_aside(path: Path) -> Iterator[Path]:
    """The same for one file.

    Yields:
        The empty file beside it.

    Raises:
        OSError: the disk is full or refuses; `path` is as it was.
    """
    with _disk_errors_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path, sole_writer=True) as aside:
            yield aside


@contextlib.contextmanager
def _disk_errors_named(path: Path) -> Iterator[None]:
    """Gives what safetensors and torch raise on a full disk the form of the system's own errors."""
    words = ("No space left", "os error", "PytorchStreamWriter", "inline_container", "unexpected pos")
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, OSError) or any(word in str(error) for word in words):
            raise OSError(f"{path} could not be written, and nothing half-written stays: {error}") from error
        raise


def _replace_files(aside: Path, folder: Path) -> None:
    # The configuration leaves first and arrives last: without it nothing loads, so no mixture of two models can be.
    new = sorted(aside.iterdir(), key=lambda path: path.name == "config.json")
    (folder / "config.json").unlink(missing_ok=True)
    for pattern in _WEIGHTS:
        for path in folder.glob(pattern):
            path.unlink()
    for path in new:
        path.replace(folder / path.name)


def assemble_model(config: PyramidCLIPConfig, state_dict: dict[str, torch.Tensor]) -> PyramidCLIPModel:
    """A model that holds exactly these tensors, without copying them.

    Raises:
        RuntimeError: a missing, unused or misshapen tensor.
    """
    with torch.device("meta"):
        model = PyramidCLIPModel(config)
    model.load_state_dict(state_dict, assign=True)
    return model.eval()


def make_processor(config: PyramidCLIPConfig, **image_settings: Any) -> tuple[PyramidCLIPProcessor, str | None]:
    """The processor that belongs to a model, and a warning where its tokenizer does not fit the vocabulary.

    Args:
        config: the model's configuration.
        **image_settings: of the image processor, beside the size: `image_mean`, `image_std`, `resample`.
    """
    size = config.vision_config.image_size
    image_processor = PyramidCLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, **image_settings
    )
    tokenizer = PyramidCLIPTokenizer(model_max_length=config.text_config.max_position_embeddings)
    processor = PyramidCLIPProcessor(image_processor, tokenizer, roi_feature_size=config.vision_config.roi_feature_size)
    vocab_size = config.text_config.vocab_size
    if vocab_size == CLIP_VOCABULARY_SIZE:
        return processor, None
    return processor, (
        f"The vocabulary has {vocab_size} entries, CLIP's has {CLIP_VOCABULARY_SIZE}: the tokenizer in the folder is "
        "CLIP's and does not fit this model; put the right one in its place."
    )
