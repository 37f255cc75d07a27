"""Attention of all users of a batch in one pass: histories cut into blocks of events, targets into tiles, none padded
to the longest.

On a GPU a loop over users is bound by its launches, whatever the histories' lengths (benchmarks/LOG.md); here the
number of operations does not depend on the number of users. Every (block, tile) pair of one user is a row of batched
products; the softmax of a target is joined over the blocks of its user by sums, with one maximum for all of them: the
very softmax over the user's events. Time and memory grow with the events of the batch, not with users x the longest
history.

Legend: E events (flat), T targets (flat), N (block, tile) pairs, B events of a block, P targets of a tile, X tiles, H
heads, d head width, K refined events.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from etl.warehouse.partitions import MS_PER_DAY
from training.model.fused import Seen
from training.model.history import Targets
from training.model.kernel import MixtureKernel

BLOCK, TILE = 256, 64
MOST_PAIRS = 4096  # a gigabyte of logits at four heads
UNSEEN = 2**40  # a place behind every cut-off


@dataclass(frozen=True)
class Layout:
    """Which events meet which targets.

    Attributes:
        event_NB, target_NP: int64, positions in the flat arrays; padding repeats a real position.
        place_NB: int64, an event's position in its user's history; `UNSEEN` for padding.
        tile_N: int64, tile of each pair; pairs of a tile are neighbours.
        slot_T: int64, position of each of the layout's targets in the flattened [X, P].
        tiles: X.
    """

    event_NB: Tensor
    target_NP: Tensor
    place_NB: Tensor
    tile_N: Tensor
    slot_T: Tensor
    tiles: int

    @staticmethod
    def of(
        event_start: list[int],
        target_start: list[int],
        device: torch.device,
        block: int = BLOCK,
        tile: int = TILE,
        most_pairs: int = MOST_PAIRS,
    ) -> list[Layout]:
        """Lay out users whose events and targets lie between neighbouring starts.

        Returns:
            layouts of consecutive targets, one if there are no more than `most_pairs` pairs: their results are
            concatenated.
        """
        tile = max(1, min(tile, max((b - a for a, b in itertools.pairwise(target_start)), default=1)))
        layouts: list[Layout] = []
        pairs: list[tuple[int, int, int, int, int]] = []  # first event, its place, events, first target, tile
        slots: list[int] = []
        tiles = 0
        for (event, stop), (target, last) in zip(
            itertools.pairwise(event_start), itertools.pairwise(target_start), strict=True
        ):
            for first in range(target, last, tile):
                mine = [(e, e - event, min(block, stop - e), first, tiles) for e in range(event, stop, block)]
                if pairs and len(pairs) + len(mine) > most_pairs:
                    layouts.append(Layout._of(pairs, slots, tiles, target_start[-1], device, block, tile))
                    mine = [(*pair[:4], 0) for pair in mine]
                    pairs, slots, tiles = [], [], 0
                pairs += mine
                slots += range(tiles * tile, tiles * tile + min(tile, last - first))
                tiles += 1
        return [*layouts, Layout._of(pairs, slots, tiles, target_start[-1], device, block, tile)]

    @staticmethod
    def _of(
        pairs: list[tuple[int, int, int, int, int]],
        slots: list[int],
        tiles: int,
        targets: int,
        device: torch.device,
        block: int,
        tile: int,
    ) -> Layout:
        table = torch.tensor(pairs, dtype=torch.long).reshape(-1, 5).to(device, non_blocking=True)
        event_N, place_N, count_N, target_N, tile_N = table.unbind(1)
        step_B, step_P = torch.arange(block, device=device), torch.arange(tile, device=device)
        real_NB = step_B < count_N[:, None]
        return Layout(
            event_NB=event_N[:, None] + torch.where(real_NB, step_B, 0),
            target_NP=(target_N[:, None] + step_P).clamp(max=max(targets - 1, 0)),
            place_NB=torch.where(real_NB, place_N[:, None] + step_B, UNSEEN),
            tile_N=tile_N.contiguous(),
            slot_T=torch.tensor(slots, dtype=torch.long).to(device, non_blocking=True),
            tiles=tiles,
        )

    def events(self, rows_EHd: Tensor) -> Tensor:
        """Gather [E, H, d] -> [H, N, B, d]."""
        return rows_EHd.index_select(0, self.event_NB.flatten()).unflatten(0, self.event_NB.shape).permute(2, 0, 1, 3)

    def targets(self, rows_THd: Tensor) -> Tensor:
        """Gather [T, H, d] -> [H, N, P, d]."""
        return rows_THd.index_select(0, self.target_NP.flatten()).unflatten(0, self.target_NP.shape).permute(2, 0, 1, 3)

    def seen(self, end_T: Tensor) -> Tensor:
        """Return which events lie before each target's cut-off, bool [N, P, B]."""
        return self.place_NB[:, None] < end_T[self.target_NP][..., None]

    def visible(self, targets: Targets) -> Tensor:
        """Return which events each target may see, bool [N, P, B]."""
        seen_NPB, first_T = self.seen(targets.end_T), targets.bound_T
        return seen_NPB if first_T is None else seen_NPB & ~self.seen(first_T)

    def summed(self, part_HNPx: Tensor) -> Tensor:
        """Sum over the blocks of each tile, [H, N, P, x] -> one row a target, [T, H, x]."""
        heads, _, tile, width = part_HNPx.shape
        total_HXPx = part_HNPx.new_zeros(heads, self.tiles, tile, width).index_add(1, self.tile_N, part_HNPx)
        return total_HXPx.flatten(1, 2).index_select(1, self.slot_T).transpose(0, 1)


