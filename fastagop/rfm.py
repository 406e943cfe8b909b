"""Recursive feature machines as scikit-learn estimators: a kernel machine that learns its own metric ||x - z||_M."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn.utils.validation import check_is_fitted

from fastagop import linalg
from fastagop.distributed.engine import engine_of
from fastagop.estimators import files as storage
from fastagop.estimators import inputs, kernel_ridge
from fastagop.estimators.base import Classifier, KernelEstimator, Regressor, in_full
from fastagop.estimators.progress import Progress
from fastagop.kernels import checks
from fastagop.kernels.plan import AgopTask
from fastagop.kernels.radial import Laplace
from fastagop.solvers import copies
from fastagop.solvers.solution import Solution, report, size_of

_LAPLACE = Laplace(10.0)


@dataclass(frozen=True)
class IterationRecord:
    """What happened in one iteration.

    Attributes:
        solution: of the kernel regression whose AGOP was taken, alpha in float64.
        agop_scale: the number that the summed AGOP was divided by.
        seconds: wall-clock time.
    """

    solution: Solution
    agop_scale: float
    seconds: float

    def __repr__(self):
        return f"IterationRecord(agop_scale {self.agop_scale:.2g}, {self.seconds:.2g} s, {self.solution})"


@dataclass(frozen=True)
class IterationEvent:
    """What callbacks see after each iteration; M is valid during the call only.

    Attributes:
        iteration: index from 0.
        iterations: how many there will be.
        record: the IterationRecord.
        M: the new metric (d, d) or (d,).
    """

    iteration: int
    iterations: int
    record: IterationRecord
    M: torch.Tensor

    def __repr__(self):
        return f"IterationEvent(iteration {self.iteration} of {self.iterations}, M {size_of(self.M)}, {self.record})"


Callback = Callable[[IterationEvent], None]


def project(X: torch.Tensor, root: torch.Tensor | None) -> torch.Tensor:
    """X M^(1/2), the points whose Euclidean distance is ||x - z||_M; root is M^(1/2), its diagonal, or None for I."""
    if root is None:
        return X
    return X * root if root.ndim == 1 else X @ root


def pulled_back(M: torch.Tensor, root: torch.Tensor | None, diagonal: bool) -> torch.Tensor:
    """The AGOP (or its diagonal) with respect to X from that with respect to X R: R M R, since gradients go by R."""
    M = M.double()
    if diagonal:
        return M if root is None else M * root.double().square()
    if root is None:
        return M
    M = root.double() @ M @ root.double()
    return (M + M.T).mul_(0.5)


class _RFM(KernelEstimator):
    """The parts that the classifier and the regressor share."""

    iterations: int
    diagonal: bool
    center: bool

    @in_full
    def fit(self, X, y, sample_weight=None):
        """Alternate kernel regression and AGOP, then solve once more with the last M.

        Args:
            X: samples (n, d), NumPy array, DataFrame or torch tensor.
            y: labels (n,) (classifier), floats (n,) or (n, K) (regressor).
            sample_weight: w >= 0, (n,): the solve is (K + ridge W^-1) alpha = Y and the AGOP a weighted sum, so that
                a weight of 2 counts as a row written twice and a weight of 0 as a row left out. Default 1.

        Returns:
            self, with ``kernel_``, ``M_``, ``iterations_`` and ``solution_``.

        Raises:
            ValueError, TypeError: naming the parameter or argument. MemoryError: the kernel matrix does not fit.
            fastagop.distributed.RankLost: a process of the group died.

        Warns:
            NumericalWarning: per solve whose result had to be altered.
        """
        regression, iterations = self._checked()
        data = self._training(X, y, sample_weight)
        rows, reported, Y = copies.find(data.X, data.weights), set(), data.Y
        points = rows.take(data.X)
        regression = self._settled(regression, points)
        ones = points.new_ones(points.shape[1])
        M = ones if self.diagonal else ones.diag()
        self._root, self.iterations_ = None, []
        with Progress("RFM", "iteration", iterations, quiet=not self.verbose) as progress:
            for index in range(iterations):
                M, record = self._iterate(points, Y, M, regression, rows)
                report(record.solution, reported)
                self.iterations_.append(record)
                for callback in self.callbacks:
                    callback(IterationEvent(index, iterations, record, M))
                progress.step()
        # The caller's tensor must not be kept.
        self._centers = project(points, self._root) if self._root is not None else points.clone()
        solved = kernel_ridge.solve(self._centers, Y, regression, engine_of(self.process_group), rows=rows)
        self.solution_, self._alpha = solved.solution, solved.alpha
        report(self.solution_, reported)
        self.M_ = self._kept(M)
        return self

    def _planned_fit(self):
        """For ``fastagop.explain``: (data, ranks) -> the steps of a fit, of parameters that are checked now."""
        return functools.partial(self._steps, self._checked()[0])

    def _steps(self, regression: kernel_ridge.KernelRidge, data, share: int):
        """([(name, how often, step)], bytes that the fit keeps)."""
        from fastagop.estimators.fit_plans import iteration_steps

        task = AgopTask("sum", self.center)
        return iteration_steps(data, regression, share, task, (int(self.iterations), self.diagonal))

    def _checked(self) -> tuple[kernel_ridge.KernelRidge, int]:
        regression, iterations = self._machine(), checks.integer("iterations", self.iterations, 0)
        checks.flag("diagonal", self.diagonal)
        checks.flag("center", self.center)
        return regression, iterations

    def _iterate(self, X, Y, M: torch.Tensor, regression: kernel_ridge.KernelRidge, rows: copies.Rows):
        """(new M, record); sets its root. A constant predictor has nothing to say about features: M stays then."""
        start, engine = time.perf_counter(), engine_of(self.process_group)
        points = project(X, self._root)
        options = {"rows": rows, "center": self.center, "diagonal": self.diagonal}
        solution, inner, _ = kernel_ridge.fit_and_agop(points, Y, regression, engine, **options)
        agop = pulled_back(inner, self._root, self.diagonal)
        scale = kernel_ridge.agop_divisor(agop, self.agop_scale, rows.total)
        if bool(agop.any()):
            M = (agop / scale).to(X.dtype)
            # Gradients at the points are combinations of the points, whose span the M before maps to itself.
            root = M.clamp_(min=0.0).sqrt() if self.diagonal else linalg.psd_sqrt(M, rows=X)
            self._root = engine.broadcast(root)
        return M, IterationRecord(solution, scale, time.perf_counter() - start)

    @in_full
    def transform(self, X):
        """X M^(1/2), the points in the learned metric: shape (m, d), of X's kind and dtype."""
        check_is_fitted(self)
        return self._answer(self._projected(self._samples(X)), X)

    @property
    def feature_importances_(self):
        """The diagonal of ``M_`` over its sum: (d,), how much each feature counts in the learned metric."""
        check_is_fitted(self)
        weights = torch.as_tensor(self.M_).double()
        weights = weights if weights.ndim == 1 else weights.diagonal()
        return self._kept(weights / weights.sum())

    @property
    def _n_features_out(self) -> int:
        """Columns of ``transform``, which scikit-learn names."""
        return self.n_features_in_

    def _entering(self, X: torch.Tensor) -> torch.Tensor:
        self._offset = inputs.offsets(X)
        return inputs.narrowed("X", self._near(X), self._dtype).to(self._dtype)

    def _near(self, X: torch.Tensor) -> torch.Tensor:
        """X without its offset, which lies far from zero in every row: the kernel sees differences only."""
        return X.double() - self._offset if bool(self._offset.any()) else X

    def _projected(self, X: torch.Tensor) -> torch.Tensor:
        return project(X, None if self._root is None else self._root.to(X))

    def _mapped(self, X: torch.Tensor) -> torch.Tensor:
        return self._projected(self._near(X))

    def _packed(self):
        tensors = {"M": torch.as_tensor(self.M_), "offset": self._offset, **self._packed_alpha()}
        if self._root is not None:
            tensors["root"] = self._root
        records = []
        for index, record in enumerate(self.iterations_):
            solution = storage.pack_solution(record.solution)
            records.append({"solution": solution, "agop_scale": record.agop_scale, "seconds": record.seconds})
            tensors[f"{index}.alpha"] = record.solution.alpha
        return tensors, {"iterations": records}

    def _restore(self, tensors: dict[str, torch.Tensor], metadata: dict) -> None:
        self._root, self._offset, self.M_ = tensors.get("root"), tensors["offset"], self._kept(tensors["M"])
        self.iterations_, self._alpha = [], tensors.get("readout", self.solution_.alpha)
        for index, record in enumerate(metadata["iterations"]):
            solution = storage.unpack_solution(record["solution"], tensors[f"{index}.alpha"])
            self.iterations_.append(IterationRecord(**{**record, "solution": solution}))


