"""The plugins for axolotl and ms-swift: their call sequences, as their sources have them, around a real Trainer.

Of the two programs only the classes that a plugin derives from are written anew here, by what they document.
"""

import importlib
import importlib.util
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pydantic import BaseModel
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from equipoise import BoundedAdamW, ScaledAdamW, scaled
from equipoise.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks transformers
AXOLOTL = """
class BasePlugin:
    def __init__(self): ...
    def register(self, cfg): ...
    def get_input_args(self): ...
    def post_trainer_create(self, cfg, trainer): ...
"""
SWIFT = """
from transformers import Trainer as HfTrainer

class OptimizerCallback:
    def __init__(self, args, trainer):
        self.args, self.trainer = args, trainer

    def create_optimizer(self, model=None):
        return HfTrainer.create_optimizer(self.trainer, **({} if model is None else {"model": model}))

class ByPart(OptimizerCallback):
    def create_optimizer(self, model=None):
        first, *rest = [param for param in model.parameters() if param.requires_grad]
        cls, kwargs = HfTrainer.get_optimizer_cls_and_kwargs(self.args, model)
        return cls([{"params": [first], "lr": self.args.vit_lr}, {"params": rest}], **kwargs)

optimizers_map = {"default": OptimizerCallback, "multimodal": ByPart, "lorap": ByPart}
"""
SWIFT_TRAINERS = """
class Seq2SeqTrainer: ...

class TrainerFactory:
    @classmethod
    def get_trainer_cls(cls, args):
        return Seq2SeqTrainer
"""


@dataclass
class Arguments(TrainingArguments):
    """What ms-swift adds to them, as far as it concerns optimizers."""

    optimizer: str | None = None
    vit_lr: float | None = None
    aligner_lr: float | None = None
    use_galore: bool = False


class SwiftTrainer(Trainer):
    def __init__(self, *words, args, **kwargs):
        super().__init__(*words, args=args, **kwargs)
        optimizers_map = sys.modules["swift.optimizers"].optimizers_map
        self.optimizer_callback = optimizers_map[args.optimizer or "default"](args, self)

    def create_optimizer(self, model=None):
        self.optimizer = self.optimizer_callback.create_optimizer(model=model)
        return self.optimizer


def make(tmp_path, kind=Trainer, by_hand=None, **given) -> Trainer:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    lora = LoraConfig(
        r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False, modules_to_save=["ln_f"]
    )
    rows = torch.randint(0, 32, (8, 16), generator=torch.Generator().manual_seed(1))
    arguments = Arguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, save_strategy="no", report_to=[],
        learning_rate=1e-2, weight_decay=0.1, lr_scheduler_type="constant", use_cpu=True, disable_tqdm=True,
        logging_steps=1000, dataloader_pin_memory=False, **given,
    )  # fmt: skip
    return kind(
        model=get_peft_model(GPT2LMHeadModel(config), lora),
        args=arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        **({"optimizer_cls_and_kwargs": by_hand} if by_hand else {}),
    )


def trained(trainer: Trainer) -> list[torch.Tensor]:
    trainer.train()
    return [param.detach() for param in trainer.model.parameters() if param.requires_grad]


def same(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Both programs' packages, importable; forgotten after the test."""
    sources = {
        "axolotl/integrations/base.py": AXOLOTL,
        "axolotl/core/trainers/base.py": "from transformers import Trainer\n\nclass AxolotlTrainer(Trainer): ...\n",
        "swift/optimizers/__init__.py": SWIFT,
        "swift/trainers/__init__.py": SWIFT_TRAINERS,
    }
    for place, source in sources.items():
        file = tmp_path / "programs" / place
        file.parent.mkdir(parents=True)
        file.write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path / "programs"))
    yield
    for name in list(sys.modules):
        if name.partition(".")[0] in ("axolotl", "swift") or name == "equipoise.hosts.axolotl":
            del sys.modules[name]


def axolotl(trainer: Trainer, **yaml) -> None:
    """What axolotl does with `plugins: [equipoise.hosts.axolotl.EquipoisePlugin]`, from the YAML to the training."""
    plugin = importlib.import_module("equipoise.hosts.axolotl").EquipoisePlugin()
    plugin.register(yaml)
    module, _, name = plugin.get_input_args().rpartition(".")

    class Base(BaseModel):
        learning_rate: float | None = None

    class Config(Base, getattr(importlib.import_module(module), name)):
        pass

    plugin.post_trainer_create(Config(**yaml).model_dump(exclude_none=True), trainer)


