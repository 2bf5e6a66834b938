"""Fast: training steps beside open_clip's and CLIPModel's, in turn in one process."""

import time
from collections.abc import Callable

import torch

from tests.gpu.measure import Timing, in_turn, kernels, peak, wait_for
from tests.gpu.models import (
    CLIP,
    PYRAMID,
    OurStep,
    clip_model_step,
    fitting,
    imported,
    open_clip_step,
    predicted,
    recipe,
)
from tests.gpu.session import Part, Session, Skipped

PAIRS = {"RN50": 256, "ViT-B-32": 256, "ViT-B-16": 128}
OBJECTIVES = {"pyramid": PYRAMID, "CLIP": CLIP}
# Pairs a second over open_clip's, which has texts of 77 tokens.
AGAINST_OPEN_CLIP = {"CLIP max": 1.0, "CLIP eos": 1.3}
Make = Callable[[], Callable[[], object]]
# What a bf16 product reaches, TFLOP/s; measured by `ceilings`, asked for by whoever comes after it.
_ceiling: dict[str, float] = {}


def ceilings(session: Session) -> None:
    """What everything else is read against: a product in bf16, a copy."""
    side, numbers = session.size(8192, 128), session.size(1 << 29, 1 << 16)
    left, right = (torch.randn(side, side, device=session.device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(numbers, device=session.device)
    target = torch.empty_like(source)
    ways = {"product": lambda: left @ right, "copy": lambda: target.copy_(source)}
    times = in_turn(session, ways, rounds=session.size(20, 2))
    _ceiling["bf16"] = 2 * side**3 / times["product"].whole / 1e9
    session.note(
        what="ceilings", bf16_tflops=_ceiling["bf16"], copy_tb_per_s=2 * source.nbytes / times["copy"].whole / 1e9
    )


def ceiling(session: Session) -> float:
    """TFLOP/s of a bf16 product, measured now where no part did before."""
    if "bf16" not in _ceiling:
        ceilings(session)
    return _ceiling["bf16"]


def steps_of(name: str) -> Callable[[Session], None]:
    """The part that measures architecture `name`."""

    def run(session: Session) -> None:
        pairs = fitting(session, name, session.size(PAIRS[name], 4))
        makers: dict[str, Make] = {}
        for objective, weights in OBJECTIVES.items():
            for pooling in ("max", "eos"):
                makers[f"{objective} {pooling}"] = lambda w=weights, p=pooling: OurStep(session, name, p, w, pairs)
        makers["open_clip"] = lambda: open_clip_step(session, name, pairs)
        if name.startswith("ViT"):
            makers["CLIPModel"] = lambda: clip_model_step(session, name, pairs)
        else:
            makers["pyramid eos channels-last"] = lambda: OurStep(
                session, name, "eos", PYRAMID, pairs, channels_last=True
            )
        makers["pyramid max cached"] = lambda: OurStep(session, name, "max", PYRAMID, pairs, chunk=pairs // 4)
        times = measured(session, makers, pairs)
        against_prediction(session, name, pairs)
        compare(session, name, times)

    run.__doc__ = f"Training steps of {name}."
    return run


# GB at the peak of the first step, and its seconds, by way; of the part that runs.
_peaks: dict[str, float] = {}
_seconds: dict[str, float] = {}


def measured(session: Session, makers: dict[str, Make], pairs: int) -> dict[str, Timing]:
    """Builds every way and takes its first step, notes what it needs, and times all in turn."""
    _peaks.clear()
    ways: dict[str, Callable[[], object]] = {}
    for way, make in makers.items():
        with peak(session) as taken:
            first = session.attempt(way, lambda make=make: first_step(session, make)) if there(session, way) else None
        if first is not None:
            (ways[way], _seconds[way]), _peaks[way] = first, taken[0]
    times = in_turn(session, ways, rounds=session.size(8, 1), warm=session.size(2, 1))
    for way, timing in times.items():
        if session.dry and way != "pyramid max":
            continue  # to profile one is enough to see that it works
        count, busy, longest = kernels(session, ways[way])
        session.note(
            what=way,
            pairs_per_s=1e3 * pairs / timing.whole,
            ms=timing.whole,
            fastest_ms=timing.spread[0],
            slowest_ms=timing.spread[1],
            host_ms=timing.host,
            kernels_ms=busy,
            kernels=count,
            peak_gb=_peaks[way],
            first_step_s=_seconds[way],
        )
        if way in ("pyramid max", "pyramid eos"):
            session.note(what=f"longest kernels of {way}", kernels=[[key, ms] for key, ms, _ in longest[:6]])
    return times


def first_step(session: Session, make: Make) -> tuple[Callable[[], object], float]:
    """The step that `make` builds, once taken, and the seconds that this took: what is compiled is compiled in it."""
    step = make()
    wait_for(session.device)
    start = time.monotonic()
    step()
    wait_for(session.device)
    return step, time.monotonic() - start


def there(session: Session, way: str) -> bool:
    """Whether what is compared with can be imported; a row says so where it cannot."""
    if not way.startswith("open_clip"):
        return True
    try:
        imported("open_clip")
    except Skipped as why:
        session.note(what=way, skipped=str(why))
        return False
    return True


def against_prediction(session: Session, name: str, pairs: int) -> None:
    """Peak memory against `training.scale`, and the arithmetic of the rows."""
    for way, taken in _peaks.items():
        objective, _, pooling = way.partition(" ")
        if objective not in OBJECTIVES or "channels" in pooling:
            continue
        if session.dry and way not in ("CLIP eos", "pyramid max cached"):
            continue  # a trace takes a second, whatever the size
        chunk = pairs // 4 if pooling.endswith("cached") else None
        weights = OBJECTIVES[objective]
        gigabytes, gigaflops = predicted(recipe(session, name, pooling.split()[0], weights, pairs, chunk), weights)
        session.note(what=f"{way}: training.scale says", gb=gigabytes, gflop_per_pair=gigaflops)
        _flops[name, way] = gigaflops * pairs
        if not session.dry:
            session.check(f"{way}: peak over training.scale's", abs(taken / gigabytes - 1), at_most=0.15)


_flops: dict[tuple[str, str], float] = {}


def compare(session: Session, name: str, times: dict[str, Timing]) -> None:
    """Ratios and shares of the measured product, and the goals among them."""
    for way, timing in times.items():
        if (name, way) in _flops:
            reached = _flops[name, way] / timing.whole  # GFLOP a millisecond
            share = reached / ceiling(session)
            session.note(what=f"{way}: arithmetic", tflops=reached, share_of_product=share)
            if (name, way) == ("ViT-B-16", "pyramid max"):
                session.goal(f"{name}, {way}: share of the measured product", share, at_least=0.45)
        if way != "open_clip" and "open_clip" in times and way.startswith("CLIP"):
            ratio = times["open_clip"].whole / timing.whole
            session.note(what=f"{way}: times open_clip's pairs a second", ratio=ratio)
            if bound := AGAINST_OPEN_CLIP.get(way):
                session.goal(f"{name}, {way}: times open_clip's pairs a second", ratio, at_least=bound)
        waits_for_the_device(session, name, way, timing)
    if {"pyramid max", "pyramid eos"} <= times.keys():
        ratio = times["pyramid max"].whole / times["pyramid eos"].whole
        session.goal(f'{name}, pyramid: "eos" times "max"', ratio, at_least=1.3)


def waits_for_the_device(session: Session, name: str, way: str, timing: Timing) -> None:
    """The goal of every step of ours: the host is done before the device."""
    if way.startswith(("pyramid ", "CLIP ")):
        session.goal(f"{name}, {way}: host time as a share of the step", timing.host / timing.whole, at_most=0.95)


def compiled_steps_of(name: str, *objectives: str) -> Callable[[Session], None]:
    """The part that measures compiled steps of architecture `name`, "OBJECTIVE POOLING" each, beside open_clip's."""

    def run(session: Session) -> None:
        backend, pairs = session.size("inductor", "eager"), fitting(session, name, session.size(PAIRS[name], 4))
        makers: dict[str, Make] = {"open_clip, compiled": lambda: open_clip_step(session, name, pairs, backend)}
        for words in objectives:
            objective, pooling = words.split()
            weights = OBJECTIVES[objective]
            for told, graphs in (("compiled", False), ("compiled, CUDA graphs", True)):
                makers[f"{words}, {told}"] = lambda p=pooling, w=weights, g=graphs: OurStep(
                    session, name, p, w, pairs, compiled=backend, graphs=g
                )
        times: dict[str, Timing] = {}
        for way in list(makers)[: session.size(len(makers), 2)]:
            # One at a time, so that those which are there are on record when the seconds are over.
            times |= measured(session, {way: makers[way]}, pairs)
            if way not in times:
                continue
            waits_for_the_device(session, name, way, times[way])
            theirs, bound = times.get("open_clip, compiled"), AGAINST_OPEN_CLIP.get(way.partition(",")[0])
            if theirs and bound:
                ratio = theirs.whole / times[way].whole
                session.goal(f"{name}, {way}: times compiled open_clip's pairs a second", ratio, at_least=bound)

    run.__doc__ = f"Compiled steps of {name}, and the seconds of the first."
    return run


PARTS = (
    Part("fast: ceilings", 15, ceilings),
    Part("fast: steps of ViT-B-16", 70, steps_of("ViT-B-16")),
    Part("fast: steps of ViT-B-32", 70, steps_of("ViT-B-32")),
    Part("fast: steps of RN50", 70, steps_of("RN50")),
)
COMPILED = ("CLIP max", "CLIP eos", "pyramid max")
LAST = (
    Part("fast: compiled steps of ViT-B-32", 170, compiled_steps_of("ViT-B-32", *COMPILED, "pyramid eos")),
    Part("fast: compiled steps of ViT-B-16", 150, compiled_steps_of("ViT-B-16", *COMPILED)),
    Part("fast: compiled steps of RN50", 150, compiled_steps_of("RN50", *COMPILED)),
)
