"""python -m reproduce on bad ground: damaged files, full disks, places not to be written; and what results tell."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from reproduce import files, network_figures, options, runs, training
from reproduce.__main__ import FIGURES, main, parser
from reproduce.figures import settings_of

ROOT = Path(__file__).resolve().parents[1]
DEEP = ["figure6", "--dataset", "digits", "--n", "60", "--depth", "2", "--width", "16"]
NETWORK = ["figure7", "--dataset", "digits", "--n", "60", "--width", "8", "--epochs", "2", "--every", "1"]
NETWORK += ["--init-scale", "1", "--seeds", "0"]
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """The folders of a complete figure 6 and of a complete figure 7, by the command's name."""
    made = {}
    for command in (DEEP, NETWORK):
        made[command[0]] = tmp_path_factory.mktemp(command[0])
        assert main([*command, "--out", str(made[command[0]]), "--keep-checkpoint"]) == 0
    return made


def copied(complete, command, tmp_path) -> tuple[Path, Path]:
    """(--out, its only run) of a copy."""
    out = tmp_path / "out"
    shutil.copytree(complete[command], out)
    (folder,) = (out / "runs").iterdir()
    return out, folder


def refused(command, out, capsys) -> str:
    """The one line that a command ends with."""
    capsys.readouterr()
    assert main([*command, "--out", str(out)]) == 2
    (printed,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("python -m reproduce")]
    return printed


def flips(data: bytes, count: int):
    for k in RNG.integers(0, len(data), count):
        yield data[:k] + bytes([data[k] ^ 1 << int(RNG.integers(8))]) + data[k + 1 :]


@pytest.mark.parametrize("command", [DEEP, NETWORK], ids=lambda command: command[0])
def test_a_flipped_record_is_found(complete, command, tmp_path):
    _, folder = copied(complete, command[0], tmp_path)
    path, parts = folder / "record.json", FIGURES[command[0]].family.procedure.parts
    data = path.read_bytes()
    settings = json.loads(data)["settings"]
    whole = files.read_record(path, settings, parts)
    found = 0
    for broken in flips(data, 200):
        path.write_bytes(broken)
        try:
            assert files.read_record(path, settings, parts) == whole  # white space
        except ValueError as error:
            found += str(path) in str(error) and f"remove {folder}" in str(error)
    assert found > 150


def test_a_record_of_other_settings_is_refused(complete, tmp_path, capsys):
    out, folder = copied(complete, "figure6", tmp_path)
    other = {**json.loads((folder / "record.json").read_text()), "settings": {"n": 3}}
    other.pop("sha256")
    files.write_record(folder / "record.json", other)
    assert "another run's" in refused(DEEP, out, capsys)


@pytest.mark.parametrize(
    ("command", "name"),
    [(DEEP, "record.json"), (DEEP, "gram.npz"), (NETWORK, "record.json")],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
@pytest.mark.parametrize("damage", ["flip", "half", "empty", "text"])
def test_damaged_files_of_a_complete_run_are_one_line(complete, command, name, damage, tmp_path, capsys):
    out, folder = copied(complete, command[0], tmp_path)
    data = (folder / name).read_bytes()
    k = len(data) // 3
    broken = {"flip": data[:k] + bytes([data[k] ^ 64]) + data[k + 1 :], "half": data[:k], "empty": b"", "text": b"hi"}
    (folder / name).write_bytes(broken[damage])
    printed = refused(command, out, capsys)
    assert name in printed
    assert f"remove {folder}" in printed


def test_a_flipped_training_checkpoint_is_found(complete, tmp_path):
    """Every flip: weights, momentum, measurements and settings are all under the checksum."""
    out, folder = copied(complete, "figure7", tmp_path)
    path = folder / "checkpoint.safetensors"
    args = parser().parse_args([*NETWORK, "--out", str(out)])
    (settings,) = settings_of(network_figures.FAMILY, ("digits", "mlp"), args)
    run = training.Training(settings, options.run_location(args))
    assert run.load(path)
    data, accepted = path.read_bytes(), 0
    for broken in flips(data, 200):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"checkpoint.safetensors .*remove it to train from the start"):
            accepted += run.load(path)
    assert accepted == 0


def test_a_damaged_training_checkpoint_is_one_line(complete, tmp_path, capsys):
    out, folder = copied(complete, "figure7", tmp_path)
    (folder / "record.json").unlink()
    assert main([*NETWORK, "--out", str(out)]) == 0  # it resumes
    assert json.loads((folder / "record.json").read_text())["resumed"]
    out, folder = copied(complete, "figure7", tmp_path / "again")
    (folder / "record.json").unlink()
    path = folder / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    assert "checkpoint.safetensors is truncated" in refused(NETWORK, out, capsys)


