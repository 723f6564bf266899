"""Small checkpoints with random weights in the real layouts of multimodal architectures: {name: what builds one}."""

import json
import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from equipoise.pipelines.instruction_tuning.model import without_videos

SIDE = 16  # pixels


def _tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One token per byte, and those that the architecture names."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    made.add_special_tokens({"additional_special_tokens": list(special.values())})
    return made


def _llama(words: int):
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=words,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=256,
        eos_token_id=257,
        bos_token_id=257,
    )


_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'text' %}"
    "{{ c['text'] }}{% elif c['type'] == 'video' %}CLIP{% else %}MEDIA{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


_TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def _blip(config, model, words: PreTrainedTokenizerFast, qformer: dict):
    """The model and image processor of BLIP-2 or InstructBLIP, which differ in what the Q-Former reads."""
    from transformers import OPTConfig
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    made = model(
        config(
            vision_config=_TOWER | {"image_size": SIDE, "patch_size": 8, "initializer_range": 0.02},
            qformer_config=_TOWER | qformer,
            text_config=OPTConfig(
                vocab_size=len(words),
                hidden_size=32,
                ffn_dim=48,
                word_embed_proj_dim=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=256,
                dropout=0.1,
            ).to_dict(),
            num_query_tokens=4,
            image_token_index=words.convert_tokens_to_ids("<image>"),
        )
    )
    torch.nn.init.normal_(made.query_tokens, std=0.5)
    return made, BlipImageProcessorPil(size={"height": SIDE, "width": SIDE})


def _blip2(folder: Path):
    from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor

    words = _tokenizer(image="<image>")
    model, looks = _blip(Blip2Config, Blip2ForConditionalGeneration, words, {"vocab_size": 8})
    return model, Blip2Processor(looks, words, num_query_tokens=4)


def _instructblip(folder: Path):
    from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration, InstructBlipProcessor

    words, reads = _tokenizer(image="<image>"), _tokenizer()
    qformer = {"vocab_size": len(reads), "pad_token_id": 256}
    model, looks = _blip(InstructBlipConfig, InstructBlipForConditionalGeneration, words, qformer)
    return model, InstructBlipProcessor(looks, words, reads, num_query_tokens=4)


def _llava(folder: Path):
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    words = _tokenizer(image="<image>", start="<|im_start|>", end="<|im_end|>")
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=8,
        projection_dim=16,
    )
    config = LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=_llama(len(words)).to_dict(),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    looks = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = LlavaProcessor(
        looks,
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE.replace("MEDIA", "<image>"),
    )
    return LlavaForConditionalGeneration(config), processor


def _qwen_words() -> tuple[PreTrainedTokenizerFast, dict[str, int]]:
    """The tokenizer, and the configuration's names of its marks."""
    names = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>"]
    words = _tokenizer(**{name: name for name in names})
    keys = ["image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"]
    return words, dict(zip(keys, words.convert_tokens_to_ids(names[:4]), strict=True))


def _qwen_text(words: PreTrainedTokenizerFast, kind: str) -> dict:
    text = _llama(len(words)).to_dict() | {"model_type": kind, "tie_word_embeddings": False}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    return text


def _qwen_processor(cls: type, words: PreTrainedTokenizerFast):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    looks = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=256)
    template = _TEMPLATE.replace("MEDIA", _SIGHT).replace("CLIP", _CLIP)
    kind = "qwen3_vl" if "Qwen3" in cls.__name__ else "qwen2_vl"
    size = {"shortest_edge": 64, "longest_edge": 4096}
    cls, watches = _with_videos(cls, kind, patch_size=4, merge_size=2, size=size)
    return cls(looks, words, watches, chat_template=template)


def _with_videos(cls: type, kind: str, **options):
    """(the class of a processor, its part for videos), where torchvision is there; else one that does without."""
    if not find_spec("torchvision"):
        return without_videos(cls), None
    module = import_module(f"transformers.models.{kind}.video_processing_{kind}")
    made = next(v for n, v in vars(module).items() if n.endswith("VideoProcessor") and v.__module__ == module.__name__)
    return cls, made(**options)


def _qwen2_vl(folder: Path):
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

    words, ids = _qwen_words()
    config = Qwen2VLConfig(
        text_config=_qwen_text(words, "qwen2_vl_text"),
        vision_config={
            "depth": 2,
            "embed_dim": 16,
            "hidden_size": 32,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "mlp_ratio": 2,
        },
        **ids,
    )
    return Qwen2VLForConditionalGeneration(config), _qwen_processor(Qwen2VLProcessor, words)


def _qwen2_5_vl(folder: Path):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

    words, ids = _qwen_words()
    config = Qwen2_5_VLConfig(
        text_config=_qwen_text(words, "qwen2_5_vl_text"),
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "window_size": 16,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
        },
        **ids,
    )
    return Qwen2_5_VLForConditionalGeneration(config), _qwen_processor(Qwen2_5_VLProcessor, words)


_ROWS = ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", "<|im_start|>", "<|im_end|>"]


def _idefics3(folder: Path):
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    words = _tokenizer(**{name: name for name in _ROWS})
    config = Idefics3Config(
        vision_config=_TOWER | {"image_size": SIDE, "patch_size": 4},
        text_config=_llama(len(words)).to_dict(),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    looks = Idefics3ImageProcessorPil(
        size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE}, do_image_splitting=False
    )
    template = _TEMPLATE.replace("MEDIA", "<image>")
    return Idefics3ForConditionalGeneration(config), Idefics3Processor(
        looks, words, image_seq_len=4, chat_template=template
    )


