"""The recipe of the embedded vision-language base: `make demo-multimodal-base` runs it from nothing, seeded.

A BLIP-2 of transformers' own class, small enough to ship: its vision tower first learns to tell what stands in which
quarter of a drawn scene, then Q-Former, projection and language model learn to say captions and plain statements of
it. No question is among them: asking and answering is what instruction tuning has to teach.
"""

# transformers annotates too narrowly.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from equipoise.pipelines.demo import multimodal_folder, scenes, shapes
from equipoise.pipelines.runs.checkpoints import save_tensors

WIDTH, PATCH, QUERIES = 128, 8, 12
_COLOURS, _SHAPES = list(shapes.COLOURS), list(shapes.SHAPES)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that knows the domain's words whole and spells out any other from bytes."""
    rng = np.random.default_rng(0)
    made = [scenes.random_scene(rng) for _ in range(500)]
    texts = [scenes.caption(scene) for scene in made]
    texts += [". ".join(scenes.statements(scene, rng)) for scene in made]
    texts += [" ".join(scenes.question(scene, kind, rng)) for scene in made for kind in scenes.KINDS]
    texts += ["Question: Answer:"] * 100
    return byte_pairs(texts, 600, ["<pad>", "</s>", "<image>"])


def byte_pairs(texts: list[str], size: int, special: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of the commonest pairs in some texts; begins every text with </s>, as OPT's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    start = ("</s>", special.index("</s>"))
    tokenizer.post_processor = processors.TemplateProcessing("</s> $A", special_tokens=[start])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="</s>", eos_token="</s>")


