"""What the towers give to terms: embeddings, pooled vectors and tokens of what is wanted, each level encoded once."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from pyramidclip_hf.levels_pyramidclip import LEVELS, levels_of_kind
from pyramidclip_hf.modeling_pyramidclip import PyramidCLIPModel
from training.data.inputs import MASKED_ID, any_level, in_table_order, inputs_of_kind
from training.loop.terms.term import Wanted


def levels_in(wanted: Collection[Wanted]) -> tuple[str, ...]:
    """The levels of what is wanted, the pyramid's first, in the order in which they are encoded."""
    return in_table_order({one.level for one in wanted})


def encode(
    model: PyramidCLIPModel,
    wanted: Collection[Wanted],
    inputs: Mapping[str, torch.Tensor],
    masked_word: torch.Tensor | None = None,
) -> dict[Wanted, torch.Tensor]:
    """Everything that is wanted of n pairs.

    The pyramid's levels that only an embedding is wanted of go the model's own way, together. Others are each a batch
    of BatchNorm of its own, after them; a ViT takes those of them together that no tokens are wanted of.

    Args:
        model: The dual encoder.
        wanted: What is wanted.
        inputs: The model's and the run's, normalised.
        masked_word: (W,), what stands for a masked word.
    """
    parts: dict[str, set[str]] = {}
    for level, part in wanted:
        parts.setdefault(level, set()).add(part)
    plain = [level for level in LEVELS if parts.get(level) == {"embedding"}]
    found = {}
    if plain:
        embeds = model.encode_levels(plain, **inputs)
        found = {Wanted(level, "embedding"): embeds[level] for level in plain}
    further = [level for level in levels_in(wanted) if level not in plain]
    pictures = [level for level in further if any_level(level).kind == "picture"]
    for group in _together(model, pictures, parts, inputs):
        found |= _pictures(model, group, parts, inputs)
    for level in further:
        if any_level(level).kind == "text":
            found |= _text(model, level, parts[level], inputs[any_level(level).input], masked_word)
    return {one: found[one] for one in wanted}


def _together(
    model: PyramidCLIPModel, pictures: Sequence[str], parts: Mapping[str, set[str]], inputs: Mapping[str, torch.Tensor]
) -> list[list[str]]:
    if model.config.vision_config.tower != "vit":
        return [[level] for level in pictures]
    pooled = [level for level in pictures if "tokens" not in parts[level]]
    alone = [[level] for level in pictures if level not in pooled]
    same_size = len({inputs[any_level(level).input].shape for level in pooled}) == 1
    return [*alone, *([pooled] if same_size else [[level] for level in pooled])]


def _pictures(
    model: PyramidCLIPModel, levels: Sequence[str], parts: Mapping[str, set[str]], inputs: Mapping[str, torch.Tensor]
) -> dict[Wanted, torch.Tensor]:
    pixels = torch.cat([inputs[any_level(level).input] for level in levels])
    tokens = "tokens" in parts[levels[0]]
    views = {"views": len(levels)} if len(levels) > 1 else {}
    out = model.vision_model(pixel_values=pixels, pooled_only=not tokens, **views)
    found = {}
    for level, pooled in zip(levels, out.pooler_output.chunk(len(levels)), strict=True):
        found[Wanted(level, "pooled")] = pooled
        if "embedding" in parts[level]:
            found[Wanted(level, "embedding")] = model.visual_projection(pooled)
    if tokens:
        states = out.last_hidden_state[:, 1:]  # the first is the class token, or the mean of the others
        vit = model.config.vision_config.tower == "vit"
        found[Wanted(levels[0], "tokens")] = model.vision_model.post_layernorm(states) if vit else states
    return found


def _text(
    model: PyramidCLIPModel, level: str, parts: Collection[str], ids: torch.Tensor, masked_word: torch.Tensor | None
) -> dict[Wanted, torch.Tensor]:
    with masked_words(model, ids, masked_word):
        out = model.text_model(ids.clamp(min=0), pooled_only="tokens" not in parts)
    found = {Wanted(level, "pooled"): out.pooler_output}
    if "embedding" in parts:
        found[Wanted(level, "embedding")] = model.text_projection(out.pooler_output)
    if "tokens" in parts:
        found[Wanted(level, "tokens")] = out.last_hidden_state
    return found


@contextmanager
def masked_words(model: PyramidCLIPModel, ids: torch.Tensor, masked_word: torch.Tensor | None) -> Iterator[None]:
    """Inside, the text tower sees `masked_word` (W,) where `ids` (n, L) hold `MASKED_ID`.

    The vocabulary, which is saved, needs no word for it so.
    """
    if masked_word is None:
        yield
        return

    def replaced(module: nn.Module, arguments: tuple[torch.Tensor, ...], words: torch.Tensor) -> torch.Tensor:
        return torch.where(ids.eq(MASKED_ID)[..., None], masked_word.to(words.dtype), words)

    handle = model.text_model.embeddings.token_embedding.register_forward_hook(replaced)
    try:
        yield
    finally:
        handle.remove()


def reached_parameters(model: PyramidCLIPModel, wanted: Collection[Wanted], uses_scale: bool) -> set[str]:
    """Names of the model's parameters that what is wanted depends on, and the scale's where it plays a part."""
    levels = levels_in(wanted)
    embedded = [one.level for one in wanted if one.part == "embedding"]
    names = set(model.level_parameters(levels_of_kind("regions", levels)))
    pictures, texts = inputs_of_kind("picture", levels), inputs_of_kind("text", levels)
    if pictures:
        names |= set(model.level_parameters(("global",)))
        if not {one for one in wanted if one.level in pictures and one.part != "tokens"} and not levels_of_kind(
            "regions", levels
        ):
            pool = "vision_model.attention_pool."
            names -= {name for name in names if name.startswith(pool) and "position_embedding" not in name}
    if texts:
        names |= set(model.level_parameters(("caption",)))
    if not any(any_level(level).kind != "text" for level in embedded):
        names -= {name for name in names if name.startswith("visual_projection.")}
    if not any(any_level(level).kind == "text" for level in embedded):
        names -= {name for name in names if name.startswith("text_projection.")}
    return names | {"logit_scale"} if uses_scale else names - {"logit_scale"}


def token_mask(ids: torch.Tensor, end_id: int) -> torch.Tensor:
    """(n, L) bool: the tokens of texts, begin and end included and what follows the first end left out.

    Of a text without end token, all. Never by another id: the padding's 0 is a word of this vocabulary.
    """
    ended = ids.eq(end_id)
    return ended.cumsum(1) - ended.long() == 0
