"""Plain CLIP models of three origins under our names: transformers' `CLIPModel`, open_clip's, and OpenAI's files.

open_clip and OpenAI name their tensors as the released PyramidCLIP checkpoints do, but for the two halves of a
transformer, so the same table (`key_map`) reads them; the rows of the region branch are what CLIP does not have.
What a configuration says and we cannot do is refused: a model that computes something else is worse than none.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from conversion.architecture import grid_side, make_config, token_ids
from conversion.checkpoint_file import as_float32, read_checkpoint, state_dict_of
from conversion.key_map import REFERENCE_SPLIT, Row, key_table
from pyramidclip_hf.configuration_pyramidclip import PyramidCLIPConfig
from pyramidclip_hf.files import parse_json, read_utf8
from pyramidclip_hf.hub_reach import asking_hub
from pyramidclip_hf.loading import check_weights
from pyramidclip_hf.modeling_pyramidclip import PyramidCLIPModel
from pyramidclip_hf.saved_folders_pyramidclip import damage_named

# Only PyramidCLIP has these parameters.
REGION_PARAMETERS = ("roi_projection.", "roi_layernorm.")
# Numbers that OpenAI's archives hold beside the weights, and a mask that older open_clip versions saved.
_NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")
_FILES = (".pt", ".pth", ".bin", ".safetensors", ".ckpt", ".tar")
_OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")

# open_clip's options whose other values compute something that PyramidCLIP's towers do not.
_FIXED_VISION = {"ls_init_value": None, "attentional_pool": False, "no_ln_pre": False, "final_ln_after_pool": False,
                 "pool_type": "tok", "act_kwargs": None, "timm_model_name": None, "input_patchnorm": False}  # fmt: skip
_FIXED_TEXT = {"ls_init_value": None, "embed_cls": False, "no_causal_mask": False, "final_ln_after_pool": False,
               "proj_bias": False, "proj_type": "linear", "act_kwargs": None, "hf_model_name": None}  # fmt: skip
_FIXED_BLOCK = {"block_type": None, "qk_norm": False, "scaled_cosine_attn": False, "scale_heads": False,
                "scale_attn_inner": False, "scale_attn": False, "scale_fc": False}  # fmt: skip
_FREE_VISION = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout",
                "pos_embed_type", "output_tokens", "norm_kwargs", "global_average_pool"}  # fmt: skip
_FREE_TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "pad_id", "eos_id", "pool_type",
              "output_tokens", "norm_kwargs"}  # fmt: skip
_FREE_MODEL = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale"}


@dataclass
class ClipSource:
    """A CLIP model as a PyramidCLIP model without LeFF, pooling at the end token.

    Attributes:
        config: its configuration.
        state_dict: fp32 tensors under our names, all but the region branch.
        image_settings: what the image processor needs beside the size.
        notes: what the user should know.
    """

    config: PyramidCLIPConfig
    state_dict: dict[str, torch.Tensor]
    image_settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_clip(
    model: str | Path,
    *,
    config_file: str | Path | None = None,
    hidden_act: str | None = None,
    vision_heads: int | None = None,
    text_heads: int | None = None,
    allow_torchscript: bool = False,
) -> ClipSource:
    """Reads a CLIP model.

    Args:
        model: a folder or Hub id with a Transformers `CLIPModel` or an open_clip model, or a file of weights under
            open_clip's and OpenAI's names.
        config_file: open_clip's JSON for a file of weights; without it sizes come from the shapes.
        hidden_act: for a file of weights without a JSON; "quick_gelu" by default, as in OpenAI's models.
        vision_heads: the same; width / 64 by default.
        text_heads: the same; width / 64 by default.
        allow_torchscript: open TorchScript archives, see `checkpoint_file.read_checkpoint`.

    Raises:
        ValueError: the model is no CLIP, or has what PyramidCLIP's towers do not compute.
        OSError: nothing there, or no connection to the Hub.
    """
    with _read_as_clip(model):
        path = Path(model)
        if path.is_file() or (not path.exists() and path.suffix in _FILES):
            tensors, widened = as_float32(_weights_of(read_checkpoint(path, allow_torchscript), path), path)
            settings = _open_clip_settings(_read_json(config_file)) if config_file is not None else None
            if settings is None:
                settings, note = _shape_settings(hidden_act, vision_heads, text_heads)
            source = _from_openai_names(tensors, settings)
            source.notes += ([] if config_file is not None else [note]) + _widening_notes(widened)
            return source
        given = {"--config": config_file, "--hidden-act": hidden_act, "--vision-heads": vision_heads,
                 "--text-heads": text_heads}  # fmt: skip
        if any(value is not None for value in given.values()):
            raise ValueError(f"{list(given)} are for a file of weights; {model} brings its own configuration.")
        config_path = _model_file(model, "config.json")
        if config_path is not None and _read_json(config_path).get("model_type") == "clip":
            return _from_transformers(model)
        config_path = _model_file(model, "open_clip_config.json")
        if config_path is not None:
            return _from_open_clip(model, config_path, allow_torchscript)
        raise ValueError(
            f"{model} is no CLIP model: expected config.json with model_type clip, or open_clip_config.json, in a "
            "folder or on the Hub; or a file of weights."
        )


@contextmanager
def _read_as_clip(model: str | Path) -> Iterator[None]:
    """What a description with values of other kinds, or weights of other dimensions, raise becomes a ValueError."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{model} is no CLIP model that can be read: {type(error).__name__}: {error}") from error


