"""The model card beside a result: what the LoRA is, how to load it, how it was made, and what it draws."""

import json
import shutil
from pathlib import Path
from typing import Any

from equipoise.pipelines import demo
from equipoise.pipelines.files import explained, write_atomic
from equipoise.pipelines.text_to_image.config import TextToImageConfig
from equipoise.pipelines.text_to_image.families import Family, family
from equipoise.pipelines.text_to_image.formats.lora_files import opened, read_metadata
from equipoise.pipelines.text_to_image.inversion import WORD_FILE
from equipoise.pipelines.text_to_image.result import LORA_FILE

CARD = "README.md"
PICTURES = "images"
_MOST = 12  # pictures on a card


def write_card(run: Path, config: TextToImageConfig) -> None:
    """Writes result/README.md, with the header that the hub reads, and result/images, of the run's last samples.

    Args:
        run: the run's folder; its result is there.
        config: the run's.

    Raises:
        InputError: it cannot be written.
    """
    from huggingface_hub import ModelCardData

    result = run / "result"
    described: dict[str, Any] = json.loads(read_metadata(result / LORA_FILE)["equipoise"])
    kind, base = family(described["shape"]["family"]), described["base"]
    own = config.model.path == demo.NAME
    source = "demo.base_folder()" if own else _quoted(base)
    beside = "".join(f"{name}={name}, " for part in config.model.apart for name in (part, kind.text_encoders[part]))
    shown = _pictures(run, config)
    prompt = described["trigger"] or (config.samples.prompts or ["…"])[0]
    header = ModelCardData(
        base_model=base if "/" in base else None,  # the hub takes its own ids alone
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusers", "lora", "template:sd-lora", kind.title.lower().replace(" ", "-")],
        instance_prompt=described["trigger"],
        widget=[{"text": prompt, "output": {"url": url}} for prompt, url in shown] or None,
    ).to_yaml()
    lines = [
        f"---\n{header}\n---\n",
        f"# {run.name}\n",
        f"LoRA factors for `{base}` ({kind.title}), rank {described['rank']}, alpha {described['alpha']:g}.\n",
        *(["<Gallery />\n"] if shown else []),
        *([f"**Trigger words**: `{_cell(described['trigger'])}`\n"] if described["trigger"] else []),
        "## Use\n",
        "```python",
        f"import torch\nfrom diffusers import {kind.pipeline}",
        *(["from equipoise.pipelines import demo"] if own else []),
        *_apart(kind, config),
        f"\npipe = {kind.pipeline}.from_pretrained({source}{'' if kind.modular else f', {beside}dtype=torch.float32'})",
        *(["pipe.load_components()"] if kind.modular else []),
        'pipe.load_lora_weights("FOLDER OR REPOSITORY")',
        *_scheduler(config),
        *_word(result / WORD_FILE, config),
        f'pipe({_drawn(kind, prompt)}[0].save("picture.png")',
        "```\n",
        "## Training\n",
        "| | |\n| --- | --- |",
        *(f"| {key.replace('_', ' ')} | {_cell(value)} |" for key, value in described.items() if _told(key, value)),
        "",
        *(f"![{_cell(prompt)}]({url})" for prompt, url in shown),
    ]
    write_atomic(result / CARD, "\n".join(lines).rstrip() + "\n")


def publish(run: Path, config: TextToImageConfig, folder: Path) -> None:
    """Fills a folder with the LoRA file, its card and the card's pictures.

    Raises:
        InputError: there is no result.
    """
    write_card(run, config)
    for name in (LORA_FILE, WORD_FILE, CARD, PICTURES):
        source = run / "result" / name
        if source.is_dir():
            shutil.copytree(source, folder / name)
        elif source.is_file():
            shutil.copy(source, folder / name)


def _drawn(kind: Family, prompt: str) -> str:
    """What comes after `pipe(`, up to the pictures."""
    return f'prompt={_quoted(prompt)}, output="images")' if kind.modular else f"{_quoted(prompt)}).images"


def _apart(kind: Family, config: TextToImageConfig) -> list[str]:
    """The lines that load what the base is published without."""
    lines = []
    for part, path in config.model.apart.items():
        reader, source = kind.apart[part][0], _quoted(Path(path).name if Path(path).is_dir() else path)
        lines += [
            f"from transformers import AutoTokenizer, {reader}\n",
            f"{part} = {reader}.from_pretrained({source}, dtype=torch.float32)",
            f"{kind.text_encoders[part]} = AutoTokenizer.from_pretrained({source})",
        ]
    return lines


def _scheduler(config: TextToImageConfig) -> list[str]:
    """The lines that sample as the LoRA was trained to predict, where the base was not."""
    words = ", ".join(f"{key}={value!r}" for key, value in config.noise.scheduler.items())
    if not words:
        return []
    made = f"pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, {words})"
    return ["from diffusers import DDIMScheduler\n", made]


def _word(file: Path, config: TextToImageConfig) -> list[str]:
    """The lines that load a new word: diffusers reads one text encoder's vectors at a time."""
    if not file.is_file():
        return []
    with opened(file) as tensors:
        several = sorted(tensors.keys(), reverse=True) if len(tensors.keys()) > 1 else []  # clip_l, clip_g
    if not several:
        return ['pipe.load_textual_inversion("FOLDER OR REPOSITORY")']
    lines = ["from safetensors.torch import load_file\n", f'word = load_file("FOLDER/{file.name}")']
    for key, end in zip(several, ("", "_2"), strict=True):
        where = f"text_encoder=pipe.text_encoder{end}, tokenizer=pipe.tokenizer{end}"
        lines.append(f'pipe.load_textual_inversion(word["{key}"], token={_quoted(config.token.name or "")}, {where})')
    return lines


def _pictures(run: Path, config: TextToImageConfig) -> list[tuple[str, str]]:
    """The prompts and paths of the newest samples, which are copied to result/images."""
    folders = sorted((run / "samples").glob("step-*"))
    shown = []
    for picture in sorted(folders[-1].glob("*.png"))[:_MOST] if folders else []:
        path = run / "result" / PICTURES / picture.name
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, picture.read_bytes())
        number = int(picture.name.split("-")[0])
        if number < len(config.samples.prompts):
            shown.append((config.samples.prompts[number], f"{PICTURES}/{picture.name}"))
    return shown


def _told(key: str, value: Any) -> bool:
    return key != "shape" and value is not None and value != {} and value != []


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())


def _quoted(text: str) -> str:
    """A text as Python writes it, on one line."""
    return json.dumps(text, ensure_ascii=False)
