"""Triton kernels of the fused pass (`training.model.fused` says what they compute and calls them).

A program works for one head and either a tile of targets or a block of events; logits and weights of pairs live in
registers alone. Logarithms are to base 2. Pairs lie as [P, B] where `EV` (the axis of the events) is 1, as [B, P] where
it is 0.

The kernel of a pair is separable within a block: with the block's newest event as the reference, component m is
2^(weight_m - rate_m (target - reference)) * 2^(-rate_m (reference - event)), of which only the largest component's
first factor is taken out as a logarithm. In a block that some target sees in part alone the newest event that it does
see may be many half-lives older than the block's: there each target has its own reference, and a pair an exponential of
each component.

Legend: P targets of a tile, B events of a block, D width of a head padded to `DP`, M components of the kernel.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
DAYS_PER_MS = tl.constexpr(1.0 / 86_400_000)
FAR = tl.constexpr(2**30)  # a place behind every history


@triton.jit
def _operand(x, PRECISION: tl.constexpr):
    """Round what a TF32 product would truncate."""
    if PRECISION == "tf32" and x.dtype == tl.float32:
        return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return x


@triton.jit
def _ages(time_B, time_P, newest_P, MASKED: tl.constexpr):
    """Return days from the block's newest event to each target, from each target's own newest one, and to the block's
    from each event.
    """
    newest = tl.max(time_B, 0)
    since_P = (time_P - newest).to(tl.float32) * DAYS_PER_MS
    own_P = (time_P - tl.minimum(newest, newest_P)).to(tl.float32) * DAYS_PER_MS if MASKED else since_P
    return since_P, own_P, (newest - time_B).to(tl.float32) * DAYS_PER_MS


@triton.jit
def _top(own_P, rate, weight, M: tl.constexpr):
    """The largest component's log weight at the newest event that a target sees of the block, [P]."""
    top_P = (tl.load(weight) - tl.load(rate) * own_P) * LOG2E
    for m in tl.static_range(1, M):
        top_P = tl.maximum(top_P, (tl.load(weight + m) - tl.load(rate + m) * own_P) * LOG2E)
    return top_P


@triton.jit
def _component(m, since_P, before_B, top_P, rate, weight, MASKED: tl.constexpr, EV: tl.constexpr):
    """Component m of each pair over 2^top: at most 1 for a pair that is seen."""
    at_P = (tl.load(weight + m) - tl.load(rate + m) * since_P) * LOG2E - top_P
    before_B = tl.load(rate + m) * LOG2E * before_B
    if MASKED:
        return tl.exp2(tl.minimum(tl.expand_dims(at_P, EV) - tl.expand_dims(before_B, 1 - EV), 0.0))
    return tl.expand_dims(tl.exp2(at_P), EV) * tl.expand_dims(tl.exp2(-before_B), 1 - EV)


@triton.jit
def _weighed(logit, since_P, own_P, before_B, rate, weight, M: tl.constexpr, MASKED: tl.constexpr, EV: tl.constexpr):
    """Return (x, factor): the weight of a pair is 2^x * factor."""
    if M == 0:
        return logit * LOG2E, tl.full(logit.shape, 1.0, tl.float32)
    top_P = _top(own_P, rate, weight, M)
    factor = _component(0, since_P, before_B, top_P, rate, weight, MASKED, EV)
    for m in tl.static_range(1, M):
        factor += _component(m, since_P, before_B, top_P, rate, weight, MASKED, EV)
    return logit * LOG2E + tl.expand_dims(top_P, EV), factor


@triton.jit
def _seen_places(first, end, rows_P, live_P, FIRST: tl.constexpr):
    """Return (first, end, live) of a tile's targets, int32; a target that may see no event is not live."""
    end_P = tl.load(end + rows_P, live_P, other=0).to(tl.int32)
    first_P = tl.zeros_like(end_P)
    if FIRST:
        first_P = tl.load(first + rows_P, live_P, other=0).to(tl.int32)
    return first_P, end_P, live_P & (end_P > first_P)


@triton.jit
def _newest_seen(event_ms, event0, end_P, live_P):
    """Time of the newest event that each target sees."""
    return tl.load(event_ms + event0 + end_P - 1, live_P, other=0)


