"""From a filled-in form to a plan that was checked, and from a plan to runs in the background."""

import json
import os
import re
import shlex
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from equipoise import registry
from equipoise.errors import ConfigError, EquipoiseError, InputError
from equipoise.pipelines import config as configs
from equipoise.pipelines.config import RunConfig
from equipoise.pipelines.config.builtin import shipped
from equipoise.pipelines.config.records import trusting_options
from equipoise.pipelines.jobs import background, checks
from equipoise.pipelines.jobs import sweep as sweeps
from equipoise.pipelines.jobs.axes import expand
from equipoise.pipelines.jobs.epochs import in_steps
from equipoise.pipelines.runs.status import Status
from equipoise.ui import draw, forms
from equipoise.ui.safety import Site

PROMPT = "data.instance_prompt"  # where a pipeline has it, one caption that goes before the pictures' own
UPLOADED = "GRADIO_TEMP_DIR"  # names the folder of what a server keeps only while it runs


@dataclass(frozen=True)
class Plan:
    """What a filled-in form would start."""

    config: RunConfig
    runs: list[RunConfig]  # it will train: the configuration itself, or its sweep's cells
    preset: str  # the shipped configuration it began with, or ""
    workers: int | None = None  # processes that train a sweep; None: as many as the command line would take

    @property
    def yaml(self) -> str:
        return configs.dump(self.config, as_given=bool(self.config.sweep))

    @property
    def command(self) -> str:
        """What does the same in a terminal."""
        verb = "sweep" if self.config.sweep else "train"
        more = [f"--workers={self.workers}"] if self.config.sweep and self.workers else []
        if not self.preset:
            return f"{' '.join(['equipoise', verb, 'FILE.yaml', *more])}   # the YAML below"
        before = configs.flat(configs.load(self.preset), as_given=True)
        words = ["equipoise", verb, self.preset]
        for key, value in configs.flat(self.config, as_given=True).items():
            if value != before.get(key) and key not in ("sweep", "runs"):
                words.append(f"{key}={_word(value)}")
        if self.config.sweep and self.config.sweep != before["sweep"]:
            for key, values in self.config.sweep.items():
                words += ["--axis", f"{key}={json.dumps(values)}"]
        return " ".join(map(shlex.quote, [*words, *more, f"--runs={self.config.runs}"]))


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@registry.looked_up_once()
def plan(
    site: Site,
    pipeline: str,
    preset: str,
    shown: dict[str, Any],
    rows: Sequence[Sequence[Any]],
    workers: int | None = None,
) -> Plan:
    """Checks a filled-in form.

    Raises:
        ConfigError: everything that is wrong with the form itself, one line each. `check_plan` says the rest.
    """
    cls = registry.load("pipelines", pipeline)
    for short in ("data", "model"):
        if (key := cls.Config.SHORT.get(short)) in shown:
            shown = {**shown, key: site.path(str(shown[key] or ""))}
    wrong: list[str] = []
    values = forms.read(cls.Config, shown, rows, wrong)
    try:
        base = load_shipped(preset) if preset else plain(pipeline, cls.Config, values)
        config = configs.set_keys(base, {**values, "runs": str(site.store.root)}, source="form")
    except ConfigError as error:
        raise ConfigError([*wrong, *error.problems]) from None
    if wrong:
        raise ConfigError(wrong)
    return planned(site, config, preset, workers)


def planned(site: Site, config: RunConfig, preset: str = "", workers: int | None = None) -> Plan:
    """What starting a configuration comes to.

    Raises:
        ConfigError: an axis of its sweep, or a path that leads out of the folders that this page may read.
    """
    runs = list(expand(config).values()) if config.sweep else [config]
    if problems := site.problems(config, *runs):
        raise ConfigError(problems)
    return Plan(config, runs, preset, workers)


def check_plan(made: Plan) -> None:
    """Refuses what starting it would refuse. May take seconds: it looks at model and data.

    Raises:
        ConfigError: everything that is wrong, one line each.
    """
    checks.check(made.runs)
    in_steps(made.config)  # counts what epochs are


