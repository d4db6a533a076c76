"""Triton kernels of the fused step. Import only where Triton is.

A launch covers every tensor: a program looks its chunk up in a table of addresses. ``tensors`` is int64, a row a
tensor; ``groups`` float64, a row a parameter group; the columns are the constants below. Sums go through partial sums
in a fixed order, so that two runs agree to the last bit; there are no atomics.
"""

import triton
import triton.language as tl

# Columns of ``tensors``: addresses (0: none), sizes, the parameter group.
THETA, M, G, PENDING, VERDICT, SIZE, TOTAL, ROW, ROW_BASE, GROUP = (tl.constexpr(i) for i in range(10))
TENSOR_COLUMNS = tl.constexpr(10)
# Columns of ``groups``.
LR, BETA, WEIGHT, DECAY, FLOOR, SHRINK, CENTER, POWER, RULE, POLICY, FIRST, LAST = (tl.constexpr(i) for i in range(12))
GROUP_COLUMNS = tl.constexpr(12)
# Codes in RULE and POLICY.
HALF, RMS, ROW_RMS = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
SKIP_BAD, SHRINK_BAD, OFFICIAL = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
# Columns of ``decisions``, all that the update needs to know of a tensor besides addresses: one look-up, not two.
MOMENTUM, USED, ETA, SHRUNK, WEIGHTED, DECAYED, CENTERED, POWERED, BY_ROWS = (tl.constexpr(i) for i in range(9))
DECISION_COLUMNS = tl.constexpr(9)


@triton.jit
def _address(tensors, t, column: tl.constexpr, dtype: tl.constexpr, ALIGN: tl.constexpr):
    pointer = tl.load(tensors + t * TENSOR_COLUMNS + column).to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, ALIGN)


@triton.jit
def _setting(tensors, groups, t, column: tl.constexpr):
    group = tl.load(tensors + t * TENSOR_COLUMNS + GROUP)
    return tl.load(groups + group * GROUP_COLUMNS + column)


@triton.jit
def _code(tensors, groups, t, column: tl.constexpr):
    return _setting(tensors, groups, t, column).to(tl.int32)


@triton.jit
def _reduced(theta, g, offsets, inside, squares, tests, nan_only, ACC: tl.constexpr):
    x = tl.load(theta + offsets, inside & squares, 0.0).to(ACC)
    y = tl.load(g + offsets, inside & tests, 0.0).to(tl.float32)
    bad = (y != y) | ((tl.abs(y) == float("inf")) & (nan_only == 0))
    return tl.sum(x * x), tl.max(bad.to(tl.int32))


