"""The tab Launch: a form made from a pipeline's own record, checked, shown as YAML and command, and started."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from equipoise import registry
from equipoise.errors import EquipoiseError, InputError
from equipoise.pipelines.comparing import comparison
from equipoise.pipelines.config import RunConfig
from equipoise.pipelines.config.builtin import purpose, shipped
from equipoise.ui import draw, forms, launch_data, launch_demo, launch_pictures, launch_presets, plugins
from equipoise.ui.launch import (
    PROMPT,
    UPLOADED,
    Plan,
    at_work,
    beginning,
    begun_already,
    check_plan,
    doubts,
    error_notice,
    launch,
    load_shipped,
    plain,
    plan,
    presets,
    read_yaml,
    ways_on,
)
from equipoise.ui.launch_estimates import estimate, memory
from equipoise.ui.launch_presets import PresetPanel
from equipoise.ui.runs import open_run
from equipoise.ui.safety import Site, refuse_commands
from equipoise.ui.widgets import HIDDEN, LATEST, PRIVATE, Table, Updates, bound, root, table_rows

SEEK = (
    "<p class='seek'><input type='search' aria-label='Search these fields' placeholder='Search these fields: words of "
    "a name, a key or its explanation'> <span class='hint' role='status'></span></p>"
)


@dataclass(frozen=True, eq=False)
class PipelineChoice:
    """The choice between the pipelines' forms."""

    pipeline: gr.Radio
    columns: Mapping[str, gr.Column]


@dataclass(frozen=True, eq=False)
class Checked:
    """What a check shows: the plan of a form."""

    column: gr.Column
    facts: gr.HTML
    command: gr.Code
    yaml: gr.Code
    save: gr.DownloadButton


@dataclass(frozen=True, eq=False)
class Form:
    """One pipeline's part of the tab."""

    site: Site
    pipeline: str
    workers: int
    items: list[forms.Field]
    widgets: list[Any]  # of the items, in their order
    preset: gr.Dropdown
    bring: gr.UploadButton
    options: Table  # of the chosen plugins
    opened: gr.Accordion  # around it
    message: gr.HTML
    check: gr.Button
    start: gr.Button
    checked: Checked
    presets: PresetPanel

    @property
    def record(self) -> type[RunConfig]:
        return registry.load("pipelines", self.pipeline).Config

    @property
    def plugins(self) -> dict[str, Any]:
        """The widgets that choose plugins, by key."""
        return {
            item.key.key: widget for item, widget in zip(self.items, self.widgets, strict=True) if item.kind == "plugin"
        }

    @property
    def following(self) -> dict[str, Any]:
        """The widgets that may be left empty, and then follow from what is chosen, by key."""
        return {item.key.key: widget for item, widget in zip(self.items, self.widgets, strict=True) if item.key.follows}

    def faults(self, error: EquipoiseError) -> str:
        """An error in the page, from where the browser puts each line at its field."""

        def about(line: str) -> str:
            key = forms.field_of(self.record, line)
            return field_id(self.pipeline, key) if key else ""

        return error_notice(error, about)

    def plan(self, preset: str | None, rows: Any, values: Sequence[Any]) -> Plan:
        """What the form would start. Raises ConfigError: what is wrong with it, one line each."""
        return plan(self.site, self.pipeline, preset or "", self.shown(values), table_rows(rows), self.workers)

    def shown(self, values: Sequence[Any]) -> dict[str, Any]:
        return {item.key.key: value for item, value in zip(self.items, values, strict=True)}

    def fill(self, config: RunConfig) -> Updates:
        """Updates of all widgets and the table of options.

        Raises:
            InputError: it starts another program's command, which no field shows.
        """
        refuse_commands(config)
        shown = forms.show(config)
        chosen = {key: shown[key] for key in self.plugins}
        rows = forms.option_rows(type(config), chosen, config)
        widgets = zip(self.items, self.widgets, strict=True)
        updates = {widget: gr.update(value=shown[item.key.key]) for item, widget in widgets}
        for key, words in forms.empty_means(type(config), chosen).items():
            updates[self.following[key]]["placeholder"] = words
        return {**updates, self.options: gr.update(value=rows)}


