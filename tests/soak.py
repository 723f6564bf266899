"""Every fault that docs/reliability.md speaks of, for real and many times; its tables come from here: make soak.

A trial trains a small text-to-image run in a process of its own, lets the fault happen, has the run resumed in another
process, and is recovered if the finished weights equal an uninterrupted run's to the bit, with every step taken once.
The processes are forked from one that has loaded torch and the base, so that a trial takes seconds.
"""

import argparse
import importlib.util
import json
import mmap
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # torch starts no threads then, which a fork would lose; and adds up in one order

import psutil
import torch
from safetensors.torch import load_file
from tqdm import tqdm

from equipoise.balancing.objective import Losses
from equipoise.errors import EquipoiseError
from equipoise.pipelines.cli import main
from equipoise.pipelines.config.records import RunConfig
from equipoise.pipelines.runs import checkpoints, environment
from equipoise.pipelines.runs.run import Run
from equipoise.pipelines.runs.store import Store
from equipoise.pipelines.text_to_image.base import load_base
from equipoise.pipelines.text_to_image.config import TextToImageModel
from equipoise.pipelines.text_to_image.result import LORA_FILE
from equipoise.pipelines.text_to_image.train import TextToImageWork

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "reliability.md"
NAME, STEPS = "text_to_image/demo", 8
TRAINING, SAVING, SAMPLING = 0, 1, 2  # what a process is at
PATIENCE = 120.0  # seconds, for machines that are busy with other things
TRIES = 30  # until a fault happens at the moment that it is meant for
CLI = [sys.executable, "-m", "equipoise.pipelines.cli"]


