"""What was measured on this device decides, and nothing is measured unless asked for."""

import json
import os

import pytest
import torch
from fastagop.kernels import calibration
from fastagop.kernels.calibration import Measured
from fastagop.kernels.triton_backend import launch_config

import fastagop
from bench import calibrate
from fastagop import Laplace

CPU = torch.device("cpu")
ABOUT = {"date": "2026-01-01"}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTAGOP_CACHE", str(tmp_path / "deep" / "cache"))
    return tmp_path / "deep" / "cache"


def problem():
    return torch.randn(60, 5), torch.randn(60, 8)


def test_nothing_measured(cache):
    text = fastagop.explain("agop", Laplace(2.0), *problem())
    assert "default rates; `python -m bench calibrate` measures this device's" in text
    fastagop.agop(Laplace(2.0), *problem())
    assert not cache.exists()


@pytest.mark.parametrize("fast", ["gradient", "gram"])
def test_measured_rates_choose_the_form(cache, fast):
    slow = {"gradient": "gram", "gram": "gradient"}[fast]
    rates = {
        f"{form} {word}": 1e15 if form == fast else 1.0 for form in (fast, slow) for word in ("float32", "float64")
    }
    calibration.save(CPU, Measured({}, rates, ABOUT))
    text = fastagop.explain("agop", Laplace(2.0), *problem())
    assert f"method {fast}" in text
    assert "rates measured on this device, 2026-01-01" in text


def test_round_trip(cache):
    measured = Measured({"matrix fp16x3": (64, 32, 32, 4, 1)}, {"gram float32": 1.5e11}, ABOUT)
    file = calibration.save(CPU, measured)
    assert calibration.measured(CPU) == measured
    assert [p.name for p in cache.iterdir()] == [file.name]  # no draft is left


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"configs": {}}', '{"configs": {"matrix tf32": [1, 2]}, "rates": {}, "about": {}}',
     '{"configs": {}, "rates": {"gram float32": -1}, "about": {}}', '{"configs": 3, "rates": {}, "about": {}}'],
)  # fmt: skip
def test_a_damaged_file_is_warned_of_once_and_not_used(cache, text):
    """The file is optional: what needs none of it goes on, and says why it knows nothing of this device."""
    file = calibration.save(CPU, Measured())
    file.write_text(text)
    with pytest.warns(UserWarning, match=r"delete it or calibrate again") as said:
        fastagop.agop(Laplace(2.0), *problem())
    assert "default rates" in fastagop.explain("agop", Laplace(2.0), *problem())
    assert [str(file) in str(w.message) for w in said] == [True]
    assert said[0].filename == __file__


def forbidden(*_, **__):
    raise PermissionError(13, "Permission denied")


def test_a_file_that_cannot_be_read_is_as_good_as_none(cache, monkeypatch):
    calibration.save(CPU, Measured({}, {"gram float32": 1e15}, ABOUT))
    monkeypatch.setattr(calibration, "open", forbidden, raising=False)
    assert calibration.measured(CPU) == Measured()


@pytest.mark.parametrize(
    "value", ["/nowhere/at/all", "/dev/null", "/dev/null/x", "/proc/1/x", "x" * 5000, "a\nb", "~", "relative"]
)
@pytest.mark.parametrize("variable", ["FASTAGOP_CACHE", "XDG_CACHE_HOME", "HOME"])
def test_folders_that_cannot_be(monkeypatch, tmp_path, variable, value):
    monkeypatch.chdir(tmp_path)
    for name in ("FASTAGOP_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    assert calibration.measured(CPU) == Measured()
    assert list(tmp_path.iterdir()) == []


def test_no_home_at_all(monkeypatch):
    """A user id without an entry in the system's list, as containers have them."""
    for name in ("FASTAGOP_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda _: {}["unknown"])
    fastagop.agop(Laplace(2.0), *problem())
    assert "default rates" in fastagop.explain("agop", Laplace(2.0), *problem())
    fastagop.solve(Laplace(2.0), *problem())
    with pytest.raises(OSError, match="no home directory; set FASTAGOP_CACHE"):
        calibrate.main(CPU, None, 1, 50)


def test_a_home_that_cannot_be_searched(monkeypatch):
    for name in ("FASTAGOP_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/locked")
    for name in ("stat", "lstat", "open", "listdir", "access"):
        plain = getattr(os, name)
        refuse = lambda path, *args, plain=plain, **kw: (  # noqa: E731
            forbidden() if str(path).startswith("/locked") else plain(path, *args, **kw)
        )
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(calibration, "open", forbidden, raising=False)
    fastagop.agop(Laplace(2.0), *problem())
    fastagop.explain("solve", Laplace(2.0), *problem())


def test_measured_configurations_are_launched(cache, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    table = launch_config.config("matrix", "tf32", CPU)
    assert table == launch_config.TABLE[9]["matrix", "tf32"]
    calibration.save(CPU, Measured({"matrix tf32": (64, 32, 32, 4, 1)}, {}, ABOUT))
    assert launch_config.config("matrix", "tf32", CPU) == launch_config.Config(64, 32, 32, 4, 1)
    assert launch_config.config("gram", "tf32", CPU) == launch_config.TABLE[9]["gram", "tf32"]
    with launch_config.trial("gram", "tf32", table):
        assert launch_config.config("gram", "tf32", CPU) == table
        assert launch_config.config("matrix", "tf32", CPU) == launch_config.Config(64, 32, 32, 4, 1)


def test_calibrating(cache, tmp_path):
    out = tmp_path / "rates.json"
    calibrate.main(CPU, out, 1, 100)
    rates = calibration.measured(CPU).rates
    assert set(rates) == {f"{form} {word}" for form in ("gradient", "gram") for word in ("float32", "float64")}
    assert json.loads(out.read_text())["rates"] == rates
    assert all(rate > 0 for rate in rates.values())