class Exact(NamedTuple):
    """Keys that are not at their codewords.

    Attributes:
        key_EHd: used for events from `Seen.exact_from_T` on, the exact recent window; without that, none is recent.
        refine: so many events of the highest quantized logits before it have them, too, newer ones first among equals.
    """

    key_EHd: Tensor
    refine: int = 0


def block_attention(
    layout: Layout,
    query_THd: Tensor,
    key_EHd: Tensor,
    value_EHd: Tensor,
    seen: Seen,
    kernel: MixtureKernel | None,
    exact: Exact | None = None,
) -> Tensor:
    """Softmax attention of every target over the events that it sees, exact for every target.

    Args:
        key_EHd: keys of the events, at their codewords in VQL.

    Returns:
        the layout's targets, [T, H, d] in the queries' precision; zeros for a target that may see no event.
    """
    if layout.event_NB.shape[0] == 0:
        return query_THd.new_zeros(len(layout.slot_T), *query_THd.shape[1:])
    query_HNPd, value_HNBd = layout.targets(query_THd), layout.events(value_EHd)
    logit_HNPB = (query_HNPd @ layout.events(key_EHd).transpose(2, 3)).to(query_THd.dtype)
    bias_HNPB = None
    if kernel is not None:
        age_NPB = age_days_of_pairs(layout, seen.event_ms_E, seen.target_ms_T, query_THd.dtype)
        bias_HNPB = kernel.log_kernel_of_age(age_NPB[None]).to(logit_HNPB.dtype)
    hidden_NPB = ~layout.seen(seen.end_T)
    if seen.first_T is not None:
        hidden_NPB = hidden_NPB | layout.seen(seen.first_T)
    if exact is not None:
        exact_HNPB = (query_HNPd @ layout.events(exact.key_EHd).transpose(2, 3)).to(query_THd.dtype)
        coarse_NPB = ~hidden_NPB if seen.exact_from_T is None else ~hidden_NPB & layout.seen(seen.exact_from_T)
        chosen_HNPB = ~coarse_NPB[None]
        if exact.refine:
            with torch.no_grad():
                score_HNPB = logit_HNPB if bias_HNPB is None else logit_HNPB + bias_HNPB
                chosen_HNPB = chosen_HNPB | highest(
                    layout, score_HNPB.masked_fill(~coarse_NPB, float("-inf")), exact.refine
                )
        logit_HNPB = torch.where(chosen_HNPB, exact_HNPB, logit_HNPB)
    if bias_HNPB is not None:
        logit_HNPB = logit_HNPB + bias_HNPB
    logit_HNPB = logit_HNPB.masked_fill(hidden_NPB, float("-inf"))
    return softmax_over_blocks(layout, logit_HNPB, value_HNBd, query_THd.dtype)


