"""A training step against the straightforward one: `python -m tests.bench --rows training`.

Ours is what `training.pretrain` runs: one forward of `ContrastiveObjective`, the closed-form loss, clipping, AdamW.
The straightforward step takes the plain form of `tests.plain_forms`, encodes each of the six levels in a forward of its
own, texts padded to 77 tokens, builds six dense similarity and target matrices, and takes torch's default AdamW. Both
have the same weights and data, and their losses are compared before they are timed.
"""

import torch
import torch.nn.functional as F

from pyramidclip_hf import PyramidCLIPConfig, PyramidCLIPModel
from pyramidclip_hf.levels_pyramidclip import DEFAULT_LOSS_WEIGHTS, LEVELS
from tests.bench.paired import Comparison, compare
from tests.dense_loss import dense_loss
from tests.plain_forms import DualEncoder, plain_form
from training.loop.objective import ContrastiveObjective
from training.loop.optim import build_optimizer

TOKENS = {"tag_input_ids": 10, "input_ids": 16, "summary_input_ids": 30}
SMOOTHING, LEARNING_RATE, WEIGHT_DECAY = 0.2, 1e-5, 0.2


def training_batch(config: PyramidCLIPConfig, pairs: int, regions: int = 10) -> dict[str, torch.Tensor]:
    """Pictures and regions of noise; texts of 10, 16 and 30 tokens, padded as the collator of the pooling pads them:
    to 77 under "max", to the longest of each level under "eos"."""
    side, text = config.vision_config.image_size, config.text_config
    batch = {name: torch.randn(pairs, 3, side, side) for name in ("pixel_values", "local_pixel_values")}
    batch["roi_features"] = torch.randn(pairs, regions, config.vision_config.roi_feature_size + 4)
    batch["roi_mask"] = torch.ones(pairs, regions, dtype=torch.bool)
    for name, tokens in TOKENS.items():
        ids = torch.zeros(pairs, 77 if text.pooling == "max" else tokens, dtype=torch.int64)
        ids[:, 1 : tokens - 1] = torch.randint(1000, 2000, (pairs, tokens - 2))
        ids[:, 0], ids[:, tokens - 1] = text.bos_token_id, text.eos_token_id
        batch[name] = ids
    return batch


def padded(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same texts in 77 tokens."""
    return batch | {name: F.pad(batch[name], (0, 77 - batch[name].shape[1])) for name in TOKENS}


class OurStep:
    """One optimizer step as `training.pretrain` does it."""

    def __init__(self, model: PyramidCLIPModel, batch: dict[str, torch.Tensor]):
        self.objective, self.batch = ContrastiveObjective(model, DEFAULT_LOSS_WEIGHTS, SMOOTHING), batch
        self.optimizer = build_optimizer(self.objective, LEARNING_RATE, WEIGHT_DECAY, (0.9, 0.98), 1e-6)

    def __call__(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        losses = self.objective(self.batch)
        losses.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.objective.parameters(), 1.0)
        self.optimizer.step()
        return losses.loss.detach()


class StraightforwardStep:
    """The same step, written down as it is told."""

    def __init__(self, model: DualEncoder, batch: dict[str, torch.Tensor]):
        self.model, self.batch = model.train(), padded(batch)
        self.model.vision_model.embeddings.patch_embedding.requires_grad_(False)
        pairs = len(batch["input_ids"])
        self.present = {level: torch.ones(pairs, dtype=torch.bool) for level in LEVELS}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, LEARNING_RATE, (0.9, 0.98), 1e-6, WEIGHT_DECAY)

    def __call__(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        embeds = {
            "global": self.model.encode_image(self.batch["pixel_values"]),
            "local": self.model.encode_image(self.batch["local_pixel_values"]),
            "roi": self.model.encode_rois(self.batch["roi_features"], self.batch["roi_mask"]),
            "summary": self.model.encode_text(self.batch["summary_input_ids"]),
            "caption": self.model.encode_text(self.batch["input_ids"]),
            "tags": self.model.encode_text(self.batch["tag_input_ids"]),
        }
        units = {level: F.normalize(value, dim=-1) for level, value in embeds.items()}
        loss = dense_loss(units, self.model.logit_scale.exp(), DEFAULT_LOSS_WEIGHTS, SMOOTHING, self.present)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()


def training_step(pooling: str, rounds: int, pairs: int = 8) -> tuple[str, Comparison, int]:
    """(name of the row, times, pairs of a step) for ViT-B-32 in fp32."""
    config = PyramidCLIPConfig.from_architecture("ViT-B-32")
    config.text_config.pooling = pooling
    torch.manual_seed(0)
    ours = PyramidCLIPModel(config)
    theirs = plain_form(ours)
    batch = training_batch(config, pairs)
    our_step, their_step = OurStep(ours, batch), StraightforwardStep(theirs, batch)
    torch.testing.assert_close(our_step(), their_step(), rtol=1e-4, atol=1e-4)  # both do the same work
    return (
        f'training step, ViT-B-32, "{pooling}", against six 77-token forwards',
        compare(our_step, their_step, rounds),
        pairs,
    )
