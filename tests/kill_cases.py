"""Fits that are killed, resumed and compared: run by test_checkpoint.py, or alone for more of them.

    LAYERS=12 python tests/kill_cases.py random 20    SIGKILL at a random moment, twenty times
    python tests/kill_cases.py every                  SIGKILL before every step that touches the disk

Each fit runs in a forked child, so that killing one costs no new start of Python.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from fastagop import DeepRFMClassifier

DEPTH = int(os.environ.get("LAYERS", "2"))
_STEPS = ("fsync", "replace", "unlink")  # what a write to the disk is made of


def fit(folder: Path | None) -> str:
    """A small fit; SHA-256 of everything it found."""
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(120, 24)).astype(np.float32), np.arange(120) % 4
    model = DeepRFMClassifier(depth=DEPTH, width=128, random_state=0, checkpoint_dir=folder).fit(X, y)
    digest = hashlib.sha256()
    for value in (model.transform(X), model.decision_function(X), *model.agops_, *model.alphas_):
        digest.update(np.ascontiguousarray(value))
    digest.update(repr([(record.nc1, record.solution.residual) for record in model.layers_]).encode())
    return digest.hexdigest()


def child(folder: Path, step: int | None = None) -> int:
    """Start a fit in a child process; with a step, it kills itself there."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if step is not None:
                _arm(step)
            (folder / "digest").write_text(fit(folder / "checkpoint"))
            status = 0
        finally:
            os._exit(status)
    return pid


def _arm(step: int) -> None:
    """Die instead of taking the step-th step on the disk."""
    seen = 0

    def guarded(plain):
        def call(*args, **kwargs):
            nonlocal seen
            seen += 1
            if seen > step:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*args, **kwargs)

        return call

    for name in _STEPS:
        setattr(os, name, guarded(getattr(os, name)))


def killed(pid: int) -> bool:
    """Wait for a child; whether it was killed. Anything but that and success is an error."""
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return True
    if os.WEXITSTATUS(status):
        raise SystemExit(f"a fit ended with exit status {os.WEXITSTATUS(status)}")
    return False


def resumed(folder: Path, whole: str) -> None:
    """Fit to the end and compare with the uninterrupted fit."""
    killed(child(folder))
    if (folder / "digest").read_text() != whole:
        raise SystemExit("a resumed fit differs from an uninterrupted one")
    left = sorted(path.name for path in (folder / "checkpoint").iterdir())
    expected = [f"features-{DEPTH - 1:03d}.safetensors", *(f"layer-{i:03d}.safetensors" for i in range(DEPTH))]
    if left != [*expected, "manifest.json"]:
        raise SystemExit(f"a resumed fit left {left}")


def at_random(count: int, whole: str, seconds: float) -> str:
    """Kill at random moments, also while resuming, and resume."""
    kills, layers = 0, []
    while kills < count:
        folder = Path(tempfile.mkdtemp())
        for _ in range(random.choice((1, 1, 2))):
            pid = child(folder)
            time.sleep(random.uniform(0, seconds))
            os.kill(pid, signal.SIGKILL)
            if killed(pid):
                kills += 1
                layers.append(len(list((folder / "checkpoint").glob("layer-*.safetensors"))))
        resumed(folder, whole)
        shutil.rmtree(folder)
    return f"{kills} kills with {sorted(layers)} layers on disk, all resumed to the same bits"


def at_every_step(whole: str) -> str:
    """Kill before the first step, then before the second, and so on until a fit survives."""
    step = 0
    while True:
        folder = Path(tempfile.mkdtemp())
        died = killed(child(folder, step))
        resumed(folder, whole)
        shutil.rmtree(folder)
        if not died:
            return f"{step} kills, all resumed to the same bits"
        step += 1


def main() -> None:
    """Run the cases named on the command line."""
    torch.set_num_threads(1)
    pid = child(warm := Path(tempfile.mkdtemp()))  # the parent computes nothing: a fork after that may hang
    start = time.perf_counter()
    killed(pid)
    seconds, whole = time.perf_counter() - start, (warm / "digest").read_text()
    shutil.rmtree(warm)
    print(at_random(int(sys.argv[2]), whole, seconds) if sys.argv[1] == "random" else at_every_step(whole))


if __name__ == "__main__":
    main()
