# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Exported models on the engines that run them, ONNX Runtime and OpenVINO, called as `PyramidCLIPModel` is.

    >>> model = load_exported("exported", backend="onnx", dtype="int8").model
    >>> model.encode_image(pixel_values, normalize=True)

`pyramidclip export` writes what is read here: in `onnx/` or `openvino/` of a model's folder a file a tower, named as
the Hub's ONNX models are (`vision_model`, `text_model`, then `_fp16` or `_quantized`), and `export.json`, which says of
which weights each file was made and how far its unit embeddings were from theirs.
"""

import hashlib
import importlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from .configuration_pyramidclip import PyramidCLIPConfig
from .files import parse_json, read_regular
from .levels_pyramidclip import LEVELS
from .loading import Loaded, load_processor, model_folder
from .loss_pyramidclip import normalize_embeds
from .modeling_pyramidclip_text import refuse_no_tensor

Backend = Literal["onnx", "openvino"]
BACKENDS = ("onnx", "openvino")
# The endings that programs look for which read ONNX models off the Hub.
DTYPE_ENDINGS = {"float32": "", "float16": "_fp16", "int8": "_quantized"}
FILE_ENDINGS = {"onnx": ".onnx", "openvino": ".xml"}
TOWERS = ("vision", "text", "region")
RECORD = "export.json"
_MAX_RECORD_BYTES = 1 << 20
# Embeddings of one model from two engines may be compared where no number of a unit vector is further off than this.
MAX_DISAGREEMENT = 1e-3

Run = Callable[[Sequence[np.ndarray]], np.ndarray]


class Engine(NamedTuple):
    """A backend with the type of its numbers, and how far its unit embeddings are from the model's own in fp32."""

    backend: str
    dtype: str
    disagreement: float


