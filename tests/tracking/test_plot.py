"""The loss curve is drawn from the record alone."""

import math

import matplotlib.image
import numpy as np
import pytest

from llama_eqx.errors import DataError
from llama_eqx.tracking.plot import TRAIN, VALIDATION, plot_loss

METRICS = [{"step": step, "train/loss": 4 / math.sqrt(step), "tokens": step * 8192} for step in range(1, 201)]


def pixels(path, color: str) -> int:
    image = matplotlib.image.imread(path)[..., :3]
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return int((np.abs(image - wanted).max(-1) < 0.02).sum())


def test_draws_both_losses(tmp_path):
    plot_loss([*METRICS, {"step": 200, "val/loss": 1.0}, {"step": 150, "train/loss": math.nan}], tmp_path / "loss.png")
    assert matplotlib.image.imread(tmp_path / "loss.png").shape[:2] == (1000, 1600)
    assert pixels(tmp_path / "loss.png", TRAIN) > 2000
    assert pixels(tmp_path / "loss.png", VALIDATION) > 50
    assert (tmp_path / "loss.png").stat().st_size < 300_000


def test_one_point_is_enough_and_none_is_an_error(tmp_path):
    plot_loss([{"step": 3, "val/loss": 1.0}], tmp_path / "loss.png")
    assert pixels(tmp_path / "loss.png", TRAIN) == 0
    with pytest.raises(DataError, match="no record has a finite loss"):
        plot_loss([{"step": 3, "train/loss": math.inf}], tmp_path / "none.png")
