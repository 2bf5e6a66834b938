"""The training data of one process, batch after batch (docs/data.md).

    reader = TrainingReader(["data/shards"], processor=processor, global_batch_size=4096, levels=("local", "caption"))
    for batch in reader.batches(epoch=0, position=0):
        ...

Each batch is a function of (seed, epoch, position) alone: 0 or many workers, one process or several with the same
global batch, from the beginning or continued, the same samples come in the same order with the same crops. Workers
make whole batches ahead, across the end of an epoch. Bad samples are replaced deterministically, counted by reason
and named; beyond `max_bad_fraction` the run stops.
"""

import collections
import hashlib
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from typing import Any, cast

import torch

from pyramidclip_hf.files import json_text
from pyramidclip_hf.levels_pyramidclip import levels_of_kind
from pyramidclip_hf.processing_pyramidclip import PyramidCLIPProcessor
from pyramidclip_hf.tokenization_pyramidclip import PyramidCLIPTokenizer
from training.data.batches import Batch, BatchMaker, BatchReport, BatchSettings, DataError
from training.data.coverage import Coverage, look_at
from training.data.mixing import MixedOrder, check_shares, positions_of
from training.data.order import FEW_BATCHES, SampleOrder, batch_positions, default_window
from training.data.records import Fault
from training.data.remote import ShardCache
from training.data.sources import Alone, Crew, DataSet, open_data_set
from training.data.tolerance import BadSamples
from training.data.views import ViewSettings
from training.data.workers import live_as_long_as_the_parent, started_untouched_by_termination

NAMED_BAD_SAMPLES = 20
# Lines of a manifest that are shuffled together: nothing but a permutation of them is held.
MANIFEST_WINDOW = 1 << 22


class WorkerDied(DataError):
    """A loader worker was killed, most often by the kernel for want of memory."""


def is_worker_death(error: BaseException) -> bool:
    """Whether a RuntimeError is torch's report of a dead worker, for which it has no type of its own.

    It is raised wherever the process happens to be when the worker dies, not only where a batch is waited for.
    """
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")


def worker_died(error: BaseException, workers: int) -> WorkerDied:
    """The `WorkerDied` that explains torch's report."""
    return WorkerDied(
        f"a loader worker died ({(str(error) or type(error).__name__).splitlines()[0]}). The kernel kills processes "
        f"when memory runs out: lower dataloader_workers (now {workers}) or the batch, or enlarge /dev/shm. Continue "
        "with --resume latest; no data is skipped"
    )


def settings_for(
    processor: PyramidCLIPProcessor,
    levels: Sequence[str],
    pooling: str = "max",
    max_length: int = 77,
    roi_feature_size: int = 2048,
    **changes: Any,
) -> BatchSettings:
    """Settings that agree with a processor: the size of the views is its image processor's.

    Args:
        processor: of the model.
        levels: see `BatchSettings`, also for the next three.
        pooling: of the text tower.
        max_length: of texts, in tokens.
        roi_feature_size: F.
        **changes: further fields of `BatchSettings`, and all but the size of `ViewSettings`.

    Raises:
        ValueError: a setting out of its range.
    """
    images = processor.image_processor
    names = ("global_area", "local_area", "view_area", "aspect", "max_image_pixels")
    views = {name: changes.pop(name) for name in names if name in changes}
    size = images.crop_size
    return BatchSettings(
        levels=tuple(levels),
        views=ViewSettings(size["height"], size["width"], **views),
        pooling=pooling,
        max_length=max_length,
        roi_feature_size=roi_feature_size,
        **changes,
    )


def check_regions(data_sets: Sequence[DataSet], settings: BatchSettings) -> None:
    """Refuses region features that do not belong together, from what the `dataset.json` files say.

    Raises:
        ValueError: two detectors made them, or their width is not the model's, and mixing is not allowed.
    """
    if "roi" not in settings.levels or settings.allow_mixed_regions:
        return
    makers: dict[str, str] = {}
    for data in data_sets:
        for described in data.described:
            width = described.get("roi_feature_size")
            if width not in (None, settings.roi_feature_size):
                raise ValueError(
                    f"{data.name}: region features of width {width}, the model takes {settings.roi_feature_size}: set "
                    "vision_config.roi_feature_size, or allow_mixed_regions to leave these regions out"
                )
            maker = described.get("made_by", {}).get("regions")
            if maker is not None:
                makers.setdefault(json_text(maker, sort_keys=True), data.name)
    if len(makers) > 1:
        listed = "; ".join(f"{name}: {maker}" for maker, name in makers.items())
        raise ValueError(
            f"regions made by {len(makers)} detectors ({listed}): their features do not mean the same, and one "
            "projection cannot serve both. Detect again with one of them, or set allow_mixed_regions"
        )