@dataclass(frozen=True, eq=False)
class Launch:
    """Where other tabs can put a run's configuration."""

    forms: Mapping[str, Form]  # by pipeline
    pipeline: gr.Radio
    tabs: gr.Tabs

    @property
    def outputs(self) -> list[Any]:
        """What `filled` changes, beside a message."""
        fields = [part for form in self.forms.values() for part in (form.preset, *form.widgets, form.options)]
        return [self.tabs, self.pipeline, *fields]


def filled(launch: Launch, site: Site, id: str, message: gr.HTML) -> Updates:
    """Puts a run's configuration into the form of its pipeline, and turns to it."""
    try:
        config = open_run(site, id).config()
        form = launch.forms[config.pipeline]
        fields = {form.preset: gr.update(value=None), **form.fill(config)}
    except (EquipoiseError, KeyError) as error:
        return {message: draw.notice(f"{id}: cannot be shown in Launch: {error}", "bad")}
    return {message: "", launch.tabs: gr.update(selected="launch"), launch.pipeline: config.pipeline, **fields}


def build(site: Site, workers: int) -> tuple[dict[str, Form], gr.Radio]:
    """Draws the tab; returns the pipelines' forms and the choice between them."""
    names = [entry.name for entry in registry.entries("pipelines") if not registry.check(entry)]
    titles = {name: registry.load("pipelines", name).title or name for name in names}
    names.sort(key=lambda name: name != "text_to_image")
    gr.HTML(
        draw.head(
            "Launch",
            "Several optimizers or learning rates make a sweep. Runs go on in the background, whatever becomes of this "
            "page.",
        )
    )
    if launch_demo.NAME in shipped():
        launch_demo.build(site, workers)
    offered = [(titles[name], name) for name in names]
    chosen = gr.Radio(offered, value=names[0], label="Pipeline", elem_id="pipeline", interactive=True)
    found, columns = {}, {}
    for name in names:
        with gr.Column(visible=name == names[0], elem_classes=["form"]) as columns[name]:
            found[name] = _form(site, name, workers)
    choice = PipelineChoice(chosen, columns)
    chosen.change(bound(on_pipeline, choice), chosen, list(columns.values()), **HIDDEN)
    chosen.input(None, chosen, None, js="name => equipoise.at({pipeline: name})", **PRIVATE)
    root().load(bound(restore, choice), None, chosen, **LATEST)
    root().load(bound(say_purposes, found), None, gr.HTML(elem_id="about"), **HIDDEN)
    return found, chosen


def _form(site: Site, pipeline: str, workers: int) -> Form:
    cls = registry.load("pipelines", pipeline).Config
    items = forms.fields(cls)
    shown, rows = beginning(cls)
    preset, bring = _beginning(pipeline, cls)
    own = launch_presets.draw_panel(site, pipeline)
    widgets = _fields(site, cls, items, shown, registry.load("pipelines", pipeline).fixed)
    with gr.Accordion("Options of what is chosen above", open=False) as opened:
        options = _options(rows)
    if cls.SHORT.get("data", "").endswith(".folder"):
        launch_pictures.build(site, widgets[cls.SHORT["data"]], widgets.get(PROMPT))
        if PROMPT in widgets:
            launch_data.build(site, widgets)
    message = gr.HTML(elem_classes=["message"], js_on_load="equipoise.faults(element)")
    with gr.Row(elem_classes=["actions"]):
        check = gr.Button("Check and show", size="md", elem_id=f"check-{pipeline}")
        words = _start_words(forms.count(cls, shown))
        start = gr.Button(words, variant="primary", size="md", elem_id=f"start-{pipeline}")
    ordered = [widgets[item.key.key] for item in items]
    parts = preset, bring, options, opened, message, check, start, _checked(pipeline), own
    form = Form(site, pipeline, workers, items, ordered, *parts)
    _connect(form)
    return form


