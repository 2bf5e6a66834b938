# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""A saved model and its processor, checked: the one loader of the commands, of evaluation and of training.

`from_pretrained` draws weights at random where a file lacks them and says so in a warning. Here that is an error, as is
a folder without a tokenizer, for which the processor would take the one that the package comes with.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from transformers.utils import logging

from pyramidclip_command import looks_like_a_folder

from .architectures_pyramidclip import ARCHITECTURES
from .files import check_regular
from .hub_reach import asking_hub
from .modeling_pyramidclip import PyramidCLIPModel
from .processing_pyramidclip import PyramidCLIPProcessor
from .saved_folders_pyramidclip import EXPECTED, MAX_JSON_BYTES, damaged_json, damaged_weights, where_the_model_is
from .versions_pyramidclip import cpu_capabilities

Model = TypeVar("Model", bound=torch.nn.Module)

_MODEL_FILES = ["*.json", "*.safetensors", "*.txt"]
_MAX_LAYERS = 10_000
_PARTS = {
    "weights": ("model.safetensors", "model.safetensors.index.json"),
    "tokenizer": ("tokenizer.json", "vocab.json"),
    "image processor": ("preprocessor_config.json", "processor_config.json"),
}


@dataclass(frozen=True)
class Loaded(Generic[Model]):
    """A model in evaluation mode, its processor, the name that it was asked for by, and the folder that it lies in.

    `made_of` is the hash of the weights that an exported model was made of; None: the weights lie in the folder.
    """

    model: Model
    processor: PyramidCLIPProcessor
    name: str
    folder: Path
    made_of: str | None = None

    def sha256(self) -> str:
        """Of the weights' files: the same model under another name, or on another machine, has the same."""
        if self.made_of is not None:
            return self.made_of
        index = self.folder / "model.safetensors.index.json"
        names = ["model.safetensors"]
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf8"))["weight_map"].values()))
        digest = hashlib.sha256()
        for name in names:
            if not (self.folder / name).is_file():
                raise FileNotFoundError(f"{self.folder / name} is no file; the index of the weights names it")
            with open(self.folder / name, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


def load_model(
    name: str,
    *,
    revision: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = torch.float32,
    fuse: bool = False,
    flag: str = "--model",
) -> Loaded[PyramidCLIPModel]:
    """The whole model that a folder or an id of the Hub names, in evaluation mode.

    Args:
        name: folder that `save_pretrained` of the model and of its processor wrote, or Hub id.
        revision: branch, tag or commit of a Hub id.
        device: where it is to compute; a name as `choose_device` takes it.
        dtype: of the parameters, or its name.
        fuse: in the form that only computes embeddings, see `PyramidCLIPModel.fuse`.
        flag: what the messages call the name by.

    Raises:
        ValueError: no such folder or id; a part is missing, damaged or of another kind of model; a weight is missing or
            of another shape; no such device. The message says which.
    """
    device = choose_device(device) if isinstance(device, str) else device
    called = f"{flag} {name}"
    model, folder = load_dual_encoder(name, revision=revision, dtype=dtype, flag=flag)
    processor = load_processor(folder, called)
    model.to(device)  # type: ignore[arg-type]  # transformers wraps it without types
    if fuse:
        model.fuse()
    return Loaded(model, processor, name, folder)


def load_processor(folder: Path, called: str) -> PyramidCLIPProcessor:
    """The processor that a folder holds.

    Raises:
        ValueError: tokenizer or image processor are missing or damaged; `called` says what the folder was asked for by.
    """
    _check_parts(folder, ("tokenizer", "image processor"), called)
    try:
        return PyramidCLIPProcessor.from_pretrained(folder)
    except Exception as error:  # on damaged files, the readers raise almost anything
        raise ValueError(f"{called}: cannot be loaded: {error}") from error


def load_dual_encoder(
    name: str, *, revision: str | None = None, dtype: torch.dtype | str = torch.float32, flag: str = "--model"
) -> tuple[PyramidCLIPModel, Path]:
    """The model alone, on the processor, and the folder that it lies in; see `load_model`.

    Raises:
        ValueError: as `load_model`, but nobody asks for tokenizer and image processor.
    """
    called = f"{flag} {name}"
    folder = model_folder(name, revision, called)
    _check_parts(folder, ("weights",), called)
    check_weights(folder, called)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    try:
        with quiet_transformers(warnings=False):  # what they would say is checked below
            model, info = PyramidCLIPModel.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True
            )
    except Exception as error:  # on damaged files, the readers raise almost anything
        raise ValueError(f"{called}: cannot be loaded: {error}") from error
    # These would be drawn at random, and every result with them.
    faulty = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if faulty:
        others = [kind for kind in model.config.architectures or () if kind != PyramidCLIPModel.__name__]
        told = f" This one is of a {others[0]}." if others else ""
        raise ValueError(
            f"{called}: {len(faulty)} weights are missing or of another shape: {faulty[:3]}. Expected a whole "
            f"PyramidCLIPModel, with both towers.{told}"
        )
    return model.eval(), folder


