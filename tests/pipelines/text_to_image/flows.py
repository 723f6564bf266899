"""Small checkpoints with random weights in the real layouts of families that are trained by flow matching.

`write(name, folder)` builds one of BUILDERS as diffusers saves it: every part, and tokenizers that know real words.
"""

import warnings
from pathlib import Path

import torch
from diffusers import (
    AnimaModularPipeline,
    AnimaTextConditioner,
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    CosmosTransformer3DModel,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    ModularPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    UniPCMultistepScheduler,
)
from tokenizers import pre_tokenizers

WIDTH = 16  # of what text encoders give
_DEEP = {"hidden_size": WIDTH, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _letters() -> dict[str, int]:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return {piece: index for index, piece in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *special])}


def _qwen_words():
    from transformers import Qwen2Tokenizer

    special = ["<|im_start|>", "<|im_end|>"]
    return Qwen2Tokenizer(vocab=_letters(), merges=[], additional_special_tokens=special, chat_template=CHAT)


def _byte_words():
    """They begin every text, as those of Llama and GLM do: an empty caption is one token."""
    from tokenizers import Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE(_letters(), []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    begin = "<|im_start|>"
    words.post_processor = processors.TemplateProcessing(f"{begin} $A", special_tokens=[(begin, _letters()[begin])])
    ends = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, chat_template=CHAT, model_max_length=512, **ends)


def _gemma():
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", *map(chr, range(33, 127))]
    words = GemmaTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[])
    config = Gemma2Config(vocab_size=len(words) + 2, num_hidden_layers=2, head_dim=8, **_DEEP)
    return {"text_encoder": Gemma2Model(config), "tokenizer": words}


def _t5(suffix: str = "", umt5: bool = False):
    from transformers import T5Config, T5EncoderModel, T5Tokenizer, UMT5Config, UMT5EncoderModel

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    words = T5Tokenizer(vocab=pieces + [(chr(code), -3.0) for code in range(33, 127)], extra_ids=0)
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "is_encoder_decoder": False}
    kind, config = (UMT5EncoderModel, UMT5Config) if umt5 else (T5EncoderModel, T5Config)
    return {f"text_encoder{suffix}": kind(config(vocab_size=len(words) + 2, **sizes)), f"tokenizer{suffix}": words}


def _clip(suffix: str, folder: Path):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    from equipoise.pipelines.demo.train_base import tokenizer

    words = tokenizer(folder / f"tokenizer{suffix}")
    words.model_max_length = 248  # of Long-CLIP
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=words.model_max_length,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        projection_dim=8,
    )
    return {f"text_encoder{suffix}": CLIPTextModelWithProjection(config), f"tokenizer{suffix}": words}


def _flux_vae(**more):
    return AutoencoderKL(
        sample_size=32,
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **({"scaling_factor": 0.3611, "shift_factor": 0.1159} | more),
    )


def _qwen_vae():
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[-0.5, 0.0, 0.25, 0.5],
        latents_std=[2.0, 1.5, 0.5, 1.0],
    )


def _flux2_vae():
    vae = AutoencoderKLFlux2(
        sample_size=32,
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
    )
    torch.nn.init.normal_(vae.bn.running_mean)
    torch.nn.init.uniform_(vae.bn.running_var, 0.5, 2.0)
    return vae


def _flux2_parts(klein: bool):
    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=32,
        mlp_ratio=2.0,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=not klein,
    )
    return {"vae": _flux2_vae(), "transformer": transformer, "scheduler": _shifting()}