class Seen:
    """What a child is at, how often it was, and for how long: in memory that it shares with its parent."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 64)

    def __getitem__(self, place: int) -> float:
        return struct.unpack_from("d", self.memory, 8 * place)[0]

    def __setitem__(self, place: int, value: float) -> None:
        struct.pack_into("d", self.memory, 8 * place, value)

    @property
    def phase(self) -> int:
        return int(self[0])

    def count(self, phase: int) -> int:
        return int(self[1 + phase])

    def seconds(self, phase: int) -> float:
        """Of one, on average."""
        return self[4 + phase] / max(1, self.count(phase))

    def watch(self, owner: Any, name: str, phase: int) -> None:
        """In the child: notes when a function begins and ends."""
        plain = getattr(owner, name)

        def watched(*args, **options):
            self[0], self[1 + phase] = phase, self.count(phase) + 1
            begun = time.monotonic()
            try:
                return plain(*args, **options)
            finally:
                self[4 + phase] = self[4 + phase] + time.monotonic() - begun
                self[0] = TRAINING

        setattr(owner, name, watched)


@dataclass
class Child:
    pid: int
    seen: Seen
    printed: Path
    code: int | None = None  # exit code, or minus the signal that ended it

    def over(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is not None

    def wait(self) -> int:
        until = time.monotonic() + PATIENCE
        while not self.over():
            if time.monotonic() > until:
                self.kill()
                raise TimeoutError(f"was still at work after {PATIENCE:g} s")
            time.sleep(0.001)
        assert self.code is not None
        return self.code

    def kill(self, number: int = signal.SIGKILL) -> None:
        if not self.over():
            os.kill(self.pid, number)

    def until(self, phase: int, number: int) -> bool:
        """Waits until it is at something for the so many-th time; False where it ends before."""
        end = time.monotonic() + PATIENCE
        while self.seen.count(phase) < number:
            if self.over() or time.monotonic() > end:
                return False
            time.sleep(0.0002)
        return True

    @property
    def said(self) -> str:
        return self.printed.read_text(errors="replace")


class Lab:
    """The uninterrupted run that all others are compared with, and the means to start, disturb and check them."""

    def __init__(self, folder: Path):
        self.folder, self.root = folder, folder / "runs"
        found = importlib.util.spec_from_file_location("builders", HERE / "pipelines" / "conftest.py")
        assert found and found.loader
        builders = importlib.util.module_from_spec(found)
        found.loader.exec_module(builders)
        base = folder / "base"
        builders.BUILDERS["StableDiffusionPipeline"](builders._Parts(base)).save_pretrained(base)
        self.words = [
            *(NAME, f"model={base}", "data.resolution=32", f"steps={STEPS}", "batch=16", "rank=2"),
            *("lora.targets=[to_q]", "lora.text_encoder=false", "checkpoint_every=2", "learning_rate=1e-2"),
            *("samples.prompts=[a sks object on a gray background]", "samples.count=1", "samples.steps=2"),
            *("samples.every=2", "schedule=constant"),
        ]
        load_base(TextToImageModel(path=str(base)), "no")  # the children find it loaded, and the commit known
        environment.describe(0)
        child = self.start("whole", "train")
        assert child.wait() == 0, child.said
        self.seen = child.seen
        self.whole = weights(self.root / "whole")
        self.size = sum(path.stat().st_size for path in self.root.rglob("*") if path.is_file())
        for id, seed in (("half", 0), ("stranger", 1)):  # stopped runs, to be copied
            child = self.start(id, "train", f"seed={seed}")
            child.until(TRAINING, STEPS - 2)
            child.kill(signal.SIGTERM)
            assert child.wait() == 143, child.said

    def start(
        self, id: str, command: str, *words: str, root: Path | None = None, prepare: Callable[[], object] | None = None
    ) -> Child:
        """`equipoise train` or `resume` in a process of its own."""
        root = root or self.root
        words = ("train", *self.words, *words, "--id", id) if command == "train" else (command, id, *words)
        printed, seen = self.folder / f"{id}-{random.getrandbits(32):08x}.txt", Seen()
        sys.stdout.flush()
        if pid := os.fork():
            return Child(pid, seen, printed)
        code = 70
        try:
            log = os.open(printed, os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 1)
            os.dup2(log, 2)
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            seen.watch(TextToImageWork, "step", TRAINING)
            seen.watch(checkpoints, "save", SAVING)
            seen.watch(TextToImageWork, "sample", SAMPLING)
            if prepare:
                prepare()
            code = main([*words, "--runs", str(root)])
            sys.stdout.flush()
            sys.stderr.flush()
        except SystemExit as error:
            code = int(error.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def recovered(self, id: str, *words: str, root: Path | None = None, prepare=None, whole=None) -> str:
        """Resumes a run (or begins it, where it never was), and says what was lost; empty where nothing was."""
        root = root or self.root
        folder = root / id
        newest = ""
        if not (folder / "status.json").is_file():
            child = self.start(id, "train", *words, root=root, prepare=prepare)
        elif Run(folder).status().state == "done":
            child = None
        else:
            for path in checkpoints.complete(folder / "checkpoints"):
                try:
                    checkpoints.load(path, Run(folder).status().token)
                    newest = path.name
                except EquipoiseError:
                    pass
            child = self.start(id, "resume", root=root, prepare=prepare)
        if child:
            if code := child.wait():
                return f"resume ended with {code}: {child.said[-500:]}"
            if "Traceback" in child.said:
                return f"a traceback: {child.said[-500:]}"
        run = Run(folder)
        if newest and f"resumed from {newest}" not in run.log_file.read_text():
            return f"was not resumed from {newest}"
        if run.status().state != "done":
            return f"is {run.status().state}"
        if not same(whole or self.whole, weights(folder)):
            return "other weights"
        if (steps := [record["step"] for record in run.metrics()]) != list(range(1, STEPS + 1)):
            return f"its metrics have steps {steps}"
        shutil.rmtree(folder)
        return ""

    def copy(self, id: str, of: str) -> Path:
        return Path(shutil.copytree(self.root / of, self.root / id))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "result" / LORA_FILE)


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# Each gives what was lost, empty where nothing was; or None where the fault came at another moment than was meant


def killed(lab: Lab, id: str, draw: Random, phase: int) -> str | None:
    child = lab.start(id, "train")
    if not child.until(phase, draw.randint(1, lab.seen.count(phase))):
        return None
    time.sleep(draw.random() * lab.seen.seconds(phase))
    child.kill()
    if child.wait() != -signal.SIGKILL or child.seen.phase != phase:
        return None
    if (state := Run(lab.root / id).status().state) != "dead":
        return f"is {state}"
    return lab.recovered(id)


def signalled(lab: Lab, id: str, draw: Random, number: int, times: int = 1) -> str | None:
    child = lab.start(id, "train")
    if not child.until(TRAINING, draw.randint(1, STEPS - 1)):
        return None
    time.sleep(draw.random() * lab.seen.seconds(TRAINING))
    child.kill(number)
    if times == 2:
        time.sleep(draw.random() * lab.seen.seconds(TRAINING))
        child.kill(number)
    code, now = child.wait(), Run(lab.root / id).status()
    if now.state == "done":
        return None
    if (code, now.state) != (128 + number, "stopped") or "Traceback" in child.said:
        return f"ended with {code} as {now.state}: {child.said[-300:]}"
    return lab.recovered(id)


def disk_full(lab: Lab, id: str, draw: Random) -> str | None:
    with small_disk(lab.folder / f"disk-{id}", int(lab.size * draw.uniform(0.05, 0.9))) as (root, enlarge):
        child = lab.start(id, "train", root=root)
        code = child.wait()
        if not code:
            return None
        if code != 2 or "disk is full" not in child.said or "Traceback" in child.said:
            return f"ended with {code}: {child.said[-500:]}"
        enlarge()
        return lab.recovered(id, root=root)


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[tuple[Path, Callable[[], object]]]:
    """A file system of that many bytes, and what makes it larger."""
    place.mkdir()

    def mount(*options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", place], check=True)

    mount(f"size={size // 1024}k")
    try:
        yield place, lambda: mount("remount", "size=256m")
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def may_mount(lab: Lab) -> bool:
    try:
        with small_disk(lab.folder / "disk-try", 1 << 20):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def truncated(lab: Lab, id: str, draw: Random) -> str:
    file = draw.choice(_newest(lab.copy(id, "half")))
    os.truncate(file, draw.randrange(file.stat().st_size))
    return _told(lab, id)


def bit_flipped(lab: Lab, id: str, draw: Random) -> str:
    file = draw.choice(_newest(lab.copy(id, "half")))
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)
    return _told(lab, id)


def foreign(lab: Lab, id: str, draw: Random) -> str:
    """Another run's checkpoint, or one of its files, in place of the newest."""
    newest, theirs = _newest(lab.copy(id, "half")), _newest(lab.root / "stranger")
    for mine, other in draw.choice(
        [[pair] for pair in zip(newest, theirs, strict=True)] + [list(zip(newest, theirs, strict=True))]
    ):
        shutil.copyfile(other, mine)
    return _told(lab, id)


