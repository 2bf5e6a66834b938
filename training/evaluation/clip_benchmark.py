"""clip-benchmark's own command on a saved folder of ours: `python -m training.evaluate --bench ARGS`.

    python -m training.evaluate --bench --model runs/mine/final --dataset cifar10 --dataset_root /data
    python -m training.evaluate --bench build *.json --output benchmark.csv

ARGS are the arguments of `clip_benchmark` (its version 1.6); `eval`, `--model_type pyramidclip` and `--pretrained ''`
need not be given. Of its tasks, zeroshot_classification, zeroshot_retrieval and image_caption_selection run anywhere,
linear_probe on a CUDA device (its own condition); captioning needs a model that writes, which this is not. Data sets
are read from `--dataset_root` and not downloaded.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from PIL import Image

from pyramidclip_hf.image_processing_pyramidclip import PyramidCLIPImageProcessor
from pyramidclip_hf.loading import load_model
from pyramidclip_hf.modeling_pyramidclip import PyramidCLIPModel
from pyramidclip_hf.tokenization_pyramidclip import PyramidCLIPTokenizer

MODEL_TYPE = "pyramidclip"
# clip-benchmark puts the model's name into file names, where the slashes of a path cannot be.
_MODEL_FOLDERS: dict[str, str] = {}


class PictureTransform:
    """A picture -> pixel values (3, H, W) float32, by the model's own image processor. Pickles, for loader workers."""

    def __init__(self, image_processor: PyramidCLIPImageProcessor):
        self.image_processor = image_processor

    def __call__(self, picture: Image.Image) -> torch.Tensor:
        """The pixel values of one picture."""
        return self.image_processor(images=[picture], return_tensors="pt")["pixel_values"][0]


class TextsToIds:
    """Texts -> token ids (N, L) int64, padded to the longest of them and cut to what the model takes."""

    def __init__(self, tokenizer: PyramidCLIPTokenizer):
        self.tokenizer = tokenizer

    def __call__(self, texts: str | Sequence[str]) -> torch.Tensor:
        """The token ids of one text or of several."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        return self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")["input_ids"]


def load_pyramidclip(
    model_name: str, pretrained: str = "", cache_dir: str | None = None, device: torch.device | str = "cpu"
) -> tuple[PyramidCLIPModel, PictureTransform, TextsToIds]:
    """Model, transform and tokenizer, as clip-benchmark's loaders return them.

    Args:
        model_name: a saved folder or Hub id.
        pretrained: of no use here.
        cache_dir: of no use here.
        device: where the model is to compute.

    Returns:
        The model's `encode_image` and `encode_text` take what the other two give and return embeddings (N, D), not
        normalised: clip-benchmark does that.

    Raises:
        ValueError: the folder lacks a part.
    """
    loaded = load_model(_MODEL_FOLDERS.get(model_name, model_name), device=device)
    processor = loaded.processor
    return loaded.model, PictureTransform(processor.image_processor), TextsToIds(processor.tokenizer)


def register() -> None:
    """Makes `--model_type pyramidclip` known to clip-benchmark, and its accuracy one that runs.

    Raises:
        ImportError: clip-benchmark is absent; the message names the extra.
    """
    try:
        from clip_benchmark import models
        from clip_benchmark.metrics import linear_probe, zeroshot_classification
    except ImportError as error:
        raise ImportError(f'--bench needs clip-benchmark: pip install -e ".[eval]" ({error})') from error
    models.TYPE2FUNC[MODEL_TYPE] = load_pyramidclip
    if MODEL_TYPE not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(MODEL_TYPE)
    # Version 1.6.2 makes a number of an array with one element, which NumPy 2.4 no longer does.
    zeroshot_classification.accuracy = linear_probe.accuracy = top_k_accuracy


def top_k_accuracy(output: torch.Tensor, target: torch.Tensor, topk: Sequence[int] = (1,)) -> list[float]:
    """Shares of rows of `output` (N, C) whose class `target` (N,) is among the k highest scores, for each k."""
    hits = output.topk(max(topk), dim=1).indices == target[:, None]
    return [float(hits[:, :k].any(dim=1).double().mean()) for k in topk]


def run_clip_benchmark(argv: Sequence[str]) -> int:
    """Runs clip-benchmark's `main` on what follows `--bench` in `argv`; its exit code.

    Its command reads the words of the process, and asks every data set to download itself, which no option turns off.

    Raises:
        ValueError: settings that cannot work.
        FileNotFoundError: data that is not there.
        ImportError: clip-benchmark is absent.
    """
    place = list(argv).index("--bench")
    if place:
        raise ValueError(f"--bench comes first and takes all that follows; before it stands {' '.join(argv[:place])}")
    register()
    from clip_benchmark import cli
    from clip_benchmark.datasets import builder

    words = ["clip_benchmark", *_arguments(list(argv[1:]))]
    local = _local_only(cli.build_dataset)
    with _replaced(sys, "argv", words), _replaced(cli, "build_dataset", local), _replaced(builder, "call", _refuse):
        return cli.main() or 0


def _arguments(given: list[str]) -> list[str]:
    """The arguments for clip-benchmark: what goes without saying is added, and model folders get plain names."""
    if given[:1] == ["build"]:
        return given
    given = given[1:] if given[:1] == ["eval"] else given
    if _values(given, "--task") == ["captioning"]:
        raise ValueError("--task captioning needs a model that writes text; PyramidCLIP compares pictures and texts")
    if _values(given, "--model_type") not in ([], [MODEL_TYPE]):
        return ["eval", *given]
    if not _values(given, "--model") and not {"-h", "--help"} & set(given):
        raise ValueError("--bench needs --model: a folder written by save_pretrained, or a Hub id")
    for name in _values(given, "--model"):
        _MODEL_FOLDERS[name.strip("./").replace("/", "_") or name] = name
    plain = {folder: name for name, folder in _MODEL_FOLDERS.items()}
    defaults = {"--model_type": MODEL_TYPE, "--pretrained": ""}
    added = [word for flag, value in defaults.items() if flag not in given for word in (flag, value)]
    return ["eval", *(plain.get(word, word) for word in given), *added]


def _values(words: list[str], flag: str) -> list[str]:
    """The words behind a flag, up to the next flag."""
    if flag not in words:
        return []
    rest = words[words.index(flag) + 1 :]
    end = next((place for place, word in enumerate(rest) if word.startswith("--")), len(rest))
    return rest[:end]


@contextmanager
def _replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """The attribute `name` of `owner` is `value` in the block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _local_only(build: Callable[..., Any]) -> Callable[..., Any]:
    """Its `build_dataset` without downloading; a data set that is not there is an error that says so."""

    def build_local(dataset_name: str, root: str, **options: Any) -> Any:
        if "://" not in root and not Path(root).is_dir():
            raise FileNotFoundError(f"--dataset_root {root}: there is no such folder to read {dataset_name} from")
        try:
            return build(dataset_name=dataset_name, root=root, **{**options, "download": False})
        except (RuntimeError, OSError) as error:
            raise FileNotFoundError(
                f"{dataset_name} cannot be read from {root} ({error}). --bench downloads nothing; docs/evaluation.md "
                "says where data sets belong"
            ) from error

    return build_local


def _refuse(command: str, **_: Any) -> NoReturn:
    """In place of `subprocess.call`, by which some data sets fetch themselves whatever they are told."""
    raise FileNotFoundError(f"clip-benchmark would run: {command}")
