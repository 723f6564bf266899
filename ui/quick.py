"""A start in half the time: gradio writes stubs for type checkers at each import, and here finds no source for them."""

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from equipoise.quick import no_garbage_collection


def import_gradio() -> None:
    """Imports gradio, with its reports to its makers switched off."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    with no_garbage_collection(), no_stubs():
        import gradio  # noqa: F401  for its effect


@contextmanager
def no_stubs() -> Iterator[None]:
    """Within it, gradio finds no source for a component's class, and so writes no stub beside it."""
    real = inspect.getfile

    def getfile(it: Any) -> str:
        if isinstance(it, type) and it.__module__.startswith(("gradio.", "equipoise.ui.")):
            raise OSError  # which gradio takes for "no file, so no stub"
        return real(it)

    inspect.getfile = getfile
    try:
        yield
    finally:
        inspect.getfile = real
