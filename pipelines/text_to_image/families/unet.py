"""What the families with a U-Net share, and its names in the code that Stable Diffusion was published with."""

from collections.abc import Mapping
from typing import Any

from equipoise.pipelines.text_to_image.families import Family

_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


class UNetFamily(Family):
    denoiser = "unet"
    noise = "diffusion"
    targets = ("to_q", "to_k", "to_v", "to_out.0")
    shape = ("layers_per_block", "up_block_types", "cross_attention_dim")

    def encoder(self, part: str, shape: Mapping[str, Any]) -> str:
        """What ComfyUI calls a text encoder."""
        raise NotImplementedError

    def comfyui(self, part: str, module: str, shape: Mapping[str, Any]) -> str:
        if part == "unet":
            return f"diffusion_model.{original_name(module, shape)}"
        return f"text_encoders.{self.encoder(part, shape)}.transformer.{module}"

    def aliases(self, part: str, module: str, shape: Mapping[str, Any]) -> set[str]:
        if part != "unet":
            return set()
        return {f"lora_unet_{name.replace('.', '_')}" for name in (module, original_name(module, shape))}


def original_name(module: str, unet: Mapping[str, Any]) -> str:
    """A U-Net module of diffusers under its name in the original code (CompVis latent-diffusion's openaimodel.py).

    There the blocks are counted through: those of one resolution are `layers_per_block` and one that changes it.
    """
    if module in _OUTSIDE:
        return _OUTSIDE[module]
    stride = unet["layers_per_block"] + 1
    words = module.split(".")
    where, number = words[0], words[1]
    if where == "mid_block":
        kind, index, inner = words[1], int(words[2]), words[3:]
        return f"middle_block.{1 if kind == 'attentions' else 2 * index}.{_inner(kind, inner)}"
    block, kind, index, inner = int(number), words[2], int(words[3]), words[4:]
    if kind == "downsamplers":
        return f"input_blocks.{stride * (block + 1)}.0.op"
    if kind == "upsamplers":
        attention = "CrossAttn" in unet["up_block_types"][block]
        return f"output_blocks.{stride * (block + 1) - 1}.{2 if attention else 1}.conv"
    column = 1 if kind == "attentions" else 0
    row = stride * block + index
    place = f"input_blocks.{row + 1}" if where == "down_blocks" else f"output_blocks.{row}"
    return f"{place}.{column}.{_inner(kind, inner)}"


def _inner(kind: str, words: list[str]) -> str:
    name = ".".join(words)
    return _RESNET.get(name, name) if kind == "resnets" else name
