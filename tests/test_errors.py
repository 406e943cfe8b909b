"""Warnings point at the user's own line, from wherever the library was called."""

from __future__ import annotations

import inspect
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fastagop


@pytest.fixture(autouse=True)
def _allowed():
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield


def alone() -> tuple[torch.Tensor, torch.Tensor]:
    """Points on which the gram form loses digits and on which no factorisation is exact."""
    X = torch.zeros(60, 3, dtype=torch.float64)
    X[:, 0] = torch.linspace(0, 1e-3, 60, dtype=torch.float64)
    return X, torch.randn(60, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def solved() -> int:
    X, Y = alone()
    fastagop.solve(fastagop.Gaussian(5.0), X, Y)
    return inspect.currentframe().f_lineno - 1


def fitted() -> int:
    X, Y = alone()
    fastagop.RFMRegressor(fastagop.Gaussian(5.0), iterations=1, ridge=0.0, dtype="float64").fit(X, Y[:, 0])
    return inspect.currentframe().f_lineno - 1


def deep() -> int:
    X, Y = alone()
    model = fastagop.DeepRFMRegressor(fastagop.Gaussian(5.0), depth=1, width=8, random_state=0, dtype="float64")
    model.fit(X + 1, Y[:, 0])
    return inspect.currentframe().f_lineno - 1


@pytest.mark.parametrize("call", [solved, fitted, deep])
@pytest.mark.parametrize("thread", [False, True])
def test_the_line_of_the_call(call, thread):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if thread:
            with ThreadPoolExecutor(1) as pool:
                line = pool.submit(lambda: call()).result()  # noqa: PLW0108 (a line of the user in the thread)
        else:
            line = call()
    assert caught
    assert {(warning.filename, warning.lineno) for warning in caught} == {(__file__, line)}


def test_a_method_given_to_a_thread_has_no_line_and_warns_all_the_same():
    X, Y = alone()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        worker = threading.Thread(target=fastagop.solve, args=(fastagop.Gaussian(5.0), X, Y))
        worker.start()
        worker.join()
    assert [w.filename for w in caught] == [threading.__file__]


def test_a_script_is_named(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import torch, fastagop\n"
        "X = torch.linspace(0, 1e-3, 60, dtype=torch.float64)[:, None]\n"
        "Y = torch.sin(1e6 * X)\n"
        "fastagop.solve(fastagop.Gaussian(5.0), X, Y)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert f"{script}:4: NumericalWarning" in done.stderr


X, LABELS = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3
KERNEL = fastagop.Laplace(2.0)
FIRST_MISTAKES = {
    "kernel and X the other way round": (
        lambda: fastagop.agop(X, X, KERNEL),
        TypeError,
        r"kernel must be a fastagop kernel such as fastagop.Laplace\(2.0\), got Tensor of shape \(40, 3\)",
    ),
    "the class of a kernel": (
        lambda: fastagop.kernel_matrix(fastagop.Matern52, X),
        TypeError,
        r"got the class; use Matern52\(...\) with its parameters",
    ),
    "labels for targets": (
        lambda: fastagop.solve(KERNEL, X, LABELS),
        ValueError,
        r"for labels use .*one_hot\(Y.long\(\)\)",
    ),
    "a tensor for a word": (
        lambda: fastagop.agop(KERNEL, X, X, method=torch.ones(900)),
        ValueError,
        r"method must be one of .*, got Tensor of shape \(900,\)",
    ),
    "a DataFrame": (
        lambda: fastagop.solve(KERNEL, pytest.importorskip("pandas").DataFrame(X.numpy()), X),
        TypeError,
        r"got DataFrame; use torch.as_tensor\(X.to_numpy\(\)\)",
    ),
    "labels for layers": (
        lambda: fastagop.network.nfa_correlation(torch.nn.Linear(3, 2), X, LABELS),
        TypeError,
        r"layers must be names .*, got Tensor of shape \(40,\)",
    ),
    "an array for a network": (
        lambda: fastagop.network.agop(torch.nn.Linear(3, 2), X.numpy()),
        TypeError,
        r"got ndarray; use torch.as_tensor\(X\)",
    ),
    "images for a measure": (
        lambda: fastagop.collapse.nc1(X[:, :, None], LABELS),
        ValueError,
        r"got shape \(40, 3, 1\); X.reshape\(len\(X\), -1\) makes it one",
    ),
    "a list of stages": (
        lambda: fastagop.collapse.of_stages([X], LABELS),
        TypeError,
        r"stages must be a dictionary \{name: features\}, got an object of the class list",
    ),
    "an estimator for a matrix": (
        lambda: fastagop.spectrum(fastagop.RFMClassifier()),
        TypeError,
        "M must be a torch.Tensor, got RFMClassifier$",
    ),
    "the activations of one layer": (
        lambda: fastagop.probes.fit(X, LABELS),
        ValueError,
        r"got \(40, 3\); \[activations\] is a single layer",
    ),
    "an array for a module": (
        lambda: fastagop.DeepRFMRegressor(depth=1, width=4, ridge=1.0).fit(X, X[:, 0]).to_module()(X.numpy()),
        TypeError,
        r"x must be a torch.Tensor, got ndarray; use torch.as_tensor\(x\)",
    ),
    "labels that are no numbers": (
        lambda: fastagop.collapse.nc1(X, LABELS.numpy().astype(str)),
        TypeError,
        r"np.unique\(y, return_inverse=True\)\[1\]",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), FIRST_MISTAKES.values(), ids=FIRST_MISTAKES)
def test_first_mistakes_are_told_in_a_few_lines(call, error, message):
    """What was given is said by its kind and size where it is long, and the remedy works on what was given."""
    with pytest.raises(error, match=message) as caught:
        call()
    assert len(str(caught.value)) < 400
