"""How other programs construct an optimizer, reproduced as they do it, and transformers' Trainer for real."""

import ast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import equipoise
from equipoise import BoundedAdamW, ScaledAdamW, scaled
from equipoise.errors import InputError


class Down(nn.Module):
    """A layer as kohya's networks have it: lora_down, lora_up, a buffer alpha, and the forward it took over."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.org_forward = layer.forward
        self.lora_down = nn.Linear(16, 4, bias=False)
        self.lora_up = nn.Linear(4, 8, bias=False)
        self.register_buffer("alpha", torch.tensor(4.0))
        layer.forward = self.forward  # type: ignore[method-assign]

    def forward(self, x):
        return self.org_forward(x) + self.lora_up(self.lora_down(x))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ScaledAdamW", ["damping=1e-2", "betas=0.9,0.99", "damping_mode='relative'", "trust=None", "weight_decay=0"]),
        ("BoundedAdamW", ["trust=2e-2", "betas=(0.9, 0.99)", "amsgrad=True"]),
    ],
)
def test_kohyas_optimizer_type(name, words):
    """--optimizer_type equipoise.ScaledAdamW --optimizer_args damping=1e-2, of sd-scripts and musubi-tuner.

    Groups of dict views, options as Python literals, and optimizer.train() where there is one.
    """
    layers = [nn.Linear(16, 8).requires_grad_(False) for _ in range(2)]
    network = nn.ModuleDict({f"lora_unet_{i}": Down(layer) for i, layer in enumerate(layers)})
    options = {key: ast.literal_eval(value) for key, value in (word.split("=") for word in words)}
    groups = [
        {"params": {n: p for n, p in module.named_parameters()}.values(), "lr": 1e-3} for module in network.values()
    ]
    optimizer = getattr(equipoise, name)(groups, lr=1e-4, **options)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-3]
    assert len(optimizer.pairs) == 2 and optimizer.pairs.found_by == ("modules",)
    for key, value in options.items():
        assert optimizer.param_groups[0][key] == value
    for _ in range(2):
        sum(layer(torch.ones(1, 16)).square().sum() for layer in layers).backward()
        optimizer.step()
    assert optimizer.fallbacks == 0 and len(optimizer.shares) == (2 if name == "BoundedAdamW" else 0)


@pytest.mark.parametrize(
    ("name", "word"), [("ScaledAdamW", "damping='1e-2'"), ("BoundedAdamW", "trust='much'"), ("ScaledAdamW", "order=1")]
)
def test_a_literal_of_another_type_is_refused(name, word):
    key, value = word.split("=")
    with pytest.raises(InputError, match=f"{name}: parameter group 0: {key} must be .* got "):
        getattr(equipoise, name)([nn.Parameter(torch.ones(2))], lr=1e-4, **{key: ast.literal_eval(value)})


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks transformers for it
@pytest.mark.parametrize("cls", [ScaledAdamW, BoundedAdamW, scaled(torch.optim.NAdam)])
def test_transformers_trainer_takes_the_class(cls, tmp_path):
    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)

    def trained(resume: bool, steps: int) -> Trainer:
        torch.manual_seed(0)
        lora = LoraConfig(
            r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False, modules_to_save=["ln_f"]
        )
        model = get_peft_model(GPT2LMHeadModel(config), lora)
        rows = torch.randint(0, 32, (8, 16), generator=torch.Generator().manual_seed(1))
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=2, save_steps=2, report_to=[],
            learning_rate=1e-2, lr_scheduler_type="constant", use_cpu=True, disable_tqdm=True, logging_steps=1000,
            dataloader_pin_memory=False, weight_decay=0.1,
        )  # fmt: skip
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=[{"input_ids": row, "labels": row} for row in rows],
            optimizer_cls_and_kwargs=(cls, {"lr": 1e-2}),
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
        return trainer

    whole = trained(resume=False, steps=4)
    inner = whole.optimizer.optimizer  # accelerate wraps it
    assert type(inner) is cls and len(inner.pairs) == 1
    decayed, others = inner.param_groups  # the Trainer's own two
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) == 2 and len(others["params"]) == 2  # the pair; weight and bias of the norm
    assert not torch.equal(others["params"][0], torch.ones(16))
    again = trained(resume=True, steps=4)
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
