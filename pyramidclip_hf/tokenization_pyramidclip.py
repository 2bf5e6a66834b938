# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""CLIP's byte-pair encoding with the reference's text cleaning and its padding.

The cleaning (`clean_text`) runs in this class, in front of the Rust tokenizer, so it cannot get lost when saving:
whoever loads the class has it. Texts are padded with id 0, as the released weights need it, although id 0 is the
ordinary token "!": it is never registered as a special token, which would change how "wow!!" is split.

    >>> tokenizer = PyramidCLIPTokenizer()
    >>> tokenizer(["a photo of a cat", "wow!!"], padding=True)["input_ids"]
    [[49406, 320, 1125, 539, 320, 2368, 49407], [49406, 2781, 748, 49407, 0, 0, 0]]
"""

import gzip
import html
import re
import unicodedata
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers.tokenization_utils_base import BatchEncoding
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from .saved_folders_pyramidclip import LoadedFromFolder

PAD_TOKEN_ID = 0
MODEL_MAX_LENGTH = 77
BOS_TOKEN = "<|startoftext|>"
EOS_TOKEN = "<|endoftext|>"
MERGES_FILE = "clip_bpe_merges.txt.gz"

# The reference matches contractions without case, and U+017F (long s) equals "s" there.
_WORD = r"<\|startoftext\|>|<\|endoftext\|>|'[s\x{17f}]|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# Printable ASCII without "&" is what neither ftfy nor HTML unescaping can change.
_NOTHING_TO_REPAIR = re.compile(r"[\t\n\r -%'-~]*")
_SPECIAL = re.compile(r"<\|(startoftext|endoftext)\|>")


def clean_text(text: str) -> str:
    """The text as the reference encodes it: repaired by ftfy, HTML unescaped twice, spaces collapsed, lower case.

    Raises:
        ImportError: ftfy is missing and the text has characters that it might change.
    """
    if not _NOTHING_TO_REPAIR.fullmatch(text):
        text = html.unescape(html.unescape(_repair(text)))
    return " ".join(text.split()).lower()


def _repair(text: str) -> str:
    try:
        import ftfy
    except ImportError as error:
        raise ImportError(
            f"The text {text[:80]!r} must be repaired by ftfy, as PyramidCLIP's training texts were, or its tokens "
            "would differ: pip install ftfy"
        ) from error
    return ftfy.fix_text(text)


def _break_unreachable_specials(text: str) -> str:
    """Puts spaces into every "<|endoftext|>" that the reference does not see as one token.

    Its pattern reads punctuation greedily, so "!<|endoftext|>" is "!<|", "endoftext", "|>" there; Rust looks for
    special tokens first and would find one. Spaces separate words and are not encoded: the result is the same.
    """
    pieces, end, special_end = [], 0, 0
    for match in _SPECIAL.finditer(text):
        start = match.start()
        before = text[start - 1 : start]
        if start == special_end or before.isspace() or unicodedata.category(before)[0] in "LN":
            special_end = match.end()
            pieces += [text[end:start], match[0]]
        else:
            pieces += [text[end:start], f"<| {match[1]} |>"]
        end = match.end()
    return "".join([*pieces, text[end:]])


def _byte_symbols() -> list[str]:
    """The 256 characters that stand for bytes in the vocabulary, in the order of their ids."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + place) for place in range(256 - len(printable))]


