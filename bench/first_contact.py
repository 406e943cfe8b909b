"""Ten minutes on a GPU as numbers: one process a part, one line a measurement, most valuable first.

``python -m bench first_contact --out DIR --seconds 560`` runs from a plain checkout where torch, Triton and NumPy are
all there is. A part that crashes, hangs or leaves its device unusable ends only its own process; the next one goes on
behind the case that did it. Lines go to DIR/first_contact.jsonl at once, and a second call with the same DIR measures
what is missing. ``--dry-run`` runs all parts on the CPU at tiny sizes, Triton in its interpreter: its lines say so.
``python -m bench gpu_report DIR`` makes tables of the lines.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import checkout, first_contact_lines
from bench.first_contact_lines import STOPPED, UNDER_WAY, WHOLE

# In order of worth: the share of the time that is left when a part's turn comes, beside those still to come. What one
# does not use goes to the others.
PARTS = {
    "ceilings": 35,
    "accuracy": 60,
    "deep_rfm": 110,
    "launches": 110,
    "blocks": 35,
    "near": 30,
    "solve": 60,
    "peers": 40,
    "graph": 15,
    "compile": 25,
    "ranks": 20,
    "tests": 40,
}
_SOFT = 0.85  # of a part's time after which no further case starts; then it is stopped at the end
_LEAST = 5.0  # seconds that are worth a part


class Worker:
    """A process that has imported what every part needs, and waits for its order."""

    code = "from bench import checkout; checkout.place(); from bench import first_contact_worker as w; w.main()"

    def __init__(self, dry: bool):
        environment = dict(os.environ)
        if dry:
            environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            [sys.executable, *(["-S"] if sys.flags.no_site else []), "-c", self.code],
            stdin=subprocess.PIPE,
            text=True,
            cwd=checkout.ROOT,
            env=environment,
            start_new_session=True,  # what a part starts ends with it
        )

    def run(self, order: Mapping[str, Any], limit: float) -> int | None:
        """The exit status of a part, or None after the limit; nothing of it is left in either case."""
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended already, and its status says how
                self.process.communicate(json.dumps(order), timeout=limit)
            return self.process.wait()
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.end()

    def end(self) -> None:
        """Kill it and all that it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def supervise(folder: Path, seconds: float, dry: bool, parts: Sequence[str], about: Mapping[str, Any]) -> list[str]:
    """Run parts in their order, each within its share; the names of those that are not complete."""
    end, waiting = time.monotonic() + seconds, None
    finished = {part for part, case in first_contact_lines.done(first_contact_lines.read(folder)) if case == WHOLE}
    todo = [part for part in PARTS if part in parts and part not in finished]
    try:
        for index, part in enumerate(todo):
            left = end - time.monotonic()
            if left < _LEAST:
                break
            limit = left * PARTS[part] / sum(PARTS[name] for name in todo[index:])
            stop = time.monotonic() + limit
            while (left := stop - time.monotonic()) > min(1.0, 0.1 * limit):
                worker, waiting = waiting or Worker(dry), None
                if index + 1 < len(todo):
                    waiting = Worker(dry)  # it imports meanwhile
                order = {"part": part, "folder": str(folder), "about": about, "seconds": left * _SOFT}
                if not _went_on(worker, order, left, folder):
                    break
    finally:
        if waiting is not None:
            waiting.end()
        (folder / UNDER_WAY).unlink(missing_ok=True)
    measured = first_contact_lines.done(first_contact_lines.read(folder))
    return [part for part in todo if (part, WHOLE) not in measured]


def _went_on(worker: Worker, order: Mapping[str, Any], limit: float, folder: Path) -> bool:
    """Run a part once; whether it should go on in another process, behind the case that ended this one."""
    under_way = folder / UNDER_WAY
    under_way.unlink(missing_ok=True)
    before = len(first_contact_lines.read(folder))
    status = worker.run(order, limit)
    if status == 0:
        return False
    case = under_way.read_text() if under_way.exists() else ""
    known = first_contact_lines.done(first_contact_lines.read(folder)[before:])
    if (order["part"], WHOLE) in known:
        return False
    if (order["part"], case) in known:  # its line is there; it may have failed, and the device with it
        return status is not None
    failure = f"{STOPPED}: the part's {limit:.0f} s were over"
    if status is not None:
        failure = f"the process ended {_status(status)}"
    where = case or "start"
    row = first_contact_lines.line(order["about"], order["part"], where, failure=failure)
    first_contact_lines.append(folder, row)
    print(f"{order['part']:14} {where:58.58} {failure}", flush=True)
    return bool(case) and status is not None


def _status(status: int) -> str:
    if status < 0:
        return f"by signal {-status} ({signal.Signals(-status).name})"
    return f"with exit status {status}"


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m bench first_contact",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--out", type=Path, required=True, help="folder of the lines; an earlier one is gone on with")
    made.add_argument("--seconds", type=float, help="all of it, at most (default 560; 3600 of a dry run)")
    made.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    made.add_argument("--dry-run", action="store_true", help="on the CPU at tiny sizes, Triton in its interpreter")
    return made


def command(argv: Sequence[str]) -> int:
    """0 where all parts are complete, 1 where some are not, 2 with a line on stderr for what the caller can change."""
    made = _parser()
    given = made.parse_args(argv)
    given.seconds = (3600.0 if given.dry_run else 560.0) if given.seconds is None else given.seconds
    if not 0 < given.seconds < 1e6:
        made.error(f"--seconds must be a positive number of seconds, got {given.seconds}")
    from fastagop import commands  # imports torch

    return commands.run("python -m bench first_contact", lambda: _run(given))


def _run(given: argparse.Namespace) -> int:
    import torch

    from fastagop import commands

    started = time.monotonic()
    if not given.dry_run and not torch.cuda.is_available():
        raise ValueError("torch sees no CUDA device here; --dry-run runs every part on the CPU")
    commands.prepare(given.out, "--out")
    folder, about = given.out.resolve(), first_contact_lines.origin(given.dry_run)
    first_contact_lines.check(folder, about)
    print(f"{about['chip']}; {about['versions']}; sources {about['sources']}", flush=True)
    seconds = given.seconds - (time.monotonic() - started)
    missing = supervise(folder, seconds, given.dry_run, given.only or list(PARTS), about)
    rows = first_contact_lines.read(folder)
    failed = sum(row["failure"] is not None for row in rows)
    print(f"{len(rows)} lines in {folder / first_contact_lines.FILE}, {failed} of them failures", flush=True)
    if missing:
        print(f"not complete: {', '.join(missing)}; the same command goes on with them", flush=True)
    return int(bool(missing))