def _newest(folder: Path) -> list[Path]:
    return sorted(checkpoints.complete(folder / "checkpoints")[-1].iterdir())


def _told(lab: Lab, id: str) -> str:
    lost = lab.recovered(id)
    said = "".join(path.read_text() for path in lab.folder.glob(f"{id}-*.txt"))
    return lost or ("" if "is damaged" in said else "nobody was told")


def two_processes(lab: Lab, id: str, draw: Random) -> str:
    lab.copy(id, "half")
    both = [lab.start(id, "resume")]
    time.sleep(draw.random() * 0.2)
    both.append(lab.start(id, "resume"))
    codes = sorted(child.wait() for child in both)
    said = "".join(child.said for child in both)
    # the second gets its turn where the first has ended by then; twice at once would show in the metrics
    refused = codes == [0, 2] and re.search("is being trained by|is done", said)
    if not (refused or codes == [0, 0]) or "Traceback" in said:
        return f"ended with {codes}: {said[-500:]}"
    return lab.recovered(id)


def clock(lab: Lab, id: str, draw: Random) -> str | None:
    """The process's clock is set back by up to a day, again and again; then it is killed, and resumed likewise."""

    def lie() -> None:
        real, back = time.time, [0.0]

        def told() -> float:
            if draw.random() < 0.1:
                back[0] += draw.uniform(0, 86400)
            return real() - back[0]

        time.time = told

    child = lab.start(id, "train", prepare=lie)
    if not child.until(TRAINING, draw.randint(2, STEPS)):
        return None
    alive = Run(lab.root / id).status()
    child.kill()
    if child.wait() != -signal.SIGKILL:
        return None
    if alive.state != "running" or alive.duration < 0:
        return f"was {alive.state} for {alive.duration} s"
    return lab.recovered(id, prepare=lie)


