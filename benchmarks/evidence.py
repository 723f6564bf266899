"""What each published table says, beside what its command gives now.

    python benchmarks/evidence.py --list                 the tables, their commands and seeds, and what is kept of them
    python benchmarks/evidence.py --only scaled-gd       makes some anew, and compares them
    python benchmarks/evidence.py                        all of them: many hours; goes on where it ended last

A table in README.md, docs/ or benchmarks/ has a comment in the line before it: `<!-- measured by: NAME -->`, of an
entry of evidence.toml, or `<!-- not measured -->`. With `, from here on` it is about every table up to the end of the
file. What a finished command printed stays in the output folder, and is what later calls compare, until --again; if it
is of other code, they say so. A figure has moved if it differs by more than the spread that is published with it ("1.0
(0.8 to 1.3)", "1.0 ± 0.2", or a row named "spread" below it); one without a spread, by more than the entry's
`tolerance` of its size. The exit code is 1 if a figure moved, a line reads otherwise or a command failed. Printed
tables that are published nowhere are listed, and so is, at the end, what was not run.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from itertools import chain, groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 0.05
_NUMBER = r"(?<![A-Za-z\d.])[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"
_FIGURE = re.compile(rf"({_NUMBER})%? \(({_NUMBER})%? to ({_NUMBER})%?\)|({_NUMBER}) ± ({_NUMBER})|({_NUMBER})")
_MARK = re.compile(r"<!-- (?:measured by: (?P<entry>[\w-]+)|not measured)(?P<rest>, from here on)? -->")
# what figures may depend on; words, and which tables there are, are not among it
_FILES = ["plugin", "pipelines", "ui", "configs", "benchmarks", "tests/soak.py", "constraints.txt"]
_FILES += [":!*.md", ":!benchmarks/evidence.*"]
_PROGRAMS = {"equipoise": ["-m", "equipoise.pipelines.cli"], "python": []}


@dataclass(frozen=True)
class Entry:
    """A command that prints tables, of evidence.toml."""

    name: str
    commands: Sequence[str]  # {folder}: a folder of its own; other words in braces are given by --given
    seeds: str
    tolerance: float = TOLERANCE
    needs: str = ""  # what has to be there first, in words
    resume: str = ""  # what the command is given besides to go on with the cells.jsonl that an interrupted call left
    environment: Mapping[str, str] = field(default_factory=dict)

    def missing(self, given: Mapping[str, str]) -> list[str]:
        words = re.findall(r"{(\w+)}", " ".join(self.commands))
        return sorted(set(words) - {"folder"} - set(given))


@dataclass(frozen=True)
class Table:
    """A table or printed block as it is published."""

    file: str
    line: int  # of its first line, from 1
    mark: str | None  # the entry; "": not measured; None: no comment says
    lines: Sequence[str]

    @property
    def has_figures(self) -> bool:
        """Whether it needs a mark: a printed block, or a cell beyond the first column that begins with a number."""
        cells = chain(*(row.strip().strip("|").split("|")[1:] for row in self.lines[2:]))
        return not self.lines[0].startswith("|") or any(re.match(r"[*~<±+-]*\d", cell.strip()) for cell in cells)


def entries(file: Path = ROOT / "benchmarks" / "evidence.toml") -> dict[str, Entry]:
    found = {}
    for name, values in tomllib.loads(file.read_text(encoding="utf-8")).items():
        command = values.pop("command")
        found[name] = Entry(name, [command] if isinstance(command, str) else command, **values)
    return found


def published(root: Path = ROOT) -> list[Table]:
    """The tables of README.md, docs/ and benchmarks/ in order."""
    files = [root / "README.md", *sorted((root / "docs").glob("*.md")), *sorted((root / "benchmarks").rglob("*.md"))]
    return [table for file in files for table in read(file.relative_to(root).as_posix(), file.read_text("utf-8"))]


def read(file: str, text: str) -> list[Table]:
    """The tables of one Markdown file, and its fenced blocks without a language."""
    lines, found, at, mark, rest = text.split("\n"), [], 0, None, None
    while at < len(lines):
        here, start = lines[at], at
        if comment := _MARK.fullmatch(here):
            mark = comment["entry"] or ""
            rest = mark if comment["rest"] else rest
        if here.startswith(("```", "|")):
            fenced = here.startswith("```")
            at += 1
            while at < len(lines) and (not lines[at].startswith("```") if fenced else lines[at].startswith("|")):
                at += 1
            if here == "```" or not fenced:
                start += fenced
                found.append(Table(file, start + 1, rest if mark is None else mark, lines[start:at]))
            at -= not fenced
        if here and not here.startswith("<!--"):
            mark = None
        at += 1
    return found


def numbers(line: str) -> list[tuple[str, float, float | None]]:
    """(as printed, value, spread or None) of each figure of a line; its bounds are not figures themselves."""
    found: list[tuple[str, float, float | None]] = []
    for whole in _FIGURE.finditer(_bare(line)):
        ranged, low, high, mean, width, alone = whole.groups()
        spread = float(high) - float(low) if ranged else float(width) if mean else None
        found.append((whole[0], float(ranged or mean or alone), spread))
    return found


def skeleton(line: str) -> str:
    """The line without its numbers, and without what only lays it out."""
    bare = re.sub(_NUMBER, "#", _bare(line)).strip(" |")
    return bare if re.search(r"[^\W_]|#", bare) else ""


def _bare(line: str) -> str:
    """The line without emphasis, and with single spaces."""
    return re.sub(r"[\s*]+", " ", line)


def compare(tables: Sequence[Table], printed: Sequence[str], tolerance: float) -> tuple[int, list[str]]:
    """How many figures of one file's tables were compared, and what to look at: figures that moved, changed lines.

    Lines are matched by their skeletons, in order.
    """
    was, now, matched = _match(tables, printed)
    count, found = 0, []
    for kind, i, i_end, j, j_end in matched:
        if kind != "equal":
            found += [f"{number}: reads otherwise now, or is gone: {line.strip()}" for number, line in was[i:i_end]]
            found += [f"    instead: {line.strip()}" for _, line in now[j : min(j_end, j + i_end - i)]]
            continue
        for at in range(i, i_end):
            (number, line), below = was[at], was[at + 1][1] if at + 1 < i_end else ""
            if skeleton(line).startswith("spread #"):
                continue
            spreads = [value for _, value, _ in numbers(below)] if skeleton(below).startswith("spread #") else []
            before, after = numbers(line), numbers(now[j + at - i][1])
            if len(before) != len(after) or len(spreads) > len(before):
                found.append(f"{number}: reads otherwise now, or its row of spreads has more figures: {line.strip()}")
                continue
            count += len(before)
            found += [f"{number}: {moved}: {line.strip()}" for moved in _moved(before, after, spreads, tolerance)]
    return count, found


def _match(
    tables: Sequence[Table], printed: Sequence[str]
) -> tuple[list[tuple[int, str]], list[tuple[int, str]], list[tuple[str, int, int, int, int]]]:
    """(number, line) of what is published and of what is printed, and difflib's opcodes between them."""
    was = [(table.line + i, line) for table in tables for i, line in enumerate(table.lines) if skeleton(line)]
    now = [(number, line) for number, line in enumerate(printed, 1) if skeleton(line)]
    old, new = [skeleton(line) for _, line in was], [skeleton(line) for _, line in now]
    return was, now, SequenceMatcher(None, old, new, autojunk=False).get_opcodes()