def _smolvlm(folder: Path):
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMProcessor
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    words = _tokenizer(**{name: name for name in _ROWS})
    config = SmolVLMConfig(
        vision_config=_TOWER | {"image_size": SIDE, "patch_size": 4},
        text_config=_llama(len(words)).to_dict(),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=256,
    )
    looks = SmolVLMImageProcessorPil(
        size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE}, do_image_splitting=False
    )
    template = _TEMPLATE.replace("MEDIA", "<image>").replace("CLIP", "<video>")
    size = {"longest_edge": SIDE}
    cls, watches = _with_videos(SmolVLMProcessor, "smolvlm", size=size, max_image_size=size)
    processor = cls(looks, words, watches, image_seq_len=4, chat_template=template)
    return SmolVLMForConditionalGeneration(config), processor


def _paligemma(folder: Path):
    from transformers import (
        GemmaConfig,
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
        PaliGemmaProcessor,
        SiglipVisionConfig,
    )
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    words = _tokenizer(image="<image>")
    words.add_special_tokens({"bos_token": "<bos>"})
    looks = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    looks.image_seq_length = 4
    processor = PaliGemmaProcessor(looks, words)
    gemma = {name: value for name, value in _llama(len(words)).to_dict().items() if name in _GEMMA_KEYS}
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**_TOWER, image_size=SIDE, patch_size=8, vision_use_head=False).to_dict(),
        text_config=GemmaConfig(**gemma, head_dim=8, bos_token_id=words.bos_token_id).to_dict(),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        projection_dim=32,
        hidden_size=32,
    )
    return PaliGemmaForConditionalGeneration(config), processor


_GEMMA_KEYS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "max_position_embeddings pad_token_id eos_token_id"
).split()


def _qwen2_audio(folder: Path):
    from transformers import (
        Qwen2AudioConfig,
        Qwen2AudioForConditionalGeneration,
        Qwen2AudioProcessor,
        WhisperFeatureExtractor,
    )

    names = ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", "<|im_start|>", "<|im_end|>"]
    words = _tokenizer(**{name: name for name in names})
    config = Qwen2AudioConfig(
        audio_config={
            "model_type": "qwen2_audio_encoder",
            "num_mel_bins": 16,
            "d_model": 16,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "max_source_positions": 50,
        },
        text_config=_llama(len(words)).to_dict() | {"model_type": "qwen2"},
        audio_token_index=words.convert_tokens_to_ids("<|AUDIO|>"),
    )
    hears = WhisperFeatureExtractor(feature_size=16, chunk_length=1)
    template = _TEMPLATE.replace("MEDIA", "<|audio_bos|><|AUDIO|><|audio_eos|>")
    return Qwen2AudioForConditionalGeneration(config), Qwen2AudioProcessor(hears, words, chat_template=template)


