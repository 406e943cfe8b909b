"""Draw the pictures of the pages: run the blocks of a page in docs/pages/pictures, where they save them.

python docs/draw.py measures
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

PAGES = Path(__file__).resolve().parent / "pages"


def main(page: str) -> None:
    """Run a page's Python blocks in their order."""
    text = (PAGES / f"{page}.md").read_text()
    (PAGES / "pictures").mkdir(exist_ok=True)
    os.chdir(PAGES / "pictures")
    names: dict = {"__name__": "__main__"}
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE), 1):
        exec(compile(code, f"{page}.md, block {number}", "exec"), names)


if __name__ == "__main__":
    main(*sys.argv[1:])
