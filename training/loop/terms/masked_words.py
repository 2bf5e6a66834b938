"""Masked words, DeCLIP's term on captions (arXiv 2110.05208): `caption_mlm`.

Some words of a caption are masked in the loader (`training.data.words`) and guessed from the text tower's hidden
states, which are causal: from the words before. The mean over the masked words of all processes. A learned vector
stands for a masked word, so the vocabulary, which is saved, has no entry for it.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from pyramidclip_hf.configuration_pyramidclip import PyramidCLIPConfig
from training.data.inputs import MASKED_LABELS, MASKED_POSITIONS, NO_WORD
from training.loop.distributed import sum_over_processes
from training.loop.terms.term import Encoded, Rows, Share, Step, Tensors, Term, Wanted, at_least, read_options, wide

# Logits held at once: of so many words that their number times the vocabulary is about this.
_ENTRIES = 1 << 26
# Besides begin, end and pad; a masked word may be replaced by any of the others.
LEAST_WORDS = 2


class MaskedWords(Term):
    """`caption_mlm`.

    Args:
        name: Of the term.
        weight: In the objective.
        options: `share` of a caption's tokens that are masked; `caption`: "clean", or "masked": the run's own
            image-text terms read the masked caption in place of it, as the published code does.
        config: Of the model.

    Raises:
        ValueError: An option is wrong, or the vocabulary has no words.
    """

    reads = (MASKED_POSITIONS, MASKED_LABELS)

    def __init__(self, name: str, weight: float, options: Mapping[str, Any], config: PyramidCLIPConfig):
        super().__init__()
        self.name, self.weight = name, weight
        self._options = read_options(name, options, share=0.15, caption="clean")
        at_least(name, self._options, share=0.0)
        if self._options["share"] >= 1:
            raise ValueError(f"objective: {name}: share: expected less than 1, got {self._options['share']}")
        if self._options["caption"] not in ("clean", "masked"):
            raise ValueError(f"objective: {name}: caption: expected clean or masked, got {self._options['caption']!r}")
        text = config.text_config
        words = text.vocab_size - len({text.bos_token_id, text.eos_token_id, text.pad_token_id} - {None})
        if words < LEAST_WORDS:
            raise ValueError(
                f"objective: {name}: a vocabulary of {text.vocab_size} ids has {words} beside begin, end and pad, "
                f"expected at least {LEAST_WORDS} to draw words from"
            )
        self.wanted = (Wanted("masked", "tokens"),)
        self.masked_word = nn.Parameter(torch.randn(text.hidden_size) * 0.02)
        self.head = nn.Linear(text.hidden_size, text.vocab_size)

    def options(self) -> dict[str, Any]:
        """As given, defaults filled in."""
        return self._options

    def word_for_masks(self) -> torch.Tensor:
        """The learned vector."""
        return self.masked_word

    def loss_bytes(self, own: int, everyone: int, tokens: Mapping[str, int]) -> int:
        """The logits of a block of words, their gradient and softmax."""
        words = max(1, round(own * tokens["masked"] * self._options["share"]))
        return 4 * 3 * min(_ENTRIES, words * self.head.out_features)

    def rows(self, encoded: Encoded, batch: Tensors) -> dict[str, torch.Tensor]:
        """The sum of each caption's cross-entropies (n,), so that chunks of captions need no logits of the others."""
        hidden, positions = encoded[self.wanted[0]], batch[MASKED_POSITIONS]
        at = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[2])).flatten(0, 1)
        labels = batch[MASKED_LABELS].flatten()
        step = max(1, _ENTRIES // self.head.out_features)
        parts = [
            checkpoint(self._losses, *part, use_reentrant=False, preserve_rng_state=False)
            for part in zip(at.split(step), labels.split(step), strict=True)
        ]
        return {"sums": torch.cat(parts).unflatten(0, positions.shape).sum(1)}

    def _losses(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with self.autocast(hidden.device):
            logits = self.head(hidden)
        return F.cross_entropy(wide(logits), labels, ignore_index=NO_WORD, reduction="none")

    def share(self, rows: Rows, step: Step) -> Share:
        """The mean over all masked words; where there is none, 0 with zero gradients. No negatives, no smoothing."""
        count = sum_over_processes(step.batch[MASKED_LABELS].ne(NO_WORD).sum())
        return Share(rows["sums"].sum() / count.clamp(min=1), self.head.out_features * (count > 0))
