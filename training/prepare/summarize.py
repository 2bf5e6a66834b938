"""Adds the summary level: a short sentence beside each caption.

    python -m training.prepare.summarize --input-dir data/mine --model t5-base --dry-run 20
    python -m training.prepare.summarize --input-dir data/mine --model t5-base
    python -m training.prepare.summarize --input-dir data/mine --model first-clause

`--model` is any seq2seq or causal checkpoint of Transformers, or `first-clause`, which is not a model. A text is
summarised once: results are kept in a cache by the content of text, model and settings, across data sets, runs and
kills.
"""

import difflib
import hashlib
import sqlite3
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from pyramidclip_command import answer_words, check_there, run_command
from training.prepare.steps.flags import WorkArguments, parse_dataclasses

NO_MODEL = "first-clause"


@dataclass
class SummaryConfig:
    """What decides a summary.

    The defaults are for alt-texts of some ten to eighty words; the paper names T5 and no settings. T5's checkpoints
    carry beams 4, length penalty 2, 30 to 200 tokens: settings of another model, for newspaper articles.

    - `min_words` 10: T5 copies or mangles texts that are already short; they pass through.
    - `max_input_tokens` 512: what T5 was trained with; longer captions are cut.
    - `length_penalty` 1.0: 2.0 favours long beams, against the purpose.
    - `min_new_tokens` 0: a minimum of 30 tokens makes it pad a caption of 20 with inventions.
    - `max_new_tokens` 48: without it generation stops at 20 tokens, in the middle of a sentence; and a summary is
      shorter than a caption of 77.
    - `no_repeat_ngram_size` 3 and `early_stopping`: beam search on keyword lists falls into loops otherwise.
    """

    model: str = field(default="t5-base", metadata={"help": "Checkpoint (folder or Hub name), or `first-clause`."})
    prompt: str | None = field(
        default=None, metadata={"help": "With {caption}; default: `summarize: ` or an instruction."}
    )
    min_words: int = field(default=10, metadata={"help": "Captions with fewer words are their own summary."})
    max_input_tokens: int = field(default=512, metadata={"help": "Longer captions are cut."})
    num_beams: int = field(
        default=4, metadata={"help": "Beams of the search; 1 is greedy and about three times as fast."}
    )
    length_penalty: float = field(default=1.0, metadata={"help": "Above 1 favours longer summaries."})
    min_new_tokens: int = field(default=0, metadata={"help": "Least tokens of a summary."})
    max_new_tokens: int = field(default=48, metadata={"help": "Most tokens of a summary."})
    no_repeat_ngram_size: int = field(default=3, metadata={"help": "No sequence of so many tokens twice."})
    early_stopping: bool = field(default=True, metadata={"help": "Stop when all beams have ended."})
    batch_size: int = field(default=32, metadata={"help": "Captions generated at once."})
    pad_to_multiple_of: int = field(
        default=16, metadata={"help": "Captions are batched by length, rounded up to this."}
    )
    dtype: str = field(
        default="auto", metadata={"help": "float32, bfloat16 or float16; auto: bfloat16 on accelerators."}
    )
    revision: str | None = field(default=None, metadata={"help": "Revision of a Hub checkpoint."})


@dataclass
class SummarizeArguments:
    """What to read and where to write."""

    input_dir: str = field(metadata={"help": "Folder of shards."})
    output_dir: str | None = field(default=None, metadata={"help": "Where the changed shards go (default: in place)."})
    cache: str | None = field(default=None, metadata={"help": "Cache file (default: in the cache folder)."})
    dry_run: int = field(
        default=0, metadata={"help": "Print so many captions with their summaries and change nothing."}
    )


@dataclass
class SummarizeSettings:
    """All flags."""

    places: SummarizeArguments
    summary: SummaryConfig
    work: WorkArguments


