"""What programs may ask through gradio_client: one reader for each tab, which starts nothing."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gradio as gr

from equipoise.errors import EquipoiseError, InputError
from equipoise.pipelines import config as configs
from equipoise.pipelines.runs import status
from equipoise.ui import launch, launch_estimates
from equipoise.ui.safety import Site


def check(site: Site, workers: int, text: str) -> dict[str, Any]:
    """What starting this YAML would do: how many runs, the complete configuration, time and memory.

    Raises:
        ConfigError: everything that is wrong with it, and would be when it is started, one line each.
    """
    try:
        written = text.encode()
    except (AttributeError, UnicodeEncodeError):  # a program may send anything
        raise InputError("config.yaml: must be the text of a configuration.") from None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.yaml")
        file.write_bytes(written)
        config = configs.set_keys(launch.read_yaml(str(file)), {"runs": str(site.store.root)})
    made = launch.planned(site, config, workers=workers)
    launch.check_plan(made)
    return {
        "runs": len(made.runs),
        "yaml": made.yaml,
        "time": launch_estimates.estimate(site, made, workers),
        "memory": launch_estimates.memory(site, made, workers),
    }


def runs(site: Site) -> list[dict[str, Any]]:
    """How all runs and sweeps stand, newest first."""
    return [status.plain(asdict(item) | {"duration": item.duration}) for item in site.store.list()]


def comparison(site: Site, id: str) -> dict[str, Any]:
    """The comparison of a run's or sweep's own settings, as its table.json has it.

    Raises:
        InputError: there is none.
    """
    return json.loads(site.file(f"{id}/comparison/table.json").read_text(encoding="utf-8"))


def build(site: Site, workers: int) -> None:
    """Names the readers /check, /runs and /comparison."""

    def asked_check(yaml: str) -> dict[str, Any]:
        return _answer(lambda: check(site, workers, yaml))

    def asked_runs() -> list[dict[str, Any]]:
        return _answer(lambda: runs(site))

    def asked_comparison(id: str) -> dict[str, Any]:
        return _answer(lambda: comparison(site, id))

    for function, name in ((asked_check, "check"), (asked_runs, "runs"), (asked_comparison, "comparison")):
        gr.api(function, api_name=name)


def _answer(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except EquipoiseError as error:  # in its own words; of anything else gradio says nothing
        raise gr.Error(str(error), print_exception=False) from None
