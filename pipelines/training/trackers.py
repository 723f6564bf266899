"""Trackers that a run reports to beside its folder, through accelerate; nothing goes to any that is not in `trackers`.

Metrics go there by step, and samples as pictures to those that take pictures. What is written on this machine lies in
the run's folder `trackers`, and a resumed run goes on in the same log.
"""

# accelerate annotates too narrowly.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from equipoise.errors import InputError
from equipoise.pipelines.config import RunConfig, flat
from equipoise.pipelines.config.sections import TrainConfig
from equipoise.pipelines.runs.run import Run, sentence

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker
    from PIL.Image import Image

_PROJECT = "equipoise"  # under which trackers list all runs


def missing(configs: Iterable[RunConfig]) -> list[str]:
    """What trackers cannot be used for want of their package, a sentence each."""
    names = dict.fromkeys(name for config in configs if isinstance(config, TrainConfig) for name in config.trackers)
    return [f"trackers: {name} needs the package {name}. pip install {name}." for name in names if not find_spec(name)]


@contextmanager
def tracked(config: RunConfig, run: Run) -> Iterator[None]:
    """For the time of the block, the run reports to the trackers of its configuration."""
    if not (isinstance(config, TrainConfig) and config.trackers):
        yield
        return
    run.watcher = watcher = Trackers(config.trackers, run, flat(config))
    try:
        yield
    finally:
        run.watcher = None
        watcher.end()


class Trackers:
    """What one run reports to."""

    def __init__(self, chosen: "Sequence[str | GeneralTracker]", run: Run, config: Mapping[str, Any]):
        self.chosen, self.run, self.config = list(chosen), run, config
        self.active: list[GeneralTracker] = []

    def begin(self, step: int) -> None:
        """Opens the logs, or opens them again, to go on after so many steps.

        Raises:
            InputError: A tracker cannot start.
        """
        from accelerate import Accelerator
        from accelerate.utils import ProjectConfiguration

        folder = self.run.folder / "trackers"
        folder.mkdir(exist_ok=True)
        options = {
            "tensorboard": {"purge_step": step + 1},  # what a run that was killed has logged since
            "wandb": {
                "dir": str(folder),
                "id": self.run.status().token,
                "name": self.run.id,
                "group": self.run.sweep,
                "resume": "allow",
            },
        }
        try:
            project = ProjectConfiguration(logging_dir=str(folder))
            accelerator = Accelerator(log_with=self.chosen, project_config=project)
            accelerator.init_trackers(_PROJECT, None if step else _plain(self.config), options)
        except Exception as error:  # each has its own
            raise InputError(f"trackers: cannot be started: {sentence(error)}") from error
        self.active = list(accelerator.trackers)

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        self._each(lambda tracker: tracker.log(numbers, step=step))

    def pictures(self, step: int, pictures: "Mapping[str, Sequence[Image]]") -> None:
        """Shows pictures, those of one name of one size, where a tracker takes them."""
        import numpy as np

        arrays = {name: np.stack([np.asarray(p.convert("RGB")) for p in some]) for name, some in pictures.items()}

        def show(tracker: "GeneralTracker") -> None:
            if take := getattr(tracker, "log_images", None):
                take(arrays, step=step, **({"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}))

        self._each(show)

    def end(self) -> None:
        self._each(lambda tracker: tracker.finish())
        self.active = []

    def _each(self, send: "Callable[[GeneralTracker], Any]") -> None:
        """A tracker that fails gets no more: what is learnt does not depend on it."""
        for tracker in list(self.active):
            try:
                send(tracker)
            except Exception as error:
                self.active.remove(tracker)
                text = f"trackers: {tracker.name} failed and gets no more of {self.run.id}: {sentence(error)}"
                with suppress(InputError):  # a full disk, which the run meets where it writes
                    self.run.log(text)
                print(text, file=sys.stderr)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """As all trackers take it: numbers and texts."""
    return {
        key: value if isinstance(value, bool | int | float | str) else "" if value is None else json.dumps(value)
        for key, value in config.items()
    }
