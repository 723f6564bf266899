"""What is wrong with the world a configuration points to, found before anything is written or a model is loaded."""

import os
from importlib.util import find_spec

from equipoise import registry
from equipoise.errors import InputError
from equipoise.options import options
from equipoise.pipelines import demo
from equipoise.pipelines.config.sections import objective_problems
from equipoise.pipelines.instruction_tuning.config import InstructionTuningConfig
from equipoise.pipelines.instruction_tuning.data import read_all
from equipoise.quick import no_garbage_collection


def problems(config: InstructionTuningConfig) -> list[str]:
    with no_garbage_collection():
        from equipoise.pipelines.instruction_tuning.model import load_processor, model_problems, model_type, outline

    found = model_problems(config.model)
    known = not found
    if known:
        try:
            outline(config)  # layers, parts and components, before any weight is read
        except InputError as error:
            found += str(error).splitlines()
    found += objective_problems(config) + _coordination_problems(config)
    if config.optimizer.weight_decays and not _decays(config.optimizer.name):
        found.append(
            f"optimizer.weight_decays: {config.optimizer.name} has no weight decay. Leave them out, or use another "
            "optimizer, such as adamw."
        )
    if config.data.file != demo.NAME:
        talk = None
        if known:
            from equipoise.pipelines.instruction_tuning.examples import unusable
            from equipoise.pipelines.instruction_tuning.talk import Talk

            try:
                processor = load_processor(config.model)
                talk = Talk(processor, model_type(config.model), config.data.prompt, config.data.max_tokens)
            except InputError as error:
                found.append(str(error))
        kept, held, wrong = read_all(config.data, judge=talk and talk.problems)
        found += wrong
        if talk:
            found += dict.fromkeys(unusable([*kept, *held], talk, lambda text: None))
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


def doubts(config: InstructionTuningConfig) -> list[str]:
    data = config.data
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
    return []
