"""Packs any collection of pictures with texts into the shards that training reads.

    python -m training.prepare.pack --input captions.csv --output-dir data/mine
    torchrun --nproc-per-node 16 -m training.prepare.pack --input 'laion/*.tar' --output-dir data/laion

Pictures are copied byte for byte, and so are all other members of a tar. What cannot be used is rejected by name:
pictures that are not JPEG, PNG or WebP, cannot be decoded or have too many pixels; pairs without a caption; keys that
came before. See docs/prepare.md.
"""

import glob
import io
import json
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from pyramidclip_hf.files import write_atomically
from training.data.records import IMAGE_SUFFIXES, BadSample, sample_from_members
from training.data.remote import is_url
from training.data.shards import ShardWriter
from training.prepare.sources import Part, SourceArguments, open_source
from training.prepare.steps.pictures import picture_suffix
from training.prepare.steps.work import Stage, Tally, WorkArguments, describe_dataset, parse, this_worker

STAGE = "pack"
# Keys are compared within buckets of about this many, so that 100 million of them need little memory at a time.
_BUCKET = 1 << 22


@dataclass
class PackArguments:
    """What to write, and what to refuse."""

    output_dir: str = field(metadata={"help": "Folder of the shards."})
    max_image_pixels: int = field(
        default=100_000_000, metadata={"help": "Larger pictures are refused by their header."}
    )
    check: Literal["decode", "header"] = field(
        default="decode",
        metadata={
            "help": "`decode` finds pictures that break off; `header` only reads their first bytes and is faster."
        },
    )
    duplicates: Literal["dataset", "shard"] = field(
        default="dataset",
        metadata={"help": "Where keys must be unique: `dataset` lists all keys first, `shard` saves that pass."},
    )


def main(argv=None):
    source_arguments, arguments, work = parse(SourceArguments, PackArguments, WorkArguments, argv=argv)
    source_arguments.input = _expand(source_arguments.input)
    worker = this_worker(work, has_model=False)
    _refuse_own_folder(source_arguments.input, arguments.output_dir)
    source = open_source(source_arguments)
    stage = Stage(arguments.output_dir, STAGE, _settings(source_arguments, arguments), work.overwrite)
    parts = _plan(stage, source)
    duplicates = _find_duplicates(stage, source, parts, worker) if _looks_everywhere(source, arguments) else {}
    packer = Packer(stage, source, arguments, duplicates)
    stage.run(
        {name: part.rows for name, part in parts.items()}, lambda *job: packer.pack(parts[job[0]], *job[1:]), worker
    )
    total = stage.finish(parts)
    if total is not None:
        _remove_stale(stage)
        describe_dataset(stage, stage.folder, total, {STAGE: _made_by(source_arguments, source)})
    if worker.index == 0 or total is not None:
        print(stage.summary(total))
    return total


def _expand(inputs):
    expanded = []
    for name in inputs:
        found = sorted(glob.glob(name)) if not is_url(name) and glob.has_magic(name) else [name]
        if not found:
            raise FileNotFoundError(f"--input {name} matches no file")
        expanded += found
    return expanded


def _refuse_own_folder(inputs, output_dir):
    inside = [
        name for name in inputs if not is_url(name) and Path(output_dir).resolve() in Path(name).resolve().parents
    ]
    if inside and any(name.endswith(".tar") for name in inside):
        raise ValueError(f"--output_dir {output_dir} holds the input {inside[0]}: choose another folder")


def _remove_stale(stage):
    """Takes away shards that this step made here with other settings and has now replaced by others (--overwrite)."""
    for path in stage.reports.glob("*.json"):
        item = path.stem
        if item not in ("settings", "plan") and stage.report(item) is None:
            for stale in (stage.folder / f"{item}.tar", stage.folder / f"{item}.tar.index.json", path):
                stale.unlink(missing_ok=True)


def _settings(source_arguments, arguments):
    settings = {**asdict(source_arguments), **asdict(arguments)}
    del settings["output_dir"]
    return settings


def _made_by(source_arguments, source):
    return {
        "source": type(source).__name__.removesuffix("Source").lower(),
        "input": [Path(n).name for n in source_arguments.input][:20],
    }


def _looks_everywhere(source, arguments):
    return source.has_keys and arguments.duplicates == "dataset"


def _plan(stage, source):
    """{name: Part}, made once and kept beside the reports: cutting a long table means reading it through."""
    path = stage.reports / "plan.json"
    if path.exists():
        plan = json.loads(path.read_text(encoding="utf-8"))
        if plan["fingerprint"] == stage.fingerprint:
            return {part["name"]: Part(**part) for part in plan["parts"]}
    parts = source.parts()
    plan = {"fingerprint": stage.fingerprint, "parts": [asdict(part) for part in parts]}
    write_atomically(path, (json.dumps(plan) + "\n").encode())
    return {part.name: part for part in parts}