def build(words: PreTrainedTokenizerFast) -> Blip2ForConditionalGeneration:
    vision = Blip2VisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=scenes.SIZE,
        patch_size=PATCH,
        initializer_range=0.02,
    )
    qformer = Blip2QFormerConfig(
        vocab_size=8,  # of a text input that this Q-Former does not have
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        cross_attention_frequency=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    language = OPTConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        ffn_dim=2 * WIDTH,
        word_embed_proj_dim=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
        dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    config = Blip2Config(
        vision_config=vision,
        qformer_config=qformer,
        text_config=language,
        num_query_tokens=QUERIES,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    model = Blip2ForConditionalGeneration(config)
    nn.init.normal_(model.query_tokens, std=0.02)  # zeros, as they are made, would all learn the same
    return model


def train_tower(tower: nn.Module, states: Callable[[Tensor], Tensor], pixels: Tensor, made: list, steps: int) -> float:
    """Teaches a tower which shape and colour each quarter has, and the background; returns the share of right shapes
    with their colours at the end. `states`: normalized pictures → (batch, patches, WIDTH)."""
    head = nn.Linear(WIDTH, len(_SHAPES) + len(_COLOURS) + 2 + len(scenes.BACKGROUNDS))
    behind = torch.tensor([scenes.BACKGROUNDS.index(scene.background) for scene in made])
    labels = torch.zeros(len(made), 4, 2, dtype=torch.long)  # 0: nothing there
    for index, scene in enumerate(made):
        for item in scene.items:
            labels[index, item.quarter] = torch.tensor([_SHAPES.index(item.shape) + 1, _COLOURS.index(item.colour) + 1])
    side = scenes.SIZE // PATCH
    trained = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=2e-3, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    right = 0.0
    bar = tqdm(range(steps), desc="vision tower")
    for _ in bar:
        chosen = torch.randint(len(made), (32,))
        seen = states(normalized(pixels[chosen]))
        grid = seen.reshape(-1, 2, side // 2, 2, side // 2, WIDTH).mean(dim=(2, 4)).flatten(1, 2)  # (32, 4, WIDTH)
        parts = [len(_SHAPES) + 1, len(_COLOURS) + 1, len(scenes.BACKGROUNDS)]
        shape, colour, background = head(grid).split(parts, dim=-1)
        target = labels[chosen]
        loss = F.cross_entropy(shape.flatten(0, 1), target[..., 0].flatten())
        loss = loss + F.cross_entropy(colour.flatten(0, 1), target[..., 1].flatten())
        loss = loss + F.cross_entropy(background.flatten(0, 1), behind[chosen].repeat_interleave(4))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        said = torch.stack([shape.argmax(-1), colour.argmax(-1)], -1)
        full = target[..., 0] > 0
        right = 0.95 * right + 0.05 * (said == target).all(-1)[full].double().mean().item()
        bar.set_postfix(loss=f"{loss.item():.3f}", right=f"{right:.2f}")
    return right


def normalized(pixels: Tensor) -> Tensor:
    """(batch, height, width, 3) bytes as the processor gives them to the model: (batch, 3, height, width)."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def train_language(
    model: Blip2ForConditionalGeneration, words: PreTrainedTokenizerFast, pixels: Tensor, made: list, steps: int
) -> float:
    """Teaches everything after the tower to say a caption or statements of a scene; returns the smoothed last loss."""
    rng = np.random.default_rng(1)
    model.vision_model.requires_grad_(False)
    with torch.no_grad():
        states = torch.cat([model.vision_model(normalized(part)).last_hidden_state for part in pixels.split(256)])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3, weight_decay=0.01, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
    image, start, end = model.config.image_token_index, words.bos_token_id, words.eos_token_id
    smoothed = 3.0
    bar = tqdm(range(steps), desc="Q-Former and language model")
    for _ in bar:
        chosen = rng.integers(0, len(made), 32)
        texts = [
            scenes.caption(made[i]) if rng.random() < 0.4 else ". ".join(scenes.statements(made[i], rng)[:3])
            for i in chosen
        ]
        ids = [torch.tensor([start, *words(text, add_special_tokens=False).input_ids, end]) for text in texts]
        batch = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=words.pad_token_id)
        labels = batch.masked_fill(batch == words.pad_token_id, -100)[:, 1:]
        queries = model.qformer(
            query_embeds=model.query_tokens.expand(len(chosen), -1, -1), encoder_hidden_states=states[chosen]
        ).last_hidden_state
        visual = model.language_projection(queries)
        embedded = torch.cat([visual, model.get_input_embeddings()(batch[:, :-1])], dim=1)
        mask = torch.cat([torch.ones(len(chosen), QUERIES, dtype=torch.long), (labels != -100).long()], dim=1)
        logits = model.language_model(inputs_embeds=embedded, attention_mask=mask).logits[:, QUERIES:]
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        smoothed = 0.98 * smoothed + 0.02 * loss.item()
        bar.set_postfix(loss=f"{smoothed:.4f}")
    assert image == words.convert_tokens_to_ids("<image>")
    return smoothed


@torch.no_grad()
def right_captions(model: Blip2ForConditionalGeneration, processor: Blip2Processor, count: int, seed: int) -> float:
    """Share of captions of new scenes that are right to the word."""
    rng = np.random.default_rng(seed)
    made = [scenes.random_scene(rng) for _ in range(count)]
    inputs = processor(images=[scenes.draw(s, rng) for s in made], text=["a"] * count, return_tensors="pt")
    inputs["input_ids"], inputs["attention_mask"] = inputs["input_ids"][:, :-1], inputs["attention_mask"][:, :-1]
    ids = model.eval().generate(**inputs, max_new_tokens=40, do_sample=False)
    said = [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
    wanted = [scenes.caption(scene) for scene in made]
    tqdm.write(f"{said[0]!r} for {wanted[0]!r}")
    return sum(s.split(". ")[0] == w for s, w in zip(said, wanted, strict=True)) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=multimodal_folder(), help="default: the shipped one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=12_000)
    parser.add_argument("--tower-steps", type=int, default=2400)
    parser.add_argument("--steps", type=int, default=1800, help="of Q-Former and language model")
    parser.add_argument("--work", type=Path, help="keep the tower here between trials")
    arguments = parser.parse_args()
    started = time.time()
    torch.manual_seed(arguments.seed)
    rng = np.random.default_rng(arguments.seed)
    words = make_tokenizer()
    model = build(words)
    made = [scenes.random_scene(rng) for _ in range(arguments.scenes)]
    drawn = [np.asarray(scenes.draw(scene, rng)) for scene in tqdm(made, desc="drawing")]
    pixels = torch.from_numpy(np.stack(drawn))
    kept = arguments.work / "tower.safetensors" if arguments.work else None
    if kept and kept.exists():
        model.vision_model.load_state_dict(load_file(kept))
        right = float("nan")
    else:
        tower = model.vision_model
        right = train_tower(tower, lambda p: tower(p).last_hidden_state[:, 1:], pixels, made, arguments.tower_steps)
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(kept, model.vision_model.state_dict())
            print(f"tower: {right:.1%} of shapes right in their quarter, {(time.time() - started) / 60:.1f} minutes")
    torch.manual_seed(arguments.seed + 1)  # the same from here on, whether the tower was kept or not
    loss = train_language(model, words, pixels, made, arguments.steps)
    looks = BlipImageProcessorPil(
        size={"height": scenes.SIZE, "width": scenes.SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor = Blip2Processor(looks, words, num_query_tokens=QUERIES)
    arguments.out.mkdir(parents=True, exist_ok=True)
    processor.save_pretrained(arguments.out)
    captions = right_captions(model, processor, 200, arguments.seed + 1)
    model.requires_grad_(True).half().save_pretrained(arguments.out)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {(time.time() - started) / 60:.1f} minutes")
    print(f"tower: {right:.1%} of shapes right in their quarter; last loss {loss:.3f}; captions right: {captions:.1%}")


if __name__ == "__main__":
    main()
