"""Which families of multimodal language models instruction tuning trains, from a saved checkpoint to a loaded result.

    python benchmarks/families.py                 # all; --only qwen3_vl gemma3 for some

Each family's small checkpoint (tests/pipelines/instruction_tuning/families.py: real configuration, classes and layout,
random weights) is trained for two steps by `equipoise train` with CoMMIT-CLR on each kind of media it takes, and
its result loaded anew as docs/instruction_tuning.md says. Prints a Markdown table; what is refused is there with the
sentence that a user reads.
"""

import argparse
import contextlib
import io
import json
import os
import runpy
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForMultimodalLM

from equipoise.pipelines.cli import main as equipoise
from equipoise.pipelines.instruction_tuning.collator import AnswerCollator
from equipoise.pipelines.instruction_tuning.config import InstructionTuningData
from equipoise.pipelines.instruction_tuning.data import read_all
from equipoise.pipelines.instruction_tuning.model import missing_package
from equipoise.pipelines.runs.store import Store

TESTS = Path(__file__).parents[1] / "tests" / "pipelines" / "instruction_tuning"


def main() -> None:
    families = runpy.run_path(str(TESTS / "families.py"))
    names = [*families["BUILDERS"], *families["MORE"]]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=names, choices=names, metavar="FAMILY")
    chosen = parser.parse_args().only
    print("| family | processor | media | components | κ | loaded |\n| --- | --- | --- | --- | ---: | --- |")
    with tempfile.TemporaryDirectory() as root:
        data = {
            "image": families["write_pictures"](Path(root, "pictures")),
            "audio": families["write_sounds"](Path(root, "sounds")),
            "video": families["write_videos"](Path(root, "videos")),
        }
        for name in chosen:
            for row in rows(name, families["write"], data, Path(root)):
                print(f"| {name} | {' | '.join(row)} |", flush=True)


def rows(name: str, write: Callable[[str, Path], Path], data: dict[str, Path], root: Path) -> list[list[str]]:
    """The table's rows of a family, one for each kind of media it takes."""
    try:
        with quiet():
            folder = write(name, root / "checkpoints" / name)
    except ImportError as error:
        return [["", "", f"needs the package {missing_package(error)}", "", ""]]
    settings = json.loads((folder / "processor_config.json").read_text())
    parts = {
        **{"image_processor": "image", "feature_extractor": "audio", "audio_processor": "audio"},
        "video_processor": "video",
    }
    takes = [kind for part, kind in parts.items() if part in settings]
    return [[settings["processor_class"], kind, *trained(f"{name}-{kind}", folder, data[kind], root)] for kind in takes]


def trained(run: str, folder: Path, data: Path, root: Path) -> list[str]:
    """(components, κ, whether the result loads to the loss that the run ended at)."""
    words = [f"model={folder}", f"data={data}", "coordinator=commit_clr", "coordinator.options={measure_every: 1}"]
    words += ["steps=2", "batch=4", "rank=2", "learning_rate=1e-2", "schedule=constant", "samples.max_new_tokens=2"]
    words += ["data.fps=", "data.frames=3"]  # of videos, which some processors take together if they are as long
    said = io.StringIO()
    with quiet(said):
        code = equipoise(["train", "instruction_tuning/demo", *words, f"runs={root / 'runs'}", "--id", run])
    if code:
        lines = [line for line in said.getvalue().splitlines() if ": " in line] or [said.getvalue()]
        reason = next((line for line in lines if line.startswith("model.path: ")), lines[-1])
        return ["refused: " + reason.replace(f"{root}/", ""), "", ""]
    found = Store(root / "runs").get(run)
    metrics, result = found.metrics()[-1], json.loads((found.result / "result.json").read_text())
    parts = ", ".join(sorted(key.removeprefix("rate_") for key in metrics if key.startswith("rate_")))
    loss = loaded(folder, found.result, data)
    same = abs(loss - result["loss_after"]) < 1e-3 and result["loss_after"] != result["loss_before"]
    return [parts, f"{metrics['kappa']:.2g}", "yes" if same else f"no: {loss} and not {result['loss_after']}"]


def loaded(folder: Path, result: Path, data: Path) -> float:
    """The held-out loss of a base with a result on it, as the docs load them."""
    described = AutoConfig.from_pretrained(folder)
    thinker = getattr(described, "thinker_config", None)
    with quiet(), torch.no_grad():
        model = AutoModelForMultimodalLM.from_pretrained(folder, **{"config": thinker} if thinker else {})
        assert not model.load_state_dict(load_file(result / "encoder.safetensors"), strict=False).unexpected_keys
        model = PeftModel.from_pretrained(model, result).merge_and_unload().eval()
        held = read_all(InstructionTuningData(file=str(data)))[1]
        collator, losses = AnswerCollator(str(folder), fps=None, frames=3), []
        for example in held:
            losses.append(model(**collator([example])).loss.item())
    return sum(losses) / len(losses)


@contextlib.contextmanager
def quiet(into: io.StringIO | None = None) -> Iterator[None]:
    """Keeps what is printed, or leaves it out."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(into or io.StringIO()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of parts that are on their way out of transformers
            yield


if __name__ == "__main__":
    main()
