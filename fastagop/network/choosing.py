"""Which sites of a model are measured, which are left out, and why."""

from __future__ import annotations

import fnmatch

import torch
from torch import nn

from fastagop.kernels.errors import warn
from fastagop.network import model_access, sites
from fastagop.network.model_access import Layers, first_names, listed
from fastagop.network.sites import Kind, Site, own_forward

_NAMES = [kind.__name__ for kind in sites.LAYERS]
SERVED = f"{', '.join(_NAMES[:-1])} or {_NAMES[-1]}"
OWN = "it has a forward of its own"
_SHOWN = 8  # A warning names at most so many layers.


class Chosen:
    """The sites that are measured by name, in the model's order, and the names of those left out, with the reason.

    Attributes:
        named: whether the caller named layers: then nothing is left out in silence, it is refused.
    """

    def __init__(self, model: nn.Module, layers: Layers, kinds: tuple[Kind, ...]):
        self.named = layers is not None
        self.skipped: dict[str, str] = {}
        self._kinds: dict[str, str] = {}
        every = dict(model.named_modules(remove_duplicate=not self.named))
        self.sites = _in(every)
        if self.named:
            self.sites = self._matching(model_access.named(() if layers is None else layers), every, kinds)
        if not self.sites:
            made = isinstance(model, torch.jit.ScriptModule)
            hint = "; give the module that torch.jit made it of" if made else ""
            raise ValueError(
                f"model must have a layer to measure ({SERVED}), this {type(model).__name__} has none{hint}"
            )
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
            for name, module in every.items():
                if model_access.unserved(module) and not sites.of_module(name, module):
                    self._note(name, module, reason(module))

    def _own(self, name: str, site: Site) -> str:
        """What to say of a Linear layer that cannot be measured: leave it out, and all like it."""
        rest = listed(other for other, one in self.sites.items() if one.part or not own_forward(one.module))
        what = f"leave it out, layers=[{rest}]" if rest else "name other layers"
        return (
            f"layers: {name!r} is a {type(site.module).__name__} with a forward of its own, not a plain "
            f"torch.nn.{getattr(sites.plain_class(site.module), '__name__', 'Linear')}; {what}"
        )

    def _matching(self, patterns: list[str], every: dict[str, nn.Module], kinds: tuple[Kind, ...]) -> dict[str, Site]:
        if not patterns:
            raise ValueError(f"layers must be None for all or name at least one, there are {listed(self.sites)}")
        names = {site: (name, _module_name(name, site)) for name, site in self.sites.items()}
        for pattern in patterns:
            found = [site for site, both in names.items() if any(fnmatch.fnmatchcase(name, pattern) for name in both)]
            if found and not any(site.kind in kinds for site in found):
                raise TypeError(f"layers: {found[0].name!r} is an Embedding, whose table has no W^T W to compare with")
            if found:
                continue
            other = [
                name for name in every if fnmatch.fnmatchcase(name, pattern) and model_access.unserved(every[name])
            ]
            if other:
                module = every[other[0]]
                raise TypeError(
                    f"layers: {other[0]!r} must be a torch.nn.{SERVED}, the kinds that are served, got a "
                    f"{type(module).__name__}: {reason(module)}"
                )
            raise ValueError(f"layers: no layer is called {pattern!r}, there are {listed(self.sites)}")
        matching = {
            name: site
            for name, site in self.sites.items()
            if any(fnmatch.fnmatchcase(either, pattern) for pattern in patterns for either in names[site])
        }
        return first_names(matching, lambda site: (site.module, site.part))

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
        """Leave out sites that did not run; refuse them where they were asked for."""
        model_access.refuse_uncalled(
            self.sites, {name for name, site in self.sites.items() if site in ran}, () if self.named else None
        )
        for name in [name for name, site in self.sites.items() if site not in ran]:
            self.skip(name, "the model's forward does not call it")

    def say(self) -> None:
        """Warn, where all layers were asked for, of those that are left out."""
        if self.skipped and not self.named:
            shown = [f"{name!r} ({self._kinds[name]}): {why}" for name, why in self.skipped.items()]
            more = f"; and {len(shown) - _SHOWN} more" if shown[_SHOWN:] else ""
            warn(
                f"network measures leave out {'; '.join(shown[:_SHOWN])}{more}. Name the layers to measure, "
                "layers=..., to silence this",
                UserWarning,
            )


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


def reason(module: nn.Module) -> str:
    """Why a module that multiplies by weights cannot be measured."""
    return next((why for kind, why in sites.UNSERVED.items() if isinstance(module, kind)), OWN)
