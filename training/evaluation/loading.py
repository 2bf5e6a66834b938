"""A saved model and its processor for evaluation."""

from pathlib import Path

import torch
from transformers.utils import cached_file

from pyramidclip_hf.modeling_pyramidclip import PyramidCLIPModel
from pyramidclip_hf.processing_pyramidclip import PyramidCLIPProcessor

# Without either the processor would silently take the tokenizer that the package comes with.
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")


def load_model(name: str, dtype: str = "float32", device: torch.device | str = "cpu"):
    """The model in evaluation mode and its processor; ValueError where a part is missing, saying which."""
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"--model {name}: no config.json there; expected a folder written by save_pretrained")
    elif name.startswith((".", "/")) or name.count("/") > 1:
        raise ValueError(f"--model {name}: there is no such folder")
    try:
        files = [cached_file(name, one, _raise_exceptions_for_missing_entries=False) for one in _TOKENIZER_FILES]
        if not any(files):
            raise ValueError(
                f"--model {name} has no tokenizer (tokenizer.json), so texts cannot be encoded. Save it "
                "beside the weights: PyramidCLIPProcessor().save_pretrained(folder)"
            )
        model, info = PyramidCLIPModel.from_pretrained(name, dtype=getattr(torch, dtype), output_loading_info=True)
        processor = PyramidCLIPProcessor.from_pretrained(name)
    except OSError as error:
        raise ValueError(
            f"--model {name}: expected a folder written by save_pretrained, or a Hub id ({error})"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:  # they would be drawn at random, and every result with them
        raise ValueError(
            f"--model {name}: {len(missing)} weights of the model are not in the file ({', '.join(missing[:3])}, ...); "
            "expected a whole PyramidCLIPModel, with both towers"
        )
    return model.eval().to(device), processor