@triton.jit
def reduce_kernel(
    tensors, groups, chunks, square_parts, bad_parts, T_THETA: tl.constexpr, T_G: tl.constexpr, ACC: tl.constexpr,
    AMP: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Σθ² and "has a bad entry" of each chunk, where they are needed."""
    pid = tl.program_id(0)
    t = tl.load(chunks + 2 * pid).to(tl.int64)
    start = tl.load(chunks + 2 * pid + 1).to(tl.int64) * BLOCK
    size = tl.load(tensors + t * TENSOR_COLUMNS + SIZE)
    policy = _code(tensors, groups, t, POLICY)
    has_gradient = tl.load(tensors + t * TENSOR_COLUMNS + G) != 0
    fresh = tl.load(_address(tensors, t, PENDING, tl.int8, 1)) != 0
    squares = (_code(tensors, groups, t, RULE) == RMS) & (_code(tensors, groups, t, LAST) != 0)
    squares = squares & (has_gradient | (fresh == 0))  # nothing moves what has no gradient in its cycle
    tests = has_gradient & (policy != 0)
    if AMP:
        tests = tests & (policy < 0)  # the scaler has looked
    nan_only = (policy == OFFICIAL).to(tl.int32)
    theta = _address(tensors, t, THETA, T_THETA, ALIGN) + start
    g = _address(tensors, t, G, T_G, ALIGN) + start
    offsets = tl.arange(0, BLOCK)
    if start + BLOCK <= size:  # no mask by position, so that loads are wide
        square, bad = _reduced(theta, g, offsets, offsets < BLOCK, squares, tests, nan_only, ACC)
    else:
        square, bad = _reduced(theta, g, offsets, offsets < size - start, squares, tests, nan_only, ACC)
    tl.store(square_parts + pid, square)
    tl.store(bad_parts + pid, bad)


@triton.jit
def row_kernel(
    tensors, groups, chunks, row_scales, T_THETA: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """max(RMS, floor) of each row of the embeddings."""
    pid = tl.program_id(0)
    t = tl.load(chunks + 2 * pid).to(tl.int64)
    row = tl.load(tensors + t * TENSOR_COLUMNS + ROW)
    count = tl.load(tensors + t * TENSOR_COLUMNS + SIZE) // row
    rows = tl.load(chunks + 2 * pid + 1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (rows < count) & (_code(tensors, groups, t, LAST) != 0)
    theta = tl.load(tensors + t * TENSOR_COLUMNS + THETA).to(tl.pointer_type(T_THETA))
    squares = tl.zeros([ROWS, BLOCK], ACC)
    for begin in range(0, row, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        mask = inside[:, None] & (columns < row)[None, :]
        x = tl.load(theta + rows[:, None] * row + columns[None, :], mask, 0.0).to(ACC)
        squares += x * x
    scale = tl.sqrt(tl.sum(squares, 1) / row.to(ACC))
    scale = tl.maximum(scale, _setting(tensors, groups, t, FLOOR).to(ACC))
    base = tl.load(tensors + t * TENSOR_COLUMNS + ROW_BASE)
    tl.store(row_scales + base + rows, scale, inside)


@triton.jit
def decide_kernel(
    tensors, groups, firsts, square_parts, bad_parts, sums, bads, decisions, found_inf, ACC: tl.constexpr,
    AMP: tl.constexpr, SUM: tl.constexpr, DECIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add a tensor's parts up (SUM); say what happens to it, and move its flag on (DECIDE)."""
    t = tl.program_id(0).to(tl.int64)
    if SUM:
        first, end = tl.load(firsts + t), tl.load(firsts + t + 1)
        squares, worst = tl.zeros([BLOCK], ACC), tl.zeros([BLOCK], tl.int32)
        for begin in range(first, end, BLOCK):
            part = begin + tl.arange(0, BLOCK)
            squares += tl.load(square_parts + part, part < end, 0.0)
            worst = tl.maximum(worst, tl.load(bad_parts + part, part < end, 0))
        square, bad = tl.sum(squares), tl.max(worst)
        tl.store(sums + t, square)
        tl.store(bads + t, bad)
    else:
        square, bad = tl.load(sums + t), tl.load(bads + t)
    if DECIDE:
        if AMP:
            bad = (tl.load(found_inf) != 0).to(tl.int32)
        policy, rule = _code(tensors, groups, t, POLICY), _code(tensors, groups, t, RULE)
        last, first_of_cycle = _code(tensors, groups, t, LAST) != 0, _code(tensors, groups, t, FIRST) != 0
        official = policy == OFFICIAL
        has_gradient = tl.load(tensors + t * TENSOR_COLUMNS + G) != 0
        good = has_gradient & (bad == 0)
        # A gradient that a hook consumed has left its verdict.
        verdict = tl.load(tensors + t * TENSOR_COLUMNS + VERDICT)
        consumed = verdict != 0
        accepted = tl.load(verdict.to(tl.pointer_type(tl.int8)), consumed, 1) != 0
        any_bad = (has_gradient & (bad != 0)) | (accepted == 0)
        all_good = (has_gradient | consumed) & (any_bad == 0)

        flag = _address(tensors, t, PENDING, tl.int8, 1)
        pending = tl.where(official, first_of_cycle, tl.load(flag) != 0)
        fresh = pending & good
        pending = pending & (good == 0)
        active = last & tl.where(official, all_good, pending == 0)
        tl.store(flag, (last | pending).to(tl.int8))

        eta = _setting(tensors, groups, t, LR)
        total = tl.load(tensors + t * TENSOR_COLUMNS + TOTAL)
        size = tl.sqrt(square / total.to(ACC)).to(tl.float64)
        size = tl.maximum(size, _setting(tensors, groups, t, FLOOR))
        eta = tl.where(rule == RMS, eta * size, tl.where(rule == HALF, 0.5 * eta, eta))
        shrinks = any_bad & (policy >= SHRINK_BAD)
        if AMP:
            shrinks = shrinks & (policy < 0)
        row = decisions + t * DECISION_COLUMNS
        tl.store(row + MOMENTUM, tl.where(fresh, _setting(tensors, groups, t, BETA), 1.0))
        tl.store(row + USED, tl.where(good, 1.0, 0.0))
        tl.store(row + ETA, tl.where(active, eta, 0.0))
        tl.store(row + SHRUNK, tl.where(shrinks, _setting(tensors, groups, t, SHRINK), 0.0))
        tl.store(row + WEIGHTED, _setting(tensors, groups, t, WEIGHT))
        tl.store(row + DECAYED, _setting(tensors, groups, t, DECAY))
        tl.store(row + CENTERED, _setting(tensors, groups, t, CENTER))
        tl.store(row + POWERED, _setting(tensors, groups, t, POWER))
        tl.store(row + BY_ROWS, tl.where(rule == ROW_RMS, 1.0, 0.0))


@triton.jit
def _rounded(x, seed, offsets, dtype: tl.constexpr):
    """x in ``dtype``, up or down at random with mean x, as ``stochastic_round``."""
    if dtype == tl.bfloat16:
        P: tl.constexpr = 8
        LOWEST: tl.constexpr = 8  # so that the spacing below is a normal number
    else:
        P: tl.constexpr = 11
        LOWEST: tl.constexpr = 113  # 2⁻¹⁴
    exponent = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 255, LOWEST)
    spacing = ((exponent - (P - 1)) << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent + (P - 1)) << 23).to(tl.float32, bitcast=True)
    draw = (tl.randint(seed, offsets) & ((1 << (24 - P)) - 1)).to(tl.float32) / (1 << (24 - P))
    rounded = tl.floor(x * inverse + draw) * spacing
    return tl.where(exponent < 255, rounded, x)


