# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Work in pieces on a Ray cluster: actors that hold the model, one to a GPU, get pieces one after another.

Ray starts the workers, wherever the cluster has room, and again where one or its machine dies; `Schedule` says which
piece is next. What the cluster is, and how it is started, is Ray's business: an address, or one on this machine alone.
"""

import contextlib
import hashlib
import importlib
import logging
import os
import platform
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

from huggingface_hub.utils import tqdm

from pyramidclip_command import Failure

from .handing_out import MOST_DEATHS, Job, Phase, Schedule

# What results hang on: pictures, texts and arithmetic.
_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "pillow", "torchvision")
_CHECKOUT = Path(__file__).resolve().parent.parent
# Seconds after which a driver without any worker says what it waits for.
_PATIENCE = 60
# Of the object store of a cluster on this machine: nothing but names goes through it.
_STORE_BYTES = 100 << 20


@dataclass(frozen=True)
class RayOptions:
    """Where the work is done.

    Attributes:
        address: of a running cluster, "auto" for the one that this machine is part of; None: $RAY_ADDRESS, else a
            cluster of its own on this machine, for as long as the work takes.
        workers: how many; None: as many as the cluster has GPUs, or processor cores.
        with_gpu: whether each worker has a GPU of its own; None: where the cluster has any.
    """

    address: str | None = None
    workers: int | None = None
    with_gpu: bool | None = None


def _ray() -> ModuleType:
    """Ray; raises ImportError, naming the extra, where it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise ImportError('--engine ray needs Ray on every machine: pip install "pyramidclip-hf[ray]"') from error
    return ray


