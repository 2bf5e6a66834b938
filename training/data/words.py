"""Captions that a run changes: words replaced by synonyms, swapped or left out, and words masked to be guessed.

Changing a text is "easy data augmentation" with the settings that DeCLIP's code uses: one of three changes is drawn for
each caption; one word (all its occurrences) becomes a synonym, or two words change places, or each is left out with
probability 0.1, the last one never. A caption without a word that can be changed so stays as it is.

Masking is BERT's: of the share of tokens that is chosen, 80 % become the mask, 10 % a random word and 10 % stay.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pyramidclip_hf.files import parse_json, read_regular
from training.data.inputs import MASKED_ID

LEFT_OUT = 0.1
MASKED, RANDOM = 0.8, 0.1
MOST_BYTES = 64 << 20

Synonyms = Mapping[str, Sequence[str]]


def read_synonyms(path: str | Path) -> dict[str, list[str]]:
    """Word -> its synonyms, of a file that `training.prepare.synonyms` made: a JSON object of lists.

    Raises:
        ValueError: It is of another form; the message says what was expected.
    """
    try:
        found = parse_json(read_regular(Path(path), MOST_BYTES))
    except ValueError as error:
        raise ValueError(f"synonyms {path}: expected JSON, {error}") from error
    fits = isinstance(found, dict) and all(
        isinstance(words, list) and words and all(isinstance(word, str) for word in words) for words in found.values()
    )
    if not fits or not found:
        raise ValueError(f"synonyms {path}: expected an object of word: [synonym, ...], see training.prepare.synonyms")
    return found


def changed_caption(caption: str, synonyms: Synonyms, rng: np.random.Generator) -> str:
    """The caption with one change, words parted by single spaces.

    Args:
        caption: A text.
        synonyms: Lower-case word -> others; without any, words are swapped or left out only.
        rng: Decides all.
    """
    words = caption.split()
    kind = int(rng.integers(3)) if synonyms else 1 + int(rng.integers(2))
    changed = (replaced, swapped, shortened)[kind](words, synonyms, rng)
    return " ".join(changed) if changed != words else caption


def replaced(words: Sequence[str], synonyms: Synonyms, rng: np.random.Generator) -> list[str]:
    """One word that has synonyms, wherever it stands, becomes one of them."""
    known = sorted({word for word in words if word.lower() in synonyms})
    if not known:
        return list(words)
    word = known[int(rng.integers(len(known)))]
    others = synonyms[word.lower()]
    other = others[int(rng.integers(len(others)))]
    return [other if one == word else one for one in words]


def swapped(words: Sequence[str], synonyms: Synonyms, rng: np.random.Generator) -> list[str]:
    """Two words change places."""
    changed = list(words)
    if len(words) > 1:
        first, second = rng.choice(len(words), 2, replace=False)
        changed[first], changed[second] = changed[second], changed[first]
    return changed


def shortened(words: Sequence[str], synonyms: Synonyms, rng: np.random.Generator) -> list[str]:
    """Each word is left out with probability `LEFT_OUT`; one stays at least."""
    kept = [word for word, number in zip(words, rng.uniform(size=len(words)), strict=True) if number >= LEFT_OUT]
    return kept or [words[int(rng.integers(len(words)))]] if words else []


@dataclass(frozen=True)
class Vocabulary:
    """What masking has to know of a tokenizer.

    Attributes:
        words: ids that are no special ones; a random word is one of them.
        special: begin, end and padding.
        end: the end id.
    """

    words: np.ndarray
    special: frozenset[int]
    end: int

    @classmethod
    def of(cls, size: int, special: Collection[int], end: int) -> "Vocabulary":
        """Of `size` ids, `special` ones among them."""
        ids = np.arange(size)
        return cls(ids[~np.isin(ids, list(special))], frozenset(special), end)


def masked_caption(
    ids: np.ndarray, share: float, vocabulary: Vocabulary, rng: np.random.Generator
) -> tuple[np.ndarray, list[int], list[int]]:
    """Masks a caption.

    Args:
        ids: (L,) int64, padded; what follows the first end id is left alone. The first id is the begin, and so are
            begin and end.
        share: Of its tokens that are to be guessed, each drawn by itself; there may be none.
        vocabulary: Of the tokenizer.
        rng: Decides all.

    Returns:
        The ids with `MASKED_ID` and random words, the positions, and the words that stood there.
    """
    ends = np.flatnonzero(ids == vocabulary.end)
    length = int(ends[0]) if len(ends) else len(ids)
    chosen = rng.uniform(size=len(ids)) < share
    kinds, words = rng.uniform(size=len(ids)), rng.integers(len(vocabulary.words), size=len(ids))
    chosen &= (np.arange(len(ids)) > 0) & (np.arange(len(ids)) < length)
    masked = np.where(chosen & (kinds < MASKED), MASKED_ID, ids)
    masked = np.where(chosen & (kinds >= MASKED) & (kinds < MASKED + RANDOM), vocabulary.words[words], masked)
    positions = np.flatnonzero(chosen)
    return masked, positions.tolist(), ids[positions].tolist()


def padded(rows: Sequence[Sequence[int]], filling: int) -> np.ndarray:
    """(B, M) int64 of rows, M the longest, at least 1."""
    longest = max(1, *(len(row) for row in rows))
    found = np.full((len(rows), longest), filling, np.int64)
    for place, row in enumerate(rows):
        found[place, : len(row)] = row
    return found
