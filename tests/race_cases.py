"""Processes that want the same files at the same moment: run by test_locks.py, or alone for more of them.

    python tests/race_cases.py pairs 30       two fits at once on one checkpoint folder, thirty times
    python tests/race_cases.py loads 200      that many loads of one path, to which two processes keep saving
    python tests/race_cases.py stopped        a fit whose folder is held by a stopped process

Each fit runs in a forked child; the parent computes nothing, since a fork after that may hang.
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
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import fastagop
from fastagop import DeepRFMClassifier
from fastagop.locks import FolderInUse

DEPTH = 3
DONE, REFUSED, CRASHED = 0, 3, 1


def child(work: Callable[[], object]) -> int:
    """Run something in a child process: REFUSED where a folder's holder is named, CRASHED after any other error."""
    pid = os.fork()
    if pid == 0:
        status = CRASHED
        try:
            work()
            status = DONE
        except FolderInUse as refusal:
            status = REFUSED if "in use by process " in str(refusal) and "since" in str(refusal) else CRASHED
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
        finally:
            os._exit(status)
    return pid


def status(pid: int) -> int:
    """A child's exit code; what a signal ended counts as crashed."""
    _, found = os.waitpid(pid, 0)
    return os.WEXITSTATUS(found) if os.WIFEXITED(found) else CRASHED


def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(80, 12)).astype(np.float32), np.arange(80) % 4


def fit(folder: Path | None, report: Path | None = None, callbacks=()) -> DeepRFMClassifier:
    """A small fit; writes a SHA-256 of what it found."""
    X, y = data()
    settings = {"depth": DEPTH, "width": 48, "random_state": 0, "callbacks": callbacks}
    model = DeepRFMClassifier(checkpoint_dir=folder, **settings).fit(X, y)
    digest = hashlib.sha256()
    for value in (model.decision_function(X), *model.agops_, *model.alphas_):
        digest.update(np.ascontiguousarray(value))
    if report is not None:
        report.write_text(digest.hexdigest())
    return model


def pairs(count: int) -> str:
    """Two fits at once on one folder: one may be refused, neither crashes, and the folder resumes to the same bits."""
    base = Path(tempfile.mkdtemp())
    if status(child(lambda: fit(None, base / "whole"))) != DONE:
        raise SystemExit("a fit without a checkpoint failed")
    whole, found = (base / "whole").read_text(), []
    for number in range(count):
        folder = base / f"{number}"
        first = child(lambda folder=folder: fit(folder))
        time.sleep(random.choice((0, 0, random.uniform(0, 0.3))))
        second = child(lambda folder=folder: fit(folder))
        codes = sorted((status(first), status(second)))
        if CRASHED in codes or codes == [REFUSED, REFUSED]:
            raise SystemExit(f"pair {number} ended with {codes}")
        found.append(REFUSED in codes)
        again = child(lambda folder=folder: fit(folder, base / "again"))
        if status(again) != DONE or (base / "again").read_text() != whole:
            raise SystemExit(f"the folder of pair {number} does not resume to the same bits")
        left = [path.name for path in folder.iterdir() if not path.name.startswith(("layer-", "features-", "manifest"))]
        if left:
            raise SystemExit(f"pair {number} left {left}")
    shutil.rmtree(base)
    return f"{count} pairs, {sum(found)} with a refusal, no crash, all resumed to the same bits"


def keep_saving(path: Path, seed: int) -> None:
    """Save one model over and over until the folder is gone."""
    X, y = data()
    model = DeepRFMClassifier(depth=1, width=16 + 16 * seed, random_state=seed).fit(X, y)
    while path.parent.exists():
        try:
            model.save(path)
        except FileNotFoundError:
            return


def keep_loading(path: Path, count: int) -> None:
    """Load a path that two processes write to."""
    X, _ = data()
    while not path.exists():
        time.sleep(0.01)
    widths = set()
    for _ in range(count):
        model = fastagop.load(path)
        assert np.isfinite(model.decision_function(X[:2])).all()
        widths.add(model.width)
    print(f"{count} loads, none broken, from {len(widths)} writers", flush=True)


def loads(count: int) -> None:
    """Two writers and one reader of one path; nothing is left beside it."""
    folder = Path(tempfile.mkdtemp())
    path = folder / "model.safetensors"
    writers = [child(lambda seed=seed: keep_saving(path, seed)) for seed in (0, 1)]
    code = status(child(lambda: keep_loading(path, count)))
    for pid in writers:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if code != DONE:
        raise SystemExit("a load failed")
    again = child(lambda: fit(None).save(path))  # the next writer clears up after the killed ones
    if status(again) != DONE or [entry.name for entry in folder.iterdir()] != [path.name]:
        raise SystemExit(f"left beside the file: {sorted(entry.name for entry in folder.iterdir())}")
    shutil.rmtree(folder)


def stopped() -> str:
    """A holder that is stopped is named at once, and its folder is taken over once it was killed."""
    folder = Path(tempfile.mkdtemp())
    holder = child(lambda: fit(folder / "run", callbacks=[lambda event: os.kill(os.getpid(), signal.SIGSTOP)]))
    os.waitpid(holder, os.WUNTRACED)
    second = child(lambda: fit(folder / "run", folder / "digest"))
    deadline = time.monotonic() + 120
    while not (ended := os.waitpid(second, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(second, signal.SIGKILL)
            raise SystemExit("a fit waits for a stopped process")
        time.sleep(0.01)
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    if os.WEXITSTATUS(ended[1]) != REFUSED:
        raise SystemExit(f"a fit beside a stopped one ended with {os.WEXITSTATUS(ended[1])}")
    if status(child(lambda: fit(folder / "run", folder / "digest"))) != DONE:
        raise SystemExit("a killed holder's folder was not taken over")
    shutil.rmtree(folder)
    return "a stopped holder is named, a killed one's folder taken over"


def main() -> None:
    """Run the case named on the command line."""
    torch.set_num_threads(1)
    if sys.argv[1] == "loads":
        loads(int(sys.argv[2]))
    else:
        print(pairs(int(sys.argv[2])) if sys.argv[1] == "pairs" else stopped())


if __name__ == "__main__":
    main()
