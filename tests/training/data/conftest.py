"""Readers of small shards, for the tests here."""

import pytest

from pyramidclip_hf import PyramidCLIPImageProcessor, PyramidCLIPProcessor, PyramidCLIPTokenizer
from pyramidclip_hf.levels_pyramidclip import LEVELS
from tests.training.prepare.small_data import FEATURES, write_shards
from training.data.loader import TrainingReader, settings_for

ALL = tuple(LEVELS)


@pytest.fixture(scope="session")
def processor():
    return PyramidCLIPProcessor(PyramidCLIPImageProcessor(size=32), PyramidCLIPTokenizer(), roi_feature_size=FEATURES)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PYRAMIDCLIP_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data") / "scenes", range(44))


@pytest.fixture
def reader(processor):
    """Makes readers and ends their workers."""
    made = []

    def make(data, levels=ALL, batch=8, settings=None, **options):
        changes = {"roi_feature_size": FEATURES, **(settings or {})}
        options.setdefault("window_samples", 16)  # two of the small shards, so that an epoch has several windows
        made.append(
            TrainingReader(
                [str(one) for one in (data if isinstance(data, list) else [data])],
                settings_for(processor, levels, **changes),
                processor.tokenizer,
                batch,
                **options,
            )
        )
        return made[-1]

    yield make
    for one in made:
        one.close()
