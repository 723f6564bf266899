"""What is wrong with the world a configuration points to, found before anything is written or a model is loaded."""

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

from equipoise import registry
from equipoise.errors import InputError
from equipoise.options import options
from equipoise.pipelines import demo
from equipoise.pipelines.config.sections import objective_problems
from equipoise.pipelines.instruction_tuning.config import InstructionTuningConfig, InstructionTuningData
from equipoise.pipelines.instruction_tuning.data import read_all
from equipoise.pipelines.training import processes
from equipoise.quick import no_garbage_collection

if TYPE_CHECKING:
    from equipoise.pipelines.instruction_tuning.model import Tuned
    from equipoise.pipelines.instruction_tuning.talk import Talk


def problems(config: InstructionTuningConfig) -> list[str]:
    with no_garbage_collection():
        from equipoise.pipelines.instruction_tuning.model import model_problems, outline
        from equipoise.pipelines.instruction_tuning.packing import packing_problem
        from equipoise.pipelines.training.quantized import problems as quantized_problems

    found, tuned = model_problems(config.model), None
    known = not found
    if known:
        try:
            tuned = outline(config)  # layers, parts and components, before any weight is read
        except InputError as error:
            found += str(error).splitlines()
    found += quantized_problems(config.model.quantize)
    if tuned and config.train.packing and (problem := packing_problem(tuned.plain, tuned.plain.config.model_type)):
        found.append(problem)
    found += objective_problems(config) + _coordination_problems(config, tuned) + _rate_problems(config, tuned)
    if config.optimizer.weight_decays and not _decays(config.optimizer.name):
        found.append(
            f"optimizer.weight_decays: {config.optimizer.name} has no weight decay. Leave them out, or use another "
            "optimizer, such as adamw."
        )
    if config.data.file != demo.NAME:
        found += _data_problems(config, known, tuned)
    elif config.data.more:
        found.append(
            "data.more: is for data sets of one's own, and data.file is `demo`. Give one of them as data.file."
        )
    elif known and (config.model.min_pixels or config.model.max_pixels):
        try:
            _talk(config)
        except InputError as error:
            found.append(str(error))
    if config.train.precision == "fp16":
        import torch

        if not torch.cuda.is_available():
            found.append("train.precision: fp16 needs a CUDA device, and none is here. Use no or bf16.")
    if "8bit" in config.optimizer.name and not find_spec("bitsandbytes"):
        found.append(
            f"optimizer.name: {config.optimizer.name} needs the package bitsandbytes. pip install bitsandbytes."
        )
    if config.samples.metric == "rouge_l" and not find_spec("rouge_score"):
        found.append("samples.metric: rouge_l needs the package rouge-score. pip install rouge-score.")
    return found


def _data_problems(config: InstructionTuningConfig, known: bool, tuned: "Tuned | None") -> list[str]:
    """What is wrong with the conversations; `known` says whether there is a model that might not take them."""
    from equipoise.pipelines.instruction_tuning.examples import load_examples, summarized, unanswerable, unpacked

    def read() -> list[str]:
        if config.data.streaming:  # not without knowing what the model takes
            return []
        left_out = [] if config.data.skip_bad else None
        return summarized(read_all(config.data, left_out=left_out, unpacked=unpacked(config.runs))[2])

    if not known:
        return read()
    from equipoise.pipelines.instruction_tuning.model import positions
    from equipoise.pipelines.instruction_tuning.verify import media_ids, token_problems, typical

    try:
        talk = _talk(config)
    except InputError as error:
        return [str(error), *read()]
    limit = positions(tuned.plain, tuned.parts) if tuned else None
    kept, held, found = load_examples(config, talk, lambda text: None, limit, measured=True)
    if not found and limit is not None:
        found += unanswerable(held, talk, config.samples, limit)
    if not found and tuned:
        found += token_problems(talk, typical(kept), media_ids(tuned.plain.config))
    return found


def _talk(config: InstructionTuningConfig) -> "Talk":
    from equipoise.pipelines.instruction_tuning.media import Frames
    from equipoise.pipelines.instruction_tuning.model import load_processor, model_type, no_videos
    from equipoise.pipelines.instruction_tuning.talk import Talk

    processor, data = load_processor(config.model), config.data
    frames, no = Frames(data.fps, data.frames), no_videos(processor, config.model)
    return Talk(processor, model_type(config.model), data.prompt, data.max_tokens, frames, no)


def notes(config: InstructionTuningConfig) -> list[str]:
    """What will be learnt of some conversations, and what of the data will be cut or left out."""
    if config.data.file == demo.NAME:  # which would have to be drawn
        return []
    from equipoise.pipelines.instruction_tuning.examples import load_examples
    from equipoise.pipelines.instruction_tuning.model import outline, positions
    from equipoise.pipelines.instruction_tuning.verify import endless, summary, typical

    talk, said, tuned = _talk(config), [], outline(config)
    kept, _, _ = load_examples(config, talk, said.append, positions(tuned.plain, tuned.parts))
    return [*said, summary(talk, typical(kept), seen=False), *filter(None, [endless(talk, kept)])]


