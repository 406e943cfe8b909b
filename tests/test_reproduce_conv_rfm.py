"""python -m reproduce conv_rfm: layers on square images, what is written, and what is refused."""

from __future__ import annotations

import csv

import numpy as np
import torch

from fastagop import Laplace
from fastagop.convolution import ConvLayerSettings, Window
from reproduce import conv_rfm
from reproduce.__main__ import main


def test_layers_go_on_while_images_are_large_enough():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(12, 1, 5, 5, generator=generator)
    settings = [ConvLayerSettings(Laplace(1.0), Window(3), width=4) for _ in range(3)]
    rows = conv_rfm.run(images, torch.arange(12) % 3, settings, 0)
    assert [row["images"] for row in rows] == ["1x5x5", "4x3x3"]  # 1 x 1 are left
    assert all(row[f"nc1_{stage}"] > 0 for row in rows for stage in ("input", "projected", "features"))


def test_what_is_written(tmp_path, capsys):
    rng = np.random.default_rng(0)
    file = tmp_path / "squares.npz"
    np.savez(file, x_train=rng.integers(0, 255, (30, 12, 12, 3), dtype=np.uint8), y_train=np.arange(30) % 3)
    assert main(["conv_rfm", "--dataset", str(file), "--n", "24", "--width", "8", "--out", str(tmp_path / "out")]) == 0
    with open(tmp_path / "out/conv_rfm.csv", newline="") as read:
        rows = list(csv.DictReader(read))
    assert [row["images"] for row in rows] == ["3x12x12"]
    assert str(tmp_path) not in (tmp_path / "out/conv_rfm.json").read_text()
    assert (tmp_path / "out/conv_rfm.png").stat().st_size > 5000
    assert "M^(1/2) of the patch AGOP lowers NC1 in" in capsys.readouterr().out


def test_rows_that_are_no_images(tmp_path, capsys):
    file = tmp_path / "rows.npz"
    np.savez(file, x_train=np.zeros((4, 7), np.float32), y_train=np.arange(4))
    assert main(["conv_rfm", "--dataset", str(file), "--n", "4", "--out", str(tmp_path)]) == 2
    assert "no square images of 1 or 3 channels" in capsys.readouterr().err
