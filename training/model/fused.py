"""Attention of all users of a batch in fused kernels: nothing of size targets x events is ever stored (Triton, on a
GPU).

The same softmax, to rounding, as `training.model.blocks.block_attention`, which is the tested truth and what runs
elsewhere. The forward pass works a tile of targets and a chunk of its user's events at a time and joins the chunks by
their log sums; the backward pass is two kernels, one a tile (queries, rates and weights), one a block of events (keys
and values), without atomics: equal inputs give equal bits.

Contract: events and targets of a user are neighbours in flat arrays, events in order of time, and no event that a
target sees is newer than the target. Products take bf16 or TF32 operands; sums, maxima and exponentials are fp32.

Legend: E events (flat), T targets (flat), H heads, d head width, M kernel components; W pieces of work, X tiles, N
blocks.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from training.model.kernel import MixtureKernel

TILE = 64  # targets
BLOCK = 128  # events of a program that works out the gradients of keys and values
# Fastest on an H100 of those tried (benchmarks/LOG.md); the two passes by tiles differ by the width of their operands.
BY_TILE = {2: {"B": 64, "num_warps": 2, "num_stages": 2}, 4: {"B": 32, "num_warps": 2, "num_stages": 2}}
BY_BLOCK = {"P": 64, "B": BLOCK, "num_warps": 4, "num_stages": 2}
PIECES = 2048  # of work that are wanted at once: a dozen for each multiprocessor of a large GPU
LEAST_CHUNK = 512  # events: less work is not worth a join
WIDEST_HEAD = 128


@functools.cache
def _runs_on(index: int) -> bool:
    return importlib.util.find_spec("triton") is not None and torch.cuda.get_device_capability(index) >= (8, 0)


def available(like: Tensor) -> bool:
    """Say whether the fused kernels can work on a tensor [..., d].

    On a GPU from Ampere on, in single or half precision.
    """
    if like.device.type != "cuda" or like.dtype == torch.float64 or like.shape[-1] > WIDEST_HEAD:
        return False
    return _runs_on(like.device.index or 0)


@dataclass(frozen=True)
class Work:
    """What the programs of a batch work on, int64 tables on the device.

    Attributes:
        pieces_W5: first target, end of targets, first event of the user, first and last place of the chunk, of each
            piece.
        tiles_X4: first target, end of targets, first piece, end of pieces, of each tile.
        blocks_N5: first event of the user, first and last place of the block, the user's first target and end of
            targets, of each block.
        whole: all users of the batch are worked on; rows of others stay zeros.
    """

    pieces_W5: Tensor
    tiles_X4: Tensor
    blocks_N5: Tensor
    whole: bool = True

    @staticmethod
    def of(
        event_start: Sequence[int],
        target_start: Sequence[int],
        heads: int,
        device: torch.device,
        chosen_U: np.ndarray | None = None,
    ) -> Work:
        """Lay out users whose events and targets lie between neighbouring starts; the device is not waited for.

        Args:
            chosen_U: bool, the users to work on; None: all.
        """
        pieces, tiles, blocks = tables_on(device, work_tables(event_start, target_start, heads, chosen_U))
        return Work(pieces, tiles, blocks, whole=chosen_U is None or bool(chosen_U.all()))


def work_tables(
    event_start: Sequence[int] | np.ndarray,
    target_start: Sequence[int] | np.ndarray,
    heads: int,
    chosen_U: np.ndarray | None = None,
    rows: Sequence[int] = (0, 0, 0),
) -> list[np.ndarray]:
    """Return the tables of `Work`, int64 [W, 5], [X, 4] and [N, 5], with idle rows behind up to so many `rows`."""
    event_U, target_U = np.asarray(event_start, np.int64), np.asarray(target_start, np.int64)
    length_U, tiles_U = event_U[1:] - event_U[:-1], -(-(target_U[1:] - target_U[:-1]) // TILE)
    if chosen_U is not None:
        length_U, tiles_U = length_U * chosen_U, tiles_U * chosen_U
    user_X, tile_X = expanded(tiles_U)
    first_X = target_U[user_X] + TILE * tile_X
    stop_X = np.minimum(first_X + TILE, target_U[user_X + 1])
    even = int((length_U * tiles_U).sum()) * heads // PIECES
    chunk = -(-max(LEAST_CHUNK, even) // LEAST_CHUNK) * LEAST_CHUNK
    pieces_X = np.maximum(1, -(-length_U[user_X] // chunk))
    tile_W, place_W = expanded(pieces_X)
    user_W, place_W = user_X[tile_W], place_W * chunk
    ends_W = np.minimum(place_W + chunk, length_U[user_W])
    user_N, low_N = expanded(-(-length_U // BLOCK))
    low_N, last_X = low_N * BLOCK, pieces_X.cumsum()
    high_N = np.minimum(low_N + BLOCK, length_U[user_N])
    return [
        as_table([first_X[tile_W], stop_X[tile_W], event_U[user_W], place_W, ends_W], rows[0]),
        as_table([first_X, stop_X, last_X - pieces_X, last_X], rows[1]),
        # A block of no event: its program reads the row before its first one.
        as_table([event_U[user_N], low_N, high_N, target_U[user_N], target_U[user_N + 1]], rows[2], (1, 0, 0, 0, 0)),
    ]


def as_table(columns: Sequence[np.ndarray], rows: int = 0, idle: Sequence[int] | int = 0) -> np.ndarray:
    """Return columns side by side, int64, with idle rows behind up to so many `rows`."""
    count = len(columns[0])
    table = np.empty((max(count, rows), len(columns)), np.int64)
    for number, column in enumerate(columns):
        table[:count, number] = column
    table[count:] = idle
    return table


def tables_on(device: torch.device, tables: Sequence[np.ndarray]) -> list[Tensor]:
    """Copy tables to a device at once, without waiting for what it is doing."""
    flat = on_device(np.concatenate([table.ravel() for table in tables]), device)
    parts = flat.split([table.size for table in tables])
    return [part.view(table.shape) for part, table in zip(parts, tables, strict=True)]


def on_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy to a device without waiting for what it is doing."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def padded(count: int) -> int:
    """Return the power of two that a kernel works on for so many columns or codes: a product has 16 at least."""
    return max(16, 1 << (count - 1).bit_length())


def expanded(count_X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return, for `count` rows of every x in turn, x and the row's number within it."""
    of = np.arange(len(count_X)).repeat(count_X)
    return of, np.arange(len(of)) - (count_X.cumsum() - count_X)[of]