def examples(config: InstructionTuningConfig) -> int | None:
    """How many conversations are trained on; None of a stream."""
    if config.data.streaming:
        return None
    from equipoise.pipelines.instruction_tuning.examples import load_examples, unpacked
    from equipoise.pipelines.instruction_tuning.model import outline, positions

    if config.data.file != demo.NAME and not config.data.skip_bad:
        return len(read_all(config.data, decode=False, unpacked=unpacked(config.runs))[0])
    tuned = outline(config)
    return len(load_examples(config, _talk(config), lambda text: None, positions(tuned.plain, tuned.parts))[0])


def doubts(config: InstructionTuningConfig) -> list[str]:
    stream = (
        [
            f"data.streaming: {config.data.buffer:,} conversations and those held out are looked at now; what is wrong "
            "with later ones shows when they are read, and ends the run unless data.skip_bad is set."
        ]
        if config.data.streaming
        else _data_doubts(config.data, config.runs)
    )
    return stream + _shard_doubts(config) + (_tied_doubts(config) if config.lora.targets else [])


def _shard_doubts(config: InstructionTuningConfig) -> list[str]:
    if not config.model.shard or processes.count() > 1:
        return []
    return [
        "model.shard: one process trains this run, and holds all weights. Start several, with torchrun or accelerate "
        "launch: docs/distributed.md."
    ]


def _tied_doubts(config: InstructionTuningConfig) -> list[str]:
    from equipoise.pipelines.instruction_tuning.model import outline, tied

    return [
        f"lora.targets: {name} is tied: the head and the embedding are one weight, so that merging the adapter into "
        "the model changes both. Use it unmerged, or untie them first: docs/instruction_tuning.md."
        for name in tied(outline(config).plain)
    ]


def _data_doubts(data: InstructionTuningData, runs: str) -> list[str]:
    if data.file == demo.NAME:
        return []
    from equipoise.pipelines.instruction_tuning.examples import unpacked

    train, held, _ = read_all(data, decode=False, unpacked=unpacked(runs))
    for file in [data.file, *data.more]:
        if data.validation is not None and _same(file, data.validation):
            key = "data.more" if file in data.more else "data.file"
            return [f"data.validation: is {key} itself, so that what is trained on is also judged by: {file}."]
    if data.validation is None and len(train) == 1 and train == held:
        return [f"{data.file}: holds one conversation, which is both trained on and judged by. Give data.validation."]
    return []


def _same(one: str, other: str) -> bool:
    """Whether two data sets are one; a pattern, or one at the hub, is no file."""
    return one == other or (os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other))


def _decays(optimizer: str) -> bool:
    return any(option.name == "weight_decay" for option in options(registry.load("optimizers", optimizer)))


def _rate_problems(config: InstructionTuningConfig, tuned: "Tuned | None") -> list[str]:
    """Whether an optimizer of LoRA pairs would train a language model's own weights at the rate of its factors."""
    from equipoise.optimizers.parts.pair_optimizer import PairOptimizer

    chosen = config.optimizer
    if tuned is None or not tuned.language_weights or "outside_learning_rate" not in chosen.left_empty:
        return []
    free = set(map(id, tuned.language_weights.values()))
    rated = all(name in chosen.rates for name, some in tuned.components.items() if free & set(map(id, some.values())))
    if rated or not issubclass(registry.load("optimizers", chosen.name), PairOptimizer):
        return []
    return [
        f"optimizer.outside_learning_rate: {chosen.name} treats LoRA pairs, and weights of the language model that are "
        "trained in full are in none. Give them a rate of their own, such as 1e-5."
    ]


def _coordination_problems(config: InstructionTuningConfig, tuned: "Tuned | None") -> list[str]:
    from equipoise.optimizers.parts.optional import Perturbing

    chosen = config.coordinator
    coordinator = registry.load("coordinators", chosen.name)(**chosen.options)
    measures = any(map(coordinator.measures, range(config.train.steps)))
    if tuned and "language" not in tuned.components and (coordinator.two_sided or measures):
        return [
            f"coordinator.name: {chosen.name} sets the language model's side against the encoder's, and nothing of the "
            "language model is trained. Use constant, without options."
        ]
    twice = issubclass(registry.load("optimizers", config.optimizer.name), Perturbing)
    if twice and any(coordinator.weight(step) for step in range(config.train.steps)):
        return [
            f"coordinator.name: {chosen.name} with a regularizer and {config.optimizer.name} both want further "
            "evaluations of a step, and cannot be combined. Use commit_clr, or another optimizer."
        ]
    if coordinator.within and config.train.precision == "fp16":
        return [
            "coordinator.options.within: a step on trial does not go with the loss scaling of fp16. Use "
            "train.precision bf16 or no, or leave within out."
        ]
    return []
