"""What a run's result makes of clips: classes and probabilities, and where labels are known accuracy and confusions."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from equipoise import registry
from equipoise.errors import InputError
from equipoise.pipelines.audio_visual.data import Clip, Manifest, read_manifest
from equipoise.pipelines.audio_visual.features import PRESENT, Batches, FeatureStore
from equipoise.pipelines.audio_visual.model import WEIGHTS, LateFusion, load
from equipoise.pipelines.audio_visual.prepared import extract_all, feature_store
from equipoise.pipelines.media import pictures, sounds
from equipoise.pipelines.pipeline import Predictions, refuse
from equipoise.pipelines.progress import progress
from equipoise.pipelines.runs.run import Run
from equipoise.pipelines.tables import table

JOINT = "joint"
_VIDEOS = {
    ".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv"
}  # fmt: skip
_GIVES = {"audio": ("audio",), "frames": ("visual",), "video": ("audio", "visual")}  # column → modalities
_NOUNS = {"audio": "a sound", "frames": "a picture", "video": "a video"}
_SHOWN = 12  # classes in a table of confusions, and lines of a list of them


@dataclass(frozen=True)
class Outputs:
    """What a model says of clips, by prediction: joint, if that head was trained, and each modality's own; NaN where a
    clip lacks it."""

    probabilities: dict[str, Tensor]  # (clips, classes) float32
    features: dict[str, Tensor]  # by modality, (clips, width) float32

    def chosen(self, name: str) -> list[int]:
        return self.probabilities[name].argmax(1).tolist()

    def known(self, name: str) -> list[int]:
        """The clips that it says something of."""
        return (~self.probabilities[name].isnan().any(1)).nonzero()[:, 0].tolist()


class Result:
    """A run's result, which classifies clips from their files.

    Args:
        source: The run's result/, or what `load` has made of one.

    Raises:
        InputError: It holds no model of this pipeline.
    """

    def __init__(self, source: str | Path | tuple[LateFusion, list[str]]):
        model, self.classes = source if isinstance(source, tuple) else load(source)
        self.config = model.config
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.to(self.device)
        objective = registry.load("objectives", self.config.objective.name)
        self.names = [JOINT] * objective.trains_joint + list(model.modalities)

    def predict(self, sources: Sequence[str | Path]) -> Predictions:
        """A row for each clip: its label and probabilities, and each modality's own label.

        Args:
            sources: One manifest, whose labels and splits are not read, or media, and folders of them.

        Raises:
            InputError: All that is wrong with the clips, a line each.
        """
        manifest, clips = self._to_predict([Path(source) for source in sources])
        store = feature_store(self.config, None)
        if manifest:
            extract_all(manifest, store)
            refuse(manifest.sentences())
            clips = manifest.clips
        else:
            wrong = store.prepare(clips)
            refuse([_located(clip, wrong[clip.line]) for clip in clips if clip.line in wrong])
        if not clips:
            raise InputError(f"{sources[0]}: holds no clip.")
        outputs = self.outputs(store, clips)
        return Predictions(self._rows(clips, outputs), arrays=self._arrays(clips, outputs))

    def evaluate(self, file: Path, cache: Path | None = None) -> Predictions:
        """Accuracies on the clips of a manifest: of its split test, or of all where it has no splits.

        Args:
            cache: A folder in which features are kept.

        Raises:
            InputError: All that is wrong with the clips, a line each.
        """
        manifest = read_manifest(self.config.data, file, needed=("label",))
        if "split" in manifest.columns:
            others = {clip.line for clip in [*manifest.clips, *manifest.spoilt] if clip.split != "test"}
            manifest.clips = manifest.split("test")
            manifest.spoilt = [clip for clip in manifest.spoilt if clip.split == "test"]
            manifest.bad = {line: text for line, text in manifest.bad.items() if line not in others}
        known = ", ".join(self.classes[:_SHOWN]) + (" and others" if len(self.classes) > _SHOWN else "")
        strange = [clip for clip in manifest.clips if clip.label not in self.classes]
        manifest.bad |= {
            clip.line: f"its class {clip.label!r} is none of those that the run was trained on: {known}."
            for clip in strange
        }
        store = feature_store(self.config, cache)
        extract_all(manifest, store)
        refuse(manifest.sentences())
        if not (clips := manifest.clips):
            where = " in the split test" if "split" in manifest.columns else ""
            raise InputError(f"{file}: holds no clip{where}.")
        outputs = self.outputs(store, clips)
        wanted = [self.classes.index(clip.label) for clip in clips]
        rows = [{**row, "wanted": clip.label} for row, clip in zip(self._rows(clips, outputs), clips, strict=True)]
        known, chosen = ({name: f(name) for name in self.names} for f in (outputs.known, outputs.chosen))
        figures = {
            f"accuracy_{name}": float(np.mean([chosen[name][i] == wanted[i] for i in known[name]] or [math.nan]))
            for name in self.names
        }
        which = "of its split test" if "split" in manifest.columns else "in it"
        meaning = [f"Accuracy: the share of the {len(clips)} clips {which} that are given their class."]
        if any(len(known[name]) < len(clips) for name in self.names):
            meaning.append("That of one modality is of the clips that have it.")
        meaning += [
            self._confusions(name, [wanted[i] for i in known[name]], [chosen[name][i] for i in known[name]])
            for name in self.names
        ]
        return Predictions(rows, figures, "\n".join(meaning), self._arrays(clips, outputs))

    def outputs(self, store: FeatureStore, clips: Sequence[Clip]) -> Outputs:
        """What the model says, in evaluation mode, of clips whose features can be made."""
        training = self.model.training
        self.model.eval()
        try:
            return self._outputs(store, clips)
        finally:
            self.model.train(training)

    @torch.no_grad()
    def _outputs(self, store: FeatureStore, clips: Sequence[Clip]) -> Outputs:
        there: list[Tensor] = []  # (some, modalities), where clips may lack some
        batches, size = Batches(store, clips), min(256, 4 * self.config.train.batch)
        said: dict[str, list[Tensor]] = {}
        features: dict[str, list[Tensor]] = {}
        with progress("predictions", "clip", total=len(clips)) as bar:
            for start in range(0, len(clips), size):
                some, following = (list(range(len(clips)))[at : at + size] for at in (start, start + size))
                batch = {name: tensor.to(self.device) for name, tensor in batches.get(some, following).items()}
                made = self.model.features(batch)
                logits = {name: self.model.heads[name](own) for name, own in made.items()}
                if JOINT in self.names:
                    logits[JOINT] = self.model.fusion(made)
                there.append(batch.get(PRESENT, torch.ones(len(some), len(made), dtype=torch.bool)).cpu())
                for name, values in logits.items():
                    said.setdefault(name, []).append(values.float().softmax(1).cpu())
                for name, values in made.items():
                    features.setdefault(name, []).append(values.float().cpu())
                bar.update(len(some))
        probabilities, features_ = ({n: torch.cat(parts) for n, parts in found.items()} for found in (said, features))
        has = dict(zip(self.model.modalities, torch.cat(there).unbind(1), strict=True))
        for found in (probabilities, features_):
            for name, values in found.items():
                if name in has:
                    values[~has[name]] = torch.nan
        return Outputs(probabilities, features_)

    def _to_predict(self, sources: Sequence[Path]) -> tuple[Manifest | None, list[Clip]]:
        tables = [path for path in sources if path.suffix.lower() == ".csv"]
        if not sources or (tables and len(sources) > 1):
            raise InputError(
                f"FILE_OR_FOLDER: give one manifest (.csv), or media and folders of them; got {len(sources)}."
            )
        if tables:
            return read_manifest(self.config.data, tables[0], needed=()), []
        return None, clips_of(sources, self.model.modalities, self.config.data.missing == "mask")

    def _rows(self, clips: Sequence[Clip], outputs: Outputs) -> list[dict]:
        chosen = {name: outputs.chosen(name) for name in self.names}
        rows = []
        for index, clip in enumerate(clips):
            row: dict = {"clip": clip.name}
            for name in self.names:
                prefix, label = "" if name == JOINT else f"{name}_", chosen[name][index]
                probability = outputs.probabilities[name][index, label].item()
                row[f"{prefix}label"] = self.classes[label] if probability == probability else None
                row[f"{prefix}probability"] = probability if probability == probability else None
            if JOINT in self.names:
                values = outputs.probabilities[JOINT][index].tolist()
                row |= {f"probability of {label}": value for label, value in zip(self.classes, values, strict=True)}
            rows.append(row)
        return rows

    def _arrays(self, clips: Sequence[Clip], outputs: Outputs) -> dict[str, np.ndarray]:
        return {
            "clip": np.array([clip.name for clip in clips]),
            "classes": np.array(self.classes),
            **{f"probabilities_{name}": outputs.probabilities[name].numpy() for name in self.names},
            **{f"features_{name}": values.numpy() for name, values in outputs.features.items()},
        }

    def _confusions(self, name: str, wanted: Sequence[int], chosen: Sequence[int]) -> str:
        """Counts: a table, a row for each true class; of many classes the commonest mistakes."""
        counts = Counter(zip(wanted, chosen, strict=True))
        every = range(len(self.classes))
        if len(self.classes) <= _SHOWN:
            rows = [[self.classes[true], *(counts[true, said] for said in every)] for true in every]
            return f"\n{name}, clips by true class (rows) and predicted one:\n" + table(["", *self.classes], rows)
        wrong = [(pair, count) for pair, count in counts.most_common() if pair[0] != pair[1]][:_SHOWN]
        rows = [[self.classes[true], self.classes[said], count] for (true, said), count in wrong]
        return f"\n{name}, the commonest mistakes:\n" + table(["true", "predicted", "clips"], rows)


def clips_of(sources: Sequence[Path], modalities: Sequence[str], missing: bool = False) -> list[Clip]:
    """Every medium of its own, and those in folders and in their folders, as a clip: its name is its path.

    Args:
        sources: Files and folders.
        modalities: Those that the run reads.
        missing: Whether a clip may lack some of them.

    Raises:
        InputError: All that cannot give each of the modalities, a line each.
    """
    if "text" in modalities and not missing:
        raise InputError("the run reads text, which media do not give. Give a manifest with a column text.")
    problems, clips = [], []
    for path in dict.fromkeys(file for source in sources for file in _media(source, problems)):
        column = _column(path)
        lacking = [name for name in modalities if name not in _GIVES[column]]
        if lacking and not (missing and len(lacking) < len(modalities)):
            problems.append(
                f"{path}: {_NOUNS[column]} alone has no {' and '.join(lacking)}, and the run reads "
                f"{' and '.join(modalities)}. Give videos, or a manifest that names a file for each."
            )
            continue
        given: dict[str, Any] = {name: path if name == column else None for name in _GIVES}
        clips.append(Clip(len(clips), str(path), "", "", **given, text=None))
    refuse(problems)
    return clips


def _media(source: Path, problems: list[str]) -> list[Path]:
    if source.is_file():
        return [source]
    known = _VIDEOS | pictures.suffixes() | sounds.suffixes()
    below = (path for path in sorted(source.rglob("*")) if path.suffix.lower() in known and path.is_file())
    found = [path for path in below if not any(map(pictures.of_systems, path.relative_to(source).parts))]
    if not found:
        problems.append(f"{source}: has no video, sound or picture in it or in its folders.")
    return found


def _column(path: Path) -> str:
    """The column of a manifest that the file belongs into, by its name; what nobody knows may be a video."""
    suffix = path.suffix.lower()
    if suffix in _VIDEOS:
        return "video"
    if suffix in pictures.suffixes():
        return "frames"
    return "audio" if suffix in sounds.suffixes() else "video"


def _located(clip: Clip, text: str) -> str:
    """A sentence on a clip's file, which begins by the file's name, or not."""
    name = Path(clip.name).name
    return f"{clip.name}{text.removeprefix(name)}" if text.startswith(name) else f"{clip.name}: {text}"


def predict(run: Path, sources: Sequence[Path]) -> Predictions:
    """What a run's result says of clips: see `Result.predict`."""
    return _of(run).predict(sources)


def evaluate(run: Path, file: Path) -> Predictions:
    """How right a run's result is on labelled clips: see `Result.evaluate`."""
    if not file.is_file():
        raise InputError(f"{file}: is a folder. Give a manifest, a CSV file with a column label.")
    return _of(run).evaluate(file, Run(run).root / ".cache" / "features")


def _of(run: Path) -> Result:
    folder = run / "result"
    if not (folder / "result.json").is_file():
        raise InputError(f"{run.name}: has no result yet. `equipoise resume` goes on with it.")
    if not (folder / WEIGHTS).is_file():
        raise InputError(f"{folder / WEIGHTS}: is missing. Put it back, or train anew.")
    return Result(folder)
