"""Tunes a multimodal language model on conversations: load → adapt → train, in balance → answer → save."""

# peft, accelerate and transformers annotate too narrowly.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

import copy
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from equipoise.balancing.objective import Losses
from equipoise.coordination.balance import (
    Balance,
    Prediction,
    measure,
    normalized_gradients,
    sides,
    swapped,
    undisturbed,
)
from equipoise.coordination.commit import look_ahead
from equipoise.coordination.components import architecture
from equipoise.coordination.norms import with_norms
from equipoise.coordination.sides import Watch, resting
from equipoise.errors import ConfigError, InputError
from equipoise.lora.names import role
from equipoise.pipelines.files import write_atomic
from equipoise.pipelines.instruction_tuning.ahead import BatchesAhead
from equipoise.pipelines.instruction_tuning.card import public_base
from equipoise.pipelines.instruction_tuning.config import InstructionTuningConfig
from equipoise.pipelines.instruction_tuning.data import Conversation
from equipoise.pipelines.instruction_tuning.evaluate import Answer, answer, answer_loss, mean
from equipoise.pipelines.instruction_tuning.examples import asked_of, keep_measured, load_examples
from equipoise.pipelines.instruction_tuning.media import Frames
from equipoise.pipelines.instruction_tuning.mixing import mixed
from equipoise.pipelines.instruction_tuning.model import (
    Tuned,
    adapt,
    is_sharded,
    load_model,
    load_processor,
    no_videos,
    positions,
)
from equipoise.pipelines.instruction_tuning.packing import pack, width
from equipoise.pipelines.instruction_tuning.result import describe, write_result
from equipoise.pipelines.instruction_tuning.sharding import shard
from equipoise.pipelines.instruction_tuning.streaming import Stream
from equipoise.pipelines.instruction_tuning.talk import IGNORED, Talk
from equipoise.pipelines.instruction_tuning.verify import verify
from equipoise.pipelines.pipeline import Outcome
from equipoise.pipelines.progress import progress
from equipoise.pipelines.runs.run import Run
from equipoise.pipelines.training import processes
from equipoise.pipelines.training.loop import train_loop
from equipoise.pipelines.training.state import OptimizedWork, make_accelerator, mix, number, seed_all

_EVALUATED = 64  # held-out conversations behind "loss before" and "loss after"
_MIXED = 50  # batches whose conversations are sorted by length together


def train(config: InstructionTuningConfig, run: Run) -> Outcome:
    accelerator = make_accelerator(config.train.precision)
    processor = load_processor(config.model)
    model = load_model(config.model, config.train.precision, config.components)
    data = config.data
    frames = Frames(data.fps, data.frames)
    no = no_videos(processor, config.model)
    talk = Talk(processor, model.config.model_type, data.prompt, data.max_tokens, frames, no)

    tell = partial(_tell, run)
    parts = architecture(talk.model_type, [name for name, _ in model.named_parameters()], config.components, model)
    keep_measured()
    with accelerator.main_process_first():  # it may have to draw them
        kept, held, problems = load_examples(config, talk, tell, positions(model, parts))
    if problems:  # since the check
        raise ConfigError(problems)
    tuned = adapt(model, config)
    if is_sharded(config.model):
        shard(tuned, accelerator.device)
    work = InstructionTuningWork(config, run, accelerator, tuned, talk, kept, held)
    checked = verify(talk, tuned.model, kept, config.train.batch, accelerator.autocast, config.train.packing)
    run.log(f"self-check: {checked}")
    before = None
    if processes.leads() or work.together:
        before = work.evaluation_loss(), mean(work.answers("answers of the untuned model"))
    started = time.perf_counter()
    try:
        outcome = train_loop(run, work, config)
    finally:
        if work.stream is not None:
            work.stream.close()
    if outcome.state == "stopped" or before is None:
        return outcome
    return _finish(work, outcome, *before, time.perf_counter() - started)


def _finish(
    work: "InstructionTuningWork", outcome: Outcome, loss_before: float, before: float, seconds: float
) -> Outcome:
    """Saves what was learnt and answers the held-out questions; of several processes the first alone writes."""
    config = work.config
    work.settle()
    facts = {
        "state": outcome.state,
        "step": outcome.step,
        "loss_before": number(loss_before),
        "loss_after": number(work.final_loss()),
        "kept": config.train.keep,
        "best_step": work.validation.best_step if work.validation and config.train.validate_every else None,
        "metric": config.samples.metric,
        "score_before": number(before),
        "seconds": seconds,
    }
    work.save_result(facts)  # first: whatever goes wrong with answers, what was learnt stays
    answers = work.answers("answers of the tuned model")
    after = mean(answers)
    own = work.answers("answers to samples.prompts", work.prompted) if work.prompted else []
    work.write_answers(outcome.step or 0, [*own, *answers])
    work.describe_result(facts | {"score_after": number(after), "questions": len(answers)})
    scored = f"{config.samples.metric.replace('_', '-')} accuracy" if config.samples.metric != "rouge_l" else "ROUGE-L"
    asked = "1 held-out question" if len(answers) == 1 else f"{len(answers)} held-out questions"
    found = f" On {asked}, {scored} {after:.1%}; untuned {before:.1%}."
    return replace(outcome, message=outcome.message + found)


