"""Names in the pages and in docstrings: every path, module, make target and link leads to something that is there."""

import ast
import importlib
import re
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
TRAINING = CHECKOUT / "tests/training"
TOPS = ("pyramidclip_hf", "training", "conversion", "tests", "docs")
# Paths that a command makes, and words that stand for many paths.
MADE = {"tests/bench/results/gpu.json"}
PLACEHOLDER = re.compile(r"[*{<]|NAME|FILE|RECIPE|\.\.\.|^training/test$")


def pages():
    return [*sorted(CHECKOUT.glob("*.md")), *sorted((CHECKOUT / "docs").rglob("*.md"))]


def named_paths(text):
    """Paths of the checkout in a text, such as `training/data/order.py` or `docs/data.md`."""
    found = re.findall(rf"(?<![\w/.\-])((?:{'|'.join(TOPS)})/[\w./{{}}*<>\-]*[\w/}}*])", text)
    return [path for path in found if not PLACEHOLDER.search(path) and path not in MADE]


def named_modules(text):
    """Dotted names of the checkout in a text, such as `training.data.remote.ShardCache`."""
    found = re.findall(r"(?<![\w/.\-])((?:pyramidclip_hf|training|conversion|tests)(?:\.\w+)+)", text)
    return [name for name in found if not re.search(r"\.(md|json|jsonl|yaml|NAME)$", name)]


def is_there(dotted):
    """Whether a dotted name is a module, or an attribute that a module has."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        path = CHECKOUT.joinpath(*parts[:length])
        if path.is_dir() or path.with_suffix(".py").is_file():
            break
    else:
        return False
    if length == len(parts):
        return True
    value = importlib.import_module(".".join(parts[:length]))
    for name in parts[length:]:
        if not hasattr(value, name):
            # A field of a dataclass without a default is no attribute of the class.
            return name in getattr(value, "__annotations__", {})
        value = getattr(value, name)
    return True


def anchors(path):
    """The anchors that a Markdown file's headings give, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)", path.read_text(encoding="utf8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf8"), flags=re.MULTILINE | re.DOTALL)
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"https?:|mailto:", target)]


def link_fault(path, target):
    file, _, anchor = target.partition("#")
    file = path.parent / file if file else path
    if not file.exists():
        return "is not there"
    return "" if not anchor or anchor in anchors(file) else "has no such heading"


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(CHECKOUT).as_posix())
def test_pages_name_what_is_there(page):
    if page.name == "MODEL_CARD.md":
        return
    text = page.read_text(encoding="utf8")
    faults = [f"{target} {fault}" for target in links(page) if (fault := link_fault(page, target))]
    if page.name != "CHANGELOG.md":  # which names what was, too
        faults += [f"{path} is not there" for path in named_paths(text) if not (CHECKOUT / path).exists()]
        faults += [f"{name} is not there" for name in named_modules(text) if not is_there(name)]
    targets = set(re.findall(r"^([a-z-]+):", (CHECKOUT / "Makefile").read_text(encoding="utf8"), re.MULTILINE))
    faults += [
        f"there is no make {name}"
        for name in re.findall(r"(?:^|`)make ([a-z][a-z-]+)", text, re.M)
        if name not in targets
    ]
    assert not faults, "\n".join(faults)


def is_test(path, name):
    """Whether a file of tests has a test of that name."""
    tree = ast.parse(path.read_text(encoding="utf8")) if path.is_file() else ast.Module([], [])
    return any(isinstance(node, ast.FunctionDef) and node.name == name for node in tree.body)


def rows_of_faults(page):
    """(What happens, the tests that it names, each as (file, name)) of each row of the table of faults."""
    table = page.partition("## What can go wrong")[2].partition("\n#")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    return [(row[0], re.findall(r"`([\w/]+\.py)::(\w+)`", row[-1])) for row in rows]


def test_every_row_of_the_table_of_faults_names_tests_that_are_there():
    rows = rows_of_faults((CHECKOUT / "docs/training.md").read_text(encoding="utf8"))
    assert len(rows) > 20 and not [what for what, named in rows if not named]
    gone = [f"{path}::{name}" for _, named in rows for path, name in named if not is_test(TRAINING / path, name)]
    assert not gone, gone
    assert not is_test(TRAINING / "test_launched.py", "test_nothing") and not is_test(TRAINING / "none.py", "test_a")


@pytest.mark.parametrize("page", ["speed.md", "ablations.md"])
def test_answers_take_two_pages_at_most(page):
    assert len((CHECKOUT / "docs" / page).read_text(encoding="utf8").splitlines()) <= 120


def documentation(tree):
    """The docstrings of a module, its classes and functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def test_docstrings_name_what_is_there():
    faults = []
    for path in (path for top in TOPS[:-1] for path in sorted((CHECKOUT / top).rglob("*.py"))):
        for text in documentation(ast.parse(path.read_text(encoding="utf8"))):
            missing = [name for name in named_paths(text) if not (CHECKOUT / name).exists()]
            missing += [name for name in named_modules(text) if not is_there(name)]
            missing += re.findall(r"design'?s?,? sections? \d+", text)  # docs/design.md has names, not numbers
            faults += [f"{path.relative_to(CHECKOUT)}: {name}" for name in missing]
    assert not faults, "\n".join(faults)


def test_names_that_lead_nowhere_are_seen():
    text = (
        "docs/nothing.md, training.md, `docs/data.md`, `training.data.order.SampleOrder`, training.data.order.Nothing"
    )
    assert [path for path in named_paths(text) if not (CHECKOUT / path).exists()] == ["docs/nothing.md"]
    assert [name for name in named_modules(text) if not is_there(name)] == ["training.data.order.Nothing"]
    page = CHECKOUT / "docs" / "design.md"
    assert link_fault(page, "#speed") == ""
    assert link_fault(page, "#spede") == "has no such heading"
    assert link_fault(page, "none.md") == "is not there"
