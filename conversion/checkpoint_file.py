"""Reading a file of weights that nobody vouches for: tensors and plain values come out, or an error; nothing is run."""

import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch


class _NumberKind:
    """Stands for `numpy.dtype` in files: NumPy takes a state from anywhere, and a wrong one ends the process."""

    def __init__(self, name: str, *_: object):
        self.name, self.order = name, "="

    def __setstate__(self, state: tuple[int, str]) -> None:
        self.order = {"|": "="}.get(state[1], state[1])


def _number(kind: _NumberKind, data: bytes | str) -> np.generic:
    if not isinstance(kind, _NumberKind) or kind.name not in _NUMBERS or kind.order not in ("<", ">", "="):
        raise ValueError("a NumPy scalar that is no number")
    raw = data.encode("latin1") if isinstance(data, str) else bytes(data)
    # NumPy refuses bytes that are no multiple of the number's.
    return np.frombuffer(raw, np.dtype(kind.order + kind.name)).reshape(1)[0]


def _latin1(text: str, encoding: str) -> bytes:
    """Stands for `codecs.encode`, as which pickle writes bytes in its second protocol."""
    if encoding != "latin1":
        raise ValueError(f"bytes written in {encoding!r}")
    return text.encode("latin1")


_NUMBERS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
# Checkpoints of other programs may hold a NumPy number (a best score, say) beside the weights. What their names mean
# here only builds numbers.
_NUMPY_GLOBALS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_number, "numpy._core.multiarray.scalar"),
    (_number, "numpy.core.multiarray.scalar"),
    (_latin1, "_codecs.encode"),
    (_NumberKind, "numpy.dtype"),
]
# Left in front of names by DistributedDataParallel and torch.compile, in any order.
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+|(?<=\.)_orig_mod\.")
# As of Parquet: so much may be unpacked whatever it is packed into, beyond it so many times the file.
_ALWAYS_BYTES, _LARGEST_RATIO = 256 << 20, 16
_STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model")


