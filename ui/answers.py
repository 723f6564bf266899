"""Answers to questions as HTML: ticked, or crossed with what was wanted."""

from pathlib import Path
from typing import Any

from equipoise.errors import InputError
from equipoise.ui import draw
from equipoise.ui.draw import esc
from equipoise.ui.safety import Site

ANSWERS = "answers.jsonl"  # where a pipeline that answers questions writes its answers


def answer_records(site: Site, folder: Path) -> list[dict[str, Any]]:
    """The answers in a folder of the runs folder; none of a pipeline that draws, or behind a link that leads out."""
    try:
        file = site.file(f"{folder.relative_to(site.store.root).as_posix()}/{ANSWERS}")
        return draw.records(file.read_text(encoding="utf-8", errors="replace"))
    except (InputError, OSError, ValueError):
        return []


def answers(site: Site, folder: Path, prompt: int) -> str:
    """The first four answers, or one prompt's, ticked or crossed; nothing of a pipeline that draws."""
    found = answer_records(site, folder)
    marked = list(map(_answer, found[prompt - 1 : prompt] if prompt else found[:4]))
    return f"<div class='answers'>{''.join(marked)}</div>" if marked else ""


def _answer(record: dict[str, Any]) -> str:
    """One answer, and what was wanted in its place."""
    answer, score = str(record.get("answer") or "(nothing)"), record.get("score")
    kind, mark = ("right", "✓ ") if isinstance(score, int | float) and score >= 1 else ("wrong", "✗ ")
    if not isinstance(score, int | float):
        kind, mark = "", ""
    wanted = record.get("wanted") or ()
    wanted = " or ".join(map(str, wanted if isinstance(wanted, list) else [wanted])) if kind == "wrong" else ""
    more = f" <s>{esc(wanted)}</s>" if wanted else ""
    return f"<span class='{kind}' title='{esc(record.get('question', ''))}'>{mark}{esc(answer)}{more}</span>"
