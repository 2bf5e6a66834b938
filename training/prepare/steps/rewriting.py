"""Adding levels to the samples of existing shards; everything else stays as it was, byte for byte."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from pyramidclip_hf.files import contents_of, json_text, visible, write_text
from pyramidclip_hf.handing_out import Advance, Phase
from training.data.records import BadSample, Region, Sample, json_bytes, members_from_sample, sample_from_members
from training.data.shards import (
    DATASET_FORMAT,
    ShardReader,
    ShardWriter,
    read_dataset_json,
    refuse_unfinished,
    write_dataset_json,
)
from training.prepare.steps.work import Stage, Tally, Worker

# Who made a level, as JSON: data sets with equal entries may be mixed.
MadeBy = dict[str, Any]


class Levels(TypedDict, total=False):
    """What a step adds to a sample; None takes a level away."""

    summary: str | None
    tags: list[str] | None
    regions: list[Region] | None
    roi: np.ndarray | None


NO_REGIONS: Levels = {"regions": None, "roi": None, "tags": None}


@dataclass
class Opened:
    """A sample of a shard that is being changed.

    Attributes:
        key: of the sample.
        where: the shard.
        members: {suffix: bytes} as read.
        sample: the checked sample; None where it does not fit the schema.
        levels: what the step adds.
    """

    key: str
    where: str
    members: dict[str, bytes]
    sample: Sample | None
    levels: Levels = field(default_factory=Levels)

    def members_now(self) -> dict[str, bytes]:
        """The members with the new levels in; everything else is as it was, byte for byte."""
        if not self.levels:
            return self.members
        levels = Sample(self.key, b"", "jpg", **self.levels)
        written = members_from_sample(levels)
        record = json.loads(self.members.get("json", b"{}"))
        for name in self.levels:
            record.pop(name, None)
        record.update(json.loads(written.get("json", b"{}")))
        members = {name: data for name, data in self.members.items() if name != "json"}
        if record:
            members["json"] = json_bytes(record)
        if "roi" in self.levels:
            members.pop("roi.npy", None)
            if "roi.npy" in written:
                members["roi.npy"] = written["roi.npy"]
        return members


# Takes the samples of one shard as they are read and gives each back, in order, with its new `levels`. A sample whose
# members do not fit the schema (`sample` is None) is to be handed on.
Change = Callable[[ShardReader, Iterator[Opened], Tally, Advance], Iterator[Opened]]


def shards_of(folder: str | Path) -> dict[str, Path]:
    """{name: path} of the shards in a folder, in order.

    Raises:
        FileNotFoundError: there are none.
    """
    shards = {shard.name: shard for shard in visible(folder, "*.tar")}
    if not shards:
        raise FileNotFoundError(
            f"no *.tar in {folder}: expected a folder that training.prepare.pack wrote, but {contents_of(folder)}"
        )
    return shards


class Rewriting:
    """A step that adds levels to the samples of existing shards, as a job (`steps.work.StageJob`).

    Args:
        stage: the step; its folder may be `source`.
        source: folder of the shards.
        change: gives the samples their levels; those whose bytes cannot be read are rejected before it sees them.
        describe: called with the total, to describe what is there.
        worker: which of several processes this is, for what it says of unfinished data.
        closing: may add to the total what no single shard knows.

    Raises:
        FileNotFoundError: `source` has no shards.
    """

    def __init__(
        self,
        stage: Stage,
        source: str | Path,
        change: Change,
        describe: Callable[[Tally], None],
        worker: Worker,
        closing: Callable[[Tally], None] | None = None,
    ):
        self.stage, self.change, self.describe, self.worker, self.closing = stage, change, describe, worker, closing
        self.shards = shards_of(source)
        sizes = (read_dataset_json(source) or {}).get("shards", {})
        self.items: dict[str, int | None] = {name: sizes.get(name, {}).get("samples") for name in self.shards}

    def phases(self) -> Iterator[Phase]:
        """One: all shards."""
        if any(self.stage.report(name) is None for name in self.worker.share(self.items)):
            mark_unfinished(self.stage)
        yield self.stage.phase(self.items, self._do)

    def _do(self, name: str, tally: Tally, advance: Advance) -> None:
        shard = self.shards[name]
        with ShardReader(shard) as reader, ShardWriter(self.stage.folder / name) as writer:
            if reader.truncated:
                tally.note(shard, None, "truncated-shard", "the tar ends in the middle: fetch it again")
            for opened in self.change(reader, _opened(reader, tally), tally, advance):
                try:
                    writer.write_members(opened.key, opened.members_now())
                except ValueError as error:  # a foreign shard with a key twice, or one that is no key
                    tally.reject(reader.name, opened.key, "bad-key", str(error))
                    continue
                tally.count("out")

    def finish(self) -> Tally | None:
        """The total, or None while shards are missing."""
        total = self.stage.finish(self.items, self.closing)
        if total is not None:
            self.describe(total)
        return total

    def told(self, result: Tally | None) -> str:
        """What people are told of the total."""
        return self.stage.summary(result)


def _opened(reader: ShardReader, tally: Tally) -> Iterator[Opened]:
    """The samples of a shard as `Opened`; those whose bytes cannot be read are rejected."""
    for i, key in enumerate(reader.keys):
        tally.count("in")
        try:
            members = reader.read(i)
        except BadSample as bad:
            tally.reject(bad.where, bad.key, bad.reason, bad.detail)
            continue
        try:
            sample = sample_from_members(members, key, reader.name)
        except BadSample as bad:
            tally.note(bad.where, bad.key, bad.reason, f"copied as it is: {bad.detail}")
            sample = None
        yield Opened(key, reader.name, members, sample)


def mark_unfinished(stage: Stage) -> None:
    """Says in `dataset.json` that a step has begun, so that half-made levels or half of the shards cannot pass for all.

    `refuse_unfinished` of `training.data.shards` is who looks.
    """
    content = read_dataset_json(stage.folder) or {"format": DATASET_FORMAT}
    if stage.name in content.get("unfinished", []):
        return
    content["unfinished"] = sorted({*content.get("unfinished", []), stage.name})
    write_text(stage.folder / "dataset.json", json_text(content, indent=1, ensure_ascii=False) + "\n")


def in_place(source: str | Path, folder: str | Path) -> bool:
    """Whether the changed shards of `source` go to where they were."""
    return Path(source).resolve() == Path(folder).resolve()


def refuse_half_made(source: str | Path, folder: str | Path, step: str) -> None:
    """Raises `ValueError` where another step on the shards of `source` has begun and not ended.

    It may yet write any of them again, without what `step` added, whose report would say that it is there.

    Args:
        source: folder of the shards.
        folder: where the changed ones go; in `source` itself, `step` continues what it began.
        step: that is about to begin.
    """
    described = read_dataset_json(source) or {}
    own = [step] if in_place(source, folder) else []
    refuse_unfinished(source, {"unfinished": [name for name in described.get("unfinished", []) if name not in own]})


def refuse_other_maker(folder: str | Path, level: str, made_by: MadeBy, overwrite: bool) -> MadeBy | None:
    """What `dataset.json` says that `level` was made by, or None.

    Raises:
        ValueError: that is something else than `made_by`, and `overwrite` is not set.
    """
    before: MadeBy | None = (read_dataset_json(folder) or {}).get("made_by", {}).get(level)
    if before is not None and before != made_by and not overwrite:
        raise ValueError(
            f"{folder} already has {level} made by {before}, not by {made_by}. --overwrite replaces them all; else "
            "start from the shards as they were packed, with another --output-dir"
        )
    return before


def describe_dataset(
    stage: Stage,
    source: str | Path,
    total: Tally,
    made_by: Mapping[str, MadeBy],
    roi_feature_size: int | None = None,
) -> None:
    """Writes `dataset.json` beside the finished shards: that of `source`, and what this step adds.

    Args:
        stage: the step; its folder has the shards.
        source: the folder whose `dataset.json` goes on.
        total: its counts are kept.
        made_by: {level: what made it} of this step.
        roi_feature_size: width of the region features; None keeps what `source` says.
    """
    before = read_dataset_json(source) or {}
    known = ("format", "made_by", "roi_feature_size", "counts", "shards", "unfinished")
    extra = {name: value for name, value in before.items() if name not in known}
    unfinished = [name for name in before.get("unfinished", []) if name != stage.name]
    if unfinished:
        extra["unfinished"] = unfinished
    counts = {name: value for name, value in before.get("counts", {}).items() if name != "samples"}
    counts[stage.name] = dict(sorted(total.counts.items()))
    width = before.get("roi_feature_size") if roi_feature_size is None else roi_feature_size
    write_dataset_json(stage.folder, {**before.get("made_by", {}), **made_by}, width, counts, **extra)
