"""The comparisons of runs: which there are, how another one is started, and how it goes on."""

import re
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from equipoise import registry
from equipoise.errors import EquipoiseError, InputError
from equipoise.pipelines.comparing.comparison import Comparison
from equipoise.pipelines.config import flat
from equipoise.pipelines.config.keys import section_at
from equipoise.pipelines.jobs import background
from equipoise.pipelines.jobs import sweep as sweeps
from equipoise.pipelines.jobs.making import being_made
from equipoise.ui import draw
from equipoise.ui.runs import open_run
from equipoise.ui.runs_detail import sample_steps
from equipoise.ui.safety import Site

OWN = "as the runs are set"  # what the comparison of a run's or sweep's own settings is called
CLOSE = 1e-6  # two scales that mean the same
MOST_PROMPT, MOST_COUNT = 1000, 1000  # characters of a prompt, pictures of each or questions
_BAR = re.compile(r"(\S[^|%]*?):? +\d+%\|[^|]*\| *(\d+)/(\d+) \[[^<]*<([^,\]]+)")  # as tqdm draws it


def choices(site: Site) -> list[tuple[str, str]]:
    """Sweeps and runs with something to compare, newest first."""
    found = site.store.list()
    return [
        (f"{item.id}  ·  {item.kind}, {item.state}", item.id) for item in found if item.kind == "sweep" or item.over
    ]


@dataclass(frozen=True)
class Made:
    """A comparison that exists."""

    id: str  # its folder below the runs folder
    label: str
    scale: float | None  # the LoRA's strength it was generated with, where that was asked for
    prompts: tuple[str, ...] = ()


def made(site: Site, refs: Sequence[str]) -> list[Made]:
    """The comparisons of exactly these runs, the one of their own prompts first, then the newest."""
    found = []
    if len(refs) == 1 and (site.store.root / refs[0] / "comparison" / "table.json").is_file():
        found.append(Made(f"{refs[0]}/comparison", OWN, None))
    for job in background.jobs(site.store.root):
        if set(job.runs) == set(refs) and job.state == "done":
            prompts = tuple(job.asked.get("prompts", ()))
            words = [f"“{prompts[0][:50]}”" if prompts else OWN]
            words += [f"scale {job.asked['scale']:g}"] if "scale" in job.asked else []
            words.append(f"{datetime.fromtimestamp(job.created):%d %b %H:%M}")
            found.append(
                Made(f"{background.COMPARISONS}/{job.name}", " · ".join(words), job.asked.get("scale"), prompts)
            )
    return found


def read(site: Site, id: str) -> Comparison:
    """The comparison in that folder of the runs folder.

    Raises:
        InputError: there is none.
    """
    try:
        return Comparison.read(site.file(f"{id}/table.json").parent)
    except InputError as error:
        raise InputError(site.without_paths(error)) from None


def accepted(site: Site, refs: Sequence[str]) -> dict[str, str]:
    """Which of prompts, count, scale and seed a comparison of these runs accepts: key → help."""
    try:
        cls = registry.load("pipelines", open_run(site, refs[0]).status().pipeline).Config if refs else None
    except EquipoiseError:
        cls = None
    fields = getattr(section_at(cls, "samples"), "model_fields", {}) if cls else {}
    return {name: fields[name].description or "" for name in ("prompts", "count", "scale", "seed") if name in fields}


def pictured(site: Site, comparison: Comparison) -> dict[str, Any]:
    """The label of the slider over a comparison's pictures, and what its numbers mean."""
    if "prompts" in accepted(site, [cell.run for cell in comparison.cells[:1]]):
        return {"label": "Prompt", "info": "0 shows the first picture of each prompt."}
    words = [f"{index}: {text}" for index, text in enumerate(comparison.prompts[:6], 1)]
    return {"label": "Picture", "info": f"0 shows the first of each. {'; '.join(words)}"}