def _moved(before: Sequence[tuple], after: Sequence[tuple], below: Sequence[float], tolerance: float) -> list[str]:
    """Which of a line's figures moved, in words; `below`: the spreads of its last ones, from the row below."""
    found = []
    spreads = [None] * (len(before) - len(below)) + list(below)
    for (was, x, own), (now, y, _), other in zip(before, after, spreads, strict=True):
        spread = own if other is None else other
        if abs(x - y) > allowed(was, x, spread, tolerance):
            found.append(f"{was} moved to {now}{'' if spread is None else f', by more than {spread:g}'}")
    return found


def surplus(tables: Sequence[Table], printed: Sequence[str]) -> list[str]:
    """The tables among what is printed of which no line is published in any file, in a sentence each."""
    known: set[int] = set()
    for file in {table.file for table in tables}:
        _, now, matched = _match([table for table in tables if table.file == file], printed)
        for kind, i, i_end, j, j_end in matched:
            known |= {number for number, _ in now[j : j_end if kind == "equal" else min(j_end, j + i_end - i)]}
    found, at = [], 0
    for filled, group in groupby(printed, key=lambda line: bool(line.strip())):
        lines = list(group)
        numbered = range(at + 1, at + 1 + len(lines))
        at += len(lines)
        columns = [line for line in lines if line.startswith("|") or re.search(r"\S {2,}\S", line)]
        if filled and len(columns) > 1 and known.isdisjoint(numbered):
            found.append(f"published nowhere, {len(lines)} lines from line {numbered[0]}: {lines[0].strip()}")
    return found