def fingerprint_of(data_sets: Sequence[DataSet]) -> str:
    """What must stay equal for a run to continue: names, sizes and keys of all shards, not where they lie."""
    identity = [[unit.identity + (unit.samples,) for unit in data.units] for data in data_sets]
    return hashlib.sha256(json_text(identity).encode()).hexdigest()[:32]


def begin_workers(device: torch.device, workers: int) -> None:
    """Starts what workers are forked from, where that is a process of its own: it imports while the caller goes on.

    Args:
        device: That of the batches.
        workers: How many a reader will have.
    """
    if workers and _start_method(device) == "forkserver":
        _quiet_tokenizers()
        with started_untouched_by_termination():
            forkserver.ensure_running()


def _quiet_tokenizers() -> None:
    """Tokenizers warn about a fork otherwise, and their threads do not survive it."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class BatchReader:
    """Batches of one process, from anything that makes them.

    Args:
        maker: map-style data set; `maker[(epoch, positions)]` is a batch with `sample_keys` and `report`, as
            `BatchMaker` makes it.
        order: the `SampleOrder` or `MixedOrder` that the maker follows.
        global_batch_size: samples in a batch of all processes together.
        process_index, num_processes: which share of each global batch is made here: a block of neighbouring positions.
        workers: processes that make batches ahead; 0 makes them here.
        prefetch: batches that each worker keeps ready.
        max_bad_fraction: share of bad samples beyond which `DataError` is raised, of those that all processes read
            lately, see `training.data.tolerance`: at once where this one alone has read too many, and by `check_bad`.
        overfit_batches: only the first so many global batches of epoch 0, over and over; 0: off.
        bad_log: file that names each bad sample, one JSON object a line, appended.
        device: where the batches go. For a CPU nothing is pinned, and no other device is touched.
        start_method: how workers start ("fork", "spawn", "forkserver"; None: the platform's way for a CPU; a fork of
            a process that touched no device for every other device).

    Raises:
        ValueError: the data is smaller than one global batch (with the arithmetic), or the batch cannot be shared
            equally.
    """

    def __init__(
        self,
        maker: torch.utils.data.Dataset[Batch],
        order: SampleOrder | MixedOrder,
        global_batch_size: int,
        process_index: int = 0,
        num_processes: int = 1,
        workers: int = 0,
        prefetch: int = 2,
        max_bad_fraction: float = 0.01,
        overfit_batches: int = 0,
        bad_log: str | os.PathLike[str] | None = None,
        device: torch.device | str = "cpu",
        start_method: str | None = None,
    ):
        self.maker, self.order, self.samples = maker, order, order.total
        self.batches_per_epoch = order.batches_per_epoch(global_batch_size)
        batch_positions(0, global_batch_size, process_index, num_processes)
        self.global_batch_size, self.process_index, self.num_processes = global_batch_size, process_index, num_processes
        self.workers, self.prefetch, self.device = workers, prefetch, torch.device(device)
        self.start_method = start_method or _start_method(self.device)
        self.overfit_batches, self.bad_log = overfit_batches, bad_log
        self._recent = BadSamples(order.total, num_processes, max_bad_fraction)
        self._counts: collections.Counter[str] = collections.Counter()
        self._named: list[Fault] = []
        self._pipeline: Iterator[Batch] | None = None
        self._next: tuple[int, int] | None = None

    def batches(self, epoch: int, position: int = 0) -> Iterator[Batch]:
        """The batches of this process from global `position` to the end of the epoch.

        Only complete global batches come. Asking for what comes next in turn continues the workers at work, anything
        else starts them anew.

        Yields:
            What `BatchMaker.batch` makes, without its `report`.

        Raises:
            DataError: too many bad samples.
            WorkerDied: a worker was killed.
            ValueError: `position` is not a multiple of the global batch.
        """
        if position % self.global_batch_size:
            raise ValueError(f"position {position} is not a multiple of the global batch of {self.global_batch_size}")
        last = self.overfit_batches or self.batches_per_epoch
        for batch in range(position // self.global_batch_size, last):
            if self._pipeline is None or self._next != (epoch, batch):
                self._start(epoch, batch)
            made = self._take()
            self._next = (epoch, batch + 1) if batch + 1 < last else (epoch + 1, 0)
            self._account(made.pop("report"), len(made["sample_keys"]), epoch)
            yield made

    def _start(self, epoch: int, batch: int) -> None:
        """Starts the workers anew at a global batch."""
        self.close()
        schedule = _Schedule(
            epoch,
            batch,
            self.overfit_batches or self.batches_per_epoch,
            bool(self.overfit_batches),
            (self.global_batch_size, self.process_index, self.num_processes, self.order.lane_length),
        )
        if self.workers:
            _quiet_tokenizers()
        loader = torch.utils.data.DataLoader(
            _Telling(self.maker),
            batch_size=None,
            sampler=schedule,
            num_workers=self.workers,
            collate_fn=_as_it_is,
            prefetch_factor=self.prefetch if self.workers else None,
            pin_memory=self.device.type == "cuda",
            multiprocessing_context=self.start_method if self.workers else None,
            worker_init_fn=live_as_long_as_the_parent,
        )
        with started_untouched_by_termination():
            self._pipeline = iter(loader)

    def _take(self) -> Batch:
        try:
            # Nothing else may hold on to the pipeline: its workers end when it is let go.
            made = next(cast(Iterator[Batch | _Trouble], self._pipeline))
        except (RuntimeError, ConnectionError, EOFError) as error:
            self.close()
            # A worker that dies while it hands over a batch breaks the connection before torch notices its death.
            if is_worker_death(error) or (self.workers and not isinstance(error, RuntimeError)):
                raise worker_died(error, self.workers) from error
            raise
        except BaseException:
            self.close()
            raise
        if isinstance(made, dict):
            return made
        self.close()
        # The run was set up rightly, and ran: whatever it is, no setting is what failed.
        if isinstance(made.error, DataError):
            raise made.error
        raise DataError(str(made.error)) from made.error

    def close(self) -> None:
        """Ends the workers."""
        self._pipeline = None

    def read_here(self) -> None:
        """From the next call of `batches` on, this process makes them itself."""
        self.close()
        self.workers = 0

    def _account(self, report: BatchReport, samples: int, epoch: int) -> None:
        """Counts, and names bad samples; `DataError` where there are too many."""
        counts = self._counts
        counts["samples"] += samples
        for level, number in report.texts.items():
            counts[f"texts/{level}"] += number
            counts[f"truncated/{level}"] += report.truncated[level]
        for number, taken in report.taken.items():
            counts[f"taken/{number}"] += taken
        self._recent.add(samples, len(report.bad))
        if not report.bad:
            return
        for fault in report.bad:
            counts["bad"] += 1
            counts[f"bad/{fault.reason}"] += 1
            if len(self._named) < NAMED_BAD_SAMPLES:
                self._named.append(fault)
        if self.bad_log:
            lines = [json_text(fault._asdict() | {"epoch": epoch}) + "\n" for fault in report.bad]
            with open(self.bad_log, "a", encoding="utf-8") as file:
                file.write("".join(lines))
        self.check_bad(self._recent.number)

    @property
    def recent_bad(self) -> int:
        """Bad samples among those that this process read lately."""
        return self._recent.number

    def check_bad(self, number: int) -> None:
        """Stops where too many are bad.

        Args:
            number: `recent_bad` of all processes together.

        Raises:
            DataError: more than `max_bad_fraction` of the samples that they read lately.
        """
        recent, counts = self._recent, self._counts
        if not recent.too_many(number):
            return
        self.close()
        found = f"{_reasons(counts)}. The first: {_first(self._named)}" if self._named else "all in other processes"
        raise DataError(
            f"{number} of the last {recent.read + number} samples are bad (max_bad_fraction is {recent.limit:.1%} of "
            f"{recent.window}): {found}. "
            "Repair the data (`python -m training.prepare.audit` lists what is wrong) or raise max_bad_fraction"
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the reader: counts and the names of bad samples, as far as batches were taken."""
        return {
            "counts": dict(self._counts),
            "named": list(map(list, self._named)),
            "recent": self._recent.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues from `state()`."""
        self._counts = collections.Counter(state.get("counts", {}))
        self._named = [Fault(*entry) for entry in state.get("named", [])]
        self._recent.load_state(state.get("recent", {}))

    def metrics(self) -> dict[str, float]:
        """This process's shares: of bad samples lately, and of texts of each level that were cut at the end, so far."""
        counts = self._counts
        metrics = {"data/bad_fraction": self._recent.share()}
        for level in levels_of_kind("text"):
            if counts[f"texts/{level}"]:
                metrics[f"data/truncated_{level}"] = counts[f"truncated/{level}"] / counts[f"texts/{level}"]
        return metrics

    def report(self) -> list[str]:
        """Lines for the end of a run: bad samples by reason over all processes, and the first of them by name.

        With several processes all of them have to call it.
        """
        counts, named = self._over_processes()
        if not counts["bad"]:
            return [f"data: {counts['samples']} samples, none bad"]
        lines = [f"data: {counts['samples']} samples, {counts['bad']} bad and replaced: {_reasons(counts)}"]
        lines += [f"  {where}: {key}: {reason}: {detail}" for key, where, reason, detail in named[:NAMED_BAD_SAMPLES]]
        if counts["bad"] > len(lines) - 1:
            lines.append(
                f"  ... {counts['bad'] - len(lines) + 1} more" + (f" in {self.bad_log}" if self.bad_log else "")
            )
        return lines

    def _over_processes(self) -> tuple[collections.Counter[str], list[Fault]]:
        """Counts and named samples of all processes."""
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return self._counts, self._named
        gathered: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, (dict(self._counts), self._named))
        counts: collections.Counter[str] = collections.Counter()
        for one, _ in gathered:
            counts.update(one)
        return counts, [entry for _, names in gathered for entry in names]


