"""Does the faults of the table, and writes docs/faults.md with what became of the runs.

python -m tests.faults --write [--workers 2] [--every 1]
"""

import argparse
import multiprocessing
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

from tests.faults.page import PAGE, page
from tests.faults.suite import do_in_suite, jobs_of_suite, start_suite


@contextmanager
def _pool(workers: int, folder: str) -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=start_suite, initargs=(folder,)) as pool:
        yield pool


def main() -> int:
    """Runs it all; 1 where a fault had another end than it should."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/faults.md")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--every", type=int, default=1, help="one of so many faults, for slow machines (default: all)")
    arguments = parser.parse_args()
    counts: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as folder, _pool(arguments.workers, folder) as pool:
        everything = pool.submit(jobs_of_suite).result()
        jobs = everything[:: arguments.every]
        for number, found in enumerate(pool.map(do_in_suite, jobs), 1):
            counts[found] += 1
            print(f"{number} of {len(jobs)}: {': '.join(found)}", flush=True)
    text = page(counts, len(everything))
    if arguments.write:
        PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
