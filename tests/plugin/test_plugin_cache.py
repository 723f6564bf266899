"""Third-party plugins are loaded once, in another process, and their errors are kept while nothing changes."""

import os
import sys
from pathlib import Path

from equipoise import registry
from equipoise.plugin_cache import load_errors

OPTIMIZERS = "equipoise.optimizers"
GOOD = "import torch, os\nprint('noise')\nopen(os.environ['LOADED'], 'a').write('x')\nclass Good(torch.optim.SGD): ..."


def errors_of(*names: str) -> list[str]:
    return load_errors([registry.find("optimizers", name) for name in names])


def test_a_plugin_is_loaded_once_and_again_when_it_changes(distribution, monkeypatch, tmp_path):
    loaded = tmp_path / "loaded"
    monkeypatch.setenv("LOADED", str(loaded))
    folder = distribution("good", {OPTIMIZERS: {"good": "good_module:Good"}}, good_module=GOOD)
    for _ in range(2):
        assert errors_of("good", "scaled_adamw", "adamw") == ["", "", ""]
        assert loaded.read_text() == "x"
    (folder / "good_module.py").write_text("import torch\nGood = torch.nn.Linear")
    (problem,) = errors_of("good")
    assert "is not a subclass of torch.optim.Optimizer" in problem
    assert "good_module" not in sys.modules and loaded.read_text() == "x"


def test_a_plugin_that_ends_the_process_takes_no_other_along(distribution, monkeypatch, tmp_path):
    monkeypatch.setenv("LOADED", str(tmp_path / "loaded"))
    distribution("good", {OPTIMIZERS: {"good": "good_module:Good"}}, good_module=GOOD)
    distribution("fatal", {OPTIMIZERS: {"fatal": "fatal_module:X"}}, fatal_module="import os\nos._exit(3)")
    good, fatal = errors_of("good", "fatal")
    assert good == ""
    assert fatal.startswith(
        "optimizer 'fatal' of fatal 1.0 cannot be used: fatal_module:X: loading it ends the process"
    )


def test_a_plugin_that_hangs_is_reported(distribution, monkeypatch):
    monkeypatch.setattr("equipoise.plugin_cache._TIMEOUT", 3)
    distribution("slow", {OPTIMIZERS: {"slow": "slow_module:X"}}, slow_module="import time\ntime.sleep(600)")
    assert "takes more than 3 seconds to load" in errors_of("slow")[0]


def test_an_unusable_cache_only_costs_time(distribution, monkeypatch, tmp_path):
    distribution("broken", {OPTIMIZERS: {"broken": "broken_module:X"}}, broken_module="1 / 0")
    (tmp_path / "cache").write_text("a file where the folder should be")
    for _ in range(2):
        assert "ZeroDivisionError" in errors_of("broken")[0]
    os.remove(tmp_path / "cache")
    Path(tmp_path / "cache" / "equipoise").mkdir(parents=True)
    (tmp_path / "cache" / "equipoise" / "plugins.json").write_text("[not json")
    assert "ZeroDivisionError" in errors_of("broken")[0]


def test_modules_of_the_current_folder_are_not_the_plugins(distribution, monkeypatch, tmp_path):
    distribution("good", {OPTIMIZERS: {"good": "good_module:Good"}}, good_module="import torch\nGood = torch.optim.SGD")
    (tmp_path / "here").mkdir()
    for name in ("torch", "argparse", "equipoise"):
        (tmp_path / "here" / f"{name}.py").write_text("raise SystemExit('a module of this folder was imported')")
    monkeypatch.chdir(tmp_path / "here")
    assert errors_of("good") == [""]


def test_an_error_is_kept_while_modules_come_from_the_same_folders(distribution, monkeypatch, tmp_path):
    source = "import torch, helper\nNeedy = torch.optim.SGD"
    site = distribution("needy", {OPTIMIZERS: {"needy": "needy_module:Needy"}}, needy_module=source)
    assert "No module named 'helper'" in errors_of("needy")[0]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "helper.py").touch()
    with monkeypatch.context() as elsewhere:
        elsewhere.syspath_prepend(tmp_path / "other")
        elsewhere.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "other"), str(site)]))
        assert errors_of("needy") == [""]
    assert "No module named 'helper'" in errors_of("needy")[0]
    (site / "helper.py").touch()  # as an installation does
    assert errors_of("needy") == [""]


def test_a_plugin_is_loaded_again_when_another_file_of_its_package_changes(distribution):
    site = distribution("parts", {OPTIMIZERS: {"parts": "parts_package.inner.one:Good"}})
    inner = site / "parts_package" / "inner"
    inner.mkdir(parents=True)
    for file in (inner.parent / "__init__.py", inner / "__init__.py"):
        file.touch()
    (inner / "one.py").write_text("from parts_package.two import Good")
    (inner.parent / "two.py").write_text("1 / 0")
    assert "ZeroDivisionError" in errors_of("parts")[0]
    (inner.parent / "two.py").write_text("from torch.optim import SGD as Good")
    assert errors_of("parts") == [""]
