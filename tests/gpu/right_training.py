"""Right: a training step on the device is the step that was meant."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from pyramidclip_hf.levels_pyramidclip import LEVELS
from pyramidclip_hf.loss_pyramidclip import pyramid_loss
from tests.dense_loss import dense_loss
from tests.gpu.measure import apart, exact, waits_counted
from tests.gpu.models import PYRAMID, OurStep, plain_accelerator
from tests.gpu.session import CHECKOUT, Part, Session, Skipped
from tests.training.tiny import VIT, tiny_batch, tiny_model
from training.loop.gradient_cache import GradientCache
from training.loop.objective import ContrastiveObjective
from training.loop.optim import MovingAverage, build_optimizer

NO_BATCH_NORM = {**VIT, "num_leff_layers": 0}


def gpu_tests(session: Session) -> None:
    """Everything marked `gpu` in tests/."""
    files = [
        str(path)
        for path in sorted((CHECKOUT / "tests").rglob("test_*.py"))
        if "mark.gpu" in path.read_text(encoding="utf-8") and "gpu" not in path.relative_to(CHECKOUT / "tests").parts
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=max(1.0, session.left()),
    )
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    session.check(f"pytest -m gpu: {last}", done.returncode, equals=0)


def loss(session: Session) -> None:
    """Values and gradients against the dense form in fp64, every term and mask, TF32 off."""
    pairs, width = session.size(4096, 64), session.size(512, 32)
    draw = torch.Generator(session.device).manual_seed(0)
    raw = {level: torch.randn(pairs, width, device=session.device, generator=draw) for level in LEVELS}
    present = {
        level: torch.rand(pairs, device=session.device, generator=draw) < (0.7 if LEVELS[level].mask else 2)
        for level in LEVELS
    }
    found = []
    for dtype in (torch.float32, torch.float64):
        embeds = {level: F.normalize(value.to(dtype), dim=-1).requires_grad_() for level, value in raw.items()}
        scale = torch.tensor(14.3, dtype=dtype, device=session.device, requires_grad=True)
        with exact(), session.device:
            if dtype == torch.float32:
                value = pyramid_loss(embeds, scale, PYRAMID, 0.2, present=present).loss
            else:
                value = dense_loss(embeds, scale, PYRAMID, 0.2, present)
            value.backward()
        found.append((value, scale.grad, torch.stack([embed.grad for embed in embeds.values()])))
    for name, ours, dense in zip(("loss", "gradient of the scale", "gradients of embeddings"), *found, strict=True):
        session.check(f"{name}, {pairs} pairs", apart(ours, dense), at_most=1e-5)


def caching(session: Session) -> None:
    """Gradient caching against the whole batch, in fp64, without BatchNorm."""
    gradients = []
    batch = {name: value.to(session.device) for name, value in tiny_batch().items()}
    for chunk in (None, 3):
        objective = ContrastiveObjective(tiny_model(NO_BATCH_NORM), PYRAMID, 0.2).to(session.device)
        if chunk is None:
            losses = objective(batch)
            losses.loss.backward()
        else:
            losses = GradientCache(plain_accelerator(session), objective, chunk).forward_backward(batch)
        gradients.append([losses.shares, *(p.grad for p in objective.parameters() if p.grad is not None)])
    scale = max(gradient.abs().max().item() for gradient in gradients[0][1:])
    session.check("losses", apart(gradients[1][0], gradients[0][0]), at_most=1e-10)
    most = max((a - b).abs().max().item() for a, b in zip(gradients[0][1:], gradients[1][1:], strict=True)) / scale
    session.check("gradients", most, at_most=1e-8)


def average(session: Session) -> None:
    """The moving average of weights against its definition."""
    model = tiny_model().to(session.device)
    averaged, decay = MovingAverage(model, 0.9), 0.9
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        averaged.update(model)
        for name, value in model.state_dict().items():
            wanted[name] = decay * wanted[name] + (1 - decay) * value if value.is_floating_point() else value.clone()
    most = max(apart(averaged.tensors[name].float(), value.float()) for name, value in wanted.items() if value.any())
    session.check("average", most, at_most=1e-6)


def scaler(session: Session) -> None:
    """A gradient that overflows is left out and the scale falls; the next one is taken. fp16 (bf16 in a dry pass)."""
    half = session.size(torch.float16, torch.bfloat16)
    objective = ContrastiveObjective(tiny_model(dtype=torch.float32), PYRAMID, 0.2, autocast_dtype=half).to(
        session.device
    )
    batch = {name: value.to(session.device) for name, value in tiny_batch(dtype=torch.float32).items()}
    optimizer = build_optimizer(objective, 1e-3, 0.1, (0.9, 0.98), 1e-6)
    scaling = torch.amp.GradScaler(session.device.type)
    start = [parameter.detach().clone() for parameter in objective.parameters()]

    def step(factor: float) -> bool:
        """Whether the weights moved."""
        optimizer.zero_grad()
        scaling.scale(objective(batch).loss * factor).backward()
        scaling.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        scaling.step(optimizer)
        scaling.update()
        return any(not torch.equal(now, before) for now, before in zip(objective.parameters(), start, strict=True))

    scale = scaling.get_scale()
    session.check("weights moved by a step that overflows", step(1e38), equals=False)
    session.check("scale after it, as a share", scaling.get_scale() / scale, equals=0.5)
    session.check("weights moved by the steps after it", sum(step(1.0) for _ in range(8)) > 0, equals=True)
    finite = all(bool(torch.isfinite(parameter).all()) for parameter in objective.parameters())
    session.check("weights are finite", finite, equals=True)


def waiting(session: Session) -> None:
    """Nothing inside of a step waits for the device, plain and cached. The log's step is the one that may."""
    for what, chunk in (("plain", None), ("gradient caching", session.size(16, 2))):
        step = OurStep(session, "ViT-B-32", "eos", PYRAMID, session.size(32, 4), chunk=chunk)
        step()
        with waits_counted() as found:
            step()
        places = ", ".join(f"{place} x {count}" for place, count in found.items())
        session.check(f"waits inside of a step, {what}{': ' if places else ''}{places}", sum(found.values()), equals=0)