@contextmanager
def quiet_transformers(*, warnings: bool = True) -> Iterator[None]:
    """No progress bars of transformers between our own lines; without `warnings`, no warnings either."""
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    if not warnings:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def choose_device(name: str) -> torch.device:
    """The device that `--device` names; "auto": an accelerator if there is one, else the processor.

    Raises:
        ValueError: no such device, one that cannot hold numbers here, or a GPU that this torch was not built for.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise ValueError("it holds no numbers")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        reason = str(error).splitlines()[0]
        reason = "no such kind" if reason.startswith("Expected one of") else reason  # and twenty kinds of torch's
        raise ValueError(
            f"--device {name}: expected auto, cpu, or cuda, cuda:1, mps where it is there ({reason})."
        ) from error
    check_device(device)
    return device


def warn_of_slow_type(
    flag: str, dtype: str, device: torch.device | str, say: Callable[[str], None] | None = None
) -> None:
    """Says, once, that `device` is a processor which computes in float32 faster than in what was asked for.

    Args:
        flag: that asked, for the message.
        dtype: as the flag takes it.
        device: where it is computed; a name as `choose_device` takes it.
        say: whom it is told; None: stderr, by the first of the processes that were started together.
    """
    device = choose_device(device) if isinstance(device, str) else device
    bfloat16, float16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"), ("avx512_fp16", "amx_fp16", "fp16")
    # What each flag calls it -> its name, what a processor needs for it, and what the flag calls float32.
    known = {
        "bfloat16": ("bfloat16", bfloat16, "float32"),
        "bf16": ("bfloat16", bfloat16, "fp32"),
        "float16": ("float16", float16, "float32"),
    }
    capabilities = cpu_capabilities()
    if device.type != "cpu" or dtype not in known or capabilities is None:
        return
    name, needed, faster = known[dtype]
    if any(capabilities.get(one) for one in needed):
        return
    told = f"{flag} {dtype}: this processor has no {name} arithmetic: it works, but float32 is faster ({flag} {faster})"
    if say is not None:
        say(told)
    elif os.environ.get("RANK", "0") == "0":
        print(told, file=sys.stderr)


def check_device(device: torch.device) -> None:
    """Computes on a GPU, once.

    Raises:
        ValueError: this torch has nothing built for that GPU.
    """
    if device.type != "cuda":
        return
    try:
        torch.ones(2, device=device).sum().item()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        name, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        raise ValueError(
            f"{device}: {name} (sm_{major}{minor}) is there, but torch {torch.__version__}, built for "
            f"{', '.join(torch.cuda.get_arch_list())}, cannot compute on it ({str(error).splitlines()[0]}). Install a "
            f"torch that was built for it, or compute on the CPU."
        ) from error


def model_folder(name: str, revision: str | None, called: str, files: Sequence[str] = _MODEL_FILES) -> Path:
    """The folder of a model of this kind itself, or where the Hub's files are cached.

    Args:
        name: folder or Hub id.
        revision: branch, tag or commit of a Hub id.
        called: what the name was asked for by, for the messages.
        files: patterns of what is needed of the Hub's repository.

    Raises:
        ValueError: no such folder or id, or no configuration of this kind of model.
    """
    folder = _local_folder(name, revision, called, files)
    _check_config(folder, called)
    return folder


def _local_folder(name: str, revision: str | None, called: str, files: Sequence[str]) -> Path:
    if os.path.isdir(name):
        return Path(name)
    if os.path.exists(name):
        raise ValueError(f"{called}: that is a file, expected the folder of a saved model.")
    if looks_like_a_folder(name):
        raise ValueError(f"{called}: there is no such folder.")
    if "/" not in name:  # asking for it would take half a minute where the Hub cannot be reached
        told = "an id of the Hub has its owner in front (owner/name)"
        if name in ARCHITECTURES:
            told = "it is the name of an architecture, which has no weights; expected a model that was trained"
        raise ValueError(f"{called}: there is no such folder here, and {told}.")
    with asking_hub() as out_of_reach:
        try:
            return Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
        except (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            OfflineModeIsEnabled,
            ConnectionError,
        ) as error:
            reason = out_of_reach or str(error).strip().splitlines()[0]
            raise ValueError(
                f"{called}: there is no such folder, and the Hub did not give one of that id ({reason})."
            ) from error


def check_weights(folder: str | os.PathLike[str], called: str) -> None:
    """Looks at the headers of a model's files of weights, which say how long each has to be.

    Args:
        folder: of any kind of model that `save_pretrained` wrote.
        called: what it was asked for by, for the message.

    Raises:
        ValueError: a file is cut short, is no safetensors, or the index names one that is not there.
    """
    if told := damaged_weights(folder):
        raise ValueError(f"{called}: {told}")


def _check_config(folder: Path, called: str) -> None:
    """ValueError where there is no configuration of this kind of model."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{called}: no config.json there. {EXPECTED}.{where_the_model_is(folder)}")
    if told := damaged_json(folder / "config.json"):
        raise ValueError(f"{called}: {told}")
    content = json.loads((folder / "config.json").read_bytes())
    kind = content.get("model_type")
    if kind != "pyramidclip":
        raise ValueError(f"{called}: its model_type is {kind!r}, expected 'pyramidclip'.")
    _check_claims(folder, content, called)


