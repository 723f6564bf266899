"""The training loop that all pipelines share: steps, requests, checkpoints, samples, and an end that loses nothing.

A step is: evaluate the batch → the objective turns its losses into gradients → the optimizer steps at the rates that
schedule and coordinator set. An optimizer that has `perturb` and `restore` gets the same batch evaluated again in
between, where `perturb` has put the weights. Each is replaceable and none knows the others; the pipeline's `Work` puts
them together.
"""

import os
import sys
import time
from contextlib import suppress
from typing import Any, Protocol

from tqdm import tqdm

from equipoise.errors import EquipoiseError, InputError
from equipoise.pipelines.runs import checkpoints
from equipoise.pipelines.runs.outcome import Outcome
from equipoise.pipelines.runs.run import Run, memory_full, sentence
from equipoise.pipelines.training import processes

SAID_EVERY = 30.0  # seconds between lines of progress in a run's log


class DivergedError(ArithmeticError):
    """More steps would lead nowhere, for the reason in the message; raised by a step before it changes any weight."""


class NonFiniteError(DivergedError):
    """The loss or the gradient of a step is NaN or infinite; raised before the step changes any weight."""


class EnoughError(Exception):
    """More steps would not help, for the reason in the message; raised by a step before it does anything."""


class Work(Protocol):
    """What a pipeline does when the loop asks."""

    def step(self, step: int) -> dict[str, float]:
        """Takes one optimizer step and returns what to log, `loss` among it. Raises DivergedError, or EnoughError."""
        ...

    def weights(self) -> dict[str, Any]: ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, weights: dict[str, Any], state: dict[str, Any]) -> None: ...

    def sound(self) -> bool:
        """Whether the weights are finite and give a finite loss; asked after the last step, whose loss says neither."""
        ...

    def rewind(self) -> None:
        """Goes back to the newest weights that gave a finite loss."""
        ...

    def sample(self, step: int) -> None: ...


def _batch(run: Run) -> int:
    """Examples that one process takes in a step."""
    train = getattr(run.config(), "train", None)
    return getattr(train, "batch", 1) * getattr(train, "accumulate", 1)


def train_loop(run: Run, work: Work, steps: int, checkpoint_every: int, keep: int, sample_every: int) -> Outcome:
    """Trains from the last complete checkpoint, if there is one, to `steps`; a stop request saves first.

    Of several processes the first one looks for the checkpoint, hears requests, saves and samples.
    """
    folder, token = run.folder / "checkpoints", run.status().token
    taken, leads = 0, processes.leads()

    def tell(text: str) -> None:
        run.log(text)
        print(text, file=sys.stderr)

    found = checkpoints.load_newest(folder, tell, token) if leads else None
    name = processes.shared(found[0].name if found else "")
    together = processes.count()
    examples = _batch(run) * together
    if found or name:
        path, (taken, weights, state) = found or (folder / name, checkpoints.load(folder / name))
        before = state.pop("processes", together)
        if state.pop("examples", examples) != examples:
            raise InputError(
                f"{run.id}: each of its steps so far was of {before} process{'es' * (before > 1)} and other examples "
                f"than {together} would take. {processes.command(before)} resume {run.folder} goes on as it was; "
                "train.batch=N, in another number of processes, if that makes as many."
            )
        try:
            work.restore(weights, state)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            if memory_full(error):
                raise
            raise InputError(
                f"{path}: does not fit config.yaml beside it: {sentence(error)[:200].rstrip('.')}. Was that, or the "
                "model, changed? Put it back, or train anew."
            ) from error
        run.log(f"resumed from {path.name}")
    run.rewind_metrics(taken)
    run.update(step=taken, total=steps)

    def save(step: int) -> None:
        if not leads:
            return
        state = work.state() | {"processes": together, "examples": examples}
        checkpoints.save(folder, step, work.weights(), state, keep, token)
        run.log(f"saved step {step}")

    def sample(step: int) -> None:
        if not leads:
            return
        try:
            work.sample(step)
        except Exception:  # a full memory, most likely: between two steps there is something to save
            with suppress(EquipoiseError):
                save(step)
            raise

    def diverged(what: str, step: int) -> Outcome:
        work.rewind()
        message = f"{what} of {steps}; the last weights with a finite loss are kept."
        run.log(message)
        return Outcome("diverged", message, step)

    said = time.monotonic()
    # None: no bar where nobody watches (a log file); the lines below tell there instead
    silent = None if leads else True
    with tqdm(total=steps, initial=taken, desc=run.id, unit="step", dynamic_ncols=True, disable=silent) as bar:
        for step in range(taken, steps):
            asked = processes.requests(run)
            if "stop" in asked:
                save(step)
                return Outcome("stopped", f"stopped on request at step {step} of {steps}; the state is saved.", step)
            if "save" in asked:
                save(step)
            if "sample" in asked:
                sample(step)
            started = time.perf_counter()
            try:
                values = work.step(step)
            except DivergedError as error:
                return diverged(f"{error} at step {step + 1}", step)
            except EnoughError as reason:
                return Outcome("done", f"{step} steps: {reason}.", step)
            run.metric(step + 1, **values, seconds=time.perf_counter() - started)
            bar.update()
            bar.set_postfix(loss=f"{values['loss']:.4g}", refresh=False)
            if time.monotonic() - said > SAID_EVERY:
                said, line = time.monotonic(), f"step {step + 1} of {steps}, loss {values['loss']:.4g}"
                run.log(line)
                if leads and not sys.stderr.isatty() and not os.path.samestat(os.fstat(2), os.stat(run.log_file)):
                    print(line, file=sys.stderr, flush=True)  # into a file of the user's own, where no bar moves
            if checkpoint_every and (step + 1) % checkpoint_every == 0 and step + 1 < steps:
                save(step + 1)
            if sample_every and (step + 1) % sample_every == 0 and step + 1 < steps:
                sample(step + 1)
    if not work.sound():
        return diverged(f"the weights or their loss were not finite after step {steps}", steps)
    return Outcome("done", f"{steps} steps.", steps)
