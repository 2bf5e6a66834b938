"""`steps/pictures.py`: what encoded bytes are."""

import pytest

from tests.training.prepare.small_data import plain_picture
from training.data.records import BadSample
from training.prepare.steps.pictures import picture_suffix


def test_suffix_is_that_of_the_content():
    assert picture_suffix(plain_picture("PNG"), 10_000) == "png"
    assert picture_suffix(plain_picture("WEBP"), 10_000) == "webp"
    assert picture_suffix(plain_picture("JPEG", progressive=True), 10_000) == "jpg"
    assert picture_suffix(plain_picture("JPEG", (7, 1)), 10_000) == "jpg"
    with pytest.raises(BadSample, match="picture-too-large.*31 x 20"):
        picture_suffix(plain_picture("JPEG", (31, 20)), 600)
    cut = plain_picture("JPEG", (300, 200))[:-400]
    assert picture_suffix(cut, 100_000, decode=False) == "jpg"
    with pytest.raises(BadSample, match="bad-picture"):
        picture_suffix(cut, 100_000)