class TrainingReader(BatchReader):
    """Batches of one process for pre-training.

    Args:
        data: data sets, each a string as `training.data.sources` explains.
        settings: see `settings_for`.
        tokenizer: of the text levels.
        global_batch_size: see `BatchReader`, also for the next two.
        process_index: from 0.
        num_processes: how many there are.
        seed: see `training.data.order`, also for the next.
        window_samples: how many are shuffled together; None: of shards `default_window` of `training.data.order`, of a
            manifest, which need not be read in pieces, `MANIFEST_WINDOW`.
        cache: for remote shards.
        allow_unfinished: also data of which a step of preparation has begun and not ended.
        crew: processes that open the data together, see `training.data.sources`; None: this one alone.
        shares: of each data set in every global batch, see `training.data.mixing`; none: one after another.
        **options: see `BatchReader`.

    Attributes:
        samples: how many the data has.
        fingerprint: see `fingerprint_of`.

    Raises:
        ValueError: the data is smaller than one global batch (with the arithmetic), the batch cannot be shared equally,
            regions of two detectors are mixed, the data is unfinished, or the shares cannot be.
        FileNotFoundError: there is no data.
    """

    def __init__(
        self,
        data: Sequence[str],
        settings: BatchSettings,
        tokenizer: PyramidCLIPTokenizer,
        global_batch_size: int,
        process_index: int = 0,
        num_processes: int = 1,
        seed: int = 0,
        window_samples: int | None = None,
        cache: ShardCache | None = None,
        allow_unfinished: bool = False,
        crew: Crew | None = None,
        shares: Sequence[float] = (),
        **options: Any,
    ):
        if not data:
            raise ValueError("no training data named: expected at least one folder, shard list or manifest")
        cache = self._cache = cache or ShardCache()
        self._roi_feature_size, self._levels = settings.roi_feature_size, settings.levels
        self._crew = crew or Alone()
        self.data_sets = [open_data_set(name, cache, allow_unfinished, crew=crew) for name in data]
        check_regions(self.data_sets, settings)
        sizes = [[unit.samples for unit in one.units] for one in self.data_sets]
        if shares:
            check_shares(shares, len(data))
        parts = positions_of(shares, global_batch_size) if shares else [global_batch_size] * len(data)
        windows = [window_samples or _default_window(one, part) for one, part in zip(self.data_sets, parts)]
        order: SampleOrder | MixedOrder = (
            MixedOrder(sizes, shares, seed, windows, global_batch_size)
            if shares
            else SampleOrder(sizes, seed, windows, global_batch_size)
        )
        if process_index == 0:
            for one, window, part in zip(self.data_sets, windows, parts):
                _warn_of_small_window(one, window, part)
        maker = BatchMaker(self.data_sets, order, settings, tokenizer, cache)
        super().__init__(maker, order, global_batch_size, process_index, num_processes, **options)
        self.fingerprint = fingerprint_of(self.data_sets)

    def look(self) -> Coverage:
        """Which share of the pairs each loss term gets; the first process looks, all of the crew call it together.

        Raises:
            ValueError: none can be used.
        """

        def look() -> Coverage | None:
            if self._crew.number:
                return None
            return look_at(self.data_sets, self._roi_feature_size, self._cache, self._levels)

        return cast(Coverage, self._crew.share(look)[0])

    @property
    def description(self) -> list[dict[str, Any]]:
        """What the data is: per data set its name, numbers and what its `dataset.json` says of makers and licences."""
        told, order = ("made_by", "attribution", "license"), self.order
        mixed: list[dict[str, Any]] = [{} for _ in self.data_sets]
        if isinstance(order, MixedOrder):
            mixed = [
                {"share": part / order.global_batch_size, "passes_per_epoch": passes}
                for part, passes in zip(order.parts, order.passes_per_epoch())
            ]
        return [
            {
                "name": data.name,
                "samples": data.samples,
                "shards": len(data.units),
                **shared,
                **{key: described[key] for described in data.described for key in told if key in described},
            }
            for data, shared in zip(self.data_sets, mixed)
        ]

    def metrics(self) -> dict[str, float]:
        """With the share of each of several data sets so far, under its name (and number, where two have one name)."""
        metrics, names = super().metrics(), [data.name for data in self.data_sets]
        taken = [self._counts[f"taken/{number}"] for number in range(len(names))]
        if len(taken) > 1:
            metrics |= {f"data/share_{name}": n / max(sum(taken), 1) for name, n in zip(_short_names(names), taken)}
        return metrics


