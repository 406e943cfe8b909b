"""The process of one part of a first contact: it imports, waits for its order, measures and ends."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import warnings
from pathlib import Path

from bench import first_contact_lines
from bench.first_contact_lines import WHOLE
from bench.first_contact_run import OutOfTime, Run, Unusable, sizes

# Where each part is: a function of a Run.
MODULES = {
    "ceilings": "first_contact_device",
    "accuracy": "first_contact_operations",
    "deep_rfm": "first_contact_layers",
    "launches": "first_contact_launches",
    "blocks": "first_contact_launches",
    "near": "first_contact_operations",
    "solve": "first_contact_layers",
    "peers": "first_contact_operations",
    "graph": "first_contact_around",
    "compile": "first_contact_around",
    "ranks": "first_contact_around",
    "tests": "first_contact_around",
}
UNUSABLE, CUT = 3, 0  # exit statuses: another process goes on; the part's time is over


def main() -> None:
    """Read one order from the standard input and obey it; an empty one ends the process."""
    text = sys.stdin.readline()
    status = obey(json.loads(text)) if text.strip() else 0
    sys.stdout.flush()
    os._exit(status)  # what torch takes down on its way out is time of the next part


def obey(order: dict) -> int:
    """Measure a part; 0 at its end or when its time is over, 3 where the device is unusable in this process."""
    warnings.simplefilter("ignore")
    folder, about, part = Path(order["folder"]), order["about"], order["part"]
    started, dry = time.monotonic(), about["dry_run"]
    done = first_contact_lines.done(first_contact_lines.read(folder))
    run = Run(part, folder, about, sizes(dry), dry, started + order["seconds"], done)
    try:
        getattr(importlib.import_module(f"bench.{MODULES[part]}"), part)(run)
    except OutOfTime:
        return CUT
    except Unusable as lost:
        print(f"{part:14} the device is unusable in this process ({lost}); another one goes on", flush=True)
        return UNUSABLE
    run.write(WHOLE, part_seconds=time.monotonic() - started, cpu_seconds=time.process_time())
    return 0
