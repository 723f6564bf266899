"""What is wrong with the world a configuration points to, found before anything is written or a model is loaded."""

import os
from importlib.util import find_spec

from equipoise.errors import InputError
from equipoise.pipelines import demo
from equipoise.pipelines.instruction_tuning.config import InstructionTuningConfig
from equipoise.pipelines.instruction_tuning.data import read_all


def problems(config: InstructionTuningConfig) -> list[str]:
    from equipoise.pipelines.instruction_tuning.model import load_processor, model_problems, model_type

    found = model_problems(config.model)
    drawn = config.data.file == demo.NAME
    kept, held, wrong = ([], [], []) if drawn else read_all(config.data)
    found += wrong
    if not found and not drawn:
        try:
            from equipoise.pipelines.instruction_tuning.examples import unusable
            from equipoise.pipelines.instruction_tuning.talk import Talk

            processor, every = load_processor(config.model), [*kept, *held]
            talk = Talk(processor, model_type(config.model), config.data.prompt, config.data.max_tokens)
            found += [sentence for example in every for sentence in talk.problems(example)]
            found += [] if found else unusable(every, talk, lambda text: None)
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
    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":  # set by accelerate launch and torchrun
        found.append(
            f"WORLD_SIZE: a run trains in one process, and this is one of {processes}. Start it without accelerate "
            "launch or torchrun."
        )
    return found
