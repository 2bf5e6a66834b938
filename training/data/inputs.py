"""The inputs that a run's own terms read beside the pyramid's levels: distorted views and changed captions.

A saved model knows none of them; batches, objective and memory estimate read this table.
"""

from collections.abc import Collection
from typing import Literal

from pyramidclip_hf.levels_pyramidclip import LEVELS, Level, levels_of_kind

# Made for each sample and epoch anew by random numbers of their own, so that no other input changes when they are read.
RUN_LEVELS: dict[str, Level] = {
    "view1": Level("picture", "a crop with distorted colours", "view1_pixel_values", "", ""),
    "view2": Level("picture", "another such crop", "view2_pixel_values", "", ""),
    "caption_aug": Level("text", "the caption with words replaced, swapped or left out", "augmented_input_ids", "", ""),
    "masked": Level("text", "the caption with masked words", "masked_input_ids", "", ""),
}
# In `masked_input_ids`, where a learned vector takes the place of the word's embedding: no id of the vocabulary.
MASKED_ID = -1
# Of each masked caption (B, M): where words are to be guessed, and which, `NO_WORD` behind the last one.
MASKED_POSITIONS, MASKED_LABELS, NO_WORD = "masked_positions", "masked_labels", -100


def any_level(name: str) -> Level:
    """The level of that name, of the pyramid or of a run."""
    return LEVELS[name] if name in LEVELS else RUN_LEVELS[name]


def in_table_order(levels: Collection[str]) -> tuple[str, ...]:
    """The named levels, the pyramid's first, in the order in which they are encoded."""
    return tuple(name for name in (*LEVELS, *RUN_LEVELS) if name in levels)


def inputs_of_kind(kind: Literal["picture", "regions", "text"], among: Collection[str]) -> tuple[str, ...]:
    """The levels of one kind among the named ones, the pyramid's first."""
    return (
        *levels_of_kind(kind, among),
        *(name for name in RUN_LEVELS if RUN_LEVELS[name].kind == kind and name in among),
    )
