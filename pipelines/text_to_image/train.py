"""Tunes LoRA factors of a base: load → train, with latents made as they are needed → save a file diffusers loads."""

# diffusers, peft and accelerate annotate too narrowly: tuple[int] for any length, one return type for several.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL.Image import Image
from torch import Tensor

from equipoise.balancing.objective import Losses
from equipoise.coordination.components import matches
from equipoise.errors import ConfigError, InputError
from equipoise.optimizers.parts.pair_optimizer import PairOptimizer
from equipoise.pipelines.media.pictures import REPLACE
from equipoise.pipelines.media.reading import MediaError, content
from equipoise.pipelines.pipeline import Outcome
from equipoise.pipelines.runs.run import Run
from equipoise.pipelines.text_to_image import overview
from equipoise.pipelines.text_to_image.base import Base, begin_training, load_base
from equipoise.pipelines.text_to_image.buckets import BucketBatches
from equipoise.pipelines.text_to_image.captions import spoken
from equipoise.pipelines.text_to_image.card import write_card
from equipoise.pipelines.text_to_image.config import TextToImageConfig, TextToImageData
from equipoise.pipelines.text_to_image.data import DECODED, Example, drawn_if_demo, read_folder, read_held
from equipoise.pipelines.text_to_image.fixed import FixedLosses, Measure, spread
from equipoise.pipelines.text_to_image.generate import generate, lora_scale
from equipoise.pipelines.text_to_image.inversion import fresh_rows, with_token, write_word
from equipoise.pipelines.text_to_image.latents import Latents, latents_of, taken
from equipoise.pipelines.text_to_image.offloading import ActivationsAway, frozen_weights
from equipoise.pipelines.text_to_image.pairs import read_sources
from equipoise.pipelines.text_to_image.prior import class_examples
from equipoise.pipelines.text_to_image.result import facts_of, write_result
from equipoise.pipelines.text_to_image.verification import Verification
from equipoise.pipelines.training import processes
from equipoise.pipelines.training.loop import DivergedError, StoppedError, UnreadableError, train_loop
from equipoise.pipelines.training.state import OptimizedWork, finite, make_accelerator, mix, number, seed_all

_PLAIN = TextToImageData()  # class pictures' captions are read as they are
_RECENT = 20  # steps over which a loss has to be high for a run to be given up
_NAMED = 10  # damaged pictures in a message


def train(config: TextToImageConfig, run: Run) -> Outcome:
    accelerator = make_accelerator(config.train.precision)
    base = load_base(config.model, config.train.precision)
    runs = Path(config.runs)
    with accelerator.main_process_first():
        data = drawn_if_demo(config.data, runs)
    found = read_folder(data)
    if found.problems:  # since the check
        raise ConfigError(found.problems)
    held = read_held(data)
    if held and held.problems:
        raise ConfigError(held.problems)
    sources, unpaired = read_sources(data, found.examples)
    if unpaired:
        raise ConfigError(unpaired)
    for line in [*overview.notes(config, found, held), *overview.doubts(config, found, held)]:
        run.log(line)
    prepared = _prepare(base, found.examples, sources, held.examples if held else [], data, config, run)
    if isinstance(prepared, Outcome):
        return prepared
    own, validation, prior = prepared
    word = fresh_rows(base, config.token) if config.token.name else {}
    live = config.lora.text_encoder or data.shuffle_tags or bool(word)
    if not live:
        kinds = [kind.captions for kind in (own, validation, prior) if kind]
        base.read([*chain(*kinds), *([""] if data.caption_dropout else [])])
    with (
        base.encoders_on_device() if live else nullcontext(),
        with_token(base, config.token.name or "", word) if word else nullcontext(),
        base.adapted(config.lora, config.seed) as parts,
    ):
        work = TextToImageWork(config, run, accelerator, base, parts, own, prior, word, validation)
        started = time.perf_counter()
        with work.verification if processes.leads() else nullcontext():
            outcome = train_loop(run, work, config)
        if outcome.state != "stopped" and processes.leads():
            work.settle()
            with work.averaged():
                facts = {
                    "state": outcome.state,
                    "step": outcome.step,
                    "loss_before": number(work.first_losses().evaluated),
                    "loss_after": number(work.final_loss()),
                    **work.chosen(),
                    "seconds": time.perf_counter() - started,
                    "prediction": work.noise.prediction,
                }
                work.save_result(facts)
            if not run.sweep:  # the comparison of a sweep draws its cells' samples
                work.sample(outcome.step or 0)
            write_card(run.folder, config)
    return outcome