def _shifting():
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def _flux2(folder: Path):
    """Without the processor of pictures around the tokenizer, which needs torchvision and which captions do not."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    words = _byte_words()
    text = {"model_type": "mistral", "vocab_size": len(words), "num_hidden_layers": 30, "head_dim": 8, **_DEEP}
    tower = {"model_type": "pixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    tower |= {"num_attention_heads": 1, "image_size": 32, "patch_size": 16}
    config = Mistral3Config(text_config=text, vision_config=tower, image_token_index=0)
    return Flux2Pipeline(
        **_flux2_parts(klein=False), text_encoder=Mistral3ForConditionalGeneration(config), tokenizer=words
    )


def _flux2_klein(folder: Path):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    words = _qwen_words()
    config = Qwen3Config(vocab_size=len(words), num_hidden_layers=27, head_dim=8, **_DEEP)
    return Flux2KleinPipeline(**_flux2_parts(klein=True), text_encoder=Qwen3ForCausalLM(config), tokenizer=words)


def _qwen_image(folder: Path):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    words = _qwen_words()
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    text = {"vocab_size": len(words), "num_hidden_layers": 2, "rope_scaling": rope, **_DEEP}
    tower = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=tower)
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    encoder = Qwen2_5_VLForConditionalGeneration(config)
    return QwenImagePipeline(_shifting(), _qwen_vae(), encoder, words, transformer)


def _krea2(folder: Path):
    from transformers import Qwen3VLConfig, Qwen3VLModel

    words = _qwen_words()
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    text = {"vocab_size": len(words), "num_hidden_layers": 3, "head_dim": 8, "rope_scaling": rope, **_DEEP}
    tower = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    config = Qwen3VLConfig(text_config=text, vision_config=tower | {"deepstack_visual_indexes": [0]})
    transformer = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        timestep_embed_dim=8,
        text_hidden_dim=WIDTH,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )
    return Krea2Pipeline(
        _shifting(), _qwen_vae(), Qwen3VLModel(config), words, transformer, text_encoder_select_layers=(0, 1, 2)
    )


def _chroma(folder: Path):
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
        approximator_hidden_dim=16,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    return ChromaPipeline(scheduler=_shifting(), vae=_flux_vae(), transformer=transformer, **_t5())


def _lumina2(folder: Path):
    transformer = Lumina2Transformer2DModel(
        sample_size=4,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(300, 64, 64),
        cap_feat_dim=WIDTH,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    return Lumina2Pipeline(transformer=transformer, scheduler=scheduler, vae=_flux_vae(), **_gemma())


def _sana(folder: Path):
    kinds = ("ResBlock", "ResBlock", "EfficientViTBlock")
    vae = AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=kinds,
        decoder_block_types=kinds,
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=32,
        patch_size=1,
    )
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    return SanaPipeline(vae=vae, transformer=transformer, scheduler=scheduler, **_gemma())


def _hidream(folder: Path):
    from transformers import LlamaConfig, LlamaForCausalLM

    words = _byte_words()
    config = LlamaConfig(vocab_size=len(words), num_hidden_layers=2, **_DEEP)
    read = _clip("", folder) | _clip("_2", folder) | _t5("_3")
    read |= {"text_encoder_4": LlamaForCausalLM(config), "tokenizer_4": words}
    transformer = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[WIDTH, WIDTH],
        text_emb_dim=16,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 6, 6),
        max_resolution=(8, 8),
        llama_layers=[0, 1],
    )
    scheduler = UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, solver_order=2
    )
    return HiDreamImagePipeline(scheduler=scheduler, vae=_flux_vae(), transformer=transformer, **read)


def _anima(folder: Path):
    from transformers import Qwen3Config, Qwen3Model

    words, t5 = _qwen_words(), _t5()["tokenizer"]
    config = Qwen3Config(vocab_size=len(words), num_hidden_layers=2, head_dim=8, **_DEEP)
    sizes = {"source_dim": WIDTH, "target_dim": WIDTH, "model_dim": WIDTH, "num_layers": 1, "num_attention_heads": 2}
    transformer = CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=WIDTH,
        adaln_lora_dim=4,
        max_size=(4, 16, 16),
        patch_size=(1, 2, 2),
        extra_pos_embed_type=None,
        concat_padding_mask=False,  # which needs torchvision
    )
    made = AnimaModularPipeline()
    made.update_components(
        text_encoder=Qwen3Model(config),
        tokenizer=words,
        t5_tokenizer=t5,
        text_conditioner=AnimaTextConditioner(target_vocab_size=len(t5) + 2, **sizes),
        transformer=transformer,
        vae=_qwen_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    return made


def _auraflow(folder: Path):
    transformer = AuraFlowTransformer2DModel(
        sample_size=4,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=64,
    )
    for block in (*transformer.joint_transformer_blocks, *transformer.single_transformer_blocks):
        torch.nn.init.normal_(block.norm1.linear.weight)  # else hardly anything goes through its gates
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.73)
    vae = _flux_vae(scaling_factor=0.13025, shift_factor=None)
    return AuraFlowPipeline(vae=vae, transformer=transformer, scheduler=scheduler, **_t5(umt5=True))


def _cogview4(folder: Path):
    from transformers import GlmConfig, GlmModel

    words = _byte_words()
    words.padding_side = "left"
    config = GlmConfig(vocab_size=len(words), num_hidden_layers=2, head_dim=8, pad_token_id=words.pad_token_id, **_DEEP)
    transformer = CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=WIDTH,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=8,
        sample_size=8,
        rope_axes_dim=(8, 8),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear"
    )
    vae = _flux_vae(scaling_factor=1.0, shift_factor=0.0)
    return CogView4Pipeline(words, GlmModel(config), vae, transformer, scheduler)


def _ernie(folder: Path):
    from transformers import Mistral3Config, Mistral3Model

    words = _byte_words()
    text = {"model_type": "mistral", "vocab_size": len(words), "num_hidden_layers": 2, "head_dim": 8, **_DEEP}
    tower = {"model_type": "pixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    tower |= {"num_attention_heads": 1, "image_size": 32, "patch_size": 16}
    config = Mistral3Config(text_config=text, vision_config=tower, image_token_index=0)
    transformer = ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=32,
        in_channels=16,
        out_channels=16,
        text_in_dim=WIDTH,
        rope_axes_dim=(4, 6, 6),
    )
    for parameter in transformer.parameters():  # it begins with zeros where it modulates and at its end
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=4.0)
    return ErnieImagePipeline(transformer, _flux2_vae(), Mistral3Model(config), words, scheduler)


BUILDERS = {
    "Flux2Pipeline": _flux2,
    "Flux2KleinPipeline": _flux2_klein,
    "QwenImagePipeline": _qwen_image,
    "Krea2Pipeline": _krea2,
    "ChromaPipeline": _chroma,
    "Lumina2Pipeline": _lumina2,
    "SanaPipeline": _sana,
    "HiDreamImagePipeline": _hidream,
    "AnimaModularPipeline": _anima,
    "AuraFlowPipeline": _auraflow,
    "CogView4Pipeline": _cogview4,
    "ErnieImagePipeline": _ernie,
}


def write(name: str, folder: Path) -> Path:
    """Builds a family's checkpoint into `folder`."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        BUILDERS[name](folder.with_name(f"{folder.name}-words")).save_pretrained(str(folder), safe_serialization=True)
    return folder


