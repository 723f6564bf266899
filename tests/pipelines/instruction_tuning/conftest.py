"""Small checkpoints with random weights in the real layouts of nine multimodal architectures, and conversations."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
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
    "{{ c['text'] }}{% else %}MEDIA{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
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
    template = _TEMPLATE.replace("MEDIA", "<|vision_start|><|image_pad|><|vision_end|>")
    return without_videos(cls)(looks, words, chat_template=template)


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
    template = _TEMPLATE.replace("MEDIA", "<image>")
    processor = without_videos(SmolVLMProcessor)(looks, words, None, image_seq_len=4, chat_template=template)
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
    gemma = {name: value for name, value in _llama(len(words)).to_dict().items() if name in _GEMMA}
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**_TOWER, image_size=SIDE, patch_size=8, vision_use_head=False).to_dict(),
        text_config=GemmaConfig(**gemma, head_dim=8, bos_token_id=words.bos_token_id).to_dict(),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        projection_dim=32,
        hidden_size=32,
    )
    return PaliGemmaForConditionalGeneration(config), processor


_GEMMA = (
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
    template = _TEMPLATE.replace("MEDIA", "<IMG_CONTEXT>\n")
    processor = without_videos(InternVLProcessor)(looks, words, None, image_seq_length=4, chat_template=template)
    return InternVLForConditionalGeneration(config), processor


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


MORE = {"internvl": _internvl}  # in some tests only


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """{model type: folder}, each built when first asked for."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp("checkpoints") / kind
            torch.manual_seed(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of classes that transformers renames
                model, processor = (BUILDERS | MORE)[kind](folder)
                model.save_pretrained(folder)
                processor.save_pretrained(folder)
            made[kind] = folder
        return made[kind]

    return get


@pytest.fixture(scope="session")
def kinds() -> list[str]:
    return list(BUILDERS)


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Twelve conversations about pictures of one colour each, some of two turns."""
    folder = tmp_path / "pictures"
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


@pytest.fixture
def sounds(tmp_path) -> Path:
    """Twelve questions about tones, as WAV at another rate than the model's and as FLAC."""
    import soundfile

    folder = tmp_path / "sounds"
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


@pytest.fixture
def hosted() -> dict[str, Any]:
    """Settings of a transformers Trainer that learns fast on the CPU and reports every loss, to nobody."""
    return {
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


@pytest.fixture
def short(checkpoints, pictures, tmp_path):
    """Overrides that make a run of seconds of any kind of model."""

    def words(kind: str = "llava", data: Path | None = None) -> list[str]:
        return [
            f"model={checkpoints(kind)}",
            f"data={data or pictures}",
            "steps=6",
            "batch=2",
            "rank=2",
            "samples.count=2",
            "samples.max_new_tokens=2",
            f"runs={tmp_path / 'runs'}",
        ]

    return words
