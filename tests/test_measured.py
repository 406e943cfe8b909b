"""What was measured on this device decides, and nothing is measured unless asked for."""

import importlib.metadata
import json
import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

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
    limited = launch_config.Config(128, 64, 32, 8, 3, registers=128)
    calibration.save(CPU, Measured({"gram tf32": limited.numbers}, {}, ABOUT))
    assert launch_config.config("gram", "tf32", CPU) == limited
    assert launch_config.config("gram", "tf32", CPU).launch == {"num_warps": 8, "num_stages": 3, "maxnreg": 128}
    calibration.save(CPU, Measured({"matrix tf32": (64, 32, 32, 4, 1)}, {}, ABOUT))
    with launch_config.trial("gram", "tf32", table):
        assert launch_config.config("gram", "tf32", CPU) == table
        assert launch_config.config("matrix", "tf32", CPU) == launch_config.Config(64, 32, 32, 4, 1)


@pytest.mark.parametrize(("capability", "table"), [((8, 9), 8), ((9, 0), 9), ((10, 0), 9), ((12, 0), 8)])
def test_a_chip_gets_launches_that_fit_it(cache, capability, table, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    entry = "matrix", "fp16x3"
    assert launch_config.config(*entry, CPU) == launch_config.TABLE[table][entry]


def test_calibrating(cache, tmp_path):
    out = tmp_path / "rates.json"
    calibrate.main(CPU, out, 1, 100)
    rates = calibration.measured(CPU).rates
    assert set(rates) == {f"{form} {word}" for form in ("gradient", "gram") for word in ("float32", "float64")}
    assert json.loads(out.read_text())["rates"] == rates
    assert all(rate > 0 for rate in rates.values())


@pytest.mark.parametrize(
    ("rates", "taken"),
    [(0.0, False), (1e-300, False), (0.9, False), (1.0, True), (1e30, True), (1e31, False), (float("inf"), False)],
)
def test_rates_are_of_a_size_that_can_be_measured(cache, rates, taken):
    file = calibration.save(CPU, Measured({}, {"gram float32": 1.0}, ABOUT))
    file.write_text(json.dumps({"configs": {}, "rates": {"gram float32": rates}, "about": {}}))
    calibration._read.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert (calibration.measured(CPU).rates == {"gram float32": rates}) == taken
    assert len(said) == (not taken)


@pytest.mark.parametrize(
    ("config", "taken"),
    [([1] * 5, True), ([1] * 6, True), ([1, 1, 1, 1, 0], False), ([1] * 4, False), ([1] * 7, False)],
)
def test_configurations_are_positive_numbers(cache, config, taken):
    file = calibration.save(CPU, Measured())
    file.write_text(json.dumps({"configs": {"matrix tf32": config}, "rates": {}, "about": {}}))
    calibration._read.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert (calibration.measured(CPU).configs == {"matrix tf32": tuple(config)}) == taken
    assert len(said) == (not taken)


def test_a_large_file_is_none_of_ours(cache):
    """What calibration writes has a few thousand bytes: of a megabyte only the start is read."""
    file = calibration.save(CPU, Measured())
    file.write_text(json.dumps({"configs": {}, "rates": {}, "about": {"note": "x" * 2**20}}))
    calibration._read.cache_clear()
    with pytest.warns(UserWarning, match="delete it or calibrate again"):
        assert calibration.measured(CPU) == Measured()
    file.write_text(json.dumps({"configs": {}, "rates": {}, "about": {"note": "x" * 10**6}}))
    calibration._read.cache_clear()
    assert len(calibration.measured(CPU).about["note"]) == 10**6


def test_the_default_rates_are_those_measured_in_the_bench(cache):
    """Two digits of them."""
    stored = json.loads((Path(__file__).parents[1] / "bench" / "results" / "rates_cpu.json").read_text())["rates"]
    for key, value in stored.items():
        assert calibration.rate(*key.split(), CPU) == pytest.approx(value, rel=0.02)
    assert calibration.rate("gram", "keops", CPU) == calibration.rate("gradient", "float32", CPU)


@pytest.mark.parametrize(("capability", "full"), [((8, 0), 19e12), ((9, 0), 60e12), ((9, 5), 60e12)])
def test_rates_of_a_gpu_go_by_its_generation(capability, full, monkeypatch):
    """The vendors' figures of full products; coarser ones are faster, bf16x3 the least so. More in test_cuda_plans."""
    device = torch.device("cuda")
    monkeypatch.setattr(calibration, "measured", lambda device: Measured())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    rates = {word: calibration.rate("gram", word, device) for word in ("float64", "bf16x3", "fp16x3", "tf32")}
    assert calibration.rate("gradient", "float32", device) == rates["float64"] == full
    assert list(rates.values()) == sorted(rates.values())
    assert rates["tf32"] < 10 * full


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_seconds_are_operations_at_their_rate_and_pairs_beside(kind, monkeypatch):
    device = torch.device(kind)
    monkeypatch.setattr(calibration, "rate", lambda form, products, device: {"float32": 1e10, "float64": 1e9}[products])
    for word, slower in (("float32", 1.0), ("float64", 10.0)):
        assert calibration.seconds(1e12, 0, device, "gram", word) == 100 * slower
        pairs = calibration.seconds(0, 1e9, device, "gram", word)
        assert {"cpu": 1, "cuda": 0.01}[kind] < pairs < {"cpu": 10, "cuda": 0.1}[kind]
        assert calibration.seconds(1e12, 1e9, device, "gram", word) == 100 * slower + pairs
    single, double = (calibration.seconds(0, 1e9, device, "gram", f"float{bits}") for bits in (32, 64))
    assert 1.5 < double / single < 2.5
    assert calibration.seconds(6e12, 1e9, device, "gram", "keops") == {"cpu": 1000, "cuda": 6}[kind]


def test_the_file_is_named_after_the_chip(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTAGOP_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibration, "cpuinfo", lambda: {"model name": "Some (R) Chip 9.5 @ 2 GHz!"})
    assert calibration.path(CPU) == tmp_path / "fastagop" / "some-r-chip-9.5-2-ghz.json"
    monkeypatch.setattr(calibration, "cpuinfo", dict)
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "riscv")
    assert calibration.path(CPU).name == "riscv.json"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Chip X1")
    monkeypatch.setattr("importlib.metadata.version", lambda package: "3.1" if package == "triton" else "0")
    assert calibration.path(torch.device("cuda")).name == "chip-x1-triton-3.1.json"


def test_triton_by_another_distributions_name(monkeypatch, tmp_path):
    """Nightly builds of torch bring "pytorch-triton", which is imported as triton all the same."""

    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", version)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.6.0+git9844da95"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Chip X1")
    monkeypatch.setenv("FASTAGOP_CACHE", str(tmp_path))
    assert launch_config.version.__wrapped__() == (3, 6)
    assert calibration.path(torch.device("cuda")) == tmp_path / "chip-x1-triton-3.6.0-git9844da95.json"
    monkeypatch.setitem(sys.modules, "triton", None)  # no import finds it
    with pytest.raises(importlib.metadata.PackageNotFoundError, match="triton"):
        calibration.triton_version()
