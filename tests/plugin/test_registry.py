"""Discovery: what is listed, what is loaded, and what is reported about plugins that cannot be used."""

import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch

from equipoise import registry
from equipoise.balancing.equal_weight import EqualWeight
from equipoise.balancing.joint import Joint
from equipoise.balancing.objective import Losses, Objective
from equipoise.coordination.constant import Constant
from equipoise.coordination.coordinator import Coordinator
from equipoise.errors import BrokenPluginError, DuplicateNameError, InputError, UnknownNameError

GOOD = "import torch\nclass Good(torch.optim.SGD):\n    'A good one.'\n"
OPTIMIZERS = "equipoise.optimizers"


def names(kind):
    return [entry.name for entry in registry.entries(kind)]


@pytest.mark.parametrize("kind", registry.KINDS)
def test_built_ins_are_found_through_their_entry_points(kind):
    points = [p for p in entry_points(group=f"equipoise.{kind}") if p.dist and p.dist.name == "equipoise"]
    assert points
    built_in = [entry for entry in registry.entries(kind) if entry.distribution == "equipoise"]
    assert sorted(entry.name for entry in built_in) == sorted(point.name for point in points)
    for entry in built_in:
        assert registry.load(kind, entry.name).__name__ == (entry.target.partition(":")[2] or entry.target)
        assert registry.check(entry) == ""


def test_torch_names_are_its_own_exports():
    listed = {entry.name: entry for entry in registry.entries("optimizers") if entry.distribution == "torch"}
    exported = {name for name, c in vars(torch.optim).items() if isinstance(c, type)}
    exported -= {"Optimizer", "LBFGS", "SparseAdam"}  # not for ordinary training: closures, sparse gradients
    assert {name.lower() for name in exported} == set(listed)
    for name in exported:
        assert registry.load("optimizers", name.lower()) is getattr(torch.optim, name)
    assert listed["adamw"].version == torch.__version__


