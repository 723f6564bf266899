"""What a pipeline is: a configuration record, a check of the outside world, and a run.

A third party's pipeline is a subclass of `Pipeline`, named by an entry point in the group `equipoise.pipelines`.
Nothing here imports torch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from equipoise.errors import EquipoiseError, InputError
from equipoise.pipelines.comparing.comparison import Comparison
from equipoise.pipelines.config import RunConfig
from equipoise.pipelines.files import disk_full
from equipoise.pipelines.media.reading import decoded_once
from equipoise.pipelines.runs.lock import stop_signals
from equipoise.pipelines.runs.outcome import Outcome
from equipoise.pipelines.runs.run import Following, Run, memory_full, sentence
from equipoise.pipelines.tables import size_words
from equipoise.pipelines.training import processes
from equipoise.pipelines.training.trackers import tracked

_LISTED = 20  # problems


@dataclass(frozen=True)
class MemoryEstimate:
    """What one training process will hold at most, in bytes: an estimate."""

    model: int  # weights, frozen and trained, and data that stays
    training: int  # gradients, the optimizer's state and the last good weights
    activations: int  # of one batch, until its backward pass is over
    program: int  # Python and its libraries
    assuming: str = ""  # words on what the activations depend on and nobody knows yet
    # What would make it fit devices of several sizes, a sentence each: takes as long as an estimate.
    advice: Callable[[], list[str]] = field(default=list, compare=False)

    @property
    def total(self) -> int:
        return self.model + self.training + self.activations + self.program

    @property
    def in_parts(self) -> str:
        """A sentence on what the total is made of."""
        parts = {
            "weights and data": self.model,
            "gradients and optimizer": self.training,
            f"activations of a batch{f' {self.assuming}' if self.assuming else ''}": self.activations,
            "Python and its libraries": self.program,
        }
        return f"An estimate from shapes: {', '.join(f'{size_words(value)} {name}' for name, value in parts.items())}."


@dataclass(frozen=True)
class Asked:
    """What is wanted of a trained run beside data; a pipeline reads the fields that its `asks` names."""

    prompts: Sequence[str] = ()  # what to ask of each example, or what to draw; empty: what the data ask
    count: int | None = None  # pictures of each prompt; None: as the run's samples
    scale: float | None = None  # strength of what was learnt; None: as the run's samples
    features: bool = False  # whether `Predictions.arrays` is wanted
    server: str | None = None  # the URL of one that answers in place of this process
    folder: Path | None = None  # an empty one for the files of a pipeline that draws


@dataclass(frozen=True)
class Predictions:
    """What a trained run makes of data that is given to it."""

    rows: list[dict[str, Any]]  # one for each example: texts, numbers, None and lists of texts by name
    figures: dict[str, float] = field(default_factory=dict)  # how right it is on all of them, where that is known
    meaning: str = ""  # of the figures, a sentence
    arrays: dict[str, Any] = field(default_factory=dict)  # of numpy, by name: what the rows' figures were made from


class Pipeline:
    """Base of all pipelines.

    `name` is the entry point's name, `title` a phrase for people, `Config` the record of everything that can be set.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    Config: ClassVar[type[RunConfig]] = RunConfig
    loading: ClassVar[str] = ""  # the line of code that loads a result elsewhere; {folder} stands for result/
    comparing: ClassVar[str] = "lays it beside other runs"  # what `equipoise compare RUN` does with one
    formats: ClassVar[tuple[str, ...]] = ()  # that `export` knows; the first where none is asked for
    exports_folders: ClassVar[bool] = False  # whether they are folders, ready for a hub, or one file each
    # the fields of `Asked` that `predict` reads; with `server` among them `evaluate` has that as a keyword argument too
    asks: ClassVar[tuple[str, ...]] = ()
    fixed: ClassVar[tuple[str, ...]] = ()  # keys that have one value alone here, which a form need not show
    draws: ClassVar[bool] = False  # whether `predict` makes files, into a folder where the table lies beside them

    @classmethod
    def check(cls, config: Any) -> list[str]:
        """Problems of the outside world (a missing folder, a checkpoint of another kind), one sentence each.

        Called before anything is written; an empty list means go.
        """
        return []

    @classmethod
    def doubts(cls, config: Any) -> list[str]:
        """What may be meant but is unlikely to work, one sentence each; shown when training starts."""
        return []

    @classmethod
    def examples(cls, config: Any) -> int | None:
        """How many examples an epoch has, for `train.epochs`; None where that is not known before training.

        Called after the check has found nothing.
        """
        return None

    @classmethod
    def notes(cls, config: Any) -> list[str]:
        """What the check saw of what will be trained on, one sentence each; `--dry-run` shows them."""
        return []

    @classmethod
    def estimate_memory(cls, config: Any) -> MemoryEstimate | None:
        """How much memory training will take, reasoned without loading a weight; None where that cannot be told."""
        return None

    @classmethod
    def run(cls, config: Any, run: Run) -> Outcome:
        """Train, from the last complete checkpoint in `run.folder` if there is one.

        Args:
            config: an instance of `Config`.
            run: where to write, what to report to, whom to ask for requests.
        """
        raise NotImplementedError(f"{cls.__name__} does not say how to run")

    @classmethod
    def compare(
        cls,
        name: str,
        folder: Path,
        runs: Sequence[Run],
        configs: Sequence[Any],
        asked: Any,
    ) -> Comparison:
        """Generate and measure the same things from every run, into `folder`.

        Args:
            name: what the comparison is called.
            folder: where pictures and tables go.
            runs: finished ones; one without a result becomes a cell without pictures.
            configs: theirs, in the same order.
            asked: the first configuration, with what the comparison was asked for in its place (other samples, judges).

        Raises:
            InputError: the runs cannot be compared.
        """
        raise InputError(f"the pipeline {cls.name} has no comparison.")

    @classmethod
    def compare_files(
        cls, name: str, folder: Path, given: Mapping[str, Path], config: Any, strengths: Sequence[float]
    ) -> Comparison:
        """Generate and measure the same things with files of weights, each at several strengths, into `folder`.

        Args:
            name: what the comparison is called.
            folder: where pictures and tables go.
            given: label → a file that a run or another program wrote, or the folder of a checkpoint.
            config: what they are for, and what to generate.
            strengths: of the weights, above 0.

        Raises:
            InputError: a file does not fit.
        """
        raise InputError(f"the pipeline {cls.name} compares runs, and neither files nor strengths.")

    @classmethod
    def result_file(cls, run: Run) -> Path:
        """The file of a run's result that `compare_files` takes.

        Raises:
            InputError: the pipeline compares no files.
        """
        raise InputError(f"the pipeline {cls.name} compares runs, and neither files nor strengths.")

    @classmethod
    def predict(cls, run: Path, config: Any, sources: Sequence[Path], asked: Asked) -> Predictions:
        """Let a run's result answer for data without labels; `equipoise predict` writes what it says.

        Args:
            run: the run's folder.
            config: its configuration.
            sources: absolute paths that exist: files or folders. None where prompts may be enough.
            asked: what is wanted beside them.

        Raises:
            InputError: there is no result, or the data cannot be used; with all that is wrong, a line each.
        """
        raise InputError(f"the pipeline {cls.name} predicts nothing from the command line.")

    @classmethod
    def evaluate(cls, run: Path, config: Any, file: Path) -> Predictions:
        """Measure a run's result on labelled data, with `figures`; `equipoise evaluate` shows them.

        Args:
            run: the run's folder.
            config: its configuration.
            file: an absolute path that exists, of data in the format that the pipeline trains on: a file or a folder.

        Raises:
            InputError: there is no result, or the data cannot be used; with all that is wrong, a line each.
        """
        raise InputError(f"the pipeline {cls.name} evaluates nothing from the command line.")

    @classmethod
    def export(cls, result: Path, format: str, output: Path) -> None:
        """Write what a run has learnt as one file in another app's format, or as a folder with a model card in it.

        Args:
            result: the run's folder of that name.
            format: one of `formats`.
            output: the file or folder to write, an absolute path; nothing is there.

        Raises:
            InputError: there is no result, or the file cannot be written.
        """
        raise InputError(f"the pipeline {cls.name} exports nothing: its result loads as it is.")

    @classmethod
    def publish(cls, run: Path, config: Any, folder: Path) -> None:
        """Fill a folder with what other people need of a result: its weights, and a model card in README.md.

        Not asked of a pipeline that exports folders: what it exports is published.

        Args:
            run: the run's folder.
            config: its configuration.
            folder: an empty one, which is uploaded as a repository.

        Raises:
            InputError: there is no result.
        """
        raise InputError(f"the pipeline {cls.name} publishes nothing.")