class RFMClassifier(Classifier, _RFM):
    """Recursive feature machine, classifier: kernel ridge regression on +-1 one-hot labels in a metric that it learns.

    The kernel is evaluated with ||x - z||_M = sqrt((x - z)^T M (x - z)), M = I at first. Each iteration solves
    (k_M(X, X) + ridge I) alpha = Y and takes M = AGOP of that predictor with respect to its input; one more solve with
    the last M follows (Radhakrishnan, Beaglehole, Pandit, Belkin, 2024; paper, section 3.3). The last iteration is what
    predicts, whatever the ones before it would have scored: to choose their number, cross-validate ``iterations``.

    Args:
        kernel: a kernel such as ``Laplace(10.0)``, or ``Laplace("median")``: the median distance of the points while M
            is I. The bandwidth is in the units of the data, which M rescales.
        iterations: number of AGOPs; 0 is kernel ridge regression.
        diagonal: keep M's diagonal only: a weight for every feature, no rotation.
        center: subtract the mean gradient of each output before the outer product.
        ridge: mu >= 0 added to the kernel matrix's diagonal.
        agop_scale: "max" divides M by its largest entry (the authors' code), so that the bandwidth keeps its meaning
            from one iteration to the next; "mean" divides by n (the paper's definition), "sum" not at all.
        precision, backend: as in ``fastagop.kernel_matrix``, for ``fit``; "triton" fits only, since outputs for new
            rows are computed in float64 and Triton's products are float32.
        device: a torch device, or "auto": CUDA where there is one.
        dtype: "float32" or "float64", or torch's own.
        callbacks: functions called with a ``fastagop.rfm.IterationEvent`` after each iteration.
        verbose: 1 shows a progress bar on a terminal, and logs every step at INFO.
        process_group: a ``torch.distributed`` group whose ranks share the work of fit (``fastagop.distributed``);
            every rank fits the same data and ends with the same estimator. Prediction is not shared.
        solver: method of every solve, as in ``fastagop.solve``: "auto", "cholesky", "cholesky+cg", "eigh", "cg" (no
            n x n matrix), ``fastagop.CholeskyCG(...)`` or ``fastagop.ConjugateGradients(...)``.
        memory_limit: bytes that a solve or an AGOP may take.
        class_weight: weights of the classes, {label: weight}, or "balanced" for weights inversely proportional to
            the classes' sums of sample weights; they multiply sample weights.

    Attributes:
        kernel_: the kernel with a number for its bandwidth.
        M_: the metric, scaled, (d, d), or (d,) with ``diagonal``.
        iterations_: one ``IterationRecord`` each.
        solution_: ``Solution`` of the last solve (float64).
        classes_: the labels.
        n_features_in_: d.
        feature_importances_: the diagonal of M over its sum, (d,).
    """

    def __init__(
        self,
        kernel=_LAPLACE,
        iterations=5,
        diagonal=False,
        center=False,
        ridge=1e-3,
        agop_scale="max",
        precision="highest",
        backend="auto",
        device="auto",
        dtype="float32",
        callbacks=(),
        verbose=0,
        process_group=None,
        solver="auto",
        memory_limit=None,
        class_weight=None,
    ):
        self._store(locals())


class RFMRegressor(Regressor, _RFM):
    """Recursive feature machine, regressor: kernel ridge regression in a metric that it learns.

    Targets (n,) or (n, K) enter as they are; nothing is centred or scaled, but for a column whose (weighted) mean
    exceeds its spread more than four times: the mean is subtracted before anything is rounded, and predictions add it
    again, so that an offset costs no digits. ``solution_`` and the records of ``iterations_`` are then those of what is
    left. Parameters, attributes and the algorithm are those of ``RFMClassifier``, without ``class_weight`` and
    ``classes_``, and with ``intercept_``, what was subtracted: a number, or (K,).
    """

    def __init__(
        self,
        kernel=_LAPLACE,
        iterations=5,
        diagonal=False,
        center=False,
        ridge=1e-3,
        agop_scale="max",
        precision="highest",
        backend="auto",
        device="auto",
        dtype="float32",
        callbacks=(),
        verbose=0,
        process_group=None,
        solver="auto",
        memory_limit=None,
    ):
        self._store(locals())
