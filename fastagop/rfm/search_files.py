"""Searches in files: the machines that were fitted to all rows, and the table of what was tried."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_is_fitted

from fastagop.estimators import files as storage
from fastagop.estimators import inputs, persistence
from fastagop.rfm import validation

_RESULTS = "results"  # before the names of the table's columns among the tensors
_TENSORS = (np.float64, np.int64, np.int32, np.bool_)  # dtypes of columns that are tensors of a file; others are JSON


class Unwritten:
    """What stands for the scoring function of a search that was loaded: files hold no functions."""

    def __call__(self, estimator, X, y) -> float:
        """Refuse to score.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "score needs the function that scoring was, which a file does not hold; apply it to predict(X) yourself, "
            "or call best_estimator_.score, which is accuracy or R^2"
        )


class SavedSearch:
    """The part of a search that files are about."""

    _Base: type
    device: Any
    scoring: Any
    n_features_in_: int
    n_splits_: int
    estimators_: list[Any]
    best_estimator_: Any
    best_params_: dict[str, Any]
    best_index_: int
    best_score_: float
    best_iteration_: int
    cv_results_: dict[str, Any]
    stopped_: str
    scorer_: Any
    _scored_by: Any  # what scoring was in fit

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the search, with ``estimators_`` and ``cv_results_``, to one file, which ``fastagop.load`` reads.

        The file is there whole or not at all and carries a checksum; nothing is pickled. A loaded search predicts the
        same. It has the default of parameters that are no numbers, texts or lists of them: a ``scoring`` function
        (``score`` is then refused), a ``cv`` of splitter or indices, a ``space`` with distributions, a
        ``random_state`` that is no integer.

        Raises:
            NotFittedError: fit comes first. ValueError: with ``refit=False`` nothing was fitted to all rows. TypeError:
                a class of its own, which ``load`` would not know.
        """
        self._check_refitted("save")
        persistence.save(self, Path(path))

    def _check_refitted(self, what: str) -> None:
        """Refuse what needs an estimator that was fitted to all rows, where there is none."""
        check_is_fitted(self)
        if not hasattr(self, "estimators_"):
            raise NotFittedError(
                f"{what} needs an estimator fitted to all rows, which refit=False leaves out; use refit=True"
            )

    @property
    def _device(self) -> torch.device:
        return inputs.device(self.device)

    def _packed(self) -> tuple[dict[str, torch.Tensor], dict]:
        """(tensors, description) that ``_restore`` needs."""
        tensors, texts, machines = {}, {}, []
        columns = {name: np.asarray(column) for name, column in self.cv_results_.items() if name != "params"}
        for name, column in columns.items():  # params is made of param_...
            if column.dtype in _TENSORS:
                tensors[f"{_RESULTS}/{name}"] = torch.from_numpy(column)
            else:
                texts[name] = storage.pack_value(column)
        for place, model in enumerate(self.estimators_):
            parts, text = persistence.described(model)
            tensors |= {f"{place}/{name}": value for name, value in parts.items()}
            machines.append(text)
        scoring = getattr(self, "_scored_by", self.scoring)  # pickles of earlier versions have the parameter alone
        return tensors, {
            "machines": machines,
            "columns": list(self.cv_results_),
            "texts": texts,
            "best_index": int(self.best_index_),
            "stopped": self.stopped_,
            "scored_by": {"name": scoring} if scoring is None or isinstance(scoring, str) else {},
        }

    def _restore(self, tensors: dict[str, torch.Tensor], metadata: dict) -> None:
        """Set the attributes that ``_packed`` gave."""
        parts, self.estimators_ = persistence.parts_of(tensors), []
        for place, text in enumerate(metadata["machines"]):
            if text["estimator"] != self._Base.__name__:
                raise ValueError(f"it is a search for {self._Base.__name__} and holds a {text['estimator']}")
            self.estimators_.append(persistence.assembled(parts[str(place)], text, self.device))
        self.best_estimator_ = self.estimators_[0]
        self._check_machines()
        self._restore_results(parts[_RESULTS], metadata)
        self.stopped_ = str(metadata["stopped"])
        self._scored_by = metadata["scored_by"].get("name", Unwritten())
        function = isinstance(self._scored_by, Unwritten)
        self.scorer_ = self._scored_by if function else validation.scorer_of(self.best_estimator_, self._scored_by)

    def _check_machines(self) -> None:
        """Refuse machines that do not belong together."""
        classes = getattr(self, "classes_", None)
        for model in self.estimators_:
            same = classes is None or np.array_equal(model.classes_, classes)
            if model.n_features_in_ != self.n_features_in_ or not same:
                raise ValueError("the machines of the search do not have its features and classes")

    def _restore_results(self, columns: dict[str, torch.Tensor], metadata: dict) -> None:
        """Set ``cv_results_`` and what is read off it."""
        texts, results = metadata["texts"], {}
        for name in metadata["columns"]:
            if name == "params":
                results[name] = []  # filled below, at its place among the columns
            elif name in texts:
                results[name] = storage.unpack_value(texts[name])
            else:
                results[name] = columns[name].cpu().numpy()
        shapes = {np.shape(column) for name, column in results.items() if name != "params"}
        index = metadata["best_index"]
        if len(shapes) != 1 or len(shape := shapes.pop()) != 1 or not 0 <= index < shape[0]:
            raise ValueError("the columns of cv_results_ do not belong together")
        names = [name.removeprefix("param_") for name in results if name.startswith("param_")]
        settings = {name: results[f"param_{name}"].tolist() for name in names}
        results["params"] = [dict(zip(settings, row, strict=True)) for row in zip(*settings.values(), strict=True)]
        self.cv_results_, self.best_index_ = results, index
        self.n_splits_ = sum(name.startswith("split") for name in results)
        self.best_params_ = dict(results["params"][index])
        self.best_score_ = float(results["mean_test_score"][index])
        self.best_iteration_ = int(self.best_params_["iterations"])
