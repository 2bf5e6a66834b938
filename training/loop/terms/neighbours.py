"""The nearest neighbour of a text as its picture's second text, DeCLIP's (arXiv 2110.05208): `views_nn`.

Of each text of the batch, the most similar one among the texts of past steps is looked up; picture i is to choose the
neighbour of its own text among those of all. From pictures to texts only: neighbours are constants.

The past is one queue of all processes, in the order of the data's positions, so neither its content nor a run that
continues depends on how many processes there are. The published code keeps one for each process, in no checkpoint.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from pyramidclip_hf.configuration_pyramidclip import PyramidCLIPConfig
from training.data.inputs import inputs_of_kind
from training.loop.checkpoint import Stateful
from training.loop.distributed import gather_rows, rank, world_size
from training.loop.terms.term import (
    Encoded,
    Rows,
    Share,
    Step,
    Tensors,
    Term,
    Wanted,
    at_least,
    read_options,
    softened_choice,
    wide,
)

# Texts that every pair has.
TEXTS = ("caption", "caption_aug")
# Similarities held at once while neighbours are looked up.
_ENTRIES = 1 << 24


class TextQueue:
    """The last texts, the oldest overwritten first.

    Args:
        size: How many.
        width: Of a text's vector.

    Attributes:
        rows: (size, width), of which the first `filled` are there.
        pointer: Where the next one goes.
        filled: How many there are.
    """

    def __init__(self, size: int, width: int):
        self.rows = torch.zeros(size, width)
        self.pointer = self.filled = 0

    def push(self, texts: torch.Tensor) -> None:
        """Takes texts (m, width), m at most the size, in their order."""
        size = len(self.rows)
        if not self.filled:
            self.rows = texts.new_zeros(self.rows.shape)
        places = (self.pointer + torch.arange(len(texts), device=texts.device)) % size
        self.rows[places] = texts.detach()
        self.pointer = (self.pointer + len(texts)) % size
        self.filled = min(size, self.filled + len(texts))

    def nearest(self, texts: torch.Tensor) -> torch.Tensor:
        """(n, width): of each of `texts` (n, width) the most similar row; of equals the first. There must be one."""
        self.rows = self.rows.to(texts)  # a checkpoint's are on the host
        best = texts.new_full((len(texts),), float("-inf"))
        found = torch.zeros(len(texts), dtype=torch.int64, device=texts.device)
        step = max(1, _ENTRIES // len(texts))
        for start in range(0, self.filled, step):
            values, places = (texts @ self.rows[start : min(start + step, self.filled)].T).max(1)
            better = values > best
            found = torch.where(better, places + start, found)
            best = torch.where(better, values, best)
        return self.rows[found]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Content and place."""
        return {"rows": self.rows, "pointer": torch.tensor(self.pointer), "filled": torch.tensor(self.filled)}

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Continues; RuntimeError where the queue has another size."""
        if state_dict["rows"].shape != self.rows.shape:
            raise RuntimeError(f"a queue of {tuple(state_dict['rows'].shape)}, expected {tuple(self.rows.shape)}")
        self.rows = state_dict["rows"].clone()
        self.pointer, self.filled = int(state_dict["pointer"]), int(state_dict["filled"])


class NearestNeighbours(Term):
    """`views_nn`: the mean over each of the pictures with each of the texts.

    Args:
        name: Of the term.
        weight: In the objective.
        options: `size` of the queue, in texts; `images` and `texts`, the levels.
        config: Of the model.
    """

    uses_scale = True

    def __init__(self, name: str, weight: float, options: Mapping[str, Any], config: PyramidCLIPConfig):
        super().__init__()
        self.name, self.weight = name, weight
        self._options = read_options(name, options, size=65536, images=["view1", "view2"], texts=list(TEXTS))
        at_least(name, self._options, size=1)
        self.images, self.texts = self._options["images"], self._options["texts"]
        pictures = inputs_of_kind("picture", self.images)
        for option, known, told in (("images", pictures, "picture levels"), ("texts", TEXTS, f"some of {TEXTS}")):
            given = self._options[option]
            if not given or len(set(given)) < len(given) or not set(given) <= set(known):
                raise ValueError(f"objective: {name}: {option}: expected {told}, each once, got {given}")
        self.wanted = tuple(Wanted(level, "embedding") for level in (*self.images, *self.texts))
        self.queue = TextQueue(self._options["size"], config.projection_dim)
        self._seen: torch.Tensor | None = None

    @property
    def trained(self) -> tuple[Wanted, ...]:
        """The pictures: texts are looked up, and their neighbours are constants."""
        return tuple(one for one in self.wanted if one.level in self.images)

    def options(self) -> dict[str, Any]:
        """As given, defaults filled in."""
        return self._options

    @property
    def kept(self) -> Mapping[str, Stateful]:
        """The queue."""
        return {"queue": self.queue}

    def check_batch(self, global_batch_size: int) -> None:
        """Raises ValueError where the queue has no room for the texts of one step."""
        pushed = len(self.texts) * global_batch_size
        if pushed > len(self.queue.rows):
            raise ValueError(
                f"objective: {self.name}: size: a queue of {len(self.queue.rows)} texts has no room for those of one "
                f"step, {len(self.texts)} x {global_batch_size} = {pushed}; expected at least so many"
            )

    def loss_bytes(self, own: int, everyone: int, tokens: Mapping[str, int]) -> int:
        """The queue, neighbours of everyone, a block of the search, and logits of each combination."""
        combinations, width = len(self.images) * len(self.texts), self.queue.rows.shape[1]
        vectors = len(self.queue.rows) + 3 * len(self.texts) * everyone
        search = min(_ENTRIES, own * len(self.queue.rows))
        return 4 * (vectors * width + search + 3 * combinations * own * everyone)

    def rows(self, encoded: Encoded, batch: Tensors) -> dict[str, torch.Tensor]:
        """Unit vectors (n, levels, D)."""
        return {
            name: F.normalize(wide(torch.stack([encoded[Wanted(level, "embedding")] for level in levels], 1)), dim=-1)
            for name, levels in (("images", self.images), ("texts", self.texts))
        }

    def share(self, rows: Rows, step: Step) -> Share:
        """See the module. While nothing is in the queue the term is empty: 0, with zero gradients."""
        images, texts = rows["images"], rows["texts"].detach()
        number, total = len(texts), len(texts) * world_size()
        self._seen = in_order_of_positions(gather_rows(texts))
        if not self.queue.filled:
            return Share((images * 0).sum() + step.scale * 0, torch.tensor(0, device=images.device))
        neighbours = gather_rows(
            torch.stack([self.queue.nearest(texts[:, place]) for place in range(len(self.texts))], 1)
        )
        own = rank() * number + torch.arange(number, device=images.device)[:, None]
        losses = []
        for image in images.unbind(1):
            for columns in neighbours.unbind(1):
                logits = step.scale.to(image.dtype) * image @ columns.T
                log_sum_exp, positive = torch.logsumexp(logits, dim=1), logits.gather(1, own)[:, 0]
                losses.append(softened_choice(log_sum_exp, positive, logits.sum(1), total, step.smoothing))
        return Share(torch.stack(losses).mean(0).sum() / total, torch.tensor(total, device=images.device))

    def after_step(self, stepped: bool) -> None:
        """The batch's texts go into the queue, unless fp16's scaler skipped the step.

        The changed captions before the captions, as in the published code.
        """
        if stepped and self._seen is not None:
            for place in reversed(range(len(self.texts))):
                self.queue.push(self._seen[:, place])
        self._seen = None


def in_order_of_positions(gathered: torch.Tensor) -> torch.Tensor:
    """Rows in the order of the ranks (P n, ...) in that of the data: position p belongs to process p mod P."""
    return gathered.unflatten(0, (world_size(), -1)).transpose(0, 1).flatten(0, 1)
