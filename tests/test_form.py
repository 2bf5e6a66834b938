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


# Know nothing but the standard library, and write a message and a whole number, or texts to one reader.
OWN_JSON = {"pyramidclip_hf/files.py", "pyramidclip_command.py", "training/prepare/steps/svg_process.py"}


def json_written(tree):
    """Lines in which the standard library writes JSON, whatever it is called there."""
    names = {
        alias.asname or alias.name: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "json"
        for alias in node.names
    }
    modules = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == "json"
    }
    writers = {"dump", "dumps", "JSONEncoder"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and names.get(node.id) in writers:
            yield node.lineno
        if isinstance(node, ast.Attribute) and node.attr in writers and getattr(node.value, "id", None) in modules:
            yield node.lineno


def test_json_is_written_by_json_text():
    faults = []
    for path in modules("pyramidclip_hf", "training", "conversion"):
        name = str(path.relative_to(CHECKOUT))
        if name not in OWN_JSON:
            faults += [f"{name}:{line}" for line in json_written(ast.parse(path.read_text(encoding="utf8")))]
    assert not faults, f"Expected json_text of pyramidclip_hf.files, which writes no NaN, at {faults}"


def test_json_that_is_written_otherwise_is_seen():
    for code in (
        "import json\njson.dumps(1)",
        "import json as j\nj.dump(1, f)",
        "from json import dumps as d\nd(1)",
        "import json\nclass E(json.JSONEncoder): ...",
    ):
        assert list(json_written(ast.parse(code))) == [2], code
    assert not list(json_written(ast.parse("import json\njson.loads('1')")))


def pictures_of_any_format(tree):
    """Lines that open a picture in whatever format Pillow knows: of PostScript it starts Ghostscript."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "open":
            image = getattr(node.func.value, "id", None) == "Image"
            if image and "formats" not in {keyword.arg for keyword in node.keywords}:
                yield node.lineno


def test_pictures_are_opened_in_named_formats():
    faults = []
    for path in modules("pyramidclip_hf", "training", "conversion"):
        lines = pictures_of_any_format(ast.parse(path.read_text(encoding="utf8")))
        faults += [f"{path.relative_to(CHECKOUT)}:{line}" for line in lines]
    assert not faults, f"Expected open_undecoded, or Image.open(..., formats=...), at {faults}"
    assert list(pictures_of_any_format(ast.parse("Image.open(a)\nImage.open(a, formats=['PNG'])"))) == [1]
