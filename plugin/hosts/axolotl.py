"""A plugin of axolotl's, in its YAML:

    plugins:
      - equipoise.hosts.axolotl.EquipoisePlugin
    equipoise:
      optimizer: scaled_adamw
      damping: 1e-2

`optimizer` takes what `equipoise.hosts.script` lists; the other keys are its options. `scaled` and `bounded` treat the
optimizer that axolotl's own key `optimizer` names. Axolotl never asks plugins for an optimizer, so the class goes to
the Trainer, and with it through LoRA+ and learning rates by group.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field

from equipoise.errors import InputError
from equipoise.hosts.choice import Choice, choose, refuse_deepspeed
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
        default=None, description="The optimizer (`equipoise list optimizers`, scaled or bounded), and its options"
    )


class EquipoisePlugin(BasePlugin):
    """Puts the optimizer of the key `equipoise` in the place of the Trainer's."""

    def get_input_args(self) -> str:
        return f"{__name__}.EquipoiseArgs"

    def register(self, cfg: Mapping[str, Any]) -> None:
        _choice(cfg)  # before anything is loaded

    def post_trainer_create(self, cfg: Mapping[str, Any], trainer: Any) -> None:
        choice = _choice(cfg)
        refuse_deepspeed(choice.name, bool(trainer.args.deepspeed))
        if trainer.optimizer is not None:
            raise InputError(
                f"equipoise.optimizer: {choice.name} comes too late: the trainer has an optimizer "
                "already. Remove what makes it from the configuration."
            )
        own = trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
        trainer.optimizer_cls_and_kwargs = put_in_place(choice, *own)
        trainer.add_callback(SayPairs())


def _choice(cfg: Mapping[str, Any]) -> Choice:
    given = dict(cfg.get("equipoise") or {})
    name = given.pop("optimizer", None)
    if not isinstance(name, str):
        raise InputError(
            "plugins: EquipoisePlugin is there, but no key `equipoise` with an `optimizer` in it. Add `equipoise: "
            "{optimizer: scaled_adamw}`, or remove the plugin."
        )
    return choose(name, given, called=("equipoise.optimizer", "equipoise"))