def steps(site: Site, comparison: Comparison) -> list[int]:
    """The steps at which any of the runs drew samples while training; none for prompts that they did not draw then."""
    job = next((job for job in background.jobs(site.store.root) if job.name == comparison.folder.name), None)
    if job and "prompts" in job.asked:
        return []
    found = set()
    for cell in comparison.cells:
        try:
            found |= set(sample_steps(open_run(site, cell.run)))
        except EquipoiseError:  # deleted since
            continue
    return sorted(found)


def end(site: Site, comparison: Comparison) -> int:
    """The step at which the longest of the runs ends, whose pictures the comparison has itself."""
    totals = [0]
    for cell in comparison.cells:
        with suppress(EquipoiseError):  # deleted since
            totals.append(open_run(site, cell.run).status().total or 0)
    return max(totals)


def generate(site: Site, refs: Sequence[str], prompt: str, count: float | None, scale: float | None) -> str:
    """Starts one job that draws a prompt (or the runs' own prompts) from all cells; returns its name.

    Raises:
        InputError: nothing is chosen, or something of it is still at work.
    """
    if not refs:
        raise InputError("Choose a sweep, or some runs, first.")
    if len(prompt) > MOST_PROMPT:
        raise InputError(f"The prompt has {len(prompt)} characters; {MOST_PROMPT} are the most.")
    if any(unicodedata.category(letter) in ("Cc", "Cs") and not letter.isspace() for letter in prompt):
        raise InputError("The prompt has characters that are no text; leave them out.")
    if count is not None and not (0 <= count <= MOST_COUNT and count == int(count)):
        raise InputError(f"Count must be a whole number from 0 to {MOST_COUNT}, got {count:g}.")
    for ref in refs:
        run = open_run(site, ref)
        parts = sweeps.cells(run) if run.status().kind == "sweep" else [run]
        if waiting := [one.id for one in parts if not one.status().over]:
            raise InputError(f"{waiting[0]}: is not finished yet; compare when it is.")
    takes = accepted(site, refs)
    given: dict[str, Any] = {"prompts": [prompt.strip()]} if prompt.strip() and "prompts" in takes else {}
    if count and "count" in takes:
        given["count"] = int(count)
    if scale is not None and "scale" in takes and (given or abs(scale - own_scale(site, refs)) > CLOSE):
        given["scale"] = round(float(scale), 3)
    return background.compare(site.store.root, list(refs), given)


def own_scale(site: Site, refs: Sequence[str]) -> float:
    """The LoRA's strength that runs draw with by their own settings."""
    try:
        value = flat(open_run(site, refs[0]).config()).get("samples.scale") if refs else None
    except EquipoiseError:
        value = None
    return float(value) if isinstance(value, int | float) else 1.0


def newest(site: Site, refs: Sequence[str], known: Sequence[str]) -> str | None:
    """The newest comparison of these runs that has come since those were known, or None."""
    found = [item.id for item in made(site, refs)]
    fresh = [id for id in found if id not in known]
    return max(fresh, key=lambda id: (id.startswith(background.COMPARISONS), id), default=None)


def working(site: Site, refs: Sequence[str]) -> str:
    """The comparison of these runs that is being made, or that failed last."""
    count = being_made(site.store.root / refs[0] / "comparison") if len(refs) == 1 else None
    if count is not None:
        return draw.notice(f"They are being compared: {count} files so far. Choose them again when that is done.")
    for job in background.jobs(site.store.root):
        if set(job.runs) == set(refs):
            if job.state == "running":
                return draw.notice(f"Generating … {_progress(job.log.splitlines()[-1]) if job.log else 'starting'}")
            if job.state == "dead":
                last = job.log.splitlines()[-1] if job.log else "its log is empty"
                return draw.notice(f"The last comparison failed: {last}", "bad")
            return ""
    return ""


def _progress(line: str) -> str:
    """A terminal's progress bar in words; any other line as it is."""
    found = _BAR.search(line)
    return f"{found[1]} {found[2]} of {found[3]}, {found[4]} left" if found else line
