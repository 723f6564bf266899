"""Trains a late-fusion model: features → steps of the objective → the best weights, and how good each modality is."""

# accelerate and pydantic's defaults are annotated too narrowly.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

import csv
import io
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from equipoise.balancing.objective import Losses, Reached
from equipoise.errors import ConfigError, InputError
from equipoise.pipelines.audio_visual.check import unsuited
from equipoise.pipelines.audio_visual.config import AudioVisualConfig
from equipoise.pipelines.audio_visual.data import Clip
from equipoise.pipelines.audio_visual.features import PRESENT, Batches, Features
from equipoise.pipelines.audio_visual.model import DESCRIPTION, WEIGHTS, LateFusion, present
from equipoise.pipelines.audio_visual.prepared import Prepared, prepare
from equipoise.pipelines.audio_visual.probe import MOST, probes
from equipoise.pipelines.audio_visual.scores import Scores, scores
from equipoise.pipelines.config.sections import ObjectiveSection
from equipoise.pipelines.files import explained, write_atomic
from equipoise.pipelines.pipeline import Outcome
from equipoise.pipelines.runs.checkpoints import save_tensors
from equipoise.pipelines.runs.run import Run
from equipoise.pipelines.training import processes
from equipoise.pipelines.training.loop import DivergedError, EarlyStopError, StoppedError, train_loop
from equipoise.pipelines.training.state import OptimizedWork, make_accelerator, mix, number, place, seed_all
from equipoise.pipelines.training.validation import Validation

JOINT = "joint"
_EVALUATED = 256  # clips of a batch when evaluating, at most
_SEEN = 1000  # training clips whose loss is looked at, at most
_HEARD = 512  # training clips by which sound is standardized, at most
_LOOKS, _WAIT = 10, 2  # validations of modalities that train alone; those in a row without a better loss that end it


def train(config: AudioVisualConfig, run: Run) -> Outcome:
    accelerator = make_accelerator(config.train.precision)
    with accelerator.main_process_first():  # the others find its features on disk
        prepared = prepare(config)
    _tell_skipped(prepared, config, run)
    work = AudioVisualWork(config, run, accelerator, prepared)
    started = time.perf_counter()
    try:
        outcome = train_loop(run, work, config)
    except StoppedError as reason:
        return Outcome("stopped", f"{reason}.", 0)
    if outcome.state == "stopped":
        return outcome
    work.settle()
    found = work.test()
    facts = {
        "state": outcome.state,
        "step": outcome.step,
        "objective": config.objective.name,
        "chance": work.chance,
        "seconds": time.perf_counter() - started,
        **{f"alone_{name}": loss for name, loss in work.alone.items()},
        **work.figures(found),
        **(work.probe() if processes.leads() else {}),
    }
    if processes.leads():  # before the baselines, whatever comes of them
        work.save_result(found, facts)
    chosen = config.objective
    sentences = [f"Test accuracy with {chosen.name}: {_accuracies(facts)}; guessing {work.chance:.1%}."]
    if baselines := [name for name in config.train.baselines if name != chosen.name or chosen.options]:
        facts["baselines"], said = _baselines(config, run, accelerator, prepared, baselines)
        sentences += said
        if processes.leads():
            work.save_facts(facts)
    message = " ".join([outcome.message, *sentences])
    run.log(message)
    return Outcome(outcome.state, message, outcome.step)


def _tell_skipped(prepared: Prepared, config: AudioVisualConfig, run: Run) -> None:
    """What was left out, or, where nothing may be, since the check."""
    manifest = prepared.manifest
    if manifest.problems or (manifest.bad and not config.data.skip_bad):
        raise ConfigError(prepared.problems)
    if manifest.bad:
        total = len(manifest.bad) + len(manifest.clips)
        lines = [f"skipped {len(manifest.bad)} of {total} clips:", *manifest.sentences()]
        for line in lines:
            run.log(line)
            if processes.leads():
                print(line, file=sys.stderr)


