"""How well a picture and its caption fit, by a model: the cosine of their embeddings."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from training.data.records import BadSample
from training.prepare.selecting.candidates import Candidate
from training.prepare.selecting.encoders import Encoder
from training.prepare.selecting.facts import Column
from training.prepare.selecting.rules import Scored, as_number, require, told

# Digits behind the point: what is kept in a record, and what rules act on, so that a later run decides alike.
_DIGITS = 6
_LEVELS = ("caption", "captions", "summary", "tags", "regions")


@dataclass
class Similarity(Scored):
    """The cosine of picture and caption by a model: bounds, or the best N over all shards. It goes into the records."""

    kind: ClassVar[str] = "similarity"
    looks_at_pictures = True
    model: str = told("", "folder or Hub name of a PyramidCLIP model or of a CLIPModel of Transformers")
    revision: str | None = told(None, "of a Hub name")
    dtype: Literal["float32", "bfloat16", "float16"] = told("float32", "of the weights")
    field: str = told("similarity", "what the records call it; FIELD_model beside it says which model that was")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.model), "model: expected the folder or Hub name of a model")
        for name in ("at_least", "at_most"):  # before the model has looked at all pairs, to take or keep each of them
            bound = getattr(self, name)
            require(bound is None or -1 <= bound <= 1, f"{name}: a cosine is between -1 and 1, got {bound}")
        require(self.field not in _LEVELS, f"field: {self.field} is a level of the sample, choose another name")
        self.encoder: Encoder = Encoder(self.model, self.revision, self.dtype)

    def column(self) -> Column:
        """The cosine."""
        identity = ("similarity", self.encoder.content, self.dtype, self.field)
        return Column(identity, "f8", self._measure, model=self.encoder.content)

    def recorded(self) -> dict[str, Column]:
        """The cosine."""
        return {self.field: self.column()}

    def _measure(self, candidates: Sequence[Candidate]) -> list[float | BadSample]:
        stored = [self._stored(candidate) for candidate in candidates]
        fresh = [one for one, value in zip(candidates, stored) if value is None]
        pictures = self.encoder.pictures(fresh)
        good = [one for one, vector in zip(fresh, pictures) if isinstance(vector, np.ndarray)]
        texts = iter(self.encoder.texts([one.text("caption") for one in good]) if good else ())
        found = iter(zip(fresh, pictures))
        values: list[float | BadSample] = []
        for value in stored:
            if value is not None:
                values.append(value)
                continue
            candidate, vector = next(found)
            values.append(vector if isinstance(vector, BadSample) else _cosine(vector, next(texts)))
        return values

    def _stored(self, candidate: Candidate) -> float | None:
        """What an earlier run left in the record; None where it is to be computed."""
        record, maker = candidate.record, f"{self.field}_model"
        if self.field not in record:
            return None
        value, by = as_number(record[self.field]), str(record.get(maker, "nobody knows whom"))
        if math.isnan(value) or by.rpartition("@")[2] != self.encoder.content:
            raise ValueError(
                f"{candidate.where}, key {candidate.key!r}: the record has the field {self.field} already, "
                f"{record[self.field]!r} by {by} and not by {self.encoder.told}. Give this one another name "
                "(`field`), or ask for the number that is there (`rule: number`)"
            )
        return value


def _cosine(picture: np.ndarray, text: np.ndarray) -> float:
    return round(float(picture.astype(np.float64) @ text.astype(np.float64)), _DIGITS)
