"""Which sites of a model are measured, which are left out, and why."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

from fastagop.kernels import checks
from fastagop.kernels.errors import warn
from fastagop.network import sites
from fastagop.network.model_access import Layers
from fastagop.network.sites import Kind, Site, own_forward, plain_class

_NAMES = [kind.__name__ for kind in sites.LAYERS]
SERVED = f"{', '.join(_NAMES[:-1])} or {_NAMES[-1]}"
OWN = "it has a forward of its own"
_SHOWN = 8  # A warning names at most so many layers.


class Chosen:
    """The sites that are measured by name, in the model's order, and the names of those left out, with the reason.

    Args:
        model, layers: as in ``agop``.
        kinds: of the sites that are measured.
        whole: whether only modules that are one Linear layer count, and no projections of attention.

    Attributes:
        named: whether the caller named layers: then nothing is left out in silence, it is refused.
    """

    def __init__(self, model: nn.Module, layers: Layers, kinds: tuple[Kind, ...], whole: bool = False):
        self.named, self._whole = layers is not None, whole
        self.skipped: dict[str, str] = {}
        self._kinds: dict[str, str] = {}
        every = dict(model.named_modules(remove_duplicate=not self.named))
        self.sites = _in(every)
        if whole:
            self.sites = {name: site for name, site in self.sites.items() if site.kind == "linear" and not site.part}
        others = _unmeasured(every, {site.module for site in self.sites.values()})
        if not self.sites:
            raise ValueError(self._none(model, every, others))
        if layers is not None:
            self.sites = self._matching(_patterns(layers), every, others, kinds)
        for name, site in list(self.sites.items()):
            if site.kind == "linear" and not site.part and own_forward(site.module):
                if self.named:
                    raise TypeError(self._own(name, site))
                self.skip(name, OWN)
            elif any(p.is_complex() for p in site.module.parameters(recurse=False)):
                if self.named:
                    raise TypeError(f"layers: {name!r} has complex weights, which are not served; name other layers")
                self.skip(name, "its weights are complex")
            elif site.kind not in kinds:
                self.skip(name, "the rows of an embedding's table have no matrix W^T W to compare with")
        if not self.named:
            for name, why in others.items():
                if not isinstance(every[name], nn.Linear):  # The attention layer that it is a part of is named itself.
                    self._note(name, every[name], why)

    def _own(self, name: str, site: Site) -> str:
        """What to say of a Linear layer that cannot be measured: leave it out, and all like it."""
        rest = listed(other for other, one in self.sites.items() if one.part or not own_forward(one.module))
        what = f"leave it out, layers=[{rest}]" if rest else "name other layers"
        return (
            f"layers: {name!r} is a {type(site.module).__name__} with a forward of its own, not a plain "
            f"torch.nn.{getattr(sites.plain_class(site.module), '__name__', 'Linear')}; {what}"
        )

    def _none(self, model: nn.Module, every: dict[str, nn.Module], others: dict[str, str]) -> str:
        """What to say of a model that has no site."""
        made = isinstance(model, torch.jit.ScriptModule)
        hint = "; give the module that torch.jit made it of" if made else ""
        what = "torch.nn.Linear" if self._whole else SERVED
        has = _shown({name: (type(every[name]).__name__, why) for name, why in others.items()})
        hint = hint or (f": {has}" if has else "")
        return f"model must have a layer to measure ({what}), this {type(model).__name__} has none{hint}"

    def _matching(
        self, wanted: list[str], every: dict[str, nn.Module], others: dict[str, str], kinds: tuple[Kind, ...]
    ) -> dict[str, Site]:
        if not wanted:
            raise ValueError(f"layers must be None for all or name at least one, there are {listed(self.sites)}")
        names = {site: (name, _module_name(name, site)) for name, site in self.sites.items()}
        for pattern in wanted:
            found = [site for site, both in names.items() if any(fnmatch.fnmatchcase(name, pattern) for name in both)]
            if found and not any(site.kind in kinds for site in found):
                raise TypeError(f"layers: {found[0].name!r} is an Embedding, whose table has no W^T W to compare with")
            if found:
                continue
            other = next((name for name in others if fnmatch.fnmatchcase(name, pattern)), None)
            if other is not None:
                served = "torch.nn.Linear, the kind" if self._whole else f"torch.nn.{SERVED}, the kinds"
                raise TypeError(
                    f"layers: {other!r} must be a {served} that {'is' if self._whole else 'are'} served, got a "
                    f"{type(every[other]).__name__}: {others[other]}"
                )
            raise ValueError(f"layers: no layer is called {pattern!r}, there are {listed(self.sites)}")
        matching = {
            name: site
            for name, site in self.sites.items()
            if any(fnmatch.fnmatchcase(either, pattern) for pattern in wanted for either in names[site])
        }
        firsts: dict[tuple[nn.Module, str], str] = {}  # A module under several names is one layer, by the first.
        for name, site in matching.items():
            firsts.setdefault((site.module, site.part), name)
        return {name: matching[name] for name in firsts.values()}

    def may_skip(self, name: str) -> bool:
        """Whether a site that cannot be measured is left out and named, rather than refused."""
        return not self.named and (self.sites[name].kind != "linear" or bool(self.sites[name].part))

    def skip(self, name: str, why: str) -> None:
        """Leave out a site.

        Raises:
            ValueError: no other is left.
        """
        self._note(name, self.sites.pop(name).module, why)
        if not self.sites:
            reasons = "; ".join(f"{name!r}: {why}" for name, why in self.skipped.items())
            raise ValueError(f"layers: none is left that can be measured. {reasons}")

    def _note(self, name: str, module: nn.Module, why: str) -> None:
        self.skipped[name], self._kinds[name] = why, type(module).__name__

    def finish(self, ran: set[Site]) -> None:
        """Leave out sites that did not run; refuse them where they were asked for, or where none ran."""
        silent = [name for name, site in self.sites.items() if site not in ran]
        if silent and (self.named or len(silent) == len(self.sites)):
            raise ValueError(
                f"layers: the model's forward does not call {listed(silent)}, so there is no input to measure; "
                "leave it out of layers"
            )
        for name in silent:
            self.skip(name, "the model's forward does not call it")

    def say(self) -> None:
        """Warn, where all layers were asked for, of those that are left out."""
        if self.skipped and not self.named:
            left_out = _shown({name: (self._kinds[name], why) for name, why in self.skipped.items()})
            text = f"network measures leave out {left_out}. Name the layers to measure, layers=..., to silence this"
            warn(text, UserWarning)


def _shown(skipped: dict[str, tuple[str, str]]) -> str:
    """Names with kind and reason, in words."""
    shown = [f"{repr(name) if name else 'the model itself'} ({kind}): {why}" for name, (kind, why) in skipped.items()]
    return "; ".join(shown[:_SHOWN]) + (f"; and {len(shown) - _SHOWN} more" if shown[_SHOWN:] else "")


def listed(names: Iterable[str]) -> str:
    """Names in an error message."""
    return ", ".join(map(repr, names))


def _patterns(layers: str | Iterable[str]) -> list[str]:
    """The names and patterns of layers that a caller gave."""
    found = list(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else [layers]
    if not all(isinstance(pattern, str) for pattern in found):
        raise TypeError(
            f"layers must be names or patterns of layers, as model.named_modules() has them, got {checks.shown(layers)}"
        )
    return [str(pattern) for pattern in found]


def _in(every: dict[str, nn.Module]) -> dict[str, Site]:
    """All sites of the modules; the output projection of an attention layer is one of its parts."""
    parts = {
        f"{name}.out_proj".lstrip(".")
        for name, module in every.items()
        if isinstance(module, nn.MultiheadAttention) and sites.of_module(name, module)
    }
    return {
        site.name: site for name, module in every.items() if name not in parts for site in sites.of_module(name, module)
    }


def _module_name(name: str, site: Site) -> str:
    return name.removesuffix(site.part).rstrip(".") if site.part else name


def _unmeasured(every: dict[str, nn.Module], measured: set[nn.Module]) -> dict[str, str]:
    """Modules that multiply by weights and have no site, by name, with the reason.

    What makes the weight of another layer, in a parametrisation of it, is no layer itself.
    """
    makers = tuple(f"{name}." for name, module in every.items() if isinstance(module, ParametrizationList))
    found = {
        name: _reason(module)
        for name, module in every.items()
        if module not in measured and not f"{name}.".startswith(makers)
    }
    return {name: why for name, why in found.items() if why}


def _reason(module: nn.Module) -> str:
    """Why a module that multiplies by weights cannot be measured; "" of one that has none, or only scales by them."""
    for kind, why in sites.UNSERVED.items():
        if isinstance(module, kind):
            return why
    if isinstance(module, nn.Linear):
        return "it is a part of an attention layer, which does not call it"
    if plain_class(module) is not None:
        return OWN if own_forward(module) else "it is no Linear layer"
    if isinstance(module, nn.LayerNorm) or type(module).__name__ == "RMSNorm":
        return ""
    weights = [name for name, p in module.named_parameters(recurse=False) if _multiplies(name, p)]
    if not weights:
        return ""
    if isinstance(module, (nn.ParameterList, nn.ParameterDict)):
        return "its parameters are used where nothing is seen of it"
    return (
        f"{OWN}, with the parameter{'s' if weights[1:] else ''} {listed(weights[:3])}{', ...' if weights[3:] else ''}"
    )


def _multiplies(name: str, parameter: torch.Tensor) -> bool:
    """Whether a parameter may be a weight: what all samples have added, or are scaled by, has a length of 1 first."""
    if isinstance(parameter, UninitializedParameter):
        return True
    return parameter.ndim > 1 and (
        "weight" in name or (len(parameter) > 1 and (parameter.ndim == 2 or parameter[0].squeeze().ndim > 0))
    )
