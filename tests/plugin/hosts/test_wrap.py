"""`equipoise wrap` with real processes: a program that starts its own workers, which know nothing of Equipoise."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from equipoise.errors import InputError
from equipoise.hosts.wrap import VARIABLE, asks_for_deepspeed, environment, parse
from equipoise.pipelines import cli

APP = """
import subprocess, sys
print("app", "torch" in sys.modules)
raise SystemExit(subprocess.call([sys.executable, *sys.argv[1:]]) + 5)
"""
TRAIN = """
import importlib.util, multiprocessing, sys
assert importlib.util.find_spec("torch")  # programs look before they import
import torch
from torch import nn
from torch.optim import AdamW

def train(kind):
    torch.manual_seed(0)
    net = nn.ModuleDict({"lora_A": nn.Linear(8, 2, bias=False), "lora_B": nn.Linear(2, 8, bias=False)})
    optimizer = kind(net.parameters(), lr=1e-2)
    for _ in range(2):
        net["lora_B"](net["lora_A"](torch.ones(1, 8))).square().sum().backward()
        try:
            optimizer.step()
        except Exception:
            print("went on untreated")
    print([round(v, 12) for p in net.parameters() for v in p.double().flatten().tolist()])

if __name__ == "__main__":
    if "spawn" in sys.argv:
        worker = multiprocessing.get_context("spawn").Process(target=train, args=(torch.optim.SGD,))
        worker.start()
        worker.join()
        raise SystemExit(worker.exitcode)
    train(AdamW)
