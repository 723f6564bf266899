"""The part of the tab Compare where people vote blindly: which of two pictures is better, A or B?"""

import base64
import hashlib
import random
import secrets
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from equipoise.errors import EquipoiseError, InputError
from equipoise.pipelines.comparing import report, votes
from equipoise.pipelines.comparing.comparison import Cell, Comparison
from equipoise.ui import draw
from equipoise.ui.answers import answer_records
from equipoise.ui.compare import read
from equipoise.ui.compare_cell import zoom_buttons, zooms
from equipoise.ui.compare_pictures import shots
from equipoise.ui.draw import esc
from equipoise.ui.safety import SUFFIXES, Site
from equipoise.ui.widgets import HIDDEN, Updates, bound, shown_in

GLANCE = 0.5  # seconds; a click so soon after a pair was shown is a second one on the pair before
_draw = random.SystemRandom()  # which nobody can foresee


@dataclass(frozen=True)
class Duel:
    """Two cells that are seen without their names, in the order in which they are seen."""

    id: str  # the comparison's
    cells: tuple[str, str]  # by run id ("" is the base)
    key: str  # of the picture or answer that is compared


@dataclass(frozen=True)
class Asked:
    """A pair as it stands in a page."""

    duel: Duel
    seen: str  # digest of what the two show
    token: str = field(default_factory=secrets.token_urlsafe)  # in the page beside them: whoever clicks has seen them
    since: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, eq=False)
class Voting:
    """The parts, and what is remembered of one browser."""

    site: Site
    shown: gr.HTML
    said: gr.HTML
    row: gr.Row
    asked: gr.State


def build(site: Site, which: gr.Dropdown) -> list[Any]:
    """Draws the part; returns the events after which there is another vote."""
    with gr.Accordion("Blind vote: which is better, A or B?", open=False, visible=not site.read_only):
        lead = "Two cells, one prompt, the same noise: drawn at random, in random order, unnamed until you have voted."
        gr.HTML(f"<p class='hint'>{lead} The tally stands in the grid, the table and the report.</p>")
        begin = gr.Button("Show a pair", size="md", elem_id="vote-begin")
        shown = gr.HTML(elem_id="vote-pair", elem_classes=["viewed"])
        with gr.Row(elem_classes=["actions"], visible=False) as row:
            first = gr.Button("A is better", size="md", elem_id="vote-a")
            tie = gr.Button("Neither", size="md", elem_id="vote-neither")
            second = gr.Button("B is better", size="md", elem_id="vote-b")
        said = gr.HTML(elem_id="vote-said")
    voting = Voting(site, shown, said, row, gr.State())
    mine = [shown, said, row, voting.asked]
    begin.click(bound(show_pair, voting), which, mine, **HIDDEN)
    which.change(bound(forget_pair, voting), None, mine, **HIDDEN)
    handlers = ((first, prefer_a), (second, prefer_b), (tie, prefer_neither))
    sent: Any = {"inputs": [shown, voting.asked], "js": shown_in("vote-pair")}
    return [button.click(bound(handler, voting), outputs=mine, **sent, **HIDDEN) for button, handler in handlers]


def drawn(site: Site, comparison: Comparison, id: str, cell: Cell) -> Mapping[str, str]:
    """What a cell can be voted on by: key → HTML that does not say whose it is."""
    found = {shot.key: shot.file for shot in shots(site, comparison, id, cell)}
    if found:
        return found
    records = answer_records(site, comparison.place_of(cell))
    words = [(esc(record.get("question", "")), esc(record.get("answer", ""))) for record in records]
    return {f"answer {index}": f"<p class='hint'>{one}</p><p>{two}</p>" for index, (one, two) in enumerate(words, 1)}


def draw_duel(site: Site, id: str) -> Duel:
    """Two cells and a picture of both, those that were met least first.

    Raises:
        InputError: there are no two cells with something of the same prompt and noise.
    """
    comparison = read(site, id)
    keys = {cell.run: drawn(site, comparison, id, cell).keys() for cell in (comparison.base, *comparison.cells)}
    met = Counter(frozenset(pair[:2]) for pair in votes.pairs(comparison.folder))
    seen = Counter(cell for pair in met.elements() for cell in pair)
    for first in sorted(keys, key=lambda run: (seen[run], _draw.random())):
        others = [run for run in keys if run != first and keys[first] & keys[run]]
        if others:
            second = min(others, key=lambda run: (met[frozenset((first, run))], _draw.random()))
            both = [first, second]
            _draw.shuffle(both)
            return Duel(id, (both[0], both[1]), _draw.choice(sorted(keys[first] & keys[second])))
    raise InputError("There are no two cells that drew or answered the same here.")