def versions() -> dict[str, str]:
    """Name -> version of what results hang on, of this code too."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    digest = hashlib.sha256()
    for folder in ("pyramidclip_hf", "training/data", "training/prepare"):
        for path in sorted((_CHECKOUT / folder).rglob("*.py")):
            digest.update(path.relative_to(_CHECKOUT).as_posix().encode() + b"\0" + path.read_bytes())
    return found | {"this code": digest.hexdigest()[:12]}


class Worker:
    """What an actor does: it opens the job once and then does pieces of it.

    A new one, in the place of one that died, comes to where the others are by asking for the phases in turn.
    """

    def __init__(self) -> None:
        self.place = platform.node()
        self._job: Job | None = None

    def prepare(self, target: str, settings: Any, expected: dict[str, str], folder: str) -> str:
        """Opens the job; returns the name of the machine.

        Args:
            target: "module:function" that gives a `Job` for the settings.
            settings: for it.
            expected: what `versions` says where the work was begun.
            folder: relative paths mean what they mean there.

        Raises:
            Failure: other versions here, or no such folder.
        """
        own = versions()
        differing = [
            f"{name}: {own.get(name, 'none')} there, {expected.get(name, 'none')} here"
            for name in sorted(own.keys() | expected.keys())
            if own.get(name) != expected.get(name)
        ]
        if differing:
            raise Failure(
                f"machine {self.place} of the Ray cluster has other versions ({'; '.join(differing)}), and would make "
                "other bytes: install the same ones on all machines"
            )
        try:
            os.chdir(folder)
        except OSError as error:
            raise Failure(
                f"machine {self.place} of the Ray cluster does not see {folder}: start the command in a folder that "
                f"all machines share ({error})"
            ) from error
        module, _, function = target.partition(":")
        self._job = getattr(importlib.import_module(module), function)(settings)
        self._phases: Iterator[Phase] = self._job.phases()
        self._number = -1
        self._phase: Phase | None = None
        return self.place

    def _at(self, number: int) -> Phase | None:
        while self._number < number:
            self._phase = next(self._phases, None)
            self._number += 1
        return self._phase

    def begin(self, number: int) -> tuple[str, str, dict[str, int | None], dict[str, int | None]] | None:
        """(name, unit, all pieces, those that are not done) of a phase; None: there is none of that number."""
        phase = self._at(number)
        if phase is None:
            return None
        items = dict(phase.items)
        return phase.name, phase.unit, items, {item: n for item, n in items.items() if not phase.is_done(item)}

    def do(self, number: int, item: str) -> int:
        """Does a piece, unless it is done; returns by how much it moves the bar."""
        phase, moved = self._at(number), 0
        if phase is None or phase.is_done(item):
            return 0

        def advance(by: int) -> None:
            nonlocal moved
            moved += by

        phase.do(item, advance)
        return moved

    def finish(self) -> tuple[Any, str]:
        """What the job gives when all is done, and what is told of it."""
        assert self._job is not None
        result = self._job.finish()
        return result, self._job.told(result)


def run_on_ray(target: str, settings: Any, options: RayOptions) -> tuple[Any, str]:
    """Does a job on a cluster.

    Args:
        target: "module:function" that gives a `Job` for the settings, on each worker.
        settings: for it; they are pickled.
        options: where.

    Returns:
        What the job's `finish` gives, and what is told of it.

    Raises:
        ImportError: Ray is not installed.
        ConnectionError: there is no cluster at the address.
        Failure: a machine with other versions, a piece that no machine sees, or over which worker after worker dies.
    """
    _ray()
    with _connected(options):
        return _Driver(target, settings, options).run()


@contextlib.contextmanager
def _connected(options: RayOptions) -> Iterator[None]:
    """Inside of it, Ray is connected to the cluster; one that was started for it ends with it.

    A program that is connected already stays so, where no other cluster is asked for.
    """
    # Nothing is sent to anybody.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Its warnings of a changed rule about GPUs that a worker without one sees.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    # The workers are the work, and no guests of it: as nice as this process, and not by 15 more.
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray = _ray()
    if ray.is_initialized() and options.address is None:
        yield
        return
    address = options.address or os.environ.get("RAY_ADDRESS")
    _check_address(address)
    own: dict[str, Any] = {}
    if address is None:
        own = {"object_store_memory": _STORE_BYTES, "include_dashboard": False}
        if options.workers is not None:
            own["num_cpus"] = max(options.workers, 1)
    path = os.pathsep.join(filter(None, [str(_CHECKOUT), os.environ.get("PYTHONPATH")]))
    try:
        ray.init(
            # Without an address, Ray would take any cluster that is running here.
            address=address or "local",
            runtime_env={"env_vars": {"PYTHONPATH": path}},
            logging_level=logging.ERROR,
            log_to_driver=False,
            **own,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        told = str(error).strip().splitlines() or [type(error).__name__]
        raise Failure(f"no Ray cluster at {address or 'this machine'}: {told[0]}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_address(address: str | None) -> None:
    """Failure where nobody listens at a HOST:PORT, which Ray would try for minutes."""
    host, _, port = (address or "").rpartition(":")
    if "/" in host or not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=20).close()
    except (OSError, OverflowError) as error:
        raise Failure(f"no Ray cluster at {address}: {error}") from error


class _Driver:
    """Hands the pieces out and watches the workers."""

    def __init__(self, target: str, settings: Any, options: RayOptions):
        ray = self.ray = _ray()
        self.arguments = (target, settings, versions(), os.getcwd())
        resources = ray.cluster_resources()
        with_gpu = bool(resources.get("GPU", 0)) if options.with_gpu is None else options.with_gpu
        self.kind = "GPU" if with_gpu else "CPU"
        there = int(resources.get(self.kind, 0))
        if with_gpu and not there:
            raise Failure(
                "the Ray cluster has no GPU: start it with --num-gpus, or set --device cpu to work on its processors"
            )
        number = options.workers or max(there, 1)
        shape = {"num_cpus": 0 if with_gpu else 1, "num_gpus": int(with_gpu)}
        actor = ray.remote(max_restarts=-1, max_task_retries=0, scheduling_strategy="SPREAD", **shape)(Worker)
        self.actors = [actor.remote() for _ in range(number)]
        self.places: dict[int, str] = {}  # of those that are ready
        self.idle: list[int] = []
        self.calls: dict[Any, tuple[int, str | None]] = {}  # what is waited for: who, and with which piece
        self.deaths: dict[int, int] = {}
        for number in range(len(self.actors)):
            self._prepare(number)

    def run(self) -> tuple[Any, str]:
        """All phases, then the end."""
        number = 0
        while (phase := self._alone("begin", number)) is not None:
            self._phase(number, *phase)
            number += 1
        return self._alone("finish")

    def _prepare(self, number: int) -> None:
        self.calls[self.actors[number].prepare.remote(*self.arguments)] = number, None

    def _phase(
        self, number: int, name: str, unit: str, items: dict[str, int | None], left: dict[str, int | None]
    ) -> None:
        """Hands out the pieces of a phase until all are done."""
        schedule = Schedule(left)
        total = None if None in left.values() else sum(size or 0 for size in left.values())
        done = len(items) - len(left)
        with tqdm(total=total, unit=unit, desc=f"{name} (Ray)", smoothing=0.05, disable=not left) as bar:
            while not schedule.is_done:
                for worker in self.idle[:]:
                    item = schedule.next(worker, self.places[worker])
                    if item is not None:
                        self.idle.remove(worker)
                        self.calls[self.actors[worker].do.remote(number, item)] = worker, item
                if not self.calls:
                    raise Failure(f"{name}: the machines that see what is left of it are gone: start the same again")
                for worker, item, moved in self._answers(schedule):
                    self.idle.append(worker)
                    if item is not None:
                        schedule.done(item)
                        done += 1
                        bar.update(moved)
                bar.set_postfix(shards=f"{done}/{len(items)}", workers=len(self.places), refresh=False)

    def _alone(self, method: str, *arguments: Any) -> Any:
        """What one worker answers; another one is asked where it dies."""
        while True:
            while not self.idle:
                self.idle += [worker for worker, _, _ in self._answers(None)]
            worker = self.idle[0]
            try:
                return self._got(getattr(self.actors[worker], method).remote(*arguments))
            except self._deadly as error:
                self.idle.remove(worker)
                self._again(worker, error)

    @property
    def _deadly(self) -> tuple[type[Exception], ...]:
        errors = self.ray.exceptions
        return (errors.RayActorError, errors.NodeDiedError, errors.WorkerCrashedError, errors.OutOfMemoryError)

    def _got(self, reference: Any) -> Any:
        """The value; what the job raised there is raised here, without its way through Ray."""
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else Failure(str(error).splitlines()[-1])
            raise cause from None

    def _answers(self, schedule: Schedule | None) -> Iterator[tuple[int, str | None, int]]:
        """(worker, its piece or None where it is ready, how much that was) of those that answer next."""
        started = time.monotonic()
        while not (ready := self.ray.wait(list(self.calls), num_returns=1, timeout=_PATIENCE)[0]):
            if not self.places:
                there = self.ray.cluster_resources().get(self.kind, 0)
                print(
                    f"waiting since {time.monotonic() - started:.0f} s for a worker: the Ray cluster has {there:g} "
                    f"{self.kind}s, each worker wants one",
                    file=sys.stderr,
                    flush=True,
                )
        for reference in ready:
            worker, item = self.calls.pop(reference)
            try:
                answer = self._got(reference)
            except self._deadly as error:
                if item is not None and schedule is not None:
                    schedule.died(item, _first_line(error))
                    told = f"a worker on {self.places.get(worker)} died; {item} goes to another: {_first_line(error)}"
                    print(f"\n{told}", file=sys.stderr, flush=True)
                self._again(worker, error)
                continue
            except FileNotFoundError as error:
                if item is None or schedule is None:
                    raise
                schedule.unseen(item, self.places[worker], set(self.places.values()), str(error))
                yield worker, None, 0
                continue
            if item is None:
                self.places[worker] = answer
                yield worker, None, 0
            else:
                self.deaths.pop(worker, None)
                yield worker, item, answer

    def _again(self, worker: int, error: Exception) -> None:
        """Has Ray start a worker anew, wherever there is room; nothing is given to it before it answers.

        Raises:
            Failure: it cannot be started, or one after the other dies.
        """
        if "creation task" in (told := str(error)):  # as Ray says of what a machine cannot import
            raise Failure(
                f"a machine of the Ray cluster cannot start a worker ({told.strip().splitlines()[-1]}): this package "
                f"and what it needs must be installed there too, and the checkout lie at {_CHECKOUT}"
            )
        self.places.pop(worker, None)
        self.deaths[worker] = self.deaths.get(worker, 0) + 1
        if self.deaths[worker] > MOST_DEATHS and not self.places:
            raise Failure(f"worker after worker died before one piece was done; the last one: {_first_line(error)}")
        # It may be out of reach and alive, and must not write what another one writes now.
        with contextlib.suppress(Exception):
            self.ray.kill(self.actors[worker], no_restart=False)
        self._prepare(worker)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
