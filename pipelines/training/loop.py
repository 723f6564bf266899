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
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from equipoise.errors import EquipoiseError, InputError
from equipoise.pipelines.config.sections import TrainConfig
from equipoise.pipelines.runs import checkpoints, status
from equipoise.pipelines.runs.outcome import Outcome
from equipoise.pipelines.runs.run import Run, memory_full, sentence
from equipoise.pipelines.training import processes

MEMORY_EVERY = 10  # steps between two measurements of the memory that is held
REPORTED_EVERY = 30.0  # seconds between lines of progress in a run's log


class DivergedError(ArithmeticError):
    """More steps would lead nowhere, for the reason in the message; raised by a step before it changes any weight."""


class NonFiniteError(DivergedError):
    """The loss or the gradient of a step is NaN or infinite; raised before the step changes any weight."""


class EarlyStopError(Exception):
    """More steps would not help, for the reason in the message; raised by a step before it does anything."""


class StoppedError(Exception):
    """The run was asked to stop before its first step; the message says how far what comes before that has got."""


class UnreadableError(InputError):
    """Files that steps need are damaged; raised by a step, in all processes, before it does anything."""


class Work(Protocol):
    """What a pipeline trains, as the loop calls it; `training.state.OptimizedWork` has most of it."""

    def step(self, step: int) -> dict[str, float]:
        """Takes an optimizer step and returns what to log, `loss` among it. Raises DivergedError, EarlyStopError, or
        UnreadableError."""
        ...

    def weights(self) -> dict[str, Any]:
        """The trained tensors by name, for a checkpoint."""
        ...

    def state(self) -> dict[str, Any]:
        """All else that the next step depends on: numbers, texts, tensors, and lists and dicts of them."""
        ...

    def restore(self, weights: dict[str, Any], state: dict[str, Any]) -> None:
        """Goes on from what `weights` and `state` gave."""
        ...

    def sound(self) -> bool:
        """Whether the weights are finite and give a finite loss; asked after the last step, whose loss says neither."""
        ...

    def rewind(self) -> None:
        """Goes back to the newest weights that gave a finite loss."""
        ...

    def sample(self, step: int) -> None:
        """Shows what the weights do after so many steps, in the run's folder of samples. Asked of the first process, or
        of all where an attribute `together` is true."""
        ...


def train_loop(run: Run, work: Work, config: TrainConfig) -> Outcome:
    """Trains from the newest complete checkpoint, if there is one, to the last step; a stop request saves first.

    Of several processes the first one looks for the checkpoint, answers requests, saves and samples.

    Args:
        run: Where to write, and who asks to stop, save or sample.
        work: What is trained; it takes the steps.
        config: How many steps, and how often to save and to sample.

    Raises:
        InputError: The checkpoint does not fit the configuration.
    """
    loop, total = _Loop(run, work, config), config.total_steps
    first = loop.resume()
    # None: no bar where nobody watches (a log file), where lines are reported instead.
    silent = None if loop.leads else True
    with tqdm(total=total, initial=first, desc=run.id, unit="step", dynamic_ncols=True, disable=silent) as bar:
        lines = _Lines(run, total)
        for step in range(first, total):
            taken = loop.answer_requests(step) or loop.take(step)
            if isinstance(taken, Outcome):
                return taken
            bar.update()
            bar.set_postfix(loss=f"{taken['loss']:.4g}", refresh=False)
            lines.report(step + 1, taken["loss"])
            loop.save_and_sample(step + 1)
    return loop.finish()


