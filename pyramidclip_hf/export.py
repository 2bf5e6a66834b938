# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""A model for the engines that run it, in the layout in which the Hub's programs look for ONNX models.

Into `FOLDER/onnx/` or `FOLDER/openvino/` go `vision_model`, `text_model` and on demand `region_model`, for batches of
any size: pixels (B, 3, S, S) -> `image_embeds` (B, P), ids (B, L) -> `text_embeds`, regions and mask -> `roi_embeds`,
all projected and not normalised; and beside them the configuration and the processor. Each file is run by its engine
and compared with the model before it takes its name; `pyramidclip_hf.backends` reads them.
"""

import contextlib
import io
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from pyramidclip_command import Failure

from .backends import (
    FILE_ENDINGS,
    RECORD,
    Backend,
    ExportedModel,
    check_engine,
    digest,
    file_name,
    module_of_export,
    open_engine,
    read_record,
)
from .configuration_pyramidclip import PyramidCLIPConfig
from .files import json_text, locked, parse_json, read_utf8, write_atomically, written_aside
from .loading import Loaded
from .loss_pyramidclip import normalize_embeds
from .modeling_pyramidclip import PyramidCLIPModel
from .picture_files import UnreadablePicture, read_picture
from .zero_shot import class_embeddings, image_embeddings, text_embeddings

# What fp32 may be off in any number of a unit vector.
_FP32_TOLERANCE = 1e-4
_OPSET = 18
# Inputs of a calibration run of the static quantiser: more need more memory and change little.
_CALIBRATION_BATCH = 8


# Batches of inputs as they will be seen, by tower.
Seen = dict[str, list[list[torch.Tensor]]]


@dataclass(frozen=True)
class Tower:
    """One file: its module, an example of each input and its free axes, the output's name, and what it is made of."""

    name: str
    module: nn.Module
    inputs: dict[str, torch.Tensor]
    free: Mapping[str, tuple[int, ...]]
    output: str
    convolutional: bool = False


class Exported(NamedTuple):
    """What became of one file: `disagreement` and cosines are of unit embeddings with those of the model in fp32."""

    file: str
    megabytes: float
    disagreement: float
    mean_cosine: float
    least_cosine: float


class _Call(nn.Module):
    """One of the model's `encode_` methods as a module."""

    def __init__(self, model: PyramidCLIPModel, method: str):
        super().__init__()
        self.model, self.method = model, method

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        embeds: torch.Tensor = getattr(self.model, self.method)(*inputs)
        return embeds


def export_model(
    loaded: Loaded[PyramidCLIPModel],
    output: str | Path,
    *,
    backend: Backend = "onnx",
    dtypes: Sequence[str] = ("float32",),
    regions: bool = False,
    calibration: Sequence[Image.Image] = (),
    texts: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
) -> list[Exported]:
    """Writes a model's towers for an engine.

    Args:
        loaded: the model in fp32 on the CPU, as `load_model` gives it; it is fused afterwards.
        output: the folder; the model's own, or one that becomes complete: with configuration and processor.
        backend: "onnx" or "openvino".
        dtypes: of "float32", "float16" and "int8".
        regions: the region branch too.
        calibration: pictures as they will be seen. What int8 keeps of their embeddings is reported, and the ranges of
            its numbers come from them where the tower is a ResNet; needed for int8.
        texts: texts as they will be seen, for the report; none: the picture classes of a prompt.
        say: told what is being done.

    Raises:
        ValueError: no such backend or type; int8 without pictures.
        ImportError: a package is missing; names the extra.
        Failure: the engine's numbers are not the model's.
    """
    for dtype in dtypes:
        check_engine(backend, dtype)
    if "int8" in dtypes and not calibration:
        raise ValueError("int8 needs pictures like those that it will see: --calibration FILES.")
    _check_exporter()
    output, model = Path(output), loaded.model.fuse(linear="torch")
    seen = _seen(loaded, calibration, texts)
    _write_beside(loaded, output)
    folder = output / backend
    folder.mkdir(exist_ok=True)
    exported = []
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as scratch:
        for tower in _towers(model, regions):
            say(f"{tower.name}: tracing")
            traced = Path(scratch) / f"{tower.name}.onnx"
            _trace(tower, traced)
            for dtype in dtypes:
                say(f"{tower.name}: {backend}, {dtype}")
                made = Path(scratch) / file_name(tower.name, backend, dtype)
                _CONVERT[backend](traced, made, tower, dtype, seen)
                report = _compare(made, tower, backend, dtype, seen)
                _keep(made, folder / made.name, loaded, report)
                exported.append(report)
    return exported


