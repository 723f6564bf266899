"""Which of transformers' multimodal language models instruction tuning can split into components.

    python benchmarks/architectures.py            # all; --only llava gemma3 for some

Every architecture is built as its configuration class has it by default, of shapes alone, and given LoRA and components
as a run would. Prints a Markdown table: trained numbers of the encoder side and the language side, or why not. Models
whose configuration cannot be built without arguments or further packages are left out, and counted.
"""

import argparse
import os
import warnings

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from transformers import AutoModelForMultimodalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from equipoise.errors import InputError
from equipoise.pipelines import config
from equipoise.pipelines.instruction_tuning.model import adapt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES), metavar="MODEL_TYPE")
    settings = config.load("instruction_tuning/demo", ["coordinator=constant"])
    warnings.simplefilter("ignore")  # of parts that are on their way out of transformers
    split, refused, unbuilt = 0, 0, []
    print("| model_type | weights, billions | encoder, millions | language, millions |\n| --- | ---: | ---: | ---: |")
    for kind in parser.parse_args().only:
        try:
            with torch.device("meta"):
                model = AutoModelForMultimodalLM.from_config(CONFIG_MAPPING[kind]()).requires_grad_(False)
        except Exception:  # whatever a configuration without arguments raises
            unbuilt.append(kind)
            continue
        weights = sum(parameter.numel() for parameter in model.parameters()) / 1e9
        try:
            with torch.device("meta"):
                parts = adapt(model, settings).components
            split += 1
            language = sum(p.numel() for p in parts["language"].values())
            before = sum(p.numel() for inside in parts.values() for p in inside.values()) - language
            numbers = [f"{before / 1e6:.1f}", f"{language / 1e6:.1f}"]
        except InputError as error:
            refused += 1
            numbers = [str(error).partition(": ")[2].partition(". ")[0], ""]
        print(f"| {kind} | {weights:.1f} | {' | '.join(numbers)} |", flush=True)
    print(
        f"\ntransformers {transformers.__version__}: {split} split, {refused} refused, {len(unbuilt)} not built:",
        end=" ",
    )
    print(", ".join(unbuilt))


if __name__ == "__main__":
    main()
