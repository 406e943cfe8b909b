"""The operations that touch all pairs of points, one backend a folder.

This folder is installed as ``fastagop.kernels`` and only so: a top-level package called ``kernels`` belongs to
another project. It imports nothing from the packages above it; docs/pages/architecture.md has the tree.
"""

if __name__ != "fastagop.kernels":
    raise ImportError(
        f"the fastagop kernels were imported as {__name__!r}: install the project (pip install -e .) and "
        "import fastagop.kernels, or start python outside the repository's root"
    )