def _packaged_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's vocabulary (49,408 tokens) and its 48,894 merges, from the package's data.

    Raises:
        FileNotFoundError: this file was copied without the data, as remote code is.
    """
    path = Path(__file__).with_name(MERGES_FILE)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: PyramidCLIPTokenizer() without arguments needs the installed package; from a model's "
            "files, use PyramidCLIPTokenizer.from_pretrained(FOLDER_OR_HUB_ID)."
        )
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        next(lines)
        merges = [(first, second) for first, second in map(str.split, lines)]
    symbols = _byte_symbols()
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *map("".join, merges), BOS_TOKEN, EOS_TOKEN]
    return {token: index for index, token in enumerate(tokens)}, merges


class PyramidCLIPTokenizer(LoadedFromFolder, TokenizersBackend):
    """CLIP's tokenizer as PyramidCLIP's weights need it (paper, section 4.1).

    Differs from `CLIPTokenizer` in that texts are cleaned as the reference cleans them, padding is id 0 without "!"
    being special, texts are cut to `model_max_length` (77) unless `truncation=False`, the end token always kept, and
    decoding stops at the first end token. Padding follows the call (`padding=True`, `"max_length"`), none by default;
    `attention_mask` is 0 on pads. Offsets refer to the cleaned text.

    `tokenizer(texts, return_truncation=True)` adds `truncated`, one bool a text; `num_truncated` counts the texts that
    this object has cut so far.

    Args:
        vocab: token -> id, or a path to `vocab.json`. None: CLIP's vocabulary from the package, no network.
        merges: pairs, or a path to `merges.txt`.
        unk_token: as in CLIP.
        bos_token: as in CLIP.
        eos_token: as in CLIP.
        **kwargs: passed to `TokenizersBackend`; `model_max_length` is 77 by default and `pad_token` is ignored.

    Raises:
        ValueError: merges without a vocabulary or the other way round; an empty batch; a text that is no string.
    """

    vocab_files_names = {"vocab_file": "vocab.json", "merges_file": "merges.txt", "tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]
    model = BPE  # type: ignore[assignment]  # the base class says None and means "set it"

    def __init__(
        self,
        vocab: str | dict[str, int] | None = None,
        merges: str | list[tuple[str, str]] | None = None,
        unk_token: str = EOS_TOKEN,
        bos_token: str = BOS_TOKEN,
        eos_token: str = EOS_TOKEN,
        **kwargs: Any,
    ):
        self.num_truncated = 0
        if (vocab is None) != (merges is None):
            raise ValueError("PyramidCLIPTokenizer takes `vocab` and `merges` together; one of them is missing.")
        if kwargs.get("tokenizer_object") is None and kwargs.get("tokenizer_file") is None:
            if vocab is None:
                vocab, merges = _packaged_vocabulary()
            self._tokenizer = self._build_backend(vocab, merges, str(unk_token), str(bos_token), str(eos_token))
        # A tokenizer saved by other code may carry "!" as pad and special token, and a padding set-up with it.
        for key in ("pad_token", "_json_padding", "_json_truncation", "tokenizer_padding", "tokenizer_truncation"):
            kwargs.pop(key, None)
        added = kwargs.get("added_tokens_decoder") or {}
        kwargs["added_tokens_decoder"] = {index: token for index, token in added.items() if int(index) != PAD_TOKEN_ID}
        kwargs.setdefault("model_max_length", MODEL_MAX_LENGTH)
        super().__init__(unk_token=unk_token, bos_token=bos_token, eos_token=eos_token, **kwargs)

    @staticmethod
    def _build_backend(vocab: Any, merges: Any, unk_token: str, bos_token: str, eos_token: str) -> Tokenizer:
        backend = Tokenizer(BPE(vocab, merges, unk_token=unk_token, end_of_word_suffix="</w>"))
        # Changes nothing that `clean_text` has cleaned; for programs that read tokenizer.json without this class.
        backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos_token} $A {eos_token}",
            pair=f"{bos_token} $A {eos_token} $B {eos_token}",
            special_tokens=[(token, backend.token_to_id(token)) for token in (bos_token, eos_token)],
        )
        return backend

    @property
    def pad_token_id(self) -> int:
        """0, whatever token has that id."""
        return PAD_TOKEN_ID

    @property
    def pad_token(self) -> str:
        """The token of id 0: "!" in CLIP's vocabulary. Not among `all_special_tokens`."""
        token: Any = self.convert_ids_to_tokens(PAD_TOKEN_ID)
        return token

    def __setattr__(self, key: str, value: Any) -> None:
        if key not in ("pad_token", "pad_token_id"):
            super().__setattr__(key, value)
        elif value is not None and str(value) != str(getattr(self, key)):
            raise ValueError(
                f"{key} cannot become {value!r}: PyramidCLIP pads with id {PAD_TOKEN_ID}, and its maximum over all "
                "positions sees the pads."
            )

    def add_special_tokens(self, special_tokens_dict: dict[str, Any], *args: Any, **kwargs: Any) -> int:
        """As in the base class; a `pad_token` is not added, and refused unless it is the token of id 0."""
        if "pad_token" in special_tokens_dict:
            setattr(self, "pad_token", special_tokens_dict["pad_token"])  # noqa: B010  a property that checks
        special_tokens_dict = {key: value for key, value in special_tokens_dict.items() if key != "pad_token"}
        return super().add_special_tokens(special_tokens_dict, *args, **kwargs)

    def _get_padding_truncation_strategies(
        self, padding: Any = False, truncation: Any = None, *args: Any, **kwargs: Any
    ) -> tuple[Any, ...]:
        # The zero-shot pipeline asks for no truncation, and its labels may be of any length.
        return super()._get_padding_truncation_strategies(
            padding, True if truncation is None else truncation, *args, **kwargs
        )

    def _encode_plus(
        self, text: Any, text_pair: Any = None, *args: Any, return_truncation: bool = False, **kwargs: Any
    ) -> BatchEncoding:
        encoding = super()._encode_plus(_cleaned(text), _cleaned(text_pair), *args, **kwargs)
        truncated = [bool(row.overflowing) for row in encoding.encodings or ()]
        self.num_truncated += sum(truncated)
        if return_truncation:
            one = isinstance(encoding["input_ids"], list) and not isinstance(encoding["input_ids"][0], list)
            encoding["truncated"] = truncated[0] if one else truncated
            encoding.convert_to_tensors(kwargs.get("return_tensors"))
        return encoding

    def _decode(self, token_ids: Any, skip_special_tokens: bool = False, *args: Any, **kwargs: Any) -> str:
        if isinstance(token_ids, dict):
            token_ids = token_ids["input_ids"]
        token_ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        if self.eos_token_id in token_ids:
            token_ids = token_ids[: token_ids.index(self.eos_token_id) + 1]
        return super()._decode(token_ids, skip_special_tokens, *args, **kwargs).strip()

    def _save_pretrained(self, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        # Padding and truncation belong to the call that set them; the same tokenizer always writes the same file.
        self.backend_tokenizer.no_padding()
        self.backend_tokenizer.no_truncation()
        return super()._save_pretrained(*args, **kwargs)


def _cleaned(text: Any) -> Any:
    """Cleans a text, a batch, or a batch of pre-split texts; None stays None."""
    if text is None:
        return None
    if isinstance(text, str):
        return _break_unreachable_specials(clean_text(text))
    if not isinstance(text, (list, tuple)):
        raise ValueError(f"Expected a text or a list of texts, got {type(text).__name__}.")
    if not text:
        raise ValueError("Expected at least one text, got an empty list.")
    for place, part in enumerate(text):
        if not isinstance(part, (str, list, tuple)):
            raise ValueError(f"Expected texts, got {type(part).__name__} at place {place} of the list.")
    return [_cleaned(part) if isinstance(part, str) or part else list(part) for part in text]


__all__ = ["PyramidCLIPTokenizer"]
