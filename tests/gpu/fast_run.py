"""Fast: the whole command from JPEG shards, with all cores for the loader."""

import json
import os
import time
from typing import Any

from tests.gpu.pictures import shards
from tests.gpu.right_commands import metrics_of, pretraining_words
from tests.gpu.session import Part, Session

STEPS = {"ViT-B-16": (128, 60), "ViT-B-32": (256, 60)}


def run(session: Session) -> None:
    """Pairs a second, the share of waiting for data, and the seconds to the first step and after the last."""
    data = shards(session, "large", session.size(8192, 32))
    for name, (pairs, steps) in session.size(STEPS, {"RN50": (8, 4)}).items():
        settings: dict[str, Any] = {
            "train_data": data,
            "dataloader_workers": session.size((os.cpu_count() or 2) - 1, 1),
        }
        if not session.dry:
            settings |= {"model": name, "model_config": json.dumps({"text_config": {"pooling": "max"}})}
            settings |= {"global_batch_size": pairs, "steps": steps}
        else:
            settings |= {"steps": steps}
        folder = session.folder / f"run-{name}"
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


PARTS = (Part("fast: a run from shards", 90, run),)
