"""The records that configurations are made of."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from equipoise import registry
from equipoise.errors import InputError
from equipoise.options import read_options
from equipoise.pipelines.config.keys import AtHub, Opened, Problems, marks, show

WORD = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # such as owner/name
LocalPath = Annotated[str, Opened()]  # a file or folder on this machine
DataPath = Annotated[str, Opened(demo=True)]  # that, or `demo`
ModelPath = Annotated[str, Opened(hub=True)]  # a folder, or a hub id
BasePath = Annotated[str, Opened(hub=True, demo=True)]  # a folder, a hub id, or `demo`
Revision = Annotated[str, AtHub()]  # which version of a model at a hub
_trusting: ContextVar[bool] = ContextVar("trusting", default=False)


@contextmanager
def trusting_options() -> Iterator[None]:
    """Within it, plugins' options are taken as they are given, so that reading a configuration imports no plugin, and
    no torch: for showing what is known to be right. What is to be trained is read anew, and checked; and only then has
    what was left empty the value that a plugin says."""
    token = _trusting.set(True)
    try:
        yield
    finally:
        _trusting.reset(token)


class Section(BaseModel):
    """A group of keys. Give every field a `Field(description=…)` and its bounds: help, forms and errors come from them.

    Defaults belong to the section's own fields: a section given in part takes the rest from there.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        coerce_numbers_to_str=True,  # `name: 2024` means the text
        protected_namespaces=(),  # a key may be called model_something
    )

    @property
    def left_empty(self) -> frozenset[str]:
        """Keys that nobody gave a value, so that the one they have follows from others, and changes with them."""
        return frozenset()

    @field_validator("*")
    @classmethod
    def _names_something(cls, value: Any, info: ValidationInfo) -> Any:
        for mark in marks(cls.model_fields[str(info.field_name)]):
            value = _each(value, mark.read)
        return value


def _each(value: Any, read: Callable[[str], str]) -> Any:
    """A value with every text in it read."""
    if isinstance(value, str):
        return read(value)
    if isinstance(value, list):
        return [_each(item, read) for item in value]
    return {key: _each(item, read) for key, item in value.items()} if isinstance(value, dict) else value


class PluginSection(Section):
    """The choice of a plugin by name, with its options, both checked against what is installed.

    Subclasses say which kind (`optimizers`, `objectives`, `coordinators`), and which options have a key of their own.
    """

    KIND: ClassVar[str]
    OWN: ClassVar[dict[str, str]] = {}  # option → the key that sets it, {"lr": "learning_rate"}

    name: str = Field(description="The plugin's name; `equipoise list` shows all.")
    options: dict[str, Any] = Field(default={}, description="Its options; `equipoise show NAME` explains them.")

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        try:
            registry.find(cls.KIND, name)
        except InputError as error:
            raise ValueError(str(error)) from error
        return name

    @field_validator("options")
    @classmethod
    def _fit(cls, given: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if "name" not in info.data or _trusting.get():  # without a name, its own error is enough
            return given
        try:
            plugin = registry.load(cls.KIND, info.data["name"])
        except InputError as error:
            raise ValueError(str(error)) from error
        problems = [f"{option}: is set by the key {key!r}." for option, key in cls.OWN.items() if option in given]
        values, found = read_options(plugin, given)
        problems += [line for line in found if line.partition(":")[0] not in cls.OWN]
        if any(": no such option." in line for line in found):  # often the file's, of the plugin that it names itself
            empty = f"{cls.KIND.removesuffix('s')}.options={{}}"
            problems[-1] += f" Where another plugin is named than the file's, {empty} leaves out the file's options."
        if problems:
            raise Problems(problems)
        return {option: list(value) if isinstance(value, tuple) else value for option, value in values.items()}

    def plugin(self) -> Any:
        """The class that is named, imported; None within `trusting_options`."""
        return None if _trusting.get() else registry.load(self.KIND, self.name)


class RunConfig(Section):
    """What every pipeline's configuration has."""

    SHORT: ClassVar[dict[str, str]] = {}  # short name → dotted key, for the keys that people change all the time
    RESUMABLE: ClassVar[tuple[str, ...]] = ()  # keys, or sections, that may change when a run is resumed

    pipeline: str = Field(description="Which pipeline reads this; `equipoise list pipelines` shows all.")
    name: str = Field(max_length=80, description="A word for this run; part of its id.")
    seed: int = Field(default=0, ge=0, lt=2**32, description="Where all randomness starts.")
    runs: LocalPath = Field(
        default_factory=lambda: os.environ.get("EQUIPOISE_RUNS") or "runs",
        description="The folder that runs are kept in. Environment variable: EQUIPOISE_RUNS.",
    )

    sweep: dict[str, list[Any]] = Field(
        {},
        description="Axes for `equipoise sweep`: a key, or its short name, and its values. `train` leaves them alone.",
    )

    @property
    def total_steps(self) -> int | None:
        """How many steps a run takes, where that is known before it begins."""
        return None

    @field_validator("name")
    @classmethod
    def _one_word(cls, name: str) -> str:
        if not re.fullmatch(WORD, name):
            raise ValueError(f"must be one word of letters, digits, _ . and -, got {show(name)}.")
        return name
