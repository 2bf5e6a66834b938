"""Right: what the model computes on the device is what it computes elsewhere."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pyramidclip_hf import PyramidCLIPModel, PyramidCLIPProcessor
from tests.golden import NAMES, OUTPUTS, golden_batch, golden_model, golden_vectors
from tests.gpu.measure import apart, cosine, exact, waits_counted
from tests.gpu.models import imported, our_batch, our_model
from tests.gpu.pictures import picture_folder
from tests.gpu.session import Part, Session
from tests.plain_forms import lively
from training.loop.compiling import compile_blocks

COSINE = {torch.bfloat16: 0.99, torch.float16: 0.999}
LEVELS = tuple(OUTPUTS)


def golden(session: Session) -> None:
    """The reference implementation's vectors: fp32 to 1e-4 with TF32 off, half precision by cosine, plain and fused."""
    for name in NAMES:
        wanted, plain = golden_vectors(name), golden_model(name)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            batch = {
                key: value.to(session.device, dtype if value.is_floating_point() else value.dtype)
                for key, value in golden_batch(name).items()
            }
            for fused in (False, True):
                model = copy.deepcopy(plain).to(session.device, dtype)
                if fused:
                    model.fuse()
                what = f"{name}, {str(dtype).removeprefix('torch.')}{', fused' if fused else ''}"
                with torch.inference_mode(), exact():
                    embeds = session.attempt(
                        what, lambda model=model, batch=batch: model.encode_levels(LEVELS, **batch)
                    )
                if embeds is None:
                    continue
                pairs = [(embeds[level], wanted[key]) for level, key in OUTPUTS.items()]
                if dtype == torch.float32:
                    largest = max((found.cpu() - right).abs().max().item() for found, right in pairs)
                    session.check(f"{what}, largest difference", largest, at_most=1e-4)
                else:
                    smallest = min(cosine(found, right) for found, right in pairs)
                    session.check(f"{what}, smallest cosine", smallest, at_least=COSINE[dtype])


def golden_training(session: Session) -> None:
    """The same in training mode, with the gradient of every weight against the CPU's, and with checkpointing."""
    for name in NAMES:
        wanted, plain, kept = golden_vectors(name), golden_model(name), {}
        for where, checkpointing in ((torch.device("cpu"), False), (session.device, False), (session.device, True)):
            model = copy.deepcopy(plain).train().to(where)
            if checkpointing:
                model.activation_checkpointing_enable()
            batch = {key: value.to(where) for key, value in golden_batch(name).items()}
            with exact():
                embeds = model.encode_levels(LEVELS, **batch)
                sum(embed.square().sum() for embed in embeds.values()).backward()
            gradients = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
            if not kept:
                kept = gradients
                continue
            largest = max(
                (embeds[level].cpu() - wanted[f"train.{key}"]).abs().max().item() for level, key in OUTPUTS.items()
            )
            way = f"{name}, training{', checkpointing' if checkpointing else ''}"
            session.check(f"{way}, largest difference", largest, at_most=1e-4)
            # Differences as a share of the largest gradient of all: some are zero but for rounding.
            scale = max(gradient.abs().max().item() for gradient in kept.values())
            apart_most = max((gradients[key].cpu() - kept[key]).abs().max().item() for key in kept) / scale
            session.check(f"{way}, gradients against the CPU's", apart_most, at_most=1e-4)


def attention(session: Session) -> None:
    """Every kind of attention that transformers and torch offer, bf16, against eager fp32 on the same device."""
    model = lively(our_model(session, "ViT-B-32", "eos")).eval()
    batch = our_batch(session, model.config, session.size(16, 2))
    with torch.inference_mode(), exact():
        model.set_attn_implementation("eager")
        wanted = model.encode_levels(LEVELS, **batch)
        model, half = model.to(torch.bfloat16), {k: _half(v) for k, v in batch.items()}
        for kind in ("eager", "sdpa", "flex_attention"):
            model.set_attn_implementation(kind)
            with _not_compiled(session):
                embeds = session.attempt(kind, lambda: model.encode_levels(LEVELS, **half))
            if embeds is not None:
                smallest = min(cosine(embeds[level], wanted[level]) for level in LEVELS)
                session.check(f"{kind}, smallest cosine", smallest, at_least=0.99)
        model.set_attn_implementation("sdpa")
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            _one_backend(session, model, half, wanted, backend)


