"""Training data made up on the spot: what the loader gives, without files. Order and content depend on (seed, epoch,
position) only.
"""

import torch

from tests.training.tiny import TEXT, VIT, tiny_batch
from training.loop.distributed import rank, world_size

MODEL_CONFIG = {"text_config": {**TEXT, "pooling": "eos"}, "vision_config": VIT, "projection_dim": 8}


class MemoryReader:
    """`samples` synthetic samples; every process gets each world_size-th of a global batch."""

    def __init__(self, args, samples=40, missing=True, image_size=16):
        self.args, self.samples = args, samples
        self.fingerprint, self.description = f"memory-{samples}", [{"name": "memory", "samples": samples}]
        self.data = tiny_batch(samples, image_size, dtype=torch.float32, missing=missing)
        self.served = 0

    def batches(self, epoch, position):
        order = torch.randperm(self.samples, generator=torch.Generator().manual_seed(self.args.seed * 1000 + epoch))
        size = self.args.global_batch_size
        for start in range(position, self.samples - size + 1, size):
            if self.args.overfit_batches and start >= self.args.overfit_batches * size:
                return
            rows = order[start : start + size][rank() :: world_size()]
            self.served += len(rows)
            yield {name: value[rows] for name, value in self.data.items()} | {"sample_keys": [f"{r:06d}" for r in rows]}

    def state(self):
        return {"served": self.served}

    def load_state(self, state):
        self.served = state.get("served", 0)

    def metrics(self):
        return {}

    def report(self):
        return [f"served {self.served}"]

    def close(self):
        pass
