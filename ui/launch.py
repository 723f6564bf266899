"""The tab Launch: a form made from a pipeline's own record, checked, shown as YAML and command, and started."""

import json
import math
import os
import re
import secrets
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import gradio as gr
from gradio.context import Context

from equipoise import registry
from equipoise.errors import ConfigError, EquipoiseError, InputError
from equipoise.pipelines import config as configs
from equipoise.pipelines.comparing import comparison
from equipoise.pipelines.config import RunConfig
from equipoise.pipelines.config.builtin import shipped
from equipoise.pipelines.config.records import trusting_options
from equipoise.pipelines.files import version, write_atomic
from equipoise.pipelines.jobs import background
from equipoise.pipelines.jobs import sweep as sweeps
from equipoise.pipelines.jobs.axes import expand
from equipoise.pipelines.runs.run import metric_lines
from equipoise.pipelines.runs.status import Status
from equipoise.ui import draw, forms
from equipoise.ui.safety import PICTURES, Site, check_picture
from equipoise.ui.widgets import Table, Updates

PROMPT = "data.instance_prompt"  # where a pipeline has it, one caption that goes before the pictures' own
UPLOADED = "GRADIO_TEMP_DIR"  # names the folder of what a server keeps only while it runs
FEW = 5  # finished runs that the estimate is made from
LOOKED_AT = 200  # finished runs among which they are sought
_WORLD = ("model.", "data.")  # sections that name what lies outside of a configuration
_READ = 2**20  # characters of a run's metrics, enough for its pace
QUIET: Any = {"show_progress": "hidden", "trigger_mode": "always_last", "api_visibility": "private"}  # of an event
_SIZES = ("train.batch", "lora.rank", "data.resolution")  # by which the largest cell of a sweep is found


