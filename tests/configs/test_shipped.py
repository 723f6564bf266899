"""Every configuration that ships is whole, explained, and replayable; and none is left out of this test."""

from pathlib import Path

import pytest

from equipoise.pipelines import config
from equipoise.pipelines.jobs import sweep

NAMES = sorted(config.shipped())


def test_all_shipped_configurations_are_covered():
    folder = Path(__file__).parents[2] / "configs"
    files = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
    assert files == NAMES and len(NAMES) >= 2


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_configuration_loads_and_can_be_replayed(name, tmp_path):
    loaded = config.load(name)
    (tmp_path / "again.yaml").write_text(config.dump(loaded))
    assert config.load(tmp_path / "again.yaml") == loaded
    if loaded.sweep:
        assert len(sweep.expand(loaded)) > 1


@pytest.mark.parametrize("name", NAMES)
def test_a_header_says_what_a_configuration_is_and_how_to_use_it(name):
    header = config.shipped()[name].read_text(encoding="utf-8").partition("\npipeline:")[0]
    assert header.startswith("# ") and f"equipoise train {name}" in header