class ExportedModel(nn.Module):
    """The towers of an exported model; `encode_image` and its siblings as `PyramidCLIPModel` has them.

    Args:
        folder: the folder that `pyramidclip export` wrote into.
        backend: "onnx" or "openvino".
        dtype: which of the exported forms: "float32", "float16" or "int8".

    Raises:
        ValueError: nothing of that kind was exported there, a file is not the one that was exported, or the towers are
            of two models.
        ImportError: the engine is not installed.
    """

    logit_scale: torch.Tensor

    def __init__(self, folder: str | Path, backend: Backend = "onnx", dtype: str = "float32"):
        super().__init__()
        check_engine(backend, dtype)
        self.folder = Path(folder) / backend
        self.backend, self.engine_dtype = backend, dtype
        self.config = PyramidCLIPConfig.from_pretrained(folder)
        self.record = read_record(self.folder)
        files = [self._file(tower) for tower in TOWERS]
        entries = [self.record["files"][name] for name in files if name in self.record["files"]]
        if not all(name in self.record["files"] for name in files[:2]):
            raise ValueError(
                f"{self.folder}: holds no export in {dtype}, only {', '.join(sorted(self.record['files']))}. Make it: "
                f"pyramidclip export --format {backend} --dtype {dtype}."
            )
        self.model_sha256: str = self.record["model_sha256"]
        self.disagreement = max(entry["disagreement"] for entry in entries)
        self.register_buffer("logit_scale", torch.tensor(self.record["logit_scale"]))
        self._engines: dict[str, Run] = {}

    @property
    def device(self) -> torch.device:
        """Where inputs and outputs lie: the processor."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of inputs and outputs, whatever the engine computes in."""
        return torch.float32

    @property
    def engine(self) -> Engine:
        """What computes, and how far it is from the model."""
        return Engine(self.backend, self.engine_dtype, self.disagreement)

    def encode_image(self, pixel_values: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        """Picture embeddings (B, P) fp32 of `pixel_values` (B, 3, S, S).

        Raises:
            ValueError: pictures of another size than the exported one.
        """
        refuse_no_tensor("pixel_values", pixel_values, floats=True)
        size = self.config.vision_config.image_size
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (3, size, size):
            raise ValueError(
                f"pixel_values must be (batch_size, 3, {size}, {size}), the size that was exported, got "
                f"{tuple(pixel_values.shape)}."
            )
        return self._embeds("vision", [pixel_values.float()], normalize)

    def encode_text(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, normalize: bool = False
    ) -> torch.Tensor:
        """Text embeddings (B, P) fp32 of `input_ids` (B, L) as the tokenizer makes them, each row with an end token.

        Args:
            input_ids: (B, L) int64, L at most `max_position_embeddings`.
            attention_mask: not read: what is behind the end token counts for nothing.
            normalize: unit vectors.

        Raises:
            ValueError: too long, or a row without an end token.
        """
        refuse_no_tensor("input_ids", input_ids, floats=False)
        config = self.config.text_config
        if input_ids.ndim != 2 or input_ids.shape[1] > config.max_position_embeddings:
            raise ValueError(
                f"input_ids must be (batch_size, at most {config.max_position_embeddings}), got "
                f"{tuple(input_ids.shape)}."
            )
        if not (input_ids == config.eos_token_id).any(dim=1).all():
            raise ValueError(
                f"Each row of input_ids needs an end token ({config.eos_token_id}); the tokenizer adds it."
            )
        return self._embeds("text", [input_ids.long()], normalize)

    def encode_rois(
        self, roi_features: torch.Tensor, roi_mask: torch.Tensor | None = None, normalize: bool = False
    ) -> torch.Tensor:
        """Embeddings (B, P) fp32 of regions (B, K, `roi_feature_size` + 4); `roi_mask` (B, K) bool, None: all real.

        Raises:
            ValueError: regions of another shape, or the region branch was not exported.
        """
        refuse_no_tensor("roi_features", roi_features, floats=True)
        width = self.config.vision_config.roi_feature_size + 4
        if roi_features.ndim != 3 or roi_features.shape[2] != width:
            raise ValueError(f"roi_features must be (batch_size, regions, {width}), got {tuple(roi_features.shape)}.")
        mask = torch.ones(roi_features.shape[:2], dtype=torch.bool) if roi_mask is None else roi_mask.bool()
        return self._embeds("region", [roi_features.float(), mask], normalize)

    def encode_levels(self, levels: Collection[str], **batch: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Embeddings (B, P), not normalised, of the named levels; see `PyramidCLIPModel.encode_levels`.

        Raises:
            ValueError: a level's input is missing, or what it needs was not exported.
        """
        embeds = {}
        for level in levels:
            one = LEVELS[level]
            inputs = batch.get(one.input)
            if inputs is None:
                raise ValueError(f"Level {level} lacks its input {one.input}.")
            if one.kind == "regions":
                embeds[level] = self.encode_rois(inputs, batch.get(one.mask or ""))
            else:
                embeds[level] = self.encode_image(inputs) if one.kind == "picture" else self.encode_text(inputs)
        return embeds

    def _file(self, tower: str) -> str:
        return file_name(tower, self.backend, self.engine_dtype)

    def _embeds(self, tower: str, inputs: Sequence[torch.Tensor], normalize: bool) -> torch.Tensor:
        if tower not in self._engines:
            path = self.folder / self._file(tower)
            check_file(path, self.record)
            self._engines[tower] = open_engine(path, self.backend)
        embeds = torch.from_numpy(self._engines[tower]([tensor.cpu().numpy() for tensor in inputs]))
        return normalize_embeds(embeds) if normalize else embeds


def load_exported(
    name: str, *, backend: Backend, dtype: str = "float32", revision: str | None = None, flag: str = "--model"
) -> "Loaded[ExportedModel]":
    """An exported model and its processor; see `load_model`, which does the same for the model itself.

    Raises:
        ValueError: no such folder or id, nothing exported there, or a part is missing or of another model.
        ImportError: the engine is not installed.
    """
    folder = model_folder(name, revision, f"{flag} {name}", ("*.json", "*.txt", f"{backend}/*"))
    processor = load_processor(folder, f"{flag} {name}")
    model = ExportedModel(folder, backend, dtype)
    weights_are_here = any(folder.glob("model*.safetensors"))
    if weights_are_here and Loaded(model, processor, name, folder).sha256() != model.model_sha256:
        raise ValueError(
            f"{flag} {name}: {backend}/ was exported from other weights than those that lie beside it. Export again: "
            f"pyramidclip export --format {backend}."
        )
    return Loaded(model.eval(), processor, name, folder, model.model_sha256)


def file_name(tower: str, backend: str, dtype: str) -> str:
    """`vision_model_quantized.onnx`, say."""
    return f"{tower}_model{DTYPE_ENDINGS[dtype]}{FILE_ENDINGS[backend]}"


def check_engine(backend: str, dtype: str) -> None:
    """Whether a backend and a type of numbers go together, and the engine is here.

    Raises:
        ValueError: no such backend or type.
        ImportError: the engine is not installed; names the extra.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    if dtype not in DTYPE_ENDINGS:
        raise ValueError(f"--dtype {dtype}: {backend} models come in {', '.join(DTYPE_ENDINGS)}.")
    module_of_export("onnxruntime" if backend == "onnx" else "openvino")


def module_of_export(name: str) -> Any:
    """A module that the extra `export` brings.

    Raises:
        ImportError: it is absent; names the extra.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f'Exported models need {name.split(".")[0]}: pip install "pyramidclip-hf[export]" ({error})'
        ) from error


def read_record(folder: Path) -> dict[str, Any]:
    """`export.json` of a folder.

    Raises:
        ValueError: there is none, or it is none of ours.
    """
    path = folder / RECORD
    if not path.is_file():
        raise ValueError(f"{folder}: holds no exported model ({RECORD}). Make one: pyramidclip export.")
    try:
        record = parse_json(read_regular(path, _MAX_RECORD_BYTES))
        known = {"model_sha256": str, "logit_scale": float, "files": dict}
        wrong = [name for name, kind in known.items() if not isinstance(record[name], kind)]
        wrong += [name for name, entry in record["files"].items() if not isinstance(entry["disagreement"], float)]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: of another type")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: is no record of `pyramidclip export` ({type(error).__name__}: {error}).") from error
    return record


def check_file(path: Path, record: dict[str, Any]) -> None:
    """Whether a file is the one that the record is about.

    Raises:
        ValueError: it is absent, was never exported, or has other bytes.
    """
    entry = record["files"].get(path.name)
    if entry is None or not path.is_file():
        raise ValueError(f"{path}: is not there. Export it: pyramidclip export (regions: with --regions).")
    if digest(path) != entry["sha256"]:
        raise ValueError(f"{path}: is not the file that was exported here: damaged, or of another model. Export again.")


def digest(path: Path) -> str:
    """sha256 of a file, and of the weights beside it where OpenVINO keeps them apart."""
    total = hashlib.sha256()
    for part in (path, path.with_suffix(".bin")):
        if part.is_file():
            with open(part, "rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def open_engine(path: Path, backend: str) -> Run:
    """A function from inputs, in the order of the file's, to the one output; as many threads as torch has.

    Raises:
        ValueError: the engine cannot read the file.
    """
    try:
        return _onnx_runtime(path) if backend == "onnx" else _openvino(path)
    except Exception as error:  # the engines raise types of their own
        raise ValueError(f"{path}: cannot be opened: {str(error).strip().splitlines()[0]}") from error


def _onnx_runtime(path: Path) -> Run:
    onnxruntime = module_of_export("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    return lambda inputs: session.run(None, dict(zip(names, inputs, strict=True)))[0]


def _openvino(path: Path) -> Run:
    openvino = module_of_export("openvino")
    # Left alone, a processor with bf16 would compute in it.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    return lambda inputs: np.array(compiled(list(inputs))[0])
