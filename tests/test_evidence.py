"""Every published table names the command that makes it, and `make evidence` notices a figure that has changed."""

import importlib.util
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "evidence.py"
SPEC = importlib.util.spec_from_file_location("evidence", SCRIPT)
assert SPEC and SPEC.loader
evidence = importlib.util.module_from_spec(SPEC)
sys.modules["evidence"] = evidence  # where dataclasses look for it
SPEC.loader.exec_module(evidence)

PAGE = """# A page

<!-- measured by: toy -->
| | rate | loss |
| --- | ---: | ---: |
| mine | 0.1 | 1.50 (1.40 to 1.60) |
| theirs | 0.1 | 2.00 |

Words with 12 figures.

<!-- measured by: toy -->
```
          20 %    40 %
mine      2.092   1.918
spread    0.024   0.010
paper     3.799   3.420
```
"""


def compared(page: str, printed: str, tolerance: float = 0.0) -> list[str]:
    tables = evidence.read("page.md", page)
    return evidence.compare(tables, printed.splitlines(), tolerance)[1]


def test_every_table_with_figures_names_its_entry_or_says_that_it_is_not_measured():
    unnamed = [f"{t.file}:{t.line}" for t in evidence.published() if t.mark is None and t.has_figures]
    assert unnamed == [], "Put `<!-- measured by: NAME -->` before it, and NAME with its command in evidence.toml."


def test_every_entry_has_a_table_and_every_name_an_entry():
    named = {table.mark for table in evidence.published() if table.mark}
    assert named == set(evidence.entries())


def test_commands_are_of_this_repository():
    for entry in evidence.entries().values():
        assert entry.seeds
        for command in entry.commands:
            program, first, *_ = shlex.split(command)
            if program == "python":
                assert (ROOT / first).is_file(), command
            else:
                assert program == "equipoise", command


def test_a_new_table_without_its_command_is_noticed():
    page = PAGE + "\n| | accuracy |\n| --- | --- |\n| mine | 91.5 % |\n\n```\nmine  91.5\n```\n"
    unnamed = [table.line for table in evidence.read("page.md", page) if table.mark is None and table.has_figures]
    assert unnamed == [19, 24]
    words = "| key | what |\n| --- | --- |\n| `rho` | how far |\n\n```python\nrho = 3\n```\n"
    assert not any(table.has_figures for table in evidence.read("page.md", words)) and "python" not in str(
        evidence.read("page.md", words)
    )


def test_a_mark_may_speak_for_the_rest_of_a_page():
    table = "| | a |\n| - | - |\n| b | 1 |\n"
    page = f"<!-- measured by: toy, from here on -->\n{table}\ntext\n\n{table}"
    assert [table.mark for table in evidence.read("page.md", page)] == ["toy", "toy"]


def test_the_same_figures_are_nothing_to_look_at():
    assert compared(PAGE, f"a heading\n\n{PAGE}\n3 seconds\n") == []
    assert evidence.compare(evidence.read("page.md", PAGE), PAGE.splitlines(), 0.0)[0] == 10


@pytest.mark.parametrize(
    ("was", "now", "moved"),
    [
        ("1.50 (1.40", "1.65 (1.40", False),  # within its range's width
        ("1.50 (1.40", "1.75 (1.40", True),
        ("2.00", "2.01", False),  # a unit of the last digit
        ("2.00", "2.03", True),
        ("2.092", "2.110", False),  # within the row named spread
        ("2.092", "2.120", True),
        ("0.024", "0.9", False),  # a spread is no figure
        ("3.799", "3.802", True),
    ],
)
def test_a_figure_has_moved_beyond_its_spread(was, now, moved):
    found = compared(PAGE, PAGE.replace(was, now, 1))
    assert len(found) == moved, found
    assert not moved or f"moved to {now.split(' ')[0]}" in found[0]


def test_the_tolerance_is_for_figures_without_a_spread():
    changed = PAGE.replace("2.00", "2.90").replace("1.50 (1.40", "1.75 (1.40")
    assert len(compared(PAGE, changed, tolerance=0.5)) == 1


def test_a_line_that_reads_otherwise_is_named_with_its_number_and_what_stands_there_now():
    changed = PAGE.replace("| theirs | 0.1 | 2.00 |", "| theirs | 0.1 | not finite |")
    assert compared(PAGE, changed) == [
        "7: reads otherwise now, or is gone: | theirs | 0.1 | 2.00 |",
        "    instead: | theirs | 0.1 | not finite |",
    ]


@pytest.mark.parametrize(
    ("was", "now"),
    [
        ("| a | **1.0** (0.8 to 1.3) |", "| a | 1.0 (0.8 to 1.3) |"),
        ("| a | 1.0  ± 0.2 |", "| a | 1.0 ± 0.2 |"),
        ("| a | *1.0* | 2 |", "|  a |  1.0 | **2** |"),
    ],
)
def test_how_a_line_is_laid_out_is_no_difference(was, now):
    for one, other in ((was, now), (now, was)):
        table = evidence.Table("page.md", 1, "toy", [one])
        assert evidence.compare([table], [other], 0.0)[1] == []
        moved = evidence.compare([table], [other.replace("1.0", "7.0")], 0.0)[1]
        assert len(moved) == 1 and "1.0" in moved[0] and "moved to 7.0" in moved[0]


