"""A dry run, the page's Check and the start refuse the same things in the same lines; for every pipeline."""

import ast
import asyncio
import html
import inspect
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from equipoise.errors import ConfigError
from equipoise.pipelines import config as configs
from equipoise.pipelines import demo
from equipoise.pipelines.cli import main
from equipoise.pipelines.config import RunConfig
from equipoise.pipelines.runs.store import Store
from equipoise.ui import api, forms
from equipoise.ui.app import page
from equipoise.ui.safety import Site

BY_FAMILY = "data\\.buckets:"  # of HiDream-I1, whose checkpoints are built elsewhere
ABSENT = ("torchao", "bitsandbytes", "rouge_score")  # packages that these tests do without
EIGHT_BITS = "from torch.optim import AdamW\nclass AdamW8bit(AdamW): pass"
# Words that make each refusal come; ROOT stands for a folder that the page may read.
T2I, IT, AV = "text_to_image", "instruction_tuning", "audio_visual"
CASES = [
    (T2I, ["objective=mimo"]),
    (T2I, ["objective=mses"]),
    (T2I, ["objective=equal_weight", "data=ROOT/nowhere"]),
    (T2I, ["objective=mslr", "objective.options={factors: {audio: 0.1}}"]),
    (T2I, ["coordinator=commit"]),
    (T2I, ["data=ROOT/nowhere"]),
    (T2I, ["data=ROOT/empty"]),
    (T2I, ["data=ROOT/bare"]),
    (T2I, ["data=ROOT/damaged", "data.instance_prompt=a vase"]),
    (T2I, ["data=ROOT/captioned", "token.name=<vase>"]),
    (T2I, ["model=ROOT/nowhere"]),
    (T2I, ["model=ROOT/empty"]),
    (T2I, ["model=ROOT/coarse", "data.resolution=40"]),
    (T2I, ["lora.targets=[to_nothing]"]),
    (T2I, ["lora.start=ROOT/nowhere.safetensors"]),
    (T2I, ["lora.start=ROOT/empty"]),
    (T2I, ["judges.clip=ROOT/empty"]),
    (T2I, ["prior.folder=ROOT/nowhere", "prior.prompt=a vase"]),
    (T2I, ["prior.folder=ROOT/empty"]),
    (T2I, ["noise.zero_terminal_snr=true", "noise.mean=1"]),
    (T2I, ["train.compile=true"]),
    (T2I, ["train.precision=fp16", "optimizer=adamw_8bit"]),
    (T2I, ["optimizer=bounded_adamw", "optimizer.options={reach: 0.01, trust: 0.1}"]),
    (T2I, ["optimizer=adamw", "optimizer.options={fused: true, foreach: true}"]),
    (T2I, ["model.quantize=int8"]),
    (T2I, ["model.quantize=nf4"]),
    (T2I, ["model.quantize=nf4", "model.offload=0.5"]),
    (T2I, ["data.sources=ROOT/empty", "samples.sources=[ROOT/nowhere.png, ROOT/nowhere.png]"]),
    (T2I, ["data=ROOT/captioned", "data.sources=ROOT/nowhere", "data.crop=random"]),
    (T2I, ["data=ROOT/captioned", "data.sources=ROOT/empty", "prior.prompt=a vase"]),
    (T2I, ["train.validate_every=2"]),
    (IT, ["data.more=[ROOT/talk.jsonl]"]),
    (IT, ["coordinator=commit", "coordinator.options={within: true}", "train.precision=fp16"]),
    (IT, ["language.method=full", "optimizer=bounded_adamw"]),
    (IT, ["language.method=frozen", "coordinator=commit_clr"]),
    (IT, ["objective=mimo"]),
    (IT, ["objective=unimodal", "data=ROOT/nowhere.jsonl"]),
    (IT, ["coordinator=commit", "optimizer=sam"]),
    (IT, ["optimizer=rprop", "optimizer.weight_decays={encoder: 0.1}"]),
    (IT, ["optimizer=adamw_8bit", "train.precision=fp16"]),
    (IT, ["samples.metric=rouge_l"]),
    (IT, ["data=ROOT/talk.jsonl"]),
    (IT, ["model=ROOT/nowhere"]),
    (IT, ["frozen=[nothing]", "lora.targets=[nothing]"]),
    (AV, ["objective=agm", "data.missing=mask"]),
    (AV, ["objective=mla"]),
    (AV, ["objective=lfm", "fusion=gated"]),
    (AV, ["objective=recon_boost", "fusion=concat"]),
    (AV, ["objective=pmr", "data.modalities=[audio, visual, text]"]),
    (AV, ["objective=ogm_ge", "data.modalities=[audio, visual, text]"]),
    (AV, ["objective.options={f_star: {sound: 1}}"]),
    (AV, ["objective=mslr", "objective.options={factors: {sound: 1}}"]),
    (AV, ["train.baselines=[agm]", "data.modalities=[audio]"]),
    (AV, ["coordinator=commit"]),
    (AV, ["data=ROOT/nowhere.csv"]),
    (AV, ["data=ROOT/clips.csv"]),
    (AV, ["model.visual.path=ROOT/nowhere"]),
    (AV, ["model.visual={widths: [0, 8], depths: [1, 1]}"]),
    (AV, ["train.precision=fp16"]),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with all kinds of data that cannot be used."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("empty", "bare", "damaged", "captioned"):
        (folder / name).mkdir()
    for name in ("bare", "captioned"):
        Image.new("RGB", (40, 40)).save(folder / name / "a.png")
    (folder / "captioned" / "a.txt").write_text("a thing")
    (folder / "damaged" / "a.png").write_bytes(b"no picture")
    shutil.copytree(demo.base_folder(), folder / "coarse")
    autoencoder = folder / "coarse" / "vae" / "config.json"
    described = json.loads(autoencoder.read_text())
    autoencoder.write_text(json.dumps(described | {"block_out_channels": [8] * 5}))  # 16 pixels to a side of a latent
    (folder / "talk.jsonl").write_text('{"image": "gone.png", "conversations": []}\nno JSON\n')
    (folder / "clips.csv").write_text("clip,audio,frames,lable,split\na,gone.wav,gone.png,x,train\n")
    return folder


class Doors:
    """The ways by which a configuration is checked or started, each giving the lines that it is refused with."""

    def __init__(self, site: Site, blocks: Any):
        self.site, self.blocks = site, blocks

    def command(self, capsys, *words: str) -> list[str]:
        capsys.readouterr()
        assert main(list(words)) == 2, words
        return capsys.readouterr().err.splitlines()

    def endpoint(self, config: RunConfig) -> list[str]:
        with pytest.raises(ConfigError) as error:
            api.check(self.site, 1, configs.dump(config))
        return error.value.problems

    def click(self, button: str, config: RunConfig) -> list[Any]:
        """All that the button's handler yields for the form that this configuration fills."""
        parts = self.blocks.blocks
        handler: Any = next(
            one
            for one in self.blocks.fns.values()
            for id, event in one.targets
            if event == "click" and parts[id].elem_id == f"{button}-{config.pipeline}"
        )
        shown = forms.show(config)
        chosen = {item.key.key: shown[item.key.key] for item in forms.fields(type(config)) if item.kind == "plugin"}
        values = {f"field-{config.pipeline}-{key.replace('.', '-')}": value for key, value in shown.items()}
        values |= {f"preset-{config.pipeline}": "", None: forms.option_rows(type(config), chosen, config)}
        return list(handler.fn(*(values[part.elem_id] for part in handler.inputs)))


@pytest.fixture(scope="module")
def doors(root: Path, tmp_path_factory) -> Doors:
    site = Site(Store(tmp_path_factory.mktemp("served") / "runs"), {"photos": root.resolve()})

    async def opened() -> Any:  # where no loop runs, gradio makes some that nobody closes
        return page(site, 1)

    with asyncio.Runner() as loop:
        return Doors(site, loop.run(opened()))


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch, distribution) -> None:
    """No accelerator, no compiler, none of the optional packages; and an optimizer that would need one of them."""
    for name in ABSENT:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    distribution("eight", {"equipoise.optimizers": {"adamw_8bit": "eight_bits:AdamW8bit"}}, eight_bits=EIGHT_BITS)


