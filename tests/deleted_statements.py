"""Which statements no test would miss: each is deleted in turn, and the tests that reach it run until one fails.

    python -m tests.deleted_statements training/loop/run.py --tests tests/training/loop --output runs/deleted

The tests are collected once. A first pass, in a forked process, finds which test reaches which line, also in processes
that it forks. Then each statement of the functions of the named files has a forked process of its own: the functions
that live there get the code of the file without the statement, and the nearest tests (`test_NAME.py` of `NAME.py`) run,
quickest first, then the others. What a test does in an interpreter of its own is not seen. Left out are docstrings,
imports, definitions, and what stands outside of functions.

OUTPUT/mutants.jsonl gets a line for each; those that are there already are not tried again, so it can be stopped and
started. With --survivors those are tried again that lived.
"""

import argparse
import ast
import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from types import CodeType, FunctionType

import pytest
from _pytest.runner import runtestprotocol

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Pass, ast.Nonlocal, ast.Global)
MISSED, LIVED, FAILED_TO_START = 1, 0, 3


def statements(source):
    """[(first line, last line of the header, text)] of what can be deleted, in order."""
    found = {}
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in ast.walk(function):
            constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            bare = isinstance(node, ast.AnnAssign) and node.value is None
            if not isinstance(node, ast.stmt) or isinstance(node, LEFT_OUT) or constant or bare:
                continue
            body = getattr(node, "body", None)
            if isinstance(node, ast.If) and not node.orelse and len(body) == 1:
                continue  # the same as without its only statement, but for what the condition itself does
            end = body[0].lineno - 1 if body else node.end_lineno
            first = ast.get_source_segment(source, node).splitlines()[0]
            found[node.lineno, node.col_offset] = (node.lineno, max(end, node.lineno), first)
    return [found[place] for place in sorted(found)]


def without(source, path, line):
    """The compiled module without the statement that begins in that line. Its names stay the function's own, so that
    the code fits the closures that live.
    """

    class Delete(ast.NodeTransformer):
        done = False

        def generic_visit(self, node):
            super().generic_visit(node)
            if isinstance(node, ast.stmt) and node.lineno == line and not isinstance(node, LEFT_OUT) and not self.done:
                self.done = True
                return ast.copy_location(ast.If(test=ast.Constant(False), body=[node], orelse=[]), node)
            return node

    tree = Delete().visit(ast.parse(source))
    return compile(ast.fix_missing_locations(tree), str(path), "exec")


def codes(code):
    """{(qualified name, first line): code} of all functions below a module's code."""
    found = {}
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            found[inner.co_qualname, inner.co_firstlineno] = inner
            found |= codes(inner)
    return found


class Lines:
    """Writes down which lines of some files run, in this process, its threads and the processes that it forks."""

    def __init__(self, paths, file):
        self.paths, self.file, self.item, self.seen = {str(path) for path in paths}, file, -1, set()

    def start(self):
        threading.settrace(self.on_call)
        sys.settrace(self.on_call)

    def on_call(self, frame, event, argument):
        return self.on_line if frame.f_code.co_filename in self.paths else None

    def on_line(self, frame, event, argument):
        if event == "line":
            place = (self.item, frame.f_code.co_filename, frame.f_lineno)
            if place not in self.seen:
                self.seen.add(place)
                os.write(self.file, (json.dumps(place) + "\n").encode())
        return self.on_line


def in_fork(function):
    """(exit code of `function()`, seconds) in a process of its own, with its own folder for temporary files."""

    def body(folder):
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        tempfile.tempdir = os.environ["TMPDIR"] = folder
        code = FAILED_TO_START
        try:
            code = function(Path(folder))
        finally:
            os._exit(code)

    folder = tempfile.mkdtemp(prefix="deleted-")
    child = os.fork()
    if child == 0:
        body(folder)
    return child, folder