def _read_json(path: str | Path) -> dict[str, Any]:
    try:
        content = parse_json(read_utf8(path))
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}, expected a mapping")
        return content
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error


def _model_file(model: str | Path, name: str) -> Path | None:
    """A file of a folder or of a Hub repository, downloaded into the cache; `None` where there is none."""
    if Path(model).is_dir():
        path = Path(model) / name
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    with asking_hub() as out_of_reach:
        try:
            return Path(hf_hub_download(str(model), name))
        except HFValidationError as error:
            raise FileNotFoundError(f"There is no file or folder {model}, and it is no Hub id either.") from error
        except LocalEntryNotFoundError as error:
            raise FileNotFoundError(
                f"There is no file or folder {model}, and the Hub cannot be asked for it: {out_of_reach or error}"
            ) from error
        except EntryNotFoundError:
            return None


def _widening_notes(widened: int) -> list[str]:
    return [f"{widened} tensors were fp16 or bf16 and are converted to fp32 (exact)."] if widened else []


# ------------------------------------------------------------------------------------------------------ transformers


def _from_transformers(model: str | Path) -> ClipSource:
    from transformers import CLIPModel

    if Path(model).is_dir():
        check_weights(model, str(model))
    with asking_hub(), damage_named(model):
        loaded: Any = CLIPModel.from_pretrained(model, dtype=torch.float32, output_loading_info=True)
    clip, info = loaded
    incomplete = {kind: sorted(info[kind]) for kind in ("missing_keys", "mismatched_keys") if info[kind]}
    if incomplete:
        raise ValueError(f"{model} is incomplete: {incomplete}.")
    text, vision = clip.config.text_config, clip.config.vision_config
    shared = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
              "layer_norm_eps", "attention_dropout")  # fmt: skip
    ids = token_ids(text.vocab_size)
    # 2 stands for CLIP's own rule, the highest id, in configurations written before transformers knew the real one.
    if isinstance(text.eos_token_id, int) and 2 < text.eos_token_id < text.vocab_size:
        ids["eos_token_id"] = text.eos_token_id
    config = make_config(
        text_config={
            **{name: getattr(text, name) for name in shared},
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.max_position_embeddings,
            "pooling": "eos",
            **ids,
        },
        vision_config={
            **{name: getattr(vision, name) for name in shared},
            "tower": "vit",
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "num_channels": vision.num_channels,
            "num_leff_layers": 0,
        },
        projection_dim=clip.config.projection_dim,
    )
    names = {name: name.replace("pre_layrnorm", "pre_layernorm") for name in clip.state_dict()}
    state_dict = {names[name]: tensor for name, tensor in clip.state_dict().items()}
    _check_complete(state_dict, config)
    settings, notes = _transformers_image_settings(model)
    return ClipSource(config, state_dict, settings, notes)


def _transformers_image_settings(model: str | Path) -> tuple[dict[str, Any], list[str]]:
    """Mean, deviation and filter of the model's image processor, wherever this version of transformers put them."""
    found: dict[str, Any] = {}
    for name in ("processor_config.json", "preprocessor_config.json"):
        path = _model_file(model, name)
        if path is not None:
            content = _read_json(path)
            found = content.get("image_processor", content) if isinstance(content, dict) else {}
            if "image_mean" in found:
                break
    settings: dict[str, Any] = {name: found[name] for name in ("image_mean", "image_std", "resample") if name in found}
    if not found:
        return settings, ["The model came without image settings; the processor has CLIP's."]
    size = found.get("size")
    if isinstance(size, Mapping) and "shortest_edge" not in size:
        return settings, [f"The model's pictures were resized to {dict(size)}; this processor crops them to a square."]
    return settings, []


