"""Gradio's parts, made to bear what a browser may send."""

from typing import Any

import gradio as gr

from equipoise.ui.quick import no_stubs

with no_stubs():

    class Slider(gr.Slider):
        """A slider that takes the nearest number it has: an event may still be of bounds that have changed since.

        What is no number, such as an emptied box, is taken for the value that the page gave it last.
        """

        is_template = True  # for the browser it is gradio's own

        def preprocess(self, payload: Any) -> float:
            for number in (payload, self.value, self.minimum):
                if isinstance(number, int | float) and number == number:  # NaN is not
                    return super().preprocess(min(max(number, self.minimum), self.maximum))
            raise AssertionError("a slider's minimum is a number")

    class Table(gr.DataFrame):
        """A table that may also come as nothing."""

        is_template = True

        def preprocess(self, payload: Any) -> Any:
            return None if payload is None else super().preprocess(payload)