def _beginning(pipeline: str, cls: type[RunConfig]) -> tuple[gr.Dropdown, gr.UploadButton]:
    ready = presets().get(cls, [])
    with gr.Row():
        preset = gr.Dropdown(
            [("the pipeline's own defaults", ""), *((name, name) for name in ready)],
            value=ready[0] if ready else "",
            label="Begin with",
            info="A configuration that comes with Equipoise. It is empty after another one was loaded.",
            interactive=True,
            elem_id=preset_id(pipeline),
            min_width=260,
        )
        bring = gr.UploadButton(
            "Load YAML …", file_types=[".yaml", ".yml"], size="sm", scale=0, min_width=140, elem_id=f"load-{pipeline}"
        )
    return preset, bring


def _fields(
    site: Site, cls: type[RunConfig], items: list[forms.Field], shown: dict[str, Any], fixed: Sequence[str]
) -> dict[str, Any]:
    """The widgets of all keys: the basic ones at once, the others by section in a panel that is closed at first; those
    that can have one value alone are out of sight."""
    widgets: dict[str, Any] = {}
    for item in items:
        if item.key.key in fixed:
            widgets[item.key.key] = _widget(site, cls, item, shown, visible=False)
    items = [item for item in items if item.key.key not in widgets]
    with gr.Group(elem_classes=["fields"]):
        for item in sorted((i for i in items if i.basic), key=_rank):
            widgets[item.key.key] = _widget(site, cls, item, shown)
    rest: dict[str, list[forms.Field]] = {}
    for item in items:
        if not item.basic:
            rest.setdefault(item.section, []).append(item)
    with gr.Accordion("Everything else", open=False, elem_classes=["rest"]):
        gr.HTML(SEEK)
        for section, some in rest.items():
            with gr.Column(elem_classes=["section"]):
                gr.HTML(f"<h4>{draw.esc(section)}</h4>")
                with gr.Group(elem_classes=["fields"]):
                    for item in some:
                        widgets[item.key.key] = _widget(site, cls, item, shown)
    return widgets


def _options(rows: list[list[str]]) -> Table:
    return Table(
        rows or None,
        headers=forms.OPTION_HEADERS,
        datatype="str",
        interactive=True,
        static_columns=[0, 1, 3, 4, 5],
        column_widths=["130px", "150px", "130px", "110px", "190px", "400px"],
        wrap=True,
        label="Edit the column value. An empty value means the default.",
        buttons=[],
        max_height=360,
    )


def _checked(pipeline: str) -> Checked:
    with gr.Column(elem_id=f"plan-{pipeline}"), gr.Column(visible=False, elem_classes=["plan"]) as column:
        facts = gr.HTML()
        command = gr.Code(
            label="The same in a terminal",
            language="shell",
            interactive=False,
            wrap_lines=True,
            lines=1,
            show_line_numbers=False,
        )
        yaml = gr.Code(label="Complete configuration", language="yaml", interactive=False, max_lines=24)
        save = gr.DownloadButton("Save as YAML", size="md", elem_id=f"save-{pipeline}")
    return Checked(column, facts, command, yaml, save)


def _connect(form: Form) -> None:
    inputs, filled = [form.preset, form.options, *form.widgets], [*form.widgets, form.options]
    checked = form.checked
    outputs = [form.message, checked.column, checked.facts, checked.command, checked.yaml, checked.save]
    # What is shown of a form that has changed since is not what would be started. The browser hides it by itself: the
    # server would come too late, and after the next click.
    checks = f"(...values) => {{ equipoise.checked('{form.pipeline}', values); return values }}"
    fresh: Any = {"js": checks, "show_progress": "minimal"}
    form.check.click(bound(on_check, form), inputs, outputs, **fresh, trigger_mode="always_last", **PRIVATE)
    changes = [form.preset.change, form.options.input, *(widget.change for widget in form.widgets)]
    keep = f"(...values) => equipoise.keep('{form.pipeline}', values)"
    gr.on(changes, None, inputs, None, js=keep, **PRIVATE)
    root().load(None, inputs, inputs, js=f"(...values) => equipoise.filled('{form.pipeline}', values)", **PRIVATE)
    form.start.click(bound(on_start, form), inputs, form.message, **PRIVATE)
    form.preset.input(bound(on_preset, form), form.preset, [form.message, *filled], **PRIVATE)
    form.bring.upload(bound(on_yaml, form), form.bring, [form.message, form.preset, *filled], **PRIVATE)
    _connect_presets(form, inputs, filled)
    plugins = list(form.plugins.values())
    asks = [form.opened.expand, *(widget.input for widget in plugins)]
    gr.on(asks, bound(on_plugins, form), [form.options, *plugins], [form.options, *form.following.values()], **LATEST)
    kinds = ("plugin", "number", "axes")
    several = [widget.change for item, widget in zip(form.items, form.widgets, strict=True) if item.kind in kinds]
    gr.on(several, bound(on_count, form), form.widgets, form.start, **LATEST)