@pytest.mark.parametrize(
    ("options", "by_hand"),
    [
        ({"optimizer": "scaled_adamw", "damping": "1e-2"}, (ScaledAdamW, {"lr": 1e-2, "damping": 1e-2})),  # YAML 1.1
        ({"optimizer": "bounded", "trust": 1e-3}, (BoundedAdamW, {"lr": 1e-2, "trust": 1e-3})),
        ({"optimizer": "nadam", "momentum_decay": 0.1}, (torch.optim.NAdam, {"lr": 1e-2, "momentum_decay": 0.1})),
    ],
)
def test_axolotl_trains_as_by_hand(options, by_hand, programs, tmp_path, capsys):
    plain, ours = make(tmp_path), make(tmp_path)
    axolotl(ours, learning_rate=1e-2, equipoise=options)
    weights = trained(ours)
    assert type(ours.optimizer.optimizer) is by_hand[0]
    assert [group["weight_decay"] for group in ours.optimizer.param_groups] == [0.1, 0.0]
    assert same(weights, trained(make(tmp_path, by_hand=by_hand))) and not same(weights, trained(plain))
    reported = capsys.readouterr().err
    assert f"equipoise: {options['optimizer'].removesuffix('_adamw')} " in reported
    assert ("1 LoRA pair of rank 2" in reported) is (options["optimizer"] != "nadam")


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ({}, "EquipoisePlugin is there, but no key `equipoise`"),
        ({"equipoise": {"optimizer": "scald"}}, "equipoise.optimizer: no optimizer 'scald'."),
        ({"equipoise": {"optimizer": "scaled", "dampin": 1}}, "equipoise: scaled has no option 'dampin' here."),
        ({"equipoise": {"optimizer": "scaled", "damping": -1}}, "equipoise of scaled: damping: must be"),
        ({"equipoise": {"optimizer": "alpha_adam", "lr": 0.5}}, "equipoise: lr is not set here"),
        ({"equipoise": {"optimizer": "joint"}}, "equipoise.optimizer joint: this is objective 'joint'"),
    ],
)
def test_axolotl_is_refused_before_anything_is_loaded(yaml, message, programs):
    plugin = importlib.import_module("equipoise.hosts.axolotl").EquipoisePlugin()
    with pytest.raises(InputError, match=message):
        plugin.register(yaml)


def test_axolotls_own_optimizer_is_what_is_treated(programs, tmp_path):
    ours = make(tmp_path, by_hand=(torch.optim.RAdam, {"lr": 1e-2}))
    axolotl(ours, equipoise={"optimizer": "scaled"})
    assert ours.optimizer_cls_and_kwargs == (scaled(torch.optim.RAdam), {"lr": 1e-2})
    with pytest.raises(InputError, match="the program's optimizer is RAdam, not AdamW"):
        axolotl(make(tmp_path, by_hand=(torch.optim.RAdam, {})), equipoise={"optimizer": "scaled_adamw"})
    with pytest.raises(InputError, match="which makes several optimizers"):
        axolotl(make(tmp_path, by_hand=(lambda: None, {})), equipoise={"optimizer": "scaled"})


def test_axolotls_trainer_is_coordinated(programs, tmp_path):
    plugin = importlib.import_module("equipoise.hosts.axolotl").EquipoisePlugin()
    asked = {"equipoise": {"coordinator": {"name": "commit_clr", "window": "5"}}}
    plugin.register(asked)
    cls = plugin.get_trainer_cls(asked)
    assert cls.__name__ == "CoordinatedAxolotlTrainer" and issubclass(cls, Trainer)
    made = make(tmp_path, partial(cls, components={"encoder": ["ln_f"], "language": ["attn"]}))
    plugin.post_trainer_create(asked, made)
    trained(made)
    assert made.coordination.coordinator.recent.maxlen == 5 and len(made.coordination.coordinator.recent) == 3
    assert plugin.get_trainer_cls({"equipoise": {"optimizer": "scaled"}}) is None
    with pytest.raises(InputError, match="another plugin has made the trainer, a Trainer"):
        plugin.post_trainer_create(asked, make(tmp_path))


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ({"equipoise": {"coordinator": "comit"}}, "equipoise.coordinator: no coordinator 'comit'"),
        ({"equipoise": {"coordinator": {"name": "commit_clr", "windw": 1}}}, "equipoise.coordinator: commit_clr: "),
        (
            {"equipoise": {"coordinator": "commit_clr"}, "rl": "dpo"},
            "supervised .* and rl asks for another",
        ),
    ],
)
def test_axolotls_coordinator_is_refused(yaml, message, programs):
    plugin = importlib.import_module("equipoise.hosts.axolotl").EquipoisePlugin()
    with pytest.raises(InputError, match=message):
        plugin.get_trainer_cls(yaml)


@pytest.fixture
def swift(programs):
    """ms-swift has imported the file that `--external_plugins $(python -m equipoise.hosts.swift)` names."""
    shown = subprocess.run([sys.executable, "-m", "equipoise.hosts.swift"], capture_output=True, text=True, check=True)
    spec = importlib.util.spec_from_file_location("_swift_external_0", shown.stdout.strip())
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    return SimpleNamespace(names=set(sys.modules["swift.optimizers"].optimizers_map))


