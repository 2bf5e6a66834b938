"""A sample that may be chosen: what rules look at, read when the first of them asks."""

from collections.abc import Callable
from functools import cached_property
from hashlib import blake2b
from typing import Any, NamedTuple

from PIL import Image

from training.data.records import BadSample, Sample, level_text, sample_from_members
from training.data.shards import check_key
from training.data.views import BadPicture, check_decodes, decoded_picture, open_picture, upright_size
from training.prepare.sources import RawPair
from training.prepare.steps.pictures import picture_suffix


def hash_of(*parts: bytes) -> int:
    """64 bits of some bytes, never 0. Among 100 million samples two agree by accident once in 3,700 data sets."""
    digest = blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return int.from_bytes(digest.digest(), "little") or 1


class Header(NamedTuple):
    """What the first bytes of a picture say: its format as Pillow calls it, and its upright size in pixels."""

    format: str
    width: int
    height: int


class Candidate:
    """One pair of a source.

    Args:
        raw: as the source gives it.
        max_image_pixels: larger pictures are refused by their header.
    """

    def __init__(self, raw: RawPair, max_image_pixels: int):
        self.raw, self.max_image_pixels = raw, max_image_pixels
        self.key, self.where = raw.key or "", raw.where
        # {model: the picture's embedding, or why it has none}. Any: the models belong to rules, which know this module.
        self.vectors: dict[Any, Any] = {}

    @cached_property
    def sample(self) -> Sample:
        """The checked sample, without its picture. Raises `BadSample`."""
        return sample_from_members(self.raw.members, self.key, self.where, require_image=False)

    @property
    def record(self) -> dict[str, Any]:
        """The fields that are no levels: what a crawler, a table or a model said of the sample. Raises `BadSample`."""
        return self.sample.extra

    def text(self, level: str) -> str:
        """The text of a level; empty where there is none. Raises `BadSample`."""
        return level_text(self.sample, level) or ""

    @property
    def picture(self) -> bytes:
        """Its encoded bytes. Raises `BadSample`."""
        if self.raw.picture is None:
            found = ", ".join(sorted(self.raw.members)) or "nothing"
            raise BadSample(self.key, self.where, "no-image", f"a rule looks at pictures, found {found}")
        return self.raw.picture

    @cached_property
    def suffix(self) -> str:
        """What the picture's member is called: `jpg`, `png`, `webp`. Raises `BadSample` for other formats."""
        try:
            return picture_suffix(self.picture, self.max_image_pixels, decode=False)
        except BadSample as bad:
            raise BadSample(self.key, self.where, bad.reason, bad.detail) from None

    def check(self, with_picture: bool, with_caption: bool) -> None:
        """Raises `BadSample` for what `pack` would not take either; without captions, what is only compared with."""
        if with_caption:
            if self.sample.caption is None:
                raise BadSample(self.key, self.where, "no-caption", "the text is missing or blank")
            try:
                check_key(self.key)
            except ValueError as error:
                raise BadSample(self.key, self.where, "bad-key", str(error)) from None
        if with_picture:
            self.suffix  # noqa: B018

    @cached_property
    def picture_hash(self) -> int:
        """64 bits of the encoded bytes. Raises `BadSample`."""
        return hash_of(self.picture)

    @cached_property
    def header(self) -> Header:
        """Format and size. Raises `BadSample`."""
        return self._of_picture(lambda: _header(self.picture, self.max_image_pixels))

    @cached_property
    def decodes(self) -> bool:
        """Whether the picture can be read to its end. Raises `BadSample` where it is none at all."""
        try:
            with open_picture(self.picture, self.max_image_pixels) as opened:
                check_decodes(opened)
        except BadPicture as bad:
            if bad.reason == "bad-picture":
                return False
            raise BadSample(self.key, self.where, bad.reason, str(bad)) from None
        return True

    @cached_property
    def pixels(self) -> Image.Image:
        """The upright RGB picture. Raises `BadSample`."""
        return self._of_picture(lambda: decoded_picture(self.picture, self.max_image_pixels))

    # Any: what `read` gives.
    def _of_picture(self, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except BadPicture as bad:
            raise BadSample(self.key, self.where, bad.reason, str(bad)) from None


def _header(data: bytes, max_image_pixels: int) -> Header:
    with open_picture(data, max_image_pixels) as opened:
        width, height = upright_size(opened) if opened.format in ("JPEG", "MPO") else opened.size
        return Header(opened.format or "", width, height)