def test_lines_of_unequal_figures_are_named_and_end_nothing():
    assert compared("```\n# runs\nother 1\n```\n", "5 runs\nother 1\n") == [
        "2: reads otherwise now, or its row of spreads has more figures: # runs"
    ]
    rows = "```\na 1 2\nspread 3 4 5\n```\n"
    assert compared(rows, rows) == ["2: reads otherwise now, or its row of spreads has more figures: a 1 2"]


def test_a_printed_table_that_is_published_nowhere_is_listed():
    tables = evidence.read("page.md", PAGE)
    printed = [*PAGE.splitlines(), "", "| new | rate |", "| --- | --- |", "| x | 1 |", ""]
    printed += ["rank  loss", "1     0.5", "", "36 seconds with 2 worker(s).", "  out/results.json", "  out/chart.png"]
    assert evidence.surplus(tables, PAGE.splitlines()) == []
    assert evidence.surplus(tables, printed) == [
        "published nowhere, 3 lines from line 19: | new | rate |",
        "published nowhere, 2 lines from line 23: rank  loss",
    ]
    elsewhere = evidence.Table("other.md", 1, "toy", ["| new | rate |", "| --- | --- |", "| x | 1 |"])
    assert len(evidence.surplus([*tables, elsewhere], printed)) == 1


def test_tables_of_several_commands_are_put_side_by_side():
    one, other = (
        "| | 300 runs |\n| --- | ---: |\n| table | 45 ms |\n",
        "| | 1,000 runs |\n| --- | ---: |\n| table | 74 ms |\n",
    )
    joined = evidence.beside([one, other])
    assert compared("| | 300 runs | 1,000 runs |\n| --- | ---: | ---: |\n| table | 45 ms | 74 ms |\n", joined) == []


def test_what_is_finished_is_kept_until_its_command_changes(tmp_path, monkeypatch):
    script = tmp_path / "count.py"
    script.write_text("import sys\nopen(sys.argv[1], 'a').write('.')\nprint('| a | 1 |')\n")
    counts = tmp_path / "counts"
    monkeypatch.setitem(evidence._PROGRAMS, "python", [])
    toy = evidence.Entry("toy", [f"python {script} {counts}"], "0")
    monkeypatch.setattr(evidence, "entries", lambda: {"toy": toy})
    table = evidence.Table("page.md", 1, "toy", ["| | b |", "| --- | --- |", "| a | 2 |"])
    monkeypatch.setattr(evidence, "published", lambda: [table])
    words = ["--output", str(tmp_path / "kept")]
    assert evidence.main(words) == 1 and evidence.main(words) == 1 and counts.read_text() == "."
    assert evidence.main([*words, "--again"]) == 1 and counts.read_text() == ".."
    toy.commands.append(f"python {script} {counts}")
    assert evidence.main(words) == 1 and counts.read_text() == "...."


def test_an_interrupted_call_goes_on_and_a_finished_one_begins_anew(tmp_path, monkeypatch):
    script = tmp_path / "cells.py"
    script.write_text(
        "import pathlib, sys\n"
        "cells = pathlib.Path(sys.argv[1], 'cells.jsonl')\n"
        "if '--add' not in sys.argv: cells.write_text('1'); sys.exit(1)\n"  # as if it had been killed
        "cells.unlink(); print('| a | 2 |')\n"
    )
    toy = evidence.Entry("toy", [f"python {script} {{folder}}"], "0", resume="--add")
    monkeypatch.setattr(evidence, "entries", lambda: {"toy": toy})
    monkeypatch.setattr(evidence, "published", lambda: [evidence.Table("page.md", 1, "toy", ["| a | 2 |"])])
    words = ["--output", str(tmp_path / "kept")]
    assert [evidence.main(words) for _ in range(3)] == [1, 0, 0], "killed, gone on, kept"
    assert evidence.main([*words, "--again"]) == 1 and evidence.main(words) == 0


def test_cells_of_other_code_or_of_a_call_before_again_are_not_gone_on_with(tmp_path, monkeypatch):
    script = tmp_path / "cells.py"
    script.write_text(
        "import pathlib, sys\n"
        "cells = pathlib.Path(sys.argv[1], 'cells.jsonl')\n"
        "print('--add' in sys.argv, cells.exists(), file=open(sys.argv[2], 'a'))\n"
        "cells.write_text('1'); sys.exit(1)\n"  # as if it had been killed
    )
    calls = tmp_path / "calls"
    toy = evidence.Entry("toy", [f"python {script} {{folder}} {calls}"], "0", resume="--add")
    files = iter(["one", "one", "other", "other", "other"])
    monkeypatch.setattr(evidence, "entries", lambda: {"toy": toy})
    monkeypatch.setattr(evidence, "published", lambda: [])
    monkeypatch.setattr(evidence, "code", lambda: {"code": "abc", "files": next(files)})
    words = ["--output", str(tmp_path / "kept")]
    for more in ([], [], [], [], ["--again"]):
        assert evidence.main([*words, *more]) == 1
    resumed = [line.split() for line in calls.read_text().splitlines()]
    assert resumed == [["False"] * 2, ["True"] * 2, ["False"] * 2, ["True"] * 2, ["False"] * 2]


