"""A trainer as other people have it, which knows nothing of Equipoise: LoRA factors on a U-Net, by diffusers and peft.

python trainer.py --base FOLDER --images FOLDER --lr RATE --out FOLDER [--steps N] [--fail]
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image

parser = argparse.ArgumentParser()
parser.add_argument("--base", required=True)
parser.add_argument("--images", required=True)
parser.add_argument("--lr", type=float, required=True)
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--steps", type=int, default=12)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--fail", action="store_true")
parser.add_argument("--wait", action="store_true")
given = parser.parse_args()

torch.manual_seed(given.seed)
torch.set_num_threads(1)
pipe = StableDiffusionPipeline.from_pretrained(given.base, safety_checker=None)
for part in (pipe.unet, pipe.vae, pipe.text_encoder):
    part.requires_grad_(False)
pipe.unet.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=["to_q", "to_v"]))
factors = [parameter for parameter in pipe.unet.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(factors, lr=given.lr)
if given.fail:
    raise SystemExit("trainer.py: out of luck")
if given.wait:
    print("waiting", flush=True)
    time.sleep(600)
files = sorted(path for path in Path(given.images).rglob("*") if path.suffix in (".png", ".jpg"))
pixels = [np.asarray(Image.open(path).convert("RGB").resize((32, 32)), dtype=np.float32) for path in files]
images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 127.5 - 1
with torch.no_grad():
    latents = pipe.vae.encode(images).latent_dist.mean * pipe.vae.config.scaling_factor
    length = pipe.text_encoder.config.max_position_embeddings
    words = pipe.tokenizer(
        "a photo of sks object", padding="max_length", max_length=length, return_tensors="pt"
    ).input_ids
    known = pipe.text_encoder(words)[0].expand(len(latents), -1, -1)
for step in range(given.steps):
    noise = torch.randn_like(latents)
    times = torch.randint(0, 1000, (len(latents),))
    predicted = pipe.unet(pipe.scheduler.add_noise(latents, noise, times), times, known).sample
    loss = (predicted - noise).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"\rstep {step + 1} of {given.steps}, loss {loss.item():.3f}", end="", flush=True)
print()
early = given.out / "checkpoint-5"
early.mkdir(parents=True)
(early / "pytorch_lora_weights.safetensors").write_bytes(b"no tensors: what is in a checkpoint is not taken")
StableDiffusionPipeline.save_lora_weights(
    given.out,
    unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet)),
    unet_lora_adapter_metadata=pipe.unet.peft_config["default"].to_dict(),
)
