"""The tokenizer against the reference's ids, and against a straightforward form of the reference's algorithm."""

import gzip
import hashlib
import html
import json
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoTokenizer, CLIPTokenizer

from pyramidclip_hf import tokenization_pyramidclip as module
from pyramidclip_hf.tokenization_pyramidclip import PyramidCLIPTokenizer, clean_text

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
BOS, EOS = 49406, 49407
LONG = "word " * 100


@pytest.fixture(scope="module")
def golden():
    return json.loads((FIXTURES / "tokenizer_golden.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer():
    return PyramidCLIPTokenizer()


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    # A padded and truncated call just before saving must not be saved with it.
    tokenizer([LONG, "wow!!"], padding="max_length")
    tokenizer.save_pretrained(folder)
    return folder


class StraightforwardBPE:
    """The reference's algorithm written out: regular expression, bytes, lowest-ranked pair first."""

    def __init__(self):
        regex = pytest.importorskip("regex")
        path = Path(module.__file__).with_name(module.MERGES_FILE)
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").splitlines()[1:]
        self.ranks = {tuple(line.split()): rank for rank, line in enumerate(lines)}
        visible = [byte for byte in range(256) if chr(byte).isprintable() and byte not in (32, 127, 160, 173)]
        hidden = [byte for byte in range(256) if byte not in visible]
        self.symbol = {byte: chr(byte) for byte in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}
        alphabet = [self.symbol[byte] for byte in visible + hidden]
        tokens = alphabet + [s + "</w>" for s in alphabet] + [a + b for a, b in self.ranks]
        self.ids = {t: i for i, t in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
        self.words = regex.compile(
            r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
            regex.IGNORECASE,
        )

    def word(self, word):
        if word in ("<|startoftext|>", "<|endoftext|>"):
            return [self.ids[word]]
        parts = [self.symbol[byte] for byte in word.encode("utf-8")]
        parts[-1] += "</w>"
        while len(parts) > 1:
            best = min(zip(parts, parts[1:]), key=lambda pair: self.ranks.get(pair, 1 << 30))
            if best not in self.ranks:
                break
            merged, place = [], 0
            while place < len(parts):
                hit = tuple(parts[place : place + 2]) == best
                merged.append("".join(parts[place : place + 1 + hit]))
                place += 1 + hit
            parts = merged
        return [self.ids[part] for part in parts]

    def __call__(self, text):
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
        text = " ".join(text.split()).lower()
        ids = [BOS, *(i for word in self.words.findall(text) for i in self.word(word)), EOS]
        return ids if len(ids) <= 77 else [*ids[:76], EOS]


def test_golden_strings_alone_and_in_a_batch(tokenizer, golden):
    assert len(golden) == 40
    assert [tokenizer(row["text"])["input_ids"] for row in golden] == [row["ids"] for row in golden]
    assert tokenizer([row["text"] for row in golden])["input_ids"] == [row["ids"] for row in golden]


def test_golden_strings_after_saving_and_loading(saved, golden):
    texts, ids = [row["text"] for row in golden], [row["ids"] for row in golden]
    loaded = PyramidCLIPTokenizer.from_pretrained(saved)
    assert loaded(texts)["input_ids"] == ids
    assert (loaded.pad_token_id, loaded.model_max_length) == (0, 77)
    assert pickle.loads(pickle.dumps(loaded))(texts)["input_ids"] == ids
    auto = AutoTokenizer.from_pretrained(saved)
    assert type(auto) is PyramidCLIPTokenizer
    assert auto(texts)["input_ids"] == ids


def test_packaged_merges_are_the_reference_files_first_48894():
    packaged = gzip.decompress(Path(module.__file__).with_name(module.MERGES_FILE).read_bytes()).decode("utf-8")
    note, *merges = packaged.splitlines()
    # Of lines 2 to 48,895 of CLIP's bpe_simple_vocab_16e6.txt, joined by line feeds.
    digest = "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"
    assert len(merges) == 48894 and hashlib.sha256("\n".join(merges).encode()).hexdigest() == digest
    assert "MIT License" in note


def test_the_same_tokenizer_writes_the_same_file(tokenizer, saved, tmp_path):
    PyramidCLIPTokenizer().save_pretrained(tmp_path)
    digests = {hashlib.sha256((f / "tokenizer.json").read_bytes()).hexdigest() for f in (saved, tmp_path)}
    assert len(digests) == 1
    assert "pad_token" not in json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))


def test_random_texts_equal_the_straightforward_form(tokenizer):
    reference = StraightforwardBPE()
    rng = random.Random(0)
    atoms = [
        "a", "Dog", "café", "naïve", "ΣΟΦΟΣ", "İstanbul", "ſ", "'s", "'ſ", "'LL", "n't", "!", "!!", "...", "é", "&amp;",
        "&amp;lt;", "&eacute;", "<b>", "<|endoftext|>", "<|StartOfText|>", "<|", "|>", "日本", "🙂", "👩‍🚀", "½", "Ⅷ",
        "１２", "٣", "\u00a0", "\u200b", "\x00", "\x1b[31m", "â€œ", "\ufeff", "42", "3.14", "#tag", "_", "\\", "\t",
        "\r\n", " ", "ﬁ", "¡", "\u0301", "</w>", "’", "“x”", "\x85", "\u2028", "ÿ", "\ud83d",
    ]  # fmt: skip
    texts = ["".join(rng.choices(atoms, k=rng.randint(1, 12))) for _ in range(3000)]
    texts += ["".join(chr(rng.randint(32, 0x24F)) for _ in range(20)) for _ in range(1000)]
    wrong = [text for text, ids in zip(texts, tokenizer(texts)["input_ids"]) if ids != reference(text)]
    assert not wrong, wrong[:5]


def test_plain_ascii_needs_no_repair():
    ftfy = pytest.importorskip("ftfy")
    rng = random.Random(1)
    letters = [chr(code) for code in range(32, 127) if chr(code) != "&"] + ["\t", "\n", "\r", "\r\n"]
    for _ in range(500):
        text = "".join(rng.choices(letters, k=40))
        assert clean_text(text) == " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


def test_padding_is_zero_and_masked_in_every_form(tokenizer):
    texts, rows = ["a photo of a cat", "wow!!"], [[BOS, 320, 1125, 539, 320, 2368, EOS], [BOS, 2781, 748, EOS]]
    for padding, width in ((True, 7), ("longest", 7), ("max_length", 77)):
        ids = [row + [0] * (width - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
        as_tensors = tokenizer(texts, padding=padding, return_tensors="pt")
        assert as_tensors["input_ids"].dtype == torch.int64
        assert as_tensors["input_ids"].tolist() == ids
        assert as_tensors["attention_mask"].tolist() == mask
        as_arrays = tokenizer(texts, padding=padding, return_tensors="np")
        assert isinstance(as_arrays["input_ids"], np.ndarray)
        assert as_arrays["attention_mask"].tolist() == mask
        later = tokenizer.pad(tokenizer(texts), padding=padding, return_tensors="pt")
        assert later["input_ids"].tolist() == ids
        assert later["attention_mask"].tolist() == mask
    assert tokenizer("wow!!", padding="max_length", max_length=6)["input_ids"] == [BOS, 2781, 748, EOS, 0, 0]
    assert tokenizer(texts, padding=True, max_length=5, return_tensors="pt")["input_ids"].shape == (2, 5)


def test_exclamation_mark_is_no_special_token(tokenizer, saved):
    for one in (tokenizer, PyramidCLIPTokenizer.from_pretrained(saved)):
        assert one.pad_token_id == 0
        assert one.pad_token == "!"
        assert one.all_special_ids == [BOS, EOS]
        ids = one("wow!! Hello! Привет, мир!", padding="max_length")["input_ids"]
        assert one.decode(ids, skip_special_tokens=True) == "wow !! hello ! привет , мир !"
        one.add_special_tokens({"pad_token": "!"})
        one.pad_token = "!"
        assert one("wow!!")["input_ids"] == [BOS, 2781, 748, EOS]
        with pytest.raises(ValueError, match="pads with id 0"):
            one.pad_token = "<|endoftext|>"
        with pytest.raises(ValueError, match="pads with id 0"):
            one.add_special_tokens({"pad_token": "[PAD]"})


def test_a_folder_of_clips_tokenizer_with_bang_as_pad_loads_right(tokenizer, golden, tmp_path):
    backend = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in backend["merges"]]
    stock = CLIPTokenizer(vocab=backend["vocab"], merges=merges, pad_token="!", model_max_length=77)
    assert stock("wow!!")["input_ids"] != [BOS, 2781, 748, EOS]
    stock(["a", "a b"], padding=True)
    stock.save_pretrained(tmp_path)
    loaded = PyramidCLIPTokenizer.from_pretrained(tmp_path)
    assert loaded([row["text"] for row in golden])["input_ids"] == [row["ids"] for row in golden]
    assert loaded.all_special_ids == [BOS, EOS]


def test_own_vocabulary_and_added_tokens():
    vocab = {token: i for i, token in enumerate(["a", "b", "a</w>", "b</w>", "ab</w>", "<s>", "</s>"])}
    own = PyramidCLIPTokenizer(
        vocab=vocab, merges=[("a", "b</w>")], bos_token="<s>", eos_token="</s>", unk_token="</s>"
    )
    assert own(["AB a", "b"], padding=True)["input_ids"] == [[5, 4, 2, 6], [5, 3, 6, 0]]
    assert own.pad_token == "a"
    own.add_tokens([AddedToken("<new>", normalized=False)])
    assert own("a <new> b")["input_ids"] == [5, 2, 7, 3, 6]
    with pytest.raises(ValueError, match="together"):
        PyramidCLIPTokenizer(vocab=vocab)


def test_truncation_keeps_the_end_token_and_is_counted():
    tokenizer = PyramidCLIPTokenizer()
    out = tokenizer([LONG, "short", "word " * 75], padding=True, return_tensors="pt", return_truncation=True)
    assert out["input_ids"].shape == (3, 77)
    assert out["input_ids"][0, -1] == EOS
    assert out["truncated"].dtype == torch.bool
    assert out["truncated"].tolist() == [True, False, False]
    assert tokenizer.num_truncated == 1
    assert "truncated" not in tokenizer([LONG, "short"])
    assert tokenizer(LONG, return_truncation=True)["truncated"] is True
    assert tokenizer.num_truncated == 3
    assert len(tokenizer(LONG, truncation=False, verbose=False)["input_ids"]) == 102
    assert len(tokenizer.encode(LONG)) == 77
    assert tokenizer(LONG, max_length=10)["input_ids"] == [BOS, *[2653] * 8, EOS]


def test_decoding_stops_at_the_first_end_token(tokenizer):
    ids = tokenizer("It's a café!", padding="max_length")["input_ids"]
    assert tokenizer.decode(ids) == "<|startoftext|>it 's a café ! <|endoftext|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "it 's a café !"
    assert tokenizer.batch_decode(torch.tensor([ids, ids]), skip_special_tokens=True) == ["it 's a café !"] * 2
    assert tokenizer.decode([320, 2368]) == "a cat"
    assert tokenizer.decode(0) == "!"
    assert tokenizer.decode([BOS, 320, EOS, 2368, EOS], skip_special_tokens=True) == "a"


def test_special_tokens_in_the_text_count_only_where_the_reference_sees_them(tokenizer):
    assert tokenizer("cat<|endoftext|>dog")["input_ids"] == [BOS, 2368, EOS, 1929, EOS]
    assert tokenizer("cat <|ENDOFTEXT|><|endoftext|>")["input_ids"] == [BOS, 2368, EOS, EOS, EOS]
    assert tokenizer("!<|endoftext|>")["input_ids"].count(EOS) == 1


def test_pre_split_words_are_cleaned(tokenizer):
    words = [["A", "Café&amp;Bar"], ["wow!!"]]
    expected = tokenizer(["a café&bar", "wow!!"])["input_ids"]
    assert tokenizer(words, is_split_into_words=True)["input_ids"] == expected


@pytest.mark.parametrize("texts", [[], ["a", None], 3, [7]])
def test_what_is_no_text_is_refused(tokenizer, texts):
    with pytest.raises(ValueError, match="Expected"):
        tokenizer(texts)


def test_missing_ftfy_is_named_only_where_it_matters(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    assert tokenizer("wow!!")["input_ids"] == [BOS, 2781, 748, EOS]
    with pytest.raises(ImportError, match="pip install ftfy"):
        tokenizer("café")


def test_remote_code_works_where_the_package_cannot_be_imported(tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr(PyramidCLIPTokenizer, "_auto_class", "AutoTokenizer")
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "tokenization_pyramidclip.py").is_file()
    load = """
import json, sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "pyramidclip_hf":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hidden())
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(tokenizer).__module__.startswith("transformers_modules."), type(tokenizer)
rows = json.load(open(sys.argv[2], encoding="utf-8"))
assert tokenizer([row["text"] for row in rows])["input_ids"] == [row["ids"] for row in rows]
assert tokenizer(["a", "a b"], padding=True)["input_ids"][0][-1] == 0
try:
    type(tokenizer)()
except FileNotFoundError as error:
    assert "from_pretrained" in str(error)
"""
    # -I leaves out the working directory, and the finder above an installed package.
    code = [sys.executable, "-I", "-c", load, str(tmp_path), str(FIXTURES / "tokenizer_golden.json")]
    done = subprocess.run(code, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
