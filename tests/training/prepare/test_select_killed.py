"""`training.prepare.select` killed by SIGKILL before each of its file operations: it continues to the same files."""

import json
import shutil
import signal

import pytest
import yaml

from pyramidclip_command import run_command
from tests.faults.injected import in_child, killed_at, watch
from tests.training.prepare.small_data import picture, run_step, tree, write_tar
from training.prepare import select

RULES = {
    "words": {"rule": "words", "at_least": 2},
    "best": {"rule": "number", "field": "score", "best": 14},
    "same": {"rule": "repeats", "of": "caption"},
}


class Killed:
    """A selection of 24 pairs, undisturbed in `whole`; its operations, of which any may be the last one."""

    def __init__(self, folder, *flags, **rest):
        self.folder, self.whole, self.listed = folder, folder / "whole", folder / "operations.txt"
        for shard in range(3):
            rows = []
            for number in range(shard * 8, shard * 8 + 8):
                record = json.dumps({"score": number * 7 % 24 / 24}).encode()
                text = f"text {number % 9}" if number % 6 else "one"
                rows.append((f"k{number}", {"jpg": picture(number, (8, 8)), "txt": text.encode(), "json": record}))
            write_tar(folder / "in" / f"{shard:05d}.tar", rows)
        (folder / "rules.yaml").write_text(yaml.safe_dump({"rules": RULES, **rest}, sort_keys=False))
        self.words = ["--input", folder / "in", "--rules", folder / "rules.yaml", "--samples-per-shard", "4", *flags]
        assert self._run(self.whole, self._note) == 0, self.said()
        self.operations = len(self.listed.read_text())

    def _note(self, count, event, path):
        with open(self.listed, "a") as file:
            file.write(".")

    def said(self):
        return (self.folder / "said.txt").read_text()

    def _run(self, output, happens):
        def work():
            watch(output, happens)
            words = [str(word) for word in [*self.words, "--output-dir", output]]
            return run_command(select.parse, select.run, words)

        return in_child(work, self.folder / "said.txt")

    def at(self, number):
        """Killed before that operation, and once more before the same one on the way back; then to the end."""
        cut = self.folder / "cut"
        assert self._run(cut, killed_at(number)) == -signal.SIGKILL, self.said()
        assert self._run(cut, killed_at(number)) in (-signal.SIGKILL, 0), self.said()
        run_step(select, [*self.words, "--output-dir", cut])
        assert tree(cut) == tree(self.whole), f"operation {number}"
        shutil.rmtree(cut)


CASES = [((), {"split": {"number": 3, "by": ["caption"]}}), (("--keys-only",), {})]


def test_killed_while_it_measures_and_while_it_writes(tmp_path):
    killed = Killed(tmp_path, **CASES[0][1])
    assert killed.operations > 20
    for share in (0.2, 0.7):
        killed.at(int(share * killed.operations))


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "rest"), CASES, ids=["shards", "keys"])
def test_killed_at_every_moment(flags, rest, tmp_path):
    killed = Killed(tmp_path, *flags, **rest)
    for number in range(1, killed.operations + 1):
        killed.at(number)
