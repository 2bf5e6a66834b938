"""Damaged bytes for each reader of files from strangers: what comes out is a value or the documented error."""

import random
import time
import zlib
from pathlib import Path

import pytest

from tests.fuzz_readers import READERS

# Seconds that one small input may take on a machine that does other things beside it.
LONGEST = 20


def damaged(whole: bytes, chance: random.Random) -> bytes:
    """Bits flipped, pieces cut out, doubled or replaced, numbers made absurd; one to four of these."""
    data = bytearray(whole)
    for _ in range(chance.randint(1, 4)):
        at, length = chance.randrange(len(data) + 1), chance.choice((1, 1, 4, 64))
        new = chance.choice((b"", chance.randbytes(length), b"\xff" * length, b"9" * 400, b"[" * 2000, b"-1", b"null"))
        if chance.random() < 0.5 and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif chance.random() < 0.1:
            del data[at:]
        else:
            data[at : at + length] = new
    return bytes(data)


def fuzz(name: str, seconds: float, least: int, folder: Path) -> None:
    """As many inputs as the seconds allow, on a busy machine `least` in longer."""
    make, read, documented = READERS[name]
    whole, number = make(folder), 0
    read(whole, folder)
    end = time.monotonic() + seconds
    while number < least or time.monotonic() < end:
        data = damaged(whole, random.Random(zlib.crc32(name.encode()) + number))
        began = time.monotonic()
        try:
            read(data, folder)
        except documented:
            pass
        except Exception as error:
            pytest.fail(f"{name}: input {number} raises {error!r}")
        longest = time.monotonic() - began
        assert longest < LONGEST, f"{name}: input {number} takes {longest:.1f} s"
        number += 1


@pytest.mark.parametrize("name", READERS)
def test_damaged_bytes_give_the_documented_error(name: str, tmp_path: Path) -> None:
    fuzz(name, 10 / len(READERS), 2, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_many_damaged_bytes_give_the_documented_error(name: str, tmp_path: Path) -> None:
    fuzz(name, 60 / len(READERS), 10, tmp_path)