@dataclass(frozen=True)
class Seen:
    """What each target sees, and when.

    Attributes:
        event_ms_E, target_ms_T: int64 milliseconds.
        end_T, first_T: int64 places in the user's history: a target sees [first, end); without `first`, from the
            beginning.
        exact_from_T: int64, the place from which a target's events have exact keys; None: nowhere.
    """

    event_ms_E: Tensor
    target_ms_T: Tensor
    end_T: Tensor
    first_T: Tensor | None = None
    exact_from_T: Tensor | None = None


def fused_attention(
    work: Work,
    query_THd: Tensor,
    key_EHd: Tensor,
    value_EHd: Tensor,
    seen: Seen,
    kernel: MixtureKernel | None,
    exact_EHd: Tensor | None = None,
) -> Tensor:
    """Softmax attention of every target over the events it sees, in one pass over all users.

    Args:
        key_EHd: keys; in VQL the codewords, straight through.
        exact_EHd: exact keys of the events from `seen.exact_from_T` on. Their gradient is added to that of `key_EHd`,
            which is theirs, straight through.

    Returns:
        [T, H, d], fp32; zeros for a target that sees no event, and for users who were not chosen.
    """
    dtype, precision = precision_of(query_THd)
    query, key, value = (rows.to(dtype).contiguous() for rows in (query_THd, key_EHd, value_EHd))
    exact = None if exact_EHd is None else exact_EHd.detach().to(dtype).contiguous()
    heads = query_THd.shape[1]
    if kernel is None:
        rate_HM = log_weight_HM = torch.zeros(heads, 0, device=query_THd.device)
    else:
        rate_HM, log_weight_HM = kernel.rate_HM().float(), kernel.log_weight_HM().float()
    return _Attention.apply(query, key, value, rate_HM, log_weight_HM, _Given(exact, work, seen, precision))


def precision_of(like: Tensor) -> tuple[torch.dtype, str]:
    """Return the precision of operands and that of the products of fp32 operands, by autocast and torch's setting."""
    if torch.is_autocast_enabled(like.device.type):
        return torch.get_autocast_dtype(like.device.type), "tf32"
    return torch.float32, "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


