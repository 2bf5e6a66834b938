"""Packs any collection of pictures with texts into the shards that training reads.

    python -m training.prepare.pack --input captions.csv --output-dir data/mine
    torchrun --nproc-per-node 16 -m training.prepare.pack --input 'laion/*.tar' --output-dir data/laion

Pictures are copied byte for byte, and so are all other members of a tar. What cannot be used is rejected by name:
pictures that are not JPEG, PNG or WebP, cannot be decoded or have too many pixels; pairs without a caption; keys that
came before. See docs/prepare.md.
"""

import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path

from pyramidclip_command import answer_words, check_there, run_command
from training.prepare.steps.flags import (
    PAIRS,
    TABLE_SUFFIXES,
    PackArguments,
    PackSettings,
    SourceArguments,
    WorkArguments,
    parse_dataclasses,
)


def parse(words: Sequence[str]) -> PackSettings:
    """The words of the command as settings. Raises `ValueError`."""
    settings = PackSettings(*parse_dataclasses(words, __doc__, SourceArguments, PackArguments, WorkArguments))
    for one in settings.source.input:
        kind = "data" if one.endswith((".tar", *TABLE_SUFFIXES)) else "id"
        check_there("--input", one, f"{PAIRS}, or the name of a Hub dataset", kind)
    return settings


if __name__ == "__main__":
    answer_words(parse)

import numpy as np

from pyramidclip_hf.files import json_text, write_atomically
from pyramidclip_hf.handing_out import Advance, Phase
from training.data.records import IMAGE_SUFFIXES, BadSample, sample_from_members
from training.data.shards import ShardWriter
from training.prepare.sources import PairSource, RawPair, SourcePart, expand_inputs, open_source, refuse_own_folder
from training.prepare.sources.tars import described_whole
from training.prepare.steps.pictures import picture_suffix
from training.prepare.steps.rewriting import MadeBy, describe_dataset, mark_unfinished
from training.prepare.steps.work import (
    Stage,
    StageReport,
    Tally,
    Worker,
    first_fault,
    ray_worker,
    refuse_nothing,
    run_job,
)

STAGE = "pack"


# Keys are compared within buckets of about this many, so that 100 million of them need little memory at a time.
_BUCKET = 1 << 22


# {position in a part: where the key came first}.
Repeats = dict[int, str]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(parse, run, argv)


def run(settings: PackSettings) -> None:
    """Packs and reports."""
    refuse_empty(pack(settings), settings.source.input)


def refuse_empty(total: Tally | None, inputs: Sequence[str]) -> None:
    """Raises `ValueError` where no pair came in, or none of them could be used."""
    refuse_nothing(total, inputs)
    if total is not None and not total.counts["out"]:
        raise ValueError(f"none of the {total.counts['in']} pairs could be used{first_fault(total)}")


def pack(settings: PackSettings) -> Tally | None:
    """Packs this process's share; returns the total, or None while others have not finished theirs.

    Raises:
        ValueError: the input cannot be used, or the output holds something else.
        FileNotFoundError: the input is not there.
    """
    settings.source.input = expand_inputs(settings.source.input)
    refuse_own_folder(settings.source.input, settings.pack.output_dir)
    return run_job("training.prepare.pack:worker_job", open_job, settings, settings.work)


def worker_job(settings: PackSettings) -> "Packing":
    """The job of a worker of Ray."""
    return open_job(settings, ray_worker(settings.work, has_model=False))


def open_job(settings: PackSettings, worker: Worker) -> "Packing":
    """The step as a job; raises as `pack`."""
    return Packing(settings, worker)


