"""Starts programs in processes of their own that need not import torch: forks of one Python that has.

    python forking.py [MODULE …]      which it imports, too

It reads lines of JSON: what to start, upon which it prints the number of the process; or for which one to wait, upon
which it prints the exit code. A child does what Python does after its start, and ends as Python does.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import sys
import time

import accelerate  # noqa: F401  with what follows, two thirds of the time of a small program
import torch._dynamo  # noqa: F401  the first optimizer imports it

for module in sys.argv[1:]:
    importlib.import_module(module)
gc.freeze()  # else a child's first look for garbage copies all of that
for line in sys.stdin:
    asked = json.loads(line)
    if "wait" in asked:
        end = time.monotonic() + 240
        while not (ended := os.waitpid(asked["wait"], os.WNOHANG))[0]:
            time.sleep(0.005)
            if time.monotonic() > end:  # one of two that meet may have failed
                os.kill(asked["wait"], signal.SIGKILL)
        print(os.waitstatus_to_exitcode(ended[1]), flush=True)
    elif process := os.fork():
        print(process, flush=True)
    else:
        break
else:
    raise SystemExit
atexit.register(gc.freeze)  # a search for garbage at its end would take longer than a small program
os.environ.update(asked["environment"])
os.chdir(asked["folder"])
for number, file in enumerate((os.devnull, asked["out"], asked["err"])):
    os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), number)
first, *words = asked["words"]
if first == "-m":
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)
else:
    sys.argv, sys.path[0] = asked["words"], os.path.dirname(os.path.realpath(first))
    runpy.run_path(first, run_name="__main__")