def parse(words: Sequence[str]) -> SummarizeSettings:
    """The words of the command as settings. Raises `ValueError`."""
    settings = SummarizeSettings(*parse_dataclasses(words, __doc__, SummarizeArguments, SummaryConfig, WorkArguments))
    _check(settings.summary)
    check_there("--input-dir", settings.places.input_dir, "a folder of shards, as training.prepare.pack writes them")
    _check_name(settings.summary.model)
    check_there("--model", settings.summary.model, f"a folder, a Hub name, or {NO_MODEL}", "id")
    return settings


def _check_name(model: str) -> None:
    """ValueError where `first-clause` was meant: as a name of the Hub it would be looked for in vain."""
    if "/" in model or model == NO_MODEL or Path(model).exists():
        return
    if difflib.get_close_matches(model.lower().replace("_", "-"), [NO_MODEL], cutoff=0.8):
        raise ValueError(f"--model {model}: there is no such folder here; did you mean {NO_MODEL}?")


def _check(config: SummaryConfig) -> None:
    positive = ("max_input_tokens", "num_beams", "max_new_tokens", "batch_size", "pad_to_multiple_of")
    wrong = [name for name in positive if getattr(config, name) < 1]
    if wrong:
        raise ValueError(f"{', '.join(f'{name}={getattr(config, name)}' for name in wrong)}: expected 1 or more")
    if config.prompt is not None and "{caption}" not in config.prompt:
        raise ValueError(f"prompt {config.prompt!r}: expected {{caption}} in it, where the caption goes")
    if config.dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype {config.dtype!r}: expected auto, float32, bfloat16 or float16")


if __name__ == "__main__":
    answer_words(parse)

import torch

from pyramidclip_hf.files import cache_folder, json_text
from pyramidclip_hf.handing_out import Advance
from pyramidclip_hf.loading import warn_of_slow_type
from training.data.machine import own_name
from training.data.records import BadSample, sample_from_members
from training.data.shards import ShardReader
from training.prepare.steps.checkpoints import checkpoint_config, checkpoint_content, checkpoint_expected
from training.prepare.steps.databases import errors_of
from training.prepare.steps.first_clause import first_clause
from training.prepare.steps.rewriting import (
    MadeBy,
    Opened,
    Rewriting,
    describe_dataset,
    in_place,
    refuse_half_made,
    refuse_other_maker,
    shards_of,
)
from training.prepare.steps.work import Stage, Tally, Worker, ray_worker, refuse_nothing, run_job, this_worker

STAGE = "summary"


SEQ2SEQ_PROMPT = "summarize: {caption}"


CAUSAL_PROMPT = (
    "Rewrite this image caption as one short plain sentence about what can be seen.\nCaption: {caption}\nShort:"
)


class Summarizer(Protocol):
    """What makes summaries; `made_by` is what `dataset.json` says of it."""

    made_by: MadeBy

    def summarize(self, captions: Sequence[str], advance: Advance = ...) -> dict[str, str]:
        """{caption: summary} for distinct captions; `advance` hears how many are done."""
        ...


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(parse, run, argv)


def run(settings: SummarizeSettings) -> None:
    """Summarises and reports."""
    total = summarize(settings)
    refuse_nothing(total, [settings.places.input_dir])


def summarize(settings: SummarizeSettings) -> Tally | None:
    """Summarises this process's share; returns the total, or None after a dry run or while others are not finished.

    Raises:
        ValueError: the model cannot be used, or the shards have summaries of another.
        FileNotFoundError: there are no shards.
    """
    shards_of(settings.places.input_dir)
    if settings.places.dry_run:
        device = this_worker(settings.work, _has_model(settings)).device
        summarizer = open_summarizer(settings.summary, device, settings.places.cache)
        print_pairs(summarizer, settings.places.input_dir, settings.places.dry_run)
        return None
    target = "training.prepare.summarize:worker_job"
    return run_job(target, open_job, settings, settings.work, _has_model(settings))


def _has_model(settings: SummarizeSettings) -> bool:
    return settings.summary.model != NO_MODEL


