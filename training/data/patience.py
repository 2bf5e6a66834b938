"""How long a reader waits for a store that is away: number of attempts, total time, growing pauses."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LONGEST_PAUSE = 60.0


@dataclass(frozen=True)
class Patience:
    """How often and how long something is tried.

    Attributes:
        attempts: tries in all, at least 1.
        seconds: from the first failure on; no further try begins later.
        pause: seconds before the second try, doubled for each further one, `LONGEST_PAUSE` at most.

    Raises:
        ValueError: a number out of its bounds.
    """

    attempts: int = 10
    seconds: float = 600.0
    pause: float = 1.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or min(self.seconds, self.pause) < 0:
            raise ValueError(
                f"attempts {self.attempts}, seconds {self.seconds}, pause {self.pause}: expected at least 1, 0 and 0"
            )

    def tries(self) -> Iterator["Try"]:
        """The tries in turn, each handed out when it is time; whoever succeeds leaves the loop."""
        until = 0.0
        for number in range(1, self.attempts + 1):
            one = Try(number)
            yield one
            until = until or time.monotonic() + self.seconds
            pause = max(min(self.pause * 2 ** (number - 1), LONGEST_PAUSE), one.pause_at_least)
            if number == self.attempts or time.monotonic() + pause > until:
                return
            time.sleep(pause)


@dataclass
class Try:
    """One of several tries.

    Attributes:
        number: from 1.
        pause_at_least: seconds before the next one, for servers that say so.
    """

    number: int
    pause_at_least: float = 0.0


def is_away(folder: str | os.PathLike[str]) -> bool:
    """Whether a local folder itself cannot be reached, so that what is missing in it may come back."""
    try:
        return not Path(folder).is_dir()
    except OSError:
        return True