def _check_complete(state_dict: Mapping[str, torch.Tensor], config: PyramidCLIPConfig) -> None:
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in PyramidCLIPModel(config).state_dict().items()
                    if not any(part in name for part in REGION_PARAMETERS)}  # fmt: skip
    given = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    if expected != given:
        raise ValueError(
            f"The CLIP model has another structure: missing {sorted(set(expected) - set(given)) or 'nothing'}; unused "
            f"{sorted(set(given) - set(expected)) or 'nothing'}; misshapen "
            f"{[n for n in expected if n in given and expected[n] != given[n]] or 'nothing'}."
        )


# ------------------------------------------------------------------------------------------- open_clip and OpenAI


def _from_open_clip(model: str | Path, config_path: Path, allow_torchscript: bool) -> ClipSource:
    description = _read_json(config_path)
    weights = next((path for name in _OPEN_CLIP_WEIGHTS if (path := _model_file(model, name)) is not None), None)
    if weights is None:
        raise FileNotFoundError(f"{model} has open_clip_config.json, but none of {list(_OPEN_CLIP_WEIGHTS)}.")
    tensors, widened = as_float32(_weights_of(read_checkpoint(weights, allow_torchscript), weights), weights)
    source = _from_openai_names(tensors, _open_clip_settings(description))
    preprocess = description.get("preprocess_cfg", {})
    names = {"mean": "image_mean", "std": "image_std"}
    source.image_settings = {names[name]: preprocess[name] for name in names if name in preprocess}
    if preprocess.get("interpolation", "bicubic") == "bilinear":
        source.image_settings["resample"] = 2  # PIL's number
    if preprocess.get("resize_mode", "shortest") != "shortest":
        source.notes.append(
            f"The model's pictures were resized by {preprocess['resize_mode']!r}; this processor resizes the shorter "
            "side and crops the centre."
        )
    source.notes += _widening_notes(widened)
    return source


def _weights_of(checkpoint: Any, path: Path) -> dict[str, torch.Tensor]:
    """The weights of a file, the text tower without the prefix that some of open_clip's classes put in front."""
    tensors = state_dict_of(checkpoint, path)
    named = {re.sub(r"^text\.", "", name): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in named.items() if name not in _NO_WEIGHTS}


@dataclass(frozen=True)
class _Settings:
    """What no shape tells."""

    hidden_act: str = "quick_gelu"
    vision_heads: int | None = None
    vision_head_width: int | None = None
    text_heads: int | None = None
    vision_eps: float = 1e-5
    text_eps: float = 1e-5
    eos_token_id: int | None = None


def _shape_settings(hidden_act: str | None, vision_heads: int | None, text_heads: int | None) -> tuple[_Settings, str]:
    settings = _Settings(hidden_act or "quick_gelu", vision_heads, None, text_heads)
    return settings, (
        f"Shapes do not tell the activation and the heads: taken as {settings.hidden_act} and "
        f"{'width / 64' if vision_heads is None and text_heads is None else 'given'}. Models that open_clip trained "
        "usually have --hidden-act gelu; --config takes open_clip's JSON."
    )


def _open_clip_settings(description: Mapping[str, Any]) -> _Settings:
    model_cfg = description.get("model_cfg", description)
    if not isinstance(model_cfg.get("vision_cfg"), Mapping) or not isinstance(model_cfg.get("text_cfg"), Mapping):
        raise ValueError(f"Expected an open_clip configuration with vision_cfg and text_cfg, got {list(description)}.")
    vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    _refuse("vision_cfg", vision, _FIXED_VISION | _FIXED_BLOCK, _FREE_VISION)
    _refuse("text_cfg", text, _FIXED_TEXT | _FIXED_BLOCK, _FREE_TEXT)
    _refuse("model_cfg", model_cfg, {"init_logit_bias": None}, _FREE_MODEL)
    if text.get("pool_type", "argmax") not in ("argmax", "eos"):
        raise ValueError(f"open_clip's text_cfg has pool_type {text['pool_type']!r}; only argmax and eos can be read.")
    heads = {} if isinstance(vision.get("layers"), list) else {"vision_head_width": vision.get("head_width", 64)}
    if isinstance(vision.get("layers"), list):
        heads["vision_heads"] = vision.get("width", 64) * 32 // vision.get("head_width", 64)
    return _Settings(
        hidden_act="quick_gelu" if model_cfg.get("quick_gelu", False) else "gelu",
        text_heads=text.get("heads", 8),
        vision_eps=(vision.get("norm_kwargs") or {}).get("eps", 1e-5),
        text_eps=(text.get("norm_kwargs") or {}).get("eps", 1e-5),
        eos_token_id=text.get("eos_id", 2) if text.get("pool_type") == "eos" else None,
        **heads,
    )