@pytest.mark.parametrize(
    ("name", "words", "by_hand"),
    [
        ("scaled_adamw", "damping=1e-2, trust=1e-2", (ScaledAdamW, {"lr": 1e-2, "damping": 1e-2, "trust": 1e-2})),
        ("bounded", None, (BoundedAdamW, {"lr": 1e-2})),
        ("nadam", "momentum_decay=0.1", (torch.optim.NAdam, {"lr": 1e-2, "momentum_decay": 0.1})),
    ],
)
def test_swift_trains_as_by_hand(name, words, by_hand, swift, tmp_path, capsys):
    assert {"default", "multimodal", "equipoise_scaled", f"equipoise_{name}"} <= swift.names
    ours = make(tmp_path, SwiftTrainer, optimizer=f"equipoise_{name}", optim_args=words)
    weights = trained(ours)
    assert type(ours.optimizer.optimizer) is by_hand[0]
    assert same(weights, trained(make(tmp_path, by_hand=by_hand)))
    assert not same(weights, trained(make(tmp_path, SwiftTrainer)))
    assert f"equipoise: {name.removesuffix('_adamw')} " in capsys.readouterr().err


def test_swifts_rates_by_part_stay(swift, tmp_path):
    ours = make(tmp_path, SwiftTrainer, optimizer="equipoise_scaled", vit_lr=1e-3)
    optimizer = ours.create_optimizer(ours.model)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-2] and type(optimizer) is ScaledAdamW
    assert len(optimizer.pairs) == 1
    other = make(tmp_path, SwiftTrainer, optimizer="equipoise_nadam", vit_lr=1e-3)
    with pytest.raises(InputError, match="takes no rates by part of the model"):
        other.create_optimizer(other.model)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optim_args": "damping"}, "--optim_args damping: wants key=value"),
        ({"optim_args": "damping=1,damping=2"}, "--optim_args gives damping twice, as 1 and as 2."),
        ({"optim_args": "dampin=1"}, "--optim_args: scaled has no option 'dampin' here."),
        ({"use_galore": True}, "GaLore is for full weights"),
    ],
)
def test_swift_is_refused_when_the_trainer_is_made(given, message, swift, tmp_path):
    with pytest.raises(InputError, match=message):
        make(tmp_path, SwiftTrainer, optimizer="equipoise_scaled", **given)


def asked_of_swift(optim_args, **more) -> SimpleNamespace:
    return SimpleNamespace(optim_args=optim_args, task_type="causal_lm", **more)


def test_swifts_trainer_is_coordinated(swift, tmp_path):
    factory = sys.modules["swift.trainers"].TrainerFactory
    words = "coordinator=commit_clr,coordinator.window=5,damping=1e-2"
    assert factory.get_trainer_cls(asked_of_swift("damping=1e-2")).__name__ == "Seq2SeqTrainer"
    sys.modules["swift.trainers"].Seq2SeqTrainer = SwiftTrainer
    for optimizer in (None, "equipoise_scaled"):
        cls = factory.get_trainer_cls(asked_of_swift(words))
        assert cls.__name__ == "CoordinatedSwiftTrainer"
        kind = partial(cls, components={"encoder": ["ln_f"], "language": ["attn"]})
        made = make(tmp_path, kind, optimizer=optimizer, optim_args=words)
        trained(made)
        inside = made.optimizer.optimizer
        assert {group["component"] for group in inside.param_groups} == {"encoder", "language"}
        assert isinstance(inside, ScaledAdamW) == (optimizer is not None)
        assert made.coordination.coordinator.recent.maxlen == 5 and len(made.coordination.coordinator.recent) == 3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (asked_of_swift("coordinator=comit"), "--optim_args coordinator: no coordinator 'comit'"),
        (asked_of_swift("coordinator=commit_clr,coordinator.windw=1"), "--optim_args coordinator: commit_clr: "),
        (asked_of_swift("coordinator.window=1"), "coordinator.window: of which coordinator"),
        (asked_of_swift("coordinator=commit_clr", rlhf_type="dpo"), "is for `swift sft` of a language model"),
    ],
)
def test_swifts_coordinator_is_refused(args, message, swift):
    with pytest.raises(InputError, match=message):
        sys.modules["swift.trainers"].TrainerFactory.get_trainer_cls(args)


@pytest.mark.parametrize("module", ["equipoise.hosts.axolotl", "equipoise.hosts.swift.equipoise_swift"])
def test_without_the_program_there_is_one_sentence(module):
    if importlib.util.find_spec("axolotl") or importlib.util.find_spec("swift"):
        pytest.skip("axolotl or ms-swift is installed here")
    with pytest.raises(ModuleNotFoundError, match=r"is a plugin for .* not installed here"):
        importlib.import_module(module)
