"""Unmodified training scripts with `python -m equipoise.run`, in the styles that diffusers' scripts are written in."""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from lion_pytorch import Lion

from equipoise.errors import InputError
from equipoise.hosts.choice import choose
from equipoise.hosts.script import main, parse
from equipoise.pipelines import cli

# A script as diffusers writes them: it knows nothing of Equipoise, and hands its parameters over in its own way.
SCRIPT = """
import argparse, itertools, sys
import torch
from accelerate import Accelerator

parser = argparse.ArgumentParser()
parser.add_argument("--style", default="iterator")
parser.add_argument("--peft", action="store_true")  # as scripts do, which takes seconds to import
parser.add_argument("--output", default=None)
parser.add_argument("--resume", default=None)
parser.add_argument("--steps", type=int, default=4)
{flags}
args = parser.parse_args()
assert __name__ == "__main__" and sys.argv[0].endswith("script.py")

torch.manual_seed(0)
accelerator = Accelerator(cpu=True)
net = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Tanh(), torch.nn.Linear(6, 4)).requires_grad_(False)
if args.peft:
    from peft import LoraConfig, inject_adapter_in_model
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False), net)
else:
    class Adapted(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.base_layer = layer
            self.lora_A = torch.nn.Linear(layer.in_features, 2, bias=False)
            self.lora_B = torch.nn.Linear(2, layer.out_features, bias=False)
        def forward(self, x):
            return self.base_layer(x) + self.lora_B(self.lora_A(x))
    net[0], net[2] = Adapted(net[0]), Adapted(net[2])
optimizer_class = torch.optim.AdamW
trainable = filter(lambda p: p.requires_grad, net.parameters())
if args.style == "iterator":
    optimizer = optimizer_class(trainable, lr=1e-2, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
elif args.style == "flat":
    optimizer = optimizer_class(list(trainable), lr=1e-2)
elif args.style == "groups":
    one, two = [[p for p in net[i].parameters() if p.requires_grad] for i in (0, 2)]
    groups = [dict(params=one, lr=1e-2), dict(params=two, lr=5e-3, weight_decay=0.0)]
    optimizer = optimizer_class(groups, betas=(0.9, 0.99))
elif args.style == "sgd":
    optimizer = torch.optim.SGD(list(trainable), lr=1e-2)
elif args.style == "each":
    optimizers = [optimizer_class([p], lr=1e-2) for p in trainable]
    optimizer = optimizers[0]
elif args.style == "full":
    optimizer = optimizer_class([p.requires_grad_() for n, p in net.named_parameters() if "lora" not in n], lr=1e-2)
elif args.style == "beside":
    optimizer = optimizer_class(list(trainable), lr=1e-2)
    torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=1e-2).step()
elif args.style == "adafactor":
    from transformers import Adafactor
    optimizer = Adafactor(list(trainable))
net, optimizer = accelerator.prepare(net, optimizer)
start = 0
if args.resume:
    accelerator.load_state(args.resume)
    start = 2
for step in range(start, args.steps):
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(step))
    accelerator.backward(net(x).square().mean())
    accelerator.clip_grad_norm_(trainable if args.style == "iterator" else net.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
if args.output:
    accelerator.save_state(args.output)
print([round(v, 12) for p in net.parameters() if p.requires_grad for v in p.double().flatten().tolist()])
"""


@pytest.fixture
def run(forked, tmp_path) -> Callable[..., CompletedProcess[str]]:
    return partial(run_script, forked, tmp_path)


def run_script(python, folder: Path, *words: str, flags: str = "", launched: bool = True) -> CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(SCRIPT.replace("{flags}", flags))
    return python(folder, *(["-m", "equipoise.run"] if launched else []), str(script), *words)


def started(folder: Path, *words: str) -> CompletedProcess[str]:
    """Python from its very start."""
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=folder)