def _refuse(section: str, given: Mapping[str, Any], fixed: Mapping[str, Any], free: set[str]) -> None:
    """Options whose value changes what the model computes, and unknown ones that are switched on."""
    wrong = {
        name: value
        for name, value in given.items()
        if (name in fixed and value != fixed[name] and value)
        or (name not in fixed and name not in free and not name.startswith(("timm_", "hf_", "attn_pooler_")) and value)
    }
    if wrong:
        raise ValueError(f"open_clip's {section} asks for {wrong}, which PyramidCLIP's towers do not compute.")


def _from_openai_names(tensors: Mapping[str, torch.Tensor], settings: _Settings) -> ClipSource:
    config = _config_of_openai_names(tensors, settings)
    rows = [row for row in key_table(config) if not any(part in row.ours[0] for part in REGION_PARAMETERS)]
    names = {_clip_name(row): row for row in rows}
    missing, unused = sorted(set(names) - set(tensors)), sorted(set(tensors) - set(names))
    if missing or unused:
        raise ValueError(
            f"The weights are not those of a CLIP model that can be read: missing {missing or 'nothing'}; unused "
            f"{unused or 'nothing'}."
        )
    state_dict = {ours: part for name, row in names.items() for ours, part in row.split(tensors[name]).items()}
    _check_complete(state_dict, config)
    return ClipSource(config, state_dict)


def _clip_name(row: Row) -> str:
    """CLIP numbers all blocks of a transformer in one sequence; of the image tower, without LeFF, all are second."""

    def number(found: re.Match) -> str:
        behind = found[1] is None and found[2] == "2"
        return f"{found[1] or ''}transformer.resblocks.{int(found[3]) + (REFERENCE_SPLIT if behind else 0)}."

    return re.sub(r"^(visual\.)?transformer\.resblocks([12])\.(\d+)\.", number, row.original)


def _config_of_openai_names(tensors: Mapping[str, torch.Tensor], settings: _Settings) -> PyramidCLIPConfig:
    absent = sorted(
        {"token_embedding.weight", "text_projection", "positional_embedding", "visual.conv1.weight"} - set(tensors)
    )
    if absent:
        raise ValueError(f"These are no weights of a CLIP model: {absent} are missing among {list(tensors)[:5]} ...")
    vocab_size, text_width = tensors["token_embedding.weight"].shape
    ids = token_ids(vocab_size)
    if settings.eos_token_id is not None:
        ids["eos_token_id"] = settings.eos_token_id
    vision = _vision_of_openai_names(tensors, settings)
    return make_config(
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": text_width,
            "intermediate_size": _inner_width(tensors, "transformer."),
            "num_hidden_layers": _depth(tensors, r"transformer\.resblocks"),
            "num_attention_heads": settings.text_heads,
            "max_position_embeddings": len(tensors["positional_embedding"]),
            "hidden_act": settings.hidden_act,
            "layer_norm_eps": settings.text_eps,
            "pooling": "eos",
            **ids,
        },
        vision_config={**vision, "layer_norm_eps": settings.vision_eps},
        projection_dim=tensors["text_projection"].shape[1],
    )


def _vision_of_openai_names(tensors: Mapping[str, torch.Tensor], settings: _Settings) -> dict[str, Any]:
    convolution = tensors["visual.conv1.weight"]
    if "visual.class_embedding" not in tensors:
        return {
            "tower": "resnet",
            "layers": tuple(_depth(tensors, rf"visual\.layer{stage}") for stage in range(1, 5)),
            "width": 2 * len(convolution),
            "image_size": 32 * grid_side(tensors, "visual.attnpool.positional_embedding"),
            "num_attention_heads": settings.vision_heads,
        }
    width, _, patch_size, _ = convolution.shape
    by_head_width = width // settings.vision_head_width if settings.vision_head_width else None
    return {
        "tower": "vit",
        "hidden_size": width,
        "intermediate_size": _inner_width(tensors, "visual.transformer."),
        "num_hidden_layers": _depth(tensors, r"visual\.transformer\.resblocks"),
        "num_attention_heads": settings.vision_heads or by_head_width,
        "patch_size": patch_size,
        "image_size": patch_size * grid_side(tensors, "visual.positional_embedding"),
        "num_leff_layers": 0,
        "hidden_act": settings.hidden_act,
    }


def _depth(tensors: Mapping[str, torch.Tensor], pattern: str) -> int:
    return len({found[1] for name in tensors if (found := re.match(pattern + r"\.(\d+)\.", name))})


def _inner_width(tensors: Mapping[str, torch.Tensor], prefix: str) -> int | None:
    weight = tensors.get(f"{prefix}resblocks.0.mlp.c_fc.weight")
    return None if weight is None else len(weight)
