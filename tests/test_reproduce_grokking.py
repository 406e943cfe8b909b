"""python -m reproduce grokking: the task, the measure of structure, what is written, and that it groks."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from reproduce import grokking
from reproduce.__main__ import main


def test_pairs_are_all_sums():
    X, y = grokking.pairs(5)
    assert X.shape == (25, 10)
    a, b = X[:, :5].argmax(1), X[:, 5:].argmax(1)
    assert len(set(zip(a.tolist(), b.tolist(), strict=True))) == 25
    torch.testing.assert_close(y, (a + b) % 5)
    assert (X.sum(1) == 2).all()


def test_circulant_share():
    generator = torch.Generator().manual_seed(0)
    p = 23
    rows = [torch.randn(p, generator=generator, dtype=torch.float64) for _ in range(4)]
    blocks = [torch.stack([row.roll(shift) for shift in range(p)]) for row in rows]
    M = torch.cat([torch.cat(blocks[:2], 1), torch.cat(blocks[2:], 1)])
    assert grokking.circulant_share(M) == pytest.approx(1.0, abs=1e-12)
    assert grokking.circulant_share(M + 1e3 * torch.diag(torch.rand(2 * p, generator=generator).double())) > 0.999
    noise = torch.randn(2 * p, 2 * p, generator=generator, dtype=torch.float64)
    assert grokking.circulant_share(noise) == pytest.approx(1 / p, abs=0.03)
    assert grokking.circulant_share(torch.eye(2 * p, dtype=torch.float64)) == 0.0


def test_what_is_written(tmp_path, capsys):
    options = ["--modulus", "7", "--fraction", "0.8", "--iterations", "2", "--out", str(tmp_path)]
    assert main(["grokking", *options]) == 0
    with open(tmp_path / "grokking.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["iteration"] for row in rows] == ["0", "1", "2"]
    assert all(float(row["train"]) == 1.0 for row in rows)
    about = json.loads((tmp_path / "grokking.json").read_text())
    assert about["runs"][0]["settings"]["modulus"] == 7
    assert about["lessons"][0] in capsys.readouterr().out
    assert (tmp_path / "grokking.png").stat().st_size > 5000
    assert main(["report", "--out", str(tmp_path)]) == 0
    assert grokking.ABOUT.shows in (tmp_path / "report.html").read_text()


def test_nothing_left_to_test_on(tmp_path, capsys):
    assert main(["grokking", "--fraction", "1.5", "--out", str(tmp_path)]) == 2
    assert "--fraction must be below 1, so that pairs are left to test on" in capsys.readouterr().err
    assert main(["grokking", "--modulus", "1", "--out", str(tmp_path)]) == 2
    assert "--modulus must be 2 or more, so that pairs are left to test on" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["grokking", "--seed"], ["conv_rfm", "--seed"], ["figure3", "--seeds"]])
@pytest.mark.parametrize("seed", ["-3", "4294967296", "a"])
def test_seeds_are_checked_where_they_are_given(command, seed, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*command, seed])
    assert f"argument {command[1]}: must be an integer from 0 to 2^32 - 1, got '{seed}'" in capsys.readouterr().err


def test_it_groks():
    rows, _ = grokking.run(31, 0.75, 12, 0.5, 1e-3, 0)
    assert rows[0]["train"] == 1.0
    assert rows[4]["test"] < 0.05
    assert rows[12]["test"] > 0.95
    assert rows[0]["circulant"] < 0.3
    assert rows[12]["circulant"] > 0.9