def by_hand(make, *words: str) -> None:
    """Print what the script prints, with an optimizer of ours made by hand in AdamW's place."""
    space: dict = {"__name__": "__main__"}
    source = SCRIPT.replace("{flags}", "").replace("optimizer_class = torch.optim.AdamW", "optimizer_class = make")
    argv, sys.argv = sys.argv, ["script.py", *words]
    try:
        exec(compile(source, "script.py", "exec"), space | {"make": make})
    finally:
        sys.argv = argv


@pytest.mark.parametrize("style", ["iterator", "flat", "groups"])
def test_the_weights_are_those_of_our_optimizer_made_by_hand(style, forked, tmp_path, capsys):
    from equipoise import ScaledAdamW

    run = partial(run_script, started if style == "iterator" else forked, tmp_path)
    words = ["--style", style, *(["--peft"] if style == "iterator" else [])]
    plain = run(*words, launched=False)
    untouched = run(*words)
    ours = run(*words, "--optimizer", "scaled_adamw", "--optimizer-args", "damping=1e-2")
    assert plain.returncode == untouched.returncode == ours.returncode == 0, ours.stderr
    assert untouched.stdout == plain.stdout and "equipoise" not in untouched.stderr
    assert ours.stdout != plain.stdout
    by_hand(lambda params, **more: ScaledAdamW(params, damping=1e-2, fused=False, foreach=False, **more), *words)
    assert ours.stdout == capsys.readouterr().out
    assert "equipoise: scaled (damping 0.01, damping_mode absolute, order simultaneous) on AdamW." in ours.stderr
    assert "2 LoRA pairs of rank 2, found by modules." in ours.stderr
    assert "0 other tensors" in ours.stderr and "4 × float32" in ours.stderr
    assert ("clips an exhausted iterator" in ours.stderr) is (style == "iterator")
    assert f"gradient clipping {'off' if style == 'iterator' else 'on'}" in ours.stderr


def test_a_run_goes_on_from_the_scripts_own_checkpoint(run):
    flags = ("--style", "groups", "--optimizer", "scaled", "--optimizer-args", "damping=1e-2", "trust=0.02")
    whole = run(*flags)
    first = run(*flags, "--steps", "2", "--output", "state")
    assert first.returncode == 0, first.stderr
    for words in (flags, ("--style", "groups", "--optimizer", "scaled")):  # the options are in the state, too
        rest = run(*words, "--resume", "state")
        assert rest.returncode == 0 and rest.stdout == whole.stdout, rest.stderr
        assert "damping 0.01" in rest.stderr and "trust 0.02" in rest.stderr


def test_sgd_is_bounded_and_adamw_replaced(run):
    bounded = run("--style", "sgd", "--optimizer", "bounded", "--optimizer-args", "trust=1e-4")
    assert bounded.returncode == 0 and "bounded (trust 0.0001) on SGD." in bounded.stderr, bounded.stderr
    assert bounded.stdout != run("--style", "sgd").stdout
    replaced = run("--style", "groups", "--optimizer", "nadam", "--optimizer-args", "momentum_decay=0.01")
    assert replaced.returncode == 0 and "nadam takes AdamW's place" in replaced.stderr, replaced.stderr
    lost = run("--optimizer", "sgd")
    assert "warning: sgd does not have betas=(0.9, 0.999), eps=1e-08, which the program sets." in lost.stderr


@pytest.mark.parametrize("style", ["iterator", "flat", "groups"])
def test_an_update_rule_takes_adamws_place_with_all_that_the_script_hands_it(style, run, capsys):
    from torch.optim import AdamW

    from equipoise import AlphaAdam

    words = ("--style", style, "--optimizer", "alpha_adam", "--optimizer-args", "mask=sync", "max_alpha=2")
    ours = run(*words)
    assert ours.returncode == 0 and "alpha_adam takes AdamW's place" in ours.stderr, ours.stderr
    assert "warning: alpha_adam" not in ours.stderr
    by_hand(lambda params, **given: AlphaAdam(params, mask="sync", max_alpha=2.0, **given), "--style", style)
    assert ours.stdout == capsys.readouterr().out
    by_hand(AdamW, "--style", style)
    assert ours.stdout != capsys.readouterr().out


