"""Another program's training as a run: its command, the LoRA file that it leaves, and how far that lowers the loss.

So runs of kohya's scripts, of diffusers' or of anything else that writes LoRA files are swept and compared like one's
own. What they are judged by, loss and pictures, is measured here, alike for all.
"""

# diffusers annotates too narrowly.
# pyright: reportArgumentType=false

import codecs
import ctypes
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import IO, Any

import psutil

from equipoise.errors import ConfigError, EquipoiseError, InputError
from equipoise.pipelines import config as configs
from equipoise.pipelines import demo
from equipoise.pipelines.files import write_atomic
from equipoise.pipelines.pipeline import Outcome
from equipoise.pipelines.runs.run import Run
from equipoise.pipelines.text_to_image.base import forget_bases, load_base
from equipoise.pipelines.text_to_image.compare import with_lora
from equipoise.pipelines.text_to_image.compare_files import plain_factors
from equipoise.pipelines.text_to_image.config import TextToImageConfig
from equipoise.pipelines.text_to_image.data import drawn_if_demo, read_folder, read_held
from equipoise.pipelines.text_to_image.fixed import FixedLosses, Measure
from equipoise.pipelines.text_to_image.formats.factors import Factors
from equipoise.pipelines.text_to_image.formats.layout import model_source
from equipoise.pipelines.text_to_image.formats.lora_files import write_lora
from equipoise.pipelines.text_to_image.latents import prepare_latents
from equipoise.pipelines.text_to_image.result import LORA_FILE, facts_of
from equipoise.pipelines.training import processes
from equipoise.pipelines.training.loop import StoppedError
from equipoise.pipelines.training.state import make_accelerator, number

FOLDER, LOG = "trainer", "trainer.log"  # in a run's folder: where the command writes, and what it says
THROUGH = "trainer.json"  # there once it came to its end
NEEDED = ("output", "learning_rate")  # without which there is nothing to find, or all columns are the same
_NAME = re.compile(r"\{([A-Za-z_][\w.]*)\}")
_MARK = "EQUIPOISE_TRAINER_OF"  # in the environment of the command: the run's folder
_LAST = 3  # lines of the output in an error
_ROUNDED = 2  # seconds, by which a disk's times may be rounded
_PATIENCE = 30  # seconds between asking it to end and ending it
_KEPT_FACTS = ("base", "revision", "trigger", "resolution", "pictures", "equipoise")  # that do not depend on who trains


def words(config: TextToImageConfig, output: Path) -> list[str]:
    """The command with its values in place; no shell reads it.

    Raises:
        ConfigError: it cannot be read, lacks a value that it must have, or names a key that there is not.
    """
    try:
        parts = shlex.split(config.script or "")
    except ValueError as error:
        raise ConfigError([f"script: cannot be read as a command ({error}). Quote it as for a shell."]) from None
    known = configs.flat(config) | {"output": str(output)}
    known |= {short: known[key] for short, key in config.SHORT.items() if key in known}
    known |= _of_the_demo(config)
    asked = [name for part in parts for name in _NAME.findall(part)]
    wrong = [
        f"script: has no {{{name}}}. Write it where the command takes its {name.replace('_', ' ')}."
        for name in NEEDED
        if name not in asked
    ]
    wrong += [
        f"script: {{{name}}}: {'is empty here' if name in known else 'is no key of the configuration'}. There are "
        "{output}, {learning_rate}, {seed}, {model}, {data}, {steps} and all other keys."
        for name in dict.fromkeys(asked)
        if known.get(name) is None
    ]
    if parts and not shutil.which(parts[0]):
        wrong.append(f"script: there is no program {parts[0]} here. Give its path, or install it.")
    if wrong:
        raise ConfigError(wrong)
    return [_NAME.sub(lambda found: str(known[found[1]]), part) for part in parts]


def problems(config: TextToImageConfig) -> list[str]:
    try:
        words(config, Path(FOLDER))
    except ConfigError as error:
        return error.problems
    return []


