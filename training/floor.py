"""The least time that a training step could take on a card: what is computed and moved, over what the card can do.

Counted, not measured. A step computes and moves at the same time, so that its floor is the longest of four times: of
matrix products, exponentials, issued instructions and bytes of the card's memory. Counted are the pass over the
histories as blocks of events and tiles of targets, forward and in two kernels backward, the rows of the batch, the head
and AdamW; the rest (gathers of items, keys and values of items, clipping) is left out, which makes the floor lower.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from training.config import ModelConfig
from training.data import Batch, Chosen
from training.device_batches import EVENT_BYTES

PASSES = 3  # over pairs: forward, backward for the targets, backward for the events
ADAMW_BYTES = 28  # of a parameter: weight, gradient and two moments are read, all but the gradient written


@dataclass(frozen=True)
class Work:
    """What a step does.

    Attributes:
        flops: of matrix products; lanes: instructions, each of one lane of a warp.
    """

    flops: float
    exponentials: float
    lanes: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops,
            self.exponentials + other.exponentials,
            self.lanes + other.lanes,
            self.bytes + other.bytes,
        )


@dataclass(frozen=True)
class Card:
    """What a card can do in a second by its datasheet; flops by precision."""

    flops: dict[str, float]
    exponentials: float
    lanes: float
    bytes: float


# 132 multiprocessors at 1.98 GHz, each with 128 lanes and 16 exponentials a cycle. A product in fp32 is three in TF32.
_HOPPER = {"bf16": 989e12, "tf32": 495e12, "fp32": 165e12}, 4.18e12, 33.5e12
CARDS = {"NVIDIA H100 80GB HBM3": Card(*_HOPPER, 3.35e12), "NVIDIA H200": Card(*_HOPPER, 4.8e12)}


@dataclass(frozen=True)
class Counts:
    """What a step reads.

    Attributes:
        pairs: of a target and an event that it sees.
        segments: targets of a user with equal cut-offs share one.
    """

    targets: int
    events: int
    pairs: int
    segments: int

    @staticmethod
    def of(batch: Batch) -> Counts:
        """Count a batch of the host's."""
        pairs = int((batch.target_end - batch.target_first).sum())
        return Counts(len(batch.target_item), len(batch.event_item), pairs, sum(batch.cut_offs))

    @staticmethod
    def of_chosen(chosen: Chosen) -> Counts:
        """Count the batch that `training.data.make_batch` makes of it."""
        return Counts(len(chosen.target), int(chosen.event_start[-1]), chosen.pairs, int(chosen.cut_offs.sum()))


def card_of(device: str) -> Card | None:
    """Return what a worker's device can do; None for one whose datasheet is not here."""
    return CARDS.get(torch.cuda.get_device_name(device)) if device.startswith("cuda") else None


def floor_ms(card: Card, work: Work, precision: str) -> float:
    """Return the longest of the four times."""
    times = (
        work.flops / card.flops[precision],
        work.exponentials / card.exponentials,
        work.lanes / card.lanes,
        work.bytes / card.bytes,
    )
    return 1_000 * max(times)


def least_ms(card: Card, counts: Counts, config: ModelConfig, precision: str, parameters: int) -> float | None:
    """Return the floor of a step, of the cheapest way where there are two; None for a kind that is not counted.

    Args:
        precision: bf16, tf32 or fp32, of products.
        parameters: that AdamW moves.
    """
    stored = 2 if precision == "bf16" else 4  # bytes of a number of a key or value
    rest = _rest(counts, config, parameters)
    if config.interest == "softmax_attention":
        ways = [_over_pairs(counts, config, products=2 + 2 * 2 + 3) + _events(counts, 2 * config.width, 0, stored)]
    elif config.interest == "vql" and not (config.refine_k or config.recent_window):
        by_codes = _events(counts, config.width, config.groups, stored) + _logits_of_codes(counts, config)
        ways = [by_codes + _over_pairs(counts, config, products=1 + 2 + 1), by_codes + _by_segments(counts, config)]
    else:
        return None
    return min(floor_ms(card, way + rest, precision) for way in ways)


def _rest(counts: Counts, config: ModelConfig, parameters: int) -> Work:
    """Return the work of the head and of AdamW."""
    widths = [3 * config.width, *config.mlp, 1]
    head = sum(wide * narrow for wide, narrow in itertools.pairwise(widths))
    return Work(6 * counts.targets * head, 0, 0, ADAMW_BYTES * parameters)


def _events(counts: Counts, numbers: int, codes: int, stored: int) -> Work:
    """Return what is moved of the events: twice read, their gradients written once.

    Args:
        numbers: of an event's key and value; codes: bytes of its codes.
    """
    return Work(0, 0, 0, counts.events * (EVENT_BYTES + 2 * codes + numbers * (2 * stored + 4)))


def _over_pairs(counts: Counts, config: ModelConfig, products: int) -> Work:
    """Return the work on pairs of a target and an event that it sees.

    Args:
        products: multiply-adds of two vectors of a head's width, forward and backward. Exact: logits and sum; logits
            and gradients of weights again in each of two kernels; gradients of query, key and value.
    """
    pairs = config.heads * counts.pairs
    return Work(2 * config.head_width * products * pairs, PASSES * pairs, _lanes(config) * pairs, 0)


def _lanes(config: ModelConfig) -> int:
    """Return the instructions of a pair beside products.

    Forward: scale, maximum, exponential, sum, conversion. Backward, in each of two kernels: scale, exponential, weight;
    gradient of the logit in two; one of them converts two results. A component of the kernel is a multiply-add in each
    pass, and two for the gradients of its rate and weight.
    """
    return 17 + 5 * config.kernel_components


def _codes(config: ModelConfig) -> float:
    """Return the codewords of a group; of groups with numbers of their own the mean: each has an equal part of the
    width.
    """
    return config.codes if isinstance(config.codes, int) else sum(config.codes) / len(config.codes)


def _logits_of_codes(counts: Counts, config: ModelConfig) -> Work:
    """Return the work of every target's products with every codeword, and of their two gradients."""
    return Work(3 * 2 * config.width * _codes(config) * counts.targets, 0, 0, 0)


def _by_segments(counts: Counts, config: ModelConfig) -> Work:
    """Return the work of sums of values by segment and code, which every target of the segment shares."""
    components = max(1, config.kernel_components)
    cells = config.heads * _codes(config) * counts.targets
    products = 2 * config.head_width * components * 4 * cells  # the sum; twice its gradient; that of the tables
    added = 2 * components * counts.events  # values into the tables, and their gradients out of them
    tables = counts.segments * _codes(config) * config.width * components * 4 * 4  # fp32; written and read twice
    exponentials = PASSES * cells + added * config.heads
    return Work(products, exponentials, _lanes(config) * cells + added * config.width, tables)