class Deleting:
    """The plugin: collects as pytest does, then runs the tests in its own way."""

    def __init__(self, arguments):
        self.arguments = arguments
        self.output = arguments.output
        self.paths = [path.resolve() for path in arguments.files]
        self.told = os.fdopen(os.dup(2), "w", buffering=1)

    def pytest_runtestloop(self, session):
        live = defaultdict(list)
        for one in gc.get_objects():
            if type(one) is FunctionType and Path(one.__code__.co_filename) in self.paths:
                live[one.__code__.co_filename].append(one)
        gc.freeze()
        reached, seconds = self.look(session.items)
        self.delete_all(session.items, reached, seconds, live)
        return True

    def look(self, items):
        """({(path, line): tests that reach it}, {test: seconds}), of those that pass."""
        kept = self.output / "reached.jsonl"
        if not kept.exists():
            aside = kept.with_suffix(".partial")
            aside.unlink(missing_ok=True)
            file = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            lines = Lines(self.paths, file)

            def run(folder):
                _own_folder(items[0].config, folder)
                lines.start()
                for number, item in enumerate(items):
                    lines.item, began = item.nodeid, _processor()
                    after = items[number + 1] if number + 1 < len(items) else None
                    reports = runtestprotocol(item, log=False, nextitem=after)
                    fine = all(report.passed for report in reports)
                    told = ["passed" if fine else "failed", item.nodeid, _processor() - began]
                    os.write(file, (json.dumps(told) + "\n").encode())
                    self.told.write(f"{number + 1} of {len(items)} tests looked at\r")
                return 0

            child, folder = in_fork(run)
            os.waitpid(child, 0)
            subprocess.run(["rm", "-rf", folder], check=True)
            aside.rename(kept)
        reached, seconds = defaultdict(set), {}
        for line in kept.read_text().splitlines():
            first, second, third = json.loads(line)
            if first == "failed":
                self.told.write(f"does not pass, so it is not asked: {second}\n")
            elif first == "passed":
                seconds[second] = third
            else:
                reached[second, third].add(first)
        return reached, seconds

    def chosen(self, items, tests, seconds, path):
        """The tests to run for a line, in order, within the time that one may take."""
        order = sorted(
            (item for item in items if item.nodeid in tests and item.nodeid in seconds),
            key=lambda item: (item.path.name != f"test_{path.stem}.py", seconds[item.nodeid]),
        )
        spent, chosen = 0.0, []
        for item in order:
            spent += seconds[item.nodeid]
            if chosen and spent > self.arguments.seconds:
                continue
            chosen.append(item)
        return chosen, len(order)

    def delete_all(self, items, reached, seconds, live):
        path_of_results = self.output / "mutants.jsonl"
        results = [json.loads(line) for line in _lines(path_of_results)]
        if self.arguments.survivors:
            results = [one for one in results if one["outcome"] not in ("lived", "not reached")]
            path_of_results.write_text("".join(json.dumps(one) + "\n" for one in results))
        done = {(one["file"], one["line"]) for one in results}
        jobs = []
        for path in self.paths:
            source, name = path.read_text(), str(path.relative_to(ROOT))
            for line, end, text in statements(source):
                if (name, line) in done or self.arguments.lines and line not in self.arguments.lines:
                    continue
                tests = set().union(*(reached[str(path), at] for at in range(line, end + 1)))
                jobs.append((path, source, name, line, text, *self.chosen(items, tests, seconds, path)))
        self.told.write(f"{len(jobs)} statements to delete\n")
        running, waiting = {}, list(reversed(jobs))
        with path_of_results.open("a") as file:
            while running or waiting:
                while waiting and len(running) < self.arguments.jobs:
                    job = waiting.pop()
                    self.start(job, seconds, live, running, file)
                self.wait(running, file)

    def start(self, job, seconds, live, running, file):
        path, source, name, line, text, tests, of = job
        told = {"file": name, "line": line, "statement": text, "tests": len(tests), "of": of}
        if not tests:
            self.write(file, told | {"outcome": "not reached"})
            return
        missed_by = self.output / f".missed-{len(running)}-{line}-{path.stem}"

        def run(folder):
            _own_folder(tests[0].config, folder)
            new = codes(without(source, path, line))
            for function in live[str(path)]:
                code = new.get((function.__code__.co_qualname, function.__code__.co_firstlineno))
                if code is not None and code.co_freevars == function.__code__.co_freevars:
                    function.__code__ = code
            for number, item in enumerate(tests):
                after = tests[number + 1] if number + 1 < len(tests) else None
                missed_by.write_text(item.nodeid)
                if any(report.failed for report in runtestprotocol(item, log=False, nextitem=after)):
                    return MISSED
            return LIVED

        child, folder = in_fork(run)
        limit = time.monotonic() + 60 + 20 * sum(seconds[item.nodeid] for item in tests)
        running[child] = (folder, limit, missed_by, told)

    def wait(self, running, file):
        time.sleep(0.02)
        for child, (folder, limit, missed_by, told) in list(running.items()):
            ended, status = os.waitpid(child, os.WNOHANG)
            late = not ended and time.monotonic() > limit
            if not ended and not late:
                continue
            _kill_group(child)
            if late:
                os.waitpid(child, 0)
            del running[child]
            subprocess.run(["rm", "-rf", folder], check=False)
            code = None if late else os.waitstatus_to_exitcode(status)
            outcome = {None: "hung", MISSED: "missed", LIVED: "lived"}.get(code, f"ended with {code}")
            test = missed_by.read_text() if missed_by.exists() and outcome != "lived" else None
            missed_by.unlink(missing_ok=True)
            self.write(file, told | {"outcome": outcome, "test": test})

    def write(self, file, told):
        file.write(json.dumps(told) + "\n")
        file.flush()
        if told["outcome"] != "missed":
            self.told.write(f"{told['outcome']}: {told['file']}:{told['line']}: {told['statement']}\n")


