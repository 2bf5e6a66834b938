# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Asking the Hub where it may be out of reach: known before its library has tried for half a minute, and said once."""

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants

# Where the library tells of each attempt, the first and the five after it.
_ATTEMPTS = "huggingface_hub.utils._http"

# Of the outermost `asking_hub`, which holds for those within.
_found = ""


def _is_no_attempt(record: logging.LogRecord) -> bool:
    """Keeps what says how long a refused client has to wait."""
    told = record.getMessage()
    return not (told.startswith("Retrying in") or " thrown while requesting " in told)


def hub_out_of_reach() -> str:
    """Why nothing can come from the Hub now, "" where something may: its name has no address, and no proxy is set."""
    host = urlsplit(constants.ENDPOINT).hostname
    if host is None or {"https", "http", "all"} & set(getproxies()):
        return ""
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        return f"{host} has no address here, so there seems to be no network: {error.strerror or error}"
    return ""


@contextmanager
def asking_hub() -> Iterator[str]:
    """Around what may ask the Hub; gives `hub_out_of_reach()`.

    Out of reach, what the cache holds is taken at once, as with HF_HUB_OFFLINE=1. In reach, the library's lines about
    each attempt are left out; whoever asks says in the end what came of them.
    """
    global _found
    logger, offline, outer = logging.getLogger(_ATTEMPTS), constants.HF_HUB_OFFLINE, _found
    if not offline:
        _found = hub_out_of_reach()
        constants.HF_HUB_OFFLINE = bool(_found)
    logger.addFilter(_is_no_attempt)
    try:
        yield _found
    finally:
        logger.removeFilter(_is_no_attempt)
        constants.HF_HUB_OFFLINE, _found = offline, outer