def allowed(printed: str, value: float, spread: float | None, tolerance: float) -> float:
    """How far a figure may move: its spread or tolerance, and at least one unit of its last digit."""
    digits = re.match(r"[-+]?\d*\.?(\d*)(?:e([-+]?\d+))?", printed)
    unit = 10.0 ** (int(digits[2] or 0) - len(digits[1])) if digits else 0.0
    return max(unit, abs(value) * tolerance if spread is None else spread) * (1 + 1e-9)


def beside(outputs: Sequence[str]) -> str:
    """Outputs of several commands as one: two-column tables of equal rows become one with a column for each."""
    if len(outputs) == 1:
        return outputs[0]
    rows: dict[str, list[str]] = {}
    for output in outputs:
        for line in output.splitlines():
            label, *cells = line.strip().strip("|").split("|")
            rows.setdefault(label, []).extend(cells)
    return "\n".join(f"| {' | '.join([label, *cells])} |" for label, cells in rows.items())


def kept(folder: Path, entry: Entry) -> dict | None:
    """What was made of an entry, unless its command is another one now."""
    file = folder / entry.name / "kept.json"
    found = json.loads(file.read_text("utf-8")) if file.exists() else {}
    return found if found.get("commands") == list(entry.commands) else None


def code() -> dict[str, str]:
    """What the working tree is called, and a digest of all in it that a figure may depend on."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    files = git("ls-files", "--stage", "--", *_FILES) + git("diff", "HEAD", "--", *_FILES)
    return {"code": git("describe", "--always", "--dirty"), "files": hashlib.sha256(files.encode()).hexdigest()[:16]}


def make(folder: Path, entry: Entry, given: Mapping[str, str], again: bool = False) -> bool:
    """Runs an entry's commands and keeps what they print; whether all of them ended well.

    Goes on with the cells that an interrupted call of the same commands and code left, unless it is made `again`.
    """
    own, here = folder / entry.name, code()
    lines = [[word.format(folder=own, **given) for word in shlex.split(command)] for command in entry.commands]
    begun = own / "begun.json"
    this = json.dumps({"lines": lines, "files": here["files"]}) + "\n"
    cells = begun.exists() and begun.read_text("utf-8") == this and any(own.rglob("cells.jsonl"))
    goes_on = bool(cells and entry.resume and not again)
    if own.exists() and not goes_on:
        shutil.rmtree(own)
    own.mkdir(parents=True, exist_ok=True)
    begun.write_text(this, encoding="utf-8")
    started, outputs = time.monotonic(), []
    for program, *words in lines:
        words += shlex.split(entry.resume) if goes_on else []
        print(f"{entry.name}: {shlex.join([program, *words])}", file=sys.stderr, flush=True)
        done = subprocess.run(
            [sys.executable, *_PROGRAMS[program], *words], cwd=ROOT, stdout=subprocess.PIPE, text=True,
            env=os.environ | dict(entry.environment),
        )  # fmt: skip
        if done.returncode:
            print(f"{entry.name}: ended with code {done.returncode}.", file=sys.stderr)
            return False
        outputs.append(done.stdout)
    (own / "output.txt").write_text(beside(outputs), encoding="utf-8")
    about = {"commands": list(entry.commands), "seconds": round(time.monotonic() - started), **here}
    (own / "kept.json").write_text(json.dumps(about) + "\n", encoding="utf-8")
    begun.unlink()  # so that the next call begins anew
    return True


def judge(folder: Path, entry: Entry, tables: Sequence[Table]) -> bool:
    """Prints how an entry's tables compare with what is kept; whether all is as published."""
    about, here = kept(folder, entry) or {}, code()
    if about.get("files") != here["files"]:
        print(f"{entry.name}: kept, of other code ({about.get('code')}; this is {here['code']}); --again makes it anew")
    now = (folder / entry.name / "output.txt").read_text("utf-8").splitlines()
    same = True
    for file in dict.fromkeys(table.file for table in tables):
        mine = [table for table in tables if table.file == file]
        count, found = compare(mine, now, entry.tolerance)
        looked = len([sentence for sentence in found if not sentence.startswith(" ")])
        print(f"{entry.name}, {file}: {len(mine)} table(s), {count} figures, {looked or 'nothing'} to look at")
        for sentence in found:
            print(f"    {sentence}")
        same = same and not found
    for sentence in surplus(tables, now):
        print(f"{entry.name}: {sentence}")
    return same