def _check_exporter() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        module_of_export(name)


def _write_beside(loaded: Loaded[PyramidCLIPModel], output: Path) -> None:
    """Configuration and processor, where the folder is not the model's own."""
    if output.resolve() == loaded.folder.resolve():
        return
    output.mkdir(parents=True, exist_ok=True)
    theirs = output / "config.json"
    if theirs.is_file() and json.loads(theirs.read_text(encoding="utf8")).get("model_type") != "pyramidclip":
        raise ValueError(f"--output {output}: holds a model of another kind; expected a folder of its own.")
    loaded.model.config.save_pretrained(output)
    loaded.processor.save_pretrained(output)


def _towers(model: PyramidCLIPModel, regions: bool) -> Iterator[Tower]:
    config: PyramidCLIPConfig = model.config
    vision, text = config.vision_config, config.text_config
    size = vision.image_size
    pixels = torch.linspace(-2, 2, 2 * 3 * size * size).reshape(2, 3, size, size)
    yield Tower(
        "vision",
        _Call(model, "encode_image"),
        {"pixel_values": pixels},
        {"pixel_values": (0,)},
        "image_embeds",
        convolutional=vision.tower == "resnet",
    )
    ids = torch.full((2, 9), text.eos_token_id)
    ids[:, 1:5] = torch.arange(3, 7)
    ids[:, 0] = text.bos_token_id
    yield Tower("text", _Call(model, "encode_text"), {"input_ids": ids}, {"input_ids": (0, 1)}, "text_embeds")
    if regions:
        features = torch.linspace(0, 1, 2 * 5 * (vision.roi_feature_size + 4)).reshape(2, 5, -1)
        mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
        inputs = {"roi_features": features, "roi_mask": mask}
        free = {"roi_features": (0, 1), "roi_mask": (0, 1)}
        yield Tower("region", _Call(model, "encode_rois"), inputs, free, "roi_embeds")


