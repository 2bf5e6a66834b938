"""From (epoch, position) to tensors: reading, checking, replacing and collating samples.

`BatchMaker` is what runs inside a loader worker. A batch is a pure function of the data, the settings and the
positions asked for, so it is the same bytes whichever process makes it.
"""

import collections
import errno
import os
import resource
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pyramidclip_command import Failure
from pyramidclip_hf.levels_pyramidclip import LEVELS
from pyramidclip_hf.tokenization_pyramidclip import PyramidCLIPTokenizer
from training.data.inputs import MASKED_LABELS, MASKED_POSITIONS, NO_WORD, RUN_LEVELS, any_level, inputs_of_kind
from training.data.mixing import MixedOrder
from training.data.order import SampleOrder, Window
from training.data.patience import LONGEST_PAUSE, is_away
from training.data.records import (
    IMAGE_SUFFIXES,
    MAX_REGIONS,
    BadSample,
    Fault,
    Sample,
    best_objects,
    level_text,
    sample_from_members,
)
from training.data.remote import DownloadError, NotThere, ShardCache, is_url
from training.data.shard_index import NotATar
from training.data.sources import DataSet, ShardReplaced, UnitReader
from training.data.views import BadPicture, ViewSettings, make_views
from training.data.words import Vocabulary, changed_caption, masked_caption, padded

MAX_REPLACEMENTS = 32
# So many shards may be open, however small the windows are and the system's limit is.
_LEAST_READERS = 16
# Errors of a path that stay what they are while its folder can be reached.
_NOT_THERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
# What is drawn for a sample beside its views, whose numbers are 0, 1, 3 and 4.
_CAPTION, _CHANGES, _MASKS = 2, 5, 6

# Tensors under the names of the model's arguments, and what is not a tensor: see `BatchMaker.batch`.
Batch = dict[str, Any]


class DataError(Failure):
    """The data cannot be trained on as it is; the message says why and what to do."""


class StoreError(DataError):
    """Data could not be reached, however often it was tried; later it may be. Nothing is wrong with a setting."""


@dataclass(frozen=True)
class BatchSettings:
    """What a batch holds.

    Attributes:
        levels: those of `LEVELS` and `RUN_LEVELS` that the objective names; nothing else is read or decoded.
        views: sizes and crops.
        pooling: "max" pads texts to `max_length`, "eos" to the longest of the batch.
        text_lengths: rising; under "eos" texts are padded to the first that holds the longest, else to `max_length`.
        all_regions: regions are padded to `max_regions` and not to the most of the batch.
        max_length: of texts, in tokens.
        max_regions: the most confident objects that are kept, see `best_objects`.
        drop_repeated_tags: a phrase counts once.
        roi_feature_size: F without the box.
        allow_mixed_regions: region features of another width count as missing, not as an error.
        synonyms: for changed captions, see `training.data.words`.
        mask_share: of a caption's tokens that are masked.
    """

    levels: tuple[str, ...] = tuple(LEVELS)
    views: ViewSettings = field(default_factory=ViewSettings)
    pooling: str = "max"
    max_length: int = 77
    max_regions: int = MAX_REGIONS
    drop_repeated_tags: bool = False
    roi_feature_size: int = 2048
    allow_mixed_regions: bool = False
    synonyms: Mapping[str, Sequence[str]] = field(default_factory=dict)
    mask_share: float = 0.15
    text_lengths: tuple[int, ...] = ()
    all_regions: bool = False

    def __post_init__(self) -> None:
        known = (*LEVELS, *RUN_LEVELS)
        unknown = sorted(set(self.levels) - set(known))
        if unknown or not self.levels:
            raise ValueError(f"levels {self.levels}: expected some of {', '.join(known)}, {unknown} are none")
        if self.pooling not in ("max", "eos"):
            raise ValueError(f"pooling is {self.pooling!r}, expected 'max' or 'eos'")
        if self.max_regions < 1:
            raise ValueError(f"max_regions is {self.max_regions}, expected at least 1")


@dataclass
class BatchReport:
    """What making a batch met.

    Attributes:
        bad: samples that were replaced.
        truncated: text level -> texts that were cut.
        texts: text level -> texts there.
        taken: number of a data set -> samples of it.
    """

    bad: list[Fault] = field(default_factory=list)
    truncated: dict[str, int] = field(default_factory=dict)
    texts: dict[str, int] = field(default_factory=dict)
    taken: collections.Counter[int] = field(default_factory=collections.Counter)


def _folder(name: str) -> str:
    return os.path.dirname(name) or "."


