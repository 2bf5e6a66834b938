"""Measures of texts that need no language: words, digits, file names, and what of two texts is the same."""

import re
import unicodedata

# An address or a file name that stands alone, or what a camera calls its pictures.
_FILE_NAME = re.compile(
    r"^\s*(?:https?://\S+|[\w\-%()+. ]*\.(?:jpe?g|png|gif|webp|bmp|tiff?|svgz?|pdf|psd|html?|php|aspx|mp4|avi))\s*$"
    r"|^\s*(?:img|dsc[nf]?|dscf|pict|image|photo|pic|mvi|screenshot|untitled|p|cimg)?[_\- ]*\d[\d_\-. ()]*\s*$",
    re.IGNORECASE,
)
# Patterns are slow on text that is made to break them.
_MAX_LETTERS = 1000


def word_count(text: str) -> int:
    """How many words, parted by blanks; of writing without blanks, as Chinese, each letter counts as one."""
    return sum(max(1, sum(map(_is_word_alone, word))) for word in text.split())


def _is_word_alone(letter: str) -> bool:
    return "\u2e80" <= letter <= "\u9fff" or "\u0e00" <= letter <= "\u0eff" or "\U00020000" <= letter <= "\U0003ffff"


def share_of_digits(text: str) -> float:
    """Digits among all but blanks, 0 to 1; 0 for an empty text."""
    letters = [letter for letter in text if not letter.isspace()]
    return sum(letter.isdigit() for letter in letters) / len(letters) if letters else 0.0


def share_of_letters(text: str) -> float:
    """Letters of any script among all but blanks, 0 to 1; 0 for an empty text."""
    letters = [letter for letter in text if not letter.isspace()]
    return sum(unicodedata.category(letter)[0] in "LM" for letter in letters) / len(letters) if letters else 0.0


def is_file_name(text: str) -> bool:
    """Whether a text is nothing but the name of a file, an address, or a number as cameras and archives give them."""
    return len(text) <= _MAX_LETTERS and bool(_FILE_NAME.match(text))


def letters_alone(text: str) -> str:
    """The words of a text without case, digits and punctuation: "IMG 12, Set 3" and "img 7 set 4" are the same."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = "".join(letter if unicodedata.category(letter)[0] in "LM" else " " for letter in folded)
    return " ".join(kept.split())


def beginning(text: str, words: int) -> str:
    """The first words, without case; empty where there are no more than these."""
    parts = text.casefold().split()
    return " ".join(parts[:words]) if len(parts) > words else ""


def ending(text: str, words: int) -> str:
    """The last words, without case; empty where there are no more than these."""
    parts = text.casefold().split()
    return " ".join(parts[-words:]) if len(parts) > words else ""