PACKED = (
    "ChromaPipeline",
    "FluxKontextPipeline",
    "FluxPipeline",
    "Krea2Pipeline",
    "QwenImagePipeline",
)  # take latents as tokens


def draw(checkpoint: str, result: str, shape: list[int], words: dict) -> torch.Tensor:
    """A picture of 32 × 32 pixels and two steps that diffusers alone draws with a LoRA, from the noise of seed 0.

    Args:
        shape: Of its latents (channels, height, width).
        words: More arguments of the pipeline's call.

    Returns:
        Its bytes.
    """
    noise = torch.randn((1, *shape), generator=torch.Generator().manual_seed(0))
    size = {"height": 32, "width": 32, "num_inference_steps": 2}
    if Path(checkpoint, "modular_model_index.json").is_file():
        blocks = ModularPipeline.from_pretrained(checkpoint)
        blocks.load_components()
        blocks.load_lora_weights(result)
        picture = blocks(prompt="a sks object", latents=noise.unsqueeze(2), output="images", **size)[0]
        return torch.tensor(list(picture.tobytes()), dtype=torch.uint8)
    pipeline = DiffusionPipeline.from_pretrained(checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(result)
    name = type(pipeline).__name__
    if name in PACKED:
        noise = pipeline._pack_latents(noise, *noise.shape)
    if name == "HiDreamImagePipeline":  # else it draws 1024 × 1024
        pipeline.default_sample_size = 4 + 1e-8
    picture = pipeline(prompt="a sks object", latents=noise, **size, **words).images[0]
    return torch.tensor(list(picture.tobytes()), dtype=torch.uint8)
