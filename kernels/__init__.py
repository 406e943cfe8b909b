"""The operations that touch all pairs of points, one backend a module.

This folder is installed as ``fastagop.kernels`` and only so: a top-level package called ``kernels`` belongs to
another project. The room is flat and imports nothing from the packages above it:

``radial``        kernel profiles: the one place where a kernel's formula lives
``distance``      squared distances that stay accurate when classes collapse
``torch_blocks``  torch backend, any device: kernel matrix, product, gradients
``torch_agop``    torch backend: the AGOP, its gradient form and the choice between the forms
``torch_gram``    its gram form and the guard over its digits; ``smooth`` what it need not square
``*_triton``      Triton backend, CUDA: device profiles, split operands, kernel matrix, product, AGOP
``triton_ops``    its launches; ``_config`` their configurations by chip
``keops_ops``     KeOps backend: product, gradients, AGOP; ``radial_keops`` the profiles in its language
``operations``    the public functions that check their input and pick a backend
``errors``        the exception, the warning, and the line a warning points at
``reference``     plain float64 truth for tests; shares no code with the others
"""

if __name__ != "fastagop.kernels":
    raise ImportError(
        f"the fastagop kernels were imported as {__name__!r}: install the project (pip install -e .) and "
        "import fastagop.kernels, or start python outside the repository's root"
    )
