"""What it takes to open much data for training: `python -m tests.bench.opening --folder BIG [--output FILE.json]`

Writes 1,000 shards of 1,000 small samples into BIG (3 GB, taken away at the end) and opens them as a run does: names,
counts, fingerprint, order, where the first and the last sample lie. As a folder, a list and behind `hf://` on a server
of this machine; with `dataset.json`, with indexes beside the shards, with img2dataset's statistics, with nothing (of
100 shards: each header of each tar is read, and kept), and once more after that. Each in a process of its own, whose
memory is that beyond what it had after its imports. The last columns say by the ratio what that makes for 143 million
samples; with `dataset.json` these are opened too, on shards that take no room.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHARDS, SAMPLES = 1000, 1000
# Where all headers are read, which takes two minutes of a processor for a thousand.
SHARDS_READ = 100
PAPER = 143_000_000
WAYS = ("dataset.json", "indexes", "img2dataset's statistics", "nothing known", "the same again")


def opened(name: str, first_batch: bool) -> dict[str, float]:
    """Seconds of opening, and of the first batch of texts; processor seconds; bytes beyond the imports."""
    from pyramidclip_hf import PyramidCLIPProcessor
    from tests.bench.paired import peak_bytes
    from training.data.batches import BatchMaker
    from training.data.loader import fingerprint_of, settings_for
    from training.data.order import SampleOrder
    from training.data.sources import open_data_set

    processor = PyramidCLIPProcessor()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is at this moment
    before, began, spent = peak_bytes(), time.perf_counter(), time.process_time()
    data = open_data_set(name)
    fingerprint_of([data])
    order = SampleOrder([[unit.samples for unit in data.units]], seed=0, global_batch_size=8192)
    for epoch in (0, 31):
        order.locate(epoch, 0), order.locate(epoch, order.total - 1)
    found = {"seconds": time.perf_counter() - began, "processor": time.process_time() - spent}
    found |= {"bytes": peak_bytes() - before, "samples": order.total, "shards": len(data.units)}
    if first_batch:
        began = time.perf_counter()
        settings = settings_for(processor, ["caption"], pooling="eos")
        BatchMaker([data], order, settings, processor.tokenizer).batch(0, range(128))
        found |= {"first_batch": time.perf_counter() - began, "bytes_with_batch": peak_bytes() - before}
    return found


def in_a_process(name: str, cache: Path, first_batch: bool = True, **environment: str) -> dict[str, float]:
    """`opened` in a process of its own, with a cache of its own."""
    words = [sys.executable, "-m", "tests.bench.opening", "--open", name, *(["--first-batch"] if first_batch else [])]
    own = os.environ | {"PYRAMIDCLIP_CACHE": str(cache), "TOKENIZERS_PARALLELISM": "false"} | environment
    done = subprocess.run(words, env=own, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def write_shards(folder: Path, shards: int, samples: int) -> dict[str, Any]:
    """Copies of one shard with its index and an entry of each for `dataset.json`."""
    from training.data.shards import DATASET_FORMAT, ShardWriter, load_index

    folder.mkdir(parents=True)
    first = folder / "000000.tar"
    with ShardWriter(first) as writer:
        for number in range(samples):
            record = json.dumps({"summary": f"small {number}"}).encode()
            writer.write_members(f"{number:09d}", {"jpg": b"x", "txt": b"a small sample", "json": record})
    index = load_index(first)
    entry = {"samples": samples, "bytes": index.tar_bytes, "keys_digest": index.keys_digest()}
    names = [f"{number:06d}.tar" for number in range(shards)]
    for name in names[1:]:
        shutil.copyfile(first, folder / name)
        shutil.copyfile(f"{first}.index.json", folder / f"{name}.index.json")
    return {"format": DATASET_FORMAT, "made_by": {}, "counts": {}, "shards": dict.fromkeys(names, entry)}


def as_it_would_be(folder: Path, shards: int, described: dict[str, Any]) -> None:
    """`dataset.json` and files of the right size that take no room."""
    folder.mkdir(parents=True)
    (entry, *_) = described["shards"].values()
    names = [f"{number:06d}.tar" for number in range(shards)]
    for name in names:
        with open(folder / name, "wb") as file:
            file.truncate(entry["bytes"])
    (folder / "dataset.json").write_text(json.dumps(described | {"shards": dict.fromkeys(names, entry)}))


@contextlib.contextmanager
def on_a_hub(folder: Path, home: Path, endings: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """A server with the files of these endings; all tars are one, so that they fit into memory."""
    from tests.hub_server import Repository, client_environment, running_hub

    tar = (folder / "000000.tar").read_bytes()
    wanted = [path for path in sorted(folder.iterdir()) if path.name.endswith(endings)]
    with running_hub() as hub:
        files = {path.name: tar if path.suffix == ".tar" else path.read_bytes() for path in wanted}
        hub.repositories["tester/big"] = Repository()
        hub.repositories["tester/big"].commit(files)
        yield client_environment(hub, home)


def local_ways(folder: Path, described: dict[str, Any]) -> dict[str, dict[str, float]]:
    """A folder with less and less beside its shards."""
    found, cache = {}, folder.parent / "cache"
    listed, told = folder.parent / "list.txt", folder / "dataset.json"
    listed.write_text("".join(f"{folder}/{name}\n" for name in described["shards"]))
    for way in WAYS:
        if way == "dataset.json":
            told.write_text(json.dumps(described))
        elif way == "indexes":
            told.unlink()
        elif way == "img2dataset's statistics":
            for path in folder.glob("*.index.json"):
                path.unlink()
            for name in described["shards"]:
                told = {"count": SAMPLES + 50, "successes": SAMPLES, "failed_to_download": 50}
                (folder / name.replace(".tar", "_stats.json")).write_text(json.dumps(told))
        elif way == "nothing known":
            for path in folder.glob("*_stats.json"):
                path.unlink()
            for name in [*described["shards"]][SHARDS_READ:]:
                (folder / name).unlink()
            listed.write_text("".join(f"{folder}/{name}\n" for name in [*described["shards"]][:SHARDS_READ]))
        print(f"folder, {way}", flush=True)
        found[f"folder, {way}"] = in_a_process(str(folder), cache)
        if way != "nothing known":
            found[f"list, {way}"] = in_a_process(str(listed), cache)
    return found


def hub_ways(folder: Path) -> dict[str, dict[str, float]]:
    """The same files behind `hf://`; what is not counted there is fetched whole, so that is not tried."""
    found, cache, there = {}, folder.parent / "hub-cache", "hf://datasets/tester/big"
    with on_a_hub(folder, folder.parent / "home", (".tar", ".json")) as environment:
        print("hub, dataset.json", flush=True)
        found["hf://, dataset.json"] = in_a_process(there, cache, **environment)
    with on_a_hub(folder, folder.parent / "home", (".tar", ".index.json")) as environment:
        print("hub, indexes", flush=True)
        name = f"{there}/{{000000..{SHARDS - 1:06d}}}.tar"
        found["hf://, indexes"] = in_a_process(name, cache, first_batch=False, **environment)
    return found


def hub_of_the_paper(folder: Path) -> dict[str, dict[str, float]]:
    """A data set of 143 million that `dataset.json` counts; nothing else of it is asked for."""
    with on_a_hub(folder, folder.parent / "home", ("dataset.json",)) as environment:
        there = in_a_process("hf://datasets/tester/big", folder.parent / "hub-cache", False, **environment)
    return {"hf:// of 143 million, dataset.json": there}


def measure(place: Path) -> dict[str, dict[str, float]]:
    """All ways; nothing stays in `place`."""
    place.mkdir(parents=True)
    try:
        described = write_shards(place / "shards", SHARDS, SAMPLES)
        (place / "shards/dataset.json").write_text(json.dumps(described))
        found = hub_ways(place / "shards")
        found |= local_ways(place / "shards", described)
        shutil.rmtree(place / "shards")
        as_it_would_be(place / "paper", PAPER // SAMPLES, described)
        print("folder of 143 million", flush=True)
        found["folder of 143 million, dataset.json"] = in_a_process(str(place / "paper"), place / "cache", False)
        return found | hub_of_the_paper(place / "paper")
    finally:
        shutil.rmtree(place)


def table(found: dict[str, dict[str, float]]) -> str:
    """Each way in a line, with what it makes for the paper's number of samples."""
    lines = ["| data | samples | seconds | of processor | MB | first batch, s | for 143 million: minutes | MB |"]
    lines.append("|---|" + "---:|" * 7)
    for name, one in found.items():
        times = PAPER / one["samples"]
        first = f"{one['first_batch']:.1f}" if "first_batch" in one else ""
        lines.append(
            f"| {name} | {one['samples']:,} | {one['seconds']:.2f} | {one['processor']:.2f} | {one['bytes'] / 1e6:.0f} "
            f"| {first} | {one['seconds'] * times / 60:.2f} | {one['bytes'] * times / 1e6:.0f} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the shards go for as long as it takes; must not be there")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--open", help=argparse.SUPPRESS)
    parser.add_argument("--first-batch", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.open:
        print(json.dumps(opened(args.open, args.first_batch)))
        return 0
    if args.folder is None or args.folder.exists():
        parser.error(f"--folder: expected a folder that is not there yet, got {args.folder}")
    found = measure(args.folder)
    print(table(found))
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
