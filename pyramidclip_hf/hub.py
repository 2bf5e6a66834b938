# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Sharing a model: its card, a folder that loads without this package, and publishing a folder in one commit.

>>> export_remote_code(model, processor, folder)
>>> card = build_model_card(model.config, model_name="name", repo_id="user/name")
>>> publish_folder(folder, "user/name", card=card)
"""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    get_token,
)
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.processing_utils import ProcessorMixin

from .configuration_pyramidclip import PyramidCLIPConfig
from .files import is_hidden, json_text
from .modeling_pyramidclip import PyramidCLIPModel

CARD_TEMPLATE = "model_card_template.md"

# model_type -> what the Auto classes load, as MODULE.CLASS of the files copied beside the weights.
_MODEL_AUTO_MAPS = {
    "pyramidclip": {
        "AutoConfig": "configuration_pyramidclip.PyramidCLIPConfig",
        "AutoModel": "modeling_pyramidclip.PyramidCLIPModel",
        "AutoModelForZeroShotImageClassification": "modeling_pyramidclip.PyramidCLIPModel",
        "AutoModelForImageClassification": "modeling_pyramidclip.PyramidCLIPForImageClassification",
    },
    "pyramidclip_vision_model": {
        "AutoConfig": "configuration_pyramidclip.PyramidCLIPVisionConfig",
        "AutoModel": "modeling_pyramidclip.PyramidCLIPVisionModel",
    },
    "pyramidclip_backbone": {
        "AutoConfig": "configuration_pyramidclip.PyramidCLIPBackboneConfig",
        "AutoBackbone": "modeling_pyramidclip_backbone.PyramidCLIPBackbone",
    },
    "pyramidclip_text_model": {
        "AutoConfig": "configuration_pyramidclip.PyramidCLIPTextConfig",
        "AutoModel": "modeling_pyramidclip.PyramidCLIPTextModel",
    },
}
_PROCESSOR = {"AutoProcessor": "processing_pyramidclip.PyramidCLIPProcessor"}
_IMAGE_PROCESSOR = {"AutoImageProcessor": "image_processing_pyramidclip.PyramidCLIPImageProcessor"}
# transformers reads a pair (slow, fast) here; this tokenizer is one class.
_TOKENIZER = {"AutoTokenizer": ["tokenization_pyramidclip.PyramidCLIPTokenizer", None]}

# What `from_pretrained` might take for weights: of these, only the ones in the published folder stay in a repository.
_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")

_NO_LICENSE = (
    "No licence was stated for these weights. Without one, only what the law allows anyway is allowed: ask whoever "
    "published them before you use or pass them on."
)
AUTHORS_WEIGHTS_LICENSE = (
    "The authors of PyramidCLIP published no licence for these weights. Without one, only what the law allows anyway "
    "is allowed: ask them before you use the weights in a product or pass them on, this folder included."
)

# What Markdown or HTML makes more of than the character; an underscore between letters stays one.
_MARKS = re.compile(r"[\\`*{}\[\]<>#+!|~&$]|(?<!\w)_|_(?!\w)")


class PublishError(RuntimeError):
    """A folder could not be published; the message says why, and what the repository looks like now."""


def build_model_card(
    config: PyramidCLIPConfig,
    *,
    model_name: str,
    repo_id: str | None = None,
    provenance: str = "",
    intended_use: str = "",
    training_data: str = "Not stated by whoever published these weights.",
    training: Mapping[str, Any] | None = None,
    results: Sequence[EvalResult] = (),
    limits: str = "",
    license: str = "unknown",
    license_text: str = _NO_LICENSE,
    base_model: str | None = None,
    datasets: Sequence[str] | None = None,
    language: str = "en",
    remote_code: bool = False,
) -> ModelCard:
    """The card of a model: the template `model_card_template.md` (in a checkout also `MODEL_CARD.md`), filled.

    Args:
        config: the model's configuration; sizes, objective and the number of parameters come from it.
        model_name: title, and the model's name in the metadata of the results.
        repo_id: what the example code loads; `model_name` when not given.
        provenance: sentences for the section of this name, Markdown; so are the next two.
        intended_use: what the weights are for.
        training_data: what they were trained on.
        training: settings worth showing, name -> value.
        results: `huggingface_hub.EvalResult`s; they become the table and the metadata.
        limits: sentences, Markdown.
        license: an identifier that the Hub knows, e.g. "apache-2.0"; "unknown" where none was stated.
        license_text: sentences, Markdown.
        base_model: id on the Hub.
        datasets: ids on the Hub.
        language: ISO 639-1.
        remote_code: the folder carries the code (`export_remote_code`).

    Raises:
        ValueError: `huggingface_hub` refuses the metadata.
    """
    data = ModelCardData(
        model_name=model_name if results else None,
        language=language,
        license=license,
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        tags=["pyramidclip", "clip", "image-text-retrieval"],
        base_model=base_model,
        datasets=None if datasets is None else list(datasets),
        eval_results=list(results) or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name(CARD_TEMPLATE)),
        model_name=as_markdown(model_name),
        repo_id=json_text(repo_id or model_name, ensure_ascii=False),
        facts=_facts(config),
        provenance=provenance,
        intended_use=intended_use,
        training_data=training_data,
        training={as_markdown(name): as_markdown(value) for name, value in (training or {}).items()},
        results=[_result_row(result) for result in results],
        limits=f"- {limits}\n" if limits else "",
        license_text=license_text,
        remote_code=remote_code,
    )


def _facts(config: PyramidCLIPConfig) -> dict[str, Any]:
    vision, text = config.vision_config, config.text_config
    if vision.tower == "vit":
        tower = (
            f"ViT, {vision.num_hidden_layers} blocks of width {vision.hidden_size}, patches of {vision.patch_size} "
            f"pixels, locally-enhanced feed-forward in the first {vision.num_leff_layers} blocks"
        )
    else:
        tower = f"modified ResNet, blocks {list(vision.layers)}, width {vision.width}, attention pooling"
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in PyramidCLIPModel(config).parameters())
    pooling = "maximum over all positions" if text.pooling == "max" else "end-of-text token"
    return {
        "projection_dim": config.projection_dim,
        "vision": tower,
        "text": f"causal transformer, {text.num_hidden_layers} blocks of width {text.hidden_size}, pooling: {pooling}",
        "objective": _objective(config),
        "parameters": f"{parameters / 1e6:.1f} million",
        "max_tokens": text.max_position_embeddings,
        "image_size": vision.image_size,
    }


def _objective(config: PyramidCLIPConfig) -> str:
    """What the model was trained with: pairs of levels, and terms that needed more than the model."""
    weights = ", ".join(f"{name} {weight:.4g}" for name, weight in config.loss_weights.items())
    further = ", ".join(config.further_loss_terms)
    parts = [f"softened contrastive terms ({weights})"] if weights else []
    parts += [f"terms of other kinds ({further}), whose heads are no part of the model"] if further else []
    alone = "" if weights else "; no pair of levels of the model's own"
    return f"{' and '.join(parts)}{alone}, label smoothing {config.label_smoothing:g}"


def _result_row(result: EvalResult) -> dict[str, str]:
    value = result.metric_value
    return {
        "task": as_markdown(result.task_name or result.task_type),
        "dataset": as_markdown(" ".join(filter(None, (result.dataset_name, result.dataset_config)))),
        "split": as_markdown(result.dataset_split or ""),
        "metric": as_markdown(result.metric_name or result.metric_type),
        "value": f"{value:.4g}" if isinstance(value, float) else as_markdown(value),
    }


def as_markdown(text: Any) -> str:
    """A text of unknown origin in one line of Markdown, which shows it as it is: no mark-up, HTML or table in it."""
    return _MARKS.sub(r"\\\g<0>", " ".join(str(text).split()))


def export_remote_code(
    model: PreTrainedModel, processor: ProcessorMixin | None, folder: str | Path, **save_options: Any
) -> list[Path]:
    """Saves a model and its processor so that the Auto classes load them without this package.

    The Python files lie beside the weights, the `auto_map`s name them, and `trust_remote_code=True` reads them. The
    classes themselves are left alone: what the process saves later carries no code.

    Args:
        model: `PyramidCLIPModel`, a head, or a tower.
        processor: `None` where there is none.
        folder: it is made where it is not there.
        **save_options: for `model.save_pretrained`, e.g. `max_shard_size`.

    Returns:
        the Python files written.
    """
    folder = Path(folder)
    model.save_pretrained(folder, **save_options)
    if processor is not None:
        processor.save_pretrained(folder)
    return add_remote_code(folder)


def add_remote_code(folder: str | Path) -> list[Path]:
    """Makes a saved folder loadable with `trust_remote_code=True`, see `export_remote_code`; weights are not read.

    Args:
        folder: what `save_pretrained` wrote.

    Returns:
        the Python files written.

    Raises:
        ValueError: the folder holds no PyramidCLIP model.
    """
    folder = Path(folder)
    config_file = folder / "config.json"
    model_type = _read_json(config_file).get("model_type") if config_file.is_file() else None
    if model_type not in _MODEL_AUTO_MAPS:
        raise ValueError(f"{folder} holds no PyramidCLIP model: its config.json says model_type {model_type!r}.")
    _add_auto_map(config_file, _MODEL_AUTO_MAPS[model_type])
    modules = sorted({name.split(".")[0] for name in _MODEL_AUTO_MAPS[model_type].values()})
    if (folder / "tokenizer_config.json").is_file():
        _add_auto_map(folder / "tokenizer_config.json", _TOKENIZER)
        modules.append("tokenization_pyramidclip")
    if (folder / "preprocessor_config.json").is_file():
        _add_auto_map(folder / "preprocessor_config.json", _IMAGE_PROCESSOR)
        modules.append("image_processing_pyramidclip")
    if (folder / "processor_config.json").is_file():
        _add_auto_map(folder / "processor_config.json", _PROCESSOR, image_processor=_IMAGE_PROCESSOR)
        modules.append("processing_pyramidclip")
    return [Path(shutil.copyfile(source, folder / source.name)) for source in _sources(modules)]


def _sources(modules: Iterable[str]) -> list[Path]:
    """The files of these sibling modules and of all that they import from each other."""
    package = Path(__file__).parent
    entries = [package / f"{module}.py" for module in modules]
    needed = {Path(name) for entry in entries for name in get_relative_import_files(entry)}
    return sorted(needed.union(entries))


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _add_auto_map(path: Path, auto_map: Mapping[str, Any], **nested: Mapping[str, Any]) -> None:
    content = _read_json(path)
    content["auto_map"] = {**content.get("auto_map", {}), **auto_map}
    for section, section_map in nested.items():
        if isinstance(content.get(section), dict):
            content[section]["auto_map"] = dict(section_map)
    path.write_text(json_text(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def publish_folder(
    folder: str | Path,
    repo_id: str,
    *,
    card: ModelCard | None = None,
    remote_code: bool = False,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Publish the model",
) -> str:
    """Puts a model folder into a Hub repository in one commit, making the repository where there is none.

    Large files are uploaded first and become visible with the commit only, so an interrupted push leaves the repository
    as it was. The commit also removes weights of an earlier model, which `from_pretrained` might prefer to the new
    ones; other files stay. The card is validated by the Hub beforehand. The folder is only read.

    Args:
        folder: with `config.json` and weights. Hidden files and `__pycache__` are left out.
        repo_id: "user/name".
        card: published as `README.md` in place of the folder's.
        remote_code: publish the code too, see `add_remote_code`.
        token: by default the one of `hf auth login` or HF_TOKEN. It appears in no message.
        private: visibility of a repository made here.
        revision: an existing branch; by default the main one.
        commit_message: its first line.

    Returns:
        the address of the commit.

    Raises:
        ValueError: no model in the folder, a `repo_id` or a token that cannot be.
        PublishError: no network, no right to write, a card that the Hub refuses, somebody else's commit in between.
    """
    folder = Path(folder)
    _files_to_publish(folder)
    validate_repo_id(repo_id)
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        # The libraries below quote such a token in their error and in their log.
        raise ValueError("The token holds a space, a line break or another character that no token has; copy it again.")
    with _staged(folder, card, remote_code) as staged:
        return _push(_visible_files(staged), repo_id, token, private, revision, commit_message)


def publish_space(folder: str | Path, repo_id: str, *, private: bool | None = None) -> str:
    """Puts the folder of a Gradio Space into the Space of this name in one commit, making it where there is none.

    Files that the Space has and the folder does not are left alone. The folder is only read.

    Args:
        folder: with `README.md`, whose metadata the Hub checks first, and `app.py`.
        repo_id: "user/name"; a model of that name is another repository.
        private: visibility of a Space made here.

    Returns:
        the address of the commit.

    Raises:
        ValueError: the folder is none of a Space, or the `repo_id` cannot be.
        PublishError: as `publish_folder`.
    """
    files = _visible_files(Path(folder))
    if not {"README.md", "app.py"} <= files.keys():
        raise ValueError(
            f"Expected the folder of a Space, with README.md and app.py, found neither or one at {folder}."
        )
    validate_repo_id(repo_id)
    return _push(files, repo_id, None, private, None, "Publish the page", repo_type="space")


@contextlib.contextmanager
def _staged(folder: Path, card: ModelCard | None, remote_code: bool) -> Iterator[Path]:
    """A folder elsewhere with the files to publish: links, and copies of what may be changed there."""
    with tempfile.TemporaryDirectory(prefix="pyramidclip-publish-") as name:
        staged = Path(name)
        for target, source in _files_to_publish(folder).items():
            (staged / target).parent.mkdir(parents=True, exist_ok=True)
            if source.suffix in (".json", ".md", ".py"):
                shutil.copyfile(source, staged / target)
            else:
                os.symlink(source.resolve(), staged / target)
        if remote_code:
            add_remote_code(staged)
        if card is not None:
            card.save(staged / "README.md")
        yield staged


def _push(
    files: Mapping[str, Path],
    repo_id: str,
    token: str | None,
    private: bool | None,
    revision: str | None,
    commit_message: str,
    repo_type: Literal["model", "space"] = "model",
) -> str:
    api, done = HfApi(token=token), "nothing was sent"
    try:
        # A card that the Hub would refuse is found before the repository exists.
        if "README.md" in files:
            ModelCard.load(files["README.md"], ignore_metadata_errors=False).validate(repo_type)
        sdk = "gradio" if repo_type == "space" else None
        api.create_repo(repo_id, private=private, exist_ok=True, repo_type=repo_type, space_sdk=sdk)
        done = "the repository exists and its files are as they were"
        look = api.space_info if repo_type == "space" else api.model_info
        before = look(repo_id, revision=revision)
        present = [sibling.rfilename for sibling in before.siblings or ()]
        stale = [name for name in present if name not in files and _is_weight_file(name)]
        added = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        deleted = [CommitOperationDelete(name) for name in stale]
        commit = api.create_commit(
            repo_id,
            [*added, *deleted],
            commit_message=commit_message,
            revision=revision,
            repo_type=repo_type,
            parent_commit=before.sha,
        )
        return str(commit.commit_url)
    except Exception as error:
        message = _without_tokens(f"{repo_id} was not published, {done}: {_reason(error)}", token)
        # The cause is shown only if it cannot show a token.
        raise PublishError(message) from (error if _without_tokens(repr(error), token) == repr(error) else None)


def _files_to_publish(folder: Path) -> dict[str, Path]:
    """Name in the repository -> file; ValueError where it is no model, or a link leads out of the folder."""
    if not (folder / "config.json").is_file() or not any(_is_weight_file(path.name) for path in folder.glob("*")):
        raise ValueError(f"Expected a folder with config.json and weights (model.safetensors), found none at {folder}.")
    found = _visible_files(folder)
    edge = folder.resolve()
    outside = [path for path in found.values() if edge not in path.resolve().parents]
    if outside:
        raise ValueError(
            f"{outside[0]} is a link to {outside[0].resolve()}, outside of {folder}, and would be made public: remove "
            "it, or put the file itself there."
        )
    return found


def _visible_files(folder: Path) -> dict[str, Path]:
    paths = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name.as_posix(): path
        for name, path in paths.items()
        if not any(is_hidden(part) or part == "__pycache__" for part in name.parts)
    }


def _is_weight_file(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _WEIGHT_FILES)


def _reason(error: Exception) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "the Hub is switched off (HF_HUB_OFFLINE); unset it to publish"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            return f"no right to write there; log in with `hf auth login` or set HF_TOKEN to a token that may ({error})"
        if status in (409, 412):
            return f"the repository changed meanwhile; look at it, then publish again ({error})"
        return f"the Hub answered {error}"
    if type(error).__name__ in ("ConnectError", "ConnectTimeout", "ReadTimeout", "ReadError", "RemoteProtocolError"):
        return f"no connection to the Hub ({error}); check the network, then publish again"
    return f"{type(error).__name__}: {error}"


def _without_tokens(text: str, token: str | None) -> str:
    for secret in (token, get_token()):
        # An error may quote the token as the bytes that were sent.
        for form in {secret, secret.encode("unicode_escape").decode(), repr(secret)[1:-1]} if secret else ():
            text = text.replace(form, "<token>")
    return text
