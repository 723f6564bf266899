"""The script for a GPU runs to its end on a processor, in small: what nobody can try where there is no card."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_in_small_and_writes_its_tables(tmp_path):
    output = tmp_path / "gpu.md"
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--small", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    text = output.read_text()
    rows = {line.split(" | ")[0].removeprefix("| "): line.split(" | ") for line in text.splitlines() if " | " in line}
    for name in ("alpha_adam", "bounded_adamw", "sam", "scaled_adamw"):
        assert 0 < float(rows[name][1]) < 1e-4 < float(rows[name][2]) < 1, "bfloat16 loses small steps"
    assert float(rows["ScaledAdamW"][1]) > 0
    assert float(rows["float32"][2]) > 0 and float(rows["float32"][4]) > 0


def test_it_says_that_there_is_no_card():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 2 and "there is no CUDA device here" in done.stderr
