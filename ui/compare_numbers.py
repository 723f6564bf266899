"""The numbers of a comparison as HTML: its curves of scores, the table of all metrics, and its files."""

from equipoise.pipelines.comparing import curve as curves
from equipoise.pipelines.comparing import report
from equipoise.ui import draw
from equipoise.ui.compare import read
from equipoise.ui.draw import esc, url
from equipoise.ui.safety import Site


def curve(site: Site, id: str) -> str:
    """Score against learning rate, and the usable range of every row."""
    comparison = read(site, id)
    if not comparison.judged:
        return draw.notice(report.not_judged(comparison))
    ranges = "".join(
        f"<tr><td><i style='background:{curves.line_colour(index)}'></i>{esc(row)}</td>"
        f"<td>{esc(found) if found else f'none of the {comparison.noun}s tried'}</td></tr>"
        for index, (row, found) in enumerate(comparison.ranges().items())
    )
    head = f"<thead><tr><th></th><th>{comparison.column}s that worked</th></tr></thead>"
    drawn = curves.draw_curve(comparison) if comparison.rates else ""
    words = [report.best_words(comparison), curves.curve_words(comparison)]
    hints = "".join(f"<p class='hint'>{esc(line)}</p>" for line in words if line)
    lists = f"<div class='scroll'><table>{head}<tbody>{ranges}</tbody></table></div>"
    return f"<div class='curve'>{drawn}<div>{lists}{hints}</div></div>"


def table(site: Site, id: str) -> str:
    """Every cell's numbers."""
    comparison = read(site, id)
    cells = [comparison.base, *comparison.cells]
    names = list(dict.fromkeys(name for cell in cells for name in cell.metrics))
    head = "".join(f"<th>{esc(name)}</th>" for name in ["", comparison.noun, "seed", "state", "verdict", *names])
    rows = "".join(
        f"<tr><td>{esc(cell.row)}</td><td>{comparison.shown(cell.rate)}</td><td>{cell.seed}</td>"
        f"<td>{esc(cell.state)}</td><td class='verdict'>{esc(comparison.verdict(cell.row, cell.rate))}</td>"
        + "".join(f"<td>{draw.number(cell.metrics.get(name))}</td>" for name in names)
        + "</tr>"
        for cell in cells
    )
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"


def export(site: Site, id: str) -> str:
    """Links to the comparison's files."""
    comparison = read(site, id)
    folder, names = comparison.folder, {"grid.png": "Grid (PNG)"}
    names |= {f"grid-{index:02d}.png": f"Grid {index + 1} (PNG)" for index in range(len(comparison.prompts))}
    names |= {"report.html": "Report (HTML)", "table.csv": "Table (CSV)", "prompts.csv": "Prompts (CSV)"}
    names |= {"table.json": "JSON"}
    links = [
        f"<li><a href='{url(f'{id}/{file}')}?download=1' download>{label}</a></li>"
        for file, label in names.items()
        if (folder / file).is_file()
    ]
    return f"<ul class='files'>{''.join(links)}</ul>"
