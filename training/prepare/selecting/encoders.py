"""Dual encoders that rules ask: a PyramidCLIP model, or a `CLIPModel` of Transformers, each with its own processor."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, CLIPModel

from pyramidclip_command import looks_like_a_folder
from pyramidclip_hf.loading import load_model, quiet_transformers
from pyramidclip_hf.saved_folders_pyramidclip import damage_named
from pyramidclip_hf.zero_shot import image_embeddings, text_embeddings
from training.data.records import BadSample
from training.prepare.selecting.candidates import Candidate
from training.prepare.steps.checkpoints import checkpoint_config, checkpoint_content

KINDS = ("pyramidclip", "clip")
# Threads that decode and resize the pictures of a batch.
_THREADS = 4


class _TransformersCLIP(torch.nn.Module):
    """A `CLIPModel` with the methods of ours by which `pyramidclip_hf.zero_shot` asks a model."""

    def __init__(self, clip: CLIPModel):
        super().__init__()
        self.clip, self.config = clip, clip.config

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.clip.device

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return self.clip.dtype

    def encode_image(self, pixel_values: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        """Picture embeddings (B, D); unit vectors in float32 with `normalize`."""
        embeds = self.clip.get_image_features(pixel_values=pixel_values).pooler_output
        return torch.nn.functional.normalize(embeds.float(), dim=-1) if normalize else embeds

    def encode_text(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, normalize: bool = False
    ) -> torch.Tensor:
        """Text embeddings (B, D); unit vectors in float32 with `normalize`."""
        embeds = self.clip.get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        return torch.nn.functional.normalize(embeds.float(), dim=-1) if normalize else embeds


@dataclass
class Encoder:
    """A model that gives unit vectors of pictures and texts; nothing is read before it is asked.

    Attributes:
        name: folder or Hub name.
        revision: of a Hub name.
        dtype: of the weights.
        device: where it computes.
    """

    name: str
    revision: str | None = None
    dtype: str = "float32"
    device: torch.device = field(default=torch.device("cpu"), compare=False)

    @property
    def called(self) -> str:
        """For messages."""
        return f"model {self.name}"

    # Any: each kind of model has a configuration of its own.
    @cached_property
    def config(self) -> Any:
        """Its configuration. Raises `ValueError` where there is no model, or one of another kind."""
        if looks_like_a_folder(self.name) and not os.path.isdir(self.name):
            raise ValueError(f"{self.called}: there is no such folder")
        config = checkpoint_config(self.name, self.revision, "model")
        if config.model_type not in KINDS:
            raise ValueError(
                f"{self.called} is of the kind {config.model_type!r}: expected the folder or Hub name of a PyramidCLIP "
                "model, or of a CLIPModel of Transformers"
            )
        return config

    @cached_property
    def content(self) -> str:
        """What identifies its files. Raises `ValueError` where there is no model."""
        return checkpoint_content(self.name, self.config)[:16]

    @property
    def told(self) -> str:
        """What records call it: its name, without its place, and content."""
        return f"{Path(self.name).resolve().name if os.path.isdir(self.name) else self.name}@{self.content}"

    # Any: of two kinds, which have the same methods.
    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        """The model, on its device, and its processor. Raises `ValueError` where one of them cannot be used."""
        if self.config.model_type == "pyramidclip":
            loaded = load_model(self.name, revision=self.revision, device=self.device, dtype=self.dtype, flag="model")
            # The library is named, as measuring which is faster may come out otherwise, with other last bits.
            loaded.model.fuse(linear="torch")
            self._check(loaded.processor)
            return loaded.model, loaded.processor
        model, processor = self._clip()
        self._check(processor)
        return model, processor

    def _clip(self) -> tuple[_TransformersCLIP, Any]:
        revision = self.revision or "main"
        # Any: a pair, where it is asked for what was missing.
        opened: Any
        try:
            with quiet_transformers(warnings=False), damage_named(self.name, weights=True):
                opened = CLIPModel.from_pretrained(
                    self.name,
                    revision=revision,
                    dtype=getattr(torch, self.dtype),
                    use_safetensors=True,
                    output_loading_info=True,
                )
        except Exception as error:  # on damaged files, the readers raise almost anything
            raise ValueError(f"{self.called}: cannot be loaded: {error}") from error
        model, info = opened
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise ValueError(f"{self.called}: {len(missing)} weights are missing: {missing[:3]}")
        try:
            with damage_named(self.name):
                processor = AutoProcessor.from_pretrained(self.name, revision=revision)
        except Exception as error:  # likewise
            raise ValueError(f"{self.called}: its processor is missing or cannot be loaded: {error}") from error
        if not (hasattr(processor, "image_processor") and hasattr(processor, "tokenizer")):
            raise ValueError(
                f"{self.called}: expected a processor of pictures and texts beside the weights, as save_pretrained of "
                f"a CLIPProcessor writes it, got a {type(processor).__name__}"
            )
        return _TransformersCLIP(model.eval().to(self.device)), processor

    def _check(self, processor: Any) -> None:
        """ValueError where a processor is that of another model."""
        side, words = self.config.vision_config.image_size, self.config.text_config.vocab_size
        shape = tuple(_pixels(processor, Image.new("RGB", (2 * side, side))).shape)
        ids = len(processor.tokenizer)
        if shape != (3, side, side) or ids > words:
            raise ValueError(
                f"{self.called}: the processor beside it is that of another model: it makes pictures of {shape} and "
                f"has {ids} tokens, expected {(3, side, side)} and at most {words}"
            )

    def pictures(self, candidates: Sequence[Candidate]) -> list[np.ndarray | BadSample]:
        """The unit vector (D,) of each picture, or why it has none; each candidate's is found once."""
        unknown = [one for one in candidates if self not in one.vectors]
        if unknown:
            model, processor = self._loaded

            def read(candidate: Candidate) -> torch.Tensor | BadSample:
                try:
                    return _pixels(processor, candidate.pixels)
                except BadSample as bad:
                    return bad
                except (ValueError, MemoryError) as error:
                    return BadSample(candidate.key, candidate.where, "bad-picture", f"cannot be prepared: {error}")

            with ThreadPoolExecutor(_THREADS) as pool:
                read_ones = list(pool.map(read, unknown))
            good = [one for one in read_ones if isinstance(one, torch.Tensor)]
            try:
                vectors = iter(image_embeddings(model, None, good, len(good)).numpy() if good else ())
            except ValueError as error:
                first = unknown[0]
                raise ValueError(
                    f"{self.called}, pictures from key {first.key!r} of {first.where} on: {error}"
                ) from error
            for candidate, one in zip(unknown, read_ones):
                candidate.vectors[self] = one if isinstance(one, BadSample) else next(vectors)
        return [one.vectors[self] for one in candidates]

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """The unit vectors (N, D) of some texts."""
        model, processor = self._loaded
        try:
            return text_embeddings(model, processor, texts, len(texts)).numpy()
        except ValueError as error:
            raise ValueError(f"{self.called}, captions from {texts[0][:60]!r} on: {error}") from error

    def __hash__(self) -> int:
        return hash((self.name, self.revision, self.dtype))


# Any: see `Encoder`.
def _pixels(processor: Any, picture: Image.Image) -> torch.Tensor:
    return processor.image_processor(picture, return_tensors="pt")["pixel_values"][0]
