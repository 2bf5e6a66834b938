"""Shards that img2dataset or WebDataset wrote."""

from training.data.records import BadSample
from training.data.shards import ShardReader
from training.prepare.sources.raw import PICTURE_SUFFIXES, Part, Raw


class TarSource:
    """Shards that img2dataset or WebDataset wrote, one part each; all members of a sample are kept."""

    has_keys = True

    def __init__(self, files):
        self.files = files

    def parts(self):
        return [Part(f"{number:05d}", path, None, file_number=number) for number, path in enumerate(self.files)]

    def keys(self, part):
        """The keys of a part, in order."""
        with ShardReader(part.path) as reader:
            return reader.keys

    def read(self, part):
        """Yields the `Raw` samples of a part."""
        with ShardReader(part.path) as reader:
            for i, key in enumerate(reader.keys):
                raw = Raw(key, part.path)
                try:
                    members = reader.read(i)
                except BadSample as bad:
                    raw.fault = (bad.reason, bad.detail)
                    yield raw
                    continue
                pictures = [suffix for suffix in PICTURE_SUFFIXES if suffix in members]
                if pictures:
                    raw.picture = members.pop(pictures[0])
                raw.members = members
                yield raw
            if reader.truncated:
                yield Raw(
                    None, part.path, fault=("truncated-shard", "the tar ends in the middle: what followed is lost")
                )
