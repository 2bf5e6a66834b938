"""Writes docs/tour.md, every tracked file in one line: `python -m tests.tour --write`; without the flag it prints it.

What a file is comes from the file: the first sentence of its docstring, its first heading, or its first comment. Within
a folder a module stands below those that it imports, so that each can be read with what stands above it. What a folder
is comes from the README's tree, which also gives the order of folders.
"""

import argparse
import ast
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
PAGE = CHECKOUT / "docs" / "tour.md"

# Files that cannot say what they are.
DESCRIPTIONS = {
    ".gitignore": "what is made here and never committed",
    "CHANGELOG.md": "what changed, version by version",
    "CITATION.cff": "how to cite the software, and the paper",
    "LICENSE": "Apache-2.0",
    "MANIFEST.in": "what the source distribution leaves out",
    "NOTICE": "whose vocabulary, prompts and pictures are part of this, and under which licence",
    "README.md": "what it is, and the first commands",
    "constraints.txt": "the versions that the tests run with",
    "docs/app_*.png": "the page of `pyramidclip app`",
    "setup.cfg": "what is installed, what it needs, the extras, and the settings of pytest",
    "pyproject.toml": "build system, ruff, mypy",
    "docs/emoji_scenes.png": "scenes of the demo's data set, on the README's first screen",
    "docs/growth.png": "time and memory of a training step, in docs/speed.md",
    "pyramidclip_hf/clip_bpe_merges.txt.gz": "CLIP's vocabulary, as merges",
    "constraints-app.txt": "the versions that the page of `pyramidclip app` is tested with, where they differ",
    "tests/pyramidclip_hf/contrast.js": "which texts of a page are too faint",
    "pyramidclip_hf/page.css": "how all pages that are written as files look",
    "pyramidclip_hf/page.html": "the form of all pages that are written as files",
    "pyramidclip_hf/app_page.js": "what Gradio's pages lack: arrow keys, Ctrl-V, names of the examples",
    "pyramidclip_hf/app_page.css": "how the page of `pyramidclip app` looks, over Gradio's own style",
    "pyramidclip_hf/py.typed": "says that the package has types",
    "training/configs/emoji_synonyms.json": "words of the scenes' captions and their synonyms",
    "training/configs/accelerate/fsdp2_refused.yaml": "FSDP2, which training.pretrain refuses, and why",
    "*.html": "the page's form, filled by the module of its name",
    "training/static_page.js": "what the static page does: reading a picture, tokens, the two towers",
    "tests/bench/results/*.json": "numbers of one machine",
    "tests/bench/results/*.png": "the same as a picture",
    "tests/fixtures/preprocess_golden.npz": "pictures and what the reference's preprocessing makes of them",
    "tests/fixtures/tiny-*.json": "a tiny model's configuration",
    "tests/fixtures/tiny-*.npz": "its weights and inputs, and what the reference implementation computes of them",
    "tests/fixtures/tokenizer_golden.json": "texts and the reference tokenizer's ids",
}
HEAD = """# Tour

Every tracked file in one line, written by `python -m tests.tour --write` and compared by a test. Within a folder each
module needs only those above it, so read from the top. Start with the package's `configuration_pyramidclip.py`, whose
names everything else uses; for the reasons, with [design.md](design.md). Empty `__init__.py` files are left out.
"""