def test_a_script_keeps_its_own_option(run):
    flags = 'parser.add_argument("--optimizer", default="AdamW", choices=["AdamW", "prodigy"])'
    both = run("--optimizer", "AdamW", "--optimizer=scaled", flags=flags)
    assert both.returncode == 0 and "scaled (" in both.stderr, both.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optimizer", "scaled_adam"], "no optimizer 'scaled_adam'. Did you mean 'scaled_adamw'?"),
        (["--optimizer", "adamWW"], "no optimizer 'adamWW'. Did you mean 'adamw'?"),
        (["--optimizer", "joint"], "works on the losses or rates of a training loop"),
        (
            ["--optimizer", "ada_sam"],
            "ada_sam: it evaluates each batch twice, which an unmodified script does not. `sc",
        ),
        (["--optimizer", "sam", "--optimizer-args", "rho=0.1"], "`equipoise train text_to_image/… optimizer=sam` does"),
        (
            ["--optimizer", "scaled", "--optimizer-args", "dampin=1"],
            "scaled has no option 'dampin' here. It has damping,",
        ),
        (["--optimizer", "scaled", "--optimizer-args", "damping=-1"], "damping: must be a number >= 0, got '-1'."),
        (["--optimizer-args", "damping=1"], "--optimizer-args was given without --optimizer."),
        (["--optimizer", "scaled", "--optimizer", "bounded"], "--optimizer was given twice, as scaled and as bounded."),
        (
            ["--optimizer", "scaled", "--optimizer-args", "trust=1", "trust=2"],
            "--optimizer-args gives trust twice, as 1 and as 2.",
        ),
        (["--optimizer", "alpha_adam", "--optimizer-args", "lr=0.5"], "--optimizer-args: lr is not set here, for the"),
        (["--optimizer", "scaled", "--optimizer-args", "lr=0.5"], "--optimizer-args: lr is not set here, for the"),
        (["--optimizer", "scaled", "--optimizer-args", "damping"], "--optimizer-args wants key=value"),
    ],
)
def test_what_cannot_work_is_one_sentence(words, message, tmp_path, capsys):
    script = tmp_path / "script.py"
    script.write_text("raise AssertionError('started')")
    assert main([str(script), *words]) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--optimizer", "scaled_adamw", "--style", "sgd"],
            "scaled_adamw: the program's optimizer is SGD, not AdamW. Use scaled",
        ),
        (["--optimizer", "scaled", "--style", "each"], "the script makes one optimizer per parameter"),
        (
            ["--optimizer", "scaled", "--style", "full"],
            "AdamW of 4 tensors holds no LoRA pairs, and neither does any other",
        ),
    ],
)
def test_what_shows_at_the_first_step_is_said_before_anything_is_trained(words, message, run):
    ended = run(*words)
    assert ended.returncode == 2 and ended.stdout == ""
    assert message in ended.stderr.splitlines()[-1] and "Traceback" not in ended.stderr


def test_deepspeed_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    (tmp_path / "script.py").touch()
    assert main([str(tmp_path / "script.py"), "--optimizer", "scaled"]) == 2
    assert "DeepSpeed steps its own partitions" in capsys.readouterr().err


def test_words_are_parsed_into_script_and_options(tmp_path):
    script = tmp_path / "train.py"
    script.touch()
    words = [str(script), "--lr", "1", "--optimizer=scaled", "--optimizer-args", "damping=1", "order=sequential", "--x"]
    assert parse(words) == (str(script), ["--lr", "1", "--x"], "scaled", {"damping": "1", "order": "sequential"})
    both = [str(script), "--optimizer", "prodigy", "--optimizer", "scaled"]
    assert parse(both) == (str(script), ["--optimizer", "prodigy"], "scaled", {})
    assert parse([str(script), "--optimizer", "prodigy"]) == (str(script), ["--optimizer", "prodigy"], None, {})
    with pytest.raises(InputError, match="no such file"):
        parse(["absent.py"])
    with pytest.raises(InputError, match="no script was given"):
        parse([])