def _seen(loaded: Loaded[PyramidCLIPModel], pictures: Sequence[Image.Image], texts: Sequence[str]) -> Seen:
    """Batches of inputs as they will be seen, by tower: real ones where there are some, else noise and prompts."""
    size = loaded.model.config.vision_config.image_size
    if pictures:
        pixels = loaded.processor.image_processor(list(pictures), return_tensors="pt")["pixel_values"]
    else:
        pixels = torch.randn(6, 3, size, size, generator=torch.Generator().manual_seed(0))
    lines = list(texts) or ["a photo of a cat", "two dogs and a red boat on a lake at night", "!", "blue"]
    ids = loaded.processor.tokenizer(lines, padding=True, truncation=True, return_tensors="pt")["input_ids"]
    width = loaded.model.config.vision_config.roi_feature_size + 4
    features = torch.rand(6, 10, width, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(10)[None] < torch.tensor([10, 1, 3, 10, 7, 2])[:, None]
    inputs = {"vision": [pixels], "text": [ids], "region": [features, mask]}
    return {
        tower: [list(batch) for batch in zip(*(one.split(_CALIBRATION_BATCH) for one in tensors), strict=True)]
        for tower, tensors in inputs.items()
    }


def _trace(tower: Tower, path: Path) -> None:
    """The tower as an ONNX file in fp32."""
    dynamic = torch.export.Dim.DYNAMIC
    shapes = tuple(dict.fromkeys(tower.free[name], dynamic) for name in tower.inputs)
    with torch.no_grad(), _quiet():
        program: Any = torch.onnx.export(
            tower.module,
            tuple(tower.inputs.values()),
            dynamo=True,
            dynamic_shapes=(shapes,),
            input_names=list(tower.inputs),
            output_names=[tower.output],
            opset_version=_OPSET,
            verbose=False,
        )
        program.save(str(path), external_data=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter and the quantisers print and log what their own developers want to know."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _convert_onnx(traced: Path, made: Path, tower: Tower, dtype: str, seen: Seen) -> None:
    if dtype == "float32":
        made.write_bytes(traced.read_bytes())
    elif dtype == "float16":
        onnx, float16 = module_of_export("onnx"), module_of_export("onnxruntime.transformers.float16")
        with _quiet():
            onnx.save(float16.convert_float_to_float16(onnx.load(str(traced)), keep_io_types=True), str(made))
    else:
        with _quiet():
            _quantise_onnx(traced, made, tower, seen[tower.name])


class _Readings:
    """Batches of a tower's inputs, in the form in which ONNX Runtime's quantiser asks for them."""

    def __init__(self, tower: Tower, batches: list[list[torch.Tensor]]):
        self._names, self._left = list(tower.inputs), iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch by the inputs' names; None: that was all."""
        batch = next(self._left, None)
        return None if batch is None else {name: one.numpy() for name, one in zip(self._names, batch, strict=True)}


def _quantise_onnx(traced: Path, made: Path, tower: Tower, batches: list[list[torch.Tensor]]) -> None:
    """int8 by ONNX Runtime's quantisers.

    Matrix products take the ranges of each input as it comes. Convolutions have no such form that is fast, so those of
    a ResNet are given the ranges that were seen. The rest of it takes little time and stays as it is: in int8 too it
    would triple the error (docs/engines.md).
    """
    quantization = module_of_export("onnxruntime.quantization")
    prepared = traced.with_name(f"prepared-{traced.name}")
    quantization.shape_inference.quant_pre_process(str(traced), str(prepared), skip_symbolic_shape=True)
    if not tower.convolutional:
        quantization.quantize_dynamic(
            str(prepared),
            str(made),
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm"],
        )
        return

    quantization.quantize_static(
        str(prepared),
        str(made),
        _Readings(tower, batches),
        op_types_to_quantize=["Conv"],
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        weight_type=quantization.QuantType.QInt8,
        activation_type=quantization.QuantType.QUInt8,
    )


def _convert_openvino(traced: Path, made: Path, tower: Tower, dtype: str, seen: Seen) -> None:
    openvino = module_of_export("openvino")
    model = openvino.convert_model(str(traced))
    if dtype == "int8":
        nncf = module_of_export("nncf")
        with _quiet():
            data = nncf.Dataset([[one.numpy() for one in batch] for batch in seen[tower.name]])
            model_type = None if tower.convolutional else nncf.ModelType.TRANSFORMER
            model = nncf.quantize(model, data, model_type=model_type)
    openvino.save_model(model, str(made), compress_to_fp16=dtype == "float16")


_CONVERT: dict[str, Callable[..., None]] = {"onnx": _convert_onnx, "openvino": _convert_openvino}


def _compare(made: Path, tower: Tower, backend: str, dtype: str, seen: Seen) -> Exported:
    """How far the engine's unit embeddings are from the model's, in batches of another size than was traced.

    Raises:
        Failure: fp32 that is further off than rounding explains, or numbers that are not finite.
    """
    run = open_engine(made, backend)
    batches = [*seen[tower.name], [one[:1] for one in seen[tower.name][0]]]
    with torch.no_grad():
        wanted = torch.cat([normalize_embeds(tower.module(*batch)) for batch in batches])
    got = torch.cat([normalize_embeds(torch.from_numpy(run([one.numpy() for one in batch]))) for batch in batches])
    disagreement = float((got - wanted).abs().max())
    if not torch.isfinite(got).all() or (dtype == "float32" and disagreement > _FP32_TOLERANCE):
        raise Failure(
            f"{tower.name}: {backend} in {dtype} is {disagreement:.1e} away from the model's unit embeddings, expected "
            f"at most {_FP32_TOLERANCE:.0e}. The file was not kept."
        )
    cosines = (got * wanted).sum(dim=1)
    size = sum(part.stat().st_size for part in (made, made.with_suffix(".bin")) if part.is_file())
    return Exported(made.name, size / 1e6, disagreement, float(cosines.mean()), float(cosines.min()))


def _keep(made: Path, kept: Path, loaded: Loaded[PyramidCLIPModel], report: Exported) -> None:
    """Moves a file to its name, and says in the record what it is."""
    entry = {"sha256": digest(made), "disagreement": report.disagreement, "mean_cosine": report.mean_cosine}
    own: dict[str, Any] = {
        "model_sha256": loaded.sha256(),
        "logit_scale": float(loaded.model.logit_scale.detach()),
        "files": {},
    }
    path = kept.parent / RECORD
    with locked(kept.parent / ".export.lock", needed=False):
        record = read_record(kept.parent) if path.is_file() else own
        if record["model_sha256"] != own["model_sha256"]:
            # What was made of other weights is of no use beside these.
            record = own
            for ending in FILE_ENDINGS.values():
                for old in kept.parent.glob(f"*_model*{ending}"):
                    old.unlink()
        for part in (made.with_suffix(".bin"), made):
            if part.is_file():
                with written_aside(kept.with_suffix(part.suffix)) as aside:
                    part.replace(aside)
        record["files"][kept.name] = entry
        write_atomically(path, json_text(record, indent=2).encode())


# What is lost on data


def read_pairs(path: str | Path) -> list[dict[str, str]]:
    """Lines of JSON with `image`, a path from the file's folder, and `caption`.

    Raises:
        ValueError: a line is something else, its picture is not there, or there is none; names the line.
    """
    pairs = []
    for number, line in enumerate(read_utf8(path).splitlines(), start=1):
        try:
            record = parse_json(line)
            pair = {"image": str(Path(path).parent / record["image"]), "caption": record["caption"]}
            if not isinstance(pair["caption"], str) or not pair["caption"].strip():
                raise ValueError("the caption is no text")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path}, line {number}: expected {{"image": "17.jpg", "caption": "..."}} '
                f"({type(error).__name__}: {error})."
            ) from error
        if not os.path.isfile(pair["image"]):
            raise ValueError(
                f"{path}, line {number}: there is no picture {pair['image']}; paths count from that file's folder."
            )
        pairs.append(pair)
    if not pairs:
        raise ValueError(f"{path}: expected JSON lines with image and caption, it is empty.")
    return pairs


