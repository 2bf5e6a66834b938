"""Datasets of the Hub, and those that `save_to_disk` wrote."""

import os
from collections.abc import Iterator
from typing import Any

from pyramidclip_hf.hub_reach import asking_hub
from training.data.hub_sets import load_checked, load_saved
from training.prepare.sources.columns import choose_columns, fill, key_text
from training.prepare.sources.pairs import RawPair, SourcePart
from training.prepare.steps.flags import SourceArguments


class HubSource:
    """A dataset of the Hub, or one that `save_to_disk` wrote.

    Pictures are taken as the stored bytes, never decoded and encoded again.

    Raises:
        ImportError: `datasets` is missing; it names the extra.
        FileNotFoundError: there is no such dataset, or the Hub cannot be reached.
        ValueError: the columns are not there.
    """

    name, is_stream = "hub", True

    def __init__(self, arguments: SourceArguments):
        self.arguments = arguments
        self.has_keys = arguments.key_column is not None
        data = self._load()
        self.columns = choose_columns(data.features or next(iter(data.take(1)), {}), arguments, arguments.input[0])
        self.data = _undecoded(data)

    # Any: `datasets` has four kinds of data set, and what `load_dataset` gives depends on the flags.
    def _load(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise ImportError('Hub datasets need the train extra: pip install -e ".[train]"') from error
        name, options = self.arguments.input[0], self.arguments
        if os.path.exists(name):
            data = load_saved(name)
            if not isinstance(data, datasets.DatasetDict):
                return data
            if options.split not in data:
                raise ValueError(f"{name} has the splits {', '.join(data)}: give one of them with --split")
            return data[options.split]
        with asking_hub() as out_of_reach:
            try:
                if not options.streaming:
                    return load_checked(name, options.subset, split=options.split, revision=options.revision)
                return datasets.load_dataset(
                    name, options.subset, split=options.split, revision=options.revision, streaming=True
                )
            except OSError as error:
                raise FileNotFoundError(
                    f"--input {name}: there is no such file or folder here, and as a dataset of the Hub it cannot be "
                    f"read ({out_of_reach or error}): give the path of tars or tables, or the name of a dataset that "
                    "can be reached"
                ) from error

    def parts(self) -> list[SourcePart]:
        """Row ranges of a dataset on disk; the shards of a stream, whose lengths nobody knows before they are read."""
        step = self.arguments.samples_per_shard
        name = self.arguments.input[0]
        if hasattr(self.data, "__len__"):
            rows = len(self.data)
            return [
                SourcePart(f"{n:05d}", name, min(step, rows - start), start, start)
                for n, start in enumerate(range(0, rows, step))
            ]
        return [SourcePart(f"{n:05d}", name, None, file_number=n) for n in range(self.data.num_shards)]

    def keys(self, part: SourcePart) -> list[str | None]:
        """The keys of a part, in order; only that column is read."""
        column = self.arguments.key_column
        return [key_text(row[column]) for row in self._select(part, self.data.select_columns([column]))]

    def _select(self, part: SourcePart, data: Any) -> Any:
        if part.rows is not None:
            return data.select(range(part.start, part.start + part.rows))
        return data.shard(num_shards=self.data.num_shards, index=part.file_number)

    def read(self, part: SourcePart, skip: int = 0) -> Iterator[RawPair]:
        """Yields the pairs of a part, from row `skip` on."""
        data = self._select(part, self.data)
        data = data.skip(skip) if skip else data
        for number, row in enumerate(data, start=skip):
            raw = RawPair(f"{part.file_number:03d}{part.first + number:09d}", part.path, part.first + number + 1)
            fill(raw, row, self.columns, None)
            yield raw


def _undecoded(data: Any) -> Any:
    from datasets import Image

    for name, feature in (data.features or {}).items():
        if isinstance(feature, Image):
            data = data.cast_column(name, Image(decode=False))
    return data