@triton.jit
def _updated(
    theta, m, g, offsets, inside, scale, momentum, weight, used, eta, decay, shrink, center, power, inverse_scale,
    seed, shift, T_THETA: tl.constexpr, T_M: tl.constexpr, ACC: tl.constexpr, AMP: tl.constexpr, POWERS: tl.constexpr,
    ROUND: tl.constexpr,
):  # fmt: skip
    moves = (eta != 0).to(tl.int32) != 0
    touched = moves | ((shrink != 0).to(tl.int32) != 0)
    v = tl.load(m + offsets, inside & (used | moves), 0.0)
    y = tl.load(g + offsets, inside & used, 0.0).to(ACC)
    x = tl.load(theta + offsets, inside & touched, 0.0)
    if AMP:
        y = y * inverse_scale
    v = tl.where(used, tl.fma(y, (offsets * 0).to(ACC) + weight, v.to(ACC) * momentum).to(T_M), v)
    tl.store(m + offsets, v, inside & used)
    v = v.to(ACC)
    u = tl.where(v > 0, 1.0, tl.where(v < 0, -1.0, 0.0)).to(ACC)
    if POWERS:
        size = tl.abs(v)
        size = tl.where(size > 0, tl.exp2(power * tl.log2(tl.where(size > 0, size, 1.0))), 0.0)
        u = tl.where(power == 0, u, tl.where(power == 1, v, u * size))
    # Shrunk first, as a step of its own; the rate is that of θ before.
    x = tl.where(shrink != 0, (x.to(ACC) + shrink * (center - x.to(ACC))).to(T_THETA), x).to(ACC)
    x = x - eta * scale * (u + decay * x)
    if ROUND:
        x = tl.where(moves, _rounded(x, seed, shift + offsets, T_THETA), x)
    tl.store(theta + offsets, x.to(T_THETA), inside & touched)


@triton.jit
def update_kernel(
    tensors, chunks, decisions, row_scales, grad_scale, seed, n_chunks, T_THETA: tl.constexpr,
    T_M: tl.constexpr, T_G: tl.constexpr, ACC: tl.constexpr, AMP: tl.constexpr, POWERS: tl.constexpr,
    ROUND: tl.constexpr, REVERSED: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """m and θ of each chunk."""
    pid = tl.program_id(0)
    if REVERSED:  # what was reduced last is still in the cache
        pid = n_chunks - 1 - pid
    t = tl.load(chunks + 2 * pid).to(tl.int64)
    start = tl.load(chunks + 2 * pid + 1).to(tl.int64) * BLOCK
    size = tl.load(tensors + t * TENSOR_COLUMNS + SIZE)
    row = decisions + t * DECISION_COLUMNS
    momentum = tl.load(row + MOMENTUM).to(ACC)
    used = tl.load(row + USED).to(tl.int32) != 0
    eta = tl.load(row + ETA).to(ACC)
    shrink = tl.load(row + SHRUNK).to(ACC)
    weight = tl.load(row + WEIGHTED).to(ACC)
    decay = tl.load(row + DECAYED).to(ACC)
    center = tl.load(row + CENTERED).to(ACC)
    power = tl.load(row + POWERED).to(ACC)
    inverse_scale = 1.0
    if AMP:
        inverse_scale = 1.0 / tl.load(grad_scale)
    key = 0
    if ROUND:
        key = tl.load(seed) + t
    theta = _address(tensors, t, THETA, T_THETA, ALIGN) + start
    m = _address(tensors, t, M, T_M, ALIGN) + start
    g = _address(tensors, t, G, T_G, ALIGN) + start
    offsets = tl.arange(0, BLOCK)
    scale = (offsets * 0 + 1).to(ACC)
    if tl.load(row + BY_ROWS) != 0:
        length = tl.load(tensors + t * TENSOR_COLUMNS + ROW)
        base = tl.load(tensors + t * TENSOR_COLUMNS + ROW_BASE) + start // length
        rows = ((start % length).to(tl.int32) + offsets) // length.to(tl.int32)
        scale = tl.load(row_scales + base + rows, (offsets < size - start) & ((eta != 0).to(tl.int32) != 0), 0.0)
    if start + BLOCK <= size:
        _updated(theta, m, g, offsets, offsets < BLOCK, scale, momentum, weight, used, eta, decay,
                 shrink, center, power, inverse_scale, key, start, T_THETA, T_M, ACC, AMP, POWERS, ROUND)  # fmt: skip
    else:
        _updated(theta, m, g, offsets, offsets < size - start, scale, momentum, weight, used, eta, decay,
                 shrink, center, power, inverse_scale, key, start, T_THETA, T_M, ACC, AMP, POWERS, ROUND)  # fmt: skip
