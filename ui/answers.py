"""Answers to questions as HTML: ticked, or crossed with what was wanted."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from equipoise.errors import InputError
from equipoise.pipelines.media.reading import MediaError
from equipoise.ui import draw
from equipoise.ui.draw import esc
from equipoise.ui.safety import Site
from equipoise.ui.thumbnails import thumbnail

PAGE = 20  # answers that are shown at once
PICTURES = 3  # of a question
ANSWERS = "answers.jsonl"  # where a pipeline that answers questions writes its answers


def answer_records(site: Site, folder: Path) -> list[dict[str, Any]]:
    """The answers in a folder of the runs folder; none of a pipeline that draws, or behind a link that leads out."""
    try:
        file = site.file(f"{folder.relative_to(site.store.root).as_posix()}/{ANSWERS}")
        return draw.records(file.read_text(encoding="utf-8", errors="replace"))
    except (InputError, OSError, ValueError):
        return []


def without_places(text: str) -> str:
    """A file of answers as it is served: what was asked about by its name alone."""
    found = draw.records(text, text.count("\n") + 1)
    for record in found:
        media = record.get("media")
        record["media"] = [Path(str(name)).name for name in (media if isinstance(media, list) else ())]
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in found)


def answers(site: Site, folder: Path, prompt: int) -> str:
    """The first four answers, or one prompt's, ticked or crossed; nothing of a pipeline that draws."""
    found = answer_records(site, folder)
    marked = list(map(_answer, found[prompt - 1 : prompt] if prompt else found[:4]))
    more = f"<small>and {len(found) - 4} more</small>" if len(found) > 4 and not prompt else ""
    return f"<div class='answers'>{''.join(marked)}{more}</div>" if marked else ""


def all_answers(site: Site, folders: Mapping[str, Path]) -> str:
    """Every question with its answers beside each other, a page of them at once, the others folded up.

    Pictures are those of the first page: to decode all of them takes seconds. Others are named.

    Args:
        site: whose.
        folders: whose answers they are, in words → the folder of the runs folder that they lie in.
    """
    columns = {who: records for who, folder in folders.items() if (records := answer_records(site, folder))}
    rows = [
        _row(site, [records[at : at + 1] for records in columns.values()], with_pictures=at < PAGE)
        for at in range(_most(columns))
    ]
    head = "".join(f"<th>{esc(words)}</th>" for words in ("question", *columns))
    pages = [
        f"<div class='scroll answered'><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows[at : at + PAGE])}</tbody></table></div>"
        for at in range(0, len(rows), PAGE)
    ]
    folded = [
        f"<details class='card'><summary>Questions {at * PAGE + 1} to {min(at * PAGE + PAGE, len(rows))}</summary>"
        f"{page}</details>"
        for at, page in enumerate(pages)
    ]
    return "".join([*pages[:1], *folded[1:]])


def _most(columns: Mapping[str, list[dict[str, Any]]]) -> int:
    return max(map(len, columns.values()), default=0)


def _row(site: Site, found: Sequence[list[dict[str, Any]]], with_pictures: bool) -> str:
    """A question, and what each has answered to it; nothing where one has not."""
    first = next(records[0] for records in found if records)
    media = first.get("media")
    paths = [Path(str(name)) for name in (media if isinstance(media, list) else ())[:PICTURES]]
    shown = "".join(_picture(site, path) if with_pictures else _named(path) for path in paths)
    cells = "".join(f"<td>{_answer(records[0]) if records else ''}</td>" for records in found)
    return f"<tr><td>{shown}<p>{esc(first.get('question', ''))}</p></td>{cells}</tr>"


def _picture(site: Site, path: Path) -> str:
    """What was asked about, small; its file's name alone where it is none that this page may read, or no picture."""
    try:
        if site.may_read(path):
            return f"<img loading='lazy' src='{thumbnail(path)}' alt='{esc(path.name)}' title='{esc(path.name)}'>"
    except (MediaError, OSError, ValueError):
        pass
    return _named(path)


def _named(path: Path) -> str:
    return f"<small>{esc(path.name)}</small>"


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