def test_kept_output_of_other_code_is_said_to_be(tmp_path, monkeypatch, capsys):
    toy = evidence.Entry("toy", ["python -c \"print('| a | 2 |')\""], "0")
    monkeypatch.setattr(evidence, "entries", lambda: {"toy": toy})
    monkeypatch.setattr(evidence, "published", lambda: [evidence.Table("page.md", 1, "toy", ["| a | 2 |"])])
    words = ["--output", str(tmp_path / "kept")]
    assert evidence.main(words) == 0 == evidence.main(words) and "other code" not in capsys.readouterr().out
    monkeypatch.setattr(evidence, "code", lambda: {"code": "def", "files": "other"})
    assert evidence.main(words) == 0
    assert (
        "toy: kept, of other code" in (out := capsys.readouterr().out) and "this is def); --again makes it anew" in out
    )
    assert evidence.main([*words, "--again"]) == 0 and "other code" not in capsys.readouterr().out


def test_the_code_is_all_that_figures_may_depend_on(tmp_path, monkeypatch):
    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True)

    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    (tmp_path / "plugin").mkdir()
    source, words = tmp_path / "plugin" / "a.py", tmp_path / "README.md"
    found = []
    git("init", "-q")
    for file, text in ((source, "1"), (words, "1"), (source, "2")):
        file.write_text(text)
        git("add", ".")
        found.append(evidence.code()["files"])
        git("commit", "-qm", "it")
        found.append(evidence.code()["files"])
    source.write_text("3")
    found.append(evidence.code()["files"])
    assert found[1] == found[2] == found[3] and len({found[3], found[5], found[6]}) == 3


def test_a_value_with_a_space_is_one_word(tmp_path, monkeypatch, capsys):
    script, output = tmp_path / "a script.py", tmp_path / "a folder"
    script.write_text("import sys\nprint('| a |', len(sys.argv), '|')\n")
    toy = evidence.Entry("toy", ["python {script} {folder}/out"], "0")
    monkeypatch.setattr(evidence, "entries", lambda: {"toy": toy})
    monkeypatch.setattr(evidence, "published", lambda: [evidence.Table("page.md", 1, "toy", ["| a | 2 |"])])
    assert evidence.main(["--output", str(output), "--given", f"script={script}"]) == 0
    assert "1 figures, nothing to look at" in capsys.readouterr().out


def test_what_was_not_run_is_named_at_the_end(tmp_path, monkeypatch, capsys):
    toys = {
        "first": evidence.Entry("first", ["python none.py {script}"], "0", needs="a script"),
        "second": evidence.Entry("second", ["python -c \"print('| a | 2 |')\""], "0"),
    }
    monkeypatch.setattr(evidence, "entries", lambda: toys)
    monkeypatch.setattr(evidence, "published", lambda: [evidence.Table("page.md", 1, "second", ["| a | 2 |"])])
    words = ["--output", str(tmp_path)]
    assert evidence.main([*words, "--kept"]) == 0
    assert capsys.readouterr().out == "".join(f"{name}: not run, and nothing is kept\n" for name in toys)
    assert evidence.main(words) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "first: not run, for want of --given script=…: a script"


def test_make_passes_what_the_script_takes():
    words = ["ONLY=demo reach", "AGAIN=1", "GIVEN=script='a b.py'"]
    done = subprocess.run(
        ["make", "-n", "-o", ".venv/.installed-dev", "evidence", *words], cwd=ROOT, capture_output=True
    )
    assert b"evidence.py --only demo reach --again --given script='a b.py'\n" in done.stdout


def test_a_command_that_needs_something_says_what_and_is_left_out(tmp_path, monkeypatch, capsys):
    toy = evidence.Entry("toy", ["python none.py {script}"], "0", needs="a script")
    monkeypatch.setattr(evidence, "entries", lambda: {"toy": toy})
    monkeypatch.setattr(evidence, "published", lambda: [])
    assert evidence.main(["--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "toy: not run, for want of --given script=…: a script\n"


def test_the_published_tables_of_kept_cells_are_as_their_command_prints_them(tmp_path):
    """The cheapest entry as `make evidence` runs it: cells of the repository, and no training."""
    done = subprocess.run(
        [sys.executable, SCRIPT, "--only", "learning-rates", "--output", tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing to look at" in done.stdout
