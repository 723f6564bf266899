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
from equipoise.quick import no_garbage_collection

if TYPE_CHECKING:
    from equipoise.pipelines.instruction_tuning.model import Tuned
    from equipoise.pipelines.instruction_tuning.talk import Talk


def problems(config: InstructionTuningConfig) -> list[str]:
    with no_garbage_collection():
        from equipoise.pipelines.instruction_tuning.model import model_problems, outline

    found, tuned = model_problems(config.model), None
    known = not found
    if known:
        try:
            tuned = outline(config)  # layers, parts and components, before any weight is read
        except InputError as error:
            found += str(error).splitlines()
    found += objective_problems(config) + _coordination_problems(config)
    if config.optimizer.weight_decays and not _decays(config.optimizer.name):
        found.append(
            f"optimizer.weight_decays: {config.optimizer.name} has no weight decay. Leave them out, or use another "
            "optimizer, such as adamw."
        )
    if config.data.file != demo.NAME:
        found += _data_problems(config, known, tuned)
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
    if not known:
        return read_all(config.data, left_out=[] if config.data.skip_bad else None)[2]
    from equipoise.pipelines.instruction_tuning.examples import load_examples, unanswerable
    from equipoise.pipelines.instruction_tuning.model import positions
    from equipoise.pipelines.instruction_tuning.verify import media_ids, token_problems, typical

    try:
        talk = _talk(config)
    except InputError as error:
        return [str(error), *read_all(config.data)[2]]
    limit = positions(tuned.plain, tuned.parts) if tuned else None
    kept, held, found = load_examples(config, talk, lambda text: None, limit, measured=True)
    if not found and limit is not None:
        found += unanswerable(held, talk, config.samples, limit)
    if not found and tuned:
        found += token_problems(talk, typical(kept), media_ids(tuned.plain.config))
    return found


def _talk(config: InstructionTuningConfig) -> "Talk":
    from equipoise.pipelines.instruction_tuning.model import load_processor, model_type
    from equipoise.pipelines.instruction_tuning.talk import Talk

    processor = load_processor(config.model)
    return Talk(processor, model_type(config.model), config.data.prompt, config.data.max_tokens)


def notes(config: InstructionTuningConfig) -> list[str]:
    """What will be learnt of some conversations, and what of the data will be cut or left out."""
    if config.data.file == demo.NAME:  # which would have to be drawn
        return []
    from equipoise.pipelines.instruction_tuning.examples import load_examples
    from equipoise.pipelines.instruction_tuning.model import outline, positions
    from equipoise.pipelines.instruction_tuning.verify import summary, typical

    talk, said, tuned = _talk(config), [], outline(config)
    kept, _, _ = load_examples(config, talk, said.append, positions(tuned.plain, tuned.parts))
    return [*said, summary(talk, typical(kept), seen=False)]


def doubts(config: InstructionTuningConfig) -> list[str]:
    return _data_doubts(config.data) + (_tied_doubts(config) if config.lora.targets else [])


def _tied_doubts(config: InstructionTuningConfig) -> list[str]:
    from equipoise.pipelines.instruction_tuning.model import outline, tied

    return [
        f"lora.targets: {name} is tied: the head and the embedding are one weight, so that merging the adapter into "
        "the model changes both. Use it unmerged, or untie them first: docs/instruction_tuning.md."
        for name in tied(outline(config))
    ]


def _data_doubts(data: InstructionTuningData) -> list[str]:
    if data.file == demo.NAME:
        return []
    train, held, _ = read_all(data, decode=False)
    if data.validation is not None and os.path.samefile(data.file, data.validation):
        return [f"data.validation: is data.file itself, so that what is trained on is also judged by: {data.file}."]
    if data.validation is None and len(train) == 1 and train == held:
        return [f"{data.file}: holds one conversation, which is both trained on and judged by. Give data.validation."]
    return []


def _decays(optimizer: str) -> bool:
    return any(option.name == "weight_decay" for option in options(registry.load("optimizers", optimizer)))


def _coordination_problems(config: InstructionTuningConfig) -> list[str]:
    from equipoise.optimizers.parts.optional import Perturbing

    chosen = config.coordinator
    coordinator = registry.load("coordinators", chosen.name)(**chosen.options)
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
