"""Configurations, YAML ↔ typed record: what is written is read (`loading`) into records that say what may stand there.

Everybody imports the names below from here, and shared sections from `sections`; each is loaded when it is first used,
so that what needs one module of this folder pays for no other. Builds on what `equipoise.registry` finds.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from equipoise.pipelines.config.builtin import shipped
    from equipoise.pipelines.config.keys import Key, Problems, describe
    from equipoise.pipelines.config.loading import config_class, dump, flat, load, parse_value, set_keys
    from equipoise.pipelines.config.records import PluginSection, RunConfig, Section
    from equipoise.pipelines.config.sections import SamplingConfig, TrainConfig

__all__ = [
    "Key",
    "PluginSection",
    "Problems",
    "RunConfig",
    "SamplingConfig",
    "Section",
    "TrainConfig",
    "config_class",
    "describe",
    "dump",
    "flat",
    "load",
    "parse_value",
    "set_keys",
    "shipped",
]

_HOME = {
    "Key": "keys",
    "PluginSection": "records",
    "Problems": "keys",
    "RunConfig": "records",
    "SamplingConfig": "sections",
    "Section": "records",
    "TrainConfig": "sections",
    "describe": "keys",
    "shipped": "builtin",
}  # all others are of loading


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME.get(name, 'loading')}"), name)
    globals()[name] = value
    return value