def _prepare(
    base: Base,
    examples: list[Example],
    sources: list[list[Example]],
    held: list[Example],
    data: TextToImageData,
    config: TextToImageConfig,
    run: Run,
) -> "tuple[Pictures, Pictures | None, Pictures | None] | Outcome":
    """What is trained on, what is held out and the class pictures, where there are some; the outcome where the run is
    to stop."""
    cache, classed, message = Path(config.runs) / ".cache", None, ""
    if processes.leads():
        try:
            classed = class_examples(base, config, cache, run.asked_to_stop)
        except StoppedError as reason:
            message = f"{reason}; what was made is kept."
    if message := processes.shared(message):
        return Outcome("stopped", message, 0)
    if classed is None:  # the others find what the first one has drawn on disk
        classed = class_examples(base, config, cache)

    def pictures(some: list[Example], beside: Sequence[list[Example]] = ()) -> Pictures:
        from_these = [latents_of(base, one, data, cache) for one in beside]
        return Pictures.of(some, latents_of(base, some, data, cache), config, beside, from_these)

    return pictures(examples, sources), pictures(held) if held else None, pictures(classed) if classed else None


@dataclass(frozen=True)
class Pictures:
    """Pictures of one kind: the subject's, those held out, or those of the class that is trained on too."""

    captions: list[str]
    latents: Latents
    batches: BucketBatches
    facts: list[tuple[Any, ...]]  # of each: a digest of its file, wherever it lies, its caption, its repeats
    sources: Sequence[Latents] = ()  # of the pictures to start from, where the base edits

    @classmethod
    def of(
        cls,
        examples: list[Example],
        latents: Latents,
        config: TextToImageConfig,
        beside: Sequence[list[Example]] = (),  # the pictures to start from
        sources: Sequence[Latents] = (),
    ) -> "Pictures":
        for others, made in zip(beside, sources, strict=True):
            unlike = [i for i, own in enumerate(latents.shapes) if own != made.shapes[i]]
            for index in unlike[:1]:
                one, other = others[index].path, examples[index].path
                raise InputError(f"data.sources: {one} is of another shape than {other}. Cut it to that.")
        repeats = [example.repeats for example in examples]
        batches = BucketBatches(repeats, latents.shapes, config.train.batch * processes.count(), config.seed)
        facts = [(content(example.path), example.caption, example.repeats) for example in examples]
        for others in beside:
            facts = [(*fact, content(other.path)) for fact, other in zip(facts, others, strict=True)]
        return cls([example.caption for example in examples], latents, batches, facts, sources)

    def digest(self, damaged: Sequence[int] = ()) -> str:
        """Of all pictures in their order; of the damaged ones, which another file may come in place of, by shape."""
        facts: list[Any] = list(self.facts)
        for picture in damaged:
            shapes = [kind.shapes[picture] for kind in (self.latents, *self.sources)]
            facts[picture] = (*shapes, *facts[picture][1:3])  # of a pair, either may be the damaged one
        return hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()

    def make(self, picture: int) -> None:
        """Makes the latents of a picture, unless they are there.

        Raises:
            MediaError: It is damaged.
        """
        for kind in (self.latents, *self.sources):
            kind.of(picture)


@dataclass(frozen=True)
class FirstLosses:
    """Of the weights before the first step, at fixed draws."""

    evaluated: float  # `evaluation_loss`
    trained: float  # of the pictures that are trained on, by which a run is known to have diverged