def worker_job(settings: SummarizeSettings) -> Rewriting:
    """The job of a worker of Ray."""
    return open_job(settings, ray_worker(settings.work, _has_model(settings)))


def open_job(settings: SummarizeSettings, worker: Worker) -> Rewriting:
    """The step as a job; raises as `summarize`."""
    arguments, overwrite = settings.places, settings.work.overwrite
    folder = arguments.output_dir or arguments.input_dir
    refuse_half_made(arguments.input_dir, folder, STAGE)
    summarizer = open_summarizer(settings.summary, worker.device, arguments.cache)
    refuse_other_maker(arguments.input_dir, "summary", summarizer.made_by, overwrite)
    stage = Stage(folder, STAGE, summarizer.made_by, overwrite, anew=not in_place(arguments.input_dir, folder))

    def describe(total: Tally) -> None:
        describe_dataset(stage, arguments.input_dir, total, {"summary": summarizer.made_by})

    return Rewriting(stage, arguments.input_dir, Change(summarizer), describe, worker)


def open_summarizer(
    config: SummaryConfig, device: str | torch.device = "cpu", cache: str | Path | None = None
) -> Summarizer:
    """The `FirstClause` or `ModelSummarizer` that `config` names.

    Args:
        config: model and settings.
        device: where the model runs.
        cache: file of the summaries made so far; None: the one in the cache folder.

    Raises:
        ValueError: there is no such checkpoint.
    """
    if config.model == NO_MODEL:
        return FirstClause()
    with checkpoint_expected(config.model, "--model"):
        return ModelSummarizer(config, device, SummaryCache(cache or _own_cache()))


def _no_progress(number: int) -> None:
    pass


class FirstClause:
    """The first clause without junk words (`steps.first_clause`); no model, and it does not claim to be one."""

    made_by: MadeBy = {"maker": NO_MODEL}

    def summarize(self, captions: Sequence[str], advance: Advance = _no_progress) -> dict[str, str]:
        """{caption: summary} for distinct captions."""
        advance(len(captions))
        return {caption: first_clause(caption) for caption in captions}


def _own_cache() -> Path:
    # SQLite relies on locks, which file systems between machines may lack.
    return cache_folder() / own_name("summaries.sqlite", cache_folder())


