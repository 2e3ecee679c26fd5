"""What each recipe for ppo_mlp_continuous.py claims, on small cases. test_recipes.py has what holds for all recipes."""

import numpy as np
import pytest
import ranks_mlp
import torch
from helpers import ROOT, patched, read_metrics, run_two_ranks, same_state


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


# ------------------------------------------------------------------------------------------------------------- torchrun


def test_two_ranks_equal_one_process(tmp_path):
    """After a few steps on rollouts whose rows the ranks share unequally: weights, statistics, steps and figures."""
    ppo = patched("ppo_mlp_continuous__torchrun", tmp_path)
    run_two_ranks(ROOT / "tests/ranks_mlp.py", tmp_path)
    alone = ranks_mlp.run(ppo, tmp_path / "alone")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    same_state(*ranks)
    torch.testing.assert_close(ranks[0], alone, rtol=0, atol=1e-6)
    files = [sorted(path.name.split(".out.")[0] for path in (tmp_path / f).iterdir()) for f in ("run", "alone/run")]
    assert files[0] == files[1]  # each is there once
    together, expected = read_metrics(tmp_path / "run"), read_metrics(tmp_path / "alone/run")
    assert len(together) == len(expected) == 3
    for row, other in zip(together, expected):
        for name in row:
            if name not in ("charts/episodic_return", "charts/episodic_length"):  # of the first rank's episodes
                assert float(row[name]) == pytest.approx(float(other[name]), rel=1e-5, abs=1e-7)
    moments = [ppo.RunningMoments(1), ppo.RunningMoments(1)]
    for folder, one in zip(("run", "alone/run"), moments):
        ppo.load(tmp_path / folder / "checkpoint.pt", obs_moments=one)
    np.testing.assert_allclose(*(torch.stack([one.count, one.mean[0], one.var[0]]) for one in moments), rtol=1e-9)
