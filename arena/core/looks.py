"""Looks at a model on its way: the accuracy on images held out, told beside the progress."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Generator

from arena.core.contracts import BatchHook, Images
from arena.core.progress import report

OFTEN = 10.0  # seconds between two looks at least, since each costs


def looking(what: str, tell: Callable[[], float], steps: int, total: int) -> BatchHook:
    """A hook for `fit` that changes nothing: where `steps` more of `total` updates have been made,
    and not too often, it reports what `tell` says, an accuracy in [0, 1]. That draws nothing."""
    made, last = 0, time.monotonic()

    def look(images: Images, _: Generator) -> Images:
        nonlocal made, last
        if made and made % steps == 0 and time.monotonic() - last >= OFTEN:
            report(what, made, total, accuracy=tell())
            last = time.monotonic()
        made += 1
        return images

    return look
