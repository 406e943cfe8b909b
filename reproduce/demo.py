"""The demo: neural collapse of scikit-learn's digits in 20 layers of Deep RFM, in seconds on a laptop."""

from __future__ import annotations

import argparse

from fastagop import commands
from reproduce import figures, options, plots, runs, settings
from reproduce.deep_rfm_figures import FAMILY, lesson


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the demo."""
    parser.add_argument("--n", type=commands.count, help="training points; default all 1437")
    parser.add_argument("--depth", type=commands.count, default=20, help="layers; default %(default)s")
    parser.add_argument("--width", type=commands.count, default=1024, help="random features; default %(default)s")
    options.add_location(parser, "out/demo", data=False)


def demo(args: argparse.Namespace) -> int:
    """Run, draw, and say what to look at."""
    plots.require()
    digits = settings.paper("digits", "relu", n=args.n, depth=args.depth, width=args.width, score=True)
    run = runs.run(FAMILY.procedure, digits, options.run_location(args))
    title = f"Deep RFM on {digits.n} handwritten digits"
    strips = FAMILY.draw("strips", [[run]], f"{title}: Gram matrices of $M_l^{{1/2}}X_l$")
    curves = FAMILY.draw("curves", [[run]], f"{title}: neural collapse")
    (strips_file,) = plots.save(strips, args.out / "gram", ["png"])
    (curves_file,) = plots.save(curves, args.out / "curves", ["png"])
    table, source = figures.record(FAMILY, [[run]], args.out / "numbers")
    print(
        f"\nwrote {strips_file}: cosines between points, layer by layer"
        f"\nwrote {curves_file}: NC1 and NC2 of each layer's input, after M^(1/2), and after the random features"
        f"\nwrote {table} (the numbers) and {source} (settings, versions, seconds)"
        f"\n{_lesson(run)}"
    )
    return 0


def _lesson(run: runs.Run) -> str:
    return (
        "What to see: M^(1/2) of the AGOP pulls each class towards one point, while random features do not. "
        f"{lesson(run.rows)}; the Gram matrix becomes blocks of 1 on a ground of -1/{run.record['classes'] - 1}.\n"
        "Next: `python -m reproduce figure3 --dataset digits`, or `python -m reproduce all --quick --download`, which "
        "makes every figure of the paper small"
    )
