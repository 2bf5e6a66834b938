"""Makes the file of synonyms that changed captions take words from (docs/objectives.md), out of WordNet's files.

    apt-get install wordnet-base
    python -m training.prepare.synonyms --wordnet /usr/share/wordnet --output data/synonyms.json

Two words are synonyms where WordNet has them in one set. Words of letters alone are taken, and no function words; what
several words stand for ("motor vehicle") may replace one word. The file is a JSON object of word: [synonym, ...].
"""

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyramidclip_command import check_there, run_command
from pyramidclip_hf.files import json_text, read_regular, write_atomically
from training.prepare.steps.flags import parse_dataclasses

PARTS = ("noun", "verb", "adj", "adv")
MOST_BYTES = 256 << 20
# Words that hold a sentence together: another one in their place is another sentence.
FUNCTION_WORDS = frozenset(
    "a about above after again against all am an and any are as at be because been before being below between both "
    "but by can could did do does doing down during each few for from further had has have having he her here hers "
    "him his how i if in into is it its just me might more most must my no nor not of off on once only or other our "
    "out over own same she should so some such than that the their them then there these they this those through to "
    "too under until up us very was we were what when where which while who whom why will with would you your".split()
)
_MARK = re.compile(r"\((a|p|ip)\)$")  # where an adjective may stand
_WORDS = re.compile(r"[a-z]+( [a-z]+)*")


@dataclass
class SynonymArguments:
    """Settings."""

    wordnet: str = field(
        default="/usr/share/wordnet",
        metadata={"help": "folder with WordNet's data.noun, .verb, .adj, .adv, as Debian's wordnet-base has it"},
    )
    output: str = field(default="data/synonyms.json", metadata={"help": "file to write"})


def sets_of(path: Path) -> Iterator[list[str]]:
    """The words of each set of a data file of WordNet, as they are written there.

    Raises:
        ValueError: A line is of another form; the message names it.
    """
    for number, line in enumerate(read_regular(path, MOST_BYTES).decode("utf-8", "replace").splitlines(), 1):
        if line.startswith("  ") or not line.strip():  # the licence
            continue
        # Offset, file, kind, number of words (hexadecimal), then each word with its number.
        parts = line.split("|")[0].split()
        try:
            count = int(parts[3], 16)
            words = [parts[4 + 2 * place] for place in range(count)]
        except (IndexError, ValueError):
            raise ValueError(f"{path}, line {number}: expected a set of WordNet's, got {line[:60]!r}") from None
        yield words


def readable(word: str) -> str | None:
    """A word of WordNet's as it stands in captions; None where it is not made of letters alone."""
    plain = _MARK.sub("", word).replace("_", " ")
    return plain if _WORDS.fullmatch(plain) else None


def synonyms_in(folder: Path) -> dict[str, list[str]]:
    """Word -> its synonyms, both in the order of the alphabet.

    Raises:
        FileNotFoundError: The folder has not WordNet's files.
        ValueError: One of them is of another form, or there is no synonym in them.
    """
    missing = [f"data.{part}" for part in PARTS if not (folder / f"data.{part}").is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} has no {', '.join(missing)}: expected WordNet's files, as Debian's package wordnet-base "
            "installs them in /usr/share/wordnet"
        )
    found: dict[str, set[str]] = {}
    for part in PARTS:
        for words in sets_of(folder / f"data.{part}"):
            plain = {text for word in words if (text := readable(word))} - FUNCTION_WORDS
            for word in plain:
                if " " not in word and len(plain) > 1:
                    found.setdefault(word, set()).update(plain - {word})
    if not found:
        raise ValueError(f"{folder}: no two words of letters alone are in one set")
    return {word: sorted(found[word]) for word in sorted(found)}


def parse(argv: Sequence[str]) -> SynonymArguments:
    """The settings that the words of the command line stand for."""
    args: Any
    (args,) = parse_dataclasses(argv, __doc__, SynonymArguments)
    check_there("--wordnet", args.wordnet, "WordNet's files, as Debian's package wordnet-base has them")
    return args


def run(args: SynonymArguments) -> None:
    """Writes the file."""
    found, output = synonyms_in(Path(args.wordnet)), Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, (json_text(found, indent=0) + "\n").encode())
    print(f"{output}: {len(found):,} words with {sum(map(len, found.values())):,} synonyms")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(parse, run, argv)


if __name__ == "__main__":
    sys.exit(main())