def _processor():
    """Seconds of processor that this process and those that it waited for took."""
    return sum(os.times()[:4])


def _own_folder(config, folder):
    """Temporary folders of this process's tests lie below `folder`."""
    config._tmp_path_factory._basetemp = folder / "pytest"
    (folder / "pytest").mkdir()


def _kill_group(child):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)


def _lines(path):
    return path.read_text().splitlines() if path.exists() else []


def summary(path):
    """Lines of a table: file, statements, how many lived and were not reached."""
    counts = defaultdict(lambda: defaultdict(int))
    for one in map(json.loads, _lines(path)):
        counts[one["file"]]["all"] += 1
        counts[one["file"]][one["outcome"] if one["outcome"] in ("lived", "not reached") else "missed"] += 1
    yield "| file | statements | missed by a test | lived | not reached |"
    yield "|---|---:|---:|---:|---:|"
    for name, count in sorted(counts.items()):
        yield f"| `{name}` | {count['all']} | {count['missed']} | {count['lived']} | {count['not reached']} |"


def main():
    """Deletes, tells what lived, and ends with 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="whose statements are deleted")
    parser.add_argument("--tests", nargs="+", required=True, help="files and folders, as pytest takes them")
    parser.add_argument("--output", type=Path, required=True, help="folder for what was found")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (default: %(default)s)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=20,
        help="of processor that tests may take for one statement, if it lives (default: %(default)s)",
    )
    parser.add_argument("--lines", nargs="+", type=int, help="only statements that begin here")
    parser.add_argument("--survivors", action="store_true", help="try again those that lived")
    arguments = parser.parse_args()
    arguments.output = arguments.output.resolve()
    arguments.output.mkdir(parents=True, exist_ok=True)
    options = ["-q", "-s", "-p", "no:cacheprovider", "-m", "not slow"]
    code = pytest.main([*options, *arguments.tests], plugins=[Deleting(arguments)])
    print("\n".join(summary(arguments.output / "mutants.jsonl")))
    return 0 if code in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED) else 1


if __name__ == "__main__":
    sys.exit(main())
