"""clip-benchmark's own command on a saved folder of ours: `python -m training.evaluate --bench ARGS`.

    python -m training.evaluate --bench --model runs/mine/final --dataset cifar10 --dataset_root /data
    python -m training.evaluate --bench build *.json --output benchmark.csv

ARGS are the arguments of `clip_benchmark` (its version 1.6); `eval`, `--model_type pyramidclip` and `--pretrained ''`
need not be given. Of its tasks, zeroshot_classification, zeroshot_retrieval and image_caption_selection run anywhere,
linear_probe on a CUDA device (its own condition); captioning needs a model that writes, which this is not. Data sets
are read from `--dataset_root` and not downloaded.
"""

import sys
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

from training.evaluation.loading import load_model

MODEL_TYPE = "pyramidclip"


class PictureTransform:
    """A picture -> pixel values (3, H, W) float32, by the model's own image processor. Pickles, for loader workers."""

    def __init__(self, image_processor):
        self.image_processor = image_processor

    def __call__(self, picture):
        return self.image_processor(images=[picture], return_tensors="pt")["pixel_values"][0]


class TextsToIds:
    """Texts -> token ids (N, L) int64, padded to the longest of them and cut to what the model takes."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, texts):
        texts = [texts] if isinstance(texts, str) else list(texts)
        return self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")["input_ids"]


def load_pyramidclip(model_name: str, pretrained: str = "", cache_dir: str | None = None, device="cpu"):
    """(model, transform, tokenizer), as clip-benchmark's loaders return them.

    model_name: a saved folder or Hub id. The model's `encode_image` and `encode_text` take what the other two give and
    return embeddings (N, D), not normalised: clip-benchmark does that. pretrained, cache_dir: of no use here. Raises
    ValueError where the folder lacks a part.
    """
    model, processor = load_model(_MODEL_FOLDERS.get(model_name, model_name), device=device)
    return model, PictureTransform(processor.image_processor), TextsToIds(processor.tokenizer)


# clip-benchmark puts the model's name into file names, where the slashes of a path cannot be.
_MODEL_FOLDERS: dict[str, str] = {}


def register() -> None:
    """Makes `--model_type pyramidclip` known to clip-benchmark; ImportError names the extra where it is absent."""
    try:
        from clip_benchmark import models
    except ImportError as error:
        raise ImportError(f'--bench needs clip-benchmark: pip install -e ".[eval]" ({error})') from error
    models.TYPE2FUNC[MODEL_TYPE] = load_pyramidclip
    if MODEL_TYPE not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(MODEL_TYPE)


def run_clip_benchmark(argv: Sequence[str]) -> int:
    """Runs clip-benchmark's `main` on what follows `--bench` in `argv`; its exit code.

    Raises ValueError for settings that cannot work, FileNotFoundError for data that is not there, ImportError.
    """
    place = list(argv).index("--bench")
    if place:
        raise ValueError(f"--bench comes first and takes all that follows; before it stands {' '.join(argv[:place])}")
    register()
    from clip_benchmark import cli

    with _command_line(_arguments(list(argv[1:]))), _local_data_only(), _accuracy_that_runs():
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
def _command_line(arguments: list[str]):
    before = sys.argv
    sys.argv = ["clip_benchmark", *arguments]
    try:
        yield
    finally:
        sys.argv = before


@contextmanager
def _local_data_only():
    """Its command asks every data set to download itself; here one that is not there is an error that says so."""
    from clip_benchmark import cli
    from clip_benchmark.datasets import builder

    build, call = cli.build_dataset, builder.call

    def build_local(dataset_name, root, **options):
        if "://" not in root and not Path(root).is_dir():
            raise FileNotFoundError(f"--dataset_root {root}: there is no such folder to read {dataset_name} from")
        try:
            return build(dataset_name=dataset_name, root=root, **{**options, "download": False})
        except (RuntimeError, OSError) as error:
            raise FileNotFoundError(
                f"{dataset_name} cannot be read from {root} ({error}). --bench downloads nothing; docs/evaluation.md "
                "says where data sets belong"
            ) from error

    def refuse(command, **_):
        raise FileNotFoundError(f"clip-benchmark would run: {command}")

    cli.build_dataset, builder.call = build_local, refuse
    try:
        yield
    finally:
        cli.build_dataset, builder.call = build, call


def top_k_accuracy(output, target, topk=(1,)) -> list[float]:
    """Shares of rows of `output` (N, C) whose class `target` (N,) is among the k highest scores, for each k."""
    hits = output.topk(max(topk), dim=1).indices == target[:, None]
    return [float(hits[:, :k].any(dim=1).double().mean()) for k in topk]


@contextmanager
def _accuracy_that_runs():
    """clip-benchmark 1.6.2 makes a number of an array with one element, which NumPy 2.4 no longer does."""
    from clip_benchmark.metrics import linear_probe, zeroshot_classification

    before = zeroshot_classification.accuracy
    for module in (zeroshot_classification, linear_probe):
        module.accuracy = top_k_accuracy
    try:
        yield
    finally:
        for module in (zeroshot_classification, linear_probe):
            module.accuracy = before
