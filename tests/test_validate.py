from __future__ import annotations

import numpy as np
import pytest

from dask_semdedup._validate import (
    check_bytes,
    check_choice,
    check_keywords,
    check_name,
    check_names,
    check_positive,
    check_seed,
)
from dask_semdedup.errors import InvalidArgumentError


def test_what_is_allowed_passes():
    check_choice("device", "cpu", ("cpu", "cuda"))
    for value in (None, 1, np.int32(7)):
        check_positive("embedding_dim", value)
    for value in (-1, 0, np.uint8(7)):
        check_seed(value)


@pytest.mark.parametrize("value", [None, ["id"], {"id"}])
def test_what_is_no_name(value):
    for name in ("id", 0, ("a", 1)):
        check_name("id_field", name)
    with pytest.raises(InvalidArgumentError, match="id_field must be the name of a column, not "):
        check_name("id_field", value)


@pytest.mark.parametrize("value", [0, -1, True, 1.0, "3"])
def test_what_is_not_positive(value):
    with pytest.raises(InvalidArgumentError, match=f"embedding_dim must be a positive integer or None, not {value!r}"):
        check_positive("embedding_dim", value)


@pytest.mark.parametrize("value", [None, False, 1.0, "3"])
def test_what_is_no_seed(value):
    with pytest.raises(InvalidArgumentError, match=f"random_seed must be an integer, not {value!r}"):
        check_seed(value)


def test_what_is_no_choice():
    with pytest.raises(InvalidArgumentError, match="device must be one of 'cpu', 'cuda', not None"):
        check_choice("device", None, ["cpu", "cuda"])


@pytest.mark.parametrize(
    ("check", "value"),
    [(check_bytes, "1 apple"), (check_bytes, -1), (check_choice, None), (check_names, "id"), (check_positive, 0)],
)
def test_errors_know_their_parameter(check, value):
    with pytest.raises(InvalidArgumentError, match=r"^size must be") as raised:
        check("size", value, *([["cpu"]] if check is check_choice else []))
    assert raised.value.parameters == ("size",)


@pytest.mark.parametrize(
    ("name", "hint"), [("epsilon", " Did you mean 'eps'?"), ("max_iters", " Did you mean 'max_iter'?"), ("x" * 9, "")]
)
def test_what_is_no_keyword(name, hint):
    def own(eps, **rest): ...

    def passed_on(max_iter): ...

    with pytest.raises(TypeError) as raised:
        check_keywords("own", ["max_iter", name], passed_on, own)
    assert str(raised.value) == f"own() got an unexpected keyword argument {name!r}.{hint}"
