from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

from dask_semdedup import errors
from dask_semdedup.errors import MissingColumnsError, SemDedupError, some

CLASSES = [getattr(errors, name) for name in errors.__all__ if name.endswith("Error")]


FILES = {
    errors.DataReadError: OSError,
    errors.DataNotFoundError: FileNotFoundError,
    errors.OutputError: OSError,
    errors.OutputExistsError: FileExistsError,
}


@pytest.mark.parametrize("cls", CLASSES)
def test_errors_survive_pickling(cls):
    error = cls("column 'x' of 3 rows", parameters=["id_field"], columns=["x"])
    for copied in (error, pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(copied) is cls
        assert isinstance(copied, SemDedupError)
        assert str(copied) == "column 'x' of 3 rows"
        assert (copied.parameters, copied.columns) == (("id_field",), ("x",))
    assert (cls("").parameters, cls("").columns) == ((), ())


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls is not SemDedupError])
def test_every_error_is_also_what_python_would_raise(cls):
    assert issubclass(cls, ImportError if cls is errors.MissingDependencyError else ValueError)
    assert issubclass(cls, FILES.get(cls, Exception))
    assert issubclass(cls, OSError) == (cls in FILES)


@pytest.mark.parametrize("caught", [KeyError, ValueError, SemDedupError])
def test_missing_columns_are_a_key_error_and_a_value_error_with_a_plain_message(caught):
    expected = r"^Required columns \['b', 'c'\] not found in the frame, which has \['a'\]\. Rename them\.$"
    with pytest.raises(caught, match=expected):
        raise MissingColumnsError.build(["a", "b", "c", "b"], ["a"], "Rename them.")


def test_missing_columns_built_without_advice_survive_pickling():
    error = MissingColumnsError.build(["x", "a"], ["a", "b"], parameters=["id_field"])
    assert (error.parameters, error.columns) == (("id_field",), ("x",))
    assert str(error) == "Required columns ['x'] not found in the frame, which has ['a', 'b']."
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([], ""),
        ([7], "7"),
        (["a", "b"], "a, b"),
        (range(5), "0, 1, 2, 3, 4"),
        (range(6), "0, 1, 2, 3, 4, ... (6 in all)"),
        (np.arange(6), "0, 1, 2, 3, 4, ... (6 in all)"),
        (iter("abcdef"), "a, b, c, d, e, ... (6 in all)"),
    ],
)
def test_some_lists_a_few_ids_and_counts_the_rest(ids, expected):
    assert some(ids) == expected