def show(folder: Path, found: Mapping[str, Entry], tables: Sequence[Table]) -> None:
    for name, entry in found.items():
        where = [f"{table.file}:{table.line}" for table in tables if table.mark == name]
        print(f"{name}: {where[0]}{f' and {len(where) - 1} more' if where[1:] else ''}; seeds: {entry.seeds}")
        for command in entry.commands:
            print(f"    {command}")
        if entry.needs:
            print(f"    needs {entry.needs}")
        if about := kept(folder, entry):
            print(f"    kept, of {about['code']}; took {about['seconds']} s")


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known, tables = entries(), published()
    parser.add_argument("--only", nargs="+", choices=known, default=list(known), metavar="NAME", help="entries")
    parser.add_argument("--list", action="store_true", help="run nothing; list the entries")
    parser.add_argument("--again", action="store_true", help="run also what is kept")
    parser.add_argument("--kept", action="store_true", help="run nothing; compare what is kept")
    parser.add_argument("--given", nargs="+", default=[], metavar="WORD=VALUE", help="of words in braces in commands")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "evidence", metavar="FOLDER")
    asked = parser.parse_args(words)
    folder = asked.output.resolve()
    if unpaired := [pair for pair in asked.given if "=" not in pair]:
        parser.error(f"--given: {unpaired[0]!r} is no WORD=VALUE")
    given = dict(pair.split("=", 1) for pair in asked.given)
    found = {name: known[name] for name in asked.only}
    if asked.list:
        show(folder, found, tables)
        return 0
    try:
        return run(folder, found, tables, given, asked.again, asked.kept)
    except KeyboardInterrupt:
        print("Interrupted. What was finished is kept; without --again it goes on from there.", file=sys.stderr)
        return 130


def run(
    folder: Path,
    found: Mapping[str, Entry],
    tables: Sequence[Table],
    given: Mapping[str, str],
    again: bool,
    only_kept: bool,
) -> int:
    """Makes what is not kept, or all of it `again`, and compares; 1 if there is something to look at.

    What was not run is named at the end.
    """
    ended, left = 0, []
    for name, entry in found.items():
        if not only_kept and (again or kept(folder, entry) is None):
            if missing := entry.missing(given):
                words = " ".join(f"{word}=…" for word in missing)
                left.append(f"{name}: not run, for want of --given {words}: {entry.needs}")
                continue
            if not make(folder, entry, given, again):
                ended = 1
                continue
        if kept(folder, entry) is None:
            left.append(f"{name}: not run, and nothing is kept")
        elif not judge(folder, entry, [table for table in tables if table.mark == name]):
            ended = 1
    print(*left, sep="\n", end="\n" if left else "")
    return ended


if __name__ == "__main__":
    sys.exit(main())
