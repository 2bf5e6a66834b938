"""Older versions of transformers and torch than the package needs: a sentence, at the first import."""

import configparser
import importlib
import sys

import pytest

from pyramidclip_hf import versions_pyramidclip as versions


def test_a_version_below_the_floor_is_named_with_what_to_do():
    versions.check_versions({"transformers": "5.11.0", "torch": "2.6.0+cu124"})
    versions.check_versions({"transformers": "5.25.0.dev0", "torch": "2.15.0a0"})
    with pytest.raises(ImportError, match=r"needs transformers 5.11 or newer, and transformers 5.6.0 is"):
        versions.check_versions({"transformers": "5.6.0", "torch": "2.6.0"})
    with pytest.raises(ImportError, match="needs torch 2.6 or newer, and torch 2.5.1"):
        versions.check_versions({"transformers": "5.11.0", "torch": "2.5.1"})


def test_the_sentence_comes_before_anything_that_older_versions_lack(monkeypatch):
    with monkeypatch.context() as older:
        older.setattr(sys.modules["transformers"], "__version__", "4.57.1")
        older.delattr(sys.modules["transformers.masking_utils"], "create_bidirectional_mask")
        with pytest.raises(ImportError, match="PyramidCLIP needs transformers 5.11 or newer, and transformers 4.57.1"):
            importlib.reload(versions)
    importlib.reload(versions)


def test_the_first_lines_say_which_versions_are_needed(checkout):
    folder = checkout / "pyramidclip_hf"
    first = (folder / "versions_pyramidclip.py").read_text(encoding="utf8").splitlines()[1]
    for name, lowest in versions.NEEDED.items():
        assert f"{name} {lowest}" in first
    code = (folder / "configuration_pyramidclip.py").read_text(encoding="utf8").split('"""')[2].strip()
    assert code.startswith("from .versions_pyramidclip import ")


def test_setup_cfg_asks_for_the_same(checkout):
    settings = configparser.ConfigParser()
    settings.read(checkout / "setup.cfg", encoding="utf8")
    wanted = settings["options"]["install_requires"].split()
    assert {f"{name}>={lowest}" for name, lowest in versions.NEEDED.items()} <= set(wanted)
