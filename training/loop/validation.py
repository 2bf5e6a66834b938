"""Retrieval on a small fixed set while training, for each level pair; the same numbers on any number of processes."""

from collections.abc import Mapping, Sequence

import torch

from pyramidclip_hf.image_processing_pyramidclip import MAX_IMAGE_PIXELS
from pyramidclip_hf.levels_pyramidclip import TERMS
from pyramidclip_hf.modeling_pyramidclip import PyramidCLIPModel
from pyramidclip_hf.processing_pyramidclip import PyramidCLIPProcessor
from training.data.records import BadSample, Sample, best_objects, has_level
from training.data.samples import ShardSamples, open_picture
from training.evaluation.embedding import embed_levels, levels_of_pairs
from training.evaluation.retrieval import level_metrics
from training.loop.distributed import broadcast_buffers
from training.loop.terms.tokens import SUFFIX, TokenPair
from training.loop.token_scoring import TokenScoring, pairs_of_heads

# What any dual encoder can be asked, whatever it was trained on.
ALWAYS = ("global_caption",)
KEPT_METRICS = ("R@1", "R@5", "R@10", "mean_rank")


class ValidationSet:
    """The first samples of a data set, read and decoded once, held in memory, encoded without augmentation.

    One that cannot be read is left out for the whole run: an evaluation on the way must not end what it looks at.

    Args:
        data: Names it, see `training.data.sources`.
        max_samples: How many from its beginning.
        pairs: Names of the level pairs to evaluate, beside `ALWAYS`; those of which fewer than two samples have both
            levels are left out.
        processor: Of the model.
        max_regions: Objects used of each sample, as in training.
        drop_repeated_tags: As in training.
        allow_unfinished: See `open_data_set`.
        max_image_pixels: As in training.
        token_heads: Where tokens alone were trained: these are scored, and no embeddings.

    Attributes:
        bad: For each sample that was left out, what is wrong with it.

    Raises:
        ValueError: See `ShardSamples`; or no sample can be read.
    """

    def __init__(
        self,
        data: str,
        max_samples: int,
        pairs: Sequence[str],
        processor: PyramidCLIPProcessor,
        max_regions: int,
        drop_repeated_tags: bool = False,
        allow_unfinished: bool | None = None,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        token_heads: Sequence[TokenPair] = (),
    ):
        self.token_heads = tuple(token_heads)
        wanted = pairs_of_heads(token_heads) if token_heads else tuple(dict.fromkeys((*ALWAYS, *pairs)))
        samples = ShardSamples(data, max_samples, allow_unfinished, levels_of_pairs(wanted))
        self.samples: list[Sample] = []
        self.bad: list[str] = []
        for number in range(len(samples)):
            try:
                sample = samples.read(number)
                open_picture(sample.image, f"{sample.key} of {data}", max_image_pixels)
            except ValueError as error:
                # Its cause says what it is; the rest is advice for evaluations that leave nothing out.
                self.bad.append(str(error.__cause__ if isinstance(error.__cause__, BadSample) else error))
            else:
                self.samples.append(best_objects(sample, max_regions, drop_repeated_tags))
        if not self.samples:
            raise ValueError(f"validation_data {data}: none of {len(samples)} samples can be read; {self.bad[0]}")
        self.processor, self.max_image_pixels = processor, max_image_pixels
        self.pairs = tuple(
            name
            for name in wanted
            if sum(all(has_level(sample, level) for level in TERMS[name]) for sample in self.samples) >= 2
        )

    def metrics(self, model: PyramidCLIPModel, autocast_dtype: torch.dtype | None = None) -> dict[str, float]:
        """`validation/PAIR/METRIC` -> value, see `retrieval_metrics`; all processes call it together.

        `validation/bad` is how many samples were left out, where there are such.

        BatchNorm's running statistics are first made those of process 0, which are what a checkpoint holds.

        Args:
            model: Comes back in evaluation mode.
            autocast_dtype: bfloat16 or float16 for the encoders, None for fp32.
        """
        bad = {"validation/bad": float(len(self.bad))} if self.bad else {}
        if not self.pairs:
            return bad
        broadcast_buffers(model)
        device_type = model.logit_scale.device.type
        with torch.autocast(device_type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
            results = self._by_tokens(model) if self.token_heads else self._by_embeddings(model)
        return bad | {
            f"validation/{name}/{metric}": value
            for name, values in results.items()
            for metric, value in values.items()
            if metric.endswith(KEPT_METRICS)
        }

    def _by_embeddings(self, model: PyramidCLIPModel) -> Mapping[str, Mapping[str, float | int]]:
        found = embed_levels(
            model,
            self.processor,
            self.samples,
            levels_of_pairs(self.pairs),
            max_regions=None,
            max_image_pixels=self.max_image_pixels,
        )
        return level_metrics(found.embeds, self.pairs, found.present, owners=found.owners)

    def _by_tokens(self, model: PyramidCLIPModel) -> Mapping[str, Mapping[str, float | int]]:
        scoring = TokenScoring(model, self.processor, self.token_heads)
        found = {pair: scoring.pair_metrics(self.samples, pair, self.max_image_pixels) for pair in self.pairs}
        return {f"{pair}{SUFFIX}": metrics for pair, metrics in found.items()}
