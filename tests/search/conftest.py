"""Settings that every test of the search shares."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def language_is_replaced_once() -> Iterator[None]:
    """Triton's interpreter replaces its language for each call within a kernel, too: that takes half of the time."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        yield
        return
    language, replace = interpreter.tl, interpreter._patch_lang

    def once(function: Callable[..., Any]) -> Any:
        used = [module for module in (language, language.core) if module in function.__globals__.values()]
        is_replaced = not any(language.core.is_builtin(module.load) for module in used)
        return interpreter._LangPatchScope() if is_replaced else replace(function)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", once)
        yield
