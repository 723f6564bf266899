"""Installs the treatment of `equipoise wrap` when a program imports torch.

Every Python under the wrapped command runs this at its start, most of them for programs that never train, some older
than ours or without Equipoise. So it imports nothing that Python has not loaded by then, and hands on at once to the
sitecustomize that would have run without it.
"""

import os
import sys


class Watcher:
    """Finds what the other finders find, and acts once torch, and what of ours asked for it, is fully imported."""

    def __init__(self):
        self.depth = 0  # imports of torch and of ours that are under way

    def find_spec(self, name, path=None, target=None):
        if name != "torch" and not name.startswith("equipoise."):
            return None
        specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in specs if spec is not None), None)
        loader = getattr(spec, "loader", None)
        execute = getattr(loader, "exec_module", None)
        if execute is not None:  # being asked is no sign: programs look for torch without importing it

            def exec_module(module):
                self.depth += 1
                try:
                    execute(module)
                    if self.depth == 1 and "torch" in sys.modules and self in sys.meta_path:
                        install()
                        sys.meta_path.remove(self)
                finally:
                    self.depth -= 1

            vars(loader)["exec_module"] = exec_module
        return spec


def install():
    try:
        from equipoise.hosts.wrap import treat_this_process
    except (ImportError, SyntaxError) as error:
        sys.stderr.write(
            f"equipoise wrap: {sys.executable} imports torch but cannot import equipoise ({error}), so what it trains "
            f"would be left as it is. Install Equipoise there: {sys.executable} -m pip install equipoise\n"
        )
        raise SystemExit(2) from error
    treat_this_process()


def hand_on():
    """Run the sitecustomize behind this one, if there is any, as Python would have done."""
    here = os.path.dirname(__spec__.origin)
    indices = [index for index, entry in enumerate(sys.path) if os.path.abspath(entry) == here]
    for index in reversed(indices):
        del sys.path[index]
    ours = sys.modules.pop(__name__)
    try:
        import sitecustomize  # noqa: F401 (run for its effects)
    except ImportError as error:
        if error.name != __name__:
            raise
        sys.modules[__name__] = ours
    finally:
        sys.path[indices[0] : indices[0]] = [here]  # programs hand their sys.path on to their workers


if __name__ == "sitecustomize":
    sys.meta_path.insert(0, Watcher())
    hand_on()
