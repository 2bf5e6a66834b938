"""The folder of a Space: the page of `pyramidclip app` for a published model, on the Hub's machines."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import SpaceCard

from pyramidclip_command import Failure
from pyramidclip_hf.app import Examples, labels_of, open_picture
from pyramidclip_hf.app_page import MAX_EXAMPLES
from pyramidclip_hf.files import folder_written_aside, json_text, read_utf8
from pyramidclip_hf.hub import PublishError, publish_space
from pyramidclip_hf.picture_files import find_pictures
from training.loop.card import model_folder

_CHECKOUT = Path(__file__).resolve().parent.parent.parent
# The package is on no index, so its files go along.
_CODE = ("pyramidclip_hf", "pyramidclip_command.py", "LICENSE", "NOTICE")
# What the page imports; the versions are the tested ones.
_REQUIRED = (
    "torch",
    "transformers",
    "huggingface_hub",
    "safetensors",
    "pillow",
    "tokenizers",
    "numpy",
    "ftfy",
    "gradio",
)
_MAX_PIXELS = 50_000_000
_APP = '''"""The page of `pyramidclip app` for {repo}."""

import os
import sys
from pathlib import Path

os.chdir(Path(__file__).parent)
sys.path.insert(0, os.getcwd())

import pyramidclip_command  # noqa: E402

words = {words}
if __name__ == "__main__":
    port = os.environ.get("GRADIO_SERVER_PORT", "7860")
    sys.exit(pyramidclip_command.main(["app", *words, "--host", "0.0.0.0", "--port", port]))
'''
_TEXT = """# {name}

Pictures and words, by [{repo}](https://huggingface.co/{repo}): classify, see why, and search by your own pictures.

This folder was written by `python -m training.publish --space`. `python app.py` serves the same page anywhere, after
`pip install -r requirements.txt`. If the model is private, give the Space a token that may read it, as its secret
`HF_TOKEN`.
"""


def tested_versions() -> dict[str, str]:
    """Package -> the version that the page is tested with, where Gradio's are those of constraints-app.txt."""
    versions: dict[str, str] = {}
    for name in ("constraints.txt", "constraints-app.txt"):
        for line in (_CHECKOUT / name).read_text(encoding="utf8").splitlines():
            package, equals, version = line.partition("==")
            if equals and not line.startswith("#"):
                versions[package] = version
    return versions


def write_space(run: Path, repo_id: str, examples: Sequence[str] = (), labels_file: str | None = None) -> Path:
    """Writes the Space's folder anew beside the model of a run, whole or not at all, and returns it.

    Args:
        run: of the run, whose folder then has `space/`, or of a model, which then has NAME-space beside it.
        repo_id: of the model; the Space reads it from the Hub.
        examples: pictures to begin with, with the regions that lie beside them.
        labels_file: labels to begin with, one a line.

    Raises:
        ValueError: a picture or the labels cannot be read, or something else lies there.
    """
    model = model_folder(run)
    folder = model.with_name("space" if model.name == "final" else f"{model.resolve().name}-space")
    if folder.exists() and not (folder / "app.py").is_file():
        raise ValueError(f"{folder} is there and was not written by --space: move it away")
    pictures = find_pictures(list(examples))[:MAX_EXAMPLES] if examples else []
    for picture in pictures:
        open_picture(picture, _MAX_PIXELS).close()
    Examples.of(pictures)
    labels = labels_of(read_utf8(labels_file)) if labels_file else []
    words = ["--model", repo_id]
    with folder_written_aside(folder) as aside:
        for name in _CODE:
            source = _CHECKOUT / name
            if source.is_dir():
                shutil.copytree(source, aside / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
            else:
                shutil.copyfile(source, aside / name)
        if pictures:
            words += ["--examples", "examples"]
            (aside / "examples").mkdir()
            for number, path in enumerate(map(Path, pictures)):
                for suffix in (path.suffix, ".json", ".roi.npy"):
                    if path.with_suffix(suffix).is_file():
                        shutil.copyfile(path.with_suffix(suffix), aside / "examples" / f"{number:02}{suffix}")
        if labels:
            words += ["--labels-file", "labels.txt"]
            (aside / "labels.txt").write_text("".join(f"{label}\n" for label in labels), encoding="utf8")
        versions = tested_versions()
        required = "".join(f"{name}=={versions[name]}\n" for name in _REQUIRED)
        (aside / "requirements.txt").write_text(required, encoding="utf8")
        (aside / "app.py").write_text(_APP.format(repo=repo_id, words=json_text(words)), encoding="utf8")
        _card(repo_id, versions["gradio"]).save(aside / "README.md")
    return folder


def _card(repo_id: str, gradio: str) -> SpaceCard:
    name = repo_id.rpartition("/")[2]
    lines = [
        f"title: {json_text(name)}",
        "colorFrom: blue",
        "colorTo: indigo",
        "sdk: gradio",
        f'sdk_version: "{gradio}"',
        'python_version: "3.11"',
        "app_file: app.py",
        "pinned: false",
        f"models: [{json_text(repo_id)}]",
        "short_description: Classify, explain and search with PyramidCLIP",
    ]
    return SpaceCard("---\n" + "\n".join(lines) + "\n---\n\n" + _TEXT.format(name=name, repo=repo_id))


def publish_page(folder: Path, repo_id: str, private: bool | None = None) -> str:
    """Publishes what `write_space` wrote; returns the address of the commit.

    Raises:
        Failure: the Hub refuses.
    """
    try:
        return publish_space(folder, repo_id, private=private)
    except PublishError as error:
        raise Failure(f"the page: {error}; its folder is {folder}") from error
