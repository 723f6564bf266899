"""Training state survives the disk to the bit, and a failure to write loses nothing."""

import os

import pytest
import torch

from equipoise.errors import EquipoiseError
from equipoise.pipelines.runs import checkpoints

STATE = {
    "optimizer": {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3, dtype=torch.float64)}, 1: {}},
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "fused": None, "params": [0, 1], "component": "unet"}],
    },
    "coordinator": {},
    "scaler": None,
    "tuple": (1, 2.5, True, "text", [torch.zeros(0)]),
}


def same(left, right) -> bool:
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and left == right


def test_a_checkpoint_loads_as_it_was_saved(tmp_path):
    weights = {"a": torch.randn(3, 4), "b": torch.randn(2, dtype=torch.bfloat16)}
    saved = checkpoints.save(tmp_path, 7, weights, STATE)
    step, loaded, state = checkpoints.load(saved)
    assert step == 7
    assert same(loaded, weights)
    assert same(state, STATE)


def test_files_may_be_read_by_whom_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        checkpoints.save_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(2)})
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640


def test_tensors_that_share_memory_are_saved(tmp_path):
    buffer = torch.arange(6.0)
    saved = checkpoints.save(tmp_path, 1, {"a": buffer[:3], "b": buffer[3:]}, {"both": buffer})
    _, weights, state = checkpoints.load(saved)
    assert torch.equal(torch.cat([weights["a"], weights["b"]]), state["both"])


def test_the_newest_are_kept(tmp_path):
    for step in (1, 2, 10, 3):
        checkpoints.save(tmp_path, step, {"a": torch.ones(1)}, {}, keep=2)
    assert [path.name for path in checkpoints.complete(tmp_path)] == ["step-00000003", "step-00000010"]


def test_what_only_pickle_could_save_is_refused_before_anything_is_written(tmp_path):
    checkpoints.save(tmp_path, 1, {"a": torch.ones(1)}, {})
    with pytest.raises(EquipoiseError, match=r"optimizer/hook is a function"):
        checkpoints.save(tmp_path, 2, {"a": torch.ones(1)}, {"optimizer": {"hook": lambda: None}})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_half_a_checkpoint_is_never_found(tmp_path):
    whole = checkpoints.save(tmp_path, 1, {"a": torch.ones(1)}, {})
    (tmp_path / ".step-00000002.123").mkdir()
    (tmp_path / ".step-00000002.123" / "weights.safetensors").write_bytes(b"half")
    assert checkpoints.complete(tmp_path) == [whole]
    checkpoints.save(tmp_path, 3, {"a": torch.ones(1)}, {})
    assert not list(tmp_path.glob(".step-*")), "what a killed process left is cleared away"


def test_a_failed_write_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    earlier = checkpoints.save(tmp_path, 1, {"a": torch.ones(1)}, {})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "_sync", full)
    with pytest.raises(EquipoiseError, match="disk is full"):
        checkpoints.save(tmp_path, 2, {"a": torch.ones(1)}, {})
    assert [path.name for path in tmp_path.iterdir()] == [earlier.name]
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save_tensors(tmp_path / "one.safetensors", {"a": torch.ones(1)})
    assert [path.name for path in tmp_path.iterdir()] == [earlier.name], "nothing partial stays"


def _missing(file):
    file.unlink()


def _cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def _flipped(file):
    file.write_bytes(file.read_bytes()[:-1] + b"x")


@pytest.mark.parametrize("name", ["weights.safetensors", "state.safetensors", "state.json"])
@pytest.mark.parametrize("harm", [_missing, _cut, _flipped])
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_taken(tmp_path, name, harm):
    whole, newest = (checkpoints.save(tmp_path, step, {"a": torch.ones(1)}, {"b": torch.ones(1)}) for step in (1, 2))
    harm(newest / name)
    told = []
    path, (step, _, _) = checkpoints.load_newest(tmp_path, told.append)
    assert (path, step) == (whole, 1)
    assert len(told) == 1 and "step-00000002: is damaged" in told[0] and "kept as damaged-step-00000002" in told[0]
    for step in (1, 2):
        checkpoints.save(tmp_path, step, {"a": torch.ones(1)}, {}, keep=1)
    assert [path.name for path in checkpoints.complete(tmp_path)] == ["step-00000002"]


def test_no_checkpoint_at_all(tmp_path):
    assert checkpoints.load_newest(tmp_path / "nowhere", print) is None


def test_saving_a_step_again_leaves_its_checkpoint(tmp_path, monkeypatch):
    """Replacing a folder takes two operations, and a process killed between them would leave neither."""
    saved = checkpoints.save(tmp_path, 1, {"a": torch.ones(1)}, {})
    monkeypatch.setattr(checkpoints.shutil, "rmtree", None)
    assert checkpoints.save(tmp_path, 1, {"a": torch.ones(1)}, {}) == saved