def _of_the_demo(config: TextToImageConfig) -> dict[str, str]:
    """The folders of what is called `demo`, for a program that knows no such word."""
    found = {}
    if config.model.path == demo.NAME:
        found |= dict.fromkeys(("model", "model.path"), str(model_source(demo.NAME)))
    if config.data.folder == demo.NAME:
        found |= dict.fromkeys(("data", "data.folder"), drawn_if_demo(config.data, Path(config.runs)).folder)
    return found


def train(config: TextToImageConfig, run: Run) -> Outcome:
    """Runs the command, unless it is through already, and makes the run's result of the file that it leaves.

    Raises:
        EquipoiseError: the command fails, leaves no LoRA file, or one that does not fit the base; all stays on disk.
    """
    processes.alone("script: another program's training")
    output, through = run.folder / FOLDER, run.folder / THROUGH
    output.mkdir(exist_ok=True)
    command = words(config, output)
    done = json.loads(through.read_text()) if through.is_file() else {}
    if done.get("command") != command:
        forget_bases()  # of the cells before: the command needs the device's memory for itself
        run.log(f"runs {shlex.join(command)}")
        started = time.time()
        if not _ended(command, run):
            return Outcome("stopped", "stopped on request; a resumed run begins the command anew.", 0)
        done = {"command": command, "began": started, "seconds": time.time() - started}
        write_atomic(through, json.dumps(done) + "\n")
    try:
        file = lora_file(output, done["began"])
        run.log(f"takes {file.relative_to(run.folder)}")
        return _judged(config, run, file, done["seconds"])
    except InputError as error:  # one would have a run that could not begin removed, and this one was trained
        raise EquipoiseError(str(error)) from error


def _judged(config: TextToImageConfig, run: Run, file: Path, seconds: float) -> Outcome:
    """Writes the run's result of a LoRA file, with the loss before and after over the draws of one's own runs."""
    data = drawn_if_demo(config.data, Path(config.runs))
    held = read_held(data)
    found = held or read_folder(data)
    if found.problems:
        raise ConfigError(found.problems)
    base, result = load_base(config.model, config.train.precision), run.folder / "result"
    try:
        latents = prepare_latents(base, found.examples, data, Path(config.runs) / ".cache", run.asked_to_stop)
    except StoppedError as reason:
        return Outcome("stopped", f"{reason}; a resumed run goes on here.", 0)
    factors = plain_factors(base, file)
    described = _described(config, factors, len(found.examples))
    metadata = {"format": "pt", "equipoise": json.dumps(described | {"shape": base.shape})}
    write_lora(result / LORA_FILE, "diffusers", factors, base.shape, metadata)

    captions = [example.caption for example in found.examples]
    measure = Measure(config, make_accelerator(config.train.precision), base, base.set_scheduler(config.noise))
    fixed = FixedLosses(measure, latents, captions, seed=0 if held else config.seed)
    base.read(captions)
    before = fixed.mean(base.known)
    encoders = any(name.startswith("text_encoder") for name in factors)
    with base.encoders_on_device() if encoders else nullcontext(), with_lora(base, result / LORA_FILE, 1.0):
        after = fixed.mean(fixed.embed if encoders else base.known)
    facts = {"state": "done", "loss_before": number(before), "loss_after": number(after), "seconds": seconds}
    write_atomic(result / "result.json", json.dumps(described | facts, indent=1) + "\n")
    return Outcome("done", step=config.total_steps)


def lora_file(output: Path, began: float) -> Path:
    """The LoRA file that a trainer has left: the newest outside of its checkpoints.

    Args:
        began: When it was started, in seconds since 1970: what is older is of an earlier start.

    Raises:
        InputError: there is none.
    """
    files = [path for path in output.rglob("*.safetensors") if path.stat().st_mtime > began - _ROUNDED]
    final = [path for path in files if not any("checkpoint" in part for part in path.relative_to(output).parts[:-1])]
    if not final:
        few = f" There are only checkpoints, such as {files[0].relative_to(output)}." if files else ""
        raise InputError(f"script: the command has left no .safetensors file in {output}.{few} Let it write one there.")
    return max(final, key=lambda path: (path.name == LORA_FILE, path.stat().st_mtime_ns))