def _connect_presets(form: Form, inputs: list[Any], outputs: list[Any]) -> None:
    def planned(preset: str | None, rows: Any, *values: Any) -> Plan:
        return form.plan(preset, rows, values)

    def filled(config: RunConfig) -> Updates:
        return {form.message: "", form.preset: gr.update(value=None), **form.fill(config)}

    launch_presets.connect(form.presets, planned, filled, inputs, [form.message, form.preset, *outputs])


# Handlers: what they are given stands in the order of the inputs above


def on_pipeline(choice: PipelineChoice, name: str) -> Updates:
    return {column: gr.update(visible=name == other) for other, column in choice.columns.items()}


def restore(choice: PipelineChoice, request: gr.Request) -> Updates:
    """The pipeline that the page's address names."""
    name = request.query_params.get("pipeline", "")
    return {choice.pipeline: name if name in choice.columns else gr.skip()}


def say_purposes(forms_: Mapping[str, Form]) -> str:
    """What each entry of the lists is for, which the browser writes below it."""
    words = {preset_id(name): {one: purpose(file) for one, file in shipped().items()} for name in forms_}
    for name, form in forms_.items():
        for key in form.plugins:
            words[field_id(name, key)] = plugins.purposes(forms.plugin_kind(form.record, key) or "")
    return f"<div id='purposes' data-words='{draw.esc(json.dumps(words))}'></div>"


def on_check(form: Form, preset: str | None, rows: Any, *values: Any) -> Iterator[Updates]:
    """The plan at once; then, once the model's libraries are imported, whether starting it would be refused."""
    site, workers, checked = form.site, form.workers, form.checked
    try:
        made = form.plan(preset, rows, values)
    except EquipoiseError as error:
        yield {form.message: form.faults(error), checked.column: gr.update(visible=False)}
        return
    file = Path(tempfile.mkdtemp(dir=os.environ.get(UPLOADED)), f"{made.config.name}.yaml")
    file.write_text(made.yaml)
    time = estimate(site, made, workers)
    yield {
        form.message: "",
        checked.column: gr.update(visible=True),
        checked.facts: draw.notice(f"{time}\nModel and data: being checked …\nMemory: being worked out …"),
        checked.command: made.command,
        checked.yaml: made.yaml,
        checked.save: str(file),
    }
    try:
        check_plan(made)
    except EquipoiseError as error:
        yield {form.message: form.faults(error), checked.column: gr.update(visible=False)}
        return
    except Exception as error:
        words = f"Not checked: {type(error).__name__}: {error}. The server's output says more."
        yield {form.message: draw.notice(words, "bad"), checked.column: gr.update(visible=False)}
        raise
    begun = at_work(site, made)
    facts = [*([begun_already(begun)] if begun else []), time, memory(site, made, workers), *doubts(made)]
    yield {checked.facts: draw.notice("\n".join(facts))}


