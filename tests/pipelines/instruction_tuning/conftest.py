"""Small checkpoints with random weights (see families.py), and conversations."""

import runpy
from pathlib import Path
from typing import Any

import pytest

from equipoise.pipelines import config
from equipoise.pipelines.instruction_tuning.examples import load_examples
from equipoise.pipelines.instruction_tuning.model import adapt, load_model, load_processor
from equipoise.pipelines.instruction_tuning.talk import Talk
from equipoise.pipelines.instruction_tuning.train import InstructionTuningWork
from equipoise.pipelines.runs.store import Store
from equipoise.pipelines.training.state import make_accelerator

_FAMILIES = runpy.run_path(str(Path(__file__).with_name("families.py")))
BUILDERS = _FAMILIES["BUILDERS"]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """{model type: folder}, each built when first asked for."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = _FAMILIES["write"](kind, tmp_path_factory.mktemp("checkpoints") / kind)
        return made[kind]

    return get


@pytest.fixture(scope="session")
def kinds() -> list[str]:
    return list(BUILDERS)


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Twelve conversations about pictures of one colour each, some of two turns."""
    return _FAMILIES["write_pictures"](tmp_path / "pictures")


@pytest.fixture
def sounds(tmp_path) -> Path:
    """Twelve questions about tones, as WAV at another rate than the model's and as FLAC."""
    return _FAMILIES["write_sounds"](tmp_path / "sounds")


@pytest.fixture
def films(tmp_path) -> Path:
    """Twelve questions about videos, in each half another colour."""
    return _FAMILIES["write_videos"](tmp_path / "films")


@pytest.fixture
def hosted() -> dict[str, Any]:
    """Settings of a transformers Trainer that learns fast on the CPU and reports every loss, to nobody."""
    return {
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


@pytest.fixture
def short(checkpoints, pictures, tmp_path):
    """Overrides that make a run of seconds of any kind of model."""

    def words(kind: str = "llava", data: Path | None = None) -> list[str]:
        return [
            f"model={checkpoints(kind)}",
            f"data={data or pictures}",
            "steps=6",
            "batch=2",
            "rank=2",
            "samples.count=2",
            "samples.max_new_tokens=2",
            f"runs={tmp_path / 'runs'}",
        ]

    return words


@pytest.fixture
def begun(short):
    """A run's work as training begins."""

    def get(*words: str, kind: str = "llava") -> InstructionTuningWork:
        settings = config.load("instruction_tuning/demo", [*short(kind), *words])
        model = load_model(settings.model, "no")
        talk = Talk(load_processor(settings.model), kind)
        kept, held, _ = load_examples(settings, talk)
        run = Store(settings.runs).create(settings)
        return InstructionTuningWork(settings, run, make_accelerator("no"), adapt(model, settings), talk, kept, held)

    return get
