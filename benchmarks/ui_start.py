"""How long `equipoise ui` takes to open, from the command to the page's last byte, and gradio's import alone.

    python benchmarks/ui_start.py

Gradio's import is timed in a process of its own, in turn with the page, so that both meet the same machine.
"""

import argparse
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

IMPORT = "from equipoise.ui.quick import import_gradio; import_gradio()"


def opened(runs: str) -> tuple[float, float]:
    """Seconds until the page came, and seconds of processor time."""
    before, started = _used(), time.perf_counter()
    command = [sys.executable, "-m", "equipoise.pipelines.cli", "ui", "--port=0", f"--runs={runs}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        found = re.search(r"http://\S+:\d+", server.stdout.readline())
        assert found, "the server did not say where it is"
        with urllib.request.urlopen(found[0]) as page:
            page.read()
        taken = time.perf_counter() - started
        server.kill()  # at once, before it goes on to import what the first click needs
    return taken, _used() - before


def imported() -> tuple[float, float]:
    """The same of a Python which only imports gradio."""
    before, started = _used(), time.perf_counter()
    subprocess.run([sys.executable, "-c", IMPORT], check=True)
    return time.perf_counter() - started, _used() - before


def _used() -> float:
    """Seconds of processor time of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5, help="starts of each (default: %(default)s)")
    times = parser.parse_args().times
    with tempfile.TemporaryDirectory() as runs:
        taken = [(*opened(runs), *imported()) for _ in range(times)]
    page, page_used, gradio, gradio_used = (statistics.median(column) for column in zip(*taken, strict=True))
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, median of {times}")
    print(f"the page opens after {page:.2f} s ({page_used:.2f} s of processor time)")
    print(f"importing gradio alone takes {gradio:.2f} s ({gradio_used:.2f} s)")


if __name__ == "__main__":
    main()