def on_start(form: Form, preset: str | None, rows: Any, *values: Any) -> Iterator[Updates]:
    """Answers at once, and starts the runs; gradio's own words for what nobody foresaw do not replace the answer."""
    yield {form.message: draw.notice("Being checked and started …")}
    try:
        made = form.plan(preset, rows, values)
        id, words = launch(form.site, made, form.workers)
        started = draw.notice(words, "good") + ways_on(id, bool(made.config.sweep))
        yield {form.message: started + draw.notice("\n".join(doubts(made)))}
    except EquipoiseError as error:
        yield {form.message: form.faults(error)}
    except Exception as error:
        words = f"Not started: {type(error).__name__}: {error}. The server's output says more."
        yield {form.message: draw.notice(words, "bad")}
        raise


def on_preset(form: Form, name: str) -> Updates:
    """Fills the form in with a configuration that comes with Equipoise, or the pipeline's defaults."""
    try:
        config = load_shipped(name) if name else plain(form.pipeline, form.record, {})
        return {form.message: "", **form.fill(config)}
    except EquipoiseError:  # of defaults, where something is required that has none
        return gr.skip()


def on_yaml(form: Form, file: str | None) -> Updates:
    """Fills the form in with a configuration that the user brings."""
    try:
        if not file:
            raise InputError("Choose a YAML file.")
        filled = form.fill(read_yaml(file, form.pipeline))
        return {form.message: "", form.preset: gr.update(value=None), **filled}
    except EquipoiseError as error:
        return {form.message: error_notice(error)}
    finally:
        launch_pictures.forget([file] if file else [])


def on_plugins(form: Form, rows: Any, *names: Any) -> Updates:
    """The options of the plugins that are chosen now, and what an empty field means with them."""
    chosen = {key: value or [] for key, value in zip(form.plugins, names, strict=True)}
    options = forms.option_rows(form.record, chosen, None)
    means = forms.empty_means(form.record, chosen)
    updates = {widget: gr.update(placeholder=means[key]) for key, widget in form.following.items()}
    return {form.options: gr.update(value=forms.kept(options, table_rows(rows))), **updates}


def on_count(form: Form, *values: Any) -> Updates:
    """How many runs the form would start."""
    return {form.start: _start_words(forms.count(form.record, form.shown(values)))}


def _start_words(runs: int) -> str:
    return f"Start {runs} runs" if runs > 1 else "Start"


def _rank(item: forms.Field) -> tuple[int, int]:
    """What people come for first: plugins, the learning rate, model and data."""
    first = ["optimizer.name", comparison.RATE]
    return (first.index(item.key.key) if item.key.key in first else 2, 0 if item.kind != "lines" else 1)


def _widget(site: Site, cls: type[RunConfig], item: forms.Field, shown: dict[str, Any], visible: bool = True) -> Any:
    given: dict[str, Any] = {
        "label": item.label[:1].upper() + item.label[1:],
        "info": item.info,
        "value": shown.get(item.key.key),
    }
    given |= {"interactive": True, "visible": visible}
    given["elem_id"] = field_id(cls.model_fields["pipeline"].default, item.key.key)
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
        choice = gr.Dropdown(offered.value, allow_custom_value=True, **given)
        # What lies there may have changed since the server began; and a folder that is chosen offers what is in it.
        # Not while someone chooses: a list that changes then moves under the pointer, and undoes what is being typed.
        both = [choice, offered]
        gr.on([root().load, choice.blur, choice.change], bound(_offered, site), both, both, **LATEST)
        return choice
    return gr.Textbox(max_lines=1, placeholder=item.placeholder, **given)


def preset_id(pipeline: str) -> str:
    """What the list of a pipeline's configurations is called in the page."""
    return f"preset-{pipeline}"


def field_id(pipeline: str, key: str) -> str:
    """What a key's field is called in the page."""
    return f"field-{pipeline}-{key.replace('.', '-')}"


def _offered(site: Site, at: Any, before: list[Any]) -> tuple[Any, list[Any]]:
    """The folders and files around one, then as many of those offered before as keep the list from getting shorter.

    Gradio's list, when it is open and gets shorter, looks for an entry which it no longer has, and fails.
    """
    fresh = ["demo", *site.choices(str(at or ""))]
    fresh += [path for path in before if path not in fresh][: max(0, len(before) - len(fresh))]
    return gr.update(choices=fresh), fresh
