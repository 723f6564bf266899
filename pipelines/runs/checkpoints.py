"""Training state on disk: tensors as safetensors, the rest as JSON. No pickle, and never half a checkpoint.

A checkpoint is a folder `step-00000100` holding weights.safetensors, state.safetensors and state.json. It is
written under another name, flushed to disk, and renamed when it is complete. state.json has the other files' digests
and its own, so that what was damaged afterwards is noticed, and the run's token, so that another run's is; the
checkpoint before it is then taken.
"""

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from equipoise.errors import EquipoiseError, InputError
from equipoise.pipelines.config import format
from equipoise.pipelines.files import explained, write_atomic

_PREFIX = "step-"
_TENSORS = ("weights.safetensors", "state.safetensors")


def save(
    folder: Path,  # the run's checkpoints/
    step: int,  # steps taken
    weights: Mapping[str, Tensor],
    state: Mapping[str, Any],  # whatever else resuming needs: nested dicts, lists, tensors, numbers, strings
    keep: int = 2,
    run: str = "",  # the run's token
) -> Path:
    """Writes a complete checkpoint, then deletes all but the `keep` newest.

    One that is there already for this step is left as it is: a run's steps can be taken again with the same result.

    Raises:
        InputError: it cannot be written (a full disk, say); earlier checkpoints are untouched.
        EquipoiseError: the state holds something that only pickle could save.
    """
    final = folder / f"{_PREFIX}{step:08d}"
    partial = folder / f".{final.name}.{os.getpid()}"
    tensors, rest = flatten(state)
    if final in complete(folder):
        return final
    with explained(final):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            for name, part in zip(_TENSORS, (weights, tensors), strict=True):
                save_tensors(partial / name, part)
            digests = {name: _digest(partial / name) for name in _TENSORS}
            record = {format.KEY: format.FORMAT, "run": run, "step": step, "state": rest, "digests": digests}
            write_atomic(partial / "state.json", json.dumps({**record, "seal": _seal(record)}))
            shutil.rmtree(final, ignore_errors=True)  # not complete, or it would have been kept
            os.replace(partial, final)
            _sync(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    stale = folder.glob(f".{_PREFIX}*")  # left by a killed process
    for old in [*complete(folder)[:-keep], *stale]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def complete(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder that have all their files, oldest first."""
    files = ("state.json", *_TENSORS)
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if all((path / name).is_file() for name in files))


def load(checkpoint: Path, run: str = "") -> tuple[int, dict[str, Tensor], dict[str, Any]]:
    """Steps taken, weights and state, as they were given to `save`, to the bit.

    Args:
        checkpoint: its folder.
        run: the run's token; empty takes any run's.

    Raises:
        InputError: a file is missing or is not what was saved, or another run saved it.
        NewerError: a later version of Equipoise did.
    """
    try:
        saved = json.loads((checkpoint / "state.json").read_text())
        seal = saved.pop("seal", None)
        if (seal or format.KEY in saved) and _seal(saved) != seal:  # the first versions had neither
            raise ValueError("state.json is not what was saved")
        format.check_format(saved.get(format.KEY, 1), checkpoint)
        if run and saved.get("run", run) not in ("", run):
            raise ValueError("another run saved it")
        for name in _TENSORS:
            if _digest(checkpoint / name) != saved["digests"][name]:
                raise ValueError(f"{name} is not what was saved")
        state = unflatten(load_file(checkpoint / "state.safetensors"), saved["state"])
        return saved["step"], load_file(checkpoint / "weights.safetensors"), state
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise InputError(f"{checkpoint}: is damaged ({reason}).") from None


def load_newest(
    folder: Path,  # the run's checkpoints/
    tell: Callable[[str], object],  # called with a sentence about each one that is damaged
    run: str = "",  # the run's token
) -> tuple[Path, tuple[int, dict[str, Tensor], dict[str, Any]]] | None:
    """The newest checkpoint that can be loaded, and what `load` returns of it; None if there is none.

    The damaged are renamed to `damaged-step-…`: they must not count among the newest when new ones are saved.

    Raises:
        NewerError: a later version of Equipoise saved the newest.
    """
    for path in sorted(folder.glob(f"{_PREFIX}*"), reverse=True):
        try:
            return path, load(path, run)
        except format.NewerError:
            raise
        except InputError as error:
            aside = path.with_name(f"damaged-{path.name}")
            tell(f"{error} It is kept as {aside.name}; training goes on from the one before it, or from the start.")
            with explained(aside):
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(path, aside)
    return None


def flatten(value: Any, path: str = "") -> tuple[dict[str, Tensor], Any]:
    """Takes the tensors out of nested dicts, lists and tuples of numbers and strings.

    Returns the tensors by path, and the rest as JSON with a marker where each tensor was.
    """
    if isinstance(value, Tensor):
        return {path: value}, {"tensor": path}
    if value is None or isinstance(value, bool | int | float | str):
        return {}, value
    if isinstance(value, Mapping):
        items = [(key, *flatten(inner, f"{path}/{key}")) for key, inner in value.items()]
        return _joined(items), {"dict": [[key, rest] for key, _, rest in items]}  # pairs: JSON's own keys are text only
    if isinstance(value, list | tuple):
        items = [(index, *flatten(inner, f"{path}/{index}")) for index, inner in enumerate(value)]
        return _joined(items), {type(value).__name__: [rest for _, _, rest in items]}
    raise EquipoiseError(
        f"The state {path} is a {type(value).__name__}, which cannot be saved without pickle. "
        "Optimizers, objectives and coordinators must keep tensors, numbers and strings."
    )


def unflatten(tensors: Mapping[str, Tensor], value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "dict":
        return {key: unflatten(tensors, rest) for key, rest in inner}
    items = [unflatten(tensors, rest) for rest in inner]
    return tuple(items) if kind == "tuple" else items


def _joined(items) -> dict[str, Tensor]:
    return {path: tensor for _, tensors, _ in items for path, tensor in tensors.items()}


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes safetensors and waits until they are on disk; `path` is complete, or as it was before."""
    # clone: safetensors refuses tensors that share memory, and views into a fused buffer do
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            mode = os.fstat(file.fileno()).st_mode
        save_file(own, partial, metadata)
        os.chmod(partial, stat.S_IMODE(mode))  # safetensors makes files that only their owner may read
        _sync(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _seal(record: Mapping[str, Any]) -> str:
    """A digest of what stands in state.json, however it is spaced there."""
    return hashlib.blake2b(json.dumps(record).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