def _described(config: TextToImageConfig, taken: dict[str, Factors], pictures: int) -> dict[str, Any]:
    """What is known of how a file was made: what the command was given, and what the file itself shows."""
    ours, asked = facts_of(config, pictures), set(_NAME.findall(config.script or ""))
    facts = dict.fromkeys(ours) | {key: ours[key] for key in _KEPT_FACTS}
    facts |= {key: ours[key] for key in ours if key in asked}
    (rank, _), *_ = Counter(factors.rank for factors in taken.values()).most_common(1)
    return facts | {"rank": rank, "alpha": rank, "script": config.script, "step": None}


def _ended(command: Sequence[str], run: Run) -> bool:
    """Runs a command to its end; False where the run was asked to stop meanwhile.

    Raises:
        EquipoiseError: it fails.
    """
    _end(run)  # one that a killed run has left would write into the same folder
    last: deque[str] = deque(maxlen=_LAST)
    with open(run.folder / LOG, "ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {_MARK: str(run.folder)},
            preexec_fn=_with_its_parent if sys.platform == "linux" else None,
        )
        assert process.stdout
        reader = threading.Thread(target=_copy, args=(process.stdout, log, last), daemon=True)
        reader.start()
        try:
            while process.poll() is None and not run.asked_to_stop():
                time.sleep(0.1)
        finally:
            if stopped := process.poll() is None:
                _end(run, process)
            reader.join(timeout=5)
            if not reader.is_alive():  # else a process that outlives the command holds the other end
                process.stdout.close()
    if process.returncode and not stopped:
        said = "\n".join(f"  {line}" for line in last)
        raise EquipoiseError(
            f"script: {Path(command[0]).name} ended with exit code {process.returncode}. Its last lines, of those in "
            f"{run.folder / LOG}:\n{said}"
        )
    return not stopped


def _copy(source: IO[bytes], log: IO[bytes], last: deque[str]) -> None:
    """What the command says goes to the terminal, to the log, and its last lines into an error."""
    decoder, line = codecs.getincrementaldecoder("utf-8")("replace"), ""
    while piece := os.read(source.fileno(), 4096):
        log.write(piece)
        log.flush()
        text = decoder.decode(piece)
        sys.stderr.write(text)
        sys.stderr.flush()
        *whole, line = re.split(r"[\r\n]+", line + text)
        last.extend(one for one in whole if one.strip(" ^~"))
    if line.strip(" ^~"):
        last.append(line)


def _end(run: Run, process: subprocess.Popen | None = None) -> None:
    """Asks a run's command and all that it has started to end, and ends what does not."""
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        if not (left := _of(run)):
            break
        for one in left:
            with suppress(psutil.Error):
                one.send_signal(sign)
        until = time.monotonic() + _PATIENCE
        while time.monotonic() < until and any(_heeds(one, sign) for one in _of(run)):
            if process:
                process.poll()  # else it stays as a zombie
            time.sleep(0.1)
    if process:
        process.wait()


def _of(run: Run) -> list[psutil.Process]:
    """A run's command and all that it has started, known by their environment whoever is their parent."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(_MARK) == str(run.folder):
                found.append(process)
    return found


def _heeds(process: psutil.Process, sign: signal.Signals) -> bool:
    """Whether waiting for a process may help: a shell has what it starts with `&` ignore SIGINT. True where unknown."""
    with suppress(OSError):
        ignored = re.search(r"^SigIgn:\s*(\w+)$", Path(f"/proc/{process.pid}/status").read_text(), re.M)
        return not (ignored and int(ignored[1], 16) >> (sign - 1) & 1)
    return True


def _with_its_parent() -> None:
    """In the new process: it ends when the one that trains is killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