def _one_backend(
    session: Session, model: PyramidCLIPModel, half: dict, wanted: dict[str, torch.Tensor], backend: SDPBackend
) -> None:
    """Pictures and texts by one kernel of sdpa; where it refuses masks or the device a row says so."""
    for level in ("global", "caption", "roi"):
        try:
            with sdpa_kernel(backend):
                found = model.encode_levels((level,), **half)[level]
        except RuntimeError as error:
            session.note(what=f"sdpa {backend.name}, {level}", refused=str(error).strip().splitlines()[0][:120])
        else:
            session.check(f"sdpa {backend.name}, {level}, smallest cosine", cosine(found, wanted[level]), at_least=0.99)


def _half(value: torch.Tensor) -> torch.Tensor:
    return value.to(torch.bfloat16) if value.is_floating_point() else value


@contextlib.contextmanager
def _not_compiled(session: Session) -> Iterator[None]:
    """In a dry pass flex attention runs as it is written: compiling it takes longer than all the rest."""
    if not session.dry:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def compiled(session: Session) -> None:
    """Blocks compiled as `--torch-compile` does: outputs, gradients, nothing new for texts of other lengths."""
    from torch._dynamo.utils import counters

    # A ResNet's text tower is the ViT's.
    models = {"ViT-B-32": LEVELS, "RN50": ("global", "local")}
    for name, levels in models.items() if not session.dry else [("ViT-B-32", LEVELS)]:
        model = lively(our_model(session, name, "eos")).eval()
        fast = copy.deepcopy(model)
        torch._dynamo.reset()
        counters.clear()
        compile_blocks(fast, backend=session.size("inductor", "eager"))
        batch, gradients, embeds = our_batch(session, model.config, 4), [], []
        with exact():
            for way in (model, fast):
                embeds.append(way.encode_levels(levels, **batch))
                sum(embed.square().mean() for embed in embeds[-1].values()).backward()
                gradients.append({key: p.grad for key, p in way.named_parameters() if p.grad is not None})
        largest = max(apart(embeds[1][level], embeds[0][level]) for level in levels)
        session.check(f"{name}, compiled, largest difference", largest, at_most=1e-3)
        scale = max(gradient.abs().max().item() for gradient in gradients[0].values())
        most = max((gradients[1][key] - gradients[0][key]).abs().max().item() for key in gradients[0]) / scale
        session.check(f"{name}, compiled, gradients", most, at_most=1e-3)
        session.note(what=f"{name}, graphs compiled", count=counters["stats"]["unique_graphs"])
        if name == "ViT-B-32":
            session.check(f"{name}, graphs that texts of other lengths add", _more_graphs(fast, batch), equals=0)


def _more_graphs(model: PyramidCLIPModel, batch: Mapping[str, torch.Tensor]) -> int:
    """How many graphs ten more lengths of texts compile, after one."""
    from torch._dynamo.utils import counters

    found = []
    with torch.no_grad():
        for length in range(8, 19):
            ids = torch.nn.functional.pad(batch["input_ids"][:, -6:], (length - 6, 0), value=7)
            model.encode_levels(("caption",), input_ids=ids)
            found.append(counters["stats"]["unique_graphs"])
    return found[-1] - found[0]


def exported(session: Session) -> None:
    """Programs of `torch.export`, taken on the device, at another batch size than they were taken at."""
    batch_size = torch.export.Dim("batch", min=2, max=64)
    for name in session.size(("ViT-B-32", "RN50"), ("ViT-B-32",)):
        model = lively(our_model(session, name, "eos")).eval()
        batch = our_batch(session, model.config, 4)
        for call, key in ((model.encode_image, "pixel_values"), (model.encode_text, "input_ids")):
            with torch.no_grad(), exact():
                program = torch.export.export(
                    _Call(model, call), (batch[key],), dynamic_shapes=({0: batch_size},), strict=False
                ).module()
                more = torch.cat([batch[key], batch[key].flip(0)])
                session.check(f"{name}, {call.__name__}, exported", apart(program(more), call(more)), at_most=1e-4)


