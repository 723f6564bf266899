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
from equipoise.pipelines.jobs import background, hub_files
from equipoise.pipelines.jobs import sweep as sweeps
from equipoise.pipelines.jobs.making import being_made
from equipoise.pipelines.pipeline import Pipeline
from equipoise.ui import draw
from equipoise.ui.runs import open_run
from equipoise.ui.runs_detail import sample_steps
from equipoise.ui.safety import Site

OWN = "as the runs are set"  # what the comparison of a run's or sweep's own settings is called
STRENGTH = "strength"  # what files and checkpoints are laid out by
CLOSE = 1e-6  # two scales that mean the same
MOST_PROMPT, MOST_COUNT = 1000, 1000  # characters of a prompt, pictures of each or questions
MOST_PROMPTS, MOST_FILES, MOST_AT_HUB = 20, 500, 8
MOST_SCALE = 10  # of a LoRA: far beyond what still draws anything
_BAR = re.compile(r"(\S[^|%]*?):? +\d+%\|[^|]*\| *(\d+)/(\d+) \[[^<]*<([^,\]]+)")  # as tqdm draws it


def choices(site: Site) -> list[tuple[str, str]]:
    """Sweeps and runs with something to compare, newest first."""
    found = site.store.list()
    return [
        (f"{item.id}  ·  {item.kind}, {item.state}", item.id) for item in found if item.kind == "sweep" or item.over
    ]


class SameJobError(InputError):
    """What is asked for is there, or at work, already."""

    def __init__(self, job: background.Job):
        done = "is there already: choose it under Comparison"
        super().__init__(f"This comparison {'is being made already' if job.state == 'running' else done}.")
        self.name = job.name


@dataclass(frozen=True)
class Made:
    """A comparison that exists."""

    id: str  # its folder below the runs folder
    label: str
    scale: float | None  # the LoRA's strength it was generated with, where that was asked for
    prompts: tuple[str, ...] = ()
    by_strength: bool = False  # whether its columns are strengths, so that it has no one of them


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
            words += ["files by strength"] if "scales" in job.asked else []
            words.append(f"{datetime.fromtimestamp(job.created):%d %b %H:%M}")
            by_strength = "scales" in job.asked
            about = job.asked.get("scale"), prompts, by_strength
            found.append(Made(f"{background.COMPARISONS}/{job.name}", " · ".join(words), *about))
    return found


def read(site: Site, id: str) -> Comparison:
    """The comparison in that folder of the runs folder. Of other prompts, or another strength, nothing is judged.

    Raises:
        InputError: there is none.
    """
    try:
        found = Comparison.read(site.file(f"{id}/table.json").parent)
    except InputError as error:
        raise InputError(site.without_paths(error)) from None
    earlier = found.own is None and found.column != STRENGTH  # a version that did not record it
    if earlier and {"prompts", "scale"} & asked(site, id).keys():
        found.forget_scores()
    for cell in found.cells:
        if "file" in cell.config:  # where on this machine it lies is nobody's business
            cell.config["file"] = cell.row
    return found


def asked(site: Site, id: str) -> dict[str, Any]:
    """What a comparison in the background was asked for beside its runs."""
    folder, _, name = id.partition("/")
    jobs = background.jobs(site.store.root) if folder == background.COMPARISONS else []
    return next((job.asked for job in jobs if job.name == name), {})


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
    """Starts one job that draws prompts, a line each (or the runs' own), from all cells; returns its name.

    Raises:
        InputError: nothing is chosen, something of it is still at work, or the same is there or at work already.
    """
    given, takes = _given(site, refs, prompt, count), accepted(site, refs)
    if scale is not None and "scale" in takes and ("prompts" in given or abs(scale - own_scale(site, refs)) > CLOSE):
        given["scale"] = round(float(scale), 3)
    return _start(site, refs, given)


def generate_from_files(
    site: Site,
    refs: Sequence[str],
    prompt: str,
    count: float | None,
    strengths: str,
    checkpoints: bool,
    files: Sequence[str],
    at_hub: str = "",
) -> str:
    """Starts one job that draws from LoRA files, the runs' own among them, at each strength; returns its name.

    Args:
        strengths: numbers with commas between; "" is 1.
        checkpoints: whether the runs' checkpoints are drawn from, too.
        files: as `lora_files` offers them.
        at_hub: others, at the Hugging Face hub, a line each, which the job downloads.

    Raises:
        InputError: as `generate`; a strength that is none, or a file that this page may not read.
    """
    given = _given(site, refs, prompt, count)
    if not takes_files(site, refs):
        raise InputError("These runs have no LoRA files that could be drawn from at other strengths.")
    try:
        scales = [float(part) for part in strengths.split(",") if part.strip()] or [1.0]
    except ValueError:
        raise InputError(f"Strengths are numbers such as 0.5, 1, got {strengths[:60]!r}.") from None
    if wrong := [scale for scale in scales if not 0 < scale <= MOST_SCALE]:
        raise InputError(f"A strength is above 0 and at most {MOST_SCALE}, got {wrong[0]:g}.")
    offered = dict(lora_files(site))
    if unknown := [name for name in files if name not in offered.values()]:
        raise InputError(f"{unknown[0][:200]!r}: is no LoRA file that this page may read.")
    references = [line.strip() for line in at_hub.splitlines() if line.strip()]
    for reference in references:
        hub_files.parse(reference)
    if len(references) > MOST_AT_HUB:
        raise InputError(f"There are {len(references)} files of the hub; {MOST_AT_HUB} are the most.")
    chosen = [_file(site, name) for name in files]
    chosen += [hub_files.SIGN + reference.removeprefix(hub_files.SIGN) for reference in references]
    more = {"files": chosen} if chosen else {}
    return _start(site, refs, {**given, "scales": scales, "checkpoints": bool(checkpoints), **more})