class TextToImageWork(OptimizedWork[TextToImageConfig]):
    """One run's tuning: see `equipoise.pipelines.training.loop.Work` for when each method is called."""

    tensors = "LoRA factors"

    def __init__(
        self,
        config: TextToImageConfig,
        run: Run,
        accelerator: Accelerator,
        base: Base,
        parts: dict[str, torch.nn.Module],  # the tuned parts by name: the denoiser, and the text encoders if asked
        own: Pictures,
        prior: Pictures | None = None,  # of the class, where that is preserved
        word: dict[str, Tensor] | None = None,  # by text encoder: a new word's rows
        held: Pictures | None = None,  # which are not trained on
    ):
        self.base, self.parts, self.own, self.prior, self.word = base, parts, own, prior, word or {}
        self.held = held
        self.captions, self.latents = own.captions, own.latents
        self.prior_loss: dict[int, Tensor] = {}  # of the step's micro-batches
        kinds = {"pictures": own, "class_pictures": prior, "held": held}  # by their names in a checkpoint
        self.kinds = {name: pictures for name, pictures in kinds.items() if pictures}
        self.damaged: dict[str, list[int]] = {}  # kind of pictures → those that could not be read
        self.asked: set[tuple[int, str, int]] = set()  # rank, kind and number of pictures whose latents are made
        both = {name: [kind.latents, *kind.sources] for name, kind in self.kinds.items()}
        self.verification, self.verified = Verification(both, DECODED), False
        self.recent: list[float] = []  # the last steps' losses
        self.measure = Measure(config, accelerator, base, base.set_scheduler(config.noise))
        self.noise = self.measure.noise
        named = {
            f"{part}.{name}": parameter
            for part, module in parts.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        groups = _groups(config, named, list(parts), base.family.denoiser)
        if rows := {f"word.{encoder}": tensor for encoder, tensor in self.word.items()}:
            named |= rows
            groups.append({"params": list(rows.items()), "lr": config.token.learning_rate, "component": "word"})
        if config.train.gradient_checkpointing:
            base.denoiser.enable_gradient_checkpointing()
        else:
            base.denoiser.disable_gradient_checkpointing()
        if config.train.compile and "compiled" not in vars(base) and processes.leads():
            print("train.compile: compiling, which makes the first step take minutes.", file=sys.stderr)
        self.denoiser = base.compiled if config.train.compile else base.denoiser  # what a step calls
        self.average = {f"average.{name}": p.detach().clone() for name, p in named.items()} if config.train.ema else {}
        self.before: FirstLosses | None = None  # not known until they are needed: the first step waits for nothing
        self.began = [tensor.detach().to("cpu", copy=True) for tensor in named.values()]  # until they are known
        super().__init__(
            config,
            run,
            accelerator,
            named,
            groups,
            buffers=self.average,
            frozen=frozen_weights(base.denoiser),
        )

    def step(self, step: int) -> dict[str, float]:
        self._make_ready(step)
        if self._judged():
            usual = self.first_losses().trained * (1 + self.config.prior.weight * bool(self.prior))
            mean, limit = sum(self.recent) / _RECENT, self.config.train.give_up
            if mean > limit * usual:
                raise DivergedError(
                    f"the mean loss of {_RECENT} steps, {mean:.3g}, was more than {limit:g} times the untouched "
                    f"base's, {usual:.3g},"
                )
        try:
            values = super().step(step)
        except RuntimeError as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"train.compile: torch cannot compile this here ({reason}). Leave it out.") from error
        self.recent = [*self.recent[1 - _RECENT :], values["loss"]]
        return values

    def _judged(self) -> bool:
        """Whether the last steps' losses are held against the base's own."""
        return bool(self.config.train.give_up) and len(self.recent) == _RECENT

    def _make_ready(self, step: int) -> None:
        """Makes the latents that a step and the evaluations in it need, before it changes anything.

        Raises:
            UnreadableError: Pictures are damaged, whichever process has found that; all that are known to be.
        """
        new = [one for one in self._wanted(step) if one not in self.asked]  # in all processes alike
        if not new and self.verified:
            return
        finished, found = self.verification.finished, dict(self.verification.damage)  # in this order
        for rank, name, picture in new:
            if rank == processes.rank() and not found:
                try:
                    self.kinds[name].make(picture)
                except MediaError as error:
                    found[name, picture] = str(error)
        written = processes.gathered_texts(json.dumps([finished, list(found.items())]))
        known = [damage for text in written for damage in json.loads(text)[1]]
        if known:
            rest = list(self.verification.all_damage().items()) if processes.leads() else []
            raise self._unreadable([*json.loads(processes.shared(json.dumps(rest))), *known], step)
        self.verified = json.loads(written[0])[0]
        self.asked.update(new)

    def _unreadable(self, damage: list[tuple[tuple[str, int], str]], step: int) -> UnreadableError:
        sentences = {(name, picture): sentence for (name, picture), sentence in damage}
        for name, picture in sorted(sentences):
            self.damaged.setdefault(name, []).append(picture)
        named = [sentences[one] for one in sorted(sentences)]
        more = f" And {len(named) - _NAMED} others." if len(named) > _NAMED else ""
        text = " ".join(named[:_NAMED]) + more
        return UnreadableError(text.replace(REPLACE, " Replace it by one of its size.") if step else text)

    def _wanted(self, step: int) -> list[tuple[int, str, int]]:
        """Ranks, kinds and numbers of the pictures that the processes need for a step."""
        found: list[tuple[int, str, int]] = []
        each, last = self.config.train.accumulate, step + 1 == self.config.train.steps
        validates = bool(self.validation and self.validation.due(step + 1))
        evaluates = last or validates or (self._judged() and self.before is None)
        for name, pictures in self.kinds.items():
            numbers = range(step * each, (step + 1) * each) if name != "held" else ()
            for rank in range(processes.count()):
                wanted = [index for number in numbers for index in pictures.batches[number][self._share(rank)]]
                if evaluates and name != "class_pictures":
                    wanted += spread(len(pictures.captions))
                found += [(rank, name, index) for index in wanted]
        return list(dict.fromkeys(found))

    def _share(self, rank: int) -> slice:
        """Of a batch, that of one process."""
        return slice(rank * self.config.train.batch, (rank + 1) * self.config.train.batch)

    @contextmanager
    def again(self) -> Iterator[None]:
        first = dict(self.prior_loss)
        yield
        self.prior_loss = first

    def state(self) -> dict[str, Any]:
        found = {name: pictures.digest(self.damaged.get(name, ())) for name, pictures in self.kinds.items()}
        known = [self.before.evaluated, self.before.trained] if self.before else []
        found |= {"before": known} if known and all(map(finite, known)) else {}
        found |= {"damaged": self.damaged} if self.damaged else {}
        return super().state() | {"recent": list(self.recent)} | found

    def restore(self, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        replaced = state.get("damaged", {})
        for name, pictures in self.kinds.items():
            own = pictures.digest(replaced.get(name, ()))
            if state.get(name, None if name == "held" else own) != own:  # the first versions kept none of the others
                raise InputError(self._others(name))
        super().restore(weights, state)
        self.recent = state.get("recent", [])  # an earlier version's checkpoints have none
        if known := state.get("before"):
            self.before, self.began = FirstLosses(*known), []

    def _others(self, kind: str) -> str:
        """What is wrong where pictures are not those of a checkpoint."""
        data = self.config.data
        if kind == "class_pictures":
            return (
                "prior: its class pictures are not those that this run was trained on so far: prior.folder was "
                "changed, or samples.steps or samples.guidance, by which the base draws them. Put them back, or train "
                "anew."
            )
        if kind == "held":
            return (
                f"data.validation: {data.validation}: its pictures or captions are not those that this run was judged "
                "by so far. Put them back, or train anew."
            )
        return (
            f"data.folder: {data.folder}: its pictures or captions are not those that this run was trained on so "
            "far. Put them back, or train anew."
        )

    def evaluate(self, step: int, micro: int) -> Losses:
        for part in self.parts.values():
            if not part.training:  # telling all its modules takes as long as many a step's arithmetic
                begin_training(part)
        generator = torch.Generator().manual_seed(mix(self.config.seed, step, micro, 0))
        seed_all(mix(self.config.seed, step, micro, processes.rank()))  # for dropout
        number = step * self.config.train.accumulate + micro
        with self._activations():
            loss = self._drawn(self.own, number, generator, self.config.data)
            if self.prior:
                other = torch.Generator().manual_seed(mix(self.config.seed, step, micro, "prior"))
                beside = self._drawn(self.prior, number, other, _PLAIN)
                self.prior_loss[micro] = beside.detach()
                loss = loss + self.config.prior.weight * beside
        return Losses(loss, {})

    def _activations(self) -> AbstractContextManager:
        """Where what the backward pass needs is kept."""
        if not self.config.train.offload_activations:
            return nullcontext()
        return ActivationsAway(chain(*(part.parameters() for part in self.parts.values())), self.accelerator.device)

    def _drawn(self, pictures: Pictures, number: int, generator: torch.Generator, data: TextToImageData) -> Tensor:
        """The loss of a batch, by its number, with all that is drawn for it; each of several processes draws for all
        of them and evaluates its share."""
        chosen, mine = pictures.batches[number], self._share(processes.rank())
        variant = torch.randint(pictures.latents.variants, (len(chosen),), generator=generator).tolist()
        clean, deviation, crops = pictures.latents.take(chosen[mine], variant[mine])
        shape = torch.Size((len(chosen), *clean.shape[1:]))
        if not self.base.family.mean_latents:
            clean = clean + deviation * torch.randn(shape, generator=generator)[mine]
        noise, times = self.noise.draw(shape, generator)
        captions = [spoken(pictures.captions[index], data, generator) for index in chosen]
        source = taken(pictures.sources, chosen[mine], variant[mine])
        return self._loss(clean, noise[mine], times[mine], captions[mine], crops, source)

    def _loss(
        self,
        clean: Tensor,
        noise: Tensor,
        times: Tensor,
        captions: list[str],
        crops: Tensor,
        source: Tensor | None = None,  # (batch, sources, channels, height, width): of the pictures to start from
    ) -> Tensor:
        read = partial(self._embed, captions)
        return self.measure.losses(clean, noise, times, crops, read, self.denoiser, source).mean()

    def _embed(self, captions: list[str]) -> dict[str, Tensor]:
        if self.config.lora.text_encoder or self.word:
            return self.base.family.embed(self.base.pipeline, captions)
        if self.config.data.shuffle_tags:  # more captions than could be kept
            with torch.no_grad():
                return self.base.family.embed(self.base.pipeline, captions)
        return self.base.known(captions)

    def after_step(self, step: int) -> dict[str, float]:
        if self.average:  # a mean at first, for the decay would keep the first weights too long; as diffusers' EMAModel
            decay = min(self.config.train.ema, (1 + step) / (10 + step)) if step else 0.0
            torch._foreach_lerp_(
                list(self.average.values()), [tensor.detach() for tensor in self.named.values()], 1 - decay
            )
        if not self.prior:
            return {}
        return {"loss_prior": processes.mean(torch.stack(list(self.prior_loss.values())).mean()).item()}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The factors are their average for the time of the block, where one is kept."""
        with self._being(list(self.average.values())) if self.average else nullcontext():
            yield

    @contextmanager
    def _being(self, tensors: list[Tensor]) -> Iterator[None]:
        """What is trained has other values for the time of the block."""
        own = list(self.named.values())
        trained = [tensor.detach().clone() for tensor in own]
        with torch.no_grad():
            try:
                torch._foreach_copy_(own, tensors)
                yield
            finally:
                torch._foreach_copy_(own, trained)

    def first_losses(self) -> FirstLosses:
        if self.before is None:
            with self._being(self.began):
                evaluated = self.evaluation_loss()
                apart = self.held and self.config.train.give_up  # else nobody asks for the second
                self.before = FirstLosses(evaluated, self.fixed_loss(self.own) if apart else evaluated)
            self.began = []
        return self.before

    def final_loss(self) -> float:
        return self.evaluation_loss() if self.average else super().final_loss()  # the result is the average

    def validate(self, taken: int) -> dict[str, float]:
        with self.averaged():  # which the result would be
            return super().validate(taken)

    def chosen(self) -> dict[str, Any]:
        """Which weights are the result, where there were validations to choose by."""
        if not (self.validation and self.config.train.validate_every):
            return {}
        return {"kept": self.config.train.keep, "best_step": self.validation.best_step}

    def evaluation_loss(self) -> float:
        """`fixed_loss` of the held-out pictures, or where there are none of those that are trained on."""
        return self.fixed_loss(self.held or self.own)

    def fixed_loss(self, pictures: Pictures) -> float:
        """The loss over fixed pictures, noise and evenly spread timesteps: comparable between runs and steps, and for
        held-out pictures between seeds too."""
        for part in self.parts.values():
            part.eval()
        seed = 0 if pictures is self.held else self.config.seed
        fixed = FixedLosses(self.measure, pictures.latents, pictures.captions, seed, pictures.sources)
        return fixed.mean(self._embed)

    def sample(self, step: int) -> None:
        if not self.config.samples.prompts:
            return
        for part in self.parts.values():
            part.eval()
        with self.base.encoders_on_device(), self.averaged(), lora_scale(self.parts, self.config.samples.scale):
            made = generate(self.base.pipeline, self.config.samples, self.config.data.resolution)
        folder = self.run.folder / "samples" / f"step-{step:08d}"
        shown: dict[str, list[Image]] = {}
        for index, picture in enumerate(made):
            prompt = index // self.config.samples.count
            shown.setdefault(f"samples/{prompt:02d}", []).append(picture.image)
            picture.save(folder / f"{prompt:02d}-{picture.seed}.png", step=step, run=self.run.id)
        self.run.show(step, shown)
        self.run.log(f"drew {len(made)} samples at step {step}")

    def save_result(self, facts: dict[str, Any]) -> None:
        """Writes result/pytorch_lora_weights.safetensors with its metadata, and result.json."""
        described = facts_of(self.config, len(self.captions)) | facts
        more = {"fallbacks": self.optimizer.fallbacks} if isinstance(self.optimizer, PairOptimizer) else {}
        if self.word:
            write_word(self.run.folder / "result", self.config.token.name or "", self.word)
        write_result(self.run.folder / "result", self.parts, self.base.shape, described, more)


def _groups(
    config: TextToImageConfig, named: dict[str, Tensor], parts: list[str], denoiser: str
) -> list[dict[str, Any]]:
    """Of parameters with one rate: a part's own, or that of the first pattern of `optimizer.rates` in their names.

    A group whose rate is `optimizer.learning_rate`, for it has no other, says none.

    Raises:
        InputError: a pattern is found in no name.
    """
    own, rates = config.optimizer.learning_rate, config.optimizer.rates
    words = config.optimizer.text_encoder_learning_rate or own
    found: dict[tuple[str, float], list[tuple[str, Tensor]]] = {
        (part, own if part == denoiser else words): [] for part in parts
    }
    unused = set(rates)
    for name, parameter in named.items():
        part = name.partition(".")[0]
        fits = next((pattern for pattern in rates if matches(pattern, name)), None)
        unused.discard(fits or "")
        rate = rates[fits] if fits else own if part == denoiser else words
        found.setdefault((part, rate), []).append((name, parameter))
    if unused:
        raise InputError(f"optimizer.rates: {', '.join(sorted(unused))}: found in no name of a layer with factors.")
    groups = [{"params": pairs, "lr": rate, "component": part} for (part, rate), pairs in found.items() if pairs]
    for group in groups:
        if group["lr"] == own and (group["component"] == denoiser or not config.optimizer.text_encoder_learning_rate):
            del group["lr"]
    return groups