def _internvl(folder: Path):
    """Whose processor pads on the left unless it is asked not to, whatever its tokenizer says."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLProcessor, InternVLVisionConfig
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    made = _tokenizer(**names, start="<|im_start|>", end="<|im_end|>").backend_tokenizer
    words = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", extra_special_tokens=names
    )
    looks = GotOcr2ImageProcessorPil(size={"height": SIDE, "width": SIDE}, crop_to_patches=False)
    vision = InternVLVisionConfig(**_TOWER, image_size=[SIDE, SIDE], patch_size=[4, 4])
    config = InternVLConfig(
        vision_config=vision.to_dict(),
        text_config=_llama(len(words)).to_dict(),
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    template = _TEMPLATE.replace("MEDIA", "<IMG_CONTEXT>\n").replace("CLIP", "<video>\n")
    cls, watches = _with_videos(InternVLProcessor, "internvl", size={"height": SIDE, "width": SIDE})
    processor = cls(looks, words, watches, image_seq_length=4, chat_template=template)
    return InternVLForConditionalGeneration(config), processor


def _named(bos: str = "", end: str = "</s>", others: str = "", **named: str) -> PreTrainedTokenizerFast:
    """One that knows its marks by name, as `image_token`; with `bos` it begins every text with that."""
    special = {mark: mark for mark in [*others.split(), *named.values()]}
    made = PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(**special).backend_tokenizer,
        pad_token="<pad>",
        eos_token=end,
        **{"bos_token": bos} if bos else {},
        extra_special_tokens=named,
    )
    made.add_special_tokens({"additional_special_tokens": list(special)}, replace_extra_special_tokens=False)
    if bos:
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, made.bos_token_id)]
        )
    return made


def _ids(words: PreTrainedTokenizerFast, **marks: str) -> dict[str, int]:
    return {name: words.convert_tokens_to_ids(mark) for name, mark in marks.items()}


# Chat templates with what is peculiar to each family's own: a system prompt by default, BOS, what stands between turns,
# which white space is cut, where the generation prompt differs from what comes before an answer, and reasoning.
_CONTENT = (
    "{% macro written(content) %}{% if content is string %}{{ content }}{% else %}{% for c in content %}"
    "{% if c.type == 'image' %}IMAGE{% elif c.type == 'audio' %}AUDIO{% elif c.type == 'video' %}CLIP"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}"
    "{% endif %}{% endmacro %}"
)
_CHATML = _CONTENT + (
    "{% for m in messages %}DEFAULT<|im_start|>{{ m.role }}\n{{ written(m.content) }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SYSTEM = (
    "{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
)
_QWEN3_5 = _CONTENT + (  # reasoning in the last answer alone, and none where thinking is switched off
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and "
    "loop.index0 > ns.last %}<think>\n\n</think>\n\n{% endif %}{{ written(m.content) | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false"
    " %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}{% endif %}"
)
_GEMMA = _CONTENT + (
    "{{ bos_token }}{% for m in messages %}{% if m.role not in ('user', 'assistant') %}{{ raise_exception('no system')"
    " }}{% endif %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ written(m.content) | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_GEMMA4 = _CONTENT + (
    "{{ bos_token }}{% for m in messages %}<|turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ written(m.content).split('<channel|>')[-1] | trim }}<turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)
_ONEVISION = (  # pictures first, and a space in an answer's header that the generation prompt has not
    "{% for m in messages %}<|im_start|>{{ m.role }} {% for c in m.content if c.type != 'text' %}<{{ c.type }}>"
    "{% endfor %}"
    "{% for c in m.content if c.type == 'text' %}{% if m.role == 'assistant' %}{% generation %}{{ '\\n' + c.text }}"
    "{% endgeneration %}{% else %}{{ '\\n' + c.text }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_MISTRAL = _CONTENT + (  # nothing but brackets between turns
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST]{{ written(m.content) }}[/INST]"
    "{% elif m.role == 'system' %}[SYSTEM_PROMPT]{{ written(m.content) }}[/SYSTEM_PROMPT]"
    "{% else %}{{ written(m.content) }}{{ eos_token }}{% endif %}{% endfor %}"
)
_LLAMA = _CONTENT + (
    "{{ bos_token }}{% for m in messages %}<|header_start|>{{ m.role }}<|header_end|>\n\n{{ written(m.content) }}"
    "<|eot|>{% endfor %}{% if add_generation_prompt %}<|header_start|>assistant<|header_end|>\n\n{% endif %}"
)
_GLM = _CONTENT + (  # no mark after an answer, and an empty reasoning before it
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}<think></think>\n{% endif %}"
    "{{ written(m.content) }}{% if m.role == 'user' and enable_thinking is defined and not enable_thinking %}/nothink"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% if enable_thinking is defined and not "
    "enable_thinking %}<think></think>\n{% endif %}{% endif %}"
)
_IDEFICS = (  # a space before an answer that the generation prompt has not
    "<|im_start|>{% for m in messages %}{{ m.role | capitalize }}{{ ':' if m.content[0].type == 'image' else ': ' }}"
    "{% for c in m.content %}{{ c.text if c.type == 'text' else '<' ~ c.type ~ '>' }}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
_COHERE = _CONTENT + (
    "{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|>{{ '<|CHATBOT_TOKEN|>' if m.role == 'assistant' else "
    "'<|USER_TOKEN|>' }}{% if m.role == 'assistant' %}<|START_RESPONSE|>{{ written(m.content) }}<|END_RESPONSE|>"
    "{% else %}{{ written(m.content) }}{% endif %}<|END_OF_TURN_TOKEN|>{% endfor %}{% if add_generation_prompt %}"
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>{% endif %}"
)
_USER = (  # a tokenizer's own: of texts alone, and with no mark after an answer
    "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} {% else %}ASSISTANT: {{ m.content }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def _chat(template: str, image: str = "", audio: str = "", default: str = "", video: str = "") -> str:
    named = {"IMAGE": image, "AUDIO": audio, "DEFAULT": default, "CLIP": video}
    for name, text in named.items():
        template = template.replace(name, text)
    return template


_SIGHT = "<|vision_start|><|image_pad|><|vision_end|>"
_CLIP = "<|vision_start|><|video_pad|><|vision_end|>"
_SOUND = "<|audio_bos|><|AUDIO|><|audio_eos|>"
_DEEP = {  # a tower of Qwen3-VL's kind
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_WHISPER = {
    "num_mel_bins": 16,
    "d_model": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "max_source_positions": 50,
}


def _qwen3_text(words: PreTrainedTokenizerFast, kind: str, **more) -> dict:
    return _qwen_text(words, kind) | {"head_dim": 8} | more


def _qwen3_vl(folder: Path, kind: str = "qwen3_vl", template: str = _CHATML, **more):
    """Qwen3-VL, Qwen3.5 and their kin with experts: one processor, and configurations of one shape."""
    from transformers import AutoConfig, AutoModelForMultimodalLM, Qwen3VLProcessor

    words, ids = _qwen_words()
    words.add_tokens(["<think>", "</think>"])
    vision = _DEEP if "_vl" in kind else {k: v for k, v in _DEEP.items() if k != "deepstack_visual_indexes"}
    text = _qwen3_text(words, f"{kind}_text", **more)
    made = AutoModelForMultimodalLM.from_config(
        AutoConfig.for_model(kind, text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    )
    processor = _qwen_processor(Qwen3VLProcessor, words)
    processor.chat_template = _chat(template, _SIGHT, video="<|video_pad|>")  # which becomes several, with times
    return made, processor


def _qwen3_vl_moe(folder: Path):
    return _qwen3_vl(folder, "qwen3_vl_moe", **_EXPERTS)


def _qwen3_5(folder: Path, kind: str = "qwen3_5", **more):
    linear = {f"linear_{side}_head_dim": 8 for side in ("key", "value")} | {
        f"linear_num_{side}_heads": 2 for side in ("key", "value")
    }
    return _qwen3_vl(folder, kind, _QWEN3_5, layer_types=["linear_attention", "full_attention"], **linear, **more)


def _qwen3_5_moe(folder: Path):
    return _qwen3_5(folder, "qwen3_5_moe", shared_expert_intermediate_size=24, **_EXPERTS)


def _omni_words() -> PreTrainedTokenizerFast:
    return _named(
        end="<|im_end|>",
        others="<|im_start|>",
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        audio_token="<|AUDIO|>",
        vision_bos_token="<|vision_start|>",
        vision_eos_token="<|vision_end|>",
        audio_bos_token="<|audio_bos|>",
        audio_eos_token="<|audio_eos|>",
    )


def _omni_processor(cls: type, words: PreTrainedTokenizerFast):
    from transformers import WhisperFeatureExtractor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    looks = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=256)
    hears = WhisperFeatureExtractor(feature_size=16, chunk_length=1)
    template = _chat(_CHATML, _SIGHT, _SOUND, _SYSTEM)
    return without_videos(cls)(looks, None, hears, words, chat_template=template)


def _qwen2_5_omni(folder: Path):
    from transformers import Qwen2_5OmniConfig, Qwen2_5OmniForConditionalGeneration, Qwen2_5OmniProcessor

    words = _omni_words()
    vision = {key: value for key, value in _DEEP.items() if not key.startswith(("num_pos", "deep"))}
    marks = {
        "image_token_index": "<|image_pad|>",
        "video_token_index": "<|video_pad|>",
        "audio_token_index": "<|AUDIO|>",
    }
    ends = {"audio_start_token_id": "<|audio_bos|>", "audio_end_token_id": "<|audio_eos|>"}
    thinker = {
        "text_config": _qwen_text(words, "qwen2_5_omni_text"),
        "vision_config": vision | {"window_size": 16, "fullatt_block_indexes": [1]},
        "audio_config": _WHISPER | {"n_window": 50, "output_dim": 32},
        "vision_start_token_id": words.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": words.convert_tokens_to_ids("<|vision_end|>"),
        "vision_token_id": words.convert_tokens_to_ids("<|image_pad|>"),
        **_ids(words, **marks, **ends),
    }
    config = Qwen2_5OmniConfig(thinker_config=thinker, enable_audio_output=False)
    return Qwen2_5OmniForConditionalGeneration(config), _omni_processor(Qwen2_5OmniProcessor, words)


def _qwen3_omni(folder: Path):
    from transformers import Qwen3OmniMoeConfig, Qwen3OmniMoeForConditionalGeneration, Qwen3OmniMoeProcessor

    words = _omni_words()
    marks = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>", "audio_token_id": "<|AUDIO|>"}
    ends = {"audio_start_token_id": "<|audio_bos|>", "audio_end_token_id": "<|audio_eos|>"}
    thinker = {
        "text_config": _qwen3_text(words, "qwen3_omni_moe_text", **_EXPERTS),
        "vision_config": _DEEP,
        "audio_config": _WHISPER | {"n_window": 50, "output_dim": 32, "downsample_hidden_size": 8},
        "vision_start_token_id": words.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": words.convert_tokens_to_ids("<|vision_end|>"),
        **_ids(words, **marks, **ends),
    }
    config = Qwen3OmniMoeConfig(thinker_config=thinker, enable_audio_output=False)
    return Qwen3OmniMoeForConditionalGeneration(config), _omni_processor(Qwen3OmniMoeProcessor, words)


def _gemma3(folder: Path):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    words = _named("<bos>", "<eos>", "<start_of_turn> <end_of_turn>", **names)
    looks = Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE})
    gemma = {name: value for name, value in _llama(len(words)).to_dict().items() if name in _GEMMA_KEYS}
    config = Gemma3Config(
        text_config=gemma | {"head_dim": 8, "bos_token_id": words.bos_token_id, "sliding_window": 64},
        vision_config=_TOWER | {"image_size": SIDE, "patch_size": 4},
        mm_tokens_per_image=4,
        image_token_index=words.image_token_id,
        boi_token_index=words.boi_token_id,
        eoi_token_index=words.eoi_token_id,
    )
    template = _chat(_GEMMA, "<start_of_image>")
    made = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(
        made.model.multi_modal_projector.mm_input_projection_weight
    )  # else zero: it would see nothing
    return made, Gemma3Processor(looks, words, image_seq_length=4, chat_template=template)


_GEMMA_MEDIA = {
    "image_token": "<|image|>",
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
}


def _gemma4(folder: Path):
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration, Gemma4Processor
    from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    words = _named("<bos>", "<eos>", "<|turn> <turn|> <|video|> <channel|>", **_GEMMA_MEDIA)
    looks = Gemma4ImageProcessorPil(patch_size=4, max_soft_tokens=70, pooling_kernel_size=2)
    hears = Gemma4AudioFeatureExtractor(feature_size=16)
    gemma = {name: value for name, value in _llama(len(words)).to_dict().items() if name in _GEMMA_KEYS}
    text = gemma | {
        "head_dim": 8,
        "global_head_dim": 8,
        "sliding_window": 64,
        "hidden_size_per_layer_input": 4,
        "vocab_size_per_layer_input": len(words),
        "layer_types": ["sliding_attention", "full_attention"],
        "bos_token_id": words.bos_token_id,
    }
    audio = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "subsampling_conv_channels": [16, 4]}
    config = Gemma4Config(
        text_config=text,
        vision_config=_TOWER
        | {"head_dim": 8, "num_key_value_heads": 2, "patch_size": 4, "pooling_kernel_size": 2}
        | {"position_embedding_size": 64},
        audio_config=audio | {"output_proj_dims": 16},
        video_token_id=words.convert_tokens_to_ids("<|video|>"),
        eoa_token_index=words.eoa_token_id,
        **{
            f"{name}_id": words.convert_tokens_to_ids(mark)
            for name, mark in _GEMMA_MEDIA.items()
            if name != "eoa_token"
        },
    )
    processor = without_videos(Gemma4Processor)(
        hears, looks, words, None, chat_template=_chat(_GEMMA4, "<|image|>", "<|audio|>")
    )
    return Gemma4ForConditionalGeneration(config), processor


def _gemma3n(folder: Path):
    from transformers import Gemma3nConfig, Gemma3nForConditionalGeneration, Gemma3nProcessor
    from transformers.models.gemma3n.feature_extraction_gemma3n import Gemma3nAudioFeatureExtractor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    names = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    names |= {"audio_token": "<audio_soft_token>", "boa_token": "<start_of_audio>", "eoa_token": "<end_of_audio>"}
    # pictures have the 128 tokens from `first` on, and sounds the 128 after those
    more = {kind: " ".join(f"<{kind}{number}>" for number in range(2, 128)) for kind in ("seen", "heard")}
    before = "<bos> <eos> <start_of_turn> <end_of_turn> <start_of_image> <start_of_audio>"
    pictures = f"<end_of_image> <image_soft_token> {more['seen']}"
    words = _named("<bos>", "<eos>", f"{before} {pictures} <end_of_audio> <audio_soft_token> {more['heard']}", **names)
    first = words.eoi_token_id
    looks = SiglipImageProcessorPil(size={"height": 64, "width": 64})
    gemma = {name: value for name, value in _llama(len(words)).to_dict().items() if name in _GEMMA_KEYS}
    text = gemma | {
        "head_dim": 8,
        "intermediate_size": [48, 48],
        "sliding_window": 64,
        "hidden_size_per_layer_input": 4,
        "vocab_size": first + 256,
        "vocab_size_per_layer_input": first,
        "laurel_rank": 4,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "bos_token_id": words.bos_token_id,
    }
    audio = {"hidden_size": 16, "input_feat_size": 16, "conf_num_hidden_layers": 1, "conf_num_attention_heads": 2}
    config = Gemma3nConfig(
        text_config=text,
        vision_config={"hidden_size": 2048, "vocab_offset": first},
        audio_config=audio | {"sscp_conv_channel_size": [8, 4], "vocab_offset": first + 128},
        audio_soft_tokens_per_image=8,
        **{f"{name}_id": words.convert_tokens_to_ids(mark) for name, mark in names.items()},
    )
    processor = Gemma3nProcessor(
        Gemma3nAudioFeatureExtractor(feature_size=16),
        looks,
        words,
        chat_template=_chat(_GEMMA, "<image_soft_token>", "<audio_soft_token>"),
        audio_seq_length=8,
    )
    return Gemma3nForConditionalGeneration(config), processor


def _glm46v(folder: Path):
    from transformers import Glm46VConfig, Glm46VForConditionalGeneration, Glm46VProcessor
    from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil

    marks = "[gMASK] <sop> <|user|> <|assistant|> <|system|> <|begin_of_image|> <|end_of_image|> <|begin_of_video|>"
    words = _named("", "<|endoftext|>", f"{marks} <|end_of_video|> <|image|> <|video|>")
    words.add_tokens(["<think>", "</think>", "/nothink"])
    text = _qwen_text(words, "glm4v_text") | {"head_dim": 8}
    text["rope_parameters"] |= {"mrope_section": [1, 1, 2]}
    vision = {key: value for key, value in _DEEP.items() if not key.startswith(("num_pos", "deep"))}
    config = Glm46VConfig(
        text_config=text,
        vision_config=vision | {"image_size": SIDE, "model_type": "glm4v_vision"},
        **_ids(
            words,
            image_token_id="<|image|>",
            video_token_id="<|video|>",
            image_start_token_id="<|begin_of_image|>",
            image_end_token_id="<|end_of_image|>",
            video_start_token_id="<|begin_of_video|>",
            video_end_token_id="<|end_of_video|>",
        ),
    )
    looks = Glm46VImageProcessorPil(
        patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 512}, temporal_patch_size=2
    )
    template = _chat(_GLM, "<|begin_of_image|><|image|><|end_of_image|>")
    return Glm46VForConditionalGeneration(config), without_videos(Glm46VProcessor)(
        looks, words, None, chat_template=template
    )


def _llava_onevision(folder: Path):
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    words = _named("", "<|im_end|>", "<image> <video> <|im_start|>")
    sizes = [[SIDE, SIDE], [SIDE, 2 * SIDE]]
    looks = LlavaOnevisionImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=sizes)
    config = LlavaOnevisionConfig(
        text_config=_llama(len(words)).to_dict() | {"model_type": "qwen2"},
        vision_config=_TOWER
        | {"model_type": "siglip_vision_model", "image_size": SIDE, "patch_size": 4, "vision_use_head": False},
        image_grid_pinpoints=sizes,
        **_ids(words, image_token_index="<image>", video_token_index="<video>"),
    )
    cls, watches = _with_videos(LlavaOnevisionProcessor, "llava_onevision", size={"height": SIDE, "width": SIDE})
    processor = cls(
        looks,
        words,
        watches,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=_ONEVISION,
    )
    return LlavaOnevisionForConditionalGeneration(config), processor


def _mistral3(folder: Path):
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, PixtralProcessor
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

    words = _named("<s>", "</s>", "[INST] [/INST] [IMG] [IMG_BREAK] [IMG_END] [SYSTEM_PROMPT] [/SYSTEM_PROMPT]")
    config = Mistral3Config(
        text_config=_llama(len(words)).to_dict() | {"model_type": "mistral", "head_dim": 8},
        vision_config={**_TOWER, "model_type": "pixtral", "image_size": 32, "patch_size": 4, "head_dim": 8},
        image_token_index=words.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    looks = PixtralImageProcessorPil(size={"longest_edge": 32}, patch_size={"height": 4, "width": 4})
    processor = PixtralProcessor(
        looks, words, patch_size=4, spatial_merge_size=2, chat_template=_chat(_MISTRAL, "[IMG]")
    )
    return Mistral3ForConditionalGeneration(config), processor


def _aya_vision(folder: Path):
    from transformers import AyaVisionConfig, AyaVisionForConditionalGeneration, AyaVisionProcessor
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    marks = "<|START_OF_TURN_TOKEN|> <|CHATBOT_TOKEN|> <|USER_TOKEN|> <|START_RESPONSE|> <|END_RESPONSE|> <image>"
    marks += " <|START_OF_IMG|> <|END_OF_IMG|> <|IMG_PATCH|> <|IMG_LINE_BREAK|> TILE TILE_GLOBAL"
    words = _named("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", marks)
    config = AyaVisionConfig(
        text_config=_llama(len(words)).to_dict() | {"model_type": "cohere2", "sliding_window": 64},
        vision_config=_TOWER
        | {"model_type": "siglip_vision_model", "image_size": SIDE, "patch_size": 4, "vision_use_head": False},
        image_token_index=words.convert_tokens_to_ids("<|IMG_PATCH|>"),
    )
    looks = GotOcr2ImageProcessorPil(size={"height": SIDE, "width": SIDE}, crop_to_patches=True)
    processor = AyaVisionProcessor(
        looks, words, patch_size=4, img_size=SIDE, downsample_factor=2, chat_template=_chat(_COHERE, "<image>")
    )
    return AyaVisionForConditionalGeneration(config), processor


def _smolvlm2(folder: Path):
    model, processor = _smolvlm(folder)
    words = processor.tokenizer
    words.add_special_tokens({"additional_special_tokens": ["<end_of_utterance>", "<|im_start|>"]})
    model.resize_token_embeddings(len(words))
    processor.chat_template = _IDEFICS
    return model, processor


def _ovis2(folder: Path):
    from transformers import Ovis2Config, Ovis2ForConditionalGeneration, Ovis2Processor
    from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil

    grid = "<IMG_START> <IMG_GRID> <IMG_COL> <IMG_ROW> <IMG_END>"
    words = _named("", "<|im_end|>", f"<image> <|im_start|> <IMG_ATOM> {grid}")
    vision = {k: v for k, v in _TOWER.items()} | {"image_size": SIDE, "patch_size": 4, "hidden_stride": 2}
    config = Ovis2Config(
        text_config=_llama(len(words)).to_dict() | {"model_type": "qwen2"},
        vision_config=vision | {"vocab_size": 32, "num_visual_indicator_tokens": 5},
        image_token_id=words.convert_tokens_to_ids("<IMG_ATOM>"),
        visual_indicator_token_ids=words.convert_tokens_to_ids(grid.split()),
        vocab_size=len(words),
        hidden_size=32,
    )
    looks = Ovis2ImageProcessorPil(size={"height": SIDE, "width": SIDE}, crop_to_patches=False)
    processor = Ovis2Processor(
        looks, words, image_seq_length=4, chat_template=_chat(_CHATML, "<image>", default=_SYSTEM)
    )
    return Ovis2ForConditionalGeneration(config), processor


def _llama4(folder: Path):
    from transformers import Llama4Config, Llama4ForConditionalGeneration, Llama4ImageProcessor, Llama4Processor

    marks = "<|header_start|> <|header_end|> <|eot|> <|image_start|> <|image_end|> <|image|> <|patch|>"
    words = _named("<|begin_of_text|>", "<|eot|>", f"{marks} <|tile_x_separator|> <|tile_y_separator|>")
    text = _llama(len(words)).to_dict() | {"model_type": "llama4_text", "head_dim": 8, "intermediate_size_mlp": 48}
    config = Llama4Config(
        text_config=text | {"num_local_experts": 4, "attention_chunk_size": 64, "rope_parameters": None},
        vision_config=_TOWER
        | {"image_size": SIDE, "patch_size": 4, "vision_output_dim": 32, "intermediate_size": 64}
        | {"projector_input_dim": 32, "projector_output_dim": 32, "pixel_shuffle_ratio": 0.5},
        image_token_index=words.convert_tokens_to_ids("<|patch|>"),
    )
    looks = Llama4ImageProcessor(size={"height": SIDE, "width": SIDE}, max_patches=2)
    processor = Llama4Processor(looks, words, patch_size=4, chat_template=_chat(_LLAMA, "<|image|>"))
    return Llama4ForConditionalGeneration(config), processor


def _lfm2_vl(folder: Path):
    from transformers import Lfm2VlConfig, Lfm2VlForConditionalGeneration, Lfm2VlImageProcessor, Lfm2VlProcessor

    names = {"image_token": "<image>", "image_start_token": "<|image_start|>", "image_end_token": "<|image_end|>"}
    names |= {"image_thumbnail_token": "<|img_thumbnail|>"}
    words = _named("<|startoftext|>", "<|im_end|>", "<|im_start|>", **names)
    text = {name: value for name, value in _llama(len(words)).to_dict().items() if name in _GEMMA_KEYS}
    config = Lfm2VlConfig(
        text_config=text
        | {
            "model_type": "lfm2",
            "layer_types": ["conv", "full_attention"],
            "block_multiple_of": 8,
            "bos_token_id": 257,
        },
        vision_config=_TOWER
        | {"model_type": "siglip2_vision_model", "patch_size": 4, "num_patches": 16}
        | {"vision_use_head": False},
        image_token_id=words.convert_tokens_to_ids("<image>"),
        projector_hidden_size=32,
    )
    looks = Lfm2VlImageProcessor(
        encoder_patch_size=4,
        tile_size=SIDE,
        do_image_splitting=False,
        max_num_patches=64,
        max_image_tokens=16,
        min_image_tokens=4,
    )
    template = "{{ bos_token }}" + _chat(_CHATML, "<image>")
    return Lfm2VlForConditionalGeneration(config), Lfm2VlProcessor(looks, words, chat_template=template)


def _phi4_multimodal(folder: Path):
    from transformers import (
        Phi4MultimodalConfig,
        Phi4MultimodalFeatureExtractor,
        Phi4MultimodalForCausalLM,
        Phi4MultimodalImageProcessor,
        Phi4MultimodalProcessor,
    )

    names = {"image_token": "<|image|>", "audio_token": "<|audio|>"}
    words = _named("", "<|end|>", "<|user|> <|assistant|> <|system|>", **names)
    text = {name: value for name, value in _llama(len(words)).to_dict().items() if name in _GEMMA_KEYS}
    config = Phi4MultimodalConfig(
        **text,
        vision_config=_TOWER
        | {"image_size": 32, "crop_size": 32, "patch_size": 1, "image_token_id": words.image_token_id},
        audio_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_blocks": 2,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 16,
            "depthwise_separable_out_channel": 16,
            "nemo_conv_channels": 16,
            "audio_token_id": words.audio_token_id,
        },
        bos_token_id=257,
    )
    # its processor counts on 32 patches a side
    looks = Phi4MultimodalImageProcessor(size={"height": 32, "width": 32}, patch_size=1, dynamic_hd=1)
    template = _CONTENT + (
        "{% for m in messages %}<|{{ m.role }}|>{{ written(m.content) }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    processor = Phi4MultimodalProcessor(
        looks, Phi4MultimodalFeatureExtractor(), words, chat_template=_chat(template, "<|image|>", "<|audio|>")
    )
    return Phi4MultimodalForCausalLM(config), processor


def _granite_speech(folder: Path):
    from transformers import (
        GraniteSpeechConfig,
        GraniteSpeechFeatureExtractor,
        GraniteSpeechForConditionalGeneration,
        GraniteSpeechProcessor,
    )

    words = _named("", "<|end_of_text|>", "<|start_of_role|> <|end_of_role|> <|audio|>")
    config = GraniteSpeechConfig(
        text_config=_llama(len(words)).to_dict() | {"model_type": "granite"},
        encoder_config={"hidden_dim": 16, "num_layers": 2, "num_heads": 2, "dim_head": 8, "output_dim": 8}
        | {"context_size": 20, "max_pos_emb": 32, "conv_kernel_size": 3},
        projector_config={"model_type": "blip_2_qformer", "encoder_hidden_size": 16, **_TOWER, "num_hidden_layers": 1},
        audio_token_index=words.convert_tokens_to_ids("<|audio|>"),
        has_lora_adapter=False,
    )
    template = _CONTENT + (
        "{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ written(m.content) }}<|end_of_text|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
    )
    processor = GraniteSpeechProcessor(
        GraniteSpeechFeatureExtractor(), words, chat_template=_chat(template, audio="<|audio|>")
    )
    return GraniteSpeechForConditionalGeneration(config), processor


def _voxtral(folder: Path):
    from transformers import VoxtralConfig, VoxtralForConditionalGeneration, VoxtralProcessor, WhisperFeatureExtractor

    words = _named("<s>", "</s>", "[INST] [/INST] [AUDIO] [BEGIN_AUDIO]")
    audio = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = VoxtralConfig(
        text_config=_llama(len(words)).to_dict(),
        audio_config=audio | {"num_mel_bins": 16},
        audio_token_id=words.convert_tokens_to_ids("[AUDIO]"),
    )
    processor = VoxtralProcessor(WhisperFeatureExtractor(feature_size=16), words)
    processor.chat_template = _chat(_MISTRAL, audio="[BEGIN_AUDIO][AUDIO]")
    return VoxtralForConditionalGeneration(config), processor


def _minicpm_v(folder: Path):
    from transformers import MiniCPMV4_6Config, MiniCPMV4_6ForConditionalGeneration, MiniCPMV4_6Processor
    from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

    names = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "image_start_token": "<image>",
        "image_end_token": "</image>",
        "slice_start_token": "<slice>",
        "slice_end_token": "</slice>",
        "image_id_start_token": "<image_id>",
        "image_id_end_token": "</image_id>",
    }
    words = _named("", "<|im_end|>", "<|im_start|>", **names)
    words.add_tokens(["<think>", "</think>"])
    linear = {f"linear_{side}_head_dim": 8 for side in ("key", "value")} | {
        f"linear_num_{side}_heads": 2 for side in ("key", "value")
    }
    config = MiniCPMV4_6Config(
        text_config=_qwen3_text(words, "qwen3_5_text", layer_types=["linear_attention", "full_attention"], **linear),
        vision_config=_TOWER | {"image_size": 64, "patch_size": 4, "insert_layer_id": 0},
        image_size=64,
        insert_layer_id=0,
        image_token_id=words.image_token_id,
        video_token_id=words.video_token_id,
    )
    looks = MiniCPMV4_6ImageProcessorPil(patch_size=4, scale_resolution=32, max_slice_nums=1)
    processor = without_videos(MiniCPMV4_6Processor)(looks, None, words, chat_template=_chat(_QWEN3_5, "<|image_pad|>"))
    return MiniCPMV4_6ForConditionalGeneration(config), processor


def _florence2(folder: Path):
    from transformers import Florence2Config, Florence2ForConditionalGeneration, Florence2Processor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    words = _named("<s>", "</s>", image_token="<image>")
    text = {"vocab_size": len(words), "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48}
    heads = {"decoder_ffn_dim": 48, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = Florence2Config(
        text_config=text | heads | {"model_type": "bart", "max_position_embeddings": 256},
        vision_config={"depths": [1], "embed_dim": [16], "num_heads": [2], "num_groups": [2], "patch_size": [4]}
        | {"patch_stride": [4], "patch_padding": [0], "patch_prenorm": [False], "projection_dim": 32},
        image_token_id=words.image_token_id,
    )
    looks = CLIPImageProcessorPil(size={"height": SIDE, "width": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    looks.image_seq_length = 16
    return Florence2ForConditionalGeneration(config), Florence2Processor(looks, words)


BUILDERS = {
    "blip-2": _blip2,
    "instructblip": _instructblip,
    "llava": _llava,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "paligemma": _paligemma,
    "qwen2_audio": _qwen2_audio,
}


# The models of today, with chat templates of their own kind.
FAMILIES = {
    "qwen3_vl": _qwen3_vl,
    "qwen3_vl_moe": _qwen3_vl_moe,
    "qwen3_5": _qwen3_5,
    "qwen3_5_moe": _qwen3_5_moe,
    "qwen2_5_omni": _qwen2_5_omni,
    "qwen3_omni": _qwen3_omni,
    "gemma3": _gemma3,
    "gemma3n": _gemma3n,
    "gemma4": _gemma4,
    "glm46v": _glm46v,
    "llava_onevision": _llava_onevision,
    "mistral3": _mistral3,
    "aya_vision": _aya_vision,
    "smolvlm2": _smolvlm2,
    "ovis2": _ovis2,
    "minicpm_v": _minicpm_v,
    "voxtral": _voxtral,
    "florence2": _florence2,
    "llama4": _llama4,
    "lfm2_vl": _lfm2_vl,
    "phi4_multimodal": _phi4_multimodal,
    "granite_speech": _granite_speech,
}
MORE = {"internvl": _internvl, **FAMILIES}  # in some tests only


def write(kind: str, folder: Path) -> Path:
    """A checkpoint as transformers saves it."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that transformers renames
        model, processor = (BUILDERS | MORE)[kind](folder)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return folder