def softmax_over_blocks(layout: Layout, logit_HNPB: Tensor, value_HNBd: Tensor, dtype: torch.dtype) -> Tensor:
    """Mix values by the softmax of each target's logits over all blocks of its user.

    Args:
        logit_HNPB: -inf where a target does not see an event.

    Returns:
        the layout's targets, [T, H, d] of that dtype; zeros where all logits are -inf.
    """
    # The largest logit over all blocks of a user, so that their sums can be added; it cancels, and needs no gradient.
    with torch.no_grad():
        index_HNP = layout.tile_N[None, :, None].expand(logit_HNPB.shape[:3])
        empty_HXP = logit_HNPB.new_full((len(logit_HNPB), layout.tiles, logit_HNPB.shape[2]), float("-inf"))
        top_HXP = empty_HXP.scatter_reduce(1, index_HNP, logit_HNPB.amax(-1), "amax")
        top_HNP1 = torch.where(top_HXP.isinf(), 0.0, top_HXP)[:, layout.tile_N, :, None]
    weight_HNPB = (logit_HNPB - top_HNP1).exp()
    total_TH1 = layout.summed(weight_HNPB.sum(-1, keepdim=True))
    mixed_THd = layout.summed((weight_HNPB @ value_HNBd).to(dtype))
    return mixed_THd / torch.where(total_TH1 > 0, total_TH1, 1.0)


def age_days_of_pairs(layout: Layout, event_time_ms_E: Tensor, target_time_ms_T: Tensor, dtype: torch.dtype) -> Tensor:
    """Ages in days, [N, P, B], never negative.

    From the block's newest event, so that no difference is taken in single precision.
    """
    event_ms_NB = event_time_ms_E[layout.event_NB]
    newest_ms_N1 = event_ms_NB.amax(1, keepdim=True)
    before_NB = ((newest_ms_N1 - event_ms_NB).double() / MS_PER_DAY).to(dtype)
    since_NP = ((target_time_ms_T[layout.target_NP] - newest_ms_N1).double() / MS_PER_DAY).to(dtype)
    return (since_NP[..., None] + before_NB[:, None]).clamp(min=0)


@torch.compiler.disable
def highest(layout: Layout, score_HNPB: Tensor, count: int) -> Tensor:
    """Mark each target's `count` highest scores over all blocks of its user, bool [H, N, P, B].

    Newer events come first among equals; a score of -inf is never marked.
    """
    ranked_HNPB = score_HNPB.double() + 1e-12 * layout.place_NB[None, :, None]  # newer ones first among equals
    ranked_HNPB = ranked_HNPB.masked_fill(score_HNPB.isinf(), float("-inf"))
    each = min(count, ranked_HNPB.shape[-1])
    heads, _, tile, _ = ranked_HNPB.shape
    # Only a block's own best can be among the best of the user.
    best_HNPK = ranked_HNPB.topk(each, dim=-1).values
    count_X = torch.bincount(layout.tile_N, minlength=layout.tiles)
    start_X = count_X.cumsum(0) - count_X
    least_HXP1 = ranked_HNPB.new_full((heads, layout.tiles, tile, 1), torch.inf)
    size_of_X = [1 << (blocks - 1).bit_length() if blocks else 0 for blocks in count_X.tolist()]
    for size in set(size_of_X) - {0}:  # tiles that meet about as many blocks together, so that few are padding
        tile_Y = torch.tensor([x for x, of in enumerate(size_of_X) if of == size], device=count_X.device)
        step_S = torch.arange(size, device=count_X.device)
        pair_YS = (start_X[tile_Y, None] + step_S).clamp(max=len(layout.tile_N) - 1)
        candidate_HYSPK = best_HNPK[:, pair_YS].masked_fill(
            (step_S >= count_X[tile_Y, None])[None, :, :, None, None], float("-inf")
        )
        candidate_HYPK = candidate_HYSPK.transpose(2, 3).flatten(3)
        least_HXP1[:, tile_Y] = candidate_HYPK.topk(min(count, candidate_HYPK.shape[-1]), dim=-1).values[..., -1:]
    return (ranked_HNPB >= least_HXP1[:, layout.tile_N]) & ~ranked_HNPB.isinf()