def _short_names(names: Sequence[str]) -> list[str]:
    """The last part of each path, fit for the name of a metric, with its number where several have one."""
    last = [name.rstrip("/").rpartition("/")[2] for name in names]
    short = [re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip("_") or "set" for name in last]
    twice = len(set(short)) < len(short)
    return [f"{number}_{name}" if twice else name for number, name in enumerate(short, 1)]


def _default_window(data: DataSet, global_batch_size: int) -> int:
    window = default_window(global_batch_size)
    return window if data.manifest is None else max(window, MANIFEST_WINDOW)


def _warn_of_small_window(data: DataSet, window: int, global_batch_size: int) -> None:
    if window < FEW_BATCHES * global_batch_size and window < data.samples:
        print(
            f"warning: {data.name} is shuffled within windows of {window} samples, {window / global_batch_size:.1f} "
            f"global batches: what lies together (captions of one picture, pictures of one topic) meets in one batch "
            f"again and again. shuffle_window_samples of at least {FEW_BATCHES * global_batch_size} spreads it",
            file=sys.stderr,
            flush=True,
        )


def _reasons(counts: collections.Counter[str]) -> str:
    found = sorted(((n, name[4:]) for name, n in counts.items() if name.startswith("bad/")), reverse=True)
    return ", ".join(f"{n} {reason}" for n, reason in found)


