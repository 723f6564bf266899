"""An epoch has of each data set what its weight says, and every conversation of one as often as any other."""

import torch

from equipoise.pipelines.instruction_tuning.mixing import mixed, shares


def test_shares_are_whole_and_complete():
    assert shares([1, 1, 1], 10) == [4, 3, 3]
    assert shares([5, 3, 2], 9) == [4, 3, 2]
    assert sum(shares([1e-9, 3, 7], 1001)) == 1001


def test_small_sets_are_repeated_and_large_ones_spread_over_epochs():
    sources = torch.tensor([0] * 4 + [1] * 40)
    epochs = [mixed(sources, [1, 1], epoch, 44, seed=3) for epoch in range(20)]
    for order in epochs:
        assert sources[order].bincount().tolist() == [22, 22]
    counts = torch.cat(epochs).bincount(minlength=44)
    assert counts.tolist() == [110] * 4 + [11] * 40, "of a set, each as often as the others"
    assert max(epochs[0].bincount(minlength=44)[4:]) == 1


def test_an_epoch_is_known_from_its_number_and_the_seed():
    sources = torch.tensor([0, 1] * 50)
    first = mixed(sources, [3, 1], 7, 96, seed=0)
    assert torch.equal(first, mixed(sources, [3, 1], 7, 96, seed=0))
    assert not torch.equal(first, mixed(sources, [3, 1], 7, 96, seed=1))
