"""What is known of a run by a key: its configuration, what it measured last, its result; for columns and scatters."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from equipoise.pipelines.config import yamlio
from equipoise.pipelines.files import version
from equipoise.pipelines.runs.run import metric_lines

LAST, RESULT = "last ", "result "  # go before the name of a metric, and of a figure of result.json
MOST = 60  # characters of a value
_TAIL = 2**14  # bytes at the end of the metrics
_NOT_SAID = ("step", "time", "seconds", "format", "pid", "exit_code")


def known(folder: Path) -> dict[str, Any]:
    """A run's configuration by dotted key, its last metrics as `last NAME`, its result's numbers as `result NAME`."""
    config, metrics, result = folder / "config.yaml", folder / "metrics.jsonl", folder / "result" / "result.json"
    found = dict(_configured(config, *version(config)))
    found |= {LAST + name: value for name, value in _measured(metrics, *version(metrics)).items()}
    return found | {RESULT + name: value for name, value in _resulted(result, *version(result)).items()}


def number(value: Any) -> float | None:
    """A value as a number, where it is one."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def shown(value: Any) -> str:
    """A value in a table."""
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= MOST else f"{text[: MOST - 1]}…"


@lru_cache(10_000)
def _configured(file: Path, *version: int) -> Mapping[str, Any]:
    try:
        data = yamlio.parse(file.read_text(encoding="utf-8"))
        return dict(_flat("", data)) if isinstance(data, dict) else {}
    except (OSError, ValueError):  # gone, or none
        return {}


def _flat(before: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and (value or not before):
        for key, inner in value.items():
            yield from _flat(f"{before}.{key}" if before else str(key), inner)
    elif before.partition(".")[0] not in ("runs", "format"):
        yield before, value


@lru_cache(10_000)
def _measured(file: Path, *version: int) -> Mapping[str, float]:
    """Of every metric among the last lines, the value that it had last."""
    found: dict[str, float] = {}
    with suppress(OSError), open(file, "rb") as metrics:
        metrics.seek(max(0, metrics.seek(0, os.SEEK_END) - _TAIL))
        for _, record in metric_lines(metrics.read().decode(errors="replace")):
            found |= {name: value for name, value in record.items() if number(value) is not None}
    return {name: value for name, value in found.items() if name not in _NOT_SAID}


@lru_cache(10_000)
def _resulted(file: Path, *version: int) -> Mapping[str, float]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    items = record.items() if isinstance(record, dict) else ()
    return {str(name): value for name, value in items if number(value) is not None}
