"""The Hub out of reach: known at once, said once, and the cache is taken."""

import logging
import time

import pytest
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError

from pyramidclip_hf.hub_reach import asking_hub, hub_out_of_reach


@pytest.fixture
def away(monkeypatch):
    """A Hub whose name has no address, asked as where nobody said that there is no network."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")


def test_a_hub_without_an_address_is_not_tried_for_half_a_minute(away, caplog):
    began = time.perf_counter()
    with asking_hub() as reason, pytest.raises(LocalEntryNotFoundError):
        with asking_hub() as again:
            assert again == reason
        assert constants.HF_HUB_OFFLINE
        hf_hub_download("someone/nothing", "config.json")
    assert time.perf_counter() - began < 3
    assert reason.startswith("hub.invalid has no address here, so there seems to be no network: ")
    assert not constants.HF_HUB_OFFLINE and not caplog.records


def test_what_may_be_reached_is_asked(away, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with asking_hub() as reason:
        assert not reason and not constants.HF_HUB_OFFLINE
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    assert not hub_out_of_reach()  # the proxy knows the address


def test_attempts_are_not_listed_and_long_waits_are_said(away, caplog):
    logger = logging.getLogger("huggingface_hub.utils._http")
    with asking_hub():
        for _ in range(3):
            logger.warning("'[Errno -2]' thrown while requesting HEAD https://hub.invalid/x")
            logger.warning("Retrying in 1s [Retry 1/5].")
        logger.warning("Rate limited. Waiting 300s before retry [Retry 1/5].")
    assert [record.getMessage().split(".")[0] for record in caplog.records] == ["Rate limited"]
    logger.warning("Retrying in 1s [Retry 1/5].")
    assert len(caplog.records) == 2