@dataclass(frozen=True)
class Plan:
    """What a form comes to."""

    config: RunConfig
    cells: int  # runs it will train
    preset: str  # the shipped configuration it began with, or ""
    workers: int | None = None  # processes that train a sweep; None: as many as the command line would take

    @property
    def yaml(self) -> str:
        return configs.dump(self.config)

    @property
    def command(self) -> str:
        """What does the same in a terminal."""
        verb = "sweep" if self.config.sweep else "train"
        more = [f"--workers={self.workers}"] if self.config.sweep and self.workers else []
        if not self.preset:
            return f"{' '.join(['equipoise', verb, 'FILE.yaml', *more])}   # the YAML below"
        before = configs.flat(configs.load(self.preset))
        words = ["equipoise", verb, self.preset]
        for key, value in configs.flat(self.config).items():
            if value != before.get(key) and key not in ("sweep", "runs"):
                words.append(f"{key}={_word(value)}")
        if self.config.sweep and self.config.sweep != before["sweep"]:
            for key, values in self.config.sweep.items():
                words += ["--axis", f"{key}={json.dumps(values)}"]
        return " ".join(map(shlex.quote, [*words, *more, f"--runs={self.config.runs}"]))


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


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
        ConfigError: everything that is wrong, one line each.
    """
    cls = registry.load("pipelines", pipeline)
    for short in ("data", "model"):
        if (key := cls.Config.SHORT.get(short)) in shown:
            shown = {**shown, key: site.place(str(shown[key] or ""))}
    wrong: list[str] = []
    values = forms.read(cls.Config, shown, rows, wrong)
    try:
        base = load_shipped(preset) if preset else _plain(pipeline, cls.Config, values)
        config = configs.set_keys(base, {**values, "runs": str(site.store.root)}, source="form")
    except ConfigError as error:
        raise ConfigError([*wrong, *error.problems]) from None
    if wrong:
        raise ConfigError(wrong)
    cells = expand(config) if config.sweep else {"": config}
    if problems := site.problems(config, *cells.values()):
        raise ConfigError(problems)
    return Plan(config, len(cells), preset, workers)


def _plain(pipeline: str, cls: type[RunConfig], values: dict[str, Any]) -> RunConfig:
    """A pipeline's record with its own defaults, and from the form what it requires."""
    given = {key: value for key, value in values.items() if key != "sweep"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "form.yaml"
        file.write_text(json.dumps({"pipeline": pipeline, "name": str(given.get("name") or "run")}))
        words = [
            f"{key.key}={_word(given[key.key])}" for key in configs.describe(cls) if key.required and key.key in given
        ]
        return configs.load(file, [word for word in words if not word.startswith(("pipeline=", "name="))])


def launch(site: Site, made: Plan, workers: int | None = None) -> tuple[str, str]:
    """Creates the run or sweep, and has it trained in the background in its turn; returns its id and what to say.

    Raises:
        ConfigError: the world it points to is not as it should be, one line each.
    """
    config = made.config
    for item in site.store.at_work():  # whose results would be the same to the last bit
        with suppress(OSError):
            if (site.store.root / item.id / "config.yaml").read_text() == made.yaml:
                words = "It is not started twice; change something, such as the seed, for another."
                return item.id, f"Started {item.id} already, which is {item.state}. {words}"
    if config.sweep:
        run = sweeps.create(config)
    else:
        if problems := registry.load("pipelines", config.pipeline).check(config):
            raise ConfigError(problems)
        run = site.store.create(config)
    first = background.ahead(run)
    background.start(run, workers, in_turn=True)
    if first:
        return run.id, f"Queued {run.id}. It begins when {first.id} has ended; the tab Runs shows both."
    return run.id, f"Started {run.id}. The tab Runs shows how it goes."


def doubts(made: Plan) -> list[str]:
    """What is unlikely to be meant, in the pipeline's words."""
    cells = expand(made.config) if made.config.sweep else {"": made.config}
    pipeline = registry.load("pipelines", made.config.pipeline)
    worlds = {
        repr([(k, v) for k, v in configs.flat(cell).items() if k.startswith(_WORLD)]): cell for cell in cells.values()
    }
    try:
        return list(dict.fromkeys(line for cell in worlds.values() for line in pipeline.doubts(cell)))
    except (EquipoiseError, OSError, ValueError):  # of a world that is not as it should be, which starting says
        return []


def alike(site: Site, made: Plan) -> list[Status]:
    """The youngest finished runs whose steps cost what these will: the same but for rate, length, data and samples."""
    cells = expand(made.config) if made.config.sweep else {"": made.config}
    wanted = {repr(_cost(cell)) for cell in cells.values()}
    able = [
        item
        for item in site.store.list(states=("done",), kinds=("run", "cell"))
        if item.pipeline == made.config.pipeline and item.step and item.duration > 0
    ]
    files = ((item, site.store.root / item.id / "config.yaml") for item in able[:LOOKED_AT])
    return list(islice((item for item, file in files if _cost_of(file, *version(file)) in wanted), FEW))


@lru_cache(2 * LOOKED_AT)
def _cost_of(file: Path, *version: int) -> str:
    try:
        return repr(_cost(configs.load(file)))
    except EquipoiseError:
        return ""


def _cost(config: RunConfig) -> list[tuple[str, Any]]:
    """What of a configuration decides how long a step takes and how much memory."""
    free = ("train.steps", "train.clip", config.SHORT.get("data"))
    sections = ("model", "data", "lora", "encoder", "train", "objective", "coordinator")
    return [
        (key, value)
        for key, value in configs.flat(config).items()
        if key == "optimizer.name" or (key.partition(".")[0] in sections and key not in free)
    ]


def estimate(site: Site, made: Plan, workers: int) -> str:
    """How long it may take, from what earlier runs like it measured here."""
    cells = expand(made.config).values() if made.config.sweep else [made.config]
    steps = [count for count in (configs.flat(cell).get("train.steps") for cell in cells) if isinstance(count, int)]
    runs = f"{made.cells} runs" if made.cells > 1 else "1 run"
    long = " to ".join(map(str, dict.fromkeys([min(steps, default=0), max(steps, default=0)])))
    costs = [_took(site.store.root / item.id, item) for item in alike(site, made)]
    if not costs or not steps:
        each = " each" if made.cells > 1 else ""
        return f"{runs} of {long} steps{each}. How long a step takes is not known yet: nothing like it has run here."
    pace, rest = (median(values) for values in zip(*costs, strict=True))
    busy = [0.0] * max(1, workers)  # seconds of each worker, who takes the next run when it is done with one
    for count in steps:
        busy[busy.index(min(busy))] += pace * count + rest
    besides = f", and {rest:.3g} s for the rest of each run" if rest else ""
    words = f"{pace:.3g} s per step{besides}, measured here"
    return f"{runs} of {long} steps, about {draw.span(max(busy))} in all ({words})."


def _took(folder: Path, item: Status) -> tuple[float, float]:
    """Seconds of a finished run's steps, each, and of all else: loading, samples and checkpoints."""
    text = ""
    with suppress(OSError), open(folder / "metrics.jsonl", errors="replace") as file:  # deleted since, perhaps
        text = file.read(_READ)
    measured = [record.get("seconds") for _, record in metric_lines(text)]
    seconds = [value for value in measured if isinstance(value, int | float) and 0 <= value < math.inf]
    if not seconds:
        return item.duration / item.step, 0.0
    pace = median(seconds)  # a first step may take long
    return pace, max(0.0, item.duration - pace * item.step)


def memory(site: Site, made: Plan, workers: int) -> str:
    """How much memory it may take: what earlier runs like it held, or what the pipeline reasons."""
    at_once = min(made.cells, max(1, workers))
    times = f", {at_once} of them at a time" if at_once > 1 else ""
    seen = alike(site, made)
    held, device = (max((getattr(item, name) or 0 for item in seen), default=0) for name in ("memory", "device_memory"))
    if held:
        more = f", and {_bytes(device)} on its accelerator" if device else ""
        return f"Memory: about {_bytes(held)} for each run's process{more}, measured here{times}."
    cells = expand(made.config).values() if made.config.sweep else [made.config]
    largest = max(cells, key=lambda cell: math.prod(configs.flat(cell).get(key) or 1 for key in _SIZES))
    try:
        found = registry.load("pipelines", made.config.pipeline).memory(largest)
    except Exception:  # a model that runs on shapes alone is more than a pipeline can promise
        found = None
    if found is None:
        return "Memory: cannot be reasoned for this model before it has run here once."
    parts = {
        "weights and data": found.model,
        "gradients and optimizer": found.training,
        f"activations of a batch{f' {found.assuming}' if found.assuming else ''}": found.activations,
        "Python and its libraries": found.program,
    }
    listed = ", ".join(f"{_bytes(value)} {name}" for name, value in parts.items())
    return f"Memory: about {_bytes(found.total)} for each run's process{times}. An estimate from shapes: {listed}."


def _bytes(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{max(count / 1e6, 0.1):.3g} MB"


def save_pictures(site: Site, name: str, files: Sequence[str], captions: Sequence[Sequence[Any]]) -> str:
    """Puts uploaded pictures and their captions into a new folder; returns its path.

    Args:
        name: a word for the folder.
        files: where the upload left them.
        captions: (file name, caption) rows in the same order.

    Raises:
        InputError: no word, no pictures, too many, or one that is none.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,40}", name or ""):
        raise InputError(f"the name must be one word of letters, digits, _ and -, got {(name or '')[:60]!r}.")
    if not 0 < len(files) <= PICTURES:
        raise InputError(f"choose 1 to {PICTURES} pictures, got {len(files)}.")
    suffixes = [check_picture(Path(file), Path(file).name) for file in files]
    folder = site.store.root / "uploads" / f"{name}-{secrets.token_hex(2)}"
    folder.mkdir(parents=True)
    lines = []
    for index, (file, suffix) in enumerate(zip(files, suffixes, strict=True)):
        kept = f"{index:03d}{suffix}"
        shutil.copyfile(file, folder / kept)
        caption = str(captions[index][1] or "").strip() if index < len(captions) and len(captions[index]) > 1 else ""
        lines.append(json.dumps({"file_name": kept, "text": caption or name}, ensure_ascii=False))
    write_atomic(folder / "metadata.jsonl", "\n".join(lines) + "\n")
    return str(folder)


def forget(files: Sequence[str]) -> None:
    """Removes what an upload left in the server's own folder and is not needed any more."""
    own = os.environ.get(UPLOADED)
    for file in map(Path, files):
        if own and file.resolve().is_relative_to(Path(own).resolve()):
            file.unlink(missing_ok=True)


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
    except ConfigError as error:  # by the name that the user knows, not by where the upload was put
        lines = str(error).replace(f"{Path(file).parent}{os.sep}", "").splitlines()
        raise ConfigError(lines) from None
    if pipeline and config.pipeline != pipeline:
        raise InputError(f"{Path(file).name}: is for the pipeline {config.pipeline}; choose that one above first.")
    return config


def said(error: EquipoiseError) -> str:
    """An error as a list in the page, without the word for where it came from."""
    return draw.notice(
        "\n".join(re.sub(r"^(form|config|cell [^:]*): ", "", line) for line in str(error).splitlines()), "bad"
    )


# The page


@dataclass
class Form:
    """One pipeline's part of the tab."""

    pipeline: str
    items: list[forms.Field]
    widgets: list[Any]
    preset: gr.Dropdown
    options: gr.DataFrame

    def shown(self, values: Sequence[Any]) -> dict[str, Any]:
        return {item.key.key: value for item, value in zip(self.items, values, strict=True)}

    def fill(self, config: RunConfig) -> Updates:
        """Updates of all widgets and the table of options."""
        shown = forms.show(config)
        chosen = {item.key.key: shown[item.key.key] for item in self.items if item.kind == "plugin"}
        rows = forms.option_rows(type(config), chosen, config)
        updates = {
            widget: gr.update(value=shown[item.key.key]) for item, widget in zip(self.items, self.widgets, strict=True)
        }
        return {**updates, self.options: gr.update(value=rows)}


def build(site: Site, workers: int) -> tuple[dict[str, Form], gr.Radio]:
    """Draws the tab; returns the pipelines' forms and the choice between them."""
    names = [entry.name for entry in registry.entries("pipelines") if not registry.check(entry)]
    titles = {name: registry.load("pipelines", name).title or name for name in names}
    names.sort(key=lambda name: name != "text_to_image")
    gr.HTML(
        "<h2>Launch</h2><p class='lead'>Choose optimizers and learning rates; several of either make a sweep. "
        "Runs go on in the background, whatever becomes of this page.</p>"
    )
    chosen = gr.Radio(
        [(titles[name], name) for name in names], value=names[0], label="Pipeline", elem_id="pipeline", interactive=True
    )
    found = {}
    columns = []
    for name in names:
        with gr.Column(visible=name == names[0], elem_classes=["form"]) as column:
            found[name] = _form(site, name, workers)
        columns.append(column)
    chosen.change(
        lambda name: [gr.update(visible=name == other) for other in names],
        chosen,
        columns,
        show_progress="hidden",
        api_visibility="private",
    )
    page = Context.root_block
    assert page is not None

    def restore(request: gr.Request) -> Any:
        """The pipeline that the page's address names."""
        name = request.query_params.get("pipeline", "")
        return name if name in names else gr.skip()

    page.load(restore, None, chosen, **QUIET)
    chosen.input(None, chosen, None, js="name => equipoise.at({pipeline: name})", api_visibility="private")
    return found, chosen


def _form(site: Site, pipeline: str, workers: int) -> Form:
    cls = registry.load("pipelines", pipeline).Config
    items = forms.fields(cls)
    ready = presets().get(cls, [])
    shown, rows = beginning(cls)
    with gr.Row():
        preset = gr.Dropdown(
            [("the pipeline's own defaults", ""), *((name, name) for name in ready)],
            value=ready[0] if ready else "",
            label="Begin with",
            info="a configuration that comes with Equipoise; empty after another one was loaded",
            interactive=True,
            elem_id=f"preset-{pipeline}",
        )
        bring = gr.UploadButton(
            "Load YAML …", file_types=[".yaml", ".yml"], size="sm", scale=0, min_width=140, elem_id=f"load-{pipeline}"
        )
    widgets: dict[str, Any] = {}
    with gr.Group(elem_classes=["fields"]):
        for item in sorted((i for i in items if i.basic), key=_rank):
            widgets[item.key.key] = _widget(site, cls, item, shown)
    rest: dict[str, list[forms.Field]] = {}
    for item in items:
        if not item.basic:
            rest.setdefault(item.section, []).append(item)
    with gr.Accordion("Everything else", open=False):
        for section, some in rest.items():
            gr.HTML(f"<h4>{draw.esc(section)}</h4>")
            with gr.Group(elem_classes=["fields"]):
                for item in some:
                    widgets[item.key.key] = _widget(site, cls, item, shown)
    with gr.Accordion("Options of what is chosen above", open=False) as opened:
        options = Table(
            rows or None,
            headers=forms.OPTION_HEADERS,
            datatype="str",
            interactive=True,
            static_columns=[0, 1, 3, 4, 5],
            column_widths=["130px", "150px", "130px", "110px", "190px", "400px"],
            wrap=True,
            label="Edit the column value; empty means the default",
            buttons=[],
            max_height=360,
        )
    if cls.SHORT.get("data", "").endswith(".folder"):
        _uploads(site, widgets[cls.SHORT["data"]], widgets.get(PROMPT))
    ordered = [widgets[item.key.key] for item in items]
    form = Form(pipeline, items, ordered, preset, options)
    message = gr.HTML(elem_classes=["message"])
    with gr.Row(elem_classes=["actions"]):
        check = gr.Button("Check and show", size="md", elem_id=f"check-{pipeline}")
        words = _start_words(forms.count(cls, shown))
        go = gr.Button(words, variant="primary", size="md", elem_id=f"start-{pipeline}")
    with gr.Column(elem_id=f"plan-{pipeline}"), gr.Column(visible=False, elem_classes=["plan"]) as shown_plan:
        facts = gr.HTML()
        command = gr.Code(
            label="The same in a terminal",
            language="shell",
            interactive=False,
            wrap_lines=True,
            lines=1,
            show_line_numbers=False,
        )
        text = gr.Code(label="Complete configuration", language="yaml", interactive=False, max_lines=24)
        save = gr.DownloadButton("Save as YAML", size="md", elem_id=f"save-{pipeline}")

    def on_check(name: str | None, rows: Any, *values: Any) -> Iterator[list[Any]]:
        """The plan at once, and then what may first have to import the model's libraries."""
        try:
            made = plan(site, pipeline, name or "", form.shown(values), table_rows(rows), workers)
        except EquipoiseError as error:
            yield [said(error), gr.update(visible=False), *[gr.skip()] * 4]
            return
        file = Path(tempfile.mkdtemp(dir=os.environ.get(UPLOADED)), f"{made.config.name}.yaml")
        file.write_text(made.yaml)
        time = estimate(site, made, workers)
        words = draw.notice(f"{time}\nMemory: being worked out …")
        yield ["", gr.update(visible=True), words, made.command, made.yaml, str(file)]
        words = draw.notice("\n".join([time, memory(site, made, workers), *doubts(made)]))
        yield [gr.skip(), gr.skip(), words, *[gr.skip()] * 3]

    def on_start(name: str | None, rows: Any, *values: Any) -> Iterator[str]:
        """Says at once that it was heard; gradio's own words for what nobody foresaw do not take that back."""
        yield draw.notice("Being checked and started …")
        try:
            made = plan(site, pipeline, name or "", form.shown(values), table_rows(rows), workers)
            yield draw.notice(launch(site, made, workers)[1], "good") + draw.notice("\n".join(doubts(made)))
        except EquipoiseError as error:
            yield said(error)
        except Exception as error:
            yield draw.notice(f"Not started: {type(error).__name__}: {error}. The server's output says more.", "bad")
            raise

    def on_preset(name: str) -> list[Any]:
        try:
            return ["", *form.fill(load_shipped(name) if name else _plain(pipeline, cls, {})).values()]
        except EquipoiseError:  # of defaults, where something is required that has none
            return [gr.skip()] * (len(ordered) + 2)

    def on_yaml(file: str | None) -> list[Any]:
        try:
            if not file:
                raise InputError("Choose a YAML file.")
            return ["", gr.update(value=None), *form.fill(read_yaml(file, pipeline)).values()]
        except EquipoiseError as error:
            return [said(error), *[gr.skip()] * (len(ordered) + 2)]
        finally:
            forget([file] if file else [])

    def on_plugins(rows: Any, *names: Any) -> Any:
        chosen = {item.key.key: value or [] for item, value in zip(plugins, names, strict=True)}
        return gr.update(value=forms.kept(forms.option_rows(cls, chosen, None), table_rows(rows)))

    private: dict[str, Any] = {"api_visibility": "private"}
    inputs = [preset, options, *ordered]
    outputs = [message, shown_plan, facts, command, text, save]
    # What is shown of a form that has changed since is not what would be started. The browser hides it by itself: the
    # server would come too late, and after the next click.
    place = f"document.getElementById('plan-{pipeline}').dataset"
    fresh = f"(...values) => {{ delete {place}.stale; return values }}"
    check.click(on_check, inputs, outputs, js=fresh, show_progress="minimal", trigger_mode="always_last", **private)
    changes = [preset.change, options.input, *(widget.change for widget in ordered)]
    gr.on(changes, None, None, None, js=f"() => {{ {place}.stale = '' }}", **private)
    go.click(on_start, inputs, message, **private)
    preset.input(on_preset, preset, [message, *ordered, options], **private)
    bring.upload(on_yaml, bring, [message, preset, *ordered, options], **private)
    plugins = [item for item in items if item.kind == "plugin"]
    gr.on(
        [opened.expand, *(widgets[item.key.key].input for item in plugins)],
        on_plugins,
        [options, *(widgets[item.key.key] for item in plugins)],
        options,
        **QUIET,
    )
    several = [widgets[item.key.key].change for item in items if item.kind in ("plugin", "number", "axes")]
    gr.on(several, lambda *values: _start_words(forms.count(cls, form.shown(values))), ordered, go, **QUIET)
    return form


def _start_words(runs: int) -> str:
    return f"Start {runs} runs" if runs > 1 else "Start"


def _rank(item: forms.Field) -> tuple[int, int]:
    """What people come for first: plugins, the learning rate, model and data."""
    first = ["optimizer.name", comparison.RATE]
    return (first.index(item.key.key) if item.key.key in first else 2, 0 if item.kind != "lines" else 1)


def _widget(site: Site, cls: type[RunConfig], item: forms.Field, shown: dict[str, Any]) -> Any:
    given = {"label": item.label, "info": item.info, "value": shown.get(item.key.key), "interactive": True}
    given["elem_id"] = f"field-{cls.model_fields['pipeline'].default}-{item.key.key.replace('.', '-')}"
    if item.kind == "plugin":
        return gr.Dropdown(list(item.choices), multiselect=True, **given)
    if item.kind == "choice":
        choices = ["", *item.choices] if "none" in item.key.type else list(item.choices)
        return gr.Dropdown(choices, **given)
    if item.kind == "truth":
        return gr.Checkbox(**given)
    if item.kind == "lines":
        return gr.Textbox(lines=3, max_lines=8, elem_classes=["wide"], **given)
    if item.key.key in (cls.SHORT.get("data"), cls.SHORT.get("model")):
        offered = gr.State(["demo", *site.choices()])
        places = gr.Dropdown(offered.value, allow_custom_value=True, **given)
        # What lies there may have changed since the server began; and a folder that is chosen offers what is in it.
        # Not while someone chooses: a list that changes then moves under the pointer, and undoes what is being typed.
        page, both = Context.root_block, [places, offered]
        assert page is not None
        triggers = [page.load, places.blur, places.change]
        gr.on(triggers, lambda at, before: _offered(site, at, before), both, both, **QUIET)
        return places
    return gr.Textbox(max_lines=1, **given)


def _offered(site: Site, at: Any, before: list[Any]) -> tuple[Any, list[Any]]:
    """The places around one, then of those offered before as many as keep the list from getting shorter.

    Gradio's list, when it is open and gets shorter, looks for an entry which it no longer has, and fails.
    """
    fresh = ["demo", *site.choices(str(at or ""))]
    fresh += [place for place in before if place not in fresh][: max(0, len(before) - len(fresh))]
    return gr.update(choices=fresh), fresh


def table_rows(table: Any) -> list[list[Any]]:
    """The rows of gradio's table, whichever form it comes in."""
    if table is None:
        return []
    return table.values.tolist() if hasattr(table, "values") else [list(row) for row in table]


def caption_rows(paths: Sequence[str], before: Sequence[Sequence[Any]]) -> list[list[str]]:
    """A row for each picture, with the caption that it had already."""
    held = {str(row[0]): row[1] for row in before if len(row) > 1}
    return [[name, str(held.get(name) or "")] for name in (Path(path).name for path in paths)]


def _uploads(site: Site, data: gr.Dropdown, prompt: Any = None) -> None:
    with gr.Accordion("Pictures of your own", open=False):
        files = gr.File(
            file_count="multiple",
            file_types=["image"],
            label="Pictures (PNG, JPEG, WebP)",
            height=260,
            elem_id="pictures",
        )
        captions = Table(
            headers=["picture", "caption"],
            datatype="str",
            interactive=True,
            static_columns=[0],
            label="Captions, to be edited here",
            buttons=[],
            visible=False,
            elem_id="captions",
        )
        with gr.Row():
            name = gr.Textbox("pictures", label="Name of the folder", max_lines=1)
            use = gr.Button("Use these pictures", elem_id="use-pictures")
        message = gr.HTML(elem_id="pictures-message")

    def on_upload(paths: list[str] | None, rows: Any) -> list[Any]:
        """What is no picture goes at once, and is named, so that the rest can be captioned and used."""
        good, wrong = [], []
        for path in paths or []:
            try:
                check_picture(Path(path), Path(path).name)
                good.append(path)
            except InputError as error:
                wrong.append(f"{error} It was left out.")
        forget([path for path in paths or [] if path not in good])
        table = gr.update(value=caption_rows(good, table_rows(rows)), visible=bool(good))
        return [table, *([good, draw.notice("\n".join(wrong), "bad")] if wrong else [gr.skip(), gr.skip()])]

    def on_use(word: str, paths: list[str] | None, rows: Any) -> list[Any]:
        try:
            folder = save_pictures(site, word, paths or [], table_rows(rows))
        except EquipoiseError as error:
            return [said(error), *[gr.skip()] * len(outputs[1:])]
        forget(paths or [])
        words = f"{len(paths or [])} pictures are ready; `data` names them."
        if prompt is not None:
            words += " `instance prompt` is empty now, so that their captions are read."
        return [draw.notice(words, "good"), folder, None, *[gr.update(value="")] * len(outputs[3:])]

    outputs = [message, data, files, *([prompt] if prompt is not None else [])]
    files.change(on_upload, [files, captions], [captions, files, message], api_visibility="private")
    use.click(on_use, [name, files, captions], outputs, api_visibility="private")