def write_pictures(folder: Path) -> Path:
    """Twelve conversations about pictures of one colour each, some of two turns."""
    folder.mkdir()
    lines = []
    for index in range(12):
        colour = ["red", "green", "blue"][index % 3]
        Image.new("RGB", (SIDE + index, SIDE), colour).save(folder / f"{index}.png")
        turns = [{"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": colour}]
        if index % 4 == 3:
            turns += [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes, quite sure."}]
        lines.append(json.dumps({"image": f"{index}.png", "conversations": turns}))
    (folder / "talk.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "talk.jsonl"


def write_videos(folder: Path) -> Path:
    """Twelve questions about videos of two seconds and of three, in each half another colour."""
    import av

    folder.mkdir()
    lines, colours = [], ["red", "green", "blue"]
    for index in range(12):
        first, then = colours[index % 3], colours[(index + 1 + index // 6) % 3]
        count = 8 * (2 + index % 2)
        with av.open(str(folder / f"{index}.mp4"), "w") as made:
            stream = made.add_stream("mpeg4", rate=8)
            stream.width, stream.height, stream.pix_fmt = 2 * SIDE, SIDE, "yuv420p"
            for at in range(count):
                picture = Image.new("RGB", (2 * SIDE, SIDE), first if at < count / 2 else then)
                made.mux(stream.encode(av.VideoFrame.from_image(picture)))
            made.mux(stream.encode())
        turns = [{"from": "human", "value": "<video>\nWhich comes first?"}, {"from": "gpt", "value": first}]
        lines.append(json.dumps({"video": f"{index}.mp4", "conversations": turns}))
    (folder / "talk.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "talk.jsonl"


def write_sounds(folder: Path) -> Path:
    """Twelve questions about tones, as WAV at another rate than the model's and as FLAC."""
    import soundfile

    folder.mkdir()
    rows = ["audio,question,answer"]
    for index in range(12):
        high = index % 2 == 1
        time = np.arange(4000) / 8000
        name = f"{index}.{'flac' if index % 3 else 'wav'}"
        soundfile.write(folder / name, 0.5 * np.sin(2 * np.pi * (1200 if high else 200) * time), 8000)
        rows.append(f"{name},High or low?,{'high' if high else 'low'}")
    (folder / "talk.csv").write_text("\n".join(rows) + "\n")
    return folder / "talk.csv"
