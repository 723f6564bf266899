"""Small checkpoints in the real Stable Diffusion layout, with random weights, and pictures to train on."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from equipoise.pipelines.demo import shapes


def _build_checkpoint(folder: Path, prediction_type: str = "epsilon") -> Path:
    """A Stable Diffusion 1.x checkpoint of some 200,000 random weights, saved by diffusers itself."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from equipoise.pipelines.demo.train_base import tokenizer

    torch.manual_seed(0)
    words = tokenizer(folder / "tokenizer")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=words.model_max_length,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )
    vae = AutoencoderKL(
        sample_size=32,
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    )
    unet = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    pipeline = StableDiffusionPipeline(
        vae, text_encoder, words, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def _build_xl_checkpoint(folder: Path) -> Path:
    """A Stable Diffusion XL checkpoint as small, with both text encoders."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from equipoise.pipelines.demo.train_base import tokenizer

    torch.manual_seed(0)
    words = [tokenizer(folder / name) for name in ("tokenizer", "tokenizer_2")]

    def encoder(kind, width: int):
        return kind(
            CLIPTextConfig(
                vocab_size=len(words[0]),
                hidden_size=width,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=words[0].model_max_length,
                bos_token_id=words[0].bos_token_id,
                eos_token_id=words[0].eos_token_id,
                pad_token_id=words[0].pad_token_id,
                projection_dim=24,
            )
        )

    vae = AutoencoderKL(
        sample_size=32,
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.13025,
    )
    unet = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=16 + 32,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
        norm_num_groups=8,
    )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )
    StableDiffusionXLPipeline(
        vae, encoder(CLIPTextModel, 16), encoder(CLIPTextModelWithProjection, 32), *words, unet, scheduler
    ).save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def xl_checkpoint(tmp_path_factory) -> Path:
    return _build_xl_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny-xl")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    return _build_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def build_checkpoint():
    return _build_checkpoint


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Four captioned pictures of different sizes."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for index, background in enumerate(shapes.BACKGROUNDS):
        picture = shapes.draw_varied(shapes.OBJECT, background, rng)
        picture.resize((48 + 16 * index, 64), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": f"a sks object on a {background} background"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def short(checkpoint, pictures, tmp_path) -> list[str]:
    """Overrides that make any text-to-image configuration a run of seconds."""
    return [
        f"model={checkpoint}",
        f"data={pictures}",
        "data.resolution=32",
        "data.instance_prompt=null",
        "steps=6",
        "batch=2",
        "samples.steps=2",
        "samples.count=1",
        f"runs={tmp_path / 'runs'}",
    ]


@pytest.fixture
def place(distribution, tmp_path, monkeypatch) -> Path:
    """A working folder with a configuration of the pipeline that counts, a data folder and nothing else."""
    source = Path(__file__).with_name("counting.py").read_text()
    distribution("counting", {"equipoise.pipelines": {"counting": "counting:Counting"}}, counting=source)
    folder = tmp_path / "work"
    (folder / "pictures").mkdir(parents=True)
    (folder / "vase.yaml").write_text("pipeline: counting\nname: vase\ndata: pictures\n")
    monkeypatch.chdir(folder)
    monkeypatch.delenv("EQUIPOISE_RUNS", raising=False)
    return folder
