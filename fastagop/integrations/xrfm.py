"""fastagop's kernels for xRFM: its kernel matrix, gradients and AGOP in place of xRFM's own.

    from fastagop.integrations.xrfm import FastKernel
    model = xrfm.RFM(kernel=FastKernel(fastagop.Laplace(10.0)), ...)  # was: kernel="laplace", bandwidth=10.0
    model = xrfm.xRFM(rfm_params={"model": {"kernel": FastKernel(fastagop.Laplace(10.0)), ...}, "fit": {...}})

Tested with xrfm 0.4.5.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from fastagop.kernels import checks
from fastagop.kernels.kernel_operator import KernelOperator
from fastagop.kernels.operations import agop, gradients, kernel_matrix
from fastagop.kernels.precision import matmul_precision
from fastagop.kernels.torch_backend.agop import Means

try:
    from xrfm.rfm_src.kernels import LaplaceKernel  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError("fastagop.integrations.xrfm needs xRFM; pip install 'xrfm>=0.4.5'") from error

_SAMPLE = 5000  # points whose distances adapt the bandwidth, as many as xRFM takes
_ROWS = 512
_BLOCK_BYTES = 2**24  # of float64 gradients that are held at once
_SHOWN = 16  # rows by which centers are known again
_CENTRED = 5e-7  # of what centring leaves of float32 gradients, the most that their rounding may be


class FastKernel(LaplaceKernel):
    """Any fastagop kernel as a kernel of xRFM.

    Same shapes and conventions as xRFM's: ``x`` (n, d) centers, ``z`` (m, d) points, ``coefs`` (f, n), ``mat`` M^(1/2)
    as (d, d), (d,) or None; AGOPs are sums over the points. It derives from xRFM's ``LaplaceKernel`` because xRFM gives
    that class its large batches. A pair at distance zero contributes no gradient, however small the others are.

    With ``bandwidth_mode="adaptive"`` several leaves, or models, may share one object: it knows each one's bandwidth by
    its centers; ``bandwidth`` is that of the last one fitted. Categorical features are not served; pytabkit's
    ``XRFM_D_Classifier(kernel_type=FastKernel(...))`` and its regressor work where no category has over 100 levels.

    Args:
        kernel: a fastagop kernel such as ``fastagop.Laplace(10.0)``. ``Laplace(L)`` is xRFM's "laplace",
            ``GeneralisedLaplace(L, p)`` its "laplace" with exponent p, ``ProductLaplace(L)`` its "l1" and
            ``LpLaplace(p, q, L)`` its "lpq"; its own "l1" and "lpq" gradients are wrong for several outputs with
            torch 2.14. Kernels without a bandwidth serve where ``bandwidth_mode`` is "constant".
        precision, backend: as in ``fastagop.kernel_matrix``.
        bandwidth_mode: kept for xRFM, which reads its own parameter of that name.
    """

    def __init__(
        self, kernel: Any, *, precision: str = "highest", backend: str = "auto", bandwidth_mode: str = "constant"
    ):
        checks.kernel(kernel)
        self._centers: bytes | None = None
        self._adapted: dict[bytes, float] = {}
        exponent = getattr(kernel, "exponent", getattr(kernel, "q", 1.0))
        super().__init__(getattr(kernel, "bandwidth", 1.0), exponent, bandwidth_mode=bandwidth_mode)
        self._kernel = kernel
        self.precision: str = precision
        self.backend: str = backend
        self._columns: list[int] | None = None

    @property
    def bandwidth(self) -> float:
        """The bandwidth that xRFM has set last."""
        return self._bandwidth

    @bandwidth.setter
    def bandwidth(self, value: float) -> None:
        self._bandwidth = value
        if self._centers is not None:  # xRFM adapts it to these centers, or goes back to the best one for them
            self._adapted[self._centers] = value

    @property
    def kernel(self) -> Any:
        """The fastagop kernel with the bandwidth that xRFM has set last, where it has one."""
        return self._with(self.bandwidth)

    def _with(self, bandwidth: float) -> Any:
        return dataclasses.replace(self._kernel, bandwidth=float(bandwidth)) if self._kernel.norm else self._kernel

    def _kernel_of(self, *centers: torch.Tensor) -> Any:
        """The kernel with the bandwidth that was adapted to centers, the first of those given that are known."""
        known = map(_name, centers) if len(self._adapted) > 1 else ()
        return self._with(next((self._adapted[name] for name in known if name in self._adapted), self.bandwidth))

    def __repr__(self) -> str:
        return f"FastKernel({self.kernel!r})"

    def set_categorical_indices(
        self,
        numerical_indices: Sequence[int] | torch.Tensor | None = None,
        categorical_indices: Sequence[Any] | None = None,
        categorical_vectors: Sequence[Any] | None = None,
        device: Any = None,
    ) -> None:
        """Take xRFM's description of the columns where all are numbers; xRFM calls this for such data, too.

        Args:
            numerical_indices: columns that are numbers, all of them in any order; None says nothing.
            categorical_indices, categorical_vectors: empty or None.
            device: ignored, as nothing is stored there.

        Raises:
            NotImplementedError: there are categorical features. A fastagop kernel takes the distance of all columns.
        """
        lists = {"categorical_indices": categorical_indices, "categorical_vectors": categorical_vectors}
        for name, value in lists.items():
            if value is not None and len(value):
                raise NotImplementedError(
                    f"FastKernel serves no categorical features, got {name} with {len(value)} of them; pass "
                    "fast_categorical=False to xRFM, which then takes one-hot columns as numbers, or encode them as "
                    "numbers before fit (pytabkit: those of more than 100 levels), or use xRFM's own LaplaceKernel"
                )
        self._columns = None if numerical_indices is None else sorted(checks.tensor(numerical_indices).tolist())

    def _check_columns(self, x: torch.Tensor) -> None:
        """Refuse points with columns that ``set_categorical_indices`` has left out: xRFM's kernels ignore them."""
        if self._columns is not None and self._columns != list(range(x.shape[1])):
            raise ValueError(
                f"x must have the {len(self._columns)} columns that numerical_indices names, got {x.shape[1]}; "
                "pass all of them as numerical_indices, or drop the others from x"
            )

    def _transform_m(self, x: torch.Tensor, mat: torch.Tensor | None = None) -> torch.Tensor:
        """x times M^(1/2) in x's dtype, also where autocast would round the product."""
        with matmul_precision("highest", x.device):
            return super()._transform_m(x, mat)

    def _points(self, x: torch.Tensor, z: torch.Tensor, mat: torch.Tensor | None):
        """(centers, points) times M^(1/2), one tensor where they are equal: half the work, and self-pairs by index."""
        self._check_columns(x)
        symmetric = z is x or (z.shape == x.shape and torch.equal(z, x))
        x = self._transform_m(x, mat)
        return x, x if symmetric else self._transform_m(z, mat)

    def _get_kernel_matrix_impl(self, x, z, mat=None):
        centers = z, x  # fitted models give their centers second
        x, z = self._points(x, z, mat)
        if not self.is_adaptive_bandwidth:
            self._adapt(x, z, centers[0])
        return kernel_matrix(self._kernel_of(*centers), x, z, precision=self.precision, backend=self.backend)

    def _adapt(self, x: torch.Tensor, z: torch.Tensor, centers: torch.Tensor) -> None:
        """Hand xRFM the distances that it sets the bandwidth from, of a sample where there are more than it takes."""
        p = self._kernel.norm
        if not p:
            raise ValueError(f"bandwidth_mode must be 'constant' for {self._kernel!r}, which has no bandwidth to adapt")
        if len(x) > _SAMPLE:
            index = torch.randperm(len(x), device="cpu")[:_SAMPLE].to(x.device)
            x, z = x[index], z[index]
        self._centers = _name(centers)
        self._adapt_bandwidth(torch.cdist(x, z, p=p).pow_(self.exponent))

    def _get_function_grad_impl(self, x, z, coefs, mat=None):
        kernel = self._kernel_of(x)
        x, z = self._points(x, z, mat)
        g = gradients(kernel, x, coefs.T, z, precision=self.precision, backend=self.backend)
        return g.transpose(0, 1)

    def get_agop(
        self,
        x: torch.Tensor,
        z: torch.Tensor,
        coefs: torch.Tensor,
        mat: torch.Tensor | None = None,
        center_grads: bool = False,
    ) -> torch.Tensor:
        """Sum over outputs and points of grad f grad f^T with respect to the input, (d, d).

        With ``center_grads`` one mean over all outputs and points is subtracted, xRFM's convention.
        """
        kernel = self._kernel_of(x)
        x, z = self._points(x, z, mat)
        alpha = coefs.T
        M = agop(
            kernel,
            x,
            alpha,
            z,
            reduction="sum",
            center=center_grads,
            precision=self.precision,
            backend=self.backend,
        )
        if center_grads and alpha.shape[1] > 1:  # the outputs' own means were subtracted: put back how they differ
            operator = KernelOperator("agop", kernel, x, z, precision=self.precision, backend=self.backend)
            mean = operator.mean_gradient(alpha, rows=_ROWS)
            mean -= mean.mean(0)
            M += len(z) * (mean.T @ mean)
        return self._transform_m(self._transform_m(M, mat).T, mat).T

    def get_agop_diag(
        self,
        x: torch.Tensor,
        z: torch.Tensor,
        coefs: torch.Tensor,
        mat: torch.Tensor | None = None,
        center_grads: bool = False,
    ) -> torch.Tensor:
        """The diagonal of ``get_agop``, (d,), by blocks of gradients: no (d, d) matrix is made."""
        kernel = self._kernel_of(x)
        x, z = self._points(x, z, mat)
        diagonal, mean = self._diagonal(kernel, x, z, coefs.T, mat, center_grads, self.backend)
        if center_grads and x.dtype == torch.float32:
            rounding = torch.finfo(x.dtype).eps ** 2 * mean.square().sum() * len(z) * len(coefs)
            if bool(rounding > _CENTRED**2 * diagonal.sum()):  # the gradients nearly agree
                wide = x.double()
                points = wide, wide if z is x else z.double()
                diagonal, _ = self._diagonal(kernel, *points, coefs.T.double(), mat, True, "auto")
        diagonal = diagonal.to(x.dtype)
        if not checks.finite(diagonal):
            raise ValueError(f"coefs is so large that the AGOP leaves {x.dtype}; divide coefs by a constant")
        return diagonal

    def _diagonal(self, kernel, x, z, alpha, mat, center: bool, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(Sum over outputs and points of squared derivatives, the mean that was subtracted or zeros), float64 (d,)."""
        d = x.shape[1] if mat is None else mat.shape[-1]
        rows = max(1, _BLOCK_BYTES // max(1, 8 * alpha.shape[1] * max(d, x.shape[1])))
        out, means = x.new_zeros(d, dtype=torch.float64), Means(d, x)
        for start in range(0, len(z), rows):
            some = z[start : start + rows] if len(z) > rows or z is not x else None
            G = gradients(kernel, x, alpha, some, precision=self.precision, backend=backend)
            G = self._transform_m(G.flatten(0, 1), mat).double()  # squares may leave float32
            if center and len(G):
                out += means.centre_(G, None).square()
            out += G.square_().sum(0)
        return out, means.mean


def _name(centers: torch.Tensor) -> bytes:
    """A name of centers that stays when they move to another device or are stored: their shape and some of the rows."""
    count = min(len(centers), _SHOWN)
    rows = torch.arange(count, device=centers.device) * len(centers) // max(1, count)
    shown = centers.detach()[rows].double().cpu().contiguous().numpy()
    return hashlib.blake2b(repr(tuple(centers.shape)).encode() + shown.tobytes(), digest_size=16).digest()