def test_equipoise_run_is_short_for_the_module(tmp_path, capsys):
    script = tmp_path / "script.py"
    script.write_text("import sys; print('script', sys.argv[1:])")
    argv, path = sys.argv, sys.path[0]
    try:
        assert cli.main(["run", str(script), "--help", "--lr=1"]) == 0
    finally:
        sys.argv, sys.path[0] = argv, path
    assert capsys.readouterr().out == "script ['--help', '--lr=1']\n"
    assert cli.main(["run", "absent.py"]) == 2
    with pytest.raises(SystemExit):
        cli.main(["run", "--help"])
    assert "equipoise run SCRIPT.py [its arguments] --optimizer NAME" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [[], ["-P"]], ids=["plain", "-P"])
@pytest.mark.parametrize("script", ["../scripts/./script.py", "link.py"])
def test_a_script_finds_itself_and_modules_where_python_alone_has_it_do_so(script, flags, tmp_path):
    here, scripts = tmp_path / "here", tmp_path / "scripts"
    for folder in (here, scripts):
        folder.mkdir()
    (scripts / "script.py").write_text(
        "import json, sys, helper\n"
        "names = '__name__', '__file__', '__package__', '__spec__', '__cached__'\n"
        "main = vars(sys.modules['__main__'])\n"
        "print(json.dumps([helper.where, sys.argv, sys.path, *(globals()[name] for name in names), main is globals()]))"
    )
    (here / "link.py").symlink_to("../scripts/script.py")
    (scripts / "helper.py").write_text("where = 'beside the script'")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "helper.py").write_text("where = 'on PYTHONPATH'")
    for name in ("torch", "inspect", "argparse", "helper"):
        (here / f"{name}.py").write_text("raise SystemExit('a module of the current folder was imported')")
    for module in ([], ["equipoise.run"], ["equipoise.pipelines.cli", "run"]):
        command = [sys.executable, *flags, *(["-m"] if module else []), *module, script, "--lr=1"]
        command += ["--optimizer", "scaled"] if module else []
        env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
        ended = subprocess.run(command, capture_output=True, text=True, cwd=here, env=env)
        assert ended.returncode == 0, ended.stderr
        if not module:
            plain = json.loads(ended.stdout)
            assert plain[:2] == ["on PYTHONPATH" if flags else "beside the script", [script, "--lr=1"]]
        assert json.loads(ended.stdout) == plain