def refuse(problems: Sequence[str]) -> None:
    """Ends with all that is wrong with data, a line each; of very many the first.

    Raises:
        InputError: there are problems.
    """
    if problems:
        more = [f"and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
        raise InputError("\n".join([*problems[:_LISTED], *more]))


@decoded_once()
def execute(pipeline: type[Pipeline], config: RunConfig, run: Run) -> Outcome:
    """Run `pipeline` inside `run`'s session, so that the folder tells at any time what happened.

    Raises:
        InputError: the run is being trained by another process, or the input turned out to be unusable.
        EquipoiseError: it failed; the message is one sentence, and the traceback is in the run's log.
        KeyboardInterrupt: interrupted twice.
    """
    try:
        with run.session():
            try:
                with tracked(config, run):
                    outcome = pipeline.run(config, run)
            except Exception as error:
                if missing := processes.lost(error):
                    raise missing from error
                raise
            run.finish(outcome.state, message=outcome.message, step=outcome.step)
            return outcome
    except EquipoiseError:
        raise
    except Exception as error:
        if disk_full(error):
            raise InputError(f"{run.folder}: {sentence(error)}") from error
        if memory_full(error):
            raise EquipoiseError(f"{run.id}: {sentence(error)}") from error
        raise EquipoiseError(f"{run.id}: {sentence(error)} The traceback is in {run.log_file}.") from error


@decoded_once()
def follow(pipeline: type[Pipeline], config: RunConfig, folder: Path) -> None:
    """Take part in a run that another process leads; see `equipoise.pipelines.training.processes`.

    Raises:
        EquipoiseError: This process cannot go on, for a reason of its own or because another one has ended.
    """
    try:
        with stop_signals(lambda number: None):  # the leader hears them too, and tells after which step to stop
            pipeline.run(config, Following(folder))
    except EquipoiseError:
        raise
    except Exception as error:
        raise processes.lost(error) or EquipoiseError(f"process {processes.rank()}: {sentence(error)}") from error
