"""The numbers of a comparison as HTML: its curves of scores, the table of all metrics, and its files."""

from equipoise.pipelines.comparing import answer as answers
from equipoise.pipelines.comparing import curve as curves
from equipoise.pipelines.comparing import report, votes
from equipoise.pipelines.comparing.meanings import meaning
from equipoise.ui import draw
from equipoise.ui.compare import read
from equipoise.ui.draw import esc, url
from equipoise.ui.safety import Site


def curve(site: Site, id: str) -> str:
    """Score against learning rate, and the usable range of every row; nothing where nothing is judged."""
    comparison = read(site, id)
    if not comparison.judged:
        return ""
    ranges = "".join(
        f"<tr><td><i style='background:{curves.line_colour(index, draw.INKS)}'></i>{esc(row)}</td>"
        f"<td>{esc(found or f'none of the {comparison.noun}s tried')}</td></tr>"
        for index, (row, found) in enumerate(comparison.ranges().items())
    )
    head = f"<thead><tr><th></th><th>{esc(comparison.column)}s that worked</th></tr></thead>"
    # in the page's own colours, which can be told apart in the dark too
    drawn = curves.draw_curve(comparison, draw.INKS) if comparison.rates else ""
    words = curves.curve_words(comparison)
    hints = f"<p class='hint'>{esc(words)}</p>" if words else ""
    lists = f"<div class='scroll'><table>{head}<tbody>{ranges}</tbody></table></div>"
    return f"<div class='curve'>{drawn}<div>{lists}{hints}</div></div>"


def table(site: Site, id: str) -> str:
    """Every cell's numbers."""
    comparison = read(site, id)
    cells = [comparison.base, *comparison.cells]
    known = dict.fromkeys(name for cell in cells for name in cell.metrics)
    names = [name for name in known if any(cell.metrics.get(name) for cell in cells)]  # not what is 0 everywhere
    head = "".join(f"<th>{esc(name)}</th>" for name in ["", comparison.noun, "seed", "state", "verdict"])
    head += "".join(f"<th title='{esc(meaning(comparison, name))}'>{esc(name)}</th>" for name in names)
    rows = "".join(
        f"<tr><td>{esc(cell.row)}</td><td>{comparison.shown(cell.rate)}</td><td>{esc(cell.seed)}</td>"
        f"<td>{esc(cell.state)}</td><td class='verdict'>{esc(comparison.verdict(cell.row, cell.rate))}</td>"
        + "".join(f"<td>{draw.number(cell.metrics.get(name))}</td>" for name in names)
        + "</tr>"
        for cell in cells
    )
    left = ", ".join(name for name in known if name not in names)
    hint = f"<p class='hint'>0 in every cell: {esc(left)}.</p>" if left else ""
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{hint}"


def answer(site: Site, id: str) -> str:
    """What the comparison comes to, in one sentence; of pictures that are not judged, that they are not."""
    comparison = read(site, id)
    words = answers.answer(comparison)
    return f"<p class='answer'>{esc(words)}</p>" if words else draw.notice(report.not_judged(comparison))


def best_run(site: Site, id: str) -> str:
    """The run whose rate the sentence calls usable, or "" where none is or the comparison is not of runs."""
    comparison = read(site, id)
    found = comparison.best if comparison.of_rates else None
    return comparison.at(found[0], found[1].rate)[0].run if found and comparison.usable(found[0], found[1].rate) else ""


def prompts(site: Site, id: str, chosen: int = 0) -> str:
    """The prompts as a numbered list, of which one can be chosen. `chosen`: which one is, counted from 1; 0: none."""
    comparison = read(site, id)
    items = [
        f"<li><button class='link' data-id='{index}' aria-pressed='{'true' if index == chosen else 'false'}'>"
        f"{esc(prompt)}</button></li>"
        for index, prompt in enumerate(comparison.prompts, 1)
    ]
    every = f"<button class='link' data-id='0' aria-pressed='{'false' if chosen else 'true'}'>All of them</button>"
    return f"<div class='prompts'><ol>{''.join(items)}</ol>{every if len(items) > 1 else ''}</div>"


def export(site: Site, id: str) -> str:
    """Links to the comparison's files."""
    comparison = read(site, id)
    folder, names = comparison.folder, {"grid.png": "Grid of all prompts (PNG)"}
    names |= {f"grid-{index:02d}.png": f"Grid of prompt {index + 1} (PNG)" for index in range(len(comparison.prompts))}
    names |= {"report.html": "Report (HTML)", "table.csv": "Table (CSV)", "prompts.csv": "Prompts (CSV)"}
    names |= {"table.json": "JSON", votes.FILE: "Votes (JSONL)"}
    links = [
        f"<li><a href='{url(f'{id}/{file}')}?download=1' download>{label}</a></li>"
        for file, label in names.items()
        if (folder / file).is_file()
    ]
    return f"<ul class='files'>{''.join(links)}</ul>"