class _Loop:
    """What happens around the steps of one run."""

    def __init__(self, run: Run, work: Work, config: TrainConfig):
        self.run, self.work, self.config = run, work, config
        self.total, self.token = config.total_steps, run.status().token
        self.leads, self.processes = processes.leads(), processes.count()
        self.samples = self.leads or getattr(work, "together", False)
        self.examples = config.train.batch * config.train.accumulate * self.processes  # of a step

    def resume(self) -> int:
        """Restores the newest complete checkpoint, if there is one; the number of steps that it had taken."""
        folder, taken = self.run.checkpoints, 0
        found = checkpoints.load_newest(folder, self._warn, self.token) if self.leads else None
        if name := processes.shared(found[0].name if found else ""):
            path, (taken, weights, state) = found or (folder / name, checkpoints.load(folder / name))
            self._restore(path, weights, state)
            self.run.log(f"resumed from {name}")
        self.run.rewind_metrics(taken)
        self.run.update(step=taken, total=self.total)
        return taken

    def _restore(self, path: Path, weights: dict[str, Any], state: dict[str, Any]) -> None:
        before = state.pop("processes", self.processes)
        if state.pop("examples", self.examples) != self.examples:
            raise InputError(
                f"{self.run.id}: each of its steps so far was of {before} process{'es' * (before > 1)} and other "
                f"examples than {self.processes} would take. {processes.command(before)} resume {self.run.folder} goes "
                "on as it was; train.batch=N, in another number of processes, if that makes as many."
            )
        try:
            self.work.restore(weights, state)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            if memory_full(error):
                raise
            raise InputError(
                f"{path}: does not fit config.yaml beside it: {sentence(error)[:200].rstrip('.')}. Was that, or the "
                "model, changed? Put it back, or train anew."
            ) from error

    def _warn(self, text: str) -> None:
        self.run.log(text)
        print(text, file=sys.stderr)

    def answer_requests(self, step: int) -> Outcome | None:
        """Does what was asked for since the last step; the outcome where that was to stop."""
        asked = processes.requests(self.run)
        if asked & {"stop", "save"}:
            self._save(step)
        if "stop" in asked:
            message = f"stopped on request at step {step} of {self.total}; the state is saved."
            return Outcome("stopped", message, step)
        if "sample" in asked:
            self._sample(step)
        return None

    def take(self, step: int) -> dict[str, float] | Outcome:
        """Takes a step: what it measured, or the outcome where training ends before it."""
        started = time.perf_counter()
        try:
            values = self.work.step(step)
        except DivergedError as error:
            return self._diverged(f"{error} at step {step + 1}", step)
        except EarlyStopError as reason:
            return Outcome("done", f"{step} steps: {reason}.", step)
        except UnreadableError as error:
            if not step:
                raise
            self._save(step)
            kept = f"The state after step {step} is saved: the run can be resumed after that."
            raise InputError(f"{error} {kept}") from error
        held = status.held() if step % MEMORY_EVERY == 0 else {}
        self.run.metric(step + 1, **values, **held, seconds=time.perf_counter() - started)
        return values

    def save_and_sample(self, taken: int) -> None:
        """What the configuration wants after so many steps; after the last one the result is all there is to keep."""
        if taken == self.total:
            return
        if (every := self.config.checkpoint.every) and taken % every == 0:
            self._save(taken)
        if (every := self.config.sample_every) and taken % every == 0:
            self._sample(taken)

    def finish(self) -> Outcome:
        """The outcome after the last step."""
        if not self.work.sound():
            return self._diverged(f"the weights or their loss were not finite after step {self.total}", self.total)
        return Outcome("done", f"{self.total} steps.", self.total)

    def _save(self, taken: int) -> None:
        if not self.leads:
            return
        state = self.work.state() | {"processes": self.processes, "examples": self.examples}
        keep = self.config.checkpoint.keep
        checkpoints.save(self.run.checkpoints, taken, self.work.weights(), state, keep, self.token)
        self.run.log(f"saved step {taken}")

    def _sample(self, taken: int) -> None:
        if not self.samples:
            return
        try:
            self.work.sample(taken)
        except Exception:  # a full memory, most likely: between two steps there is something to save
            with suppress(EquipoiseError):
                self._save(taken)
            raise

    def _diverged(self, what: str, taken: int) -> Outcome:
        self.work.rewind()
        message = f"{what} of {self.total}; the last weights with a finite loss are kept."
        self.run.log(message)
        return Outcome("diverged", message, taken)


class _Lines:
    """Lines of progress now and then: in the run's log, and where stderr leads to a file of the user's own."""

    def __init__(self, run: Run, total: int):
        self.run, self.total, self.last = run, total, time.monotonic()

    def report(self, taken: int, loss: float) -> None:
        if time.monotonic() - self.last <= REPORTED_EVERY:
            return
        self.last, line = time.monotonic(), f"step {taken} of {self.total}, loss {loss:.4g}"
        self.run.log(line)
        if processes.leads() and not sys.stderr.isatty() and not self._log_is_stderr():
            print(line, file=sys.stderr, flush=True)

    def _log_is_stderr(self) -> bool:
        return os.path.samestat(os.fstat(2), os.stat(self.run.log_file))
