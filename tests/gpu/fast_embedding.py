"""Fast: embedding pictures and texts against CLIPModel and open_clip, and from files."""

import copy
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from tests.gpu.measure import Timing, in_turn
from tests.gpu.models import clip_model, imported, open_clip_model, our_batch, our_model
from tests.gpu.pictures import picture_folder
from tests.gpu.right_model import saved_model
from tests.gpu.session import Part, Session, Skipped
from tests.plain_forms import lively

Ways = dict[str, Callable[[], object]]
Encode = Callable[[torch.Tensor], torch.Tensor]


def _others(session: Session, name: str, dtype: torch.dtype, text: bool, inputs: torch.Tensor) -> Ways:
    """What people would use instead, in the same type, on the same inputs."""
    ways: Ways = {}
    if name.startswith("ViT"):
        clip = clip_model(session, name).eval().to(dtype)
        ways["CLIPModel"] = (
            (lambda: clip.get_text_features(input_ids=inputs))
            if text
            else (lambda: clip.get_image_features(pixel_values=inputs))
        )
    try:
        imported("open_clip")
    except Skipped as why:
        session.note(what="open_clip", skipped=str(why))
    else:
        other = open_clip_model(session, name).eval().to(dtype)
        ways["open_clip"] = lambda: (other.encode_text if text else other.encode_image)(inputs)
    return ways


def pictures_of(name: str) -> Callable[[Session], None]:
    """The part that embeds pictures by architecture `name`."""

    def run(session: Session) -> None:
        count = session.size(256, 2)
        for dtype in (torch.bfloat16, torch.float16):
            model = lively(our_model(session, name)).eval().to(dtype)
            side = model.config.vision_config.image_size
            pixels = torch.randn(count, 3, side, side, device=session.device, dtype=dtype)
            fused = copy.deepcopy(model).fuse()
            ways: Ways = {
                "plain": lambda model=model, pixels=pixels: model.encode_image(pixels),
                "fused": lambda fused=fused, pixels=pixels: fused.encode_image(pixels),
                **_others(session, name, dtype, False, pixels),
            }
            _timed(session, f"{name}, pictures, {_short(dtype)}", ways, count)

    run.__doc__ = f"Pictures by {name}."
    return run


def texts(session: Session) -> None:
    """Texts of 16 tokens under "eos", and padded to 77, bf16 and fp16."""
    count = session.size(1024, 2)
    for dtype in (torch.bfloat16, torch.float16):
        model = lively(our_model(session, "ViT-B-32", "eos")).eval().to(dtype)
        ids = our_batch(session, model.config, count)["input_ids"]
        long = F.pad(ids, (0, 77 - ids.shape[1]))
        fused = copy.deepcopy(model).fuse()
        ways: Ways = {
            "plain": lambda model=model, ids=ids: model.encode_text(ids),
            "fused": lambda fused=fused, ids=ids: fused.encode_text(ids),
            "77 tokens": lambda model=model, long=long: model.encode_text(long),
            **_others(session, "ViT-B-32", dtype, True, long),
        }
        _timed(session, f"texts, {_short(dtype)}", ways, count)


def compiled_pictures(session: Session) -> None:
    """Compiled encoders of pictures, ViT-B-16, bf16."""
    count, dtype = session.size(256, 2), torch.bfloat16
    model = lively(our_model(session, "ViT-B-16")).eval().to(dtype)
    side = model.config.vision_config.image_size
    pixels = torch.randn(count, 3, side, side, device=session.device, dtype=dtype)
    others = _others(session, "ViT-B-16", dtype, False, pixels)
    _compiled(session, "ViT-B-16, pictures, bfloat16", model.encode_image, pixels, others)


def compiled_texts(session: Session) -> None:
    """Compiled encoders of texts, ViT-B-32, bf16, ours of 16 tokens under "eos"."""
    count, dtype = session.size(1024, 2), torch.bfloat16
    model = lively(our_model(session, "ViT-B-32", "eos")).eval().to(dtype)
    ids = our_batch(session, model.config, count)["input_ids"]
    others = _others(session, "ViT-B-32", dtype, True, F.pad(ids, (0, 77 - ids.shape[1])))
    _compiled(session, "ViT-B-32, texts, bfloat16", model.encode_text, ids, others)


