"""Datasets of the Hub, and those that `save_to_disk` wrote."""

import os

from training.prepare.sources.columns import choose_columns, fill, key_text
from training.prepare.sources.raw import Part, Raw


class HubSource:
    """A dataset of the Hub, or one that `save_to_disk` wrote. Pictures are taken as the stored bytes, never decoded
    and encoded again."""

    def __init__(self, arguments):
        self.arguments = arguments
        self.has_keys = arguments.key_column is not None
        self.data = self._load()
        columns = self.data.features or next(iter(self.data.take(1)), {})
        self.columns = choose_columns(columns, arguments, arguments.input[0])
        self.data = self._undecoded(self.data)

    def _load(self):
        try:
            import datasets
        except ImportError as error:
            raise ImportError('Hub datasets need the train extra: pip install -e ".[train]"') from error
        name, options = self.arguments.input[0], self.arguments
        if os.path.exists(name):
            data = datasets.load_from_disk(name)
            return data[options.split] if isinstance(data, datasets.DatasetDict) else data
        return datasets.load_dataset(
            name, options.subset, split=options.split, revision=options.revision, streaming=options.streaming
        )

    def _undecoded(self, data):
        from datasets import Image

        for name, feature in (data.features or {}).items():
            if isinstance(feature, Image):
                data = data.cast_column(name, Image(decode=False))
        return data

    def parts(self):
        """Row ranges of a dataset on disk; the shards of a stream, whose lengths nobody knows before they are read."""
        step = self.arguments.samples_per_shard
        name = self.arguments.input[0]
        if hasattr(self.data, "__len__"):
            starts = range(0, len(self.data), step)
            rows = len(self.data)
            return [Part(f"{n:05d}", name, min(step, rows - s), s, s) for n, s in enumerate(starts)]
        return [Part(f"{n:05d}", name, None, file_number=n) for n in range(self.data.num_shards)]

    def keys(self, part):
        """The keys of a part, in order; only that column is read."""
        column = self.arguments.key_column
        return [key_text(row[column]) for row in self._select(part, self.data.select_columns([column]))]

    def _select(self, part, data):
        if part.rows is not None:
            return data.select(range(part.start, part.start + part.rows))
        return data.shard(num_shards=self.data.num_shards, index=part.file_number)

    def read(self, part, skip=0):
        """Yields the `Raw` samples of a part, from row `skip` on."""
        data = self._select(part, self.data)
        data = data.skip(skip) if skip else data
        for number, row in enumerate(data, start=skip):
            raw = Raw(f"{part.file_number:03d}{part.first + number:09d}", part.path, part.first + number + 1)
            fill(raw, row, self.columns, None)
            yield raw
