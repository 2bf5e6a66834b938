"""Synonyms out of a small folder in the form of WordNet's files."""

import pytest

from training.data.words import read_synonyms
from training.prepare.synonyms import main, synonyms_in

LICENCE = "  1 Made up for tests, in the form of WordNet's data files.\n"
FILES = {
    "noun": "00000100 05 n 03 dog 0 Hound 1 hunting_dog 0 001 @ 00000050 n 0000 | an animal that barks\n"
    "00000200 06 n 02 car 0 motor_vehicle 0 000 | drives\n"
    "00000300 06 n 02 TV 0 tv-set 0 000 | is watched\n",
    "verb": "00000100 30 v 02 can 0 preserve 0 000 01 + 08 00 | keep in tins\n"
    "00000200 30 v 0b run 0 go 0 race 0 r1 0 r-2 0 r_3 0 R 0 Race 0 flow 0 x. 0 y' 0 000 | move\n",
    "adj": "00000100 00 a 02 large(a) 0 big(p) 0 000 | above average\n",
    "adv": "00000100 02 r 01 alone 0 000 | without others\n",
}


@pytest.fixture
def wordnet(tmp_path):
    folder = tmp_path / "wordnet"
    folder.mkdir()
    for part, lines in FILES.items():
        (folder / f"data.{part}").write_text(LICENCE + lines)
    return folder


def test_words_of_one_set_are_synonyms(wordnet):
    assert synonyms_in(wordnet) == {
        "big": ["large"],
        "car": ["motor vehicle"],
        "dog": ["hunting dog"],
        "flow": ["go", "race", "run"],
        "go": ["flow", "race", "run"],
        "large": ["big"],
        "race": ["flow", "go", "run"],
        "run": ["flow", "go", "race"],
    }


def test_the_command_writes_what_a_run_reads(wordnet, tmp_path, capsys):
    output = tmp_path / "data" / "synonyms.json"
    assert main(["--wordnet", str(wordnet), "--output", str(output)]) == 0
    assert read_synonyms(output) == synonyms_in(wordnet)
    assert "8 words with 16 synonyms" in capsys.readouterr().out


def test_a_folder_without_the_files_and_a_damaged_one_are_said(wordnet, capsys):
    (wordnet / "data.adv").write_text("00000100 02 r zz alone\n")
    assert main(["--wordnet", str(wordnet), "--output", str(wordnet / "out")]) == 2
    assert "data.adv, line 1: expected a set of WordNet's, got '00000100" in capsys.readouterr().err
    (wordnet / "data.adj").unlink()
    assert main(["--wordnet", str(wordnet), "--output", str(wordnet / "out")]) == 2
    assert "has no data.adj: expected WordNet's files, as Debian's package wordnet-base" in capsys.readouterr().err
    assert not (wordnet / "out").exists()