class BatchMaker(torch.utils.data.Dataset[Batch]):
    """Makes batches from data sets in a given order.

    `maker[(epoch, positions)]` gives the batch (see `batch`), so a torch DataLoader can use it as a map-style dataset.

    Args:
        data_sets: where samples are read.
        order: over them.
        settings: what a batch holds.
        tokenizer: of the text levels.
        cache: for remote shards.
    """

    def __init__(
        self,
        data_sets: Sequence[DataSet],
        order: SampleOrder | MixedOrder,
        settings: BatchSettings,
        tokenizer: PyramidCLIPTokenizer,
        cache: ShardCache | None = None,
    ):
        self.data_sets, self.order, self.settings = data_sets, order, settings
        self.tokenizer, self.cache = tokenizer, cache or ShardCache()
        self._suffixes = {"json", "txt"}
        self._views = inputs_of_kind("picture", settings.levels)
        special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
        self._vocabulary = Vocabulary.of(len(tokenizer), special, tokenizer.eos_token_id)
        if self._views:
            self._suffixes.update(IMAGE_SUFFIXES, ("jpeg",))
        if "roi" in settings.levels:
            self._suffixes.add("roi.npy")
        self._readers: collections.OrderedDict[tuple[int, int], UnitReader] = collections.OrderedDict()
        # Units that cannot be read: why, and until when they are not asked for again.
        self._unreadable: dict[tuple[int, int], tuple[Fault, float]] = {}
        self._most_readers = _LEAST_READERS
        self._windows: dict[Window, int] = {}
        self._fetching: threading.Thread | None = None

    def __len__(self) -> int:
        return self.order.total

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.update(_readers=collections.OrderedDict(), _unreadable={}, _windows={}, _fetching=None)
        return state

    def __getitem__(self, epoch_and_positions: tuple[int, Iterable[int]]) -> Batch:
        return self.batch(*epoch_and_positions)

    def batch(self, epoch: int, positions: Iterable[int]) -> Batch:
        """The batch of the samples at B positions of an epoch.

        Returns:
            Of the levels that are wanted: `pixel_values`, `local_pixel_values` (B, 3, height, width) uint8, for
            `training.data.pixels.Normalisation`; `input_ids`, `summary_input_ids`, `tag_input_ids` (B, L) int64;
            `has_summary`, `has_tags` (B,) bool; `roi_features` (B, K, F + 4) float32 and `roi_mask` (B, K) bool, K the
            longest of the batch, at least 1.
            Of those of a run: `view1_pixel_values`, `view2_pixel_values`, `augmented_input_ids`, `masked_input_ids`
            likewise, with `masked_positions` and `masked_labels` (B, M) int64, see `training.data.inputs`.
            Always `sample_keys`, a list of str, and `report`, a `BatchReport`.

        Raises:
            DataError: a sample and all that might replace it are bad, or (`StoreError`) the store is away.
            ValueError: a remote shard is larger than the cache.
        """
        report, positions = BatchReport(), list(positions)
        self._look_ahead(epoch, positions)
        loaded = [self.load(epoch, position, report) for position in positions]
        samples = [sample for sample, _ in loaded]
        batch: Batch = self._pixels([views for _, views in loaded])
        batch.update(self._texts(samples, report))
        if "masked" in self.settings.levels:
            batch.update(self._masked(samples, batch[any_level("masked").input]))
        if "roi" in self.settings.levels:
            batch["roi_features"], batch["roi_mask"] = self._regions(samples)
        batch["sample_keys"] = [sample.key for sample in samples]
        batch["report"] = report
        return batch

    def load(self, epoch: int, position: int, report: BatchReport) -> tuple[Sample, dict[str, torch.Tensor]]:
        """The sample at a position and its views, or those of what replaces it; bad ones go into `report`."""
        where, turn = self.order.locate(epoch, position), self.order.turn(epoch, position)
        for attempt in range(MAX_REPLACEMENTS + 1):
            try:
                loaded = self._load(turn, *where)
                report.taken[where.dataset] += 1
                return loaded
            except BadSample as bad:
                report.bad.append(bad.fault)
            where = self.order.replacement(epoch, position, attempt)
        last = BadSample(*report.bad[-1])
        raise DataError(f"{last}; the {MAX_REPLACEMENTS} samples drawn in place of it and its like are bad too")

    def _load(self, turn: int, dataset: int, unit: int, index: int) -> tuple[Sample, dict[str, torch.Tensor]]:
        key = None
        try:
            reader, members = self._read(dataset, unit, index)
            key = reader.key(index)
            sample = sample_from_members(members, key, reader.name, bool(self._views), self.settings.levels)
            if sample.caption is None:
                raise BadSample(key, reader.name, "no-caption", "expected KEY.txt, or `caption` in KEY.json")
            number = self.order.sample_id(dataset, unit, index)
            if sample.captions:
                rng = np.random.default_rng((self.order.seed, turn, number, _CAPTION))
                sample.caption = sample.captions[int(rng.integers(len(sample.captions)))]
            sample.number, sample.turn = number, turn
            if "caption_aug" in self.settings.levels:
                rng = np.random.default_rng((self.order.seed, turn, number, _CHANGES))
                sample.caption_aug = changed_caption(sample.caption, self.settings.synonyms, rng)
            sample = best_objects(sample, self.settings.max_regions, self.settings.drop_repeated_tags)
            self._check_regions(sample, reader.name)
            views: dict[str, torch.Tensor] = {}
            if sample.image is not None and self._views:
                views = make_views(sample.image, self.settings.views, self.order.seed, turn, number, self._views)
            return sample, views
        except BadPicture as bad:
            raise BadSample(key, reader.name, bad.reason, str(bad)) from None

    def _read(self, dataset: int, unit: int, index: int) -> tuple[UnitReader, dict[str, bytes]]:
        """The reader of a unit and the members of one sample of it; raises `BadSample`."""
        reader = self._reader(dataset, unit)
        try:
            return reader, reader.read(index, self._suffixes)
        except BadSample as bad:
            if bad.reason != "read-error":
                raise
        # What was opened before a store was away, or before a shared cache let go of it, is stale: once more.
        self._readers.pop((dataset, unit)).close()
        reader = self._reader(dataset, unit)
        return reader, reader.read(index, self._suffixes)

    def _check_regions(self, sample: Sample, where: str) -> None:
        """Makes the features float32; takes away those of another width where that is allowed."""
        if sample.roi is None:
            return
        width = sample.roi.shape[1]
        if width != self.settings.roi_feature_size:
            if self.settings.allow_mixed_regions:
                sample.roi = None
                return
            detail = f"region features of width {width}, the model takes {self.settings.roi_feature_size}"
            raise BadSample(sample.key, where, "roi-width", detail)
        sample.roi = sample.roi.astype(np.float32)
        if not np.isfinite(sample.roi).all():
            raise BadSample(sample.key, where, "roi-not-finite", "region features hold NaN or infinity")

    def _pixels(self, views: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The views of each level under the names of the model's arguments, as bytes."""
        return {any_level(level).input: torch.stack([view[level] for view in views]) for level in self._views}

    def _texts(self, samples: Sequence[Sample], report: BatchReport) -> dict[str, torch.Tensor]:
        """Token ids and masks of the text levels; counts go into `report`."""
        batch: dict[str, torch.Tensor] = {}
        for level in inputs_of_kind("text", self.settings.levels):
            texts = [level_text(sample, "caption" if level == "masked" else level) for sample in samples]
            encoded = self.tokenizer(
                [text or "" for text in texts],
                padding="max_length" if self.settings.pooling == "max" else True,
                truncation=True,
                max_length=self.settings.max_length,
                return_attention_mask=False,
                return_truncation=True,
                return_tensors="np",
            )
            ids = self._lengthened(np.asarray(encoded["input_ids"], np.int64))
            batch[any_level(level).input] = torch.from_numpy(ids)
            present = [text is not None for text in texts]
            if (mask := any_level(level).mask) is not None:
                batch[mask] = torch.tensor(present)
            report.truncated[level] = int(np.sum(encoded["truncated"]))
            report.texts[level] = sum(present)
        return batch

    def _lengthened(self, ids: np.ndarray) -> np.ndarray:
        """Token ids (B, L) padded to the next of the fixed lengths, where there are such."""
        settings, longest = self.settings, ids.shape[1]
        if not settings.text_lengths:
            return ids
        length = next((fixed for fixed in settings.text_lengths if fixed >= longest), settings.max_length)
        return np.pad(ids, ((0, 0), (0, length - longest)), constant_values=self.tokenizer.pad_token_id)

    def _masked(self, samples: Sequence[Sample], ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Captions' ids (B, L) with masked words, where these are, and which words."""
        made = [
            masked_caption(
                row,
                self.settings.mask_share,
                self._vocabulary,
                np.random.default_rng((self.order.seed, sample.turn, sample.number, _MASKS)),
            )
            for sample, row in zip(samples, ids.numpy(), strict=True)
        ]
        texts, positions, words = zip(*made, strict=True)
        return {
            any_level("masked").input: torch.from_numpy(np.stack(texts)),
            MASKED_POSITIONS: torch.from_numpy(padded(positions, 0)),
            MASKED_LABELS: torch.from_numpy(padded(words, NO_WORD)),
        }

    def _regions(self, samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        """`roi_features` and `roi_mask`, see `batch`."""
        count = max(1, *(0 if sample.roi is None else len(sample.roi) for sample in samples))
        count = self.settings.max_regions if self.settings.all_regions else count
        width = self.settings.roi_feature_size
        features = np.zeros((len(samples), count, width + 4), np.float32)
        mask = np.zeros((len(samples), count), bool)
        for row, sample in enumerate(samples):
            if sample.roi is not None and sample.regions is not None:
                features[row, : len(sample.roi), :width] = sample.roi
                features[row, : len(sample.roi), width:] = [region.box for region in sample.regions]
                mask[row, : len(sample.roi)] = True
        return torch.from_numpy(features), torch.from_numpy(mask)

    def _reader(self, dataset: int, unit: int) -> UnitReader:
        """The open reader of a unit; the one used longest ago is closed when too many are open. Raises `BadSample`."""
        reader = self._readers.get((dataset, unit))
        if reader is None:
            reader = self._readers[dataset, unit] = self._open(dataset, unit)
            if len(self._readers) > self._most_readers:
                self._readers.popitem(last=False)[1].close()
        self._readers.move_to_end((dataset, unit))
        return reader

    def _open(self, dataset: int, unit: int) -> UnitReader:
        """A new reader of a unit. One that cannot be read is remembered for a while, so that it is waited for once.

        Raises:
            BadSample: the store answers and has no such shard, or another one.
            StoreError: it is away, and stays so as long as the cache's patience lasts.
        """
        data, known = self.data_sets[dataset], self._unreadable.get((dataset, unit))
        if known is not None and time.monotonic() < known[1]:
            raise BadSample(*known[0])
        name, started, reason = data.units[unit].name, time.monotonic(), "read-error"
        problem: Exception | None = None
        for _ in self.cache.patience.tries():
            try:
                return data.open(data.units[unit], self.cache)
            except (NotThere, NotATar, ShardReplaced) as error:
                reason, problem = error.reason, error
                break
            except DownloadError as error:  # tried as often as it may be
                raise StoreError(str(error)) from error
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    raise
                problem = error
                if isinstance(error, _NOT_THERE) and not is_away(_folder(name)):
                    reason = "no-shard"
                    break
        else:
            if is_away(_folder(name)):
                tried = f"tried for {time.monotonic() - started:.0f} s"
                raise StoreError(f"{name}: {problem}; its folder is not there either; {tried}") from problem
        fault = Fault(None, name, reason, str(problem))
        rest = max(LONGEST_PAUSE, time.monotonic() - started)
        self._unreadable[dataset, unit] = fault, time.monotonic() + rest
        raise BadSample(*fault)

    def _look_ahead(self, epoch: int, positions: Sequence[int]) -> None:
        """Prepares for the shards of the windows that a batch is in, and of those that its process comes to next.

        So many stay open, within the system's limit. Remote ones are fetched in the background, each worker of the
        process its share; what another process of the machine fetches at the moment is left to it.
        """
        windows = {self.order.window(epoch, position): position for position in positions}
        if windows.keys() == self._windows.keys() or (self._fetching is not None and self._fetching.is_alive()):
            return
        self._windows = windows
        later = [self.order.next_window(epoch, position) for position in windows.values()]
        places = [self.order.shards_of(window) for window in dict.fromkeys([*windows, *later])]
        units = dict.fromkeys((dataset, shard) for dataset, shards in places for shard in shards)
        limit = max(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2, _LEAST_READERS)
        self._most_readers = min(max(len(units), _LEAST_READERS), limit)
        worker = torch.utils.data.get_worker_info()
        own, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        names = (self.data_sets[dataset].units[unit].name for dataset, unit in units)
        self._fetch([*filter(is_url, names)][own::workers])

    def _fetch(self, names: Sequence[str]) -> None:
        """Fetches remote shards in the background."""

        def fetch() -> None:
            for name in names:
                try:
                    self.cache.fetch(name, wait=False)
                except BlockingIOError:
                    continue
                except (OSError, ValueError):
                    return  # reported, with its retries, by whoever reads the shard

        if names:
            self._fetching = threading.Thread(target=fetch, daemon=True)
            self._fetching.start()
