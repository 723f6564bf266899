"""κ over several processes: each measures its own part of the batch, and all of them see the same mean."""

import pytest
import torch
import torch.multiprocessing as multiprocessing

from equipoise.coordination.balance import Prediction, balance_of


def _measure(rank: int, file: str, results) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    base = Prediction(torch.zeros(1), torch.zeros(1))
    found = balance_of(base, torch.tensor(1.0 + rank), torch.tensor(0.5 + rank))
    results[rank] = (found.language, found.encoder, found.kappa)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_the_mean_over_processes(tmp_path):
    with multiprocessing.Manager() as manager:
        results = manager.dict()
        multiprocessing.spawn(_measure, (str(tmp_path / "meet"), results), nprocs=2)
        assert results[0] == results[1] == (1.5, 1.0, 1.5)