def test_listing_imports_neither_torch_nor_plugins(distribution):
    distribution("loud", {OPTIMIZERS: {"loud": "loud_module:Loud"}}, loud_module="print('imported')\nclass Loud: ...")
    code = """
import sys
from equipoise import registry
print(len(registry.entries()), "torch" in sys.modules, "loud_module" in sys.modules)
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    count, *rest = shown.split()
    assert rest == ["False", "False"]
    assert int(count) > 20


def test_a_third_party_plugin_is_listed_and_loaded(distribution):
    distribution("good-plugin", {OPTIMIZERS: {"good": "good_module:Good"}}, version="2.1", good_module=GOOD)
    entry = registry.find("optimizers", "good")
    assert (entry.distribution, entry.version, entry.target) == ("good-plugin", "2.1", "good_module:Good")
    assert issubclass(registry.load("optimizer", "good"), torch.optim.SGD)
    assert registry.find(None, "good") == entry


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("optimizers", "scaled_adam", "no optimizer 'scaled_adam'. Did you mean 'scaled_adamw'?"),
        ("optimizers", "AdamWX", "no optimizer 'AdamWX'. Did you mean 'adamw' or 'adamax'?"),
        ("objectives", "zzzz", "no objective 'zzzz'."),
        (None, "joynt", "no plugin 'joynt'. Did you mean 'joint'?"),
    ],
)
def test_an_unknown_name_is_answered_with_the_closest(kind, name, message):
    with pytest.raises(UnknownNameError) as caught:
        registry.find(kind, name)
    assert str(caught.value) == f"{message} `equipoise list{' ' + kind if kind else ''}` shows all."


def test_an_unknown_kind():
    with pytest.raises(InputError, match=r"no kind 'planes'\. The kinds are optimizers, coordinators,"):
        registry.entries("planes")


BROKEN = {
    "absent": ("no_such_module:X", None, "ModuleNotFoundError: No module named 'no_such_module'"),
    "inner": ("lone.part:X", {"lone": ""}, "No module named 'lone.part'; 'lone' is not a package"),
    "needy": ("needy:X", {"needy": "import no_such_thing\nclass X: ..."}, "No module named 'no_such_thing'"),
    "raises": ("raises:X", {"raises": "raise RuntimeError('boom')\nclass X: ..."}, "boom"),
    "syntax": ("syntax:X", {"syntax": "class X(:"}, "SyntaxError"),
    "attribute": ("empty:Missing", {"empty": "Other = 1"}, "has no attribute 'Missing'"),
    "function": ("function:make", {"function": "def make(params): ..."}, "is not a subclass of torch.optim.Optimizer"),
    "plain": ("plain:Plain", {"plain": "class Plain: ..."}, "is not a subclass of torch.optim.Optimizer"),
    "target": ("no target", {}, "this is not `module:Class`"),
}  # entry → (target, its modules, what the error says)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_is_reported_and_sinks_nothing(name, distribution):
    target, modules, message = BROKEN[name]
    distribution("good-plugin", {OPTIMIZERS: {"good": "good_module:Good"}}, good_module=GOOD)
    distribution("broken-plugin", {OPTIMIZERS: {name: target}}, version="0.3", **(modules or {}))
    entry = registry.find("optimizers", name)
    problem = registry.check(entry)
    assert problem.startswith(f"optimizer {name!r} of broken-plugin 0.3 cannot be used: {target}: ")
    assert message in problem
    with pytest.raises(BrokenPluginError, match="Repair or uninstall broken-plugin"):
        registry.load("optimizers", name)
    assert registry.check(registry.find("optimizers", "good")) == ""


@pytest.mark.parametrize(
    "source",
    [
        "1 / 0",
        "import sys\nsys.exit(3)",
        "import torch\nX = torch.nn.Linear",
        "from math import pi as X",
        "if False:\n    class X: ...",
    ],
)
def test_what_only_loading_can_tell(source, distribution):
    distribution("late", {OPTIMIZERS: {"late": "late_module:X"}}, late_module=f"{source}\nX = globals().get('X')\n")
    entry = registry.find("optimizers", "late")
    assert "late_module:X: " in registry.check(entry)


@pytest.mark.parametrize(
    ("kind", "source", "ok"),
    [
        ("objectives", "from equipoise.balancing.objective import Objective\nclass X(Objective): ...", True),
        ("objectives", "import torch\nclass X(torch.optim.SGD): ...", False),
        ("coordinators", "from equipoise.coordination.coordinator import Coordinator\nclass X(Coordinator): ...", True),
        ("coordinators", "class X(dict): ...", False),
        ("pipelines", "import pydantic\nclass X:\n    Config = pydantic.BaseModel\n    def run(self): ...", True),
        ("pipelines", "import pydantic\nclass X:\n    Config = pydantic.BaseModel", False),
        ("pipelines", "class X:\n    Config = dict\n    def run(self): ...", False),
        ("families", "from equipoise.pipelines.text_to_image.families.flux import Flux as X", True),
        ("families", "from equipoise.pipelines.text_to_image.families import Family\nclass X(Family): ...", False),
        ("families", "from equipoise.pipelines.text_to_image.families.unet import UNetFamily as X", False),
        ("commands", "class X:\n    add_arguments = run = print", False),  # not `module:Class` but a module
    ],
)
def test_each_kind_has_its_own_condition(kind, source, ok, distribution):
    distribution("some", {f"equipoise.{kind}": {"some": "some_module:X"}}, some_module=source)
    assert (registry.check(registry.find(kind, "some")) == "") == ok


def test_conditional_definitions_and_star_imports_are_no_false_alarm(distribution):
    source = "try:\n    from torch.optim import *\nexcept ImportError:\n    raise\nif True:\n    class Mine(SGD): ...\n"
    distribution("odd", {OPTIMIZERS: {"mine": "odd_module:Mine", "theirs": "odd_module:AdamW"}}, odd_module=source)
    for name in ("mine", "theirs"):
        entry = registry.find("optimizers", name)
        assert registry.check(entry) == ""


def test_two_distributions_with_one_name(distribution):
    for number in (1, 2):
        distribution(f"plugin-{number}", {OPTIMIZERS: {"same": f"module_{number}:Good"}}, **{f"module_{number}": GOOD})
    claims = [entry for entry in registry.entries("optimizers") if entry.name == "same"]
    assert [entry.distribution for entry in claims] == ["plugin-1", "plugin-2"]
    claim = "optimizer 'same' is claimed by plugin-1 1.0 (module_1:Good) and plugin-2 1.0 (module_2:Good)."
    both = f"{claim} Uninstall all but one."
    assert [entry.error for entry in claims] == [both, both]
    with pytest.raises(DuplicateNameError) as caught:
        registry.load("optimizers", "same")
    assert str(caught.value) == both
    assert registry.load("optimizers", "adamw") is torch.optim.AdamW


def test_one_name_in_two_kinds(distribution):
    distribution("both", {OPTIMIZERS: {"joint": "both_module:Good"}}, both_module=GOOD)
    with pytest.raises(InputError, match="'joint' is found among optimizers and objectives"):
        registry.find(None, "joint")
    assert registry.load("objectives", "joint") is Joint


def test_no_plugin_takes_a_torch_name_unseen(distribution):
    distribution("mine", {OPTIMIZERS: {"adamw": "mine_module:Good"}}, mine_module=GOOD)
    with pytest.raises(DuplicateNameError, match=r"claimed by mine 1\.0 .* and torch .*\. Uninstall mine\."):
        registry.load("optimizers", "adamw")


def test_the_second_copy_of_a_distribution_does_not_count(distribution):
    distribution("equipoise", {"equipoise.objectives": {"joint": "shadow:Joint"}}, version="9.9")
    assert [entry.version for entry in registry.entries("objectives") if entry.name == "joint"] == ["9.9"]


@pytest.fixture
def before(tmp_path, monkeypatch):
    """A folder that Python searches before the one that distributions are installed in."""
    monkeypatch.syspath_prepend(tmp_path / "before")
    return tmp_path / "before"


@pytest.mark.parametrize("leftover", ["~ood_plugin-1.0.dist-info", "-ood_plugin-1.0.dist-info", "~ood_plugin.egg-info"])
def test_what_pip_left_of_a_removal_hides_nothing(leftover, distribution, before):
    site = distribution("good-plugin", {OPTIMIZERS: {"good": "gone:Good"}})
    before.mkdir()
    (site / "good_plugin-1.0.dist-info").rename(before / leftover)
    assert "good" not in names("optimizers")
    distribution("good-plugin", {OPTIMIZERS: {"good": "good_module:Good"}}, version="2.0", good_module=GOOD)
    entry = registry.find("optimizers", "good")
    assert (entry.version, entry.error, registry.check(entry)) == ("2.0", "", "")


def test_a_later_copy_of_a_distribution_adds_nothing(distribution, before):
    """Its modules are those of the first copy, which offers something else, or nothing any more."""
    site = distribution("my.plugin", {OPTIMIZERS: {"new": "good_module:Good"}}, version="2.0", good_module=GOOD)
    site.rename(before)
    site.mkdir()
    distribution("My_Plugin", {OPTIMIZERS: {"old": "good_module:Old"}})
    assert "new" in names("optimizers") and "old" not in names("optimizers")
    (before / "my.plugin-2.0.dist-info" / "entry_points.txt").write_text("[console_scripts]\n")
    assert not {"new", "old"} & {*names("optimizers")}


@pytest.mark.parametrize("text", [b"[equipoise.optimizers]\nno equals sign\n", b"\xff\xfe[equipoise.optimizers]"])
def test_a_malformed_distribution_does_not_hide_the_others(text, distribution):
    folder = distribution("malformed", {})
    (folder / "malformed-1.0.dist-info" / "entry_points.txt").write_bytes(text)
    assert "adamw" in names("optimizers") and "scaled_adamw" in names("optimizers")
    if text.isascii():
        (entry,) = [entry for entry in registry.entries() if entry.distribution == "malformed"]
        assert "entry_points.txt cannot be read" in registry.check(entry) or "is not `module:Class`" in registry.check(
            entry
        )


def test_joint_and_equal_weight_give_the_gradients_of_their_sums():
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    losses = Losses(weight[0] * 3, {"audio": weight[0] * 5, "video": weight[1] * 7})
    for objective, expected in ((Joint(), [3.0, 0.0]), (EqualWeight(), [8.0, 7.0])):
        weight.grad = None
        logs = objective.backward(losses, lambda total: total.backward(retain_graph=True))
        assert weight.grad is not None and weight.grad.tolist() == expected
        assert float(logs["loss"]) == objective.combine(losses).item()
    with pytest.raises(InputError, match="Use `joint`"):
        EqualWeight().combine(Losses(weight[0], {}))
    with pytest.raises(NotImplementedError, match="Objective defines neither"):
        Objective().backward(losses)


def test_constant_leaves_every_rate_and_has_no_state():
    coordinator = Constant()
    assert coordinator.factors(["encoder", "language"]) == {"encoder": 1.0, "language": 1.0}
    coordinator.load_state_dict(coordinator.state_dict())
    with pytest.raises(NotImplementedError, match="Coordinator does not define factors"):
        Coordinator().factors(["encoder"])


def test_nothing_is_read_again_within_looked_up_once(distribution):
    """Within the block nothing is read again; after it, what came meanwhile is there."""
    with registry.looked_up_once():
        before = registry.entries()
        distribution("latecomer", {"equipoise.optimizers": {"late": "late_of:Late"}})
        assert registry.entries() == before
        with registry.looked_up_once():
            assert registry.entries() == before
        assert registry.entries() == before
    assert "late" in [entry.name for entry in registry.entries("optimizers")]
