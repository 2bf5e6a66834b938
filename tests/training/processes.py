"""Runs a function in a few forked processes that form a gloo group; shared by the tests here."""

import multiprocessing
import os
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path
from queue import Empty

import torch.distributed as dist
from accelerate.state import AcceleratorState


def _child(function, rank, world_size, store, arguments, queue):
    # What accelerate's launcher would have set.
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }
    os.environ |= {"ACCELERATE_USE_CPU": "true"}
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
        )
        queue.put((rank, True, function(rank, world_size, *arguments)))
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException:
        queue.put((rank, False, traceback.format_exc()))
        raise


def run_in_processes(function, world_size, *arguments, timeout=120, grace=4):
    """[function(rank, world_size, *arguments) of each rank]. Forked: no new interpreter has to import torch, and no
    device can have been touched, as tests/conftest.py hides them.

    Results travel through a queue, so they should be numpy arrays and plain values. A failure raises with the child's
    traceback, or the signal or exit code of a child that ended without a word.

    Args:
        grace: Seconds that the others have when one has failed, before they are killed.
    """
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        children = [
            context.Process(target=_child, args=(function, rank, world_size, store, arguments, queue))
            for rank in range(world_size)
        ]
        for child in children:
            child.start()
        results, failures, failed = {}, {}, False
        try:
            end = time.monotonic() + timeout
            while len(results) + len(failures) < world_size and time.monotonic() < end:
                codes = [child.exitcode for child in children]  # before the queue: what they told lies there by then
                try:
                    rank, fine, result = queue.get(timeout=0.2)
                    (results if fine else failures)[rank] = result
                except Empty:
                    for rank, code in enumerate(codes):
                        if code and rank not in results:
                            failures.setdefault(rank, f"ended by signal {-code}" if code < 0 else f"exit code {code}")
                if failures and not failed:  # the others fail too, or wait for it in vain
                    failed, end = True, min(end, time.monotonic() + grace)
        finally:
            for child in children:
                child.join(timeout=0 if failures else 20)
                if child.is_alive():
                    child.kill()
                    child.join()
    if len(results) < world_size:
        raise AssertionError(
            "\n".join(f"process {rank}:\n{text}" for rank, text in failures.items()) or f"over {timeout} s"
        )
    return [results[rank] for rank in range(world_size)]
