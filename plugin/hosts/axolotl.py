"""A plugin of axolotl's, in its YAML:

    plugins:
      - equipoise.hosts.axolotl.EquipoisePlugin
    equipoise:
      optimizer: scaled_adamw
      damping: 1e-2

`optimizer` takes what `equipoise.hosts.script` lists; the other keys are its options. `scaled` and `bounded` treat the
optimizer that axolotl's own key `optimizer` names. Axolotl never asks plugins for an optimizer, so the class goes to
the Trainer, and with it through LoRA+ and learning rates by group.

Beside it or alone, `coordinator: commit_clr`, or with options `coordinator: {name: commit_clr, window: 5}`, keeps the
two sides of a multimodal model in balance (`equipoise.hosts.coordination`).
"""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field

from equipoise.coordination.coordinator import Coordinator
from equipoise.errors import InputError
from equipoise.hosts.choice import Choice, choose, refuse_deepspeed
from equipoise.hosts.coordination import coordinated, make_coordinator
from equipoise.hosts.trainer import SayPairs, put_in_place

try:
    from axolotl.integrations.base import BasePlugin  # type: ignore[import-not-found]
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "axolotl":
        raise
    raise ModuleNotFoundError(
        "equipoise.hosts.axolotl is a plugin for axolotl, which is not installed here. Use it in axolotl's YAML.",
        name="axolotl",
    ) from error


class EquipoiseArgs(BaseModel):
    """The key that axolotl's configuration gains."""

    equipoise: dict[str, Any] | None = Field(
        default=None,
        description="The optimizer (`equipoise list optimizers`, scaled or bounded) with its options; the coordinator",
    )


class EquipoisePlugin(BasePlugin):
    """Puts the optimizer of the key `equipoise` in the place of the Trainer's, and coordinates its rates."""

    def get_input_args(self) -> str:
        return f"{__name__}.EquipoiseArgs"

    def register(self, cfg: Mapping[str, Any]) -> None:
        _asked(cfg)  # before anything is loaded

    def get_trainer_cls(self, cfg: Mapping[str, Any]) -> type | None:
        _, coordinator = _asked(cfg)
        if coordinator is None:
            return None
        if others := [key for key in ("trainer_cls", "rl", "reward_model", "process_reward_model") if cfg.get(key)]:
            raise InputError(
                f"equipoise.coordinator: is for supervised fine-tuning with axolotl's own trainer, and {others[0]} "
                "asks for another. Leave one of them out."
            )
        from axolotl.core.trainers.base import AxolotlTrainer  # type: ignore[import-not-found]

        return coordinated(AxolotlTrainer, coordinator)

    def post_trainer_create(self, cfg: Mapping[str, Any], trainer: Any) -> None:
        choice, coordinator = _asked(cfg)
        if coordinator is not None and not hasattr(trainer, "coordination"):
            raise InputError(
                f"equipoise.coordinator: another plugin has made the trainer, a {type(trainer).__name__}. Put "
                "EquipoisePlugin first among the plugins."
            )
        if choice is None:
            return
        refuse_deepspeed(choice.name, bool(trainer.args.deepspeed))
        if trainer.optimizer is not None:
            raise InputError(
                f"equipoise.optimizer: {choice.name} comes too late: the trainer has an optimizer "
                "already. Remove what makes it from the configuration."
            )
        own = trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
        trainer.optimizer_cls_and_kwargs = put_in_place(choice, *own)
        trainer.add_callback(SayPairs())


def _asked(cfg: Mapping[str, Any]) -> tuple[Choice | None, Coordinator | None]:
    given = dict(cfg.get("equipoise") or {})
    name, coordinator = given.pop("optimizer", None), given.pop("coordinator", None)
    if not isinstance(name, str) and (given or coordinator is None):
        raise InputError(
            "plugins: EquipoisePlugin is there, but no key `equipoise` with an `optimizer` in it. Add `equipoise: "
            "{optimizer: scaled_adamw}`, or remove the plugin."
        )
    choice = choose(name, given, called=("equipoise.optimizer", "equipoise")) if isinstance(name, str) else None
    if coordinator is None:
        return choice, None
    options = dict(coordinator) if isinstance(coordinator, Mapping) else {"name": coordinator}
    return choice, make_coordinator(str(options.pop("name", None)), options, "equipoise.coordinator")
