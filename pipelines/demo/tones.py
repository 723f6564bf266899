"""Made sounds of one second, their descriptions, and questions whose answers are exact.

A sound is one to three beeps, low, middle or high, of a hum (sine), a buzz (square) or a warble (vibrato). A small
Qwen2-Audio, of transformers' own class, can be trained to describe them in a minute, and then be asked about them.
"""

# transformers annotates too narrowly.
# pyright: reportArgumentType=false

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

RATE = 16_000  # samples per second
NUMBERS = ("one", "two", "three")
PITCHES = {"low": 220.0, "middle": 550.0, "high": 1400.0}  # Hz
TIMBRES = ("hum", "buzz", "warble")
QUESTIONS = {"number": "how many beeps are there?", "pitch": "how high is it?", "timbre": "what kind of sound is it?"}


@dataclass(frozen=True)
class Sound:
    number: str
    pitch: str
    timbre: str

    def __str__(self) -> str:
        return f"{self.number} {self.pitch} {self.timbre}"


def random_sound(rng: np.random.Generator) -> Sound:
    return Sound(str(rng.choice(NUMBERS)), str(rng.choice(list(PITCHES))), str(rng.choice(TIMBRES)))


def play(sound: Sound, rng: np.random.Generator) -> np.ndarray:  # (RATE,) float32
    """One second, with pitch, length, loudness and noise varied."""
    time = np.arange(RATE) / RATE
    pitch = PITCHES[sound.pitch] * rng.uniform(0.9, 1.1)
    bend = 12 * np.sin(2 * np.pi * 9 * time) if sound.timbre == "warble" else 0.0
    wave = np.sin(2 * np.pi * pitch * time + bend + rng.uniform(0, 2 * np.pi))
    wave = np.sign(wave) * 0.6 if sound.timbre == "buzz" else wave
    loud = np.zeros(RATE)
    for beep in range(NUMBERS.index(sound.number) + 1):
        start = int(RATE * (0.05 + 0.31 * beep + rng.uniform(0, 0.04)))
        loud[start : start + int(RATE * rng.uniform(0.14, 0.2))] = rng.uniform(0.4, 0.8)
    return (wave * loud + rng.normal(0, 0.01, RATE)).astype(np.float32)


def caption(sound: Sound) -> str:
    """A description in other words than those the base learns, and in another order."""
    times = {"one": "once", "two": "twice", "three": "three times"}[sound.number]
    return f"a {sound.timbre} at a {sound.pitch} pitch sounds {times}"


def write_questions(folder: Path, count: int, seed: int) -> Path:
    """Writes WAV files, questions.csv and captions.csv into an existing folder."""
    import soundfile

    rng = np.random.default_rng(seed)
    rows, captions = ["audio,question,answer"], ["audio,question,answer"]
    for index in range(count):
        sound, kind = random_sound(rng), str(rng.choice(list(QUESTIONS)))
        soundfile.write(folder / f"{index:05d}.wav", play(sound, rng), RATE)
        rows.append(f"{index:05d}.wav,{QUESTIONS[kind]},{getattr(sound, kind)}")
        captions.append(f"{index:05d}.wav,describe the sound.,{caption(sound)}")
    (folder / "captions.csv").write_text("\n".join(captions) + "\n")
    (folder / "questions.csv").write_text("\n".join(rows) + "\n")
    return folder / "questions.csv"


def build_base() -> tuple[Any, Any]:
    """A small Qwen2-Audio with random weights, and its processor."""
    from transformers import (
        Qwen2AudioConfig,
        Qwen2AudioForConditionalGeneration,
        Qwen2AudioProcessor,
        WhisperFeatureExtractor,
    )

    from equipoise.pipelines.demo.train_multimodal_base import byte_pairs

    special = ["<pad>", "</s>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", "<|im_start|>", "<|im_end|>"]
    texts = [
        f"{Sound(n, p, t)}. {q} {n} {p} {t}"
        for n in NUMBERS
        for p in PITCHES
        for t in TIMBRES
        for q in QUESTIONS.values()
    ]
    words = byte_pairs(texts + ["user assistant system"] * 20, 400, special)
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": words.convert_tokens_to_ids("<|im_end|>")}
    config = Qwen2AudioConfig(
        audio_config={
            "num_mel_bins": 32,
            "d_model": 64,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "max_source_positions": 50,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(words),
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 256,
            **ends,
        },
        audio_token_index=words.convert_tokens_to_ids("<|AUDIO|>"),
    )
    model = Qwen2AudioForConditionalGeneration(config)
    model.generation_config.eos_token_id = ends["eos_token_id"]
    model.generation_config.pad_token_id = 0
    extractor = WhisperFeatureExtractor(feature_size=32, chunk_length=1)
    return model, Qwen2AudioProcessor(extractor, words, chat_template=TEMPLATE)


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'text' %}"
    "{{ c['text'] }}{% else %}<|audio_bos|><|AUDIO|><|audio_eos|>{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_base(folder: Path, steps: int = 400, seed: int = 0) -> float:
    """Teaches the small model to describe sounds, and saves it; returns the mean of the last losses."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model, processor = build_base()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    made = [random_sound(rng) for _ in range(1000)]
    features = torch.cat(
        [
            processor.feature_extractor([play(s, rng)], sampling_rate=RATE, return_tensors="pt").input_features
            for s in made
        ]
    )
    prompt = processor.tokenizer(
        "<|audio_bos|>" + "<|AUDIO|>" * 25 + "<|audio_eos|>", add_special_tokens=False
    ).input_ids
    texts = [[*prompt, *processor.tokenizer(f"{s}<|im_end|>", add_special_tokens=False).input_ids] for s in made]
    last: list[float] = []
    for _ in tqdm(range(steps), desc="learning to describe sounds", dynamic_ncols=True, disable=None):
        chosen = rng.integers(0, len(made), 32)
        ids = nn.utils.rnn.pad_sequence([torch.tensor(texts[i]) for i in chosen], batch_first=True)
        mask = (ids != 0).long()
        inputs = features[chosen]
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            input_features=inputs,
            feature_attention_mask=torch.ones(len(chosen), inputs.shape[2], dtype=torch.long),
        ).logits
        start = len(prompt)
        labels = ids[:, start:].masked_fill(mask[:, start:] == 0, -100)
        loss = F.cross_entropy(logits[:, start - 1 : -1].flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        last = [*last[-19:], loss.item()]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return sum(last) / len(last)
