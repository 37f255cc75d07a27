"""Triton kernels of the factored pass (`training.model.fused_codes` says what they compute and calls them).

Everything of size targets x codes lives in registers alone. Logarithms are to base 2. A user's events before their
targets' s-th cut-off in order ("border") make the prefix s; those between two borders are a segment. Tables of a prefix
or segment have its newest event as their reference time, so that no factor of an event is above 1.

Legend: v a user of this pass, y one of their segments, P targets of a tile, B events, C codes (padded to `CP`), D width
of a head padded to `DP`, M components of the kernel padded to `MP`, K = MP x DP.
"""

import triton
import triton.language as tl

from training.model.fused_kernels import DAYS_PER_MS, FAR, LOG2E, _operand, _put, _top

LEAST = tl.constexpr(16)  # rows or columns of a product: components are padded to so many
BORDER = tl.constexpr(6)  # numbers of a border


@triton.jit
def _user(users, v):
    """Return (first event, first target, end of targets, first segment, segments)."""
    users += v * 5
    return (
        tl.load(users),
        tl.load(users + 1),
        tl.load(users + 2),
        tl.load(users + 3),
        tl.load(users + 4),
    )


@triton.jit
def nearest_kernel(
    keys, centre, codes, square, found, count,
    G: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Write the nearest code of one group for `P` keys; a key that is not a number gets some code."""
    g = tl.program_id(1)
    row_P = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    code, column = tl.arange(0, CP), tl.arange(0, WP)
    wide, real_P = column < W, row_P < count
    inside = real_P[:, None] & wide[None, :]
    key_Pw = tl.load(keys + (row_P[:, None] * G + g) * W + column[None, :], inside, other=0.0)
    key_Pw = tl.where(inside, key_Pw - tl.load(centre + g * W + column, wide, other=0.0)[None, :], 0.0)
    there = (code < C)[:, None] & wide[None, :]
    code_Cw = tl.load(codes + (g * C + code)[:, None] * W + column[None, :], there, other=0.0)
    # The distance without |k|^2, which is the same for all codes of a key.
    square_C = tl.load(square + g * C + code, code < C, other=float("inf"))
    score_PC = square_C[None, :] - 2 * tl.dot(key_Pw, tl.trans(code_Cw), input_precision="ieee")
    nearest_P = tl.minimum(tl.argmin(score_PC, 1), C - 1)
    tl.store(found + row_P * G + g, nearest_P.to(tl.int64), real_P)


@triton.jit
def border_kernel(users, end, event_ms, borders, P: tl.constexpr):
    """Write a user's distinct cut-offs in order: (border, first target and end of targets that have it, time of the
    newest event before it, first and end of its segment's events).

    With fewer cut-offs than segments the last one is repeated, without targets.
    """
    v = tl.program_id(0).to(tl.int64)
    event0, target0, target1, y, segments = _user(users, v)
    border = target0 * 0 - 1
    repeated = target0 * 0
    older = event0
    for s in range(-1, segments):
        above = border * 0 + FAR
        low = target1
        high = target1 * 0
        for at in range(target0, target1, P):
            row_P = at + tl.arange(0, P)
            end_P = tl.load(end + row_P, row_P < target1, other=-1)
            above = tl.minimum(above, tl.min(tl.where(end_P > border, end_P, FAR), 0))
            low = tl.minimum(low, tl.min(tl.where(end_P == border, row_P, target1), 0))
            high = tl.maximum(high, tl.max(tl.where(end_P == border, row_P + 1, 0), 0))
        if s >= 0:
            row = borders + (y + s) * BORDER
            tl.store(row, border)
            tl.store(row + 1, low)
            # Targets belong to the first of equal borders: backward adds up what each border's targets give.
            tl.store(row + 2, tl.where(repeated == 1, 0, high))
            newest = tl.load(event_ms + event0 + border - 1, border > 0, other=0)
            tl.store(row + 3, newest)
            tl.store(row + 4, older)
            older = event0 + tl.maximum(border, 0)
            tl.store(row + 5, older)
            repeated = tl.where(above == FAR, 1, repeated)
            above = tl.where(above == FAR, border, above)
        border = above


@triton.jit
def _place_of(sorted_keys, order, key_C, event, count, STEPS: tl.constexpr):
    """The first of `count` places, in order of key and event, that is not before (key, event); for every key."""
    low_C = tl.zeros_like(key_C)
    high_C = low_C + count
    for _ in tl.static_range(STEPS):
        open_C = low_C < high_C
        middle_C = (low_C + high_C) // 2
        there_C = tl.load(sorted_keys + middle_C, open_C, other=0).to(tl.int32)
        before_C = tl.load(order + middle_C, open_C, other=0) < event
        before_C = (there_C < key_C) | ((there_C == key_C) & before_C)
        low_C = tl.where(open_C & before_C, middle_C + 1, low_C)
        high_C = tl.where(open_C & (before_C == 0), middle_C, high_C)
    return low_C


@triton.jit
def run_kernel(
    borders, sorted_keys, order, bounds, events, segments,
    C: tl.constexpr, CP: tl.constexpr, G: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Write where in `order` the events of each code of a segment and group begin and end."""
    y = tl.program_id(0).to(tl.int64) % segments
    g = tl.program_id(0) // segments
    code = tl.arange(0, CP)
    given = borders + y * BORDER
    for edge in tl.static_range(2):
        event = g * events + tl.load(given + 4 + edge)
        place_C = _place_of(sorted_keys, order, g * C + code, event, G * events, STEPS)
        tl.store(bounds + ((g * segments + y) * C + code) * 2 + edge, place_C, code < C)


@triton.jit
def unseen_kernel(
    users,
    blocks,
    borders,
    grad_key,
    grad_value,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    B: tl.constexpr,
):
    """Write zeros as the gradients of a user's events that none of the targets sees: those behind the last border."""
    n = tl.program_id(0).to(tl.int64)
    event0, _, _, y, segments = _user(users, tl.load(blocks + n * 3))
    stop = tl.load(blocks + n * 3 + 2)
    last = tl.maximum(tl.load(borders + (y + segments - 1) * BORDER, segments > 0, other=0), 0)
    if stop > last:
        place_B = tl.load(blocks + n * 3 + 1) + tl.arange(0, B)
        column = tl.arange(0, DP)
        inside = ((place_B >= last) & (place_B < stop))[:, None] & (column < D)[None, :]
        for h in tl.static_range(HEADS):
            to = ((event0 + place_B) * HEADS + h)[:, None] * D + column[None, :]
            tl.store(grad_key + to, 0.0, inside)
            tl.store(grad_value + to, 0.0, inside)


@triton.jit
def _events(order, event_ms, newest, at, stop, offset, B: tl.constexpr):
    """Return some events of a run, which of them there are, and their ages in days at the segment's newest event."""
    place_B = at + tl.arange(0, B)
    live_B = place_B < stop
    event_B = tl.load(order + place_B, live_B, other=offset) - offset
    age_B = (newest - tl.load(event_ms + event_B, live_B, other=newest)).to(tl.float32) * DAYS_PER_MS
    return event_B, live_B, age_B


@triton.jit
def _weights(rate_m, age_B, live_B):
    """The weight of each event in each component, at most 1; 0 for events that are not there."""
    return tl.where(live_B[:, None], tl.exp2(-rate_m[None, :] * age_B[:, None]), 0.0)


@triton.jit
def prefix_kernel(
    users,
    borders,
    order,
    bounds,
    event_ms,
    value,
    rate,
    sums,
    counts,
    events,
    segments_in_all,
    HEADS: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    M: tl.constexpr,
    MP: tl.constexpr,
    B: tl.constexpr,
):
    """Sum one code's events of one user and head over the prefixes.

    For each component, weighted: the values, the values times their age (`sums` [y, h, m, 2, C, DP]), the events, and
    the ages (`counts` [y, h, m, 2, C]).
    """
    c = tl.program_id(0).to(tl.int64) % C
    h = tl.program_id(0).to(tl.int64) // C % HEADS
    v = tl.program_id(0).to(tl.int64) // (C * HEADS)
    g = h // (HEADS // G)
    _, _, _, y0, segments = _user(users, v)
    m_M = tl.arange(0, MP)
    rate_M = tl.load(rate + h * M + m_M, m_M < M, other=0.0) * LOG2E
    sum_Md = tl.zeros([MP, DP], tl.float32)
    aged_Md = tl.zeros([MP, DP], tl.float32)
    count_M = tl.zeros([MP], tl.float32)
    age_M = tl.zeros([MP], tl.float32)
    older = y0 * 0
    column = tl.arange(0, DP)
    for s in range(0, segments):
        y = y0 + s
        newest = tl.load(borders + y * BORDER + 3)
        since = tl.where(s == 0, 0.0, (newest - older).to(tl.float32) * DAYS_PER_MS)
        older = newest
        fade_M = tl.exp2(-rate_M * since)
        aged_Md = (aged_Md + since * sum_Md) * fade_M[:, None]
        age_M = (age_M + since * count_M) * fade_M
        sum_Md *= fade_M[:, None]
        count_M *= fade_M
        run = (g * segments_in_all + y) * C + c
        stop = tl.load(bounds + run * 2 + 1)
        for at in range(tl.load(bounds + run * 2), stop, B):
            event_B, live_B, age_B = _events(order, event_ms, newest, at, stop, g * events, B)
            weight_BM = _weights(rate_M, age_B, live_B)
            aged_BM = weight_BM * age_B[:, None]
            value_Bd = _rows(value, event_B, live_B, h, HEADS, D, DP, "ieee").to(tl.float32)
            sum_Md += tl.sum(weight_BM[:, :, None] * value_Bd[:, None, :], 0)
            aged_Md += tl.sum(aged_BM[:, :, None] * value_Bd[:, None, :], 0)
            count_M += tl.sum(weight_BM, 0)
            age_M += tl.sum(aged_BM, 0)
        row = (y * HEADS + h) * (2 * M * C) + c
        at_M = m_M * (2 * C)
        at_Md = at_M[:, None] * DP + column[None, :]
        tl.store(sums + row * DP + at_Md, sum_Md, (m_M < M)[:, None])
        tl.store(sums + row * DP + C * DP + at_Md, aged_Md, (m_M < M)[:, None])
        tl.store(counts + row + at_M, count_M, m_M < M)
        tl.store(counts + row + C + at_M, age_M, m_M < M)


@triton.jit
def _codewords(codebook, h, code, C: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PRECISION: tl.constexpr):
    """Codewords of a head, [., DP], padded with zeros."""
    column = tl.arange(0, DP)
    inside = (code < C)[:, None] & (column < D)[None, :]
    return _operand(tl.load(codebook + (h * C + code[:, None]) * D + column[None, :], inside, other=0.0), PRECISION)


@triton.jit
def _rows(x, rows_P, inside_P, h, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PRECISION: tl.constexpr):
    """Rows [., DP] of one head of [., H, D]; zeros where not inside."""
    column = tl.arange(0, DP)
    inside = inside_P[:, None] & (column < D)[None, :]
    return _operand(tl.load(x + (rows_P * HEADS + h)[:, None] * D + column[None, :], inside, other=0.0), PRECISION)


@triton.jit
def code_forward_kernel(
    users,
    tiles,
    borders,
    query,
    codebook,
    sums,
    counts,
    target_ms,
    end,
    rate,
    weight,
    out,
    lse,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    M: tl.constexpr,
    P: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attention of one tile of targets over the codes of the prefix that each sees, of one head.

    A target that sees nothing gets zeros and a log sum of +inf.
    """
    h = tl.program_id(0).to(tl.int64) % HEADS
    x = tl.program_id(0).to(tl.int64) // HEADS
    _, _, _, y0, segments = _user(users, tl.load(tiles + x * 3))
    first = tl.load(tiles + x * 3 + 1)
    stop = tl.load(tiles + x * 3 + 2)
    rows_P = first + tl.arange(0, P)
    real_P = rows_P < stop
    end_P = tl.load(end + rows_P, real_P, other=-1)
    time_P = tl.load(target_ms + rows_P, real_P, other=0)
    place_P = rows_P * HEADS + h
    code = tl.arange(0, CP)
    column = tl.arange(0, DP)
    wide = (column < D)[None, :]
    q = _rows(query, rows_P, real_P, h, HEADS, D, DP, PRECISION)
    logit = tl.dot(q, tl.trans(_codewords(codebook, h, code, C, D, DP, PRECISION)), input_precision=PRECISION) * LOG2E
    rate += h * M
    weight += h * M
    tl.store(lse + place_P, float("inf"), end_P == 0)
    tl.store(out + place_P[:, None] * D + column[None, :], 0.0, (end_P == 0)[:, None] & wide)
    for s in range(0, segments):
        y = y0 + s
        border = tl.load(borders + y * BORDER)
        if (border > 0) & (tl.load(borders + y * BORDER + 1) < stop) & (tl.load(borders + y * BORDER + 2) > first):
            mine_P = end_P == border
            since_P = (time_P - tl.load(borders + y * BORDER + 3)).to(tl.float32) * DAYS_PER_MS
            top_P = _top(since_P, rate, weight, M)
            factor = tl.zeros([P, CP], tl.float32)
            for m in tl.static_range(M):
                row = ((y * HEADS + h) * M + m) * (2 * C)
                near_P = tl.exp2((tl.load(weight + m) - tl.load(rate + m) * since_P) * LOG2E - top_P)
                factor += near_P[:, None] * tl.load(counts + row + code, code < C, other=0.0)[None, :]
            logit_here = tl.where(factor > 0, logit, float("-inf"))
            most_P = tl.max(logit_here, 1)
            most_P = tl.where(most_P == float("-inf"), 0.0, most_P)
            w = tl.exp2(logit_here - most_P[:, None])
            total_P = tl.sum(w * factor, 1)
            w = _operand(w, PRECISION)
            acc = tl.zeros([P, DP], tl.float32)
            for m in tl.static_range(M):
                row = ((y * HEADS + h) * M + m) * (2 * C)
                near_P = tl.exp2((tl.load(weight + m) - tl.load(rate + m) * since_P) * LOG2E - top_P)
                at_Cd = code[:, None] * DP + column[None, :]
                sum_Cd = tl.load(sums + row * DP + at_Cd, (code < C)[:, None], other=0.0)
                acc += near_P[:, None] * tl.dot(w, _operand(sum_Cd, PRECISION), input_precision=PRECISION)
            some_P = total_P > 0
            total_P = tl.where(some_P, total_P, 1.0)
            tl.store(lse + place_P, tl.where(some_P, top_P + most_P + tl.log2(total_P), float("inf")), mine_P)
            tl.store(out + place_P[:, None] * D + column[None, :], acc / total_P[:, None], mine_P[:, None] & wide)


@triton.jit
def code_query_kernel(
    users,
    tiles,
    borders,
    query,
    codebook,
    sums,
    counts,
    target_ms,
    end,
    rate,
    weight,
    grad_out,
    lse,
    base,
    grad_query,
    part_sums,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    M: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of one tile's queries, and its sums for rates and weights, of one head."""
    h = tl.program_id(0).to(tl.int64) % HEADS
    x = tl.program_id(0).to(tl.int64) // HEADS
    _, _, _, y0, segments = _user(users, tl.load(tiles + x * 3))
    first = tl.load(tiles + x * 3 + 1)
    stop = tl.load(tiles + x * 3 + 2)
    rows_P = first + tl.arange(0, P)
    real_P = rows_P < stop
    end_P = tl.load(end + rows_P, real_P, other=-1)
    time_P = tl.load(target_ms + rows_P, real_P, other=0)
    place_P = rows_P * HEADS + h
    code = tl.arange(0, CP)
    column = tl.arange(0, DP)
    q = _rows(query, rows_P, real_P, h, HEADS, D, DP, PRECISION)
    g = _rows(grad_out, rows_P, real_P, h, HEADS, D, DP, PRECISION)
    lse_P = tl.load(lse + place_P, real_P, other=float("inf"))
    base_P = tl.load(base + place_P, real_P, other=0.0)
    words = _codewords(codebook, h, code, C, D, DP, PRECISION)
    logit = tl.dot(q, tl.trans(words), input_precision=PRECISION) * LOG2E - lse_P[:, None]
    rate += h * M
    weight += h * M
    total = tl.zeros([P, CP], tl.float32)
    pulls = tl.zeros([P, W], tl.float32)
    for s in range(0, segments):
        y = y0 + s
        border = tl.load(borders + y * BORDER)
        if (border > 0) & (tl.load(borders + y * BORDER + 1) < stop) & (tl.load(borders + y * BORDER + 2) > first):
            mine_P = end_P == border
            since_P = (time_P - tl.load(borders + y * BORDER + 3)).to(tl.float32) * DAYS_PER_MS
            for m in tl.static_range(M):
                row = ((y * HEADS + h) * M + m) * (2 * C)
                near_P = (tl.load(weight + m) - tl.load(rate + m) * since_P) * LOG2E
                w = tl.exp2(tl.minimum(logit + near_P[:, None], 100.0, tl.PropagateNan.ALL))
                w = tl.where(mine_P[:, None], w, 0.0)
                at_dC = code[None, :] * DP + column[:, None]
                inside_C = code < C
                sum_dC = _operand(tl.load(sums + row * DP + at_dC, inside_C[None, :], other=0.0), PRECISION)
                count_C = tl.load(counts + row + code, inside_C, other=0.0)
                pull = w * (tl.dot(g, sum_dC, input_precision=PRECISION) - base_P[:, None] * count_C[None, :])
                pull_P = tl.sum(pull, 1)
                total += pull
                at_Cd = code[:, None] * DP + column[None, :]
                sum_Cd = _operand(tl.load(sums + row * DP + C * DP + at_Cd, inside_C[:, None], other=0.0), PRECISION)
                age_C = tl.load(counts + row + C + code, inside_C, other=0.0)
                aged_Pd = tl.dot(_operand(w, PRECISION), sum_Cd, input_precision=PRECISION)
                aged_P = tl.sum(g * aged_Pd, 1) - base_P * tl.sum(w * age_C[None, :], 1)
                pulls = _put(pulls, 2 * m, pull_P, W)
                pulls = _put(pulls, 2 * m + 1, since_P * pull_P + aged_P, W)
    grad = tl.dot(_operand(total, PRECISION), words, input_precision=PRECISION)
    tl.store(grad_query + place_P[:, None] * D + column[None, :], grad, real_P[:, None] & (column < D)[None, :])
    tl.store(part_sums + (x * HEADS + h) * W + tl.arange(0, W), tl.sum(pulls, 0))


@triton.jit
def code_gradient_kernel(
    borders,
    query,
    codebook,
    target_ms,
    end,
    rate,
    weight,
    grad_out,
    lse,
    base,
    tables,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    CB: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    M: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sum over the targets of one border what `CB` codes' events need, [C, DP * DP + 2 * DP] a component and head.

    With a weight A of code and target: A g_k q_j at k * DP + j, then A g, then A base q. A program has `Q` of the rows
    k; the first of them has the rest, too.
    """
    parts: tl.constexpr = (D + Q - 1) // Q
    blocks: tl.constexpr = (C + CB - 1) // CB
    width: tl.constexpr = DP * DP + 2 * DP
    part = tl.program_id(0) % parts
    block = tl.program_id(0) // parts % blocks
    m = tl.program_id(0).to(tl.int64) // (parts * blocks) % M
    h = tl.program_id(0).to(tl.int64) // (parts * blocks * M) % HEADS
    y = tl.program_id(0).to(tl.int64) // (parts * blocks * M * HEADS)
    border = tl.load(borders + y * BORDER)
    stop = tl.load(borders + y * BORDER + 2)
    newest = tl.load(borders + y * BORDER + 3)
    a = tl.load(weight + h * M + m) * LOG2E
    b = tl.load(rate + h * M + m) * LOG2E
    code = block * CB + tl.arange(0, CB)
    column = tl.arange(0, DP)
    row = part * Q + tl.arange(0, Q)
    words = _codewords(codebook, h, code, C, D, DP, PRECISION)
    outer = tl.zeros([CB, Q * DP], tl.float32)
    pull = tl.zeros([CB, DP], tl.float32)
    lift = tl.zeros([CB, DP], tl.float32)
    for at in range(tl.load(borders + y * BORDER + 1), stop, P):
        near_P = tl.arange(0, P)
        mine_P = (tl.load(end + at + near_P, near_P < stop - at, other=-1) == border) & (border > 0)
        place_P = near_P * HEADS
        first = at * HEADS + h
        since_P = (tl.load(target_ms + at + near_P, mine_P, other=0) - newest).to(tl.float32) * DAYS_PER_MS
        q = _rows(query + first * D, near_P, mine_P, 0, HEADS, D, DP, PRECISION)
        lse_P = tl.load(lse + first + place_P, mine_P, other=float("inf"))
        x = tl.dot(words, tl.trans(q), input_precision=PRECISION) * LOG2E + (a - b * since_P - lse_P)[None, :]
        x = tl.where(mine_P[None, :], tl.exp2(tl.minimum(x, 100.0, tl.PropagateNan.ALL)), 0.0)
        x = _operand(x, PRECISION)
        at_PQ = place_P[:, None] * D + row[None, :]
        some = tl.load(grad_out + first * D + at_PQ, mine_P[:, None] & (row < D)[None, :], other=0.0)
        terms = tl.reshape(some[:, :, None] * q[:, None, :], [P, Q * DP])
        outer = tl.dot(x, _operand(terms, PRECISION), outer, input_precision=PRECISION)
        if part == 0:
            g = _rows(grad_out + first * D, near_P, mine_P, 0, HEADS, D, DP, PRECISION)
            pull = tl.dot(x, g, pull, input_precision=PRECISION)
            q = _operand(q * tl.load(base + first + place_P, mine_P, other=0.0)[:, None], PRECISION)
            lift = tl.dot(x, q, lift, input_precision=PRECISION)
    tables += ((y * HEADS + h) * M + m) * (C * width)
    at_C = code * width
    real = (code < C)[:, None]
    across = tl.arange(0, Q * DP)
    tl.store(tables + (at_C[:, None] + part * Q * DP + across[None, :]), outer, real)
    if part == 0:
        tl.store(tables + (at_C[:, None] + DP * DP + column[None, :]), pull, real)
        tl.store(tables + (at_C[:, None] + DP * DP + DP + column[None, :]), lift, real)


@triton.jit
def code_event_kernel(
    users,
    borders,
    order,
    bounds,
    event_ms,
    value,
    rate,
    tables,
    grad_key,
    grad_value,
    events,
    segments_in_all,
    HEADS: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    M: tl.constexpr,
    MP: tl.constexpr,
    B: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of keys and values of one code's events, of one user and head: all targets that see a segment are
    summed from the newest border back to it.
    """
    c = tl.program_id(0).to(tl.int64) % C
    h = tl.program_id(0).to(tl.int64) // C % HEADS
    v = tl.program_id(0).to(tl.int64) // (C * HEADS)
    g = h // (HEADS // G)
    _, _, _, y0, segments = _user(users, v)
    m_M = tl.arange(0, LEAST)
    m_K = tl.arange(0, MP * DP) // DP
    k_K = tl.arange(0, MP * DP) % DP
    rate_M = tl.load(rate + h * M + m_M, m_M < M, other=0.0) * LOG2E
    rate_K = tl.load(rate + h * M + m_K, m_K < M, other=0.0) * LOG2E
    width: tl.constexpr = DP * DP + 2 * DP
    outer_Kd = tl.zeros([MP * DP, DP], tl.float32)
    pull_Md = tl.zeros([LEAST, DP], tl.float32)
    base_Md = tl.zeros([LEAST, DP], tl.float32)
    newer = y0 * 0
    column = tl.arange(0, DP)
    for i in range(0, segments):
        y = y0 + segments - 1 - i
        newest = tl.load(borders + y * BORDER + 3)
        since = tl.where(i == 0, 0.0, (newer - newest).to(tl.float32) * DAYS_PER_MS)
        newer = newest
        fade_M = tl.exp2(-rate_M * since)
        table = tables + ((y * HEADS + h) * M * C + c) * width
        at_K = m_K * (C * width) + k_K * DP
        at_M = m_M * (C * width) + DP * DP
        outer_Kd *= tl.exp2(-rate_K * since)[:, None]
        outer_Kd += tl.load(table + at_K[:, None] + column[None, :], ((m_K < M) & (k_K < D))[:, None], other=0.0)
        pull_Md *= fade_M[:, None]
        pull_Md += tl.load(table + at_M[:, None] + column[None, :], (m_M < M)[:, None], other=0.0)
        base_Md *= fade_M[:, None]
        base_Md += tl.load(table + at_M[:, None] + DP + column[None, :], (m_M < M)[:, None], other=0.0)
        run = (g * segments_in_all + y) * C + c
        stop = tl.load(bounds + run * 2 + 1)
        for at in range(tl.load(bounds + run * 2), stop, B):
            event_B, live_B, age_B = _events(order, event_ms, newest, at, stop, g * events, B)
            weight_BM = _operand(_weights(rate_M, age_B, live_B), PRECISION)
            inside = live_B[:, None] & (k_K < D)[None, :]
            value_BK = tl.load(value + (event_B * HEADS + h)[:, None] * D + k_K[None, :], inside, other=0.0)
            value_BK = _operand(value_BK.to(tl.float32) * _weights(rate_K, age_B, live_B), PRECISION)
            grad_v = tl.dot(weight_BM, _operand(pull_Md, PRECISION), input_precision=PRECISION)
            grad_k = tl.dot(weight_BM, _operand(base_Md, PRECISION), input_precision=PRECISION)
            grad_k = tl.dot(value_BK, _operand(outer_Kd, PRECISION), input_precision=PRECISION) - grad_k
            to = (event_B * HEADS + h)[:, None] * D + column[None, :]
            inside = live_B[:, None] & (column < D)[None, :]
            tl.store(grad_key + to, grad_k, inside)
            tl.store(grad_value + to, grad_v, inside)