"""
OTHER = "import os, sys; sys.path.append('/added'); print('other', __name__, os.getpid(), file=sys.stderr)"
REPORT = "equipoise: scaled (damping 0.01, damping_mode absolute, order simultaneous) on AdamW. 1 LoRA pair of rank 2"
ASKED = ("--optimizer", "scaled", "--optimizer-args", "damping=1e-2")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "train.py").write_text(TRAIN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return tmp_path


def python(*words: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env={**os.environ, **env})


def wrap(*words: str, **env: str) -> subprocess.CompletedProcess:
    return python("-m", "equipoise.pipelines.cli", "wrap", *words, **env)


def treated(name: str, **options: str) -> dict[str, str]:
    """The environment in which the command would run, without the checks before it."""
    return environment(name, options, {})


@pytest.mark.slow
def test_a_worker_of_a_worker_trains_as_a_script_does(folder, forked):
    there = folder / "there"
    there.mkdir()
    (there / "sitecustomize.py").write_text(OTHER)
    ours = wrap(*ASKED, "--", sys.executable, "app.py", "train.py", PYTHONPATH=str(there))
    assert ours.returncode == 5, ours.stderr
    app, weights = ours.stdout.splitlines()
    assert app == "app False"
    assert weights == forked(folder, "-m", "equipoise.run", "train.py", *ASKED).stdout.strip()
    assert weights != forked(folder, "train.py").stdout.strip() != ""
    assert ours.stderr.count(REPORT) == 1
    others = [line for line in ours.stderr.splitlines() if line.startswith("other sitecustomize")]
    # The command line, which becomes the app and so has its number, the app, and the worker: once each.
    assert len(others) == 3 and len(set(others)) == 2


def test_what_never_imports_torch_is_left_alone(folder):
    look = "import importlib.util, sys; importlib.util.find_spec('torch'); print(sorted(sys.modules))"
    plain, ours = python("-c", look), python("-c", look, **treated("scaled"))
    assert ours.stdout == plain.stdout.replace("'site'", "'site', 'sitecustomize'") and ours.stderr == ""


def test_the_sitecustomize_behind_runs_under_its_own_name_and_may_fail(folder):
    env = treated("scaled")
    env["PYTHONPATH"] += os.pathsep + str(folder)
    (folder / "sitecustomize.py").write_text("import sys; sys.path.insert(0, '/added'); here = 1")
    look = "import sitecustomize, sys; print(sitecustomize.here, sitecustomize.__file__, sys.path.count('/added'))"
    assert python("-c", look, **env).stdout.split() == ["1", str(folder / "sitecustomize.py"), "1"]
    (folder / "sitecustomize.py").write_text("import no_such_module")
    failed, plain = python("-c", "pass", **env), python("-c", "pass", PYTHONPATH=str(folder))
    assert failed.stderr.splitlines()[-1] == plain.stderr.splitlines()[-1] != "" and failed.returncode == 0
    again = python("train.py", **env)  # it failed after ours was installed
    assert again.returncode == 0 and "equipoise: scaled (" in again.stderr, again.stderr


@pytest.mark.slow
def test_a_process_is_treated_once(folder, forked):
    same = python("-m", "equipoise.run", "train.py", *ASKED, **treated("scaled", damping="1e-2"))
    assert same.returncode == 0 and same.stderr.count(REPORT) == 1, same.stderr
    assert same.stdout == forked(folder, "-m", "equipoise.run", "train.py", *ASKED).stdout
    two = python("-m", "equipoise.run", "train.py", *ASKED, **treated("bounded"))
    assert two.returncode == 2 and two.stdout == ""
    assert "`equipoise wrap` treats this process already, with --optimizer bounded" in two.stderr
    ours = "from equipoise import ScaledAdamW\nimport torch\nprint(len(torch.optim.Optimizer.__mro__))"
    assert python("-c", ours, **treated("sgd")).returncode == 0  # torch comes while ours is half imported


@pytest.mark.parametrize(
    ("name", "env", "message"),
    [
        ("scaled_adamm", {}, "no optimizer 'scaled_adamm'. Did you mean"),
        ("scaled", {VARIABLE: None}, "inherited PYTHONPATH but not EQUIPOISE_WRAP"),
        ("scaled", {"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed steps its own partitions"),
    ],
)
def test_a_worker_that_cannot_be_treated_ends_in_a_sentence(name, env, message, folder):
    given = {**treated(name), **env}
    ended = python("train.py", **{key: value for key, value in given.items() if value is not None})
    assert ended.returncode == 2 and ended.stdout == ""
    assert message in ended.stderr and ended.stderr.count("\n") == 1


def test_an_optimizer_refused_at_its_first_step_ends_the_program(folder):
    ended = python("train.py", "spawn", **treated("scaled_adamw"))  # the program goes on after any Exception
    assert ended.returncode == 2 and ended.stdout == "", ended.stderr
    assert ended.stderr.startswith("scaled_adamw: the program's optimizer is SGD, not AdamW.")
    assert ended.stderr.count("\n") == 1


def test_a_python_without_equipoise_and_a_later_input_error_end_it_in_a_sentence(folder):
    without = python("-c", "import sys; sys.modules['equipoise'] = None; import torch", **treated("scaled"))
    assert without.returncode == 2 and "cannot import equipoise" in without.stderr.splitlines()[-1]
    late = "import torch, equipoise.errors; raise equipoise.errors.InputError('one sentence')"
    ended = python("-c", late, **treated("scaled"))
    assert ended.returncode == 2 and ended.stderr == "one sentence\n"


@pytest.mark.skipif(os.name == "nt", reason="no exec and no POSIX signals")
def test_the_command_takes_the_process_over(folder):
    wait = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    words = [sys.executable, "-m", "equipoise.pipelines.cli", "wrap", *ASKED, "--", sys.executable, "-c", wait]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) == process.pid
        process.terminate()
        assert process.wait(30) == -signal.SIGTERM
    if Path("/proc/self/status").exists():
        command = ["sh", "-c", "grep SigIgn /proc/self/status"]
        plain = subprocess.run(command, capture_output=True, text=True)
        ours = wrap("--", *command)
        assert ours.stdout == plain.stdout != "" and "no --optimizer was given" in ours.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optimizer", "scaled_adamm", "--"], "no optimizer 'scaled_adamm'. Did you mean 'scaled_adamw'"),
        (["--optimizer", "AdamW", "--"], "no optimizer 'AdamW'. Did you mean 'adamw'"),
        (["--optimizer", "scaled", "--optimizer-args", "dampin=1", "--"], "scaled has no option 'dampin' here."),
        (["--optimizer", "ada_sam", "--"], "ada_sam: it evaluates each batch twice, which an unmodified script"),
        (["--optimizer", "joint", "--"], "works on the losses or rates of a training loop"),
        (["--optimizer", "scaled", "--lr", "1", "--"], "--lr is not understood before the --."),
        (["--optimizer", "scaled"], "no command was given. Use equipoise wrap --optimizer NAME"),
        (["--optimizer", "scaled", "--", "deepspeed"], "DeepSpeed steps its own partitions"),
        (["--optimizer", "scaled", "--", "accelerate", "launch", "--use_deepspeed"], "DeepSpeed steps its own"),
        (["--optimizer", "scaled", "--", "llamafactory-cli", "train", "--deepspeed=x.json"], "DeepSpeed steps its own"),
        (["--optimizer", "scaled", "--", "env", "A=1", "deepspeed", "t.py"], "DeepSpeed steps its own partitions"),
        (["--optimizer", "scaled", "--", "accelerate", "launch", "--zero_stage", "2", "t.py"], "DeepSpeed steps its"),
        (
            ["--optimizer", "scaled", "--optimizer=bounded", "--"],
            "--optimizer was given twice, as scaled and as bounded",
        ),
        (
            ["--optimizer", "scaled", "--optimizer-args=damping=1", "--optimizer-args=damping=2", "--"],
            "--optimizer-args gives damping twice, as 1 and as 2.",
        ),
        (["--optimizer", "alpha_adam", "--optimizer-args", "lr=0.5", "--"], "--optimizer-args: lr is not set here"),
        (["--optimizer", "scaled", "--", "./no-such-command"], "./no-such-command: No such file or directory."),
    ],
)
def test_what_cannot_work_is_one_sentence_before_the_start(words, message, folder, capsys):
    command = [] if words[-1] != "--" else [sys.executable, "-c", "open('started', 'w')"]
    assert cli.main(["wrap", *words, *command]) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1
    assert not (folder / "started").exists()
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN, "as before: else a full disk would kill this process"


def test_words_and_environment():
    words = [
        "--optimizer=scaled",
        "--optimizer-args",
        "damping=1",
        "trust=0.1",
        "--",
        "torchrun",
        "--",
        "--optimizer",
        "x",
    ]
    command = ["torchrun", "--", "--optimizer", "x"]
    assert parse(words) == (command, "scaled", {"damping": "1", "trust": "0.1"})
    assert parse(["--optimizer", "scaled", "--", "pytest", "--"])[0] == ["pytest", "--"]
    with pytest.raises(InputError, match="no command was given"):
        parse(["--optimizer", "scaled", "--"])
    once = environment("scaled", {}, {"PYTHONPATH": f"{os.pathsep}a", "HOME": "/h"})
    assert once["PYTHONPATH"].endswith(f"startup{os.pathsep}{os.pathsep}a") and once["HOME"] == "/h"  # empty: "here"
    twice = environment("bounded", {}, once)
    assert twice["PYTHONPATH"] == once["PYTHONPATH"] and '"bounded"' in twice[VARIABLE]


@pytest.mark.parametrize(
    "words",
    [["--use_deepspeed", "false"], ["--deepspeed="], ["--zero-stage=0"], ["--output", "deepspeed"], ["runs/deepspeed"]],
)
def test_a_flag_that_says_no_is_no_deepspeed(words, folder):
    (folder / "runs" / "deepspeed").mkdir(parents=True)
    assert not asks_for_deepspeed(["python", "t.py", *words])
    assert asks_for_deepspeed(["python", "t.py", *words, "--use_deepspeed"])


def test_the_help_of_wrap_has_usage_and_example(capsys):
    with pytest.raises(SystemExit):
        cli.main(["wrap", "--help"])
    shown = capsys.readouterr().out
    assert "equipoise wrap --optimizer NAME [--optimizer-args key=value …] -- COMMAND …" in shown
