"""`selecting/texts.py`: measures of texts in several scripts."""

import pytest

from training.prepare.selecting.texts import (
    beginning,
    ending,
    is_file_name,
    letters_alone,
    share_of_digits,
    share_of_letters,
    word_count,
)


@pytest.mark.parametrize(
    ("text", "words"),
    [("", 0), ("  ", 0), ("a cat", 2), ("un été à la mer", 5), ("红色的汽车", 5), ("red 红 car", 3), ("แมว", 3)],
)
def test_words(text, words):
    assert word_count(text) == words


@pytest.mark.parametrize(
    "text", ["IMG_0012.jpg", "img 12", "DSC00123", "20190412_1530", "a b (2).PNG", "https://x.y/z"]
)
def test_names_of_files(text):
    assert is_file_name(text)


@pytest.mark.parametrize(
    "text", ["a cat", "image of a cat 12", "photo by J. Smith", "the .jpg format explained well", ""]
)
def test_texts_that_are_no_names_of_files(text):
    assert not is_file_name(text)


def test_shares():
    assert share_of_digits("ab 12") == 0.5 and share_of_digits("٣٤") == 1 and share_of_digits("") == 0
    assert share_of_letters("été!") == 0.75 and share_of_letters("红色") == 1 and share_of_letters("--- ") == 0


def test_what_is_the_same():
    assert letters_alone("IMG 12, Set-3") == letters_alone("img 7 set 4") == "img set"
    assert letters_alone("Straße") == "strasse" and letters_alone("123") == ""
    assert ending("A cat. Free Stock Photo", 3) == "free stock photo" and beginning("Buy now a cat", 2) == "buy now"
    assert ending("free stock photo", 3) == "" and beginning("", 2) == ""