def _check_claims(folder: Path, content: dict[str, Any], called: str) -> None:
    """ValueError where a configuration asks for a far larger model than the weights beside it are.

    Building it would take all time or memory before anything could be found missing.
    """
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors") if path.is_file())
    for tower in ("text_config", "vision_config"):
        told = content.get(tower)
        told = told if isinstance(told, dict) else {}
        # Bounded, as the message shows what they come to as a float.
        sizes = {name: min(value, 10**18) for name, value in told.items() if type(value) is int}
        width, layers = sizes.get("hidden_size", 1), sizes.get("num_hidden_layers", 1)
        # Each block has at least four square matrices, and no number takes less than half a byte.
        least = 4 * layers * width**2 + width * sizes.get("vocab_size", 0) + width * sizes.get("intermediate_size", 0)
        if stored and (least > 2 * stored + 10**9 or layers > _MAX_LAYERS):
            raise ValueError(
                f"{called}: {tower} of its config.json stands for {layers} layers and {least:.3g} numbers or more, and "
                f"its weights have {stored:,} bytes. It is not the configuration of these weights."
            )


def _check_parts(folder: Path, parts: Iterable[str], called: str) -> None:
    """ValueError where a part of what `save_pretrained` writes is missing, saying which."""
    for path in folder.glob("*.json"):
        try:
            check_regular(path)
        except ValueError as error:
            raise ValueError(f"{called}: {error}") from None
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"{called}: {path.name} has more than {MAX_JSON_BYTES} bytes, which none of ours has.")
    for part in parts:
        files = _PARTS[part]
        if not any((folder / file).is_file() for file in files):
            raise ValueError(f"{called}: the {part} is missing ({' or '.join(files)}). {EXPECTED}.")
