"""Retrieval on a small fixed set while training, for each level pair; the same numbers on any number of processes."""

from collections.abc import Sequence

import torch

from pyramidclip_hf.configuration_pyramidclip import TERMS
from pyramidclip_hf.modeling_pyramidclip import PyramidCLIPModel
from pyramidclip_hf.processing_pyramidclip import PyramidCLIPProcessor
from training.data.records import best_objects, has_level
from training.data.samples import ShardSamples
from training.evaluation.embedding import embed_levels, levels_of_pairs
from training.evaluation.retrieval import level_metrics
from training.loop.distributed import broadcast_buffers

# What any dual encoder can be asked, whatever it was trained on.
ALWAYS = ("global_caption",)
KEPT_METRICS = ("R@1", "R@5", "R@10", "mean_rank")


class ValidationSet:
    """The first samples of a data set, held in memory and encoded without augmentation.

    Args:
        data: Names it, see `training.data.sources`.
        max_samples: How many from its beginning.
        pairs: Names of the level pairs to evaluate, beside `ALWAYS`; those of which fewer than two samples have both
            levels are left out.
        processor: Of the model.
        max_regions: Objects used of each sample, as in training.
        drop_repeated_tags: As in training.
        allow_unfinished: See `ShardSamples`.
    """

    def __init__(
        self,
        data: str,
        max_samples: int,
        pairs: Sequence[str],
        processor: PyramidCLIPProcessor,
        max_regions: int,
        drop_repeated_tags: bool = False,
        allow_unfinished: bool = False,
    ):
        samples = ShardSamples(data, max_samples, allow_unfinished)
        self.samples = [best_objects(sample, max_regions, drop_repeated_tags) for sample in samples]
        self.processor = processor
        self.pairs = tuple(
            name
            for name in dict.fromkeys((*ALWAYS, *pairs))
            if sum(all(has_level(sample, level) for level in TERMS[name]) for sample in self.samples) >= 2
        )

    def metrics(self, model: PyramidCLIPModel, autocast_dtype: torch.dtype | None = None) -> dict[str, float]:
        """`validation/PAIR/METRIC` -> value, see `retrieval_metrics`; all processes call it together.

        BatchNorm's running statistics are first made those of process 0, which are what a checkpoint holds.

        Args:
            model: Comes back in evaluation mode.
            autocast_dtype: bfloat16 or float16 for the encoders, None for fp32.
        """
        if not self.pairs:
            return {}
        broadcast_buffers(model)
        device_type = model.logit_scale.device.type
        with torch.autocast(device_type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
            found = embed_levels(model, self.processor, self.samples, levels_of_pairs(self.pairs), max_regions=None)
        results = level_metrics(found.embeds, self.pairs, found.present, owners=found.owners)
        return {
            f"validation/{name}/{metric}": value
            for name, values in results.items()
            for metric, value in values.items()
            if metric.endswith(KEPT_METRICS)
        }
