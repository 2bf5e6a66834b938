"""The kinds of terms, by their names, and how a run's `objective` is read."""

import difflib
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pyramidclip_hf.configuration_pyramidclip import PyramidCLIPConfig
from pyramidclip_hf.levels_pyramidclip import TERMS
from training.loop.terms.encoding import levels_in
from training.loop.terms.masked_words import MaskedWords
from training.loop.terms.neighbours import NearestNeighbours
from training.loop.terms.simclr import ImageContrast
from training.loop.terms.simsiam import ImageLikeness
from training.loop.terms.term import Term, Wanted
from training.loop.terms.tokens import TOKEN_PAIRS, TokenPair

# Makes a term of its name, weight, options and the model's config.
MakeTerm = Callable[[str, float, Mapping[str, Any], PyramidCLIPConfig], Term]
# Name of a term -> its kind.
KINDS: dict[str, MakeTerm] = {
    "views_simclr": ImageContrast,
    "views_simsiam": ImageLikeness,
    "views_nn": NearestNeighbours,
    "caption_mlm": MaskedWords,
    **dict.fromkeys(TOKEN_PAIRS, TokenPair),
}
# Pairs of a run: terms of the model's own kind over levels that only a training has.
RUN_PAIRS: dict[str, tuple[str, str]] = {
    f"{view}_{text}": (view, text) for view in ("view1", "view2") for text in ("caption", "caption_aug")
}


class FurtherTerms(NamedTuple):
    """What a run trains beside the pairs of levels that its model knows.

    Attributes:
        terms: Of other kinds.
        pairs: Of `RUN_PAIRS` -> weight.
    """

    terms: tuple[Term, ...] = ()
    pairs: Mapping[str, float] = {}

    @property
    def mask_share(self) -> float:
        """Of a caption's tokens, that are masked."""
        return next((term.options()["share"] for term in self.terms if isinstance(term, MaskedWords)), 0.0)

    @property
    def trains_texts(self) -> bool:
        """Whether a term compares pictures with texts, so that retrieval means something."""
        return bool(self.pairs) or any(isinstance(term, TokenPair) for term in self.terms)

    def check_batch(self, global_batch_size: int) -> None:
        """Raises ValueError where a queue has no room for the texts of one step."""
        for term in self.terms:
            if isinstance(term, NearestNeighbours):
                term.check_batch(global_batch_size)

    @property
    def levels(self) -> tuple[str, ...]:
        """All levels that these read, of the pyramid and of the run."""
        wanted = [Wanted(level, "embedding") for pair in self.pairs for level in RUN_PAIRS[pair]]
        return levels_in([*wanted, *(one for term in self.terms for one in term.wanted)])


def read_objective(objective: Mapping[str, Any] | None, config: PyramidCLIPConfig) -> FurtherTerms:
    """The terms that a run's `objective` names: {term: weight} or {term: {weight: 1.0, OPTION: VALUE}}.

    Terms with weight 0 are left out. Heads begin at random numbers drawn here.

    Raises:
        ValueError: A term, option or value is none; the message says which there are.
    """
    terms, pairs = [], {}
    for name, told in (objective or {}).items():
        if name not in KINDS and name not in RUN_PAIRS:
            known = [*KINDS, *RUN_PAIRS]
            near = difflib.get_close_matches(name, known, 3, 0.5) or known
            hint = "; level pairs of the model are named in loss_weights" if name in TERMS else ""
            raise ValueError(f"objective: expected terms such as {', '.join(near)}, got {name!r}{hint}")
        options = dict(told) if isinstance(told, Mapping) else {"weight": told}
        weight = options.pop("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= sys.float_info.max:
            raise ValueError(f"objective: {name}: weight: expected a number of at least 0, got {weight!r}")
        if name in RUN_PAIRS and options:
            raise ValueError(f"objective: {name} has no option but weight, got {', '.join(options)}")
        if not weight:
            continue
        if name in RUN_PAIRS:
            pairs[name] = float(weight)
        else:
            terms.append(KINDS[name](name, float(weight), options, config))
    return FurtherTerms(tuple(terms), pairs)
