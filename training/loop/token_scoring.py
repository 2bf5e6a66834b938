"""Pictures and texts compared by their tokens, as FILIP is evaluated: retrieval and zero-shot, in blocks.

A token term trains projections that no saved model has; they lie beside it in `heads.safetensors`. A picture's score
for a text is the mean over its tokens of the most similar one of the text, and a text's for a picture likewise, so the
two directions of retrieval have scores of their own. A class's score is the mean of the picture's for its prompts.
Similarities are computed block by block; the tokens of all pictures and texts are held, and nothing larger.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pyramidclip_hf.configuration_pyramidclip import PyramidCLIPConfig
from pyramidclip_hf.image_processing_pyramidclip import MAX_IMAGE_PIXELS
from pyramidclip_hf.levels_pyramidclip import TERMS
from pyramidclip_hf.modeling_pyramidclip import PyramidCLIPModel
from pyramidclip_hf.processing_pyramidclip import PyramidCLIPProcessor
from pyramidclip_hf.zero_shot import IMAGENET_TEMPLATES
from training.data.inputs import any_level
from training.data.labelled import LabelledPictures
from training.data.records import Sample, best_objects, level_text
from training.evaluation.arguments import EvaluationArguments
from training.evaluation.classification import distinct_classes
from training.evaluation.embedding import Inputs, map_batches, seen_inputs
from training.evaluation.retrieval import counts_of_scores, metrics_of_counts
from training.loop.terms.encoding import encode
from training.loop.terms.term import Term, Wanted
from training.loop.terms.tokens import SUFFIX, TOKEN_PAIRS, TokenPair, token_scores

HEADS_FILE = "heads.safetensors"
# What a run sees in place of a level: its heads serve that level too.
_SEEN_AS = {"view1": "global", "view2": "global", "caption_aug": "caption"}
# Texts of one forward pass.
_TEXTS_AT_ONCE = 256
Metrics: TypeAlias = Mapping[str, float | int]


def token_pairs(terms: Iterable[Term]) -> list[TokenPair]:
    """Those of the terms that compare tokens."""
    return [term for term in terms if isinstance(term, TokenPair)]


def pairs_of_heads(heads: Iterable[TokenPair]) -> tuple[str, ...]:
    """The level pairs that heads can score, each once."""
    pairs = dict.fromkeys(
        f"{_SEEN_AS.get(head.image, head.image)}_{_SEEN_AS.get(head.text, head.text)}" for head in heads
    )
    return tuple(pair for pair in pairs if pair in TERMS)


def save_token_heads(folder: Path, heads: Sequence[TokenPair]) -> None:
    """Writes `HEADS_FILE` into the folder of a model, where there are heads."""
    found = {f"{head.name}.{name}": tensor for head in heads for name, tensor in head.state_dict().items()}
    if found:
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / HEADS_FILE)


def load_token_heads(folder: Path, config: PyramidCLIPConfig, called: str) -> list[TokenPair]:
    """The heads that `save_token_heads` wrote beside a model.

    Raises:
        ValueError: There are none, or they are damaged or of another model; `called` says what was asked for.
    """
    path = folder / HEADS_FILE
    if not path.is_file():
        trained = ", ".join(config.further_loss_terms) or "none"
        raise ValueError(
            f"{called}: --scoring tokens needs the {HEADS_FILE} that a run with a token term (objective: "
            f"global_caption{SUFFIX}) writes into final/, and there is none; further terms of its training: {trained}. "
            "Leave --scoring out to compare embeddings"
        )
    try:
        tensors = load_file(path)
        heads = []
        for name in dict.fromkeys(key.partition(".")[0] for key in tensors):
            if name not in TOKEN_PAIRS:
                raise ValueError(f"expected heads of terms such as global_caption{SUFFIX}, got {name}")
            own = {key.partition(".")[2]: value for key, value in tensors.items() if key.partition(".")[0] == name}
            head = TokenPair(name, 1.0, {"width": len(own["image_projection.weight"])}, config)
            head.load_state_dict(own)
            heads.append(head)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: cannot be read as the heads of this model: {error}") from error
    return heads


class TokenRows(NamedTuple):
    """Unit vectors of the tokens of pictures or texts.

    Attributes:
        vectors: (N, L, d) float32.
        mask: (N, L) bool, the real ones.
    """

    vectors: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def padded(cls, rows: Sequence[np.ndarray], device: torch.device) -> "TokenRows":
        """Of rows (l, d) of any lengths, on a device."""
        lengths = torch.tensor([len(row) for row in rows])
        vectors = torch.zeros(len(rows), int(lengths.max()), rows[0].shape[1])
        for place, row in enumerate(rows):
            vectors[place, : len(row)] = torch.from_numpy(row)
        mask = torch.arange(vectors.shape[1]) < lengths[:, None]
        return cls(vectors.to(device), mask.to(device))

    def part(self, which: slice) -> "TokenRows":
        """Some of them."""
        return TokenRows(self.vectors[which], self.mask[which])


class TokenScoring:
    """By the most similar tokens; a `training.evaluation.tasks.Scoring`.

    Args:
        model: The dual encoder.
        processor: Its processor.
        heads: Trained with it.
    """

    name = SUFFIX

    def __init__(self, model: PyramidCLIPModel, processor: PyramidCLIPProcessor, heads: Sequence[TokenPair]):
        self.model, self.processor, self.heads = model, processor, heads
        # Some devices have no float64.
        self.device = torch.device("cpu") if model.device.type == "mps" else model.device

    @classmethod
    def of_folder(
        cls, folder: Path, model: PyramidCLIPModel, processor: PyramidCLIPProcessor, called: str
    ) -> "TokenScoring":
        """With the heads that lie beside a saved model; ValueError as `load_token_heads`."""
        heads = load_token_heads(folder, model.config, called)
        return cls(model, processor, [head.to(model.device, model.dtype).eval() for head in heads])

    def head_for(self, pair: str) -> TokenPair:
        """The heads that score a level pair; ValueError where none do."""
        by_name = {head.name: head for head in self.heads}
        if f"{pair}{SUFFIX}" in by_name:
            return by_name[f"{pair}{SUFFIX}"]
        for head in self.heads:
            if pair in pairs_of_heads([head]):
                return head
        raise ValueError(
            f"--levels {pair}: this model has no token heads for it; it has those for "
            f"{', '.join(pairs_of_heads(self.heads)) or 'none that evaluation reads'}"
        )

    def retrieval(self, samples: Sequence[Sample], args: EvaluationArguments) -> dict[str, Metrics]:
        """Pair of `args.levels` -> its metrics, as those of embeddings are named."""
        given = (args.max_image_pixels, args.batch_size, args.local_view_area, args.chunk_size)
        cut = (args.max_regions, args.drop_repeated_tags)
        return {pair: self.pair_metrics(samples, pair, *given, cut) for pair in args.levels}

    @torch.inference_mode()
    def pair_metrics(
        self,
        samples: Sequence[Sample],
        pair: str,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        batch_size: int = 64,
        local_area: float = 1.0,
        chunk_size: int = 256,
        cut: tuple[int, bool] | None = None,
    ) -> Metrics:
        """Retrieval in both directions, see `retrieval_metrics`; samples without a text are left out.

        Scores are computed in float64 and rounded, so that equal ones stay equal whatever the block.

        Args:
            samples: N of them.
            pair: Of levels.
            max_image_pixels: See `open_picture`.
            batch_size: Samples encoded at a time by each process.
            local_area: See `embed_levels`.
            chunk_size: Queries scored at a time.
            cut: Number of regions and whether repeated tags are left out, see `best_objects`; None: that is done.

        Raises:
            ValueError: No heads for the pair, fewer than two samples with both levels, or a picture cannot be read.
        """
        head = self.head_for(pair)
        image, text = TERMS[pair]

        def prepare(numbers: range) -> tuple[list[list[str]], Inputs]:
            chosen = [samples[number] if cut is None else best_objects(samples[number], *cut) for number in numbers]
            texts = [_texts(sample, text) for sample in chosen]
            return texts, seen_inputs(self.processor, chosen, [image], local_area, max_image_pixels)

        def encode_both(prepared: tuple[list[list[str]], Inputs]) -> tuple[np.ndarray, list[list[np.ndarray]]]:
            texts, seen = prepared
            pictures = self._pictures(head, image, seen[any_level(image).input]).cpu().numpy()
            rows = iter(self._texts(head, [one for own in texts for one in own]))
            return pictures, [[next(rows) for _ in own] for own in texts]

        with _evaluating(self.model):
            batches = map_batches(encode_both, len(samples), batch_size, "tokens", False, prepare, self.model.device)
        pairs = [
            (picture, own) for pictures, texts in batches for picture, own in zip(pictures, texts, strict=True) if own
        ]
        if len(pairs) < 2:
            raise ValueError(f"{pair}: only {len(pairs)} samples have both levels; retrieval needs at least 2")
        images = TokenRows.padded([picture for picture, _ in pairs], self.device)
        words = TokenRows.padded([row for _, own in pairs for row in own], self.device)
        owner = torch.tensor([number for number, (_, own) in enumerate(pairs) for _ in own])
        ids = torch.arange(len(pairs))
        directions = {
            "image_to_text": counts_of_scores(lambda rows: _scores(images.part(rows), words), ids, owner, chunk_size),
            "text_to_image": counts_of_scores(lambda rows: _scores(words.part(rows), images), owner, ids, chunk_size),
        }
        return metrics_of_counts(directions) | {"images": len(ids), "texts": len(owner), "images_without_text": 0}

    @torch.inference_mode()
    def zero_shot(
        self, data: LabelledPictures, templates: Sequence[str] | None, args: EvaluationArguments
    ) -> torch.Tensor:
        """(N, C) float32: the mean over a class's prompts of a picture's scores; `templates` as `zero_shot_scores`."""
        head = self.head_for("global_caption")
        templates = IMAGENET_TEMPLATES if templates is None else templates
        names, columns = distinct_classes(data.class_names)

        def encode_classes(numbers: range) -> list[np.ndarray]:
            return self._texts(head, [line.replace("{}", names[number]) for number in numbers for line in templates])

        def pixels_of(numbers: range) -> torch.Tensor:
            read = [data.read(number, max_image_pixels=args.max_image_pixels) for number in numbers]
            return self.processor.image_processor(read, return_tensors="pt")["pixel_values"]

        def score(pixels: torch.Tensor) -> torch.Tensor:
            images = self._pictures(head, "global", pixels).to(self.device)
            everyone = images.new_ones(images.shape[:2], dtype=torch.bool)
            found = token_scores(images, everyone, prompts.vectors, prompts.mask)
            return found.view(len(found), len(names), len(templates)).double().mean(2).float().cpu()

        with _evaluating(self.model):
            rows = map_batches(encode_classes, len(names), 4, "class prompts")
            prompts = TokenRows.padded([row for own in rows for row in own], self.device)
            done = map_batches(
                score, len(data), args.batch_size, "pictures", prepare=pixels_of, device=self.model.device
            )
        return torch.cat(done)[:, columns]

    def _pictures(self, head: TokenPair, level: str, pixels: torch.Tensor) -> torch.Tensor:
        """(n, L, d) of pixels as the processor makes them."""
        wanted = Wanted(level, "tokens")
        pixels = pixels.to(self.model.device, self.model.dtype)
        return head.image_rows(encode(self.model, [wanted], {any_level(level).input: pixels})[wanted])

    def _texts(self, head: TokenPair, texts: Sequence[str]) -> list[np.ndarray]:
        """(l, d) of each text, real tokens alone."""
        wanted, found = Wanted("caption", "tokens"), []
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            ids = self.processor(text=list(texts[start : start + _TEXTS_AT_ONCE]), padding=True, return_tensors="pt")
            own = ids["input_ids"].to(self.model.device)
            rows, mask = head.text_rows(encode(self.model, [wanted], {any_level("caption").input: own})[wanted], own)
            found += [row[real].cpu().numpy() for row, real in zip(rows, mask, strict=True)]
        return found


def _texts(sample: Sample, level: str) -> list[str]:
    if level == "caption":
        return [text for text in sample.captions or (sample.caption,) if text]
    text = level_text(sample, level)
    return [text] if text else []


def _scores(queries: TokenRows, candidates: TokenRows) -> torch.Tensor:
    return token_scores(*queries, *candidates, dtype=torch.float64).cpu()


@contextmanager
def _evaluating(model: PyramidCLIPModel) -> Iterator[None]:
    """Inside, the model is in evaluation mode; afterwards in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
