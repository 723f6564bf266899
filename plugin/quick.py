"""Quicker imports: torch, transformers and diffusers make hundreds of thousands of objects, and keep nearly all."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Within it, Python collects no garbage: searching for some takes a tenth or more of such an import."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