def compare_on_data(
    loaded: Loaded[PyramidCLIPModel],
    exported: ExportedModel,
    pairs: str | None,
    classes: Mapping[str, Sequence[str]],
    max_image_pixels: int,
) -> Iterator[tuple[str, float, float]]:
    """What the model reaches on data and what its exported form does: (measure, model, exported), shares of 1.

    Args:
        loaded: the model.
        exported: what became of it.
        pairs: see `read_pairs`; recall at 1 in both directions. None: not measured.
        classes: name of a class -> its pictures; share of those whose class comes first. Empty: not measured.
        max_image_pixels: pictures with more are an error.

    Raises:
        ValueError: the data is not what is expected.
        Failure: a picture cannot be read.
    """
    models = (loaded.model, exported)
    if pairs:
        read = read_pairs(pairs)
        paths, captions = [pair["image"] for pair in read], [pair["caption"] for pair in read]
        model_scores, exported_scores = (
            image_embeddings(model, loaded.processor, _read(paths, max_image_pixels))
            @ text_embeddings(model, loaded.processor, captions).T
            for model in models
        )
        yield "image to text, recall at 1", _first_is_own(model_scores), _first_is_own(exported_scores)
        yield "text to image, recall at 1", _first_is_own(model_scores.T), _first_is_own(exported_scores.T)
    if classes:
        names = list(classes)
        labels = torch.tensor([place for place, of_class in enumerate(classes.values()) for _ in of_class])
        paths = [path for of_class in classes.values() for path in of_class]

        def share(model: PyramidCLIPModel | ExportedModel) -> float:
            images = image_embeddings(model, loaded.processor, _read(paths, max_image_pixels))
            best = (images @ class_embeddings(model, loaded.processor, names).T).argmax(dim=1)
            return float((best == labels).float().mean())

        yield "zero-shot classification, first place", share(loaded.model), share(exported)


def _read(paths: Sequence[str], max_image_pixels: int) -> Iterator[Image.Image]:
    for path in paths:
        try:
            yield read_picture(path, max_image_pixels)
        except UnreadablePicture as error:
            raise Failure(f"the files are exported, but not compared on data: {path}: {error}") from error


def _first_is_own(scores: torch.Tensor) -> float:
    """Share of rows of (N, N) whose own column has the highest score."""
    return float((scores.argmax(dim=1) == torch.arange(len(scores))).float().mean())