class SummaryCache:
    """Summaries by content in one SQLite file, which several processes of a machine may share.

    What is in it survives a kill.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with errors_of(self.path):
            self.connection = sqlite3.connect(self.path, timeout=120)
            self.connection.execute(
                "create table if not exists summaries (key blob primary key, summary text not null) without rowid"
            )

    def get(self, keys: Iterable[bytes]) -> dict[bytes, str]:
        """{key: summary} of those keys that are there."""
        found: dict[bytes, str] = {}
        keys = list(keys)
        for start in range(0, len(keys), 500):
            some = keys[start : start + 500]
            marks = ",".join("?" * len(some))
            with errors_of(self.path):
                query = f"select key, summary from summaries where key in ({marks})"
                found.update(self.connection.execute(query, some))
        return found

    def put(self, pairs: Sequence[tuple[bytes, str]]) -> None:
        """Stores (key, summary) pairs; one that is there stays."""
        with errors_of(self.path), self.connection:
            self.connection.executemany("insert or ignore into summaries values (?, ?)", pairs)


class ModelSummarizer:
    """Summaries by a Transformers checkpoint.

    Batches have captions of one length class only (padded to the next multiple of `pad_to_multiple_of`), and always
    `batch_size` rows, the last one repeated: every text meets the same tensor shapes whatever its neighbours are, so
    rounding, and with it the summary, does not depend on which other texts the cache already had. That is what makes a
    continued run equal to an undisturbed one.
    """

    def __init__(self, config: SummaryConfig, device: str | torch.device, cache: SummaryCache):
        from transformers import (
            MODEL_FOR_CAUSAL_LM_MAPPING,
            MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
            AutoModelForCausalLM,
            AutoModelForSeq2SeqLM,
            AutoTokenizer,
        )

        self.config, self.device, self.cache = config, torch.device(device), cache
        dtype = config.dtype
        warn_of_slow_type("--dtype", dtype, self.device)
        if dtype == "auto":
            dtype = "float32" if self.device.type == "cpu" else "bfloat16"
        described = checkpoint_config(config.model, config.revision, "--model")
        self.is_seq2seq = bool(described.is_encoder_decoder)
        loader = AutoModelForSeq2SeqLM if self.is_seq2seq else AutoModelForCausalLM
        kinds = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if self.is_seq2seq else MODEL_FOR_CAUSAL_LM_MAPPING
        if type(described) not in kinds:  # transformers would name all that are
            raise ValueError(
                f"--model {config.model} is of the kind {described.model_type!r}, which writes no text: expected a "
                f"sequence-to-sequence or causal language model, as t5-base is, or {NO_MODEL}"
            )
        # Any: their classes are typed for one kind of model or another, and for batches as well as for single texts.
        self.model: Any = loader.from_pretrained(config.model, revision=config.revision, dtype=getattr(torch, dtype))
        self.model.eval().to(self.device)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(config.model, revision=config.revision)
        self.tokenizer.padding_side = "right" if self.is_seq2seq else "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.prompt = config.prompt or (SEQ2SEQ_PROMPT if self.is_seq2seq else CAUSAL_PROMPT)
        settings = {**asdict(config), "prompt": self.prompt, "dtype": dtype}
        content = checkpoint_content(config.model, described)
        name = settings.pop("model")
        maker = Path(name).resolve().name if Path(name).is_dir() else name
        self.made_by: MadeBy = {"maker": maker, "content": content, "settings": settings}
        self._prefix = json_text([content, settings], sort_keys=True).encode()

    def key(self, caption: str) -> bytes:
        """The cache key of a caption: 16 bytes of the hash of model, settings and text."""
        return hashlib.sha256(self._prefix + b"\0" + caption.encode("utf-8", "surrogatepass")).digest()[:16]

    def summarize(self, captions: Sequence[str], advance: Advance = _no_progress) -> dict[str, str]:
        """{caption: summary} for distinct captions; short ones are their own, known ones come from the cache."""
        long = [caption for caption in captions if len(caption.split()) >= self.config.min_words]
        summaries = {caption: caption for caption in captions if len(caption.split()) < self.config.min_words}
        keys = {caption: self.key(caption) for caption in long}
        known = self.cache.get(keys.values())
        summaries.update({caption: known[key] for caption, key in keys.items() if key in known})
        advance(len(summaries))
        for batch, ids in self._batches([caption for caption in long if caption not in summaries]):
            made = dict(zip(batch, self._generate(ids)))
            self.cache.put([(keys[caption], summary) for caption, summary in made.items()])
            summaries.update(made)
            advance(len(batch))
        return summaries

    def _batches(self, captions: Sequence[str]) -> Iterator[tuple[list[str], list[list[int]]]]:
        """Yields (captions, token ids) batches of one length class, short ones first."""
        classes: dict[int, list[tuple[str, list[int]]]] = defaultdict(list)
        step = self.config.pad_to_multiple_of
        for caption in sorted(captions):
            ids = self._token_ids(caption)
            classes[-(-len(ids) // step) * step].append((caption, ids))
        for length in sorted(classes):
            members = iter(classes[length])
            while batch := list(islice(members, self.config.batch_size)):
                yield [caption for caption, _ in batch], [ids for _, ids in batch]

    def _token_ids(self, caption: str) -> list[int]:
        """The ids of the prompt around a caption, which is cut to `max_input_tokens` where it is longer."""
        ids = self._prompted(caption)
        excess = len(ids) - self.config.max_input_tokens
        if excess > 0:
            own = self.tokenizer(caption, add_special_tokens=False)["input_ids"]
            ids = self._prompted(self.tokenizer.decode(own[: max(len(own) - excess, 1)], skip_special_tokens=True))
        return ids[: self.config.max_input_tokens]

    def _prompted(self, caption: str) -> list[int]:
        text = self.prompt.replace("{caption}", caption)
        if not self.is_seq2seq and self.tokenizer.chat_template:
            turns = [{"role": "user", "content": text}]
            return self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        return self.tokenizer(text)["input_ids"]

    @torch.inference_mode()
    def _generate(self, ids: list[list[int]]) -> list[str]:
        config, rows = self.config, len(ids)
        filled = {"input_ids": ids + [ids[-1]] * (config.batch_size - rows)}
        inputs = self.tokenizer.pad(filled, pad_to_multiple_of=config.pad_to_multiple_of, return_tensors="pt").to(
            self.device
        )
        outputs = self.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=False,
            num_beams=config.num_beams,
            length_penalty=config.length_penalty if config.num_beams > 1 else None,
            early_stopping=config.early_stopping if config.num_beams > 1 else None,
            min_new_tokens=config.min_new_tokens or None,
            max_new_tokens=config.max_new_tokens,
            no_repeat_ngram_size=config.no_repeat_ngram_size or None,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        if not self.is_seq2seq:
            outputs = outputs[:, inputs["input_ids"].shape[1] :]
        texts = self.tokenizer.batch_decode(outputs[:rows], skip_special_tokens=True)
        if not self.is_seq2seq:
            texts = [text.strip().partition("\n")[0] for text in texts]
        return [" ".join(text.split()) for text in texts]


class Change:
    """The step on one shard (`steps.rewriting.Change`): all its captions first, then the samples with summaries."""

    def __init__(self, summarizer: Summarizer):
        self.summarizer = summarizer

    def __call__(
        self, reader: ShardReader, samples: Iterator[Opened], tally: Tally, advance: Advance
    ) -> Iterator[Opened]:
        """Gives back the samples of a shard with their summaries."""
        captions = captions_of(reader)
        summaries = self.summarizer.summarize(list(dict.fromkeys(captions)), advance)
        advance(len(reader) - len(summaries))
        for opened in samples:
            caption = opened.sample.caption if opened.sample is not None else None
            if opened.sample is not None and caption is None:
                tally.note(opened.where, opened.key, "no-caption", "nothing to summarise")
            elif caption is not None:
                summary = summaries[caption].strip()
                opened.levels["summary"] = summary or None
                tally.count("summaries" if summary else "summaries_empty")
                tally.count("summaries_equal_to_caption", summary == caption)
                if not summary:
                    tally.note(
                        opened.where, opened.key, "empty-summary", f"the model said nothing about {caption[:80]!r}"
                    )
            yield opened


def captions_of(reader: ShardReader) -> list[str]:
    """The captions of a shard in order.

    Without those of samples that cannot be read, which are named when they are copied.
    """
    captions = []
    for i, key in enumerate(reader.keys):
        try:
            sample = sample_from_members(reader.read(i, ("txt", "json")), key, reader.name, require_image=False)
        except BadSample:
            continue
        if sample.caption is not None:
            captions.append(sample.caption)
    return captions


def print_pairs(summarizer: Summarizer, folder: str, number: int) -> None:
    """Prints `number` captions of a folder with their summaries.

    Raises:
        FileNotFoundError: there are no captions.
    """
    captions: list[str] = []
    for shard in shards_of(folder).values():
        with ShardReader(shard) as reader:
            captions += captions_of(reader)
        if len(captions) >= number:
            break
    if not captions:
        raise FileNotFoundError(
            f"no captions in the *.tar of {folder}: expected a folder that training.prepare.pack wrote"
        )
    summaries = summarizer.summarize(list(dict.fromkeys(captions[:number])))
    for caption in captions[:number]:
        print(f"before: {caption}\nafter:  {summaries[caption]}\n")


if __name__ == "__main__":
    sys.exit(main())