class InstructionTuningWork(OptimizedWork[InstructionTuningConfig]):
    """One run's tuning: see `equipoise.pipelines.training.loop.Work` for when each method is called."""

    tensors = "parameters of this model"

    def __init__(
        self,
        config: InstructionTuningConfig,
        run: Run,
        accelerator: Accelerator,
        tuned: Tuned,
        talk: Talk,
        kept: list[Conversation],
        held: list[Conversation],
    ):
        self.model, self.tuned, self.talk, self.kept_examples, self.held = tuned.model, tuned, talk, kept, held
        self.together = tuned.sharded
        frozen = [parameter for parameter in tuned.model.parameters() if not parameter.requires_grad]
        super().__init__(config, run, accelerator, tuned.named, _groups(config, tuned), frozen=frozen)
        if config.train.gradient_checkpointing:
            enable = getattr(tuned.plain, "activation_checkpointing_enable", tuned.plain.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        if config.train.gradient_checkpointing or tuned.sharded:  # the way back is then one for all processes' batches
            tuned.plain.enable_input_require_grads()
        if len(kept) < (whole := config.train.batch * processes.count()) and processes.count() > 1:
            raise InputError(
                f"train.batch: {processes.count()} processes take {whole} conversations a step, and there are "
                f"{len(kept)} to train on. Use a smaller batch or fewer processes."
            )
        self.lengths = torch.tensor([talk.length(example) for example in kept])
        total = config.train.steps * config.train.accumulate
        self.batches = BatchesAhead(talk, self._chosen, total, config.train.workers)
        self.components = {name: list(inside.values()) for name, inside in tuned.components.items()}
        if self.coordinator.two_sided:
            sides(self.components)
        words = [(example.kind, [p.name for p in example.media], example.turns, example.system) for example in kept]
        self.digest = hashlib.blake2b(repr(words).encode(), digest_size=16).hexdigest()
        self.stream: Stream | None = None
        if config.data.streaming:
            whole = config.train.batch * processes.count()
            limit = positions(tuned.plain, tuned.parts)
            self.stream = Stream(config, talk, held, whole, partial(_tell, run), limit)
            self.digest = self.stream.digest
        self.random = has_dropout(tuned.model)
        self.watch = Watch()
        self.decoders = [
            m for n, m in tuned.plain.named_modules() if n.split(".")[-1] in ("language_model", "text_model")
        ]
        self.still = [
            module
            for module in _modules(tuned, tuned.parts.tower)
            if not any(p.requires_grad for p in module.parameters()) and not has_dropout(module)
        ]
        language = {id(tensor) for tensor in self.components.get("language", ())}
        self.encoders = [  # what comes before the language model, apart from those above
            module
            for module in _modules(tuned, (*tuned.parts.tower, *tuned.parts.connector))
            if module not in self.still and not any(id(p) in language for p in module.parameters())
        ]
        # The last of this step's batches, if it is measured, with what training gave of it: the prediction and the
        # encoders' outputs. The last alone, so that memory does not grow with train.accumulate, as in a Trainer.
        self._probed: tuple[dict[str, Tensor], Prediction | None, FrozenOutputs, FrozenOutputs] | None = None

    def evaluate(self, step: int, micro: int) -> Losses:
        own = [processes.rank()] if processes.rank() else []
        seed_all(mix(self.config.seed, step, micro, *own))  # for dropout
        batch = self._moved_to_device(self.batches.get(step * self.config.train.accumulate + micro))
        self.model.train()
        last = micro == self.config.train.accumulate - 1
        probed = last and self.coordinator.measures(step) and not self._moved
        outputs = FrozenOutputs(self.still if probed else [])
        encoded = FrozenOutputs(self.encoders if probed else [])  # the same at (T_t, S_t) and at (T_{t+1}, S_t)
        with outputs.reused(), nullcontext() if self.random else encoded.reused():
            logits, labels, sample = self._forward(batch)
        if probed:
            base = None if self.random else self._prediction(batch, logits.detach(), sample)
            self._probed = batch, base, outputs, encoded
        loss = answer_loss(logits, labels, sample)
        if not loss.requires_grad:  # of text alone, where all that is trained reads media
            loss.requires_grad_()  # its backward pass then reaches no parameter
        return Losses(loss, {})

    _moved = False  # while an optimizer has the same batch evaluated at other weights

    @contextmanager
    def again(self) -> Iterator[None]:
        self._moved = True
        try:
            yield
        finally:
            self._moved = False

    def step(self, step: int) -> dict[str, float]:
        factors = self.coordinator.factors(list(self.components))
        with resting(self.components, factors):
            values = super().step(step)
        if self._balance is not None and all(factors.values()):
            gradients = {name: values.get(f"gradient_{name}", 0.0) for name in self.components}
            if words := self.watch.observe(self._balance, gradients):
                _tell(self.run, words)
        self._balance = None
        return values

    def amend(self, step: int) -> None:
        """Where the regulariser is taken within the step, takes one on trial for its gradient, and takes it back."""
        if not (self.coordinator.within and self.coordinator.weight(step)):
            return
        torch._foreach_copy_(self.good, [tensor.detach() for tensor in self.kept.values()])
        whole = {name: tensor.grad.clone() for name, tensor in self.named.items() if tensor.grad is not None}
        state = copy.deepcopy(self.optimizer.state_dict())
        if self.config.train.clip:
            torch.nn.utils.clip_grad_norm_(self.named.values(), self.config.train.clip)
        self.optimizer.step()
        for name, gradient in whole.items():
            self.named[name].grad = gradient
        self._balance = self._measure(step)
        self.optimizer.load_state_dict(state)
        with torch.no_grad():
            torch._foreach_copy_(list(self.kept.values()), self.good)

    def after_step(self, step: int) -> dict[str, float]:
        measured = {}
        if self.coordinator.measures(step):
            self._balance = self._balance or self._measure(step)
            measured = self.coordinator.observe(step, self._balance)
        self.coordinator.stepped(self.components, step, self.config.train.steps)
        return measured

    _balance: Balance | None = None  # of the step that is being taken

    def _evaluate_all(self, step: int) -> tuple[dict[str, float], dict[str, Any]]:
        values, logged = super()._evaluate_all(step)
        if self.coordinator.measures(step):
            scale = self.accelerator.scaler.get_scale() if self.accelerator.scaler else 1.0
            found = normalized_gradients(self.components)
            logged |= {f"gradient_{name}": value / scale for name, value in found.items()}
        return values, logged

    def _measure(self, step: int) -> Balance:
        """κ of this step, from its last batch; with a regulariser, whose gradient is added to what is there."""
        old = dict(zip(self.named, self.good, strict=True))  # the weights before the step, which are kept in any case
        before = {name: [old[n] for n in inside] for name, inside in self.tuned.components.items()}
        weight, metric, each = self.coordinator.weight(step), self.coordinator.metric, self.coordinator.each
        assert self._probed is not None
        (batch, base, outputs, encoded), self._probed = self._probed, None

        def predict() -> Prediction:
            with outputs.reused():
                logits, _, sample = self._forward(batch)
            return Prediction(logits, sample)

        def predict_anew() -> Prediction:
            with encoded.reused():
                return predict()

        with undisturbed(self.model, checkpointing=weight > 0):
            if base is None:
                with outputs.reused(), encoded.reused():
                    base = self._before(batch, before)
            if weight:
                ascends = self.coordinator.ascends
                return look_ahead(predict, self.components, before, base, weight, metric, self.backward, ascends, each)
            return measure(predict, self.components, before, metric, base, predict_anew, each)

    @torch.no_grad()
    def _before(self, batch: dict[str, Tensor], before: dict[str, list[Tensor]]) -> Prediction:
        """The prediction with the weights before the step."""
        pairs = [(new, old) for name in before for new, old in zip(self.components[name], before[name], strict=True)]
        with swapped(*zip(*pairs, strict=True)):
            logits, _, sample = self._forward(batch)
            return self._prediction(batch, logits, sample)

    def _prediction(self, batch: dict[str, Tensor], logits: Tensor, sample: Tensor) -> Prediction:
        return with_norms(Prediction(logits, sample), batch, self._embeddings, self.tuned.plain.config)

    _embeddings: Tensor | None = None  # what the language model was given last: (batch, tokens, width)

    def _forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(logits of the answers' tokens, what they should be, which sample each belongs to)."""
        packed = None
        if self.config.train.packing:
            packed = pack(batch, width(batch, self.talk.max_tokens), self.tuned.plain)
            batch = packed.batch
        labels = batch["labels"][:, 1:]
        mask = labels != IGNORED
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        hook = None
        if self.decoders:

            def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
                given = kwargs.get("inputs_embeds")
                given = None if given is None else given.detach()
                self._embeddings = given if given is None or packed is None else packed.padded(given)

            hook = self.decoders[0].register_forward_pre_hook(keep, with_kwargs=True)
        try:
            with self.accelerator.autocast():
                logits = self.model(**inputs, use_cache=False).logits[:, :-1]
        finally:
            if hook is not None:
                hook.remove()
        return logits[mask], labels[mask], mask.nonzero()[:, 0] if packed is None else packed.sample[:, 1:][mask]

    def _batch(self, examples: list[Conversation]) -> dict[str, Tensor]:
        return self._moved_to_device(self.talk.training_batch(examples))

    def _moved_to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(self.accelerator.device) for name, value in batch.items()}

    def _chosen(self, number: int) -> list[Conversation]:
        """The examples of a batch, or this process's share of them. An epoch is a permutation, cut into batches of
        similar length in random order, and known from the seed and its number. What is too little for a batch is left
        out before lengths are looked at, every conversation as often as any other."""
        if self.stream is not None:
            return self.stream.batch(number)[processes.rank() :: processes.count()]
        size = self.config.train.batch * processes.count()
        each = max(1, len(self.kept_examples) // size)
        epoch, index = divmod(number, each)
        if self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(mix(self.config.seed, "epoch", epoch))
            order = self._order(epoch, size, generator)
            blocks = [block[self.lengths[block].argsort(stable=True)] for block in order.split(size * _MIXED)]
            batches = [batch for block in blocks for batch in block.split(size)]
            self._epoch = epoch, [batches[i] for i in torch.randperm(len(batches), generator=generator)]
        batches = self._epoch[1]
        batch = batches[index % len(batches)]
        return [self.kept_examples[i] for i in batch[processes.rank() :: processes.count()]]

    _epoch: tuple[int, list[Tensor]] = (-1, [])

    def _order(self, epoch: int, size: int, generator: torch.Generator) -> Tensor:
        """The examples of an epoch, of which there are as many as fill batches of this size."""
        count = len(self.kept_examples)
        if weights := self.config.data.weights:
            sources = torch.tensor([example.source for example in self.kept_examples])
            chosen = mixed(sources, weights, epoch, count - count % size if count > size else count, self.config.seed)
            return chosen[torch.randperm(len(chosen), generator=generator)]
        order = torch.randperm(count, generator=generator)
        return order[~torch.isin(order, self._left_out(epoch, count % size if count > size else 0))]

    def _left_out(self, epoch: int, count: int) -> Tensor:
        """The next `count` of a permutation that holds for all epochs."""
        total = len(self.kept_examples)
        turns = torch.randperm(total, generator=torch.Generator().manual_seed(mix(self.config.seed, "left out")))
        return turns[torch.arange(epoch * count, (epoch + 1) * count) % total]

    @torch.no_grad()
    def evaluation_loss(self) -> float:
        """The loss over the first held-out conversations: comparable between runs and steps."""
        self.model.eval()
        chosen, total = self.held[:_EVALUATED], 0.0
        size = min(16, self.config.train.batch)
        for start in range(0, len(chosen), size):
            part = chosen[start : start + size]
            total += answer_loss(*self._forward(self._batch(part))).item() * len(part)
        return total / len(chosen)

    def state(self) -> dict[str, Any]:
        # the regulariser's gradient of the last step, which the next one takes
        waiting = {name: tensor.grad for name, tensor in self.named.items() if tensor.grad is not None}
        streamed = {"stream": self.stream.state()} if self.stream is not None else {}
        return super().state() | {"waiting": waiting, "conversations": self.digest, **streamed}

    def restore(self, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        if state.get("conversations", self.digest) != self.digest:
            raise InputError(
                f"{self.config.data.file}: its conversations are not those that this run was trained on so far. "
                "Put them back, or train anew."
            )
        super().restore(weights, state)
        if self.stream is not None:
            self.stream.restore(state["stream"])
        for name, gradient in state["waiting"].items():
            self.named[name].grad = gradient.to(self.named[name])

    def answers(self, what: str, chosen: list[Conversation] | None = None) -> list[Answer]:
        """Answers to held-out questions, with a progress bar."""
        chosen = self.held[: self.config.samples.count] if chosen is None else chosen
        precision = self.accelerator.autocast if self.config.train.precision != "no" else nullcontext
        quiet = not processes.leads()
        with progress(what, "answer", total=len(chosen), quiet=quiet) as bar, torch.random.fork_rng():
            return answer(self.model, self.talk, chosen, self.config.samples, bar.update, precision, self.together)

    def sample(self, step: int) -> None:
        shown = self.config.samples.shown
        chosen = self.prompted or self.held[:shown]
        self.write_answers(step, self.answers("sample", chosen))

    @property
    def prompted(self) -> list[Conversation]:
        """samples.prompts asked of the first held-out media; empty without any."""
        samples = self.config.samples
        return asked_of(self.held, samples, samples.shown) if samples.prompts else []

    def write_answers(self, step: int, answers: list[Answer]) -> None:
        """Writes samples/step-…/answers.jsonl, in the first process."""
        if not processes.leads():
            return
        folder = self.run.folder / "samples" / f"step-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(a.record(), ensure_ascii=False) + "\n" for a in answers)
        write_atomic(folder / "answers.jsonl", lines)
        judged = [a for a in answers if a.score is not None]
        scored = f", mean score {mean(judged):.3f}" if judged else ""
        self.run.log(f"answered {len(answers)} questions at step {step}{scored}")

    def save_result(self, facts: dict[str, Any]) -> None:
        """Writes result/, in the first process."""
        if processes.leads():
            write_result(Path(self.run.folder / "result"), self.tuned, self._described(facts))

    def describe_result(self, facts: dict[str, Any]) -> None:
        """Says more of a result that is saved, likewise."""
        if processes.leads():
            describe(Path(self.run.folder / "result"), self._described(facts))

    def _described(self, facts: dict[str, Any]) -> dict[str, Any]:
        chosen = self.config.optimizer
        return {
            "base": public_base(self.config),  # of a folder on this machine, the name alone
            "optimizer": chosen.name,
            "learning_rate": chosen.learning_rate,
            "coordinator": self.config.coordinator.name,
            "rank": self.config.lora.rank,
            **facts,
        }


class FrozenOutputs:
    """The outputs of modules for one batch, so that they run once, however often the rest of the model does."""

    def __init__(self, modules: list[nn.Module]):
        self.modules = modules
        self.kept: dict[nn.Module, list[Any]] = {module: [] for module in modules}  # one for each call

    @contextmanager
    def reused(self) -> Iterator[None]:
        calls = dict.fromkeys(self.modules, 0)

        def recall(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            kept, number = self.kept[module], calls[module]
            calls[module] += 1
            if number == len(kept):
                kept.append(forward(*args, **kwargs))
            found = kept[number]
            return found if isinstance(found, Tensor) else copy.copy(found)  # Qwen2-VL changes what its tower returns

        for module in self.modules:
            module.forward = partial(recall, module, module.forward)
        try:
            yield
        finally:
            for module in self.modules:
                del module.forward  # the class's own shows again


def _tell(run: Run, text: str) -> None:
    run.log(text)
    if processes.leads():
        print(text, file=sys.stderr)


def _modules(tuned: Tuned, names: Sequence[str]) -> list[nn.Module]:
    """The modules of those names, as an architecture has them, that lie in no other of them."""
    found = {n: m for n, m in tuned.plain.named_modules() if any(f".{n}".endswith(f".{name}") for name in names)}
    return [m for n, m in found.items() if not any(n.startswith(f"{other}.") for other in found)]


def _groups(config: InstructionTuningConfig, tuned: Tuned) -> list[dict[str, Any]]:
    """Of parameters with one rate; with LoRA+ the factors B of a component come after all else of it."""
    chosen, groups = config.optimizer, []
    for component, inside in tuned.components.items():
        own: dict[str, Any] = {"component": component}
        if component in chosen.rates:
            own["lr"] = chosen.rates[component]
        if component in chosen.weight_decays:
            own["weight_decay"] = chosen.weight_decays[component]
        up = {n: p for n, p in inside.items() if chosen.loraplus_lr_ratio and (role(n) or "A")[0] == "B"}
        groups.append({**own, "params": [(n, p) for n, p in inside.items() if n not in up]})
        if up and chosen.loraplus_lr_ratio:
            rate = chosen.loraplus_lr_ratio * own.get("lr", chosen.learning_rate)
            groups.append({**own, "params": list(up.items()), "lr": rate})
    return groups


def has_dropout(model: nn.Module) -> bool:
    """Whether a forward pass while training may differ from one in evaluation mode. In doubt it does."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return True
        if isinstance(module, nn.modules.batchnorm._NormBase):
            return True
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float) and value > 0:
                return True
    return False