def processes(session: Session) -> None:
    """Two processes on the one device, over gloo, against the whole batch; one over NCCL with SyncBatchNorm."""
    cases = {"gloo": 2} if session.dry else {"gloo": 2, "nccl": 1}
    for backend, count in cases.items():
        rows = session.attempt(
            f"{count} over {backend}", lambda backend=backend, count=count: _group(session, backend, count)
        )
        for row in rows or ():
            session.check(f"{count} over {backend}, {row['case']}: losses", row["losses"], at_most=1e-8)
            session.check(f"{count} over {backend}, {row['case']}: gradients", row["gradients"], at_most=1e-6)
    if not session.dry:
        try:
            _group(session, "nccl", 2)
        except RuntimeError as error:
            session.note(what="2 over NCCL on one device", refused=str(error).strip().splitlines()[-1][-160:])
        else:
            session.note(what="2 over NCCL on one device", refused="no")


def _group(session: Session, backend: str, count: int) -> list[dict]:
    """The rows that the first of `count` processes of `tests.gpu.processes` prints; RuntimeError where one fails."""
    store = Path(session.folder, f"store-{backend}-{count}")
    store.unlink(missing_ok=True)
    common = {**os.environ, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.processes", backend, session.device.type, str(store)],
            cwd=CHECKOUT,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        ended = [
            process.communicate(timeout=max(1.0, min(session.size(60.0, 900.0), session.left()))) for process in started
        ]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, ended, strict=True):
        if process.returncode:
            raise RuntimeError(errors.strip()[-600:] or f"exit code {process.returncode}")
    return [json.loads(line) for line in ended[0][0].splitlines() if line.startswith("{")]


def replayed(session: Session) -> None:
    """Compiled steps that replay CUDA graphs against plain ones: losses of each, and the weights after them."""
    losses, weights = [], []
    for backend in (None, session.size("inductor", "eager")):
        torch._dynamo.reset()
        step = OurStep(session, "ViT-B-32", "eos", PYRAMID, session.size(32, 4), compiled=backend, graphs=bool(backend))
        losses.append(torch.stack([step().clone() for _ in range(session.size(6, 3))]))
        weights.append(torch.cat([parameter.detach().flatten() for parameter in step.objective.parameters()]))
    # AdamW's first steps go by the signs of gradients, and those of nothing but rounding have either.
    session.check("losses of the steps", apart(losses[1], losses[0]), at_most=2e-2)
    session.check("weights after them, cosine", F.cosine_similarity(*weights, dim=0).item(), at_least=0.999)


def checkpointing_memory(session: Session) -> None:
    """Gradient checkpointing: the same gradients for less memory, of a tower of its real size."""
    if session.dry:
        raise Skipped("memory is measured on a GPU; values are checked by the golden vectors in training")
    from tests.gpu.measure import peak

    peaks, values = [], []
    for checkpointing in (False, True):
        step = OurStep(session, "ViT-B-32", "eos", PYRAMID, 64)
        if checkpointing:
            step.objective.model.activation_checkpointing_enable()
        with peak(session) as taken:
            values.append(step())
        peaks.append(taken[0])
    session.note(what="peak GB of a step of 64 pairs", plain=peaks[0], checkpointing=peaks[1])
    session.check("loss of the first step", apart(values[1], values[0]), at_most=1e-3)
    session.check("peak as a share of the plain one", peaks[1] / peaks[0], at_most=0.8)


PARTS = (
    Part("right: tests marked gpu", 60, gpu_tests),
    Part("right: loss against the dense form", 15, loss),
    Part("right: gradient caching", 15, caching),
    Part("right: CUDA graphs", 60, replayed),
    Part("right: checkpointing", 20, checkpointing_memory),
    Part("right: average of weights", 5, average),
    Part("right: fp16 scaler", 15, scaler),
    Part("right: waits of a step", 20, waiting),
    Part("right: processes", 60, processes),
)