class _Call(torch.nn.Module):
    """A method of a model as a module, which is what can be exported."""

    def __init__(self, model: PyramidCLIPModel, call: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.model, self.call = model, call

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.call(inputs)


def vinvl(session: Session) -> None:
    """VinVL's detector against the CPU, TF32 off, near ties by their scores."""
    imported("torchvision")
    from tests.pyramidclip_hf.vinvl.conftest import make_model
    from tests.pyramidclip_hf.vinvl.same_detections import likeness
    from tests.pyramidclip_hf.vinvl.test_vinvl_modeling import batch_of, pixels

    batch, sizes = batch_of(pixels(96, 80), pixels(61, 125, seed=1))
    for overrides in ({}, {"ignore_box_regression": False}):
        model = make_model(**overrides)
        with exact(), torch.inference_mode():
            wanted = model(batch, sizes).detections
            model.to(session.device)
            found = model(batch.to(session.device), sizes.to(session.device)).detections
        for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
            what, alike = f"picture {number}, {overrides or 'as published'}", likeness(one, other)
            session.check(f"{what}: scores by place", alike.score, at_most=1e-3)
            session.check(f"{what}: share found again", alike.again, at_least=0.9)
            session.check(f"{what}: boxes, px", alike.box, at_most=0.1)
            session.check(f"{what}: features", alike.features, at_most=1e-2)


def saved_model(session: Session, name: str = "ViT-B-32") -> Path:
    """A folder with a model and its processor, made once."""
    folder = session.folder / f"model-{name}"
    if not folder.is_dir():
        model = our_model(session, name, "eos").cpu()
        lively(model).save_pretrained(folder)
        side = model.config.vision_config.image_size
        sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}} if session.dry else {}
        processor = PyramidCLIPProcessor()
        for key, value in sizes.items():
            setattr(processor.image_processor, key, value)
        processor.save_pretrained(folder)
    return folder


def pipelines(session: Session) -> None:
    """Pipelines of transformers on the device against the CPU's."""
    from PIL import Image
    from transformers import pipeline

    folder = str(saved_model(session))
    picture = Image.open(next(picture_folder(session).iterdir()))
    labels = ["a dog", "a cat", "a red ball"]
    scores, features = [], []
    for device in ("cpu", 0 if not session.dry else "cpu"):
        classify = pipeline("zero-shot-image-classification", model=folder, device=device)
        scores.append({row["label"]: row["score"] for row in classify(picture, candidate_labels=labels)})
        extract = pipeline("image-feature-extraction", model=folder, device=device)
        features.append(torch.tensor(extract(picture)).flatten())
        kind = "cpu" if device == "cpu" else "cuda"
        session.check(f"asked for {device}, the model is on", classify.model.device.type, equals=kind)
    session.check("scores", max(abs(scores[0][label] - scores[1][label]) for label in labels), at_most=1e-2)
    session.check("features, cosine", cosine(features[1][None], features[0][None]), at_least=0.999)


def embedding_waits(session: Session) -> None:
    """How often the host waits for the device inside of one call of the encoders."""
    model = our_model(session, "ViT-B-32", "eos").eval()
    batch = our_batch(session, model.config, 4)
    with torch.inference_mode():
        model.encode_levels(LEVELS, **batch)
        with waits_counted() as found:
            model.encode_levels(LEVELS, **batch)
    session.check("waits inside of encode_levels", sum(found.values()), equals=0)


PARTS = (
    Part("right: golden vectors", 25, golden),
    Part("right: golden vectors in training", 20, golden_training),
    Part("right: attention", 40, attention),
    Part("right: VinVL", 15, vinvl),
    Part("right: pipelines", 25, pipelines),
    Part("right: waits of the encoders", 10, embedding_waits),
    Part("right: exported", 30, exported),
    Part("right: compiled", 100, compiled),
)
