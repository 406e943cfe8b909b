"""A model lent to a measure: to one thread at a time, in evaluation mode, and given back as it was found.

Measures of one model, or of models that share a module or a parameter, take turns; other models run side by side. What
a measure changes of a model, others would see: its modes and which parameters require gradients. Replaced forwards and
hooks act in the thread of the measure only.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from fastagop.kernels.precision import Switch


class _Turns:
    """Which thread measures which module or parameter, by their ids."""

    def __init__(self):
        self.changed = threading.Condition()
        self.holders: dict[int, int] = {}
        self.waits: dict[int, set[int]] = {}  # It maps a thread to the threads that it waits for.
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._after_fork)

    def _after_fork(self) -> None:
        """A forked child has none of its parent's other threads, so none of them can give back what it held."""
        self.changed, self.waits = threading.Condition(), {}
        self.holders = {part: thread for part, thread in self.holders.items() if thread == threading.get_ident()}

    def take(self, parts: set[int]) -> set[int]:
        """Wait until no other thread holds any of the parts, and hold them; returns those not held before.

        Raises:
            RuntimeError: waiting would never end.
        """
        thread = threading.get_ident()
        with self.changed:
            try:
                while others := {self.holders[part] for part in parts if part in self.holders} - {thread}:
                    self.waits[thread] = others
                    if self._waits_for(thread, thread):
                        raise RuntimeError(
                            "model: threads wait for each other, each measuring a model inside a measure of another; "
                            "measure these models in one thread"
                        )
                    self.changed.wait()
            finally:
                self.waits.pop(thread, None)
            taken = parts - set(self.holders)
            self.holders.update(dict.fromkeys(taken, thread))
        return taken

    def _waits_for(self, thread: int, other: int) -> bool:
        """Whether a thread waits for another one, or for one that does."""
        seen, todo = set(), [thread]
        while todo:
            for holder in self.waits.get(todo.pop(), set()) - seen:
                if holder == other:
                    return True
                seen.add(holder)
                todo.append(holder)
        return False

    def give_back(self, parts: set[int]) -> None:
        """End what ``take`` began."""
        with self.changed:
            for part in parts:
                self.holders.pop(part, None)
            self.changed.notify_all()


_TURNS = _Turns()


