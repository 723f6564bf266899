"""A result for others: the adapter as it is, or merged into plain weights, each with its processor and a model card."""

# peft and transformers annotate too narrowly.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from equipoise.errors import InputError
from equipoise.pipelines.files import explained
from equipoise.pipelines.instruction_tuning.card import card, public_base
from equipoise.pipelines.instruction_tuning.config import InstructionTuningConfig
from equipoise.pipelines.instruction_tuning.data import Conversation, Turn
from equipoise.pipelines.instruction_tuning.evaluate import known_stops
from equipoise.pipelines.instruction_tuning.model import load_model, load_processor, old_names, own_dtype, tied
from equipoise.pipelines.instruction_tuning.result import ADAPTER, ADAPTER_CONFIG, IN_FULL, load_result, missing
from equipoise.pipelines.instruction_tuning.talk import Talk


def export(result: Path, config: InstructionTuningConfig, format: str, output: Path) -> None:
    """Writes a folder, which is there complete or not at all.

    Args:
        result: the run's result/.
        format: `adapter`: PEFT's adapter and what was trained in full; `merged`: plain weights as save_pretrained
            writes them, in the base's own format of numbers.
        output: the folder, which must not be there.

    Raises:
        InputError: there is no result, a file of it is missing, or the folder cannot be written.
    """
    if not (result / "result.json").is_file():
        raise InputError(f"{result} holds no result yet. `equipoise resume` goes on with the run.")
    if file := missing(result, config):
        raise InputError(f"{file}: is missing. Put it back, or train anew.")
    processor = load_processor(config.model)
    with _complete(output) as folder:
        if format == "merged":
            model, talk = merged(result, config), Talk(processor, "", config.data.prompt)
            talk.model_type = model.config.model_type
            _end_answers(model, talk)
            model.save_pretrained(folder)
        else:
            _copy(result, config, folder)
        processor.save_pretrained(folder)
        described = json.loads((result / "result.json").read_text())
        (folder / "README.md").write_text(card(described, config, result, format))


def merged(result: Path, config: InstructionTuningConfig) -> Any:
    """The model of transformers with all that was learnt in its own weights. What model.quantize has held in fewer bits
    is taken as the base has it.

    Raises:
        InputError: the result does not fit its base, or merging it gives weights that are not finite.
    """
    if config.model.quantize:
        print(
            f"merged into the base's own weights; the run was trained with them in {config.model.quantize}, so that "
            "answers may differ a little",
            file=sys.stderr,
        )
    whole = config.model.model_copy(update={"quantize": None})
    model = load_result(load_model(whole, "no"), result)
    if isinstance(model, PeftModel):
        _untie(model)
        try:
            with old_names():
                model = model.merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise InputError(f"{result}: cannot be merged: {' '.join(str(error).split())[:300]}") from error
    return model.to(own_dtype(config.model))


def _untie(model: PeftModel) -> None:
    """Gives head and embedding a weight each, where factors on one of them would change both."""
    plain: Any = model.base_model.model
    if not tied(plain):
        return
    head: Any = plain.get_output_embeddings()
    layer = getattr(head, "base_layer", head)
    layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    for part in (plain.config, plain.config.get_text_config()):
        part.tie_word_embeddings = False


def _end_answers(model: Any, talk: Talk) -> None:
    """Lets the model's own settings end generation where the answers that it learnt from end."""
    if hasattr(model, "language_model") and hasattr(model.language_model, "generation_config"):
        return  # a Q-Former's model generates by its language model's, which are not saved
    with suppress(InputError):  # a template that takes no text alone
        end, known = talk.end(Conversation("text", (), (Turn("?", "."),))), known_stops(model)
        if end is not None and end not in known:
            model.generation_config.eos_token_id = [*known, end]


def _copy(result: Path, config: InstructionTuningConfig, folder: Path) -> None:
    for name in (ADAPTER, *IN_FULL):
        if (result / name).is_file():
            shutil.copy(result / name, folder / name)
    if (result / ADAPTER_CONFIG).is_file():
        settings = json.loads((result / ADAPTER_CONFIG).read_text())
        settings |= {"base_model_name_or_path": public_base(config), "revision": config.model.revision}
        (folder / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=1) + "\n")


@contextmanager
def _complete(output: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `output` when all of it is written."""
    with explained(output):
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
        try:
            staging.chmod(0o777 & ~_umask())
            yield staging
            staging.rename(output)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
