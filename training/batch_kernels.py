"""Triton kernels that gather a batch's rows where they lie: what `device_batches.read_rows` does in dozens of launches.

Legend: U users, E events (flat), T targets (flat).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from training.device_batches import Read, Sizes

ROWS = 256  # of a program


@triton.jit
def _user(start, place_B, users, STEPS: tl.constexpr):
    """The user in whose part of a flat array each place lies: the last one whose start is not behind it."""
    low_B = tl.zeros_like(place_B)
    high_B = low_B + users
    for _ in tl.static_range(STEPS):
        middle_B = (low_B + high_B) // 2
        before_B = tl.load(start + middle_B) <= place_B
        low_B = tl.where(before_B, middle_B, low_B)
        high_B = tl.where(before_B, high_B, middle_B)
    return low_B


@triton.jit
def events_kernel(
    count, start, source, item, interaction, time, out_item, out_interaction, out_time, weight, events, history, users,
    STEPS: tl.constexpr, B: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Copy the rows of a batch's events; if `PADDED`, say which of them are real."""
    place_B = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside_B = place_B < events
    user_B = _user(start, place_B, users, STEPS)
    from_B = place_B + tl.load(source + user_B) - tl.load(start + user_B)
    if PADDED:
        from_B = tl.minimum(from_B, history - 1)
        tl.store(weight + place_B, (place_B < tl.load(count + 1)).to(tl.float32), inside_B)
    tl.store(out_item + place_B, tl.load(item + from_B, inside_B, other=0).to(tl.int64), inside_B)
    tl.store(out_interaction + place_B, tl.load(interaction + from_B, inside_B, other=0).to(tl.int64), inside_B)
    tl.store(out_time + place_B, tl.load(time + from_B, inside_B, other=0), inside_B)


@triton.jit
def targets_kernel(
    count, start, event_start, first_event, user, target, item, time, context, label, first, end,
    out_item, out_time, out_context, out_label, out_first, out_end, out_user, weight, begin, targets, users,
    STEPS: tl.constexpr, B: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Copy the rows of a batch's targets and whose they are; if `PADDED`, say which are real and where events begin."""
    place_B = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside_B = place_B < targets
    user_B = _user(start, place_B, users, STEPS)
    from_B = tl.load(target + place_B, inside_B, other=0)
    tl.store(out_item + place_B, tl.load(item + from_B, inside_B, other=0).to(tl.int64), inside_B)
    tl.store(out_time + place_B, tl.load(time + from_B, inside_B, other=0), inside_B)
    tl.store(out_context + place_B, tl.load(context + from_B, inside_B, other=0).to(tl.int64), inside_B)
    tl.store(out_label + place_B, tl.load(label + from_B, inside_B, other=0).to(tl.float32), inside_B)
    tl.store(out_user + place_B, tl.load(user + user_B), inside_B)
    before_B = tl.load(first_event + user_B)
    first_B = tl.load(first + from_B, inside_B, other=0).to(tl.int64) - before_B
    end_B = tl.load(end + from_B, inside_B, other=0).to(tl.int64) - before_B
    if PADDED:
        real_B = place_B < tl.load(count)
        first_B, end_B = tl.where(real_B, first_B, 0), tl.where(real_B, end_B, 0)
        tl.store(weight + place_B, real_B.to(tl.float32), inside_B)
        tl.store(begin + place_B, tl.load(event_start + user_B), inside_B)
    tl.store(out_first + place_B, first_B, inside_B)
    tl.store(out_end + place_B, end_B, inside_B)


def read_rows(columns: dict[str, Tensor], parts: list[Tensor], sizes: Sizes, padded: bool) -> Read:
    """Return what `device_batches.read_rows` does, by two launches."""
    count, event_start, target_start, source, first, user, target = parts
    events, targets, users = sizes.events, sizes.targets, sizes.users
    item_R, event_2E, target_6T = (
        target.new_empty(events + targets),
        target.new_empty(2, events),
        target.new_empty(6, targets),
    )
    label_T = target.new_empty(targets, dtype=torch.float32)
    event_weight, target_weight = (label_T.new_empty(size if padded else 0) for size in (events, targets))
    constants = {"STEPS": users.bit_length(), "B": ROWS, "PADDED": padded}
    interaction_E, time_E = event_2E.unbind()
    if events:
        held = [columns["history_item"], columns["history_interaction"], columns["history_time_ms"]]
        out = [item_R, interaction_E, time_E, event_weight]
        numbers = events, len(columns["history_item"]), users
        events_kernel[(-(-events // ROWS),)](count, event_start, source, *held, *out, *numbers, **constants)
    time_T, context_T, first_T, end_T, user_T, begin_T = target_6T.unbind()
    if targets:
        held = [columns["target_item"], columns["target_time_ms"], columns["target_context"], columns["target_label"]]
        held += [columns["target_first"], columns["target_end"]]
        given = [count, target_start, event_start, first, user, target, *held]
        out = [item_R[events:], time_T, context_T, label_T, first_T, end_T, user_T, target_weight, begin_T]
        targets_kernel[(-(-targets // ROWS),)](*given, *out, targets, users, **constants)
    padding = (event_weight, target_weight, begin_T) if padded else None
    return Read(item_R, interaction_E, time_E, time_T, context_T, label_T, first_T, end_T, user_T, padding)
