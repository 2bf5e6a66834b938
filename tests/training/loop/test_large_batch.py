"""A global batch of 4096 pairs on one small machine: six levels, a loss over all of them, chunks of 256 in memory."""

import json
import math
import resource
import subprocess
import sys

import pytest

from tests.training.prepare.small_data import FEATURES, write_shards
from training.loop.tracking import read_metrics
from training.scale import memory_per_gpu
from training.settings.pretraining import PretrainingArguments

BATCH, CHUNK = 4096, 256
MODEL = {
    "projection_dim": 128,
    "vision_config": {
        "image_size": 64,
        "patch_size": 8,
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_leff_layers": 3,
        "roi_feature_size": FEATURES,
    },
    "text_config": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "pooling": "eos"},
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_batch_of_4096_trains_in_the_memory_of_a_chunk(tmp_path, checkout):
    data = write_shards(tmp_path / "data", range(BATCH), shard_size=512)
    words = ["--train-data", data, "--output-dir", tmp_path / "run", "--model", "ViT-B-32"]
    words += ["--model-config", json.dumps(MODEL), "--global-batch-size", BATCH, "--per-device-chunk-size", CHUNK]
    words += ["--max-steps", 1, "--precision", "fp32", "--log-every-steps", 1, "--dataloader-workers", 0]
    words += ["--trackers", "none"]
    ran = subprocess.run(
        [sys.executable, "-m", "training.pretrain", *map(str, words)], cwd=checkout, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss/local_caption" in line]
    assert len(lines) == 1
    assert lines[0]["chance/local_caption"] == pytest.approx(math.log(BATCH))
    assert all(math.isfinite(line["loss/total"]) for line in lines)
    gigabytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    print(f"peak of the whole process: {gigabytes:.2f} GB")
    settings = {
        "model": "ViT-B-32",
        "model_config": MODEL,
        "global_batch_size": BATCH,
        "precision": "fp32",
        "max_steps": 1,
    }
    at_once = memory_per_gpu(PretrainingArguments(**settings), 1).activations / 1e9
    print(f"activations of the whole batch at once, worked out: {at_once:.1f} GB")
    assert gigabytes < at_once / 8
