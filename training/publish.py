"""Publishes the final model of a run on the Hub, in one commit.

    python -m training.publish RUN REPO_ID [--results FILE.json ...] [--private]
    python -m training.publish RUN REPO_ID --space [--examples PICTURES ...] [--labels-file FILE]

RUN is the folder of a finished run (its `final/` is published) or a model folder itself; it is only read. The model
card is written from `training.json`, which the run left beside the weights and which is published too, and from the
result files of `training.evaluate`. The code goes along, so that `AutoModel` can load the repository with
`trust_remote_code=True`.

--space adds a page where people try the model (docs/app.md): a Space of the same name, whose folder is written beside
the model, as RUN/space, and pushed after it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pyramidclip_command import CommandParser, answer_words, check_there, run_command
from training.settings.fields import check_repo_id


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The words of a command line as arguments."""
    parser = CommandParser(prog="python -m training.publish", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run, or a model folder")
    parser.add_argument("repo_id", help="owner/name on the Hub")
    parser.add_argument("--results", type=Path, nargs="+", default=(), help="result files of training.evaluate")
    parser.add_argument("--private", action="store_true", default=None, help="make the repository private if it is new")
    parser.add_argument("--space", action="store_true", help="publish a page to try the model on, too")
    parser.add_argument("--examples", nargs="+", default=[], metavar="PICTURES", help="of the page: files or folders")
    parser.add_argument("--labels-file", metavar="FILE", help="of the page: labels to begin with, one a line")
    args = parser.parse_args(words)
    if not args.space and (args.examples or args.labels_file):
        raise ValueError("--examples and --labels-file are the page's: add --space")
    check_repo_id("repo_id", args.repo_id)
    check_there("", args.run, "the folder of a finished run, or of a model")
    check_there("--results", args.results, "result files of training.evaluate")
    check_there("--labels-file", args.labels_file)
    return args


if __name__ == "__main__":
    answer_words(parse)

from training.loop.card import publish
from training.loop.space import publish_page, write_space


def run(args: argparse.Namespace) -> None:
    """Publishes and prints the address of each commit; what the page needs is looked at before the model is sent."""
    if args.space:
        folder = write_space(args.run, args.repo_id, args.examples, args.labels_file)
    print(publish(args.run, args.repo_id, args.private, args.results), flush=True)
    if args.space:
        print(publish_page(folder, args.repo_id, args.private))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(parse, run, argv)


if __name__ == "__main__":
    sys.exit(main())