def _baselines(
    config: AudioVisualConfig, run: Run, accelerator: Accelerator, prepared: Prepared, names: Sequence[str]
) -> tuple[dict[str, dict], list[str]]:
    """The figures of other objectives by name, as far as they were trained, and a sentence on each."""
    made: dict[str, dict] = {}
    sentences, stopped = [], []
    for name in names:
        try:
            figures = made[name] = _baseline(config, run, accelerator, prepared, name)
        except StoppedError:
            stopped.append(name)
        except InputError as error:
            sentences.append(f"With {name} in its place nothing was trained: {error}")
        else:
            when = f" (diverged at step {figures['step']})" if figures["state"] == "diverged" else ""
            sentences.append(f"With {name} in its place{when}: {_accuracies(figures)}.")
    if stopped:
        sentences.append(f"Stopped before {' and '.join(stopped)} had been trained instead.")
    return made, sentences


def _baseline(config: AudioVisualConfig, run: Run, accelerator: Accelerator, prepared: Prepared, name: str) -> dict:
    """Another objective in place of this one: its figures. Its weights are not kept.

    Raises:
        StoppedError: The run was asked to stop.
        InputError: What the objective needs before its first step diverged.
    """
    other = config.model_copy(update={"objective": ObjectiveSection(name=name)})
    work = AudioVisualWork(other, run, accelerator, prepared)
    steps, step, state = range(config.train.steps), 0, "done"
    silent = None if processes.leads() else True
    try:
        for step in tqdm(steps, f"{name} instead", unit="step", dynamic_ncols=True, leave=False, disable=silent):
            if "stop" in processes.requests(run):
                raise StoppedError(f"stopped on request before {name} had been trained instead")
            work.step(step)
    except ArithmeticError as error:
        state = "diverged"
        run.log(f"{name}: {error} at step {step + 1}")
        work.rewind()
    except EarlyStopError as error:
        run.log(f"{name}: {error}")
    work.settle()
    found = work.test()
    figures = work.figures(found)
    if processes.leads():
        figures |= work.probe()
        work.save_confusions(found, run.folder / "result" / "baselines" / name)
    return {"state": state, "step": step + 1, **figures}


def _accuracies(figures: dict[str, Any]) -> str:
    """Those of the model's own heads; each modality's with that of a probe on it."""
    said = []
    for key, value in figures.items():
        if key == f"accuracy_{JOINT}":
            said.append(f"all modalities together {value:.1%}")
        elif key.startswith("accuracy_"):
            name = key.removeprefix("accuracy_")
            probed = figures.get(f"probe_{name}")
            said.append(f"{name} alone {value:.1%}" + ("" if probed is None else f" (probe {probed:.1%})"))
    return ", ".join(said)