def _find_duplicates(stage, source, parts, worker):
    """{part name: {position: where the key came first}}, for all keys that came before in the order of the source.

    Every process lists the keys of its own parts and then those that nobody has listed yet, so none waits for another.
    """
    folder = stage.reports / f"keys-{stage.fingerprint}"
    folder.mkdir(exist_ok=True)
    found = folder / "duplicates.json"
    if not found.exists():
        for name in worker.shared_after_own(parts):
            if not (folder / f"{name}.npy").exists():
                hashes = np.array([_hash(key) for key in source.keys(parts[name])], np.uint64)
                buffer = io.BytesIO()
                np.save(buffer, hashes)
                write_atomically(folder / f"{name}.npy", buffer.getvalue())
        write_atomically(found, (json.dumps(_repeated(folder, list(parts))) + "\n").encode())
    table = json.loads(found.read_text(encoding="utf-8"))
    return {name: {int(position): first for position, first in positions.items()} for name, positions in table.items()}


def _hash(key):
    """64 bits of a key; 0 stands for rows without one. Among 100 million keys two agree by accident once in 3,700 data
    sets."""
    if key is None:
        return 0
    return int.from_bytes(blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little") or 1


def _repeated(folder, names):
    """{part name: {position: "PART:POSITION" of the first one}} from the listed hashes."""
    lists = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in names]
    starts = np.cumsum([0] + [len(hashes) for hashes in lists])
    buckets = int(starts[-1]) // _BUCKET + 1
    repeated = {}
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

    def __init__(self, stage, source, arguments, duplicates):
        self.stage, self.source, self.arguments, self.duplicates = stage, source, arguments, duplicates

    def pack(self, part, tally, advance):
        """One part into one shard, or into a row of shards where its length is not known before."""
        if part.rows is None and hasattr(self.source, "columns"):
            return self._pack_stream(part, tally, advance)
        self._write(part.name, self.source.read(part), self.duplicates.get(part.name, {}), tally, advance)

    def _pack_stream(self, part, tally, advance):
        """Shards PART-0000, PART-0001, ...; each has a report of its own, so that a stream continues behind the last
        finished one."""
        step, number, skip = self.source.arguments.samples_per_shard, 0, 0
        repeated, pieces = self.duplicates.get(part.name, {}), []
        while (report := self.stage.report(f"{part.name}-{number:04d}")) is not None:
            pieces.append(report)
            skip, number = skip + report["counts"]["in"], number + 1
            advance(report["counts"]["in"])
        rows = self.source.read(part, skip)
        while piece_rows := list(islice(rows, 1)):
            name, piece = f"{part.name}-{number:04d}", Tally()
            here = {position - skip: where for position, where in repeated.items()}
            self._write(name, _chain(piece_rows, islice(rows, step - 1)), here, piece, advance)
            self.stage.save(name, piece)
            pieces.append(self.stage.report(name))
            skip, number = skip + piece.counts["in"], number + 1
        for report in pieces:
            tally.add(report)

    def _write(self, name, rows, repeated, tally, advance):
        path = self.stage.folder / f"{name}.tar"
        path.unlink(missing_ok=True)
        seen = set()
        with ShardWriter(path) as writer:
            for position, raw in enumerate(rows):
                advance(1)
                if raw.key is None and raw.fault is not None and raw.fault[0] == "truncated-shard":
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
                    seen.add(raw.key)
                    writer.write_members(raw.key, self._checked(raw))
                    tally.count("out")
                except BadSample as bad:
                    tally.reject(raw.where, raw.key, bad.reason, bad.detail, raw.line)
                except ValueError as error:
                    tally.reject(raw.where, raw.key, "bad-key", str(error), raw.line)
        if not tally.counts["out"]:
            path.unlink()
            Path(f"{path}.index.json").unlink()

    def _checked(self, raw):
        """The members to write. Raises `BadSample`."""
        if raw.fault is not None:
            raise BadSample(raw.key, raw.where, *raw.fault)
        if raw.picture is None:
            raise BadSample(raw.key, raw.where, "no-image", f"found {', '.join(sorted(raw.members)) or 'nothing'}")
        try:
            suffix = picture_suffix(raw.picture, self.arguments.max_image_pixels, self.arguments.check == "decode")
        except BadSample as bad:
            raise BadSample(raw.key, raw.where, bad.reason, bad.detail) from None
        others = [name for name in (*IMAGE_SUFFIXES, "jpeg") if name in raw.members]
        if others:
            detail = f"a .{suffix} and a .{others[0]}: nothing says which one the text is about"
            raise BadSample(raw.key, raw.where, "two-pictures", detail)
        members = {suffix: raw.picture, **raw.members}
        sample = sample_from_members(members, raw.key, raw.where)
        if sample.caption is None:
            raise BadSample(raw.key, raw.where, "no-caption", "the text is missing or blank")
        return members


def _chain(first, rest):
    yield from first
    yield from rest


if __name__ == "__main__":
    main()