REFUSED: dict[str, list[str]] = {}  # words → the lines that came


@pytest.mark.parametrize(
    ("pipeline", "words"), CASES, ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_every_door_refuses_alike(pipeline, words, doors, root, tmp_path, capsys):
    given = [word.replace("ROOT", str(root)) for word in words]
    one = configs.load(f"{pipeline}/demo", [*given, f"runs={doors.site.store.root}", "sweep={}"])
    several = configs.set_keys(one, {"sweep": {"seed": [0, 1]}})
    file, swept = tmp_path / "one.yaml", tmp_path / "several.yaml"
    file.write_text(configs.dump(one))
    swept.write_text(configs.dump(several))
    lines = doors.command(capsys, "train", str(file), "--dry-run")
    assert lines and all(": " in line for line in lines), lines
    assert lines == doors.command(capsys, "train", str(file))
    assert lines == doors.command(capsys, "sweep", str(swept), "--dry-run")
    assert lines == doors.command(capsys, "sweep", str(swept))
    assert lines == doors.endpoint(several)
    first, *_, last = doors.click("check", one)
    assert bad(last) == lines and not bad(first), "the plan is shown at once, and then taken back"
    assert "'visible': True" in str(first) and "'visible': False" in str(last)
    for config in (one, several):
        assert bad(doors.click("start", config)[-1]) == lines
    assert doors.site.store.list() == []
    REFUSED[f"{pipeline} {' '.join(words)}"] = lines


def bad(shown: Any) -> list[str]:
    """The lines of the page's red notice."""
    if not isinstance(shown, str):
        parts = shown.values() if isinstance(shown, dict) else shown if isinstance(shown, list) else []
        return [line for part in parts for line in bad(part)]
    lists = re.findall(r'<ul class="notice bad".*?</ul>', shown)
    return [html.unescape(line) for some in lists for line in re.findall(r"<li[^>]*>(.*?)</li>", some)]


CHECKS = [
    *((pipeline, f"equipoise.pipelines.{pipeline}.check") for pipeline in (T2I, IT, AV)),
    (T2I, "equipoise.pipelines.config.sections:objective_problems"),
    (AV, "equipoise.pipelines.config.sections:objective_problems"),
    (T2I, "equipoise.pipelines.config.sections:one_sided"),
    (AV, "equipoise.pipelines.config.sections:one_sided"),
]


@pytest.mark.parametrize(("pipeline", "source"), CHECKS)
def test_no_sentence_of_a_check_is_left_out_above(pipeline, source):
    if len(REFUSED) < len(CASES):
        pytest.skip("needs the cases above, in this process")
    came = [line for words, lines in REFUSED.items() if words.startswith(pipeline) for line in lines]
    wanted = [text for text in sentences(resolve_name(source)) if not text.startswith(BY_FAMILY)]
    assert wanted and [text for text in wanted if not any(re.match(text, line) for line in came)] == []


def sentences(source: ModuleType | Callable) -> list[str]:
    """What a check can say, as patterns: its texts that begin with a key, what is put into them left open."""
    found = []
    for function in ast.parse(inspect.getsource(source)).body:
        if isinstance(function, ast.FunctionDef) and not function.name.endswith("doubts"):
            for node in ast.walk(function):
                parts = node.values if isinstance(node, ast.JoinedStr) else [node]
                text = "".join(
                    re.escape(part.value) if isinstance(part, ast.Constant) and isinstance(part.value, str) else ".+"
                    for part in parts
                    if isinstance(part, ast.Constant | ast.FormattedValue)
                )
                if re.match(r"(\w|\\.|\.\+)+:\\ .{4}", text):
                    found.append(text)
    return found