@triton.jit
def _exact_from(exact_from, rows_P, live_P, EXACT: tl.constexpr):
    """The place from which a target's events have exact keys; behind all of them without a window of exact keys."""
    if EXACT:
        return tl.load(exact_from + rows_P, live_P, other=0).to(tl.int32)
    return tl.full(rows_P.shape, FAR, tl.int32)


@triton.jit
def _borders(low, high, first_P, end_P, from_P, live_P, B: tl.constexpr, FIRST: tl.constexpr):
    """Return (begin, calm_from, calm_to, stop): blocks between the two in the middle are seen whole by every target."""
    stop = tl.minimum(high, tl.max(tl.where(live_P, end_P, 0), 0))
    begin = low
    calm_from = low
    if FIRST:
        begin = tl.maximum(low, tl.min(tl.where(live_P, first_P, FAR), 0) // B * B)
        calm_from = tl.maximum(low, tl.cdiv(tl.max(tl.where(live_P, first_P, 0), 0), B) * B)
    calm_to = tl.minimum(stop, tl.min(tl.where(live_P, tl.minimum(end_P, from_P), FAR), 0)) // B * B
    calm_from = tl.minimum(calm_from, tl.cdiv(stop, B) * B)
    return begin, calm_from, tl.maximum(calm_to, calm_from), stop


@triton.jit
def _shown(place_B, first_P, end_P, FIRST: tl.constexpr, EV: tl.constexpr):
    """Which pairs lie before the target's cut-off and not before its first event."""
    place = tl.expand_dims(place_B, 1 - EV)
    shown = place < tl.expand_dims(end_P, EV)
    if FIRST:
        shown = shown & (place >= tl.expand_dims(first_P, EV))
    return shown


@triton.jit
def _forward_blocks(
    acc,
    total_P,
    top_P,
    q,
    time_P,
    newest_P,
    first_P,
    end_P,
    from_P,
    key,
    exact,
    value,
    event_ms,
    rate,
    weight,
    event0,
    start,
    stop,
    last,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    M: tl.constexpr,
    B: tl.constexpr,
    FIRST: tl.constexpr,
    EXACT: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the blocks [start, stop) to a tile's running sums."""
    column = tl.arange(0, DP)
    wide = column < D
    for at in range(start, stop, B):
        place_B = at + tl.arange(0, B)
        row_B = event0 + (tl.minimum(place_B, last - 1) if MASKED else place_B)
        k = _operand(tl.load(key + row_B[None, :] * (HEADS * D) + column[:, None], wide[:, None], other=0.0), PRECISION)
        v = _operand(
            tl.load(value + row_B[:, None] * (HEADS * D) + column[None, :], wide[None, :], other=0.0), PRECISION
        )
        logit = tl.dot(q, k, input_precision=PRECISION)
        if EXACT and MASKED:
            k = _operand(
                tl.load(exact + row_B[None, :] * (HEADS * D) + column[:, None], wide[:, None], other=0.0), PRECISION
            )
            logit = tl.where(place_B[None, :] < from_P[:, None], logit, tl.dot(q, k, input_precision=PRECISION))
        since_P, own_P, before_B = _ages(tl.load(event_ms + row_B), time_P, newest_P, MASKED)
        x, factor = _weighed(logit, since_P, own_P, before_B, rate, weight, M, MASKED, 1)
        if MASKED:
            x = tl.where(_shown(place_B, first_P, end_P, FIRST, 1), x, float("-inf"))
        new_P = tl.maximum(top_P, tl.max(x, 1))
        base_P = tl.where(new_P == float("-inf"), 0.0, new_P) if MASKED else new_P
        w = tl.exp2(x - base_P[:, None]) * factor
        scale_P = tl.exp2(top_P - base_P)
        total_P = total_P * scale_P + tl.sum(w, 1)
        acc = tl.dot(w.to(v.dtype), v, acc * scale_P[:, None], input_precision=PRECISION)
        top_P = new_P
    return acc, total_P, top_P


@triton.jit
def forward_kernel(
    query,
    key,
    exact,
    value,
    event_ms,
    target_ms,
    end,
    first,
    exact_from,
    rate,
    weight,
    work,
    part_out,
    part_lse,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    M: tl.constexpr,
    P: tl.constexpr,
    B: tl.constexpr,
    FIRST: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attention of one tile of targets over one chunk of events, of one head: a part of the softmax and its log sum."""
    w = tl.program_id(0).to(tl.int64) // HEADS
    h = tl.program_id(0).to(tl.int64) % HEADS
    target0 = tl.load(work + w * 5)
    event0 = tl.load(work + w * 5 + 2)
    rows_P = target0 + tl.arange(0, P)
    first_P, end_P, live_P = _seen_places(first, end, rows_P, rows_P < tl.load(work + w * 5 + 1), FIRST)
    from_P = _exact_from(exact_from, rows_P, live_P, EXACT)
    low = tl.load(work + w * 5 + 3).to(tl.int32)
    high = tl.load(work + w * 5 + 4).to(tl.int32)
    begin, calm_from, calm_to, stop = _borders(low, high, first_P, end_P, from_P, live_P, B, FIRST)
    column = tl.arange(0, DP)
    q = _operand(
        tl.load(
            query + (rows_P[:, None] * HEADS + h) * D + column[None, :],
            live_P[:, None] & (column < D)[None, :],
            other=0.0,
        ),
        PRECISION,
    )
    time_P = tl.load(target_ms + rows_P, live_P, other=0)
    newest_P = _newest_seen(event_ms, event0, end_P, live_P)
    acc = tl.zeros([P, DP], tl.float32)
    total_P = tl.zeros([P], tl.float32)
    top_P = tl.full([P], float("-inf"), tl.float32)
    key += h * D
    exact += h * D
    value += h * D
    rate += h * M
    weight += h * M
    if FIRST:
        acc, total_P, top_P = _forward_blocks(
            acc,
            total_P,
            top_P,
            q,
            time_P,
            newest_P,
            first_P,
            end_P,
            from_P,
            key,
            exact,
            value,
            event_ms,
            rate,
            weight,
            event0,
            begin,
            calm_from,
            stop,
            HEADS,
            D,
            DP,
            M,
            B,
            FIRST,
            EXACT,
            True,
            PRECISION,
        )
    acc, total_P, top_P = _forward_blocks(
        acc,
        total_P,
        top_P,
        q,
        time_P,
        newest_P,
        first_P,
        end_P,
        from_P,
        key,
        exact,
        value,
        event_ms,
        rate,
        weight,
        event0,
        calm_from,
        calm_to,
        stop,
        HEADS,
        D,
        DP,
        M,
        B,
        FIRST,
        EXACT,
        False,
        PRECISION,
    )
    acc, total_P, top_P = _forward_blocks(
        acc,
        total_P,
        top_P,
        q,
        time_P,
        newest_P,
        first_P,
        end_P,
        from_P,
        key,
        exact,
        value,
        event_ms,
        rate,
        weight,
        event0,
        calm_to,
        stop,
        stop,
        HEADS,
        D,
        DP,
        M,
        B,
        FIRST,
        EXACT,
        True,
        PRECISION,
    )
    some_P = live_P & (total_P != 0)
    lse_P = tl.where(some_P, top_P + tl.log2(tl.where(some_P, total_P, 1.0)), float("-inf"))
    out = tl.where(some_P[:, None], acc / tl.where(some_P, total_P, 1.0)[:, None], 0.0)
    slot_P = (w * HEADS + h) * P + tl.arange(0, P)
    tl.store(part_lse + slot_P, lse_P)
    tl.store(part_out + slot_P[:, None] * DP + column[None, :], out)


@triton.jit
def join_kernel(
    part_out, part_lse, tiles, out, lse, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr
):
    """Join a tile's parts by their log sums; a target that sees nothing gets zeros and a log sum of +inf."""
    x = tl.program_id(0).to(tl.int64) // HEADS
    h = tl.program_id(0).to(tl.int64) % HEADS
    rows_P = tl.load(tiles + x * 4) + tl.arange(0, P)
    real_P = rows_P < tl.load(tiles + x * 4 + 1)
    column = tl.arange(0, DP)
    acc = tl.zeros([P, DP], tl.float32)
    total_P = tl.zeros([P], tl.float32)
    top_P = tl.full([P], float("-inf"), tl.float32)
    for w in range(tl.load(tiles + x * 4 + 2), tl.load(tiles + x * 4 + 3)):
        slot_P = (w * HEADS + h) * P + tl.arange(0, P)
        part_P = tl.load(part_lse + slot_P)
        new_P = tl.maximum(top_P, part_P)
        base_P = tl.where(new_P == float("-inf"), 0.0, new_P)
        scale_P = tl.exp2(top_P - base_P)
        share_P = tl.exp2(part_P - base_P)
        acc = acc * scale_P[:, None] + share_P[:, None] * tl.load(part_out + slot_P[:, None] * DP + column[None, :])
        total_P = total_P * scale_P + share_P
        top_P = new_P
    some_P = total_P != 0
    out_Pd = tl.where(some_P[:, None], acc / tl.where(some_P, total_P, 1.0)[:, None], 0.0)
    lse_P = tl.where(some_P, top_P + tl.log2(tl.where(some_P, total_P, 1.0)), float("inf"))
    place = rows_P * HEADS + h
    tl.store(lse + place, lse_P, real_P)
    tl.store(out + place[:, None] * D + column[None, :], out_Pd, real_P[:, None] & (column < D)[None, :])


@triton.jit
def sum_kernel(part, tiles, out, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr):
    """Sum a tile's parts."""
    x = tl.program_id(0).to(tl.int64) // HEADS
    h = tl.program_id(0).to(tl.int64) % HEADS
    rows_P = tl.load(tiles + x * 4) + tl.arange(0, P)
    real_P = rows_P < tl.load(tiles + x * 4 + 1)
    column = tl.arange(0, DP)
    acc = tl.zeros([P, DP], tl.float32)
    for w in range(tl.load(tiles + x * 4 + 2), tl.load(tiles + x * 4 + 3)):
        slot_P = (w * HEADS + h) * P + tl.arange(0, P)
        acc += tl.load(part + slot_P[:, None] * DP + column[None, :])
    place = (rows_P * HEADS + h)[:, None] * D + column[None, :]
    tl.store(out + place, acc, real_P[:, None] & (column < D)[None, :])


@triton.jit
def base_kernel(
    grad_out, out, rounded, base, rows, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr
):
    """Round the outputs' gradient to what the products take, and multiply the rounded with the outputs, row by row.

    So the gradients of a target's logits still add up to zero.
    """
    row_P = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    column = tl.arange(0, DP)
    inside = (row_P < rows)[:, None] & (column < D)[None, :]
    place = row_P[:, None] * D + column[None, :]
    g = _operand(tl.load(grad_out + place, inside, other=0.0).to(rounded.dtype.element_ty), PRECISION)
    tl.store(rounded + place, g, inside)
    tl.store(base + row_P, tl.sum(g.to(tl.float32) * tl.load(out + place, inside, other=0.0), 1), row_P < rows)


@triton.jit
def _put(sums, m: tl.constexpr, column_P, W: tl.constexpr):
    """Add a column to column m of [P, W]."""
    return sums + tl.where(tl.arange(0, W)[None, :] == m, column_P[:, None], 0.0)


@triton.jit
def _component_sums(
    sums, pull, since_P, own_P, before_B, rate, weight, M: tl.constexpr, W: tl.constexpr, MASKED: tl.constexpr
):
    """Add, for each component m, the sums over events of its share of the pair's pull (column 2m) and of share x age
    (2m + 1).

    The pull is the gradient of a pair's logit over the factor; pairs [P, B].
    """
    top_P = _top(own_P, rate, weight, M)
    for m in tl.static_range(M):
        if MASKED:
            share = pull * _component(m, since_P, before_B, top_P, rate, weight, True, 1)
            near_P = tl.sum(share, 1)
            far_P = tl.sum(share * before_B[None, :], 1)
        else:
            a_P = tl.exp2((tl.load(weight + m) - tl.load(rate + m) * since_P) * LOG2E - top_P)
            c_B = tl.exp2(-tl.load(rate + m) * LOG2E * before_B)
            near_P = a_P * tl.sum(pull * c_B[None, :], 1)
            far_P = a_P * tl.sum(pull * (c_B * before_B)[None, :], 1)
        sums = _put(sums, 2 * m, near_P, W)
        sums = _put(sums, 2 * m + 1, since_P * near_P + far_P, W)
    return sums


@triton.jit
def _query_blocks(
    grad_q,
    sums,
    q,
    g,
    lse_P,
    base_P,
    time_P,
    newest_P,
    first_P,
    end_P,
    from_P,
    key,
    exact,
    value,
    event_ms,
    rate,
    weight,
    event0,
    start,
    stop,
    last,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    M: tl.constexpr,
    W: tl.constexpr,
    B: tl.constexpr,
    FIRST: tl.constexpr,
    EXACT: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the blocks [start, stop) to the gradients of a tile's queries and to the sums for rates and weights."""
    column = tl.arange(0, DP)
    wide = column < D
    for at in range(start, stop, B):
        place_B = at + tl.arange(0, B)
        row_B = event0 + (tl.minimum(place_B, last - 1) if MASKED else place_B)
        k = _operand(tl.load(key + row_B[None, :] * (HEADS * D) + column[:, None], wide[:, None], other=0.0), PRECISION)
        v = _operand(
            tl.load(value + row_B[None, :] * (HEADS * D) + column[:, None], wide[:, None], other=0.0), PRECISION
        )
        logit = tl.dot(q, k, input_precision=PRECISION)
        if EXACT and MASKED:
            near = _operand(
                tl.load(exact + row_B[None, :] * (HEADS * D) + column[:, None], wide[:, None], other=0.0), PRECISION
            )
            coarse = place_B[None, :] < from_P[:, None]
            logit = tl.where(coarse, logit, tl.dot(q, near, input_precision=PRECISION))
        since_P, own_P, before_B = _ages(tl.load(event_ms + row_B), time_P, newest_P, MASKED)
        x, factor = _weighed(logit, since_P, own_P, before_B, rate, weight, M, MASKED, 1)
        pull = tl.exp2(tl.minimum(x - lse_P[:, None], 100.0, tl.PropagateNan.ALL))
        if MASKED:
            pull = tl.where(_shown(place_B, first_P, end_P, FIRST, 1), pull, 0.0)
        pull = pull * (tl.dot(g, v, input_precision=PRECISION) - base_P[:, None])
        grad = pull
        if M > 0:
            grad = pull * factor
            sums = _component_sums(sums, pull, since_P, own_P, before_B, rate, weight, M, W, MASKED)
        if EXACT and MASKED:
            exactly = tl.where(coarse, 0.0, grad).to(k.dtype)
            grad_q = tl.dot(exactly, tl.trans(near), grad_q, input_precision=PRECISION)
            grad = tl.where(coarse, grad, 0.0)
        grad_q = tl.dot(grad.to(k.dtype), tl.trans(k), grad_q, input_precision=PRECISION)
    return grad_q, sums


@triton.jit
def query_kernel(
    query,
    key,
    exact,
    value,
    event_ms,
    target_ms,
    end,
    first,
    exact_from,
    rate,
    weight,
    work,
    grad_out,
    lse,
    base,
    part_query,
    part_sums,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    M: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    B: tl.constexpr,
    FIRST: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of one tile's queries from one chunk of events, and its sums for rates and weights, of one head."""
    w = tl.program_id(0).to(tl.int64) // HEADS
    h = tl.program_id(0).to(tl.int64) % HEADS
    event0 = tl.load(work + w * 5 + 2)
    rows_P = tl.load(work + w * 5) + tl.arange(0, P)
    first_P, end_P, live_P = _seen_places(first, end, rows_P, rows_P < tl.load(work + w * 5 + 1), FIRST)
    from_P = _exact_from(exact_from, rows_P, live_P, EXACT)
    low = tl.load(work + w * 5 + 3).to(tl.int32)
    high = tl.load(work + w * 5 + 4).to(tl.int32)
    begin, calm_from, calm_to, stop = _borders(low, high, first_P, end_P, from_P, live_P, B, FIRST)
    column = tl.arange(0, DP)
    inside = live_P[:, None] & (column < D)[None, :]
    q = _operand(tl.load(query + (rows_P[:, None] * HEADS + h) * D + column[None, :], inside, other=0.0), PRECISION)
    place_P = rows_P * HEADS + h
    g = tl.load(grad_out + place_P[:, None] * D + column[None, :], inside, other=0.0)
    lse_P = tl.load(lse + place_P, live_P, other=float("inf"))
    base_P = tl.load(base + place_P, live_P, other=0.0)
    time_P = tl.load(target_ms + rows_P, live_P, other=0)
    newest_P = _newest_seen(event_ms, event0, end_P, live_P)
    grad_q = tl.zeros([P, DP], tl.float32)
    sums = tl.zeros([P, W], tl.float32)
    key += h * D
    exact += h * D
    value += h * D
    rate += h * M
    weight += h * M
    if FIRST:
        grad_q, sums = _query_blocks(
            grad_q,
            sums,
            q,
            g,
            lse_P,
            base_P,
            time_P,
            newest_P,
            first_P,
            end_P,
            from_P,
            key,
            exact,
            value,
            event_ms,
            rate,
            weight,
            event0,
            begin,
            calm_from,
            stop,
            HEADS,
            D,
            DP,
            M,
            W,
            B,
            FIRST,
            EXACT,
            True,
            PRECISION,
        )
    grad_q, sums = _query_blocks(
        grad_q,
        sums,
        q,
        g,
        lse_P,
        base_P,
        time_P,
        newest_P,
        first_P,
        end_P,
        from_P,
        key,
        exact,
        value,
        event_ms,
        rate,
        weight,
        event0,
        calm_from,
        calm_to,
        stop,
        HEADS,
        D,
        DP,
        M,
        W,
        B,
        FIRST,
        EXACT,
        False,
        PRECISION,
    )
    grad_q, sums = _query_blocks(
        grad_q,
        sums,
        q,
        g,
        lse_P,
        base_P,
        time_P,
        newest_P,
        first_P,
        end_P,
        from_P,
        key,
        exact,
        value,
        event_ms,
        rate,
        weight,
        event0,
        calm_to,
        stop,
        stop,
        HEADS,
        D,
        DP,
        M,
        W,
        B,
        FIRST,
        EXACT,
        True,
        PRECISION,
    )
    slot_P = (w * HEADS + h) * P + tl.arange(0, P)
    tl.store(part_query + slot_P[:, None] * DP + column[None, :], grad_q)
    if M > 0:
        # A row of another tile's has neither logits nor weights.
        sums = tl.where(live_P[:, None], sums, 0.0)
        tl.store(part_sums + (w * HEADS + h) * W + tl.arange(0, W), tl.sum(sums, 0))


@triton.jit
def _event_tile(
    grad_k,
    grad_v,
    k,
    near,
    v,
    place_B,
    time_B,
    rows_P,
    first_P,
    end_P,
    from_P,
    live_P,
    event0,
    query,
    event_ms,
    target_ms,
    rate,
    weight,
    grad_out,
    lse,
    base,
    h,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    M: tl.constexpr,
    FIRST: tl.constexpr,
    EXACT: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add one tile of targets to the gradients of a block's keys and values; pairs [B, P]."""
    column = tl.arange(0, DP)
    inside = live_P[:, None] & (column < D)[None, :]
    q = _operand(tl.load(query + (rows_P[:, None] * HEADS + h) * D + column[None, :], inside, other=0.0), PRECISION)
    place_P = rows_P * HEADS + h
    g = tl.load(grad_out + place_P[:, None] * D + column[None, :], inside, other=0.0)
    lse_P = tl.load(lse + place_P, live_P, other=float("inf"))
    base_P = tl.load(base + place_P, live_P, other=0.0)
    logit = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    if EXACT and MASKED:
        exactly = tl.dot(near, tl.trans(q), input_precision=PRECISION)
        logit = tl.where(place_B[:, None] < from_P[None, :], logit, exactly)
    newest_P = _newest_seen(event_ms, event0, end_P, live_P) if MASKED else end_P
    time_P = tl.load(target_ms + rows_P, live_P, other=0)
    since_P, own_P, before_B = _ages(time_B, time_P, newest_P, MASKED)
    x, factor = _weighed(logit, since_P, own_P, before_B, rate, weight, M, MASKED, 0)
    p = tl.exp2(tl.minimum(x - lse_P[None, :], 100.0, tl.PropagateNan.ALL)) * factor
    if MASKED:
        p = tl.where(_shown(place_B, first_P, end_P, FIRST, 0), p, 0.0)
    grad_v = tl.dot(p.to(v.dtype), g, grad_v, input_precision=PRECISION)
    grad = p * (tl.dot(v, tl.trans(g), input_precision=PRECISION) - base_P[None, :])
    return tl.dot(grad.to(k.dtype), q, grad_k, input_precision=PRECISION), grad_v


@triton.jit
def event_kernel(
    query,
    key,
    exact,
    value,
    event_ms,
    target_ms,
    end,
    first,
    exact_from,
    rate,
    weight,
    blocks,
    grad_out,
    lse,
    base,
    grad_key,
    grad_value,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    M: tl.constexpr,
    P: tl.constexpr,
    B: tl.constexpr,
    FIRST: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of one block's keys and values from all targets of its user, of one head: the block owns its rows."""
    n = tl.program_id(0).to(tl.int64) // HEADS
    h = tl.program_id(0).to(tl.int64) % HEADS
    event0 = tl.load(blocks + n * 5)
    low = tl.load(blocks + n * 5 + 1).to(tl.int32)
    high = tl.load(blocks + n * 5 + 2).to(tl.int32)
    target1 = tl.load(blocks + n * 5 + 4)
    place_B = low + tl.arange(0, B)
    row_B = event0 + tl.minimum(place_B, high - 1)
    column = tl.arange(0, DP)
    wide = (column < D)[None, :]
    k = _operand(tl.load(key + (row_B[:, None] * HEADS + h) * D + column[None, :], wide, other=0.0), PRECISION)
    v = _operand(tl.load(value + (row_B[:, None] * HEADS + h) * D + column[None, :], wide, other=0.0), PRECISION)
    near = k
    if EXACT:
        near = _operand(tl.load(exact + (row_B[:, None] * HEADS + h) * D + column[None, :], wide, other=0.0), PRECISION)
    time_B = tl.load(event_ms + row_B)
    rate += h * M
    weight += h * M
    grad_k = tl.zeros([B, DP], tl.float32)
    grad_v = tl.zeros([B, DP], tl.float32)
    for target0 in range(tl.load(blocks + n * 5 + 3), target1, P):
        rows_P = target0 + tl.arange(0, P)
        first_P, end_P, live_P = _seen_places(first, end, rows_P, rows_P < target1, FIRST)
        from_P = _exact_from(exact_from, rows_P, live_P, EXACT)
        whole = tl.min(tl.where(live_P, tl.minimum(end_P, from_P), FAR), 0) >= high
        if FIRST:
            whole = whole & (tl.max(tl.where(live_P, first_P, 0), 0) <= low)
        if tl.max(tl.where(live_P, end_P, 0), 0) > low:
            if whole:
                grad_k, grad_v = _event_tile(
                    grad_k,
                    grad_v,
                    k,
                    near,
                    v,
                    place_B,
                    time_B,
                    rows_P,
                    first_P,
                    end_P,
                    from_P,
                    live_P,
                    event0,
                    query,
                    event_ms,
                    target_ms,
                    rate,
                    weight,
                    grad_out,
                    lse,
                    base,
                    h,
                    HEADS,
                    D,
                    DP,
                    M,
                    FIRST,
                    EXACT,
                    False,
                    PRECISION,
                )
            else:
                grad_k, grad_v = _event_tile(
                    grad_k,
                    grad_v,
                    k,
                    near,
                    v,
                    place_B,
                    time_B,
                    rows_P,
                    first_P,
                    end_P,
                    from_P,
                    live_P,
                    event0,
                    query,
                    event_ms,
                    target_ms,
                    rate,
                    weight,
                    grad_out,
                    lse,
                    base,
                    h,
                    HEADS,
                    D,
                    DP,
                    M,
                    FIRST,
                    EXACT,
                    True,
                    PRECISION,
                )
    place = (event0 + place_B) * HEADS + h
    real = (place_B < high)[:, None] & wide
    tl.store(grad_key + place[:, None] * D + column[None, :], grad_k, real)
    tl.store(grad_value + place[:, None] * D + column[None, :], grad_v, real)


@triton.jit
def gather_kernel(
    table, index, other, other_index, out, rows, D: tl.constexpr, DP: tl.constexpr, B: tl.constexpr, TWO: tl.constexpr
):
    """Copy a table's rows [D] to the places of their index, plus, if `TWO`, those of another table."""
    row_B = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    column = tl.arange(0, DP)
    inside = (row_B < rows)[:, None] & (column < D)[None, :]
    from_B = tl.load(index + row_B, row_B < rows, other=0)
    x = tl.load(table + from_B[:, None] * D + column[None, :], inside, other=0.0)
    if TWO:
        from_B = tl.load(other_index + row_B, row_B < rows, other=0)
        x = x.to(tl.float32) + tl.load(other + from_B[:, None] * D + column[None, :], inside, other=0.0)
    tl.store(out + row_B[:, None] * D + column[None, :], x, inside)


@triton.jit
def scatter_kernel(grad, order, ids, table, rows, D: tl.constexpr, DP: tl.constexpr, B: tl.constexpr, R: tl.constexpr):
    """Add the rows of a gather's gradient, taken in the order of their ids, to the table's: one addition a run of equal
    ids.

    `R` runs at once are summed as a product with a matrix of zeros and ones.
    """
    start = tl.program_id(0).to(tl.int64) * B
    place_B = start + tl.arange(0, B)
    real_B = place_B < rows
    id_B = tl.load(ids + place_B, real_B, other=-1)
    before_B = tl.load(ids + place_B - 1, real_B & (place_B > start), other=-1)
    run_B = tl.cumsum((real_B & (id_B != before_B) & (place_B > start)).to(tl.int32), 0)
    last = tl.max(run_B, 0)
    from_B = tl.load(order + place_B, real_B, other=0)
    column = tl.arange(0, DP)
    wide = (column < D)[None, :]
    rows_Bd = tl.load(grad + from_B[:, None] * D + column[None, :], real_B[:, None] & wide, other=0.0)
    for first in tl.static_range(0, B, R):
        if first <= last:
            member_RB = run_B[None, :] == first + tl.arange(0, R)[:, None]
            sums_Rd = tl.dot(member_RB.to(rows_Bd.dtype), rows_Bd, input_precision="tf32x3")
            id_R = tl.max(tl.where(member_RB, id_B[None, :], -1), 1)
            to = id_R[:, None].to(tl.int64) * D + column[None, :]
            tl.atomic_add(table + to, sums_Rd, (id_R >= 0)[:, None] & wide, sem="relaxed")


@triton.jit
def normalise_kernel(x, out, scale, rows, D: tl.constexpr, DP: tl.constexpr, B: tl.constexpr):
    """Rows [D] less their mean, over their standard deviation, whose inverse is written, too."""
    row_B = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    column = tl.arange(0, DP)
    wide = (column < D)[None, :]
    inside = (row_B < rows)[:, None] & wide
    place = row_B[:, None] * D + column[None, :]
    x_Bd = tl.load(x + place, inside, other=0.0).to(tl.float32)
    x_Bd = tl.where(wide, x_Bd - tl.sum(x_Bd, 1)[:, None] / D, 0.0)
    scale_B = tl.rsqrt(tl.sum(x_Bd * x_Bd, 1) / D + 1e-5)
    tl.store(scale + row_B, scale_B, row_B < rows)
    tl.store(out + place, x_Bd * scale_B[:, None], inside)


@triton.jit
def normalise_backward_kernel(grad, out, scale, found, rows, D: tl.constexpr, DP: tl.constexpr, B: tl.constexpr):
    """Gradients of the rows from those of the normalised ones."""
    row_B = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    column = tl.arange(0, DP)
    inside = (row_B < rows)[:, None] & (column < D)[None, :]
    place = row_B[:, None] * D + column[None, :]
    g = tl.load(grad + place, inside, other=0.0).to(tl.float32)
    y = tl.load(out + place, inside, other=0.0).to(tl.float32)
    g = g - tl.sum(g, 1)[:, None] / D - y * tl.sum(g * y, 1)[:, None] / D
    tl.store(found + place, g * tl.load(scale + row_B, row_B < rows, other=0.0)[:, None], inside)
