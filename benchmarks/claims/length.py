"""Error of quantized attention by length of the history, sharpness of the logits and tails of the keys, on a trained
model's keys.

Legend: N items, L events, T queries, H heads, d head width, C codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from training.model.probe import attention_errors
from training.model.quantizer import GroupedQuantizer

LENGTHS = (100, 1_000, 10_000, 100_000)
QUERIES, SCALES, TOP = 16, (0.25, 0.5, 1.0, 2.0, 4.0), 100


def attention_error_by_length(
    key_NHd: Tensor, hard_NHd: Tensor, query_NHd: Tensor, count_N: Tensor, seed: int
) -> list[dict]:
    """Histories of items drawn by their popularity, queries of other items; the codebook stays as it was trained."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in LENGTHS:
        event_L = torch.multinomial(count_N, length, replacement=True, generator=generator)
        query_THd = query_NHd[torch.multinomial(count_N, QUERIES, generator=generator)]
        key_LHd, hard_LHd = key_NHd[event_L], hard_NHd[event_L]
        found.append(
            {"length": length, **_means(query_THd, key_LHd, hard_LHd), "top_100_error": _top_error(query_THd, key_LHd)}
        )
    return found


def logit_scales(key_NHd: Tensor, hard_NHd: Tensor, query_NHd: Tensor, count_N: Tensor, seed: int) -> list[dict]:
    """The same keys under logits that are flatter and sharper than the trained ones."""
    generator = torch.Generator().manual_seed(seed)
    event_L = torch.multinomial(count_N, 10_000, replacement=True, generator=generator)
    query_THd = query_NHd[torch.multinomial(count_N, QUERIES, generator=generator)]
    return [{"scale": scale, **_means(scale * query_THd, key_NHd[event_L], hard_NHd[event_L])} for scale in SCALES]


def heavy_tails(key_NHd: Tensor, hard_NHd: Tensor, query_NHd: Tensor, count_N: Tensor, seed: int) -> list[dict]:
    """Directions of the trained keys with lengths of |Student's t, 3 degrees|, a codebook fitted to 1,000 of them, by
    length of history.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    heads, width = key_NHd.shape[1:]
    tails = torch.distributions.StudentT(3.0)
    quantizer = GroupedQuantizer(heads, 64, width)

    def drawn(length: int) -> Tensor:
        return (
            key_NHd[torch.multinomial(count_N, length, replacement=True, generator=generator)]
            * tails.sample((length, 1, 1)).abs()
        )

    quantizer.start_from_keys(drawn(1_000), generator)
    query_THd = query_NHd[torch.multinomial(count_N, QUERIES, generator=generator)]
    found = []
    for length in LENGTHS:
        key_LHd = drawn(length)
        hard_LHd = quantizer.quantized(quantizer.search(key_LHd), key_LHd)
        found.append({"length": length, **_means(query_THd, key_LHd, hard_LHd)})
    return found


def _means(query_THd: Tensor, key_LHd: Tensor, hard_LHd: Tensor) -> dict:
    errors = attention_errors(query_THd, key_LHd, hard_LHd)
    return {
        "error": float(errors.error.mean()),
        "error_max": float(errors.error.max()),
        "bound": float(errors.bound.mean()),
        "half_delta": float(errors.delta.mean() / 2),
        "cauchy": float(errors.cauchy.mean()),
        "eps_max": float((key_LHd - hard_LHd).norm(dim=-1).max()),
        "holds": bool((errors.error <= errors.bound + 1e-9).all()),
    }


def _top_error(query_THd: Tensor, key_LHd: Tensor) -> float:
    """L1 distance of attention over the 100 highest logits, renormalised, from attention over all.

    2 (1 - their mass).
    """
    alpha_HTL = (query_THd.double().transpose(0, 1) @ key_LHd.double().permute(1, 2, 0)).softmax(-1)
    return float((2 * (1 - alpha_HTL.topk(min(TOP, alpha_HTL.shape[-1]), dim=-1).values.sum(-1))).mean())