@pytest.mark.parametrize("content", [b"\xff\xfe\n1", b"layer,nc1\n1,x\n", b"nonsense\n1\n", b"layer\n\0\n"])
def test_a_damaged_table_of_a_resumed_run_is_one_line(complete, tmp_path, capsys, content):
    out, folder = copied(complete, "figure6", tmp_path)
    (folder / "record.json").unlink()
    (folder / "layers.csv").write_bytes(content)
    assert (folder / "checkpoint" / "manifest.json").exists()
    assert "layers.csv is damaged" in refused(DEEP, out, capsys)


@pytest.mark.parametrize("command", [DEEP, NETWORK, ["demo", *DEEP[3:]]], ids=lambda command: command[0])
def test_folders_that_cannot_be_written_to(command, tmp_path, capsys, monkeypatch):
    """The refusal comes before anything is computed."""
    monkeypatch.setattr(runs, "_compute", lambda *_: 1 / 0)
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "deep" / "er"):
        assert f"--out must be a folder, but {file} is a file" in refused(command, out, capsys)
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: (_ for _ in ()).throw(PermissionError(13, "denied")))
    assert f"{tmp_path}: denied; --out must be a folder to write to" in refused(command, tmp_path, capsys)
    assert file.read_text() == "mine"


@pytest.mark.parametrize("command", [DEEP, NETWORK], ids=lambda command: command[0])
@pytest.mark.parametrize("step", range(0, 12, 3))
def test_a_full_disk_is_one_line_and_the_run_resumes(complete, command, step, tmp_path, capsys, monkeypatch):
    plain, seen = os.fsync, []

    def full(descriptor):
        seen.append(1)
        if len(seen) > step:
            raise OSError(28, "No space left on device")
        plain(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        printed = refused(command, tmp_path, capsys)
    assert printed.endswith(": No space left on device")
    assert str(tmp_path) in printed
    assert not list(tmp_path.rglob("*.tmp"))
    assert main([*command, "--out", str(tmp_path)]) == 0
    name = f"{command[0]}.csv"
    expected = (complete[command[0]] / name).read_bytes()
    assert (tmp_path / name).read_bytes() == expected


def test_files_that_may_not_grow(tmp_path):
    """A limit of the system on the size of files, in a process of its own."""
    code = f"""
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
sys.argv[1:] = {[*DEEP, "--out", str(tmp_path)]}
runpy.run_module("reproduce", run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MPLCONFIGDIR": str(tmp_path / "mpl")},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "File too large" in done.stderr


def test_output_that_takes_no_more(tmp_path):
    """A full or closed standard output is one line or none, and no traceback."""
    if not Path("/dev/full").exists():
        pytest.skip("needs Linux")
    command = [sys.executable, "-m", "reproduce", "theory"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment
        )
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["python -m reproduce: No space left on device"]


# ---- What results tell


def texts(value):
    """Every text in a JSON value."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)
    elif isinstance(value, str):
        yield value


def test_results_name_no_folder_of_this_machine(tmp_path, monkeypatch):
    data = tmp_path / "private" / "mine.npz"
    data.parent.mkdir()
    X = RNG.integers(0, 256, (30, 9), dtype=np.uint8)
    np.savez(data, x_train=X, y_train=np.arange(30) % 3, x_test=X, y_test=np.arange(30) % 3)
    out = tmp_path / "results"
    common = ["--dataset", str(data), "--dataset", "svhn", "--data-root", str(tmp_path / "private")]
    for command in (["figure6", "--depth", "1", "--width", "4"], ["figure7", *NETWORK[5:]]):
        assert main([*command, *common, "--n", "20", "--out", str(out)]) == 0
    found = list(out.rglob("*.json"))
    assert len(found) == 6
    for path in found:
        assert [text for text in texts(json.loads(path.read_text())) if str(tmp_path) in text] == [], path
    about = json.loads((out / "figure6.json").read_text())
    assert about["runs"][0]["settings"]["dataset"] == "mine.npz"
    assert about["runs"][0]["folder"].startswith("runs/mine-relu-")
    assert about["missing"][0].startswith("svhn needs intact files train_32x32.mat in the data root")


@pytest.mark.parametrize("command", ["figure3", "conv_rfm", "eigenvectors", "nfa_table"])
def test_what_is_wrong_with_the_data_is_said_in_options(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([command, "--dataset", "mnist", "--n", "50", "--data-root", str(tmp_path)]) == 2
    assert "put them there or pass --download" in capsys.readouterr().err
    assert main([command, "--dataset", "minst", "--n", "50"]) == 2
    assert "--dataset must be one of" in capsys.readouterr().err
