"""What CONTRIBUTING.md says about the form of the code, where it can be counted."""

import ast
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
FUNCTION_LINES, MODULE_LINES = 80, 900
# Names that say nothing of what lies in a module.
SHAPELESS = {"utils", "util", "helpers", "misc", "common"}


def long_functions(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES:
                yield f"{node.name} has {lines} lines"


def modules(*tops):
    return [path for top in tops for path in sorted((CHECKOUT / top).rglob("*.py"))] + [
        CHECKOUT / "pyramidclip_command.py"
    ]


def test_functions_and_modules_are_short_and_named():
    faults = []
    for path in modules("pyramidclip_hf", "training", "conversion"):
        text = path.read_text(encoding="utf8")
        found = list(long_functions(ast.parse(text)))
        if len(text.splitlines()) > MODULE_LINES:
            found.append(f"{len(text.splitlines())} lines: cut it in two")
        if path.stem in SHAPELESS:
            found.append("name it after what it holds")
        faults += [f"{path.relative_to(CHECKOUT)}: {fault}" for fault in found]
    assert not faults, "\n".join(faults)


def test_long_functions_are_seen():
    body = "\n".join(["    pass"] * FUNCTION_LINES)
    assert list(long_functions(ast.parse(f"def f():\n{body}"))) == [f"f has {FUNCTION_LINES + 1} lines"]
    assert not list(long_functions(ast.parse(f"def f():\n{body}".rsplit("\n", 1)[0])))
