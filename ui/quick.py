"""Gradio's import in half the time: it writes stubs for type checkers anew each time, and here finds no source."""

import inspect
import os
from typing import Any


def import_gradio() -> None:
    """Imports gradio, with its reports to its makers switched off."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    real = inspect.getfile

    def getfile(it: Any) -> str:
        if isinstance(it, type) and it.__module__.startswith("gradio."):
            raise OSError  # which gradio takes for "no file, so no stub"
        return real(it)

    inspect.getfile = getfile
    try:
        import gradio  # noqa: F401  for its effect
    finally:
        inspect.getfile = real
