"""The run that a command was asked for, where a sweep is none: one of its cells is wanted."""

from equipoise.errors import InputError
from equipoise.pipelines.jobs import sweep as sweeps
from equipoise.pipelines.runs.store import TOP, Run, find
from equipoise.pipelines.tables import listed

_LISTED = 12  # cells in a refusal


def one_run(ref: str, runs: str | None) -> Run:
    """A run or a sweep's cell.

    Raises:
        InputError: there is none, or it is a sweep.
    """
    found = find(ref, runs, TOP if ref == "latest" else (*TOP, "cell"))
    if found.status().kind == "sweep":
        raise InputError(f"{found.id} is a sweep, and one of its cells is wanted{_cells(found)}.")
    return found


def _cells(sweep: Run) -> str:
    """The cells that can be given, as words after a refusal."""
    refs = [cell.ref for cell in sweeps.cells(sweep) if cell.result.is_dir() and any(cell.result.iterdir())]
    return f": {listed(refs, _LISTED)}" if refs else ", and none has a result yet"
