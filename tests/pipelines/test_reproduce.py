"""`equipoise reproduce` as a user drives it, with few steps, and what its sentences and charts are made of."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from PIL import Image

from equipoise.pipelines.cli import main
from equipoise.pipelines.reproduce import finding, spread

PATIENCE = 120.0  # seconds, for machines that are busy with other things


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EQUIPOISE_RUNS", raising=False)


def results(folder: str) -> dict:
    return json.loads(Path(folder, "results.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_alpha_adam_in_small(capsys):
    assert main(["reproduce", "alpha-adam", "--seeds", "1", "--steps", "3", "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert all(number in out for number in ("3.799", "3.646", "3.213", "3.237")), "the paper's own numbers stand beside"
    assert "- +AM, early: paper -0.056, here " in out and "- CAdamW, late: here " in out
    found = results("runs/reproduce-alpha-adam")
    assert found["paper"] == "alpha-adam" and found["seconds"] > 0 and "\n".join(found["text"]) in out
    with Image.open("runs/reproduce-alpha-adam/chart.png") as chart:
        assert len(chart.convert("RGB").getcolors(1 << 16)) > 20

    cells = {(run["method"], run["rate"]): run["losses"] for run in found["runs"]}
    assert len(cells) == len(found["runs"]) == 24 and all(len(losses) == 10 for losses in cells.values())
    last = {method: cells[method, 1e-2][-1] for method, _ in cells}
    assert len(set(last.values())) >= 5, "masks and compensation do something"  # α is below 2 in so few steps
    first = {method: cells[method, 1e-2][2] for method, _ in cells}  # after one step, where there is no momentum yet
    del first["CAdamW"]  # whose step is d/(d + 1) as long
    assert max(first.values()) - min(first.values()) < 1e-4, "all start from the same weights and batches"

    alphas = next(run["alphas"] for run in found["runs"] if (run["method"], run["rate"]) == ("+AM+alpha", 1e-2))
    assert len(alphas) == 10 and all(1 <= low <= middle <= high for low, middle, high in alphas)

    words = ["reproduce", "alpha-adam", "--seeds", "1", "--steps", "3", "--workers", "2", "--output", "again"]
    assert main(words) == 0
    assert results("again")["runs"] == found["runs"]
    assert Path("again/chart.png").read_bytes() == Path("runs/reproduce-alpha-adam/chart.png").read_bytes()


@pytest.mark.slow
def test_scaled_gd_keeps_its_rate_whatever_the_condition_number(capsys):
    assert main(["reproduce", "scaled-gd", "--seeds", "1", "--steps", "25", "--workers", "2"]) == 0
    assert "Theorem 7.4: at most 1 − η/2 = 0.75 per step, whatever κ." in capsys.readouterr().out
    runs = results("runs/reproduce-scaled-gd")["runs"]
    ours = {run["condition"]: run["errors"] for run in runs if run["optimizer"] == "scaled GD"}
    assert list(ours) == [1, 10, 100, 1000]
    assert all(later <= 0.75 * earlier for errors in ours.values() for earlier, later in pairwise(errors[:21]))
    plain = [run["errors"][20] for run in runs if run["optimizer"] == "GD" and run["condition"] == 1000]
    assert len(plain) == 5 and all(not error < 100 * ours[1000][20] for error in plain), "at no rate does plain GD"


@pytest.mark.slow
def test_only_what_is_scaled_after_adam_moves_features_alike_at_every_width(capsys):
    """Theorem 4.1; Adam takes out what is scaled before it."""
    assert main(["reproduce", "scaled-adamw", "--seeds", "1", "--workers", "2"]) == 0
    out = capsys.readouterr().out
    assert "- Adam: grows with the width, as the theory has it." in out
    assert "- scaled after Adam: steady with the width, as the theory has it." in out
    runs = results("runs/reproduce-scaled-adamw")["runs"]
    change = {(run["method"], run["width"]): run["change"] for run in runs}
    assert len(change) == len(runs) == 6 * 7
    growth = {method: change[method, 4096] / change[method, 64] for method, _ in change}
    assert growth["scaled before Adam"] > 5 and growth["Adam"] > 5 and 0.3 < growth["scaled after Adam"] < 3
    first = {method: next(run["changes"][0] for run in runs if run["method"] == method) for method in growth}
    assert first["Adam"] == pytest.approx(first["scaled before Adam"], rel=1e-3), "B alone moves, by its signs"


@pytest.mark.slow
def test_ada_sam_in_small(capsys):
    assert main(["reproduce", "ada-sam", "--seeds", "1", "--steps", "2", "--workers", "2", "--runs", "else"]) == 0
    out = capsys.readouterr().out
    assert all(number in out for number in ("55.8", "82.51", "89.8", "37.23", "89.52"))
    assert "- β₁ = 0, SAM over SGD: paper +31.8, here " in out and "- batch 16 to 32: paper +50, here " in out
    found = results("else/reproduce-ada-sam")
    grid = [run for run in found["runs"] if run["seed"] == 1000]
    judged = [run for run in found["runs"] if run["seed"] == 0]
    assert len(grid) == 144, "6 rates × (1 + 5 + 1 + 5) × 2 momenta"
    for run in judged:  # each judged with what was best when tuning: over all, or for its ρ
        if run["batch"] == 32:
            same = [g for g in grid if (g["optimizer"], g["beta"]) == (run["optimizer"], run["beta"])]
            chosen = [
                max(some, key=lambda g: g["tuning"]) for some in (same, [g for g in same if g["rho"] == run["rho"]])
            ]
            assert (run["rate"], run["rho"]) in {(best["rate"], best["rho"]) for best in chosen}
    kinds = {(run["optimizer"], run["beta"]) for run in judged}
    rhos = {(run["beta"], run["rho"]) for run in judged if run["optimizer"] == "AdaSAM" and run["batch"] == 32}
    twice = {(run["optimizer"], run["steps"]) for run in judged if run["steps"] == 4}
    assert len(kinds) == 8 and len(rhos) == 10 and twice == {("SGD", 4), ("AMSGrad", 4)}
    assert len(judged) == len(
        {tuple(run[k] for k in ("optimizer", "beta", "rate", "rho", "batch", "steps")) for run in judged}
    )
    smaller = {run["batch"]: run["rate"] for run in judged if run["batch"] < 32}
    assert smaller[16] / smaller[4] == pytest.approx(2)
    losses = {(g["optimizer"], g["beta"], g["rho"]): g["losses"][-1] for g in grid if g["rate"] == 3e-2}
    assert len(set(losses.values())) == len(losses) == 24, "every option does something"

    import torch

    from equipoise.pipelines.reproduce.ada_sam import train

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the workers
    try:
        for run in (grid[0], judged[7], judged[-1]):
            assert run == run | train(run), "the same numbers again, in another process"
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["alpha-adm"], "no paper 'alpha-adm'. Did you mean 'alpha-adam'? There are scaled-gd and scaled-adamw and "),
        (["ada-sam", "--data", "m.csv"], "--data: is for mimo; ada-sam has its own."),
        (["mimo", "--data", "m.csv"], "m.csv does not exist. Give a CSV file"),
        (
            ["ada-sam", "--add"],
            "--add: is for commit and mimo and scaled-pictures and ada-sam-text; ada-sam is trained anew.",
        ),
        (["commit", "--add"], "results.json cannot be added to: No such file or directory. Leave out --add to begin"),
        (["ada-sam", "--seeds", "0"], "--seeds: must be at least 1, got 0."),
        (["ada-sam", "--steps", "-1"], "--steps: must be at least 1, got -1."),
        (["ada-sam-speedup", "--steps", "1"], "ada-sam-speedup: compares runs of several lengths, so --steps"),
        (["ada-sam", "--workers", "0"], "--workers: must be at least 1, got 0."),
        (["ada-sam", "--output", "a-file"], "a-file is a file; give a folder, new or not."),
        (["ada-sam", "--output", "a-file/inside"], "a-file/inside: cannot be written: Not a directory."),
    ],
)
def test_what_cannot_begin_is_one_sentence_and_leaves_nothing(words, message, tmp_path, capfd):
    Path("a-file").write_text("mine")
    assert main(["reproduce", *words]) == 2
    out, err = capfd.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and message in err
    assert [item.name for item in tmp_path.iterdir()] == ["a-file"] and Path("a-file").read_text() == "mine"


def test_workers_have_no_modules_of_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    (tmp_path / "socket.py").write_text("raise SystemExit('a module of the current folder was imported')")
    assert main(["reproduce", "scaled-gd", "--seeds", "1", "--steps", "2", "--workers", "1"]) == 0
    assert not os.environ["PYTHONSAFEPATH"], "programs that are started later are as they were"


def is_worker(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return "spawn_main" in " ".join(process.cmdline())
    return False


@pytest.mark.parametrize("way", ["SIGINT", "SIGTERM"])
def test_ending_it_leaves_nothing_behind(tmp_path, way):
    words = [sys.executable, "-m", "equipoise.pipelines.cli", "reproduce", "ada-sam", "--workers", "2"]

    def hear_it():  # tests that run in the background hand on that Ctrl-C is ignored
        signal.signal(signal.SIGINT, signal.default_int_handler)

    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hear_it)
    itself, end = psutil.Process(process.pid), time.monotonic() + PATIENCE
    while sum(map(is_worker, children := itself.children())) < 2:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    for one in (itself, *children) if way == "SIGINT" else (itself,):  # as a terminal does, and as `kill`
        with suppress(psutil.NoSuchProcess):
            one.send_signal(signal.Signals[way])
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out, err) == (130, "", "")
    assert not list(tmp_path.rglob("reproduce-ada-sam"))
    _, left = psutil.wait_procs(children, timeout=PATIENCE)
    assert left == []


def test_a_finding_says_what_the_numbers_say():
    assert finding("a", 0.3, [0.1, 0.2]) == "- a: paper +0.300, here +0.150 (+0.100 to +0.200). Same direction."
    assert finding("a", -0.3, [0.1]) == "- a: paper -0.300, here +0.100. OPPOSITE direction, of one seed."
    assert finding("a", 0.3, [0.1, -0.2, 0.3], "+.1f").endswith("+0.1 (-0.2 to +0.3). Undecided: the seeds disagree.")
    assert finding("a", 0.3, [0.0, 0.0]).endswith("No difference.")
    assert finding("a", "below 0", [-0.1]) == "- a: paper below 0, here -0.100. Same direction, of one seed."
    assert finding("a", "above 0", [-0.1]) == "- a: paper above 0, here -0.100. OPPOSITE direction, of one seed."
    assert spread([3.0, 1.0, 2.0]) == "2.000 (1.000 to 3.000)" and spread([1.0]) == "1.000"


def test_the_language_is_the_same_everywhere():
    from equipoise.pipelines.reproduce.alpha_adam import write_text

    text = write_text(20_000)
    assert len(text) == 20_000 and text.isascii() and write_text(500) == text[:500]
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "6352ea4b67921233"
    assert len(set(text.split())) > 900
