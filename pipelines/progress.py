"""Progress bars: one that moves where somebody watches, and now and then a line of it in a log file."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

_PAUSE = 10.0  # seconds between a log file's lines, of which work that is done sooner needs none


def progress(
    what: str,
    unit: str,  # what is counted, in the singular
    items: Iterable[Any] | None = None,  # to be counted as they are taken; without them the caller updates the bar
    total: int | None = None,
    leave: bool = True,  # whether the bar stays when all is done
    quiet: bool = False,  # whether there is none, for another process shows the same
) -> tqdm:
    """A bar with the time that is left, on standard error."""
    watched = sys.stderr.isatty()
    return tqdm(
        items,
        desc=what,
        unit=unit,
        total=total,
        leave=leave,
        dynamic_ncols=True,
        disable=quiet,
        smoothing=0.05,  # of a sweep's cells some are quicker than others; what is left shall not jump about
        mininterval=0.1 if watched else _PAUSE,
        delay=0 if watched else _PAUSE,
    )