def index(lab: Lab, id: str, draw: Random) -> str:
    """The index is deleted, cut, overwritten in places or replaced by something else."""
    store = Store(lab.folder / id)
    wait = [store.create(RunConfig(pipeline="text_to_image", name="run"), id=f"r{n}") for n in range(12)]
    for run in wait[::2]:
        store.enqueue(run)
    for tail in ("-wal", "-shm"):
        Path(f"{store.index.file}{tail}").unlink(missing_ok=True)
    data = bytearray(store.index.file.read_bytes())
    match draw.randrange(4):
        case 0:
            store.index.file.unlink()
        case 1:
            os.truncate(store.index.file, draw.randrange(len(data)))
        case 2:
            for _ in range(draw.randint(1, 20)):
                start = draw.randrange(len(data))
                data[start : start + draw.randint(1, 64)] = draw.randbytes(draw.randint(1, 64))
            store.index.file.write_bytes(data)
        case _:
            store.index.file.write_bytes(draw.randbytes(draw.randrange(20_000)))
    if {item.id for item in store.list()} != {run.id for run in wait}:
        return "not all runs are listed"
    claimed = []
    while run := store.claim():
        claimed.append(run.id)
    shutil.rmtree(store.root)
    return "" if claimed == [run.id for run in wait[::2]] else f"the queue gave {claimed}"


def broken(lab: Lab, id: str, draw: Random, factor: float) -> str:
    """A step's loss is multiplied: it is NaN, or its gradient is infinite. It says so, and goes on without that."""
    bad, evaluate = draw.randrange(STEPS), TextToImageWork.evaluate

    def poison() -> None:
        def poisoned(work: TextToImageWork, step: int, micro: int) -> Losses:
            losses = evaluate(work, step, micro)
            return Losses(losses.joint * factor, {}) if step == bad else losses

        TextToImageWork.evaluate = poisoned

    child = lab.start(id, "train", prepare=poison)
    code, now = child.wait(), Run(lab.root / id).status()
    if (code, now.state, now.step) != (1, "diverged", bad) or "not finite" not in child.said:
        return f"ended with {code} as {now.state} at {now.step}, not at {bad}: {child.said[-300:]}"
    if not all(torch.isfinite(tensor).all() for tensor in weights(lab.root / id).values()):
        return "the weights are not finite"
    return lab.recovered(id)