@contextlib.contextmanager
def lent(model: nn.Module) -> Iterator[None]:
    """The model for this thread alone, in evaluation mode, parameters frozen, gradients on; then as it was.

    Raises:
        TypeError: model is no torch.nn.Module.
        ValueError: it cannot be lent, and is untouched.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    _refuse(model)
    with contextlib.ExitStack() as stack:
        for part in (_one_at_a_time(model), _FUSED.at(False), _uncompiled(), _evaluating(model), _made_weights(model)):
            stack.enter_context(part)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield


def _refuse(model: nn.Module) -> None:
    """Refuse models that could not be given back as they were, or whose layers run as copies."""
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, UninitializedParameter) and parameter.is_inference():
            raise ValueError(
                f"model: its parameter {name!r} was made in torch.inference_mode(), so that no measure can freeze it "
                "and give it back; measure copy.deepcopy(model), made outside of that mode"
            )
    for name, module in model.named_modules():
        for part, held in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if held.is_meta and not (module._forward_pre_hooks or "forward" in vars(module)):  # these may bring weights
                raise ValueError(
                    f"model: {f'{name}.{part}'.lstrip('.')!r} is on meta, without numbers; load them, as by "
                    "model.load_state_dict(state, assign=True)"
                )
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            which = f"{name!r} in it is" if name else "it is"
            raise ValueError(
                f"model: {which} a DataParallel on {len(module.device_ids)} devices, which runs copies of its layers "
                "that nothing is seen of; measure its .module instead"
            )


@contextlib.contextmanager
def _one_at_a_time(model: nn.Module) -> Iterator[None]:
    """Wait until no other thread measures a part of the model; a thread may lend the same model to itself."""
    taken = _TURNS.take({id(part) for group in (model.modules(), model.parameters()) for part in group})
    try:
        yield
    finally:
        _TURNS.give_back(taken)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    # Lazy parameters cannot be frozen.
    ready = [p for p in model.parameters() if not isinstance(p, UninitializedParameter)]
    trained = [parameter for parameter in ready if parameter.requires_grad]
    with contextlib.ExitStack() as stack:  # It goes on where one of them cannot be given back; the modes come first.
        for parameter in trained:
            stack.callback(parameter.requires_grad_, True)
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
        try:
            model.eval()
        except NotImplementedError as error:
            raise ValueError(
                f"model: it cannot be put into evaluation mode ({error}); give the module that it was exported from"
            ) from error
        for parameter in trained:
            parameter.requires_grad_(False)
        yield


@contextlib.contextmanager
def _made_weights(model: nn.Module) -> Iterator[None]:
    """Weights that hooks and parametrisations made in training keep their graph: an evaluation has none to offer."""
    made = [
        (module, {name: vars(module)[name] for name in _hooked(module) if name in vars(module)})
        for module in model.modules()
    ]
    ids = {id(module) for module in model.modules()}
    cached = {key: value for key, value in parametrize._cache.items() if key[0] in ids}
    for key in cached:  # They may be those of training mode.
        parametrize._cache.pop(key, None)
    try:
        yield
    finally:
        for module, weights in made:
            vars(module).update(weights)
        for key in [key for key in parametrize._cache if key[0] in ids]:
            parametrize._cache.pop(key, None)
        if parametrize._cache_enabled:
            parametrize._cache.update(cached)


def _hooked(module: nn.Module) -> set[str]:
    """Names under which pre-hooks of a module may store a tensor that they made (weight_norm, pruning, ...)."""
    hooks = list(module._forward_pre_hooks.values())
    names = {getattr(hook, attribute, None) for hook in hooks for attribute in ("name", "_tensor_name")}
    return {name for name in names if isinstance(name, str)} | ({"weight", "bias"} if hooks else set())


# The fused transformer layer does not call its Linear layers.
_FUSED = Switch(torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled, (False,))


class _Stance:
    """torch.compiler's stance: compiled code calls neither hooks nor replaced functions."""

    def __init__(self):
        self._changed: contextlib.AbstractContextManager | None = None

    def read(self) -> bool:
        return self._changed is not None

    def write(self, eager: bool) -> None:
        self._changed = torch.compiler.set_stance("force_eager")

    def restore(self, found: bool) -> None:
        if self._changed is not None:
            self._changed.__exit__(None, None, None)
            self._changed = None


_stance = _Stance()
_EAGER = Switch(_stance.read, _stance.write, (True,), restore=_stance.restore)


def _uncompiled() -> contextlib.AbstractContextManager:
    """Compiled models run as written; torch.compile is slow to import, and nothing is compiled without it."""
    return _EAGER.at(True) if "torch._dynamo" in sys.modules else contextlib.nullcontext()


class Here:
    """Tells the thread that made it, and the threads of its backward passes, from all others."""

    def __init__(self):
        self._thread, self.backward = threading.get_ident(), False

    def __bool__(self) -> bool:
        if threading.get_ident() == self._thread:
            return True
        # CUDA's backward passes have threads of their own.
        return self.backward and torch._C._current_graph_task_id() != -1


def transformed() -> bool:
    """Whether the code runs inside torch.vmap or its like, whose tensors do not outlive it."""
    return torch._C._are_functorch_transforms_active()


def refuse_transforms(layer: str, kind: type[ValueError] = ValueError) -> None:
    """Refuse to measure a layer in a transform: custom functions do not work there, and no tensor can be kept."""
    if transformed():
        raise kind(
            f"layers: {layer!r} is called inside a transform of torch.func (vmap, grad, jacrev, ...), where it cannot "
            "be measured; leave it out, or let the model call it on the whole batch"
        )


Forward = Callable[..., Any]


@contextlib.contextmanager
def replaced(forwards: Mapping[nn.Module, Forward], here: Here | None = None) -> Iterator[None]:
    """Let each layer's forward be another function of its arguments while the block runs, in this thread."""
    here = Here() if here is None else here

    def instead(layer: nn.Module, function: Forward):
        def forward(*args, **options):
            return function(*args, **options) if here else type(layer).forward(layer, *args, **options)

        return forward

    try:
        for layer, function in forwards.items():
            layer.forward = instead(layer, function)
        yield
    finally:
        for layer in forwards:
            vars(layer).pop("forward", None)
