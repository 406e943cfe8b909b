"""Options of ``python -m reproduce`` and ``python -m bench`` do what they say, or are refused by the command."""

from __future__ import annotations

import pytest

from bench.__main__ import main as bench
from reproduce import everything
from reproduce.__main__ import SHOWN, main, parser

SMALL = ("--dataset", "digits", "--n", "60", "--depth", "1", "--width", "8")


@pytest.mark.parametrize("command", ["conv_rfm", "eigenvectors"])
def test_what_has_no_runs_keeps_no_checkpoint_and_takes_one_data_set(command, capsys):
    for words, text in (
        (["--keep-checkpoint"], "unrecognized arguments: --keep-checkpoint"),
        (["--dataset", "digits", "--dataset", "mnist"], "--dataset must be given once here, got digits and mnist"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([command, *words])
        assert ended.value.code == 2
        assert text in capsys.readouterr().err


def test_all_passes_on_what_each_picture_takes():
    words = ["all", "--dataset", "digits", "--dataset", "mnist", "--keep-checkpoint", "--download"]
    given = parser().parse_args(words)
    for name, picture in SHOWN.items():
        found = parser().parse_args([name, *everything._forwarded(given, picture)])
        assert getattr(found, "keep_checkpoint", False) == name.startswith("figure")
        wanted = ["digits", "mnist"] if name.startswith("figure") else "digits"
        assert getattr(found, "dataset", "digits") == wanted
        assert getattr(found, "download", True) is True


def test_a_scale_of_cos_features_needs_some(tmp_path, capsys):
    quiet = ["--out", str(tmp_path), "--feature-scale", "0.1"]
    assert main(["figure3", *SMALL, *quiet]) == 2
    assert "--feature-scale must not be given here" in capsys.readouterr().err
    assert main(["figure1", *SMALL, *quiet]) == 0  # one of its rows has cos features
    assert "0.1" in (tmp_path / "figure1.json").read_text()


def test_a_complete_run_says_that_its_layers_were_not_kept(tmp_path, capsys):
    for words, said in (([], False), (["--keep-checkpoint"], True)):
        assert main(["figure6", *SMALL, "--out", str(tmp_path), *words]) == 0
        assert ("its trained layers were not kept; remove the folder" in capsys.readouterr().out) == said


def test_more_eigenvectors_than_pixels_are_refused(tmp_path, capsys):
    assert main(["eigenvectors", "--dataset", "digits", "--n", "60", "--count", "65", "--out", str(tmp_path)]) == 2
    assert "--count must be at most 64, the pixels of an image, got 65" in capsys.readouterr().err


def test_a_case_of_one_width_refuses_two(tmp_path, capsys):
    assert bench(["scale", "--d", "3", "4", "--out", str(tmp_path / "scale.json")]) == 2
    assert "scale takes one --d, got 2" in capsys.readouterr().err


def test_every_option_of_a_figure_reaches_its_settings():
    figures = [(name, shown) for name, shown in SHOWN.items() if shown.has_runs]
    elsewhere = {"seeds", "dataset", "data_root", "download", "device", "out", "keep_checkpoint", "command"}
    for name, figure in figures:
        assert set(vars(parser().parse_args([name]))) - elsewhere == set(figure.family.options)