def out_of_memory(lab: Lab, id: str, draw: Random) -> str:
    """What torch raises when a device's memory is full, raised in a step or while sampling."""
    name, number = draw.choice([("evaluate", draw.randint(1, STEPS)), ("sample", draw.randint(1, STEPS // 2 - 1))])
    plain, calls = getattr(TextToImageWork, name), [0]

    def fill() -> None:
        def full(*args):
            calls[0] += 1
            if calls[0] == number:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB free.")
            return plain(*args)

        setattr(TextToImageWork, name, full)

    child = lab.start(id, "train", prepare=fill)
    code, now = child.wait(), Run(lab.root / id).status()
    if (code, now.state) != (1, "failed") or "memory is full" not in child.said or "Traceback" in child.said:
        return f"ended with {code} as {now.state}: {child.said[-300:]}"
    return lab.recovered(id)


def worker_of_torchrun(lab: Lab, id: str, draw: Random) -> str | None:
    """One of two processes that train together is killed; two go on, to the weights of two that were left alone."""

    def together(id: str, *words: str) -> subprocess.Popen:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
        command += ["-m", "equipoise.pipelines.cli", *words, "--runs", str(lab.root)]
        log = open(lab.folder / f"{id}.txt", "ab")
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    words = ["train", *lab.words, "batch=8", "--id"]
    whole = lab.root / "whole-of-two"
    if not whole.exists() and together("whole-of-two", *words, whole.name).wait():
        return "two processes do not train: " + (lab.folder / "whole-of-two.txt").read_text()[-500:]
    process, folder = together(id, *words, id), lab.root / id
    wanted = draw.randint(3, STEPS - 2)
    if not _until(lambda: (folder / "status.json").exists() and len(Run(folder).metrics()) >= wanted, process):
        return None
    workers = [item for item in psutil.Process(process.pid).children() if "equipoise" in " ".join(item.cmdline())]
    draw.choice(workers).kill()
    if process.wait(PATIENCE) == 0 or Run(folder).status().state == "done":
        return None
    if code := together(id, "resume", str(folder)).wait(PATIENCE):
        return f"resume ended with {code}: {(lab.folder / f'{id}.txt').read_text()[-500:]}"
    return "" if same(weights(whole), weights(folder)) else "other weights"


def worker_of_sweep(lab: Lab, id: str, draw: Random, *more: str) -> str | None:
    """A sweep's worker is killed; whether the sweep waits for another or is started again, its cells come out alike."""
    words = ["sweep", *lab.words, "--axis", "seed=0,1", "--no-compare", "--runs", str(lab.root), *more]
    cell = lab.root / id / "seed=0"
    with open(lab.folder / f"{id}.txt", "ab") as log:
        process = subprocess.Popen([*CLI, *words, "--id", id], stdout=log, stderr=log)
        wanted = draw.randint(1, STEPS - 2)
        if not _until(lambda: (cell / "status.json").exists() and len(Run(cell).metrics()) >= wanted, process):
            return None
        if (pid := Run(cell).status().pid) is None:
            return None
        os.kill(pid, signal.SIGKILL)
        process.wait(PATIENCE)
        again = [*CLI, "sweep", id, "--no-compare", "--runs", str(lab.root), *more]
        code = subprocess.run(again, stdout=log, stderr=log, timeout=PATIENCE).returncode
    if code or not same(lab.whole, weights(cell)):
        return f"ended with {code}: {(lab.folder / f'{id}.txt').read_text()[-500:]}"
    return "" if Run(lab.root / id / "seed=1").status().state == "done" else "the other cell is not done"


def page(lab: Lab, id: str, draw: Random) -> str | None:
    """The web page's process starts a sweep as its button does, and is killed with its whole process group."""
    words = [*lab.words, f"runs={lab.root}", f"name={id}"]
    code = (
        "import os, sys, threading, traceback\n"
        "from pathlib import Path\n"
        "from equipoise.ui.quick import import_gradio; import_gradio()\n"
        "from equipoise.pipelines import config\n"
        "from equipoise.pipelines.runs.store import Store\n"
        "from equipoise.ui import app, launch\n"
        "from equipoise.ui.safety import Site\n"
        "root, *words = sys.argv[1:]\n"
        "made = config.set_keys(config.load(words[0], words[1:]), {'sweep': {'seed': [0, 1]}})\n"
        "site = Site(Store(root), {})\n"
        "def button():\n"
        "    try: print(launch.launch(site, launch.Plan(made, 2, '', 1), 1)[0], flush=True)\n"
        "    except BaseException: traceback.print_exc(); os._exit(1)\n"
        "threading.Timer(1, button).start()\n"
        "app.serve('127.0.0.1', 0, None, root, {}, 1)\n"
    )
    command = [sys.executable, "-c", code, str(lab.root), *words]
    with open(lab.folder / f"{id}.txt", "wb") as log:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)
    assert server.stdout
    named = next((line.strip() for line in server.stdout if re.fullmatch(rf"[\w-]*{id}[\w-]*", line.strip())), None)
    if named is None:
        return f"the page did not start a sweep: {(lab.folder / f'{id}.txt').read_text()[-500:]}"
    cell, wanted = lab.root / named / "seed=0", draw.randint(0, STEPS // 2)
    _until(lambda: len(Run(cell).metrics()) >= wanted)
    os.killpg(server.pid, signal.SIGKILL)
    server.communicate()
    sweep = Run(lab.root / named)
    if sweep.status().over:
        return None
    _until(lambda: sweep.status().over)
    if sweep.status().state != "done":
        return f"the sweep is {sweep.status().state}"
    return "" if same(lab.whole, weights(cell)) else "other weights"


def _until(condition: Callable[[], bool], process: subprocess.Popen | None = None) -> bool:
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end or (process and process.poll() is not None):
            return False
        time.sleep(0.01)
    return True


@dataclass(frozen=True)
class Fault:
    what: str  # in the table
    trials: int
    trial: Callable[..., str | None]
    more: tuple = ()
    quick: bool = True  # takes a second or two, for it needs no process but forked ones


FAULTS = (
    Fault("a process of two under torchrun is killed", 3, worker_of_torchrun, quick=False),
    Fault("a sweep's worker is killed", 3, worker_of_sweep, quick=False),
    Fault("a sweep's task on Ray is killed", 3, worker_of_sweep, ("--executor=ray",), quick=False),
    Fault("the web page is killed during a sweep", 3, page, quick=False),
    Fault("SIGKILL while training", 50, killed, (TRAINING,)),
    Fault("SIGKILL while a checkpoint is written", 50, killed, (SAVING,)),
    Fault("SIGKILL while sampling", 50, killed, (SAMPLING,)),
    Fault("SIGTERM", 15, signalled, (signal.SIGTERM,)),
    Fault("Ctrl-C", 15, signalled, (signal.SIGINT,)),
    Fault("Ctrl-C twice", 8, signalled, (signal.SIGINT, 2)),
    Fault("the disk is full", 15, disk_full),
    Fault("a checkpoint is cut short", 12, truncated),
    Fault("a bit of a checkpoint is flipped", 24, bit_flipped),
    Fault("a checkpoint is another run's", 8, foreign),
    Fault("two processes on one run", 12, two_processes),
    Fault("the clock goes backwards, then SIGKILL", 10, clock),
    Fault("the index is deleted or damaged", 200, index),
    Fault("a loss is NaN", 6, broken, (float("nan"),)),
    Fault("a gradient explodes", 6, broken, (1e38,)),
    Fault("the device's memory is full", 10, out_of_memory),
)


def _short(more: object) -> str:
    return f"{more:g}" if isinstance(more, int | float) else str(more).strip("-").replace("=", "-")


def tried(lab: Lab, fault: Fault, number: int, seed: int) -> str:
    """One trial that the fault really came to."""
    for again in range(TRIES):
        id = f"{fault.trial.__name__}-{'-'.join(map(_short, fault.more))}-{number}-{again}".replace("+", "")
        try:
            lost = fault.trial(lab, id, Random(f"{id} {seed}"), *fault.more)
        except Exception as error:
            return f"{type(error).__name__}: {error}: {traceback.format_exc()[-800:]}"
        if lost is not None:
            return lost
    return f"did not happen in {TRIES} tries"


def soak(
    faults: Sequence[Fault], trials: int | None, workers: int, seed: int, results: Path, seconds: float
) -> dict[str, tuple[int, list[str]]]:
    """By fault: how many trials there were, and what was lost in them; none where it could not be caused here.

    Args:
        results: a file with a line for each trial; those that it has are not made again.
        seconds: no trial begins later.
    """
    until = time.monotonic() + seconds
    results.touch()
    before = {tuple(json.loads(line)[:2]) for line in results.read_text().splitlines()}
    with tempfile.TemporaryDirectory(prefix="soak-") as made:
        lab = Lab(Path(made))
        if not may_mount(lab):
            faults = [fault for fault in faults if fault.trial is not disk_full]
        if not importlib.util.find_spec("ray"):
            faults = [fault for fault in faults if "Ray" not in fault.what]
        tasks = [(fault, number) for fault in faults for number in range(trials or fault.trials)]
        tasks.sort(key=lambda task: task[1])  # some of each, however soon it ends
        tasks = [(fault, number) for fault, number in tasks if (fault.what, number) not in before]
        children = []
        for worker in range(workers):
            if not (pid := os.fork()):
                try:
                    for fault, number in tasks[worker::workers]:
                        if time.monotonic() > until:
                            break
                        line = json.dumps([fault.what, number, tried(lab, fault, number, seed)])
                        with open(results, "a") as file:
                            file.write(line + "\n")
                finally:
                    os._exit(0)
            children.append(pid)
        with tqdm(total=len(tasks), unit="trial", dynamic_ncols=True, smoothing=0) as bar:
            while children:
                children = [pid for pid in children if os.waitpid(pid, os.WNOHANG) == (0, 0)]
                bar.update(len(results.read_text().splitlines()) - len(before) - bar.n)
                time.sleep(0.5)
    found: dict[str, tuple[int, list[str]]] = {fault.what: (0, []) for fault in faults}
    for what, _, lost in map(json.loads, results.read_text().splitlines()):
        count, losses = found.get(what, (0, []))
        found[what] = (count + 1, losses + [lost] * bool(lost))
    return found


def fuzz(examples: int) -> dict[str, int]:
    """Runs the tests of hostile input on that many examples each; gives how many each of them had."""
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder, "counts.json")
        environment = {**os.environ, "EQUIPOISE_FUZZ": str(examples), "EQUIPOISE_FUZZ_COUNTS": str(counts)}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / "pipelines/test_hostile.py"]
        subprocess.run([*command, "--timeout=0"], env=environment, check=True)
        return json.loads(counts.read_text())


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in lines)


def write(name: str, text: str) -> None:
    """Puts a table between the marks of its name in docs/reliability.md."""
    head, begin, rest = PAGE.read_text().partition(f"<!-- {name} -->\n")
    _, end, tail = rest.partition(f"<!-- end of {name} -->")
    assert begin and end, f"{PAGE} has no place for {name}"
    PAGE.write_text(f"{head}{begin}{text}\n{end}{tail}")


def run() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, help="of each fault, in place of its own number")
    parser.add_argument("--only", default="", metavar="WORDS", help="faults whose names have these words in them")
    parser.add_argument("--quick", action="store_true", help="only faults that take a second or two")
    parser.add_argument(
        "--fuzz", type=int, default=0, metavar="N", help="hostile input too, N examples for each reader"
    )
    parser.add_argument("--write", action="store_true", help="into docs/reliability.md")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="trials at a time")
    parser.add_argument("--results", type=Path, help="a file to keep the trials in, and to go on from")
    parser.add_argument("--minutes", type=float, default=60.0, help="no trial begins later")
    parser.add_argument("--seed", type=int, default=0, help="of all moments and harms")
    args = parser.parse_args()
    tqdm.set_lock(threading.RLock())  # its own is shared with what is forked, and would die with one that holds it
    faults = [fault for fault in FAULTS if args.only in fault.what and (fault.quick or not args.quick)]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        results = args.results or Path(folder, "results.jsonl")
        found = soak(faults, args.trials, args.workers, args.seed, results, 60 * args.minutes)
    found = {what: trials for what, trials in found.items() if trials[0]}  # without root no disk can be mounted
    rows = [(what, count, len(lost), count - len(lost)) for what, (count, lost) in found.items()]
    tables = [lambda: ("faults", table(["fault", "trials", "lost", "recovered"], rows))]
    if args.fuzz:
        head = ["input", "examples", "faults"]
        tables.append(lambda: ("inputs", table(head, [(name, count, 0) for name, count in fuzz(args.fuzz).items()])))
    for made in tables:
        name, text = made()
        print(f"\n{text}")
        if args.write:
            write(name, text)
    lost = [f"{what}: {reason}" for what, (_, reasons) in found.items() for reason in reasons]
    print(f"\n{time.monotonic() - started:.0f} s", *Counter(lost), sep="\n")
    return bool(lost)


if __name__ == "__main__":
    raise SystemExit(run())
