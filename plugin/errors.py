"""The errors Equipoise raises on purpose. Each message is whole sentences: what, where, what was got, what to do."""

from collections.abc import Sequence


class EquipoiseError(Exception):
    """Something went wrong that the message explains; the command line prints it without a traceback and exits 1."""


class InputError(EquipoiseError):
    """The user's input cannot be used; nothing has been written. The command line exits 2."""


class ConfigError(InputError):
    """Everything that is wrong with a configuration, in one go."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class PairingError(InputError):
    """The LoRA factors of a model or parameter list cannot be paired with certainty."""


class NamelessError(PairingError):
    """Nothing names the tensors, and their shapes and order do not settle which are LoRA pairs; perhaps none is."""


class UnknownNameError(InputError):
    """No plugin of that kind has that name."""


class DuplicateNameError(InputError):
    """Two distributions claim one plugin name."""


class BrokenPluginError(InputError):
    """A plugin is listed by its distribution but cannot be loaded."""