def test_a_program_in_a_zip_file_runs(tmp_path):
    with zipfile.ZipFile(tmp_path / "app.pyz", "w") as file:
        file.writestr("__main__.py", "import helper, sys; print(helper.here, sys.argv[1:])")
        file.writestr("helper.py", "here = 'in the zip'")
    command = [sys.executable, "-m", "equipoise.run", "app.pyz", "--lr=1"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.stdout == "in the zip ['--lr=1']\n", ended.stderr


def test_an_optimizer_without_pairs_is_left_alone_beside_one_that_has_them(run):
    beside = run("--style", "beside", "--optimizer", "scaled", "--optimizer-args", "damping=1e-2")
    assert beside.returncode == 0, beside.stderr
    assert "SGD of 1 tensors holds no LoRA pairs: left as it is." in beside.stderr
    flat = run("--style", "flat", "--optimizer", "scaled", "--optimizer-args", "damping=1e-2")
    assert beside.stdout == flat.stdout and "2 LoRA pairs of rank 2" in beside.stderr


def test_a_base_that_works_its_rate_out_itself(run):
    ours = run("--style", "adafactor", "--optimizer", "scaled")
    assert ours.returncode == 0 and "learning rate its own" in ours.stderr, ours.stderr
    assert ours.stdout != run("--style", "adafactor").stdout


FSDP = """
import sys
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch.distributed import init_process_group
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
net = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4))
inject_adapter_in_model(LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False), net)
net.requires_grad_(True)
whole = sys.argv[2] == "whole"
net = FullyShardedDataParallel(
    net, use_orig_params=whole, sharding_strategy=ShardingStrategy.NO_SHARD, device_id=torch.device("cpu")
)
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
net(torch.ones(5, 8)).square().mean().backward()
optimizer.step()
print("trained")
"""


@pytest.mark.parametrize("whole", [False, True])
def test_fsdp_with_flat_parameters_is_refused(whole, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(FSDP)
    command = [sys.executable, "-m", "equipoise.run", str(script), str(tmp_path / "rendezvous")]
    command += ["whole" if whole else "flat", "--optimizer", "scaled"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    if whole:  # use_orig_params on one process: the factors are views of the flat parameter, and whole
        assert ended.returncode == 0 and "2 LoRA pairs of rank 2" in ended.stderr, ended.stderr
    else:
        assert ended.returncode == 2 and ended.stdout == "", ended.stderr
        assert "is an FSDP1 flat parameter: scaling needs full LoRA factors." in ended.stderr.splitlines()[-1]


@pytest.fixture
def adapted(forked, tmp_path) -> Callable[..., CompletedProcess[str]]:
    """Runs a program that has one LoRA layer, `layer`, and what `source` does with it."""

    def run(source: str, *words: str) -> CompletedProcess[str]:
        (tmp_path / "script.py").write_text(LAYER + source)
        return forked(tmp_path, "-m", "equipoise.run", str(tmp_path / "script.py"), *words)

    return run


LAYER = """
import copy, pickle, sys, torch
from torch import nn
from equipoise import BoundedAdamW, ScaledAdamW

layer = nn.Linear(8, 8, bias=False).requires_grad_(False)
layer.lora_A, layer.lora_B = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)
factors = [layer.lora_A.weight, layer.lora_B.weight]

def step(optimizer):
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    optimizer.step()

def critic():
    net = nn.Linear(3, 3)
    step(torch.optim.SGD(net.parameters(), lr=0.1))
"""
NOTHING = "holds no LoRA pairs, and neither does any other optimizer of this program"


@pytest.mark.parametrize(
    ("made", "words", "message"),
    [
        ("ScaledAdamW(factors, damping=0.5)", ["scaled", "damping=0.5"], None),
        ("ScaledAdamW(factors, damping=0.5)", ["scaled_adamw"], None),
        ("ScaledAdamW(factors, damping=0.25)", ["scaled", "damping=0.5"], "whose damping is 0.25, not 0.5."),
        ("BoundedAdamW(factors)", ["scaled"], "makes a BoundedAdamW itself, whose damping is None, not 1e-06."),
        ("ScaledAdamW(factors)", ["bounded"], "makes a ScaledAdamW itself, which has none of trust, reach."),
    ],
)
def test_an_optimizer_of_ours_that_the_script_makes_is_reported_or_refused(made, words, message, adapted):
    name, *options = words
    given = ["--optimizer", name, *(["--optimizer-args", *options] if options else [])]
    ended = adapted(f"step({made})", *given)
    if message is None:
        assert ended.returncode == 0, ended.stderr
        assert "equipoise: scaled (damping 0.5, damping_mode absolute, order simultaneous) on Sc" in ended.stderr
        assert "1 LoRA pair of rank 2" in ended.stderr and "gradient clipping off" in ended.stderr
    else:
        assert ended.returncode == 2 and message in ended.stderr and ended.stderr.count("\n") == 1


def test_one_side_of_a_pair_whose_other_is_frozen(adapted):
    source = "factors[0].requires_grad_(False)\nstep(torch.optim.AdamW([factors[1]]))"
    ended = adapted(source, "--optimizer", "scaled")
    assert ended.returncode == 0 and "on AdamW. 1 LoRA pair of rank 2" in ended.stderr, ended.stderr


def test_an_optimizer_of_tensors_that_nothing_names(adapted):
    bare = "step(torch.optim.SGD([torch.randn(s, requires_grad=True) for s in ((32, 4), (4, 64), (3,))], lr=0.1))\n"
    source = "own = torch.optim.AdamW(factors)\n" + bare
    ended = adapted(source + "step(own)", "--optimizer", "scaled")
    assert ended.returncode == 0, ended.stderr
    assert "SGD of 3 tensors holds no LoRA pairs: left as it is. (The parameters have no names" in ended.stderr
    assert "on AdamW. 1 LoRA pair of rank 2" in ended.stderr


def test_an_optimizer_without_pairs_may_come_first(adapted):
    ended = adapted("critic()\nstep(torch.optim.AdamW(factors))", "--optimizer", "scaled")
    assert ended.returncode == 0 and NOTHING not in ended.stderr, ended.stderr
    assert "SGD of 2 tensors holds no LoRA pairs: left as it is." in ended.stderr
    assert "on AdamW. 1 LoRA pair of rank 2" in ended.stderr


@pytest.mark.parametrize("end", ["", "sys.exit(0)"])
def test_if_none_with_pairs_has_come_the_exit_code_says_so(end, adapted):
    ended = adapted(f"critic()\nprint('done')\n{end}", "--optimizer", "scaled")
    assert ended.returncode == 2 and ended.stdout == "done\n"
    assert "SGD of 2 tensors holds no LoRA pairs: left" in ended.stderr.splitlines()[0]
    assert NOTHING in ended.stderr.splitlines()[1] and ended.stderr.count("\n") == 2
    failed = adapted("critic()\nraise KeyError('its own')", "--optimizer", "scaled")
    assert failed.returncode == 1 and NOTHING not in failed.stderr
    without = adapted(f"print('done')\n{end}", "--optimizer", "scaled")
    assert without.returncode == 0 and without.stderr == ""


def test_what_takes_adamws_place_can_do_what_adamw_can(adapted):
    source = """
optimizer = torch.optim.AdamW(factors, 1e-2, (0.8, 0.9))
step(optimizer)
for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
    assert twin.state_dict()["state"][0]["step"] == 1
    step(twin)
class Mine(torch.optim.AdamW):
    def __init__(self, params, lr):
        super().__init__(params, lr, weight_decay=0.5)
for made in (optimizer, Mine(factors, 1e-2)):
    print(type(made).__name__, made.defaults["lr"], made.defaults["betas"], made.defaults["weight_decay"])
"""
    ended = adapted(source, "--optimizer", "alpha_adam")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == ["AlphaAdam 0.01 (0.8, 0.9) 0.01", "Mine 0.01 (0.9, 0.999) 0.5"]
    assert ended.stderr.startswith("equipoise: alpha_adam takes AdamW's place, lr 0.01 (options at their defaults).")


def test_a_program_without_adamw_is_refused_where_adamws_place_is_taken(adapted):
    ended = adapted("step(torch.optim.SGD(factors, 0.1))\nprint('trained')", "--optimizer", "alpha_adam")
    assert ended.returncode == 2 and "trained" not in ended.stdout
    assert "takes the place of torch.optim.AdamW, but the program trains with SGD" in ended.stderr


def test_a_third_partys_scaled_optimizer_is_for_the_class_that_it_scales(distribution):
    source = "from equipoise import scaled\nfrom lion_pytorch import Lion\nScaledLion = scaled(Lion)"
    distribution("lions", {"equipoise.optimizers": {"scaled_lion": "lions:ScaledLion"}}, lions=source)
    choice = choose("scaled_lion", {"damping": "0.1"})
    choice.check_base(Lion)
    with pytest.raises(InputError, match="scaled_lion: the program's optimizer is AdamW, not Lion"):
        choice.check_base(torch.optim.AdamW)


def test_a_sentence_stands_above_the_progress_bar(adapted):
    source = "from tqdm import tqdm\nfor _ in tqdm(range(3), mininterval=0):\n    critic()"
    ended = adapted(source, "--optimizer", "scaled")
    lines = ended.stderr.replace("\r", "\n").split("\n")
    assert "3/3" in ended.stderr and "equipoise: SGD of 2 tensors holds no LoRA pairs: left as it is." in lines, lines