class Packing:
    """All parts of the source, as a job: first the keys are listed, then the shards are written.

    Args:
        settings: of the command.
        worker: who does it.
        source: of the pairs; the one that the settings name where it is None.
    """

    def __init__(self, settings: PackSettings, worker: Worker, source: PairSource | None = None):
        self.settings, self.worker = settings, worker
        self.source = source or open_source(settings.source)
        described_whole(self.source)
        self.stage = Stage(settings.pack.output_dir, STAGE, settings.that_decide(), settings.work.overwrite, anew=True)
        self.parts: dict[str, SourcePart] = {}

    def phases(self) -> Iterator[Phase]:
        """The keys, where they are compared over the whole source, and the shards."""
        parts = self.parts = _plan(self.stage, self.source)
        rows = {name: part.rows for name, part in parts.items()}
        repeats: dict[str, Repeats] = {}
        if self.source.has_keys and self.settings.pack.duplicates == "dataset":
            folder = self.stage.reports / f"keys-{self.stage.fingerprint}"
            folder.mkdir(exist_ok=True)
            found = folder / "duplicates.json"

            def is_listed(name: str) -> bool:
                return found.exists() or (folder / f"{name}.npy").exists()

            def list_keys(name: str, advance: Advance) -> None:
                hashes = np.array([_hash(key) for key in self.source.keys(parts[name])], np.uint64)
                buffer = io.BytesIO()
                np.save(buffer, hashes)
                write_atomically(folder / f"{name}.npy", buffer.getvalue())
                advance(len(hashes))

            yield Phase("keys", rows, is_listed, list_keys, wanted_whole=True)
            repeats = _read_repeats(found, folder, list(parts))
        packer = Packer(self.stage, self.source, self.settings, repeats)
        if any(self.stage.report(name) is None for name in self.worker.share(parts)):
            mark_unfinished(self.stage)

        def do(name: str, tally: Tally, advance: Advance) -> None:
            packer.pack(parts[name], tally, advance)

        yield self.stage.phase(rows, do)

    def finish(self) -> Tally | None:
        """The total, or None while parts are missing."""
        total = self.stage.finish(self.parts)
        if total is not None:
            _remove_stale(self.stage)
            made_by = {STAGE: _made_by(self.settings.source, self.source)}
            describe_dataset(self.stage, self.stage.folder, total, made_by)
        return total

    def told(self, result: Tally | None) -> str:
        """What people are told of the total."""
        return self.stage.summary(result)


def _remove_stale(stage: Stage) -> None:
    """Takes away shards that this step made here with other settings and has now replaced by others (--overwrite)."""
    for path in stage.reports.glob("*.json"):
        item = path.stem
        if item not in ("settings", "plan") and stage.report(item) is None:
            for stale in (stage.folder / f"{item}.tar", stage.folder / f"{item}.tar.index.json", path):
                stale.unlink(missing_ok=True)


def _made_by(arguments: SourceArguments, source: PairSource) -> MadeBy:
    return {"source": source.name, "input": [Path(name).name for name in arguments.input][:20]}


def _plan(stage: Stage, source: PairSource) -> dict[str, SourcePart]:
    """{name: part}, made once and kept beside the reports: cutting a long table means reading it through."""
    path = stage.reports / "plan.json"
    if path.exists():
        plan = json.loads(path.read_text(encoding="utf-8"))
        if plan["fingerprint"] == stage.fingerprint:
            return {part["name"]: SourcePart(**part) for part in plan["parts"]}
    parts = source.parts()
    plan = {"fingerprint": stage.fingerprint, "parts": [asdict(part) for part in parts]}
    write_atomically(path, (json_text(plan) + "\n").encode())
    return {part.name: part for part in parts}


def _read_repeats(found: Path, folder: Path, names: Sequence[str]) -> dict[str, Repeats]:
    """{part name: repeats}, for all keys that came before in the order of the source, from the lists of keys."""
    if not found.exists():
        write_atomically(found, (json_text(_repeated(folder, names)) + "\n").encode())
    table = json.loads(found.read_text(encoding="utf-8"))
    return {name: {int(position): first for position, first in positions.items()} for name, positions in table.items()}


def _hash(key: str | None) -> int:
    """64 bits of a key; 0 stands for rows without one.

    Among 100 million keys two agree by accident once in 3,700 data sets.
    """
    if key is None:
        return 0
    return int.from_bytes(blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little") or 1


def _repeated(folder: Path, names: Sequence[str]) -> dict[str, Repeats]:
    """{part name: {position: "PART:POSITION" of the first one}} from the listed hashes.

    Hashes that are sorted, and no database: finding the repeats of a million keys took SQLite twenty times as long.
    """
    lists = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in names]
    starts = np.cumsum([0] + [len(hashes) for hashes in lists])
    buckets = int(starts[-1]) // _BUCKET + 1
    repeated: dict[str, Repeats] = {}
    for bucket in range(buckets):
        chosen = [np.flatnonzero(hashes % np.uint64(buckets) == bucket) for hashes in lists]
        hashes = np.concatenate([values[rows] for values, rows in zip(lists, chosen)])
        rows = np.concatenate([start + rows for start, rows in zip(starts, chosen)])
        order = np.argsort(hashes, kind="stable")
        hashes, rows = hashes[order], rows[order]
        again = np.flatnonzero((hashes[1:] == hashes[:-1]) & (hashes[1:] != 0)) + 1
        first = np.searchsorted(hashes, hashes[again])
        for row, origin in zip(rows[again].tolist(), rows[first].tolist()):
            part = int(np.searchsorted(starts, row, side="right")) - 1
            origin_part = int(np.searchsorted(starts, origin, side="right")) - 1
            where = f"{names[origin_part]}:{origin - int(starts[origin_part])}"
            repeated.setdefault(names[part], {})[row - int(starts[part])] = where
    return {name: dict(sorted(repeated[name].items())) for name in names if name in repeated}


