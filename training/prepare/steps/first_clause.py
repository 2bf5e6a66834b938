"""A summary without a model: the first clause of a caption, without the words that say nothing about the picture.

This is no summariser and is not called one: `summary` is then made by `first-clause`, and `dataset.json` says so. It is
for machines without weights, for tests, and as the plain thing that a model has to beat.
"""

import re

MIN_WORDS = 4
# Whatever stands behind is not the first clause; and the patterns below are slow on text that is made to break them.
_MAX_LETTERS = 1000

_JUNK = [
    # addresses, file names, camera counters
    r"(?:https?://|www\.)\S+",
    r"\b[\w\-%()]+\.(?:jpe?g|png|gif|webp|bmp|tiff?|svg|pdf|psd|html?|php|aspx)\b",
    r"\b(?:img|dsc[nf]?|dscf|pict|image|photo|pic|mvi|screenshot|untitled)[_\-]?\d{2,}\w*\b",
    r"\b[\w\-]+\.(?:com|net|org|de|co\.uk|io|shop|store)\b",
    # identifiers: hexadecimal of 8 and more that has a digit, long numbers, stock and article numbers
    r"\b(?=[0-9a-f\-]*\d)(?=[0-9a-f\-]*[a-f])[0-9a-f]{8,}(?:-[0-9a-f]{4,})*\b",
    r"\b\d{6,}\b",
    r"\b(?:sku|isbn|ean|item|art|article|model|ref|no|nr|lot|part)\b[.:]?\s*#?\s*(?=[\w\-]*\d)[\w\-]+",
    r"#\d+\b",
    # sizes and amounts
    r"\b\d+(?:[.,]\d+)?\s*[x×]\s*\d+(?:[.,]\d+)?(?:\s*[x×]\s*\d+(?:[.,]\d+)?)?\s*(?:px|pixels?|cm|mm|m|inch(?:es)?|in|ft|\"|'')?(?!\w)",
    r"\b\d+(?:[.,]\d+)?\s*(?:px|dpi|mp|kb|mb|ml|cl|oz|kg|cm|mm)\b",
    r"\bsize:?\s+(?:xxs|xs|s|m|l|xl|xxl|\d+)\b",
    # prices and what shops add
    r"(?:[$€£]\s?\d+(?:[.,]\d+)*|\b\d+(?:[.,]\d+)*\s?(?:usd|eur|gbp)\b|\b\d+\s?%\s*off\b)",
    r"\b(?:free (?:worldwide )?(?:shipping|delivery|download)|buy (?:it )?now|shop "
    r"now|best price|in stock|on sale|for sale)\b",
    r"\b(?:click (?:here|to enlarge)|add to cart|new arrivals?|hot sale|limited edition|best ?sellers?)\b",
    r"\b(?:royalty[- ]free|stock (?:photo(?:graph|s|graphy)?|image|images|illustration|vector)|getty "
    r"images|shutterstock|istock(?:photo)?|alamy)\b",
    r"(?:©|\(c\)|\bcopyright\b)[^.;|]*",
    r"[@]\w+",
]
_junk = re.compile("|".join(f"(?:{pattern})" for pattern in _JUNK), re.IGNORECASE)
_clause_end = re.compile(
    r"(?<!\bDr)(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bSt)(?<!\b[A-Z])\.(?=\s|$)|[!?](?=\s|$)|[;|•·»]|\s[-–—~/]+\s|\s?\(|\s?\[|:\s"
)
_LOOSE = " \t\n,;:.|-–—_~*#&+/\\\"'()[]{}<>"
_needless_start = re.compile(r"^(?:by|from|of|for|via|and|or)\s+", re.IGNORECASE)
_needless_end = re.compile(r"\s+(?:by|from|at|on|in|of|for|with|via|and|or|the|a|an)$", re.IGNORECASE)


def first_clause(caption: str, min_words: int = MIN_WORDS) -> str:
    """The first clause of a caption that has words left after the junk is gone.

    At commas it ends only where it has `min_words` before. A caption that is junk throughout is given back as it is,
    blanks tidied.
    """
    caption = " ".join(caption.split())
    head = caption[:_MAX_LETTERS]
    least = min(2, len(head.split()))
    for clause in _clause_end.split(_junk.sub(" | ", head)):
        clause = _before_comma(_tidy(clause), min_words)
        if sum(any(letter.isalpha() for letter in word) and len(word) > 1 for word in clause.split()) >= least:
            return clause
    return caption


def _tidy(clause: str) -> str:
    clause = _needless_start.sub("", " ".join(clause.split()).strip(_LOOSE))
    while (shorter := _needless_end.sub("", clause)) != clause:
        clause = shorter.strip(_LOOSE)
    return clause


def _before_comma(clause: str, min_words: int) -> str:
    parts = clause.split(", ")
    kept = parts[0]
    for part in parts[1:]:
        if len(kept.split()) >= min_words:
            break
        kept = f"{kept}, {part}"
    return _tidy(kept)
