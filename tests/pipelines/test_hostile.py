"""Hostile input: whatever stands in files and in words, the answer is a sentence, and nothing else happens.

No traceback, no file written outside the working folder, no pickle opened, bounded time and memory. Here with a few
examples of each; `EQUIPOISE_FUZZ=2000 pytest tests/pipelines/test_hostile.py` tries that many, other ones each time.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import resource
import shutil
import struct
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open

from equipoise.errors import InputError
from equipoise.pipelines import config as configs
from equipoise.pipelines import demo
from equipoise.pipelines.audio_visual import config as audio_visual
from equipoise.pipelines.audio_visual import features
from equipoise.pipelines.audio_visual.data import read_manifest, settle
from equipoise.pipelines.cli import main
from equipoise.pipelines.config.records import RunConfig
from equipoise.pipelines.instruction_tuning import data as conversations
from equipoise.pipelines.instruction_tuning import media
from equipoise.pipelines.instruction_tuning.config import InstructionTuningModel
from equipoise.pipelines.instruction_tuning.model import model_problems as multimodal_problems
from equipoise.pipelines.jobs import storage
from equipoise.pipelines.jobs.executors import Where, remembered
from equipoise.pipelines.runs import checkpoints
from equipoise.pipelines.runs.run import Run
from equipoise.pipelines.runs.store import Store
from equipoise.pipelines.text_to_image.config import TextToImageData
from equipoise.pipelines.text_to_image.data import open_picture, read_examples
from equipoise.pipelines.text_to_image.families import shape_of
from equipoise.pipelines.text_to_image.formats import layout
from equipoise.pipelines.text_to_image.formats.lora_files import layer_names, read_lora, read_metadata

MANY = int(os.environ.get("EQUIPOISE_FUZZ", "0"))
COUNTS: Counter[str] = Counter()
SECONDS, BYTES = 10.0, 3 << 29  # of a processor that an example may take, and what all may hold
FIXTURES = Path(__file__).parents[1] / "fixtures" / "formats"
SNIPPETS = [
    *("!!python/object/apply:os.system [ls]", "!!bool maybe", "!!int ''", "!!timestamp x", "!!map x", "!!set {a}"),
    *("&a [*a]", "<<: {a: 1}", "? {a: b}", "? [1]", "[" * 600, "{a: " * 300, "9" * 5000, "1e999", "0x", "-", "''"),
    *("\0", '"\\0"', '"\\ud800"', "\ud83d", "\x1b[2J", "../" * 40 + "etc/passwd", "/dev/zero", "a" * 5000, "a." * 3000),
    *('{"a": ' * 2000, "[" * 100_000, "NaN", "-Infinity", "null", "true", '"', ",", "\r\n", "﻿", "<image>", "__proto__"),
    *("demo", "pickle.pkl", "c\nos\nsystem\n(S'ls'\ntR.", "%s%n", "$(touch x)", "`x`", "latest", "--help", "-"),
]
text = st.one_of(st.text(max_size=40), st.sampled_from(SNIPPETS))
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), text)
nested = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.one_of(text, scalars), inner, max_size=4),
    max_leaves=12,
)
json_nested = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4), max_leaves=12
)
words = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    [snippet for snippet in SNIPPETS if not set(snippet) & {"\0", "\ud83d"}]
)
_watched: list[Path] = []  # the folder that may be written, while somebody looks
_wrong: list[str] = []


def _audit(event: str, arguments: tuple) -> None:
    if not _watched:
        return
    if event in ("pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect"):
        _wrong.append(f"{event} {arguments}")
    if event == "open":
        path, _, flags = arguments
        places = [path] if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else []
    else:
        changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate")
        places = [one for one in arguments if isinstance(one, str | bytes | os.PathLike)] if changes else []
    beside = Path()  # what names are relative to: in rmtree's way a folder that is open
    if event in ("os.mkdir", "os.remove", "os.rmdir") and arguments[-1] >= 0:
        beside = Path(os.readlink(f"/proc/self/fd/{arguments[-1]}"))
    for place in places:
        full = Path(os.path.realpath(beside / os.fsdecode(place)))
        if not isinstance(place, int) and not full.is_relative_to(_watched[0]) and full != Path(os.devnull):
            _wrong.append(f"{event} {full}")


sys.addaudithook(_audit)


@contextlib.contextmanager
def harmless(folder: Path) -> Iterator[None]:
    """Nothing outside the folder is written in the block, and no pickle is opened; nor does it take long."""
    begun = time.process_time()
    _wrong.clear()
    _watched.append(folder.resolve())
    try:
        yield
    finally:
        _watched.clear()
    assert not _wrong
    assert time.process_time() - begun < SECONDS


def fuzzed(name: str, few: int, /, **strategies) -> Callable:
    """A test with examples of something hostile, which are counted under its name."""

    def decorate(test: Callable) -> Callable:
        @functools.wraps(test)
        def counted(*args, **options):
            COUNTS[name] += 1
            return test(*args, **options)

        made = settings(
            max_examples=MANY or few,
            derandomize=not MANY,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )(counted)
        return given(**strategies)(made)

    return decorate


def answer(call: Callable[[], object]) -> object:
    """What it gives, or the sentences with which it refuses."""
    try:
        return call()
    except InputError as error:
        assert str(error).strip() and "Traceback" not in str(error)
        return error


@pytest.fixture(scope="module", autouse=True)
def bounded():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < BYTES
    if file := os.environ.get("EQUIPOISE_FUZZ_COUNTS"):
        Path(file).write_text(json.dumps(COUNTS))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """The working folder, with every cache in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("EQUIPOISE_RUNS", raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


@st.composite
def mutated(draw, data: bytes) -> bytes:
    """Some of it is cut out, overwritten, doubled, or has a snippet put in."""
    made = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        start, size = draw(st.integers(0, len(made))), draw(st.integers(0, 64))
        other = draw(
            st.one_of(st.binary(max_size=64), st.sampled_from(SNIPPETS).map(_bytes), st.just(made[start:] * 2))
        )
        made[start : start + size] = other
    return bytes(made)


def _bytes(snippet: str) -> bytes:
    return snippet.encode("utf-8", "surrogatepass")


SHIPPED = {name: item.read_bytes() for name, item in configs.shipped().items()}
PLAIN = (
    b"pipeline: text_to_image\nname: a\nlora: {rank: 2}\nsweep:\n  learning_rate: [1, 2]\nsamples:\n  prompts: [x]\n"
)
FILES = st.one_of(
    st.binary(max_size=200),
    nested.map(lambda data: json.dumps(data, default=str, skipkeys=True).encode()),
    st.dictionaries(text, nested, max_size=5).map(
        lambda data: yaml.safe_dump({"pipeline": "text_to_image", **data}).encode("utf-8", "replace")
    ),
    mutated(PLAIN),
    st.sampled_from(sorted(SHIPPED)).flatmap(lambda name: mutated(SHIPPED[name])),
)


@fuzzed("configuration files", 25, content=FILES)
def test_configuration_files(here, content):
    file = here / "a.yaml"
    file.write_bytes(content)
    with harmless(here):
        answer(lambda: configs.dump(configs.load(file)))


KEYS = [key.key for key in configs.describe(configs.config_class("text_to_image/demo"))]


@fuzzed("key=value words", 25, pairs=st.lists(st.tuples(text | st.sampled_from(KEYS), text), min_size=1, max_size=4))
def test_words_of_a_configuration(here, pairs):
    with harmless(here):
        answer(lambda: configs.load("text_to_image/demo", [f"{key}={value}" for key, value in pairs]))


def picture(format: str = "PNG") -> bytes:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.linear_gradient("L").resize((20, 16)).convert("RGB").save(file, format, exif=exif)
    return file.getvalue()


FORMATS = {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP", ".bmp": "BMP", ".tif": "TIFF", ".gif": "GIF"}
PICTURES = {suffix: picture(format) for suffix, format in FORMATS.items()}
ROWS = b'{"file_name": "a.png", "text": "a vase"}\n{"file_name": "b.png", "text": "a cat"}\n'
TABLE = b'file_name,text\na.png,a vase\nb.png,"a cat, black"\n'
LINES = st.lists(
    st.dictionaries(st.sampled_from(["file_name", "text", "", "\ud800"]), json_nested, max_size=3) | json_nested,
    max_size=4,
).map(lambda rows: "\n".join(map(json.dumps, rows)).encode())


@fuzzed(
    "captions (metadata.jsonl, metadata.csv, .txt)",
    40,
    name=st.sampled_from(["metadata.jsonl", "metadata.csv", "a.txt"]),
    content=st.one_of(st.binary(max_size=200), LINES, mutated(ROWS), mutated(TABLE)),
)
def test_captions(here, name, content):
    folder = here / "pictures"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "a.png").write_bytes(PICTURES[".png"])
    (folder / name).write_bytes(content)
    with harmless(here):
        examples, problems = read_examples(TextToImageData(folder=str(folder)))
    assert all(isinstance(line, str) for line in problems) and (examples or problems)


TALK = (
    b'[{"image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, '
    b'{"from": "gpt", "value": "A star."}]},\n {"audio": ["a.wav"], "conversations": []}]'
)
KEYS = "messages prompt completion query response history instruction output question answers texts text tools".split()
PARTS = st.lists(
    st.dictionaries(
        st.sampled_from(["type", "text", "image", "image_url", "input_audio", "source"]),
        json_nested
        | st.sampled_from(["text", "image", "image_url", "input_audio", "data:image/png;base64,!", "file:///["]),
        max_size=4,
    ),
    max_size=3,
)
TURNS = st.lists(
    st.dictionaries(st.sampled_from(["image", "audio", "conversations", "images", "id"]), json_nested, max_size=4)
    | st.dictionaries(st.sampled_from(KEYS), json_nested | PARTS, max_size=6)
    | PARTS.map(lambda parts: {"messages": [{"role": "user", "content": parts}]}),
    max_size=3,
)


def packed(files: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as opened:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            opened.addfile(member, io.BytesIO(content))
    return made.getvalue()


SAMPLE = packed({"a.png": PICTURES[".png"], "a.json": b'{"question": "What?", "answer": ["a", "b"]}'})


@fuzzed(
    "conversations (.json, .jsonl, .csv, .tar)",
    80,
    suffix=st.sampled_from([".json", ".jsonl", ".csv", ".tar"]),
    content=st.one_of(
        st.binary(max_size=200),
        TURNS.map(json.dumps).map(str.encode),
        mutated(TALK),
        mutated(TALK.replace(b"\n", b"")[1:-1]),
        mutated(b"image,question,answer\na.png,What?,a star|a sun\n"),
        mutated(SAMPLE),
    ),
)
def test_conversations(here, suffix, content):
    file = here / f"talk{suffix}"
    file.write_bytes(content)
    (here / "a.png").write_bytes(PICTURES[".png"])
    with harmless(here):
        examples, problems = conversations.read_examples(file, None, unpacked=here / "unpacked")
    assert examples or problems


MANIFEST = (FIXTURES / "clips" / "manifest.csv").read_bytes()


@fuzzed("manifests of clips (.csv)", 30, content=st.one_of(st.binary(max_size=200), mutated(MANIFEST)))
def test_manifests(here, content):
    data = audio_visual.AudioVisualData(manifest="m.csv", modalities=["visual"], visual={"size": 8})
    (here / "m.csv").write_bytes(content)
    for file in (FIXTURES / "clips").glob("*.png"):
        shutil.copyfile(file, here / file.name)
    with harmless(here):
        manifest = read_manifest(data, here / "m.csv")
        if not manifest.problems:
            manifest.leave_out(features.FeatureStore(data, None).prepare(manifest.clips))
            settle(manifest, skip_bad=False)
    assert manifest.clips or manifest.sentences()


@fuzzed(
    "pictures",
    60,
    suffix=st.sampled_from(sorted(PICTURES)),
    data=st.data(),
)
def test_pictures(here, suffix, data):
    file = here / f"a{suffix}"
    file.write_bytes(data.draw(mutated(PICTURES[suffix]) | st.binary(max_size=100)))
    with harmless(here):
        answer(lambda: open_picture(file))
        answer(lambda: features.read_frames(file, 1, 8))
        assert isinstance(media.media_problem(file, "image"), str)


def test_a_picture_that_claims_to_be_enormous(here):
    """60,000 × 60,000 pixels in 60 bytes: nobody allocates them."""
    file = here / "a.png"
    data = bytearray(PICTURES[".png"])
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    file.write_bytes(data)
    with harmless(here):
        for read in (open_picture, lambda path: features.read_frames(path, 1, 8)):
            assert isinstance(answer(lambda read=read: read(file)), InputError)
        assert media.media_problem(file, "image")


def lora(folder: Path) -> Path:
    """A small LoRA file of the embedded base, with its metadata."""
    import numpy as np
    from safetensors.numpy import save_file

    layer = "unet.mid_block.attentions.0.proj_in"
    made = {f"{layer}.lora_A.weight": np.ones((2, 4), "float32"), f"{layer}.lora_B.weight": np.ones((4, 2), "float32")}
    said = {"format": "pt", "lora_adapter_metadata": json.dumps({"unet.lora_alpha": 2, "unet.alpha_pattern": {"a": 1}})}
    save_file(made, folder / "a.safetensors", said)
    return folder / "a.safetensors"


@st.composite
def mutated_tensors(draw, data: bytes) -> bytes:
    """Bytes of a safetensors file with a header that says something else."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    for name in draw(st.lists(st.sampled_from([*header, "unet.x.alpha"]), max_size=3)):
        change = draw(st.sampled_from(["drop", "dtype", "shape", "data_offsets", "rename", "any"]))
        entry = header.get(name)
        if change == "drop":
            header.pop(name, None)
        elif change == "rename":
            header[draw(text)] = header.pop(name, {})
        elif change == "any" or not isinstance(entry, dict):
            header[name] = draw(json_nested)
        elif name == "__metadata__":
            entry[draw(st.sampled_from([*entry, "x"]))] = draw(text | json_nested.map(json.dumps))
        elif change == "dtype":
            entry["dtype"] = draw(st.sampled_from(["F64", "F16", "BF16", "I8", "U8", "BOOL", "F8_E4M3", "C64", "x"]))
        else:
            entry[change] = draw(st.lists(st.integers(-2, 40) | st.integers(), max_size=4))
    told = json.dumps(header).encode()
    return struct.pack("<Q", draw(st.sampled_from([len(told), len(told) + 1, 2**40, 0]))) + told + body


@fuzzed("safetensors files", 40, data=st.data())
def test_lora_files(here, data):
    file = lora(here)
    whole = file.read_bytes()
    file.write_bytes(data.draw(mutated_tensors(whole) | mutated(whole)))
    with harmless(here):
        answer(lambda: read_metadata(file))
        answer(lambda: layer_names(file))
        answer(lambda: read_lora(file, ["unet.mid_block.attentions.0.proj_in"], shape(), "lora.start"))


def shape() -> dict:
    return shape_of("StableDiffusionPipeline", layout.read_config("demo", "unet"))


def base_files() -> dict[str, bytes]:
    folder = demo.base_folder()
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.json")}


@fuzzed("bases' files", 12, data=st.data())
def test_bases(here, data):
    """One of a base's JSON files says something else, or its weights are cut or altered."""
    folder = here / "base"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(demo.base_folder(), folder, copy_function=os.symlink)
    files = base_files()
    name = data.draw(
        st.sampled_from([*(f for f in files if "token" not in f), "vae/diffusion_pytorch_model.safetensors"])
    )
    whole = (folder / name).read_bytes()
    (folder / name).unlink()
    if name.endswith(".safetensors"):
        (folder / name).write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    elif data.draw(st.booleans()):
        (folder / name).write_bytes(data.draw(mutated(whole)))
    else:
        said = json.loads(whole)
        for key in data.draw(st.lists(st.sampled_from(sorted(said)), min_size=1, max_size=3)):
            said[key] = data.draw(json_nested)
        (folder / name).write_text(json.dumps(said))
    config = configs.load("text_to_image/demo", [f"model={folder}"])
    with harmless(here):
        answer(lambda: configs_pipeline().check(config))
        answer(lambda: configs_pipeline().doubts(config))
        layout.native_resolution(str(folder))


def configs_pipeline():
    from equipoise.pipelines.text_to_image import TextToImage

    return TextToImage


@fuzzed(
    "multimodal models' files",
    20,
    content=st.one_of(st.binary(max_size=100), json_nested.map(json.dumps).map(str.encode)),
)
def test_multimodal_models(here, content):
    folder = here / "model"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(content)
    with harmless(here):
        assert all(isinstance(line, str) for line in multimodal_problems(InstructionTuningModel(path=str(folder))))


@pytest.fixture
def store(here) -> Store:
    made = Store(here / "runs")
    made.create(configs.load("text_to_image/demo"), id="a").update(state="done")
    Store(here).create(configs.load("text_to_image/demo"), id="outside")
    return made


def test_what_is_removed_within_an_open_folder_is_known_by_its_path(tmp_path):
    for name in ("mine/a", "others/a"):
        (tmp_path / name).mkdir(parents=True)
    with harmless(tmp_path / "mine"):
        shutil.rmtree(tmp_path / "mine" / "a")
    with pytest.raises(AssertionError, match="others/a"), harmless(tmp_path / "mine"):
        shutil.rmtree(tmp_path / "others")


@fuzzed("ids of runs", 30, ref=text | st.text(st.sampled_from("a./=,-~\\ \0"), max_size=12))
def test_ids(store, here, ref):
    with harmless(store.root):
        found = answer(lambda: store.get(ref))
        made = answer(lambda: store.create(RunConfig(pipeline="text_to_image", name="a"), id=ref))
    for run in (found, made):
        assert isinstance(run, InputError) or (isinstance(run, Run) and run.folder.parent == store.root)
    if isinstance(made, Run):
        shutil.rmtree(made.folder)


COMMANDS = ("runs", "logs", "stop", "resume", "export", "show", "list", "sweep", "train")


@fuzzed("words of the command line", 40, command=st.sampled_from(COMMANDS), given=st.lists(words, max_size=3))
def test_the_command_line(store, here, command, given):
    dry = ["--dry-run"] if command == "train" else []
    said, printed = io.StringIO(), io.StringIO()
    with harmless(here), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
        try:
            code = main([command, *dry, *given])
        except SystemExit as error:  # argparse's
            code = error.code
    assert code in (0, 2), said.getvalue()
    assert "Traceback" not in said.getvalue() and "has a fault" not in said.getvalue()


@fuzzed(
    "files of a run's folder",
    12,
    name=st.sampled_from(["status.json", "metrics.jsonl", "environment.json", "config.yaml", "log.txt"]),
    content=st.one_of(
        st.binary(max_size=100),
        json_nested.map(json.dumps).map(str.encode),
        st.dictionaries(
            st.sampled_from(["id", "state", "step", "pid", "created", "working_folder", "format"]), json_nested
        )
        .map(json.dumps)
        .map(str.encode),
    ),
)
def test_run_folders(store, here, name, content):
    if not (pristine := here / "pristine").exists():
        shutil.copytree(store.root, pristine)
    shutil.rmtree(store.root)
    shutil.copytree(pristine, store.root)
    run = store.get("a")
    run.update(state="queued")
    (run.folder / name).write_bytes(content + b"\n")
    said = io.StringIO()
    with harmless(here), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        assert len(store.list()) == 1
        assert main(["runs"]) == 0
        assert main(["runs", "--json"]) == 0
        assert main(["logs", "a"]) in (0, 2)
        assert main(["resume", "a", "--queued", "data=nowhere"]) != 1, said.getvalue()
        answer(lambda: run.metrics())
    assert "Traceback" not in said.getvalue()


@fuzzed(
    "what a sweep was trained with (executor.json)",
    12,
    content=st.one_of(
        st.binary(max_size=100),
        st.dictionaries(st.sampled_from([field.name for field in fields(Where)]), json_nested)
        .map(json.dumps)
        .map(str.encode),
    ),
)
def test_executors(store, here, content):
    (store.get("a").folder / "executor.json").write_bytes(content)
    with harmless(here):
        answer(lambda: remembered(store.get("a")))


@fuzzed(
    "copies of runs in a storage",
    12,
    said=st.just({}) | st.dictionaries(st.sampled_from(["made", "before", "session", "files"]), json_nested),
    files=st.dictionaries(
        words | st.sampled_from(["../out", "result/..", "a/b", "config.yaml", "status.json", "samples"]),
        words,
        max_size=3,
    ),
)
def test_copies(store, here, said, files):
    run = store.get("a")
    shutil.rmtree(here / "storage", ignore_errors=True)
    copy = storage.send(run.folder, f"file://{here}/storage/deep/a")
    told = json.loads(Path(copy.place, "files.json").read_text())
    for name, content in files.items():  # some are there, with the digests that are told
        with contextlib.suppress(OSError, ValueError):
            path = Path(copy.place, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode())
        told["files"][name] = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
    Path(copy.place, "files.json").write_text(json.dumps(told | said))
    around = {path for path in here.rglob("*") if not path.is_relative_to(run.folder)}
    with harmless(here):
        brought = answer(lambda: copy.pull())
    event(f"brought: {brought}")
    assert {path for path in here.rglob("*") if not path.is_relative_to(run.folder)} == around


@fuzzed("checkpoints", 25, data=st.data())
def test_checkpoints(here, data):
    """Also such as somebody sealed anew."""
    import torch

    shutil.rmtree(here / "c", ignore_errors=True)
    saved = checkpoints.save(here / "c", 1, {"a": torch.ones(2)}, {"b": [torch.ones(1), {"c": (1, "x")}]})
    file = data.draw(st.sampled_from(sorted(saved.iterdir())))
    whole = file.read_bytes()
    if file.name == "state.json" and data.draw(st.booleans()):
        said = json.loads(whole)
        said.pop("seal")
        said[data.draw(st.sampled_from(sorted(said)))] = data.draw(json_nested)
        file.write_text(json.dumps({**said, "seal": checkpoints._seal(said)}))
    else:
        file.write_bytes(data.draw(mutated(whole)))
    with harmless(here):
        answer(lambda: checkpoints.load(saved))
        answer(lambda: checkpoints.load_newest(here / "c", lambda text: None))


def test_what_takes_long_does_not(here):
    """A megabyte of unknown keys, a key of three thousand parts, and a sweep of more cells than there are atoms."""
    file = here / "a.yaml"
    many = "".join(f"k{number}: 1\n" for number in range(10_000))
    for content in (many, "a" * 300_000 + ": 1\n", "a." * 3000 + "b: 1\n"):
        file.write_text(f"pipeline: text_to_image\nname: a\n{content}")
        with harmless(here):
            assert isinstance(answer(lambda: configs.load(file)), InputError)
    axes = [word for key in KEYS[:40] for word in ("--axis", f"{key}=1,2,3,4,5,6,7,8,9")]
    with harmless(here), contextlib.redirect_stderr(io.StringIO()) as said:
        assert main(["sweep", "text_to_image/demo", *axes]) == 2
    assert "are the most" in said.getvalue()


def test_patterns_of_a_file_that_would_take_for_ever(here):
    from safetensors.numpy import load_file, save_file

    file = lora(here)
    said = {"lora_adapter_metadata": json.dumps({"unet.alpha_pattern": {"(([a-z_0-9.]+)+)+x": 1}})}
    save_file(load_file(file), file, said)
    with safe_open(file, "np") as opened:
        assert "alpha_pattern" in opened.metadata()["lora_adapter_metadata"]
    with harmless(here):
        found = answer(lambda: read_lora(file, ["unet.mid_block.attentions.0.proj_in"], shape()))
    assert isinstance(found, InputError) and "too intricate" in str(found)