class Packer:
    """Checks the samples of one part after the other and writes them."""

    def __init__(self, stage: Stage, source: PairSource, settings: PackSettings, repeats: dict[str, Repeats]):
        self.stage, self.source, self.settings, self.repeats = stage, source, settings, repeats

    def pack(self, part: SourcePart, tally: Tally, advance: Advance) -> None:
        """One part into one shard, or into a row of shards where its length is not known before."""
        if part.rows is None and self.source.is_stream:
            self._pack_stream(part, tally, advance)
        else:
            self._write(part.name, self.source.read(part), self.repeats.get(part.name, {}), tally, advance)

    def _pack_stream(self, part: SourcePart, tally: Tally, advance: Advance) -> None:
        """Shards PART-0000, PART-0001, ...

        Each has a report of its own, so that a stream continues behind the last finished one.
        """
        step, number, skip = self.settings.source.samples_per_shard, 0, 0
        repeated = self.repeats.get(part.name, {})
        pieces: list[StageReport] = []
        while (report := self.stage.report(f"{part.name}-{number:04d}")) is not None:
            pieces.append(report)
            skip, number = skip + report["counts"]["in"], number + 1
            advance(report["counts"]["in"])
        rows = self.source.read(part, skip)
        while piece_rows := list(islice(rows, 1)):
            name, piece = f"{part.name}-{number:04d}", Tally()
            here = {position - skip: where for position, where in repeated.items()}
            self._write(name, chain(piece_rows, islice(rows, step - 1)), here, piece, advance)
            pieces.append(self.stage.save(name, piece))
            skip, number = skip + piece.counts["in"], number + 1
        for report in pieces:
            tally.add(report)

    def _write(self, name: str, rows: Iterable[RawPair], repeated: Repeats, tally: Tally, advance: Advance) -> None:
        path = self.stage.folder / f"{name}.tar"
        path.unlink(missing_ok=True)
        seen: set[str] = set()
        with ShardWriter(path) as writer:
            for position, raw in enumerate(rows):
                advance(1)
                if raw.is_note and raw.fault is not None:
                    tally.note(raw.where, None, *raw.fault)
                    continue
                tally.count("in")
                try:
                    if position in repeated:
                        raise BadSample(
                            raw.key, raw.where, "duplicate-key", f"the key came before, at {repeated[position]}"
                        )
                    if raw.key is not None and raw.key in seen:
                        raise BadSample(raw.key, raw.where, "duplicate-key", "the key came before in this shard")
                    if raw.key is not None:
                        seen.add(raw.key)
                    members = self._checked(raw)
                    writer.write_members(raw.key or "", members)
                    tally.count("out")
                except BadSample as bad:
                    tally.reject(raw.where, raw.key, bad.reason, bad.detail, raw.line)
                except ValueError as error:
                    tally.reject(raw.where, raw.key, "bad-key", str(error), raw.line)
        if not tally.counts["out"]:
            path.unlink()
            Path(f"{path}.index.json").unlink()

    def _checked(self, raw: RawPair) -> dict[str, bytes]:
        """The members to write. Raises `BadSample`."""
        if raw.fault is not None:
            raise BadSample(raw.key, raw.where, *raw.fault)
        if raw.picture is None:
            raise BadSample(raw.key, raw.where, "no-image", f"found {', '.join(sorted(raw.members)) or 'nothing'}")
        try:
            own = self.settings.pack
            suffix = picture_suffix(raw.picture, own.max_image_pixels, own.check == "decode")
        except BadSample as bad:
            raise BadSample(raw.key, raw.where, bad.reason, bad.detail) from None
        others = [name for name in (*IMAGE_SUFFIXES, "jpeg") if name in raw.members]
        if others:
            detail = f"a .{suffix} and a .{others[0]}: nothing says which one the text is about"
            raise BadSample(raw.key, raw.where, "two-pictures", detail)
        members = {suffix: raw.picture, **raw.members}
        sample = sample_from_members(members, raw.key or "", raw.where)
        if sample.caption is None:
            raise BadSample(raw.key, raw.where, "no-caption", "the text is missing or blank")
        return members


if __name__ == "__main__":
    sys.exit(main())
