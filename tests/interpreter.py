"""Triton's interpreter, sped up by half: it changes its language anew for every function that a kernel calls.

The changes of the launch still stand then, so that the others only take time. conftest.py loads this file where
kernels are interpreted; an interpreter that is built otherwise stays as it is.
"""

from __future__ import annotations

import functools
import inspect

import triton.language as tl
from triton.runtime import interpreter


@functools.cache
def _languages(fn) -> tuple:
    """The modules of the language that a function sees: what ``_patch_lang`` changes."""
    return tuple(value for value in fn.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core))


def once(patch):
    """The interpreter's ``_patch_lang``, but for what is changed already."""

    def patched(fn):
        if any(tl.core.is_builtin(language.dot) for language in _languages(fn)):
            return patch(fn)
        return interpreter._LangPatchScope()

    return patched


if hasattr(interpreter, "_LangPatchScope") and hasattr(interpreter, "_patch_lang"):
    interpreter._patch_lang = once(interpreter._patch_lang)