def _compiled(session: Session, what: str, encode: Encode, inputs: torch.Tensor, others: Ways) -> None:
    """Ours, plain and fused, and the others, each compiled whole. Compiling is long: what is there is timed at once."""
    backend = session.size("inductor", "eager")
    fused = getattr(copy.deepcopy(encode.__self__).fuse(), encode.__name__)
    ours, ours_fused = (torch.compile(way, backend=backend) for way in (encode, fused))
    theirs: Ways = {f"{way}, compiled": torch.compile(other, backend=backend) for way, other in others.items()}
    clip = "CLIPModel, compiled"
    first: Ways = {"compiled": lambda: ours(inputs), clip: theirs[clip]}
    second: Ways = {"fused, compiled": lambda: ours_fused(inputs), **theirs}
    for ways in (first, second):
        times = _timed(session, what, ways, len(inputs))
        way = next(iter(ways))
        if {way, clip} <= times.keys():
            ratio = times[clip].whole / times[way].whole
            session.goal(f"{what}, {way}: times CLIPModel's compiled a second", ratio, at_least=1.0)


def _timed(session: Session, what: str, ways: Ways, count: int) -> dict[str, Timing]:
    with torch.inference_mode():
        times = in_turn(session, ways, rounds=session.size(10, 1), warm=session.size(3, 1))
    for way, timing in times.items():
        session.note(what=f"{what}, {way}", per_s=1e3 * count / timing.whole, ms=timing.whole, host_ms=timing.host)
    best = min((times[way].whole for way in ("plain", "fused") if way in times), default=None)
    if best is not None and "CLIPModel" in times:
        session.goal(f"{what}: times CLIPModel's a second", times["CLIPModel"].whole / best, at_least=1.0)
    if {"plain", "fused"} <= times.keys():
        session.goal(f"{what}: fused over plain", times["plain"].whole / times["fused"].whole, at_least=1.0)
    return times


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def command(session: Session) -> None:
    """`pyramidclip embed` from JPEG files, with what it takes to start and without, beside the forward pass alone."""
    folder, model = picture_folder(session), saved_model(session)
    once = [str(path) for path in sorted(folder.iterdir())]
    # The same pictures under other names: links cost nothing, and every one is decoded again.
    linked = session.folder / "linked"
    linked.mkdir(exist_ok=True)
    for number in range(session.size(8192, 8)):
        (linked / f"{number:06d}.jpg").hardlink_to(once[number % len(once)])
    taken = []
    for count, source in ((len(once), folder), (len(list(linked.iterdir())), linked)):
        output = session.folder / f"many-{count}.npz"
        start = time.monotonic()
        words = ["embed", source, "--model", model, "--output", output, "--device", session.device.type]
        done = session.command("pyramidclip_command", *words, "--dtype", session.size("bfloat16", "float32"))
        seconds = time.monotonic() - start
        session.check(f"exit code{'' if done.code == 0 else ' ' + done.output[-300:]}", done.code, equals=0)
        session.note(what="pyramidclip embed, ViT-B-32", pictures=count, seconds=seconds, per_s=count / seconds)
        taken.append((count, seconds))
    (few, short), (more, long) = taken
    from_files, alone = (more - few) / (long - short), _forward_alone(session)
    session.note(
        what="pyramidclip embed, ViT-B-32, once started",
        per_s=from_files,
        forward_alone_per_s=alone,
        share=from_files / alone,
    )


def _forward_alone(session: Session) -> float:
    """Pictures a second of what the command computes, pixels on the device already."""
    dtype, count = session.size(torch.bfloat16, torch.float32), session.size(32, 2)  # as the command has them
    model = our_model(session, "ViT-B-32").eval().to(dtype).fuse()
    side = model.config.vision_config.image_size
    pixels = torch.randn(count, 3, side, side, device=session.device, dtype=dtype)
    with torch.inference_mode():
        times = in_turn(session, {"forward": lambda: model.encode_image(pixels)}, rounds=session.size(20, 1))
    return 1e3 * count / times["forward"].whole


PARTS = (
    Part("fast: pictures by ViT-B-16", 25, pictures_of("ViT-B-16")),
    Part("fast: pictures by ViT-B-32", 25, pictures_of("ViT-B-32")),
    Part("fast: pictures by RN50", 25, pictures_of("RN50")),
    Part("fast: texts", 20, texts),
    Part("fast: embed from files", 60, command),
)
LAST = (
    Part("fast: compiled pictures", 100, compiled_pictures),
    Part("fast: compiled texts", 60, compiled_texts),
)
