"""The optimizers in ms-swift (4 and newer):

    swift sft --external_plugins $(python -m equipoise.hosts.swift) --optimizer equipoise_scaled_adamw \\
        --optim_args damping=1e-2 …

`--optimizer` takes what `equipoise.hosts.script` lists, with `equipoise_` before it; `--optim_args` takes its options,
separated by commas. The rates by part of the model (--vit_lr, --aligner_lr) and LoRA+ (--lorap_lr_ratio) stay.

`--optim_args coordinator=commit_clr,coordinator.window=5`, with any optimizer, ms-swift's own too, keeps the two sides
of a multimodal model in balance (`equipoise.hosts.coordination`).
"""

from functools import partial
from typing import Any

from transformers import Trainer

from equipoise import attach, registry
from equipoise.errors import InputError
from equipoise.hosts.choice import choose, read_pairs, refuse_deepspeed
from equipoise.hosts.coordination import coordinated, make_coordinator
from equipoise.hosts.trainer import put_in_place

try:
    from swift.optimizers import OptimizerCallback, optimizers_map  # type: ignore[import-not-found]
    from swift.trainers import TrainerFactory  # type: ignore[import-not-found]
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "swift":
        raise
    raise ModuleNotFoundError(
        "equipoise_swift.py is a plugin for ms-swift 4, which is not installed here. Give it to --external_plugins.",
        name="swift",
    ) from error


class EquipoiseCallback(OptimizerCallback):
    """Treats the optimizer that ms-swift would have made with the other arguments the same."""

    def __init__(self, name: str, args: Any, trainer: Any):
        super().__init__(args, trainer)
        given = {key: value for key, value in _optim_args(args).items() if not _is_coordinators(key)}
        self.choice = choose(name, given, called=("--optimizer equipoise_…", "--optim_args"))
        refuse_deepspeed(name, bool(args.deepspeed))
        if args.use_galore:
            raise InputError(
                f"--optimizer equipoise_{name}: GaLore is for full weights, this for LoRA. Use one of them."
            )

    def create_optimizer(self, model: Any = None) -> Any:
        choice, trainer = self.choice, self.trainer
        model = trainer.model if model is None else model
        adapters = getattr(model, "peft_config", {}).values()
        kind = "lorap" if any(getattr(config, "lorap_lr_ratio", None) for config in adapters) else "default"
        if self.args.vit_lr is not None or self.args.aligner_lr is not None:
            kind = "multimodal"
        if choice.method is None:
            if kind != "default":
                raise InputError(
                    f"--optimizer equipoise_{choice.name}: it takes no rates by part of the model. Leave --vit_lr, "
                    "--aligner_lr and --lorap_lr_ratio out, or use equipoise_scaled or equipoise_bounded."
                )
            own = Trainer.get_optimizer_cls_and_kwargs(self.args, model)
            trainer.optimizer_cls_and_kwargs = put_in_place(choice, *own)
        optimizer = optimizers_map[kind](self.args, trainer).create_optimizer(model=model)
        if choice.method is not None:
            choice.check_base(type(optimizer))
            kind = type(optimizer).__name__
            attach(optimizer, model, **{"damping": None, **choice.defaults, **choice.options})
            choice.say_treated(optimizer, kind, optimizer.pairs.summary)
        return optimizer


def _optim_args(args: Any) -> dict[str, str]:
    words = [word for word in (args.optim_args or "").replace(" ", "").split(",") if word]
    if wrong := [word for word in words if "=" not in word]:
        raise InputError(f"--optim_args {wrong[0]}: wants key=value,key=value, as in --optim_args damping=1e-2.")
    return read_pairs(words, "--optim_args")


def _is_coordinators(key: str) -> bool:
    return key.partition(".")[0] == "coordinator"


def _coordinate(own: Any) -> Any:
    """`TrainerFactory.get_trainer_cls` that coordinates the class where `--optim_args` asks for it."""

    def get_trainer_cls(args: Any) -> Any:
        asked = "coordinator" in (args.optim_args or "")
        given = {key: value for key, value in _optim_args(args).items() if _is_coordinators(key)} if asked else {}
        if not given:
            return own(args)
        if hasattr(args, "rlhf_type") or args.task_type != "causal_lm":
            raise InputError("--optim_args coordinator: is for `swift sft` of a language model. Leave it out here.")
        if "coordinator" not in given:
            raise InputError(f"--optim_args {next(iter(given))}: of which coordinator? Add coordinator=commit_clr.")
        name = given.pop("coordinator")
        options = {key.partition(".")[2]: value for key, value in given.items()}
        return coordinated(own(args), make_coordinator(name, options, "--optim_args coordinator"))

    return get_trainer_cls


if not hasattr(TrainerFactory, "equipoise"):  # workers import this file too
    TrainerFactory.equipoise = TrainerFactory.get_trainer_cls
    TrainerFactory.get_trainer_cls = staticmethod(_coordinate(TrainerFactory.get_trainer_cls))
for _name in ["scaled", "bounded", *(entry.name for entry in registry.entries("optimizers"))]:
    optimizers_map[f"equipoise_{_name}"] = partial(EquipoiseCallback, _name)