class _Given(NamedTuple):
    """What has no gradient."""

    exact: Tensor | None
    work: Work
    seen: Seen
    precision: str


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, rate_HM, log_weight_HM, given: _Given) -> Tensor:
        from training.model import fused_kernels as kernels

        launch, work = _Launch(query, key, value, rate_HM, log_weight_HM, given), given.work
        targets, heads, width = query.shape
        make = query.new_empty if work.whole else query.new_zeros
        out_THd = make(targets, heads, width, dtype=torch.float32)
        lse_TH = out_THd.new_empty(targets, heads)
        if len(work.pieces_W5):
            part_out = out_THd.new_empty(len(work.pieces_W5), heads, TILE, launch.padded)
            part_lse = out_THd.new_empty(part_out.shape[:3])
            launch(
                kernels.forward_kernel,
                len(work.pieces_W5),
                work.pieces_W5,
                part_out,
                part_lse,
                P=TILE,
                **launch.by_tile,
            )
            kernels.join_kernel[(heads * len(work.tiles_X4),)](
                part_out, part_lse, work.tiles_X4, out_THd, lse_TH, HEADS=heads, D=width, DP=launch.padded, P=TILE
            )
        ctx.save_for_backward(query, key, value, rate_HM, log_weight_HM, out_THd, lse_TH)
        ctx.given = given
        return out_THd

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_THd: Tensor):
        from training.model import fused_kernels as kernels

        query, key, value, rate_HM, log_weight_HM, out_THd, lse_TH = ctx.saved_tensors
        launch, work = _Launch(query, key, value, rate_HM, log_weight_HM, ctx.given), ctx.given.work
        (targets, heads, width), components = query.shape, rate_HM.shape[1]
        grad_THd = grad_THd.contiguous()
        rounded_THd, base_TH = torch.empty_like(query), torch.empty_like(lse_TH)
        make = torch.empty_like if work.whole else torch.zeros_like
        grad_query_THd, grad_key_EHd, grad_value_EHd = make(out_THd), make(key), make(value)
        columns = max(2, 1 << (2 * components - 1).bit_length())
        part_sums = out_THd.new_empty(len(work.pieces_W5), heads, columns)
        if len(work.pieces_W5):
            part_query = out_THd.new_empty(len(work.pieces_W5), heads, TILE, launch.padded)
            kernels.base_kernel[(-(-targets * heads // TILE),)](
                grad_THd,
                out_THd,
                rounded_THd,
                base_TH,
                targets * heads,
                D=width,
                DP=launch.padded,
                P=TILE,
                PRECISION=ctx.given.precision,
            )
            given = rounded_THd, lse_TH, base_TH
            launch(
                kernels.query_kernel,
                len(work.pieces_W5),
                work.pieces_W5,
                *given,
                part_query,
                part_sums,
                W=columns,
                P=TILE,
                **launch.by_tile,
            )
            kernels.sum_kernel[(heads * len(work.tiles_X4),)](
                part_query, work.tiles_X4, grad_query_THd, HEADS=heads, D=width, DP=launch.padded, P=TILE
            )
        if len(work.blocks_N5):
            given = rounded_THd, lse_TH, base_TH
            launch(
                kernels.event_kernel,
                len(work.blocks_N5),
                work.blocks_N5,
                *given,
                grad_key_EHd,
                grad_value_EHd,
                **BY_BLOCK,
            )
        sums_HMk = part_sums.sum(0)[:, : 2 * components].unflatten(1, (components, 2))
        rows = grad_query_THd.to(query.dtype), grad_key_EHd, grad_value_EHd
        return *rows, -sums_HMk[..., 1], sums_HMk[..., 0], None


class _Launch:
    """What all kernels of a batch are given alike."""

    def __init__(self, query, key, value, rate_HM, log_weight_HM, given: _Given) -> None:
        exact, seen = given.exact, given.seen
        self.heads, width = query.shape[1:]
        self.by_tile = BY_TILE[query.element_size()]
        self.padded = padded(width)
        far = key if exact is None else exact
        ends = [seen.end_T if places is None else places for places in (seen.first_T, seen.exact_from_T)]
        self.inputs = [
            query,
            key,
            far,
            value,
            seen.event_ms_E,
            seen.target_ms_T,
            seen.end_T,
            *ends,
            rate_HM,
            log_weight_HM,
        ]
        self.constants: dict[str, Any] = {
            "HEADS": self.heads,
            "D": width,
            "DP": self.padded,
            "M": rate_HM.shape[1],
            "FIRST": seen.first_T is not None,
            "EXACT": exact is not None,
            "PRECISION": given.precision,
        }

    def __call__(self, kernel, programs: int, *more: Tensor, **constants: Any) -> None:
        kernel[(programs * self.heads,)](*self.inputs, *more, **self.constants, **constants)