def read_checkpoint(path: str | Path, allow_torchscript: bool = False) -> Any:
    """What a `.pt`, `.pth`, `.bin` or `.safetensors` file holds, memory-mapped where its format allows that.

    Args:
        path: the file; its first bytes decide the format, not its name (safetensors excepted).
        allow_torchscript: also open a TorchScript archive, whose code torch then compiles; give it for files of
            trusted origin only. The result is the archive's state dict.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: truncated, no PyTorch file, or anything in it but tensors and plain values. Nothing of it ran.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"Expected a checkpoint file, found {'a folder' if path.is_dir() else 'nothing'}: {path}"
        )
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    with open(path, "rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"
    try:
        has_end = not is_archive or zipfile.is_zipfile(path)
        if is_archive and has_end:
            _check_archive(path)
        is_torchscript = is_archive and has_end and _is_torchscript(path)
    except Exception as error:  # on damaged archives, zipfile raises almost anything
        raise _damaged(path, error) from error
    if not has_end:
        raise ValueError(f"{path} is truncated: the end of the archive is missing. Copy or download it again.")
    if is_torchscript:
        return _read_torchscript(path, allow_torchscript)
    try:
        with torch.serialization.safe_globals(_NUMPY_GLOBALS):
            # Only the archive format can be mapped; the format before PyTorch 1.6 is read into memory.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except pickle.UnpicklingError as error:
        # Not chained: torch's own text explains how to switch the protection off.
        raise ValueError(_unpickling_message(path, str(error))) from None
    except Exception as error:  # on damaged files, torch raises almost anything
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    first_line = (str(error).splitlines() or [""])[0]
    return ValueError(
        f"{path} is truncated or no PyTorch checkpoint ({type(error).__name__}: {first_line}). "
        "Copy or download it again, or check that this is the right file."
    )


def state_dict_of(checkpoint: Any, where: str | Path) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint, with the names that the wrappers of distributed training had hidden.

    Args:
        checkpoint: `{"state_dict": {...}, ...}` (also "model_state_dict", "model"), or the weights themselves.
        where: the file, for messages.

    Raises:
        ValueError: no weights in it, an entry that is no tensor, or two entries with the same name.
    """
    if isinstance(checkpoint, Mapping):
        key = next((key for key in _STATE_DICT_KEYS if isinstance(checkpoint.get(key), Mapping)), None)
        weights = checkpoint if key is None else checkpoint[key]
    else:
        weights = {}
    if not any(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ValueError(
            f'{where} holds no weights: expected a mapping of names to tensors, or one under "state_dict", got '
            f"{list(checkpoint)[:8] if isinstance(checkpoint, Mapping) else type(checkpoint).__name__}."
        )
    other = {name: type(value).__name__ for name, value in weights.items() if not isinstance(value, torch.Tensor)}
    if other:
        raise ValueError(f"{where}: these entries among the weights are no tensors: {other}.")
    for name, value in weights.items():
        _check_tensor(name, value, where)
    names = {name: _WRAPPERS.sub("", str(name)) for name in weights}
    if len(set(names.values())) < len(names):
        raise ValueError(f"{where} holds the same weight with and without `module.` or `_orig_mod.` in its name.")
    return {names[name]: value for name, value in weights.items()}


def _check_tensor(name: Any, tensor: torch.Tensor, where: str | Path) -> None:
    """ValueError where a tensor says to have more numbers than it brings: a stride of 0 repeats one without end."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes() or 0 in tensor.shape:
        raise ValueError(
            f"{where}: {name} stands for {tuple(tensor.shape)} numbers and does not hold them. Save the weights "
            "plainly, as contiguous tensors on the CPU."
        )


def as_float32(state_dict: dict[str, torch.Tensor], where: str | Path) -> tuple[dict[str, torch.Tensor], int]:
    """The weights in fp32, and how many had to be widened from fp16 or bf16, which is exact. Integers stay.

    Raises:
        ValueError: weights of a wider type, which fp32 cannot hold.
    """
    lossy = {name: str(value.dtype) for name, value in state_dict.items()
             if value.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.int64)}  # fmt: skip
    if lossy:
        raise ValueError(f"{where}: expected weights in float32, float16 or bfloat16 and int64 counters, got {lossy}.")
    narrow = [name for name, value in state_dict.items() if value.dtype in (torch.float16, torch.bfloat16)]
    return {**state_dict, **{name: state_dict[name].float() for name in narrow}}, len(narrow)


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:  # SafetensorError, and others for headers that are JSON of another kind
        raise ValueError(f"{path} is truncated or no safetensors file ({error}). Copy or download it again.") from error


def _check_archive(path: Path) -> None:
    """ValueError where the members of an archive, which torch stores as they are, unpack to more than the file has."""
    with zipfile.ZipFile(path) as archive:
        total = sum(member.file_size for member in archive.infolist())
    if total > max(_ALWAYS_BYTES, _LARGEST_RATIO * path.stat().st_size):
        raise ValueError(f"its parts unpack to {total} bytes")


def _is_torchscript(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _read_torchscript(path: Path, allowed: bool) -> dict[str, torch.Tensor]:
    if not allowed:
        raise ValueError(
            f"{path} is a TorchScript archive, which carries code besides weights. If you trust its origin, "
            "`python -m conversion.init_from_clip --allow-torchscript` reads it (OpenAI's CLIP files are such)."
        )
    try:
        return dict(torch.jit.load(path, map_location="cpu").state_dict())
    except RuntimeError as error:
        raise ValueError(f"{path} cannot be read as a TorchScript archive: {str(error).splitlines()[0]}") from error


def _unpickling_message(path: Path, text: str) -> str:
    found = re.search(r"(?:GLOBAL|global|class)\s+`?([\w.]+\.[\w.]+)", text)
    if found:
        return (
            f"{path} holds an object of {found[1]}, not only tensors and plain values; reading it could run code, so "
            "nothing of it was read. Where you trust it, save its state dict alone."
        )
    return (
        f"{path} is truncated or no PyTorch checkpoint: it could not be read as tensors and plain values, and nothing "
        "of it was run. Copy or download it again, or check that this is the right file."
    )