class AudioVisualWork(OptimizedWork[AudioVisualConfig]):
    """One run's training: see `equipoise.pipelines.training.loop.Work` for when each method is called."""

    tensors = "weights"
    watched = "joint validation loss"

    def __init__(self, config: AudioVisualConfig, run: Run, accelerator: Accelerator, prepared: Prepared):
        splits = prepared.splits(config)
        self.prepared = prepared
        self.digest = prepared.manifest.digest
        self.classes = prepared.manifest.classes
        index = {label: number for number, label in enumerate(self.classes)}
        self.labels = {split: torch.tensor([index[clip.label] for clip in clips]) for split, clips in splits.items()}
        self.batches = {split: Batches(prepared.store, clips) for split, clips in splits.items()}
        first = self.batches["train"].get([0])
        self.bins = tuple(first["audio"].shape[2:]) if "audio" in first else (0, 0)
        torch.manual_seed(mix(config.seed, "model"))
        model = LateFusion(config, len(self.classes), self.bins)
        if "audio" in first:
            model.sound.copy_(_spread(self.batches["train"]))
        self.model: LateFusion = model.to(accelerator.device)
        self.weights_of_classes = self._class_weights(config, splits["train"]).to(accelerator.device)
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        encoders = {
            name: [p for p in part.parameters() if p.requires_grad] for name, part in self.model.encoders.items()
        }
        parts = {**{name: f"encoders.{name}." for name in encoders}, "heads": ("fusion.", "heads.")}
        groups = [
            {"params": [(name, p) for name, p in named.items() if name.startswith(prefix)], "component": part}
            for part, prefix in parts.items()
        ]
        frozen = [parameter for parameter in self.model.parameters() if not parameter.requires_grad]
        super().__init__(config, run, accelerator, named, groups, encoders, dict(self.model.named_buffers()), frozen)
        if said := unsuited(config.objective.name, config.model.fusion):
            raise InputError(f"objective.name: {said}")
        self.objective.joint_head = [p for p in self.model.fusion.parameters() if p.requires_grad]
        self.loading = 0.0  # seconds that the last step waited for its batch
        self.had: dict[int, dict[str, Tensor]] = {}  # forward pass of a step → modality → whether some clip had it
        self.each = self._each_validation(config)  # of modalities that share nothing, each by itself
        self.alone: dict[str, float] = {}  # modality → what it reached by itself, where the objective asked
        size = config.train.batch * config.train.accumulate * processes.count()
        self.objective.steps_per_epoch = len(splits["train"]) / size

    def _class_weights(self, config: AudioVisualConfig, clips: Sequence[Clip]) -> Tensor:
        counts = Counter(clip.label for clip in clips)
        if config.data.class_weights == "none":
            return torch.ones(len(self.classes))
        return torch.tensor([len(clips) / (len(self.classes) * counts[label]) for label in self.classes])

    def _each_validation(self, config: AudioVisualConfig) -> dict[str, Validation]:
        if self.objective.trains_joint or self.validation is None:
            return {}
        own = {name: (f"encoders.{name}.", f"heads.{name}.") for name in self.model.modalities}
        return {
            name: Validation(config.train, {n: tensor for n, tensor in self.kept.items() if n.startswith(begins)})
            for name, begins in own.items()
        }

    def settle(self) -> None:
        super().settle()
        for validation in self.each.values():
            validation.settle()

    @property
    def chance(self) -> float:
        """Accuracy of always saying the class that is most frequent in training."""
        most = int(torch.bincount(self.labels["train"]).argmax())
        return (self.labels["test"] == most).double().mean().item()

    def step(self, step: int) -> dict[str, float]:
        self.loading = 0.0
        if self.objective.needs_alone and (note := self.objective.take_alone(self._alone())):
            self.run.log(note)
        if self.objective.wants_features():
            some = {split: self._some(split, MOST) for split in ("train", "val")}
            given = [(self._encoded(split, clips), self.labels[split][clips]) for split, clips in some.items()]
            if note := self.objective.take_features(*given[0], *given[1]):
                self.run.log(note)
        values = super().step(step) | {"balancing": self.balancing, "loading": self.loading}
        for name in self.model.modalities if self.had else ():
            # the mean is over all forward passes, and 0 is none's loss
            if count := sum(float(had[name]) for had in self.had.values()):
                values[f"loss_{name}"] *= len(self.had) / count
            else:
                del values[f"loss_{name}"]
        return values

    def _alone(self) -> dict[str, Reached]:
        """What each modality reaches by itself in as many steps as the run has at most, and until none gets better by
        1 % in two of ten validations; and the joint loss, in as many steps, if the objective asks for it."""
        found = self._trained_alone("unimodal", self.model.modalities)
        if self.objective.alone_joint:
            found |= self._trained_alone("joint", [JOINT])
        self.alone = {name: reached.validation_best for name, reached in found.items()}
        self.run.log(f"alone: {', '.join(f'{name} {loss:.4g}' for name, loss in self.alone.items())}")
        return found

    def _trained_alone(self, objective: str, names: Sequence[str]) -> dict[str, Reached]:
        steps, waited = self.config.train.steps, 0
        every = math.ceil(steps / _LOOKS)
        train = self.config.train.model_copy(update={"validate_every": every, "patience": 0, "keep": "last"})
        changed = {"objective": ObjectiveSection(name=objective), "train": train}
        work = AudioVisualWork(self.config.model_copy(update=changed), self.run, self.accelerator, self.prepared)
        first, best = work._both_losses(names), dict.fromkeys(names, math.inf)
        shown = {"unit": "step", "dynamic_ncols": True, "leave": False, "disable": None if processes.leads() else True}
        for step in tqdm(range(steps), f"{' and '.join(names)} alone", **shown):
            if "stop" in processes.requests(self.run):
                raise StoppedError(f"stopped on request at step {step} of {steps} in which modalities train alone")
            try:
                found = work.step(step)
            except DivergedError as error:
                raise self._diverged_alone(names, f"{error} at step {step + 1} of {steps}") from error
            if not (work.validation and work.validation.due(step + 1)):
                continue
            now = processes.first({name: found.get(f"val_loss_{name}", math.inf) for name in names})
            waited = 0 if any(now[name] < 0.99 * loss for name, loss in best.items()) else waited + 1
            best = {name: min(loss, now[name]) for name, loss in best.items()}
            if waited == _WAIT and not self.objective.alone_joint:
                break
        last = work._both_losses(names)
        if not all(math.isfinite(value) for name in names for value in (best[name], last[name][1])):
            raise self._diverged_alone(names, "the validation loss was not finite")
        return {name: Reached(*first[name][:2], *last[name][:2], best[name], *last[name][2:]) for name in names}

    def _diverged_alone(self, names: Sequence[str], what: str) -> InputError:
        return InputError(
            f"the training of {' and '.join(names)} alone, before the run's own, diverged: {what}. Set a smaller "
            f"optimizer.learning_rate, or give numbers: objective.options.{self.objective.alone_option}."
        )

    def _some(self, split: str, most: int, name: str = JOINT) -> Tensor:
        """The indices of a split's clips, those that have the modality; of more than `most`, so many by chance, always
        the same."""
        batches = self.batches[split]
        given = batches.store.given if name != JOINT else {}
        having = [i for i, clip in enumerate(batches.clips) if name in given.get(clip.line, (name,))]
        order = torch.randperm(len(having), generator=torch.Generator().manual_seed(0))
        return torch.tensor(having)[order[:most]].sort().values

    def _both_losses(self, names: Sequence[str]) -> dict[str, tuple[float, float, float, int]]:
        """Training and validation loss by prediction, and the noise and the clips of the latter; of many training
        clips, some."""
        validation, seen = self.predict("val"), dict.fromkeys(names, JOINT)
        if self.config.data.missing == "mask":  # a rare modality may be in none of some clips
            seen = {name: name for name in names}
        train = {name: self.predict("train", self._some("train", _SEEN, name)) for name in dict.fromkeys(seen.values())}
        found = {}
        for name in names:
            one, other = train[seen[name]][name], validation[name]
            sent = processes.first({"train": one.loss, "validation": other.loss, "noise": other.noise})
            found[name] = (sent["train"], sent["validation"], sent["noise"], int(other.confusion.sum()))
        return found

    def evaluate(self, step: int, micro: int) -> Losses:
        train = self.config.train
        seed = mix(self.config.seed, step, micro, processes.rank())
        seed_all(seed)  # for dropout, and for noise that an objective draws
        chosen, following = (self._chosen(step * train.accumulate + micro + ahead) for ahead in (0, 1))
        started = time.perf_counter()
        generator, shares = torch.Generator().manual_seed(seed), None
        if self.config.data.stretch == "random":
            shares = torch.rand(len(chosen), generator=generator).tolist()
        batch = self._augmented(self.batches["train"].get(chosen, following, shares), generator)
        self.loading += time.perf_counter() - started
        labels = self.labels["train"][chosen].to(self.accelerator.device)
        self.model.train()
        batch = self._moved(batch)
        with self.accelerator.autocast():
            features = self.model.features(batch)
            live = self.objective.uses_unimodal
            unimodal = {n: self.model.heads[n](f if live else f.detach()) for n, f in features.items()}
        responses, parted = None, self.objective.needs_head != "any"
        if self.objective.uses_responses or parted:
            with torch.set_grad_enabled(parted), self.accelerator.autocast():
                responses = self.model.responses(features, unimodal)
        given: Mapping[str, Tensor] = features
        if self.objective.changes_features:
            said = {name: processes.gathered(logits) for name, logits in (responses or {}).items()}
            given = self.objective.fuse(features, said, processes.gathered(labels))
        with self.accelerator.autocast():
            joint = self.model.fusion(given)
        weigh = self.weights_of_classes

        def loss(logits: Tensor, there: Tensor | None = None) -> Tensor:
            """Of the clips that are there; 0 where there are none."""
            logits, true = (logits, labels) if there is None else (logits[there], labels[there])
            weight = weigh[true].sum()
            mean = F.cross_entropy(logits.float(), true, weigh) if len(true) else logits.sum()
            # of the weight of all processes' clips, if those had each the same
            return mean if processes.count() == 1 else mean * weight / processes.mean(weight).clamp(min=1e-12)

        there = {n: present(batch, self.model.modalities, n) for n in unimodal}
        own = {n: loss(logits, there[n]) for n, logits in unimodal.items()}
        if PRESENT in batch:
            self.had[micro] = {n: processes.mean(batch[PRESENT][:, i].float().sum()) > 0 for i, n in enumerate(own)}
        weights = None if self.config.data.class_weights == "none" else weigh[labels]
        return Losses(loss(joint), own, labels, responses, features if self.objective.uses_features else None, weights)

    def _chosen(self, number: int) -> list[int]:
        count = len(self.labels["train"])
        return [place(index, count, self.config.seed) for index in self.share(number)]

    def _augmented(self, batch: Features, generator: torch.Generator) -> Features:
        data = self.config.data
        if "visual" in batch and (data.flip or data.shift):
            reach = int(data.shift * data.visual.size)
            moved = []
            for clip in batch["visual"]:  # (frames, 3, size, size)
                flip, (down, right) = (
                    torch.rand((), generator=generator),
                    torch.randint(-reach, reach + 1, (2,), generator=generator).tolist(),
                )
                clip = clip.flip(-1) if data.flip and flip < 0.5 else clip
                padded = F.pad(clip.float(), [reach] * 4, mode="replicate") if reach else clip
                size = data.visual.size
                moved.append(padded[..., reach + down : reach + down + size, reach + right : reach + right + size])
            batch = {**batch, "visual": torch.stack(moved)}
        if "audio" in batch and data.roll:
            reach = int(data.roll * batch["audio"].shape[-1])
            shifts = torch.randint(0, reach + 1, (len(batch["audio"]),), generator=generator).tolist()
            rolled = [clip.roll(shift, -1) for clip, shift in zip(batch["audio"], shifts, strict=True)]
            batch = {**batch, "audio": torch.stack(rolled)}
        return batch

    def _moved(self, batch: Features) -> Features:
        return {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}

    def gradients(self) -> dict[str, Tensor]:
        """The norm of every encoder's gradient."""
        norms = {}
        for name, parameters in self.objective.encoders.items():
            if grads := [p.grad for p in parameters if p.grad is not None]:
                norms[f"gradient_norm_{name}"] = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        return norms

    @torch.no_grad()
    def predict(
        self,
        split: str,
        clips: Tensor | None = None,  # (count,) their indices; none: all
    ) -> dict[str, Scores]:
        """How good the joint prediction and every modality's own are on a split."""
        self.model.eval()
        outputs: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
        clips = torch.arange(len(self.labels[split])) if clips is None else clips
        for chosen in clips.split(min(_EVALUATED, 4 * self.config.train.batch)):
            with self.accelerator.autocast():
                batch = self._moved(self.batches[split].get(chosen.tolist()))
                joint, unimodal = self.model(batch)
            for name, logits in {JOINT: joint, **unimodal}.items():
                predicted, true = logits.float().cpu(), self.labels[split][chosen]
                there = None if name == JOINT else present(batch, self.model.modalities, name)
                if there is not None:
                    predicted, true = predicted[there.cpu()], true[there.cpu()]
                loss = F.cross_entropy(predicted, true, reduction="none")
                outputs.setdefault(name, []).append((loss, predicted.argmax(1), true))
        return {
            name: scores(*(torch.cat(part) for part in zip(*parts, strict=True)), len(self.classes))
            for name, parts in outputs.items()
        }

    def validate(self, taken: int) -> dict[str, float]:
        """As the base does, and tells the objective."""
        found = self.predict("val")
        # the first process's numbers, for what follows from them must be the same in all
        shown = processes.first({name: score.loss for name, score in found.items()})
        watched = shown[JOINT] if self.objective.trains_joint else sum(shown[name] for name in self.model.modalities)
        assert self.validation is not None
        self.validation.take(watched, taken)
        for name, validation in self.each.items():
            validation.take(shown[name], taken)
        if note := self.objective.after_validation({name: shown[name] for name in self.model.modalities}):
            self.run.log(note)
            if processes.leads() and isinstance(self.run, Run):
                tqdm.write(f"step {taken}: {note}", file=sys.stderr)
        return {f"val_{key}": value for key, value in self.figures(found).items() if value is not None}

    def figures(self, found: dict[str, Scores]) -> dict[str, float | None]:
        """Losses, accuracies and F1 by name; without the joint ones where the joint head is not trained."""
        names = [name for name in found if name != JOINT or self.objective.trains_joint]
        fields = [(field, name) for field in ("accuracy", "f1", "loss") for name in names]
        return {f"{field}_{name}": number(getattr(found[name], field)) for field, name in fields}

    def evaluation_loss(self) -> float:
        return self.predict("val")[JOINT].loss

    def test(self) -> dict[str, Scores]:
        return self.predict("test")

    def probe(self) -> dict[str, float | None]:
        """Accuracies of probes on the frozen encoders, and what each modality contributes; of the training clips, some
        by chance where there are very many. None where clips may lack a modality, for a probe needs all of each."""
        if self.config.data.missing == "mask":
            return {}
        chosen = self._some("train", MOST)
        train, labels = self._encoded("train", chosen), self.labels["train"][chosen]
        test = self._encoded("test", torch.arange(len(self.labels["test"])))
        found = probes(train, labels, test, self.labels["test"], len(self.classes), self.chance)
        return {name: number(value) for name, value in found.items()}

    @torch.no_grad()
    def _encoded(self, split: str, clips: Tensor) -> Features:
        """Modality → (clips, width) features, as when predicting."""
        self.model.eval()
        made: dict[str, list[Tensor]] = {}
        for chosen in clips.split(min(_EVALUATED, 4 * self.config.train.batch)):
            with self.accelerator.autocast():
                features = self.model.features(self._moved(self.batches[split].get(chosen.tolist())))
            for name, given in features.items():
                made.setdefault(name, []).append(given.float().cpu())
        return {name: torch.cat(parts) for name, parts in made.items()}

    def state(self) -> dict[str, Any]:
        each = {name: validation.state() for name, validation in self.each.items()}
        return {**super().state(), "clips": self.digest, "alone": self.alone, "each": each}

    def restore(self, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        if state.get("clips", self.digest) != self.digest:
            raise InputError(
                f"{self.config.data.manifest}: its usable clips, their classes or splits are not those that this run "
                "was trained on so far. Put them back, or train anew."
            )
        super().restore(weights, state)
        self.alone = dict(state.get("alone", {}))  # earlier versions kept none
        if not state.get("each"):  # nor the best of each modality: such a run ends as it began, with one validation's
            self.each = {}
        for name, validation in self.each.items():
            validation.restore(state["each"][name])

    def save_result(self, found: dict[str, Scores], facts: dict[str, Any]) -> None:
        """Writes the model with all it takes to load it, the figures, and a confusion matrix per prediction."""
        folder = self.run.folder / "result"
        described = {
            "config": self.config.model_dump(mode="json", exclude={"sweep"}),
            "classes": self.classes,
            "bins": self.bins,
            "pretrained": self.model.described(),
        }
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
            save_tensors(folder / WEIGHTS, self.model.state_dict(), {"format": "pt"})
        write_atomic(folder / DESCRIPTION, json.dumps(described, indent=1) + "\n")
        self.save_confusions(found, folder)
        self.save_facts(facts)

    def save_facts(self, facts: dict[str, Any]) -> None:
        write_atomic(self.run.folder / "result" / "result.json", json.dumps(facts, indent=1) + "\n")

    def save_confusions(self, found: dict[str, Scores], folder: Path) -> None:
        """A table per prediction: a row for each true class."""
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
        for name, score in found.items():
            if name != JOINT or self.objective.trains_joint:
                text = io.StringIO()
                writer = csv.writer(text, lineterminator="\n")
                writer.writerow(["true \\ predicted", *self.classes])
                writer.writerows([c, *row] for c, row in zip(self.classes, score.confusion.tolist(), strict=True))
                write_atomic(folder / f"confusion-{name}.csv", text.getvalue())


def _spread(batches: Batches) -> Tensor:  # (2,)
    """Mean and standard deviation of the training spectrograms, from some of the clips that have sound."""
    given = batches.store.given
    heard = [i for i, clip in enumerate(batches.clips) if "audio" in given.get(clip.line, ("audio",))]
    chosen = torch.linspace(0, len(heard) - 1, min(len(heard), _HEARD)).long().tolist()
    sound = batches.get([heard[i] for i in chosen])["audio"].double()
    return torch.stack([sound.mean(), sound.std().clamp(min=1e-6)]).float()