def tracked_files() -> list[str]:
    """Paths of the tracked files that are there, relative to the checkout."""
    shown = subprocess.run(["git", "ls-files"], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    return [name for name in shown.stdout.splitlines() if (CHECKOUT / name).is_file()]


def first_sentence(text: str) -> str:
    """The first sentence of the first paragraph, in one line, without its full stop."""
    line = " ".join(text.strip().split("\n\n")[0].split())
    return re.split(r"(?<!et al)(?<=[a-z0-9)`\"'])\. |: (?=`?(?:python|accelerate|make|pytest) )", line)[0].rstrip(".:")


def description(name: str) -> str:
    """What the tracked file `name` says that it is; empty where it says nothing."""
    for pattern, words in DESCRIPTIONS.items():
        if fnmatch(name, pattern):
            return words
    text = (CHECKOUT / name).read_text(encoding="utf8")
    if name.endswith(".py"):
        return first_sentence(ast.get_docstring(ast.parse(text)) or "")
    if name.endswith(".md"):
        heading = re.search(r"^# (.+)", text, re.MULTILINE)
        return "the model card's template" if "{{" in text else heading[1] if heading else ""
    comment = re.match(r"(?:#!.*\n)?# ?(.+)", text)
    return first_sentence(comment[1]) if comment else ""


def siblings_imported(name: str, names: list[str]) -> set[str]:
    """Which of the modules `names` of its folder the module `name` imports."""
    imported = set()
    for node in ast.walk(ast.parse((CHECKOUT / name).read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(Path(name).parent.parts) if node.level else ""
            module = ".".join(filter(None, [package, node.module]))
            imported |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return {other for other in names if other != name and other.removesuffix(".py").replace("/", ".") in imported}


def in_reading_order(names: list[str]) -> list[str]:
    """Each module behind those of its folder that it imports; `__init__.py` first, other files last."""
    modules = [name for name in sorted(names) if name.endswith(".py") and not name.endswith("__init__.py")]
    wanted = {name: siblings_imported(name, modules) for name in modules}
    ordered: list[str] = []
    while len(ordered) < len(modules):
        left = [name for name in modules if name not in ordered]
        ordered.append(next((name for name in left if wanted[name] <= set(ordered)), left[0]))
    rest = [name for name in sorted(names) if name not in ordered]
    return [name for name in rest if name.endswith(".py")] + ordered + [n for n in rest if not n.endswith(".py")]


def readme_tree() -> dict[str, str]:
    """{folder: what it is} from the README's tree, in its order; two spaces indent."""
    block = re.search(r"^```text\n(.*?)^```", (CHECKOUT / "README.md").read_text(encoding="utf8"), re.M | re.S)
    assert block is not None
    entries: dict[str, str] = {}
    above: list[str] = []
    for line in block[1].splitlines():
        match = re.fullmatch(r"( *)(\S+)/ +(\S.*)", line)
        if match:
            above = [*above[: len(match[1]) // 2], match[2]]
            entries["/".join(above)] = match[3]
    return entries


def folders_in_order(folders: set[str], tree: dict[str, str]) -> list[str]:
    """The top level first, then the README's folders, each with those below it that the tree does not list."""
    places = {"": 0} | {folder: place for place, folder in enumerate(tree, 1)}

    def place(folder: str) -> tuple[int, str]:
        above = folder
        while above and above not in places:
            above = above.rpartition("/")[0]
        return places[above] if above or not folder else len(places), folder

    return sorted(folders, key=place)


def tour() -> str:
    """The page."""
    files, tree = tracked_files(), readme_tree()
    by_folder: dict[str, list[str]] = {}
    for name in files:
        if not (name.endswith("__init__.py") and not (CHECKOUT / name).read_text(encoding="utf8").strip()):
            by_folder.setdefault(name.rpartition("/")[0], []).append(name)
    lines = [HEAD]
    for folder in folders_in_order(set(by_folder), tree):
        lines.append(f"## {folder}/\n" if folder else "## The top level\n")
        if folder in tree:
            lines.append(tree[folder][0].upper() + tree[folder][1:] + ".\n")
        for name in in_reading_order(by_folder[folder]):
            words = description(name)
            lines.append(f"- [{Path(name).name}](../{name}): {words[:1].upper()}{words[1:]}")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    """Prints the page, or writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/tour.md")
    if parser.parse_args().write:
        PAGE.write_text(tour(), encoding="utf8")
    else:
        sys.stdout.write(tour())
    return 0


if __name__ == "__main__":
    sys.exit(main())