def _first(named: Sequence[Fault]) -> str:
    key, where, reason, detail = named[0]
    return f"{where}: {key}: {reason} ({detail})"


def _as_it_is(batch: Any) -> Any:
    """In place of collating: with `batch_size=None`, torch hands over what the maker made."""
    return batch


def _start_method(device: torch.device) -> str | None:
    """How processes start beside one that trains on `device`: what a GPU's driver holds does not survive a fork."""
    if device.type == "cpu" or "forkserver" not in multiprocessing.get_all_start_methods():
        return None
    # Imported once, by the process that all workers are forked from.
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    return "forkserver"


@dataclass(frozen=True)
class _Trouble:
    """In place of a batch: why there is none. What a worker raises would arrive as the text of its traceback."""

    error: Exception


class _Telling(torch.utils.data.Dataset[Batch | _Trouble]):
    """A maker of batches that hands over what goes wrong."""

    def __init__(self, maker: torch.utils.data.Dataset[Batch]):
        self.maker = maker

    def __getitem__(self, epoch_and_positions: tuple[int, Sequence[int]]) -> Batch | _Trouble:
        try:
            return self.maker[epoch_and_positions]
        except (DataError, ValueError, OSError) as error:
            return _Trouble(error)


class _Schedule:
    """What the workers make, without end: (epoch, positions) of the global batches in turn."""

    def __init__(self, epoch: int, batch: int, batches: int, overfit: bool, share: tuple[int, int, int, int]):
        self.epoch, self.batch, self.batches, self.overfit, self.share = epoch, batch, batches, overfit, share

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        epoch, batch = self.epoch, self.batch
        while True:
            yield 0 if self.overfit else epoch, batch_positions(batch, *self.share)
            batch += 1
            if batch == self.batches:
                epoch, batch = epoch + 1, 0
