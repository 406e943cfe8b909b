"""What trees of recursive feature machines share: growth, leaves, soft routing, files and plans."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from fastagop.distributed.engine import Local
from fastagop.estimators import files as storage
from fastagop.estimators import inputs, persistence
from fastagop.estimators.base import KernelEstimator, Training
from fastagop.estimators.calls import all_or_nothing, without_autograd_or_autocast
from fastagop.estimators.progress import Progress
from fastagop.estimators.types import Callbacks, Rows, Scoring, Seed, Self
from fastagop.kernels import checks
from fastagop.rfm import validation
from fastagop.rfm.directions import leading
from fastagop.rfm.preparation import Preparation, check_scale
from fastagop.rfm.splits import Growth, Tree
from fastagop.rfm.validation import HeldOut, Lenient
from fastagop.solvers import copies

_TEMPERATURES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)
_DIRECTIONS = 8  # of a metric, tried before a random one
# Of the small machines that splits come from: all rows of a sample say which directions matter.
_SPLIT = {"iterations": 2, "early_stopping": False, "metric_samples": None, "time_limit": None}


@dataclass(frozen=True)
class Constant:
    """A leaf whose rows all have one answer.

    Attributes:
        answer: their label, or their target.
        outputs: what the kernel machine of the tree would answer (K,), float64.
    """

    answer: Any
    outputs: torch.Tensor

    def predict(self, X: Any) -> np.ndarray:
        """The answer for every row of X."""
        return np.array([self.answer] * len(X))


class RFMTree(KernelEstimator):
    """What the trees share; hooks: ``_widened``, ``_MACHINE``."""

    _MACHINE: type
    callbacks: Callbacks = ()
    process_group: Any = None
    iterations: int
    diagonal: bool
    center: bool
    scale: str | None
    early_stopping: bool
    validation_fraction: float
    scoring: Scoring
    metric_samples: float | None
    time_limit: float | None
    random_state: Seed
    leaf_size: int
    split_samples: int
    soft: bool
    # These are set by fit.
    tree_: Tree
    leaves_: list[Any]
    temperature_: float
    _preparation: Preparation
    _shares: np.ndarray

    def __sklearn_clone__(self) -> Self:
        """A clone, of parameters alone: a tree has no process group."""
        return BaseEstimator.__sklearn_clone__(self)  # pyright: ignore[reportReturnType]

    def _widened(self, leaf, outputs: torch.Tensor) -> torch.Tensor:
        """Outputs of a leaf's machine as outputs (m, K) of the tree's."""
        raise NotImplementedError

    @all_or_nothing
    @without_autograd_or_autocast
    def fit(self, X: Rows, y: Rows, sample_weight: Rows | None = None) -> Self:
        """Grow the tree, fit a machine in every leaf, and choose how softly rows are shared between leaves.

        Args:
            X: samples (n, d), NumPy array, DataFrame or torch tensor.
            y: labels (n,) (classifier), floats (n,) or (n, K) (regressor).
            sample_weight: w >= 0, (n,), as for one machine. Splits divide distinct rows, whatever their weights.

        Returns:
            self, with ``tree_``, ``leaves_`` and ``temperature_``.

        Raises:
            ValueError, TypeError: naming the parameter or argument. MemoryError: a leaf's kernel matrix does not fit.

        Warns:
            NumericalWarning: per solve whose result had to be altered.
        """
        begin = time.perf_counter()
        self._check_parameters()
        vars(self).pop("temperature_", None)  # A scorer that asks for it would take that of an earlier fit.
        data = self._training(X, y, sample_weight)
        answers, random = self._original(data), inputs.random(self.random_state)
        points = copies.find(data.X, data.weights)
        splitter = _Splitter(self, data, answers, random)
        growth = Growth(data.X, points.kept, points.group, int(self.leaf_size), splitter.directions, splitter.settled)
        self.tree_, members = growth.run()
        weights = data.X.new_ones(len(data.X), dtype=torch.float64) if data.weights is None else data.weights
        weights = weights.cpu()
        self._shares = np.array([float(weights[rows.cpu()].sum()) for rows in members])
        self.leaves_ = []
        with Progress("RFM tree", "leaf", len(members), quiet=not self.verbose) as progress:
            for rows in members:
                self.leaves_.append(self._leaf(data, answers, rows, len(members), begin))
                progress.step(rows=str(len(rows)))
        self.temperature_ = self._tempered(data, answers, members, random)
        return self

    def _machine_of(self, **changes):
        """A recursive feature machine with the tree's parameters, which are in the tree's units."""
        names = self._MACHINE._get_param_names()
        shared = {name: getattr(self, name) for name in names if hasattr(self, name)}
        fixed = {"scale": None, "verbose": 0, **({"class_weight": None} if "class_weight" in names else {})}
        return self._MACHINE(**{**shared, **fixed, **changes})

    def _leaf(self, data: Training, answers: np.ndarray, rows: torch.Tensor, count: int, begin: float):
        """One of ``count`` leaves, fitted to some rows: a machine, or a constant where they all have one answer."""
        leaf_answers = answers[rows.cpu().numpy()]
        if _constant(leaf_answers) and count > 1:
            return Constant(leaf_answers[0], data.Y[rows[0]].double())
        changes = {}
        if count > 1:
            changes["scoring"] = None if self.scoring is None else Lenient(validation.scorer_of(self, self.scoring))
            if self.soft and not self.early_stopping and self.metric_samples is None:
                changes["metric_samples"] = len(rows) - validation.held_out_count(self, len(rows))
        if self.time_limit is not None:
            left = begin + float(self.time_limit) - time.perf_counter()
            changes["time_limit"] = max(0.0, left / (count - len(self.leaves_)))
        weights = None if data.weights is None else data.weights[rows].cpu().numpy()
        leaf_rows = self._like_fit_input(data.X[rows])
        with validation.few_rows(leaf=True) if count > 1 else contextlib.nullcontext():
            return self._machine_of(**changes).fit(leaf_rows, leaf_answers, sample_weight=weights)

    def _tempered(self, data: Training, answers: np.ndarray, members: list[torch.Tensor], random) -> float:
        """The temperature with the best score on the rows that no leaf's metric and coefficients have seen."""
        if not self.soft or len(members) == 1:
            return 0.0
        held = torch.cat([self._unseen(leaf, rows, random) for leaf, rows in zip(self.leaves_, members, strict=True)])
        if len(held) == 0:
            return 0.0
        near, index = data.X[held].double(), held.cpu().numpy()
        weights = None if data.weights is None else data.weights[held].cpu().numpy()
        codes, scorer = data.Y[held].double(), validation.scorer_of(self, self.scoring)
        judge = HeldOut(near, self._preparation.original(near).cpu().numpy(), answers[index], codes, weights, scorer)
        with validation.few_rows():
            scores = [judge.score(self, outputs) for outputs in self._mixed(near, _TEMPERATURES, self._before)]
        return _TEMPERATURES[max(range(len(scores)), key=lambda i: (*validation.key(*scores[i]), -i))]

    def _unseen(self, leaf, rows: torch.Tensor, random) -> torch.Tensor:
        """Some of a leaf's rows, of which its iterations were not made; at most the share to hold out."""
        if isinstance(leaf, Constant):
            return rows[:0]
        out, limit = rows[leaf._unseen_rows], validation.held_out_count(self, len(rows))
        if len(out) <= limit:
            return out
        return out[torch.from_numpy(random.permutation(len(out))[:limit]).to(out.device)]

    def _before(self, leaf, near: torch.Tensor) -> torch.Tensor:
        """Outputs (m, K) of a leaf before its last solve, which takes all of its rows."""
        if isinstance(leaf, Constant):
            return leaf.outputs.expand(len(near), -1)
        return self._widened(leaf, leaf._outputs_before_last_solve(near))

    def _after(self, leaf, near: torch.Tensor) -> torch.Tensor:
        """Outputs (m, K) of a fitted leaf."""
        if isinstance(leaf, Constant):
            return leaf.outputs.expand(len(near), -1)
        return self._widened(leaf, leaf._outputs_at(near))

    def _mixed(self, near: torch.Tensor, temperatures: tuple[float, ...], answer: Callable) -> list[torch.Tensor]:
        """Weighted means (m, K) of the leaves' answers for rows as the kernel sees them, for each temperature."""
        routed: list[list] = [[] for _ in self.leaves_]
        narrow = near.to(self._fitted_dtype)  # training rows took their side so
        for place, temperature in enumerate(temperatures):
            for leaf, rows, weights in self.tree_.route(narrow, temperature):
                routed[leaf].append((place, rows, weights))
        sums, totals = {}, near.new_zeros(len(temperatures), len(near))
        for leaf, parts in zip(self.leaves_, routed, strict=True):
            if not parts:
                continue
            asked = torch.unique(torch.cat([rows for _, rows, _ in parts]))
            outputs = answer(leaf, near[asked])
            for place, rows, weights in parts:
                sums.setdefault(place, outputs.new_zeros(len(near), outputs.shape[1]))
                part = outputs[torch.searchsorted(asked, rows)]
                sums[place].index_add_(0, rows, weights[:, None] * part)
                totals[place].index_add_(0, rows, weights)
        return [sums[place].div_(totals[place][:, None]) for place in range(len(temperatures))]

    @without_autograd_or_autocast
    def _outputs(self, X) -> torch.Tensor:
        check_is_fitted(self)
        return self._mixed(self._kernel_inputs(self._samples(X)), (self.temperature_,), self._after)[0]

    @without_autograd_or_autocast
    def transform(self, X: Rows) -> Any:
        """Weights of the leaves, which sum to 1 for every row: shape (m, number of leaves), of X's kind and dtype."""
        check_is_fitted(self)
        near = self._kernel_inputs(self._samples(X))
        weights = near.new_zeros(len(near), len(self.leaves_))
        for leaf, rows, part in self.tree_.route(near.to(self._fitted_dtype), self.temperature_):
            weights[rows, leaf] = part
        return self._like_input(weights.div_(weights.sum(1, keepdim=True)), X)

    @without_autograd_or_autocast
    def apply(self, X: Rows) -> Any:
        """The number of the leaf that hard routing gives each row, by its place in ``leaves_``: (m,) integers."""
        check_is_fitted(self)
        near = self._kernel_inputs(self._samples(X))
        found = torch.empty(len(near), dtype=torch.int64, device=near.device)
        for leaf, rows, _ in self.tree_.route(near.to(self._fitted_dtype), 0.0):
            found[rows] = leaf
        return found.to(X.device) if isinstance(X, torch.Tensor) else found.cpu().numpy()

    @property
    def feature_importances_(self) -> Any:
        """How much each feature counts in the leaves' metrics: (d,), the mean of the leaves' own, weighted by rows.

        With ``scale="standard"`` it is that of the standardised features. Leaves with one answer have no metric.
        """
        check_is_fitted(self)
        total = torch.zeros(self.n_features_in_, dtype=torch.float64, device="cpu")
        for leaf, share in zip(self.leaves_, self._shares, strict=True):
            found = None if isinstance(leaf, Constant) else checks.tensor(leaf._importances()).cpu()
            if found is not None and bool(torch.isfinite(found).all()):
                total += share * found
        known = float(total.sum())
        return self._like_fit_input(total / known if known > 0 else torch.full_like(total, 1.0 / len(total)))

    @property
    def _n_features_out(self) -> int:
        return len(self.leaves_)

    def _training_points(self, X: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        self._preparation = Preparation.of(X, weights, self.scale, self.kernel)
        return inputs.narrowed("X", self._preparation.near(X), self._dtype)

    def _kernel_inputs(self, X: torch.Tensor) -> torch.Tensor:
        return self._preparation.near(X)

    def _packed(self):
        directions, nodes = self.tree_.packed()
        tensors = {"directions": directions, "shares": torch.from_numpy(self._shares)}
        tensors["offset"] = self._preparation.offset
        if self._preparation.unit is not None:
            tensors["unit"] = self._preparation.unit
        leaves = []
        for place, leaf in enumerate(self.leaves_):
            if isinstance(leaf, Constant):
                leaf_tensors = {"outputs": leaf.outputs}
                text = {"answer": storage.pack_value(np.asarray([leaf.answer]))}
            else:
                leaf_tensors, text = persistence.described(leaf)
            tensors |= {f"{place}/{name}": value for name, value in leaf_tensors.items()}
            leaves.append(text)
        return tensors, {"nodes": nodes, "leaves": leaves, "temperature": self.temperature_}

    def _restore(self, tensors: dict[str, torch.Tensor], metadata: dict) -> None:
        self.tree_ = Tree.unpacked(tensors["directions"], metadata["nodes"], self.n_features_in_)
        self._preparation = Preparation(tensors["offset"], tensors.get("unit"))
        self._shares, self.temperature_ = tensors["shares"].cpu().numpy(), float(metadata["temperature"])
        parts, self.leaves_ = persistence.parts_of(tensors), []
        for place, text in enumerate(metadata["leaves"]):
            leaf_tensors = parts[str(place)]
            if "answer" in text:
                self.leaves_.append(Constant(storage.unpack_value(text["answer"])[0], leaf_tensors["outputs"]))
            elif text["estimator"] == self._MACHINE.__name__:
                self.leaves_.append(persistence.assembled(leaf_tensors, text, self.device))
            else:
                raise ValueError(f"a leaf is a {text['estimator']}, not a {self._MACHINE.__name__}")
        if not len(self.leaves_) == len(self.tree_.leaves) == len(self._shares):
            raise ValueError(f"{len(self.leaves_)} leaves and the tree do not belong together")

    def _check_parameters(self) -> None:
        """Refuse parameters that a fit could not use."""
        self._regression()
        check_scale(self.scale)
        self._machine_of()._regression_and_rules()
        checks.integer("leaf_size", self.leaf_size, 2)
        checks.integer("split_samples", self.split_samples, 2)
        checks.flag("soft", self.soft)
        if self.soft:
            self._machine_of(early_stopping=True)._regression_and_rules()  # of the rows to hold out
        validation.scorer_of(self, self.scoring)

    def _planned_fit(self):
        """For ``fastagop.explain``: (data, ranks) -> the steps of a fit, of parameters that are checked now."""
        self._check_parameters()
        return self._steps

    def _steps(self, data, share: int):
        """([(name, how often, step)], bytes that the fit keeps), for rows that halve evenly."""
        n, d = data.X.shape
        many = 2 ** math.ceil(math.log2(max(1.0, n / self.leaf_size)))
        leaf = ("leaf", many, math.ceil(n / many), self._machine_of())
        split = ("split", many - 1, min(int(self.split_samples), n), self._machine_of(**_SPLIT))
        steps, held = [], 0
        for name, often, size, machine in (split, leaf) if many > 1 else (leaf,):
            part = replace(data, X=data.X[:size], Y=data.Y[:size])
            found, held = machine._steps(self._regression(), part, share)
            start = f"{often} x {name} of {size} rows, "
            steps += [(start + label, often * times, step) for label, times, step in found]
        return steps, many * held + n * d * data.X.element_size()


class _Splitter:
    """Says along which directions some rows are worth dividing.

    Args:
        tree: whose parameters the small machines have.
        data: of the fit. answers: labels or targets of its rows.
        random: for samples and, where nothing else divides the rows, directions.
    """

    def __init__(self, tree: RFMTree, data: Training, answers: np.ndarray, random):
        self.tree, self.data, self.answers, self.random = tree, data, answers, random

    def settled(self, rows: torch.Tensor) -> bool:
        """Whether rows all have one answer."""
        return _constant(self.answers[rows.cpu().numpy()])

    def directions(self, rows: torch.Tensor):
        """Directions (d,) to try in turn: those of a metric learnt from a sample of the rows, then a random one."""
        data, count = self.data, min(int(self.tree.split_samples), len(rows))
        sample = rows
        if count < len(rows):
            codes = None if data.classes is None else data.classes[rows].cpu().numpy()
            codes = None if codes is None else np.unique(codes, return_inverse=True)[1]
            part = validation.split(len(rows), codes, len(rows) - count, self.random)
            sample = rows[validation.chosen(part, Local(), rows.device)[0]]
        sample_answers = self.answers[sample.cpu().numpy()]
        if not _constant(sample_answers):
            weights = None if data.weights is None else data.weights[sample].cpu().numpy()
            model = self.tree._machine_of(**_SPLIT).fit(data.X[sample], sample_answers, sample_weight=weights)
            (_, d), eps = data.X.shape, torch.finfo(data.X.dtype).eps
            vectors, _, _ = leading(model._metric, model._centers, d, None, eps, most=_DIRECTIONS)
            for vector in vectors.to(data.X.dtype).double():
                yield vector * torch.sign(vector[vector.abs().argmax()])
        spread = data.X[sample].double().std(0, correction=0)
        vector = torch.from_numpy(self.random.normal(size=len(spread))).to(spread)
        vector = torch.where(spread > 0, vector / torch.where(spread > 0, spread, 1.0), 0.0)
        if bool(vector.any()):
            yield vector / torch.linalg.vector_norm(vector)


def _constant(answers: np.ndarray) -> bool:
    """Whether all rows have one label or target."""
    return bool((answers == answers[:1]).all())
