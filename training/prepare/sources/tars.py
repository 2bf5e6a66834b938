"""Shards that img2dataset or WebDataset wrote."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from training.data.records import BadSample
from training.data.shards import ShardReader, read_dataset_json, refuse_unfinished
from training.prepare.sources.pairs import PICTURE_SUFFIXES, Fault, RawPair, SourcePart


def described_whole(source: object) -> dict[str, dict[str, Any]]:
    """{folder: what its `dataset.json` says} of a source's shards; empty for other sources.

    Raises:
        ValueError: a step of preparation has begun there and not ended, so that shards or levels are missing.
    """
    files = source.files if isinstance(source, TarSource) else []
    folders = dict.fromkeys(name.rpartition("/")[0] or "." for name in files)
    described = {folder: content for folder in folders if (content := read_dataset_json(folder)) is not None}
    for folder, content in described.items():
        refuse_unfinished(folder, content)
    return described


class TarSource:
    """Shards that img2dataset or WebDataset wrote, one part each; all members of a sample are kept."""

    name, has_keys, is_stream = "tar", True, False

    def __init__(self, files: Sequence[str]):
        self.files = files

    def parts(self) -> list[SourcePart]:
        """A part a tar."""
        return [SourcePart(f"{number:05d}", path, None, file_number=number) for number, path in enumerate(self.files)]

    def keys(self, part: SourcePart) -> list[str | None]:
        """The keys of a part, in order."""
        with ShardReader(part.path) as reader:
            return list(reader.keys)

    def read(self, part: SourcePart, skip: int = 0) -> Iterator[RawPair]:
        """Yields the pairs of a part, from number `skip` on; a tar that ends in the middle adds a note."""
        with ShardReader(part.path) as reader:
            yield from (_pair(reader, i) for i in range(skip, len(reader)))
            if reader.truncated:
                fault = Fault("truncated-shard", "the tar ends in the middle: what followed is lost")
                yield RawPair(None, part.path, fault=fault, is_note=True)

    def read_at(self, part: SourcePart, positions: Iterable[int]) -> Iterator[RawPair]:
        """Yields those pairs of a part, in the order given; nothing else is read."""
        with ShardReader(part.path) as reader:
            yield from (_pair(reader, i) for i in positions)


def _pair(reader: ShardReader, i: int) -> RawPair:
    raw = RawPair(reader.key(i), reader.name)
    try:
        raw.members = reader.read(i)
    except BadSample as bad:
        raw.fault = Fault(bad.reason, bad.detail)
    picture = next((suffix for suffix in PICTURE_SUFFIXES if suffix in raw.members), None)
    if picture is not None:
        raw.picture = raw.members.pop(picture)
    return raw
