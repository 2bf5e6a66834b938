"""Retrieval on a small fixed set while training, for each level pair; the same numbers on any number of processes."""

import io
from collections.abc import Iterator, Sequence

import torch
from PIL import Image
from torch import nn

from pyramidclip_hf.configuration_pyramidclip import TERMS
from pyramidclip_hf.loss_pyramidclip import LEVEL_INPUTS, LEVEL_MASKS
from training.distributed import broadcast_buffers, gather_rows, rank, world_size
from training.evaluation_data import ShardSamples
from training.records import Sample, tag_text
from training.retrieval import level_metrics

# What any dual encoder can be asked, whatever it was trained on.
ALWAYS = ("global_caption",)


class ValidationSet:
    """The first samples of a data set, without augmentation: the processor's own view serves as global and as local
    view.

    data: folder or shard, see `evaluation_data.shard_paths`. max_samples: how many from its beginning. pairs: names
    of the level pairs to evaluate; those of which fewer than two samples have both levels are left out. processor:
    `PyramidCLIPProcessor`. max_regions: regions read of each sample. batch_size: samples encoded at a time by each
    process.
    """

    def __init__(
        self, data: str, max_samples: int, pairs: Sequence[str], processor, max_regions: int, batch_size: int = 64
    ):
        self.samples = ShardSamples(data, max_samples)
        self.processor = processor
        self.max_regions = max_regions
        self.batch_size = batch_size
        self.pairs = tuple(dict.fromkeys((*ALWAYS, *pairs)))
        self.levels = tuple(level for level in LEVEL_INPUTS if any(level in TERMS[name] for name in self.pairs))

    @torch.no_grad()
    def metrics(self, model: nn.Module, autocast_dtype: torch.dtype | None = None) -> dict[str, float]:
        """`validation/PAIR/METRIC` -> value, see `retrieval_metrics`; all processes call it together and get the same.

        Puts the model into evaluation mode meanwhile and back afterwards. BatchNorm's running statistics are first
        made those of process 0, which are what a checkpoint holds.
        """
        broadcast_buffers(model)
        was_training = model.training
        model.eval()
        device = model.logit_scale.device
        with torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
            rows = [self._encode(model, samples, device) for samples in self._own_batches()]
        model.train(was_training)
        embeddings, present = self._in_order([row[0] for row in rows], [row[1] for row in rows])
        embeds = {level: embeddings[:, i] for i, level in enumerate(self.levels)}
        masks = {level: present[:, i] for i, level in enumerate(self.levels)}
        pairs = [name for name in self.pairs if int((masks[TERMS[name][0]] & masks[TERMS[name][1]]).sum()) >= 2]
        results = level_metrics(embeds, pairs, masks)
        keep = ("R@1", "R@5", "R@10", "mean_rank")
        return {
            f"validation/{name}/{metric}": value
            for name, values in results.items()
            for metric, value in values.items()
            if metric.endswith(keep)
        }

    def _own_batches(self) -> Iterator[list[Sample]]:
        """Sample i goes to process i mod P; the first ones again fill up the last round, and are cut off in
        `_in_order`.
        """
        rounds = -(-len(self.samples) // world_size())
        places = [(turn * world_size() + rank()) % len(self.samples) for turn in range(rounds)]
        for start in range(0, rounds, self.batch_size):
            yield [self.samples[place] for place in places[start : start + self.batch_size]]

    def _encode(self, model, samples, device):
        inputs = self.processor(**self._raw_inputs(samples), return_tensors="pt").to(device)
        size = len(samples)
        masks = {level: inputs[name].reshape(size, -1).any(1) for level, name in LEVEL_MASKS.items() if name in inputs}
        masks["caption"] = torch.tensor([sample.caption is not None for sample in samples])
        everyone = torch.ones(size, dtype=torch.bool)
        present = [masks.get(level, everyone) for level in self.levels]
        embeds = model.encode_levels(self.levels, **inputs)
        stacked = torch.stack([embeds[level].float() for level in self.levels], dim=1)
        return stacked, torch.stack([mask.to(device) for mask in present], dim=1)

    def _raw_inputs(self, samples):
        pictures = [Image.open(io.BytesIO(sample.image)) for sample in samples]
        raw = {
            "global": ("images", pictures),
            "local": ("local_images", pictures),
            "roi": ("regions", [self._regions(sample) for sample in samples]),
            "summary": ("summary", [sample.summary for sample in samples]),
            "caption": ("text", [sample.caption or "" for sample in samples]),
            "tags": ("tags", [tag_text(sample.tags) if sample.tags else None for sample in samples]),
        }
        return dict(raw[level] for level in self.levels)

    def _regions(self, sample):
        if sample.roi is None:
            return None
        return sample.roi[: self.max_regions], [region.box for region in sample.regions[: self.max_regions]]

    def _in_order(self, embeddings, present):
        """Rows of all processes in the order of the samples, each sample once."""
        in_order = []
        for part in (embeddings, present):
            by_process = gather_rows(torch.cat(part)).unflatten(0, (world_size(), -1))
            in_order.append(by_process.transpose(0, 1).flatten(0, 1)[: len(self.samples)])
        return in_order