def _given(site: Site, refs: Sequence[str], prompt: str, count: float | None) -> dict[str, Any]:
    """The prompts and the count, as far as these runs take them."""
    if not refs:
        raise InputError("Choose a sweep, or some runs, first.")
    prompts = [line.strip() for line in prompt.splitlines() if line.strip()]
    if longest := max((len(line) for line in prompts if len(line) > MOST_PROMPT), default=0):
        raise InputError(f"The prompt has {longest} characters; {MOST_PROMPT} are the most.")
    if len(prompts) > MOST_PROMPTS:
        raise InputError(f"There are {len(prompts)} prompts; {MOST_PROMPTS} are the most.")
    if any(unicodedata.category(letter) in ("Cc", "Cs") and not letter.isspace() for letter in prompt):
        raise InputError("The prompt has characters that are no text; leave them out.")
    if count is not None and not (0 <= count <= MOST_COUNT and count == int(count)):
        raise InputError(f"Count must be a whole number from 0 to {MOST_COUNT}, got {count:g}.")
    takes = accepted(site, refs)
    given: dict[str, Any] = {"prompts": prompts} if prompts and "prompts" in takes else {}
    return given | ({"count": int(count)} if count and "count" in takes else {})


def _start(site: Site, refs: Sequence[str], given: dict[str, Any]) -> str:
    ended = 0.0
    for ref in refs:
        run = open_run(site, ref)
        parts = sweeps.cells(run) if run.status().kind == "sweep" else [run]
        if waiting := [one.id for one in parts if not one.status().over]:
            raise InputError(f"{waiting[0]}: is not finished yet; compare when it is.")
        ended = max([ended, *(one.status().ended or 0.0 for one in parts)])
    for job in background.jobs(site.store.root):
        if set(job.runs) == set(refs) and job.asked == given and job.state != "dead" and job.created > ended:
            raise SameJobError(job)
    return background.compare(site.store.root, list(refs), given)


def takes_files(site: Site, refs: Sequence[str]) -> bool:
    """Whether the pipeline of these runs draws from files of weights."""
    try:
        pipeline = registry.load("pipelines", open_run(site, refs[0]).status().pipeline) if refs else None
    except EquipoiseError:
        return False
    return pipeline is not None and pipeline.compare_files.__func__ is not Pipeline.compare_files.__func__


def lora_files(site: Site) -> list[tuple[str, str]]:
    """The .safetensors files of the top of each data folder, then of runs' results, the newest run first:
    (words, choice)."""
    root, found = site.store.root, []
    for name, folder in site.data.items():
        found += [f"{name}/{file.name}" for file in sorted(folder.glob("*.safetensors"))]
    for item in site.store.list():
        if len(found) >= MOST_FILES:
            break
        for place in ("result", "*/result"):  # its own, and those of a sweep's cells
            files = sorted((root / item.id).glob(f"{place}/*.safetensors"))
            found += [file.relative_to(root).as_posix() for file in files]
    return [(file, file) for file in found[:MOST_FILES]]


def _file(site: Site, name: str) -> str:
    """The path of a file that `lora_files` offers. Raises InputError where it leads out of its folder."""
    if name.partition("/")[0] in site.data:
        return site.path(name)
    return str(site.file(name))


def discard(site: Site, id: str) -> str:
    """Deletes a comparison that was made here, and ends it if it is being made; returns a message.

    Raises:
        InputError: it is the runs' own, or none.
    """
    folder, _, name = id.partition("/")
    if folder != background.COMPARISONS:
        raise InputError("This comparison belongs to its runs, and goes when they are deleted.")
    background.discard(site.store.root, name)
    return "The comparison is deleted."


def pending(site: Site, refs: Sequence[str]) -> str:
    """The id of the comparison of these runs that is being made, or that failed last; "" where there is none."""
    job = next((job for job in background.jobs(site.store.root) if set(job.runs) == set(refs)), None)
    return f"{background.COMPARISONS}/{job.name}" if job and job.state != "done" else ""


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
        return draw.notice(f"They are being compared: {count} files so far. They appear here by themselves.")
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
