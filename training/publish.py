"""Publishes the final model of a run on the Hub, in one commit.

    python -m training.publish RUN REPO_ID [--results FILE.json ...] [--private]

RUN is the folder of a finished run (its `final/` is published) or a model folder itself; it is only read. The model
card is written from `training.json`, which the run left beside the weights and which is published too, and from the
result files of `training.evaluate`. The code goes along, so that `AutoModel` can load the repository with
`trust_remote_code=True`. Exit codes: 0, or 2 where the folder or the repository is not what is needed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pyramidclip_hf.hub import PublishError
from training.loop.card import publish

EXIT_WRONG_SETTING = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, publishes, and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m training.publish", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a finished run, or a model folder")
    parser.add_argument("repo_id", help="owner/name on the Hub")
    parser.add_argument("--results", type=Path, nargs="+", default=(), help="result files of training.evaluate")
    parser.add_argument("--private", action="store_true", default=None, help="make the repository private if it is new")
    args = parser.parse_args(argv)
    try:
        print(publish(args.run, args.repo_id, args.private, args.results))
    except (ValueError, OSError, PublishError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_SETTING
    return 0


if __name__ == "__main__":
    sys.exit(main())
