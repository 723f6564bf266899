"""Third-party plugins are loaded once, elsewhere, and what came of it is kept for as long as it can hold."""

import os
import sys
from pathlib import Path

from equipoise import registry
from equipoise.plugin_cache import verdicts

OPTIMIZERS = "equipoise.optimizers"
GOOD = "import torch, os\nprint('noise')\nopen(os.environ['SEEN'], 'a').write('x')\nclass Good(torch.optim.SGD): ..."


def judged(*names: str) -> list[str]:
    return verdicts([registry.find("optimizers", name) for name in names])


def test_a_plugin_is_loaded_once_and_again_when_it_changes(distribution, monkeypatch, tmp_path):
    seen = tmp_path / "seen"
    monkeypatch.setenv("SEEN", str(seen))
    folder = distribution("good", {OPTIMIZERS: {"good": "good_module:Good"}}, good_module=GOOD)
    for _ in range(2):
        assert judged("good", "scaled_adamw", "adamw") == ["", "", ""]
        assert seen.read_text() == "x"
    (folder / "good_module.py").write_text("import torch\nGood = torch.nn.Linear")
    (problem,) = judged("good")
    assert "is not a subclass of torch.optim.Optimizer" in problem
    assert "good_module" not in sys.modules and seen.read_text() == "x"


def test_one_that_ends_the_process_takes_no_other_along(distribution, monkeypatch, tmp_path):
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    distribution("good", {OPTIMIZERS: {"good": "good_module:Good"}}, good_module=GOOD)
    distribution("fatal", {OPTIMIZERS: {"fatal": "fatal_module:X"}}, fatal_module="import os\nos._exit(3)")
    good, fatal = judged("good", "fatal")
    assert good == ""
    assert fatal.startswith(
        "optimizer 'fatal' of fatal 1.0 cannot be used: fatal_module:X: loading it ends the process"
    )


def test_one_that_hangs_is_named(distribution, monkeypatch):
    monkeypatch.setattr("equipoise.plugin_cache._TIMEOUT", 3)
    distribution("slow", {OPTIMIZERS: {"slow": "slow_module:X"}}, slow_module="import time\ntime.sleep(600)")
    assert "takes more than 3 seconds to load" in judged("slow")[0]


def test_an_unusable_cache_only_costs_time(distribution, monkeypatch, tmp_path):
    distribution("broken", {OPTIMIZERS: {"broken": "broken_module:X"}}, broken_module="1 / 0")
    (tmp_path / "cache").write_text("a file where the folder should be")
    for _ in range(2):
        assert "ZeroDivisionError" in judged("broken")[0]
    os.remove(tmp_path / "cache")
    Path(tmp_path / "cache" / "equipoise").mkdir(parents=True)
    (tmp_path / "cache" / "equipoise" / "verdicts.json").write_text("[not json")
    assert "ZeroDivisionError" in judged("broken")[0]


def test_modules_of_the_current_folder_are_not_the_plugins(distribution, monkeypatch, tmp_path):
    distribution("good", {OPTIMIZERS: {"good": "good_module:Good"}}, good_module="import torch\nGood = torch.optim.SGD")
    (tmp_path / "here").mkdir()
    for name in ("torch", "argparse", "equipoise"):
        (tmp_path / "here" / f"{name}.py").write_text("raise SystemExit('a module of this folder was imported')")
    monkeypatch.chdir(tmp_path / "here")
    assert judged("good") == [""]


def test_a_verdict_holds_as_long_as_modules_come_from_the_same_places(distribution, monkeypatch, tmp_path):
    source = "import torch, helper\nNeedy = torch.optim.SGD"
    site = distribution("needy", {OPTIMIZERS: {"needy": "needy_module:Needy"}}, needy_module=source)
    assert "No module named 'helper'" in judged("needy")[0]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "helper.py").touch()
    with monkeypatch.context() as elsewhere:
        elsewhere.syspath_prepend(tmp_path / "other")
        elsewhere.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "other"), str(site)]))
        assert judged("needy") == [""]
    assert "No module named 'helper'" in judged("needy")[0]
    (site / "helper.py").touch()  # as an installation does
    assert judged("needy") == [""]


def test_a_plugin_is_judged_again_when_another_file_of_its_package_changes(distribution):
    site = distribution("parts", {OPTIMIZERS: {"parts": "parts_package.inner.one:Good"}})
    inner = site / "parts_package" / "inner"
    inner.mkdir(parents=True)
    for file in (inner.parent / "__init__.py", inner / "__init__.py"):
        file.touch()
    (inner / "one.py").write_text("from parts_package.two import Good")
    (inner.parent / "two.py").write_text("1 / 0")
    assert "ZeroDivisionError" in judged("parts")[0]
    (inner.parent / "two.py").write_text("from torch.optim import SGD as Good")
    assert judged("parts") == [""]
