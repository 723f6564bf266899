"""Several runs at once: in what their configurations differ, put away, deleted."""

from collections.abc import Sequence

from equipoise.errors import EquipoiseError, InputError
from equipoise.pipelines.config import flat
from equipoise.pipelines.jobs import background
from equipoise.pipelines.runs.run import Run
from equipoise.ui import draw, runs_notes
from equipoise.ui.draw import esc
from equipoise.ui.runs import open_run
from equipoise.ui.safety import Site

MOST = 500  # runs that are offered
_SAME = ("name", "runs")  # which say nothing of what a run does


def offered(site: Site) -> list[str]:
    """The ids that can be chosen, newest first."""
    return [item.id for item in site.store.list()][:MOST]


def differences(site: Site, ids: Sequence[str]) -> str:
    """The keys in which the runs' configurations differ, a column for each run.

    Raises:
        InputError: fewer than two runs, or one whose configuration cannot be read.
    """
    if len(ids) < 2:
        raise InputError("Choose two runs or more.")
    try:
        found = [flat(open_run(site, id).config()) for id in ids]
    except EquipoiseError as error:
        raise InputError(site.without_paths(error)) from None
    keys = list(dict.fromkeys(key for one in found for key in one))
    differing = [key for key in keys if key not in _SAME and any(one.get(key) != found[0].get(key) for one in found)]
    if not differing:
        return draw.notice("Their configurations are the same but for their names.")
    head = "".join(f"<th>{draw.breakable(word)}</th>" for word in ("key", *ids))
    rows = "".join(
        f"<tr><td>{esc(key)}</td>{''.join(f'<td>{esc(_value(one.get(key)))}</td>' for one in found)}</tr>"
        for key in differing
    )
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"


def _value(value: object) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def archive(site: Site, ids: Sequence[str]) -> str:
    """Puts the runs away, or back where all of them are; returns a message."""
    chosen = _opened(site, ids)
    away = not all(runs_notes.read(run.folder).archived for run in chosen)
    runs_notes.archive(chosen, away)
    return f"{_counted(ids)} {'put away: the state “archived” shows them' if away else 'back in the table'}."


def delete(site: Site, ids: Sequence[str]) -> str:
    """Deletes the runs that are not at work; returns what was deleted, and what was not and why."""
    said, found, gone = [], [], 0
    for id in ids:
        try:
            found.append(open_run(site, id))
        except InputError as error:  # deleted since they were offered
            said.append(str(error))
    if not found:
        raise InputError("\n".join(said) or "Choose some runs first.")
    for run in found:
        try:
            background.delete(run)
            gone += 1
        except InputError as error:
            said.append(site.without_paths(error))
    return "\n".join([f"{gone} of {_counted(ids)} deleted.", *said])


def _opened(site: Site, ids: Sequence[str]) -> list[Run]:
    if not ids:
        raise InputError("Choose some runs first.")
    return [open_run(site, id) for id in ids]


def _counted(ids: Sequence[str]) -> str:
    return "1 run" if len(ids) == 1 else f"{len(ids)} runs"
