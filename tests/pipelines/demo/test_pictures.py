"""The demo's pictures are drawn once, however many workers want them at the same moment."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from equipoise.pipelines import demo


def test_workers_that_begin_together_find_the_same_pictures(tmp_path):
    for trial in range(10):
        runs = tmp_path / str(trial)
        together = threading.Barrier(4)

        def look(_, runs=runs, together=together):
            together.wait()
            folder = demo.pictures_folder(runs)
            return {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.iterdir()}

        with ThreadPoolExecutor(4) as pool:
            first, *others = pool.map(look, range(4))
        assert len(first) == 7
        assert all(other == first for other in others), "the names of cached latents depend on the files' times"


@pytest.mark.parametrize("lost", ["metadata.jsonl", "03.png"])
def test_pictures_that_were_half_deleted_are_drawn_again(tmp_path, lost):
    folder = demo.pictures_folder(tmp_path)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    (folder / lost).unlink()
    demo.pictures_folder(tmp_path)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
