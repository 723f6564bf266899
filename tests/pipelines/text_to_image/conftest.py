"""What several tests of text-to-image tuning start from."""

import pytest

from equipoise.pipelines import config
from equipoise.pipelines.pipeline import Outcome, execute
from equipoise.pipelines.runs.store import Store
from equipoise.pipelines.text_to_image import TextToImage


@pytest.fixture
def work(short, monkeypatch):
    """The work of a run, as its loop gets it."""

    def make(*overrides):
        caught = []
        monkeypatch.setattr(
            "equipoise.pipelines.text_to_image.train.train_loop",
            lambda _, work, *rest: caught.append(work) or Outcome("stopped"),
        )
        settings = config.load("text_to_image/dreambooth", [*short, *overrides])
        execute(TextToImage, settings, Store(settings.runs).create(settings))
        return caught[0]

    return make