def duel_shown(site: Site, duel: Duel) -> str:
    """The two beside each other. Pictures lie in the page itself, for their addresses would say whose they are.

    Raises:
        InputError: the comparison has not got both any more.
    """
    return _duel_shown(site, read(site, duel.id), duel)


def _duel_shown(site: Site, comparison: Comparison, duel: Duel) -> str:
    cells = _cells(comparison)
    prompt, buttons, sides = "", "", []
    for letter, run in zip("AB", duel.cells, strict=True):
        if run not in cells or duel.key not in drawn(site, comparison, duel.id, cells[run]):
            raise InputError("The comparison was made anew, without one of these two: ask for another pair.")
        cell = cells[run]
        shot = next((shot for shot in shots(site, comparison, duel.id, cell) if shot.key == duel.key), None)
        if shot:
            file = site.file(shot.file)
            data = base64.b64encode(file.read_bytes()).decode()
            prompt = comparison.prompts[shot.prompt] if shot.prompt < len(comparison.prompts) else ""
            buttons = zoom_buttons()
            inside = zooms(f"<img src='data:{SUFFIXES[file.suffix]};base64,{data}' alt='{letter}'>")
        else:
            inside = drawn(site, comparison, duel.id, cell)[duel.key]
        sides.append(f"<section><h3>{letter}</h3>{inside}</section>")
    return f"<p class='hint'>{esc(prompt)}</p><div class='talk'>{''.join(sides)}</div>{buttons}"


def _digest(shown: str) -> str:
    return hashlib.sha256(shown.encode()).hexdigest()


def _cells(comparison: Comparison) -> dict[str, Cell]:
    return {cell.run: cell for cell in (comparison.base, *comparison.cells)}


# Handlers: what they are given stands in the order of the inputs above


def show_pair(voting: Voting, id: str | None) -> Updates:
    return _next(voting, id or "", "")


def forget_pair(voting: Voting) -> Updates:
    """Another comparison is looked at."""
    return {voting.shown: "", voting.said: "", voting.row: gr.update(visible=False), voting.asked: None}


def prefer_a(voting: Voting, token: str, asked: Asked | None) -> Updates:
    return _voted(voting, token, asked, 0)


def prefer_b(voting: Voting, token: str, asked: Asked | None) -> Updates:
    return _voted(voting, token, asked, 1)


def prefer_neither(voting: Voting, token: str, asked: Asked | None) -> Updates:
    return _voted(voting, token, asked, None)


def _next(voting: Voting, id: str, said: str) -> Updates:
    try:
        if not id:
            raise InputError("Choose a comparison above first.")
        duel = draw_duel(voting.site, id)
        shown = duel_shown(voting.site, duel)
    except (EquipoiseError, OSError) as error:
        return forget_pair(voting) | {voting.said: said + draw.notice(voting.site.without_paths(error), "bad")}
    asked = Asked(duel, _digest(shown))
    marked = f"<div data-shown='{asked.token}'>{shown}</div>"
    return {voting.shown: marked, voting.said: said, voting.row: gr.update(visible=True), voting.asked: asked}


def _voted(voting: Voting, token: str, asked: Asked | None, preferred: int | None) -> Updates:
    """Keeps a vote, says whose the two were, and shows the next pair."""
    if asked is None:
        return {voting.said: draw.notice("Ask for a pair first.", "bad")}
    if token != asked.token or time.monotonic() - asked.since < GLANCE:  # whoever clicked has not looked at this pair
        return {voting.said: gr.skip()}
    duel = asked.duel
    try:
        comparison = read(voting.site, duel.id)
        if _digest(_duel_shown(voting.site, comparison, duel)) != asked.seen:
            raise InputError("The comparison was made anew, with other pictures or answers: ask for another pair.")
        names = [_name(comparison, _cells(comparison)[run]) for run in duel.cells]
        votes.cast(comparison.folder, duel.cells, duel.key, None if preferred is None else duel.cells[preferred])
        report.write_anew(comparison.folder)
    except (EquipoiseError, OSError) as error:
        return forget_pair(voting) | {voting.said: draw.notice(voting.site.without_paths(error), "bad")}
    count = len(votes.pairs(comparison.folder))
    counted = f"{count} vote{'s' * (count != 1)} so far"
    chosen = "neither was better" if preferred is None else f"{'AB'[preferred]} was better"
    words = f"You found that {chosen}: A was {names[0]}, B was {names[1]}. {counted}."
    return _next(voting, duel.id, draw.notice(words, "good"))


def _name(comparison: Comparison, cell: Cell) -> str:
    return f"{cell.row} {comparison.shown(cell.rate)}" if cell.run else cell.who