def plain(pipeline: str, cls: type[RunConfig], values: dict[str, Any]) -> RunConfig:
    """A pipeline's record with its own defaults, and from the form what it requires."""
    given = {key: value for key, value in values.items() if key != "sweep"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "form.yaml"
        file.write_text(json.dumps({"pipeline": pipeline, "name": "run"}))  # the form's own is checked with the rest
        words = [
            f"{key.key}={_word(given[key.key])}" for key in configs.describe(cls) if key.required and key.key in given
        ]
        return configs.load(file, [word for word in words if not word.startswith(("pipeline=", "name="))])


def launch(site: Site, made: Plan, workers: int | None = None) -> tuple[str, str]:
    """Creates the run or sweep, and has it trained in the background in its turn; returns its id and a message.

    Raises:
        ConfigError: the world it points to is not as it should be, one line each.
    """
    config = made.config
    if (item := at_work(site, made)) is not None:
        return item.id, begun_already(item)
    if config.sweep:
        run = sweeps.create(config)
    else:
        check_plan(made)
        run = site.store.create(in_steps(config)[0])
    first = background.ahead(run)
    background.start(run, workers, in_turn=True)
    if first:
        return run.id, f"Queued {run.id}. It begins when {first.id} has ended; the tab Runs shows both."
    return run.id, f"Started {run.id}. The tab Runs shows how it goes."


def ways_on(id: str, sweep: bool) -> str:
    """Links to where what was started is watched."""
    ways = {"Watch its cells side by side in Compare": {"tab": "Compare", "compare": id}} if sweep else {}
    ways |= {"See its curves and its log in Runs": {"tab": "Runs", "run": id}}
    links = [f"<a href='?{draw.esc(urlencode(where))}'>{words}</a>" for words, where in ways.items()]
    return f"<p class='ways'>{' · '.join(links)}</p>"


def at_work(site: Site, made: Plan) -> Status | None:
    """What is at work already with this very configuration, whose results would be the same to the last bit."""
    with suppress(EquipoiseError):  # of data that is not as it should be, which starting reports
        made = replace(made, config=in_steps(made.config)[0])  # as a run is written
    for item in site.store.at_work():
        with suppress(OSError):
            if (site.store.root / item.id / "config.yaml").read_text() == made.yaml:
                return item
    return None


def begun_already(item: Status) -> str:
    words = "It is not started twice; change something, such as the seed, for another."
    return f"Started {item.id} already, which is {item.state}. {words}"


def doubts(made: Plan) -> list[str]:
    """What is unlikely to be meant, in the pipeline's words."""
    try:
        return checks.doubts(made.runs)
    except (EquipoiseError, OSError, ValueError):  # of data that is not as it should be, which starting reports
        return []


@cache
def presets() -> dict[type[RunConfig], list[str]]:
    """The shipped configurations by the record that they are written for, the one that needs nothing else first."""
    found: dict[type[RunConfig], list[str]] = {}
    for name in sorted(shipped(), key=lambda name: (not name.endswith("/demo"), name)):
        found.setdefault(configs.config_class(name), []).append(name)
    return found


def load_shipped(name: str) -> Any:
    """A configuration that comes with Equipoise, by its name; never a file.

    Raises:
        InputError: there is none of that name.
    """
    if name not in shipped():
        raise InputError(f"{name[:200]!r}: is not the name of a shipped configuration; choose one of the list.")
    return configs.load(name)


def beginning(cls: type[RunConfig]) -> tuple[dict[str, Any], list[list[str]]]:
    """What a form shows first, which is the first shipped configuration: its fields, and its plugins' options."""
    ready = presets().get(cls, [])
    if not ready:
        return {}, []
    with trusting_options():  # checked when it is started; checking it here would import torch before the page is up
        config = configs.load(ready[0])
        shown = forms.show(config)
        chosen = {item.key.key: shown[item.key.key] for item in forms.fields(cls) if item.kind == "plugin"}
        return shown, forms.given_rows(cls, chosen, config)


def read_yaml(file: str, pipeline: str | None = None) -> RunConfig:
    """A configuration that a user brings, which must be of this pipeline, where one is given.

    Raises:
        ConfigError: what is wrong with it.
    """
    try:
        config = configs.load(file)
    except EquipoiseError as error:  # by the name that the user knows, not by where the upload was put
        lines = str(error).replace(f"{Path(file).parent}{os.sep}", "").splitlines()
        raise ConfigError(lines) from None
    if pipeline and config.pipeline != pipeline:
        raise InputError(f"{Path(file).name}: is for the pipeline {config.pipeline}; choose that one above first.")
    return config


def error_notice(error: EquipoiseError, about: Callable[[str], str] | None = None) -> str:
    """An error as a list in the page, without the word for where it came from. `about`: as for `draw.notice`."""
    lines = (re.sub(r"^(form|config|cell [^:]*): ", "", line) for line in str(error).splitlines())
    return draw.notice("\n".join(lines), "bad", about)
