"""Encoded pictures as the preparation steps meet them: what they are, how large, and their pixels."""

from training.data.records import BadSample
from training.data.views import ORIENTATION, BadPicture, check_decodes, open_picture

_SUFFIX_OF_FORMAT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}


def picture_suffix(data: bytes, max_pixels: int, decode: bool = True) -> str:
    """The suffix (`jpg`, `png`, `webp`) of encoded picture bytes, by their content and whatever the file was called.

    Args:
        data: the encoded picture.
        max_pixels: it may have, by its header.
        decode: read it to its end (JPEG at an eighth of its size: the whole bit stream is read, few pixels are made).

    Raises:
        BadSample: `unsupported-format`, or what `training.data.views` calls the fault: `no-picture-format`,
            `picture-too-large`, `bad-picture`.
    """
    try:
        with open_picture(data, max_pixels) as picture:
            suffix = _SUFFIX_OF_FORMAT.get(picture.format or "")
            if suffix is None:
                raise BadSample(None, None, "unsupported-format", f"{picture.format}: expected JPEG, PNG or WebP")
            if decode:
                check_decodes(picture)
            return suffix
    except BadPicture as bad:
        raise BadSample(None, None, bad.reason, str(bad)) from None


def picture_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of encoded picture bytes, or None where it cannot be told how an extractor saw it.

    That is no picture, or one with an EXIF rotation, which some apply and some do not.
    """
    try:
        picture = open_picture(data)
    except BadPicture:
        return None
    try:
        turned = picture.getexif().get(ORIENTATION, 1) != 1
    except Exception:  # as the image processor: broken metadata says nothing about the pixels
        turned = False
    return None if turned else picture.size
