"""What a row costs: processor seconds of a training step, memory, and of embedding and comparing afterwards.

One process measures one row, as time by the clock says little on a machine that others use. Processor time is of this
process with all its threads, reading and decoding included where the settings have no workers.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any, cast

import torch

from pyramidclip_hf.modeling_pyramidclip import PyramidCLIPModel
from pyramidclip_hf.processing_pyramidclip import PyramidCLIPProcessor
from training.data.samples import ShardSamples, open_picture
from training.loop.objective import ContrastiveObjective
from training.loop.processes import start_accelerator
from training.loop.run import MakeTask, advance, optimizer_step, start, timed_batches
from training.loop.terms.encoding import encode
from training.loop.terms.term import Wanted
from training.loop.terms.tokens import TokenPair, token_scores
from training.loop.token_scoring import token_pairs
from training.settings.pretraining import PretrainingArguments


def peak_bytes() -> int | None:
    """The largest resident size of this process so far; None where the system does not say it.

    Not `getrusage`'s, which begins at what the parent held.
    """
    path = Path("/proc/self/status")
    lines = path.read_text(encoding="ascii").splitlines() if path.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)


def measure(
    settings: PretrainingArguments, make_task: MakeTask[PretrainingArguments], scenes: Path, warm: int, pairs: int
) -> dict[str, Any]:
    """What a row costs, in this process.

    Args:
        settings: Of a run; `max_steps` steps are made, in `output_dir`.
        make_task: Makes its task.
        scenes: Held-out scenes.
        warm: So many of the steps count for nothing.
        pairs: Held-out scenes that are embedded and compared.

    Returns:
        "steps": processor seconds of each step; "start_seconds" of what came before the first; "megabytes": peak of the
        process above what it took before the model was built, and None where it is not known; "load" of the machine
        before; milliseconds for a picture and for a text, microseconds for a pair of them, of embeddings and, with
        "token_" in front, of tokens where the row has heads for them.
    """
    load, before = os.getloadavg()[0], peak_bytes()
    folder = Path(settings.output_dir)
    run = start(settings, make_task, folder, start_accelerator(settings, folder))
    began, steps = time.process_time(), list[float]()
    run.task.objective.train()
    with torch.random.fork_rng(devices=[]):
        while len(steps) < run.task.plan.total_steps:
            run.task.begin_epoch(run.progress.epoch)
            at = time.process_time()
            for _, batch in timed_batches(run, Event()):
                batch.pop("sample_keys")
                optimizer_step(run, batch, run.task.learning_rate(run.progress.step))
                advance(run)
                now = time.process_time()
                steps.append(now - at)
                at = now
                if len(steps) == run.task.plan.total_steps:
                    break
    after = peak_bytes()
    run.task.reader.close()
    objective = cast(ContrastiveObjective, run.task.objective).eval()
    found = using(objective.model, run.task.processor, token_pairs(objective.further), scenes, pairs)
    megabytes = None if before is None or after is None else (after - before) / 1e6
    return {"steps": steps[warm:], "start_seconds": began, "megabytes": megabytes, "load": load, **found}


@torch.inference_mode()
def using(
    model: PyramidCLIPModel, processor: PyramidCLIPProcessor, heads: list[TokenPair], scenes: Path, pairs: int
) -> dict[str, float]:
    """The part of `measure` about a model that is trained: of pictures that are decoded, and texts that are ids."""
    samples = list(ShardSamples(str(scenes), pairs))
    pictures = [open_picture(sample.image, sample.key) for sample in samples]
    pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
    ids = processor(text=[sample.caption or "" for sample in samples], padding=True, return_tensors="pt")["input_ids"]
    picture, images = _timed(lambda: model.encode_image(pixels))
    text, texts = _timed(lambda: model.encode_text(ids))
    pair, _ = _timed(lambda: images @ texts.T)
    count = len(samples)
    found = {
        "picture_milliseconds": 1e3 * picture / count,
        "text_milliseconds": 1e3 * text / count,
        "pair_microseconds": 1e6 * pair / count**2,
    }
    return found | (using_tokens(model, heads[0], pixels, ids) if heads else {})


def using_tokens(model: PyramidCLIPModel, head: TokenPair, pixels: torch.Tensor, ids: torch.Tensor) -> dict[str, float]:
    """The same of tokens."""
    seen, words = Wanted("global", "tokens"), Wanted("caption", "tokens")
    picture, rows = _timed(lambda: head.image_rows(encode(model, [seen], {"pixel_values": pixels})[seen]))
    text, (own, mask) = _timed(lambda: head.text_rows(encode(model, [words], {"input_ids": ids})[words], ids))
    everyone = rows.new_ones(rows.shape[:2], dtype=torch.bool)
    there, _ = _timed(lambda: token_scores(rows, everyone, own, mask))
    back, _ = _timed(lambda: token_scores(own, mask, rows, everyone))
    return {
        "token_picture_milliseconds": 1e3 * picture / len(pixels),
        "token_text_milliseconds": 1e3 * text / len(ids),
        "token_pair_microseconds": 1e6 * (there + back) / (len(pixels) * len(ids)),
    }


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds of the better of two calls, and what it returns."""
    seconds = []
    for _ in range(2):
        began = time.process_time()
        found = call()
        seconds.append(time.process_time() - began)
    return min(seconds), found
