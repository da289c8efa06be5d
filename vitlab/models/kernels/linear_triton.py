"""Fused linear attention in Triton: the mathematics of `vitlab.models.kernels.linear`, one pass over each tensor.

One program owns one (image, head): it builds the state S (features x head_dim) on chip from keys and values,
then reads the queries through it. Where images x heads are too few to fill the device, the rows are split
over several programs and partial states are summed in between. Nothing of size tokens x features
reaches device memory. Sums are float32; products run in the input's precision on the tensor cores.

The feature map "relu" is two halves, [relu(x), relu(-x)], held as two states so that every product stays a
power of two; the other maps use the first half only.
"""

import triton
import triton.language as tl


@triton.jit
def _operand(x, DOT: tl.constexpr):
    """float32 in the precision of the products; float16 saturates, since inf * 0 would be NaN."""
    if tl.float16 == DOT:
        x = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
    return x.to(DOT)


@triton.jit
def _features(x, keep, PHI: tl.constexpr):
    if PHI == "relu":
        first, second = tl.maximum(x, 0.0), tl.maximum(-x, 0.0)
    elif PHI == "elu":
        first = tl.where(x > 0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))
        second = first
    else:
        weights = tl.exp(x - tl.max(x, axis=1)[:, None])
        first = weights / tl.sum(weights, axis=1)[:, None]
        second = first
    # rows beyond the end were loaded as zeros, which elu and softmax do not map to zero
    return tl.where(keep, first, 0.0), tl.where(keep, second, 0.0)


@triton.jit
def _features_grad(x, first, g1, g2, PHI: tl.constexpr):
    if PHI == "relu":
        return tl.where(x > 0, g1, 0.0) - tl.where(x < 0, g2, 0.0)
    elif PHI == "elu":
        return g1 * tl.where(x > 0, 1.0, first)
    else:
        return first * (g1 - tl.sum(first * g1, axis=1)[:, None])


@triton.jit
def _add_state(s1, s2, z1, z2, k, v, step, lo, hi,
               D: tl.constexpr, BLOCK: tl.constexpr, PHI: tl.constexpr, DOT: tl.constexpr,
               PREC: tl.constexpr):  # fmt: skip
    """S += phi(k)^T v and z += sum of phi(k) over the rows lo..hi."""
    rows, cols = tl.arange(0, BLOCK), tl.arange(0, D)
    for start in range(lo, hi, BLOCK):
        row = start + rows
        keep = (row < hi)[:, None]
        at = row[:, None] * step + cols[None, :]
        value = tl.load(v + at, mask=keep, other=0.0).to(DOT)
        f1, f2 = _features(tl.load(k + at, mask=keep, other=0.0).to(tl.float32), keep, PHI)
        s1 = tl.dot(tl.trans(f1.to(DOT)), value, s1, input_precision=PREC)
        z1 += tl.sum(f1, axis=0)
        if PHI == "relu":
            s2 = tl.dot(tl.trans(f2.to(DOT)), value, s2, input_precision=PREC)
            z2 += tl.sum(f2, axis=0)
    return s1, s2, z1, z2


@triton.jit
def _load_state(s, z, index, D: tl.constexpr, PHI: tl.constexpr):
    cols = tl.arange(0, D)
    FEATURES: tl.constexpr = 2 * D if PHI == "relu" else D
    at = index.to(tl.int64) * FEATURES * D + cols[:, None] * D + cols[None, :]
    z_at = index.to(tl.int64) * FEATURES + cols
    s1, z1 = tl.load(s + at), tl.load(z + z_at)
    s2, z2 = s1, z1
    if PHI == "relu":
        s2, z2 = tl.load(s + at + D * D), tl.load(z + z_at + D)
    return s1, s2, z1, z2


@triton.jit
def _store_state(s, z, index, s1, s2, z1, z2, D: tl.constexpr, PHI: tl.constexpr):
    cols = tl.arange(0, D)
    FEATURES: tl.constexpr = 2 * D if PHI == "relu" else D
    at = index.to(tl.int64) * FEATURES * D + cols[:, None] * D + cols[None, :]
    z_at = index.to(tl.int64) * FEATURES + cols
    tl.store(s + at, s1)
    tl.store(z + z_at, z1)
    if PHI == "relu":
        tl.store(s + at + D * D, s2)
        tl.store(z + z_at + D, z2)


@triton.jit
def _build_state(qkv, extra, image, head, part, n, m, chunk, extra_chunk, scale, qkv_b, qkv_n, qkv_s, qkv_h,
                 extra_b, extra_n, extra_s, extra_h, R: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
                 PHI: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """The state of this program's rows, divided by the number of keys."""
    s1, s2 = tl.zeros([D, D], tl.float32), tl.zeros([D, D], tl.float32)
    z1, z2 = tl.zeros([D], tl.float32), tl.zeros([D], tl.float32)
    k = qkv + image.to(tl.int64) * qkv_b + head * qkv_h + R * qkv_s
    lo = part * chunk
    s1, s2, z1, z2 = _add_state(s1, s2, z1, z2, k, k + qkv_s, qkv_n, lo, tl.minimum(lo + chunk, n),
                                D, BLOCK, PHI, DOT, PREC)  # fmt: skip
    k = extra + image.to(tl.int64) * extra_b + head * extra_h
    lo = part * extra_chunk
    s1, s2, z1, z2 = _add_state(s1, s2, z1, z2, k, k + extra_s, extra_n, lo, tl.minimum(lo + extra_chunk, m),
                                D, BLOCK, PHI, DOT, PREC)  # fmt: skip
    return s1 * scale, s2 * scale, z1 * scale, z2 * scale


@triton.jit
def state_kernel(qkv, extra, state, norm, heads, n, m, chunk, extra_chunk, scale, qkv_b, qkv_n, qkv_s, qkv_h,
                 extra_b, extra_n, extra_s, extra_h, R: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
                 PHI: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """Partial states of each split: state [parts, images * heads, features, D], norm [.., features]."""
    pair, part = tl.program_id(0), tl.program_id(1)
    s1, s2, z1, z2 = _build_state(qkv, extra, pair // heads, pair % heads, part, n, m, chunk, extra_chunk, scale,
                                  qkv_b, qkv_n, qkv_s, qkv_h, extra_b, extra_n, extra_s, extra_h,
                                  R, D, BLOCK, PHI, DOT, PREC)  # fmt: skip
    _store_state(state, norm, part * tl.num_programs(0) + pair, s1, s2, z1, z2, D, PHI)


@triton.jit
def forward_kernel(qkv, extra, out, state, norm, heads, n, m, chunk, scale, eps, qkv_b, qkv_n, qkv_s, qkv_h,
                   extra_b, extra_n, extra_s, extra_h, R: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
                   PHI: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
                   READ: tl.constexpr, KEEP: tl.constexpr):  # fmt: skip
    """out = phi(q) S / (phi(q) z + eps); S is read (READ) or built here and stored if KEEP."""
    pair, part = tl.program_id(0), tl.program_id(1)
    image, head = pair // heads, pair % heads
    if READ:
        s1, s2, z1, z2 = _load_state(state, norm, pair, D, PHI)
    else:
        s1, s2, z1, z2 = _build_state(qkv, extra, image, head, 0, n, m, n, m, scale,
                                      qkv_b, qkv_n, qkv_s, qkv_h, extra_b, extra_n, extra_s, extra_h,
                                      R, D, BLOCK, PHI, DOT, PREC)  # fmt: skip
        if KEEP:
            _store_state(state, norm, pair, s1, s2, z1, z2, D, PHI)
    t1, t2 = _operand(s1, DOT), _operand(s2, DOT)
    rows, cols = tl.arange(0, BLOCK), tl.arange(0, D)
    q = qkv + image.to(tl.int64) * qkv_b + head * qkv_h
    o = out + image.to(tl.int64) * n * R * heads * D + head * D  # out is contiguous: B n R heads D
    lo = part * chunk
    hi = tl.minimum(lo + chunk, n)
    for branch in range(R):
        for start in range(lo, hi, BLOCK):
            row = start + rows
            keep = (row < hi)[:, None]
            x = tl.load(q + branch * qkv_s + row[:, None] * qkv_n + cols[None, :], mask=keep, other=0.0)
            f1, f2 = _features(x.to(tl.float32), keep, PHI)
            num = tl.dot(f1.to(DOT), t1, input_precision=PREC)
            den = tl.sum(f1 * z1[None, :], axis=1)
            if PHI == "relu":
                num = tl.dot(f2.to(DOT), t2, num, input_precision=PREC)
                den += tl.sum(f2 * z2[None, :], axis=1)
            at = (row[:, None] * R + branch) * heads * D + cols[None, :]
            tl.store(o + at, (num / (den + eps)[:, None]).to(out.dtype.element_ty), mask=keep)


@triton.jit
def _query_grads(q, g, dq, s1, s2, z1, z2, lo, hi, eps, q_n, q_s, g_n, g_r, dq_n, dq_s,
                 R: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, PHI: tl.constexpr,
                 DOT: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """Writes dq of the rows lo..hi; returns their share of dS and dz."""
    d1, d2 = tl.zeros([D, D], tl.float32), tl.zeros([D, D], tl.float32)
    e1, e2 = tl.zeros([D], tl.float32), tl.zeros([D], tl.float32)
    t1, t2 = tl.trans(_operand(s1, DOT)), tl.trans(_operand(s2, DOT))
    rows, cols = tl.arange(0, BLOCK), tl.arange(0, D)
    for branch in range(R):
        for start in range(lo, hi, BLOCK):
            row = start + rows
            keep = (row < hi)[:, None]
            x = tl.load(q + branch * q_s + row[:, None] * q_n + cols[None, :], mask=keep, other=0.0).to(tl.float32)
            grad = tl.load(g + branch * g_r + row[:, None] * g_n + cols[None, :], mask=keep, other=0.0)
            f1, f2 = _features(x, keep, PHI)
            den = tl.sum(f1 * z1[None, :], axis=1) + eps
            a1 = tl.dot(grad.to(DOT), t1, input_precision=PREC)  # gradient of phi(q), before the quotient
            along = tl.sum(f1 * a1, axis=1)
            a2 = a1
            if PHI == "relu":
                den += tl.sum(f2 * z2[None, :], axis=1)
                a2 = tl.dot(grad.to(DOT), t2, input_precision=PREC)
                along += tl.sum(f2 * a2, axis=1)
            inv = 1.0 / den
            along = along * inv  # = grad . out, so the output need not be read again
            dx = _features_grad(x, f1, (a1 - along[:, None] * z1[None, :]) * inv[:, None],
                                (a2 - along[:, None] * z2[None, :]) * inv[:, None], PHI)  # fmt: skip
            at = branch * dq_s + row[:, None] * dq_n + cols[None, :]
            tl.store(dq + at, dx.to(dq.dtype.element_ty), mask=keep)
            weighted = _operand(grad.to(tl.float32) * inv[:, None], DOT)
            share = (along * inv)[:, None]
            d1 = tl.dot(tl.trans(f1.to(DOT)), weighted, d1, input_precision=PREC)
            e1 -= tl.sum(f1 * share, axis=0)
            if PHI == "relu":
                d2 = tl.dot(tl.trans(f2.to(DOT)), weighted, d2, input_precision=PREC)
                e2 -= tl.sum(f2 * share, axis=0)
    return d1, d2, e1, e2


@triton.jit
def _key_grads(k, v, dk, dv, d1, d2, e1, e2, step, dstep, lo, hi,
               D: tl.constexpr, BLOCK: tl.constexpr, PHI: tl.constexpr, DOT: tl.constexpr,
               PREC: tl.constexpr):  # fmt: skip
    rows, cols = tl.arange(0, BLOCK), tl.arange(0, D)
    t1, t2 = _operand(d1, DOT), _operand(d2, DOT)
    for start in range(lo, hi, BLOCK):
        row = start + rows
        keep = (row < hi)[:, None]
        at = row[:, None] * step + cols[None, :]
        x = tl.load(k + at, mask=keep, other=0.0).to(tl.float32)
        value = tl.load(v + at, mask=keep, other=0.0).to(DOT)
        f1, f2 = _features(x, keep, PHI)
        g1 = tl.dot(value, tl.trans(t1), input_precision=PREC) + e1[None, :]
        g2 = g1
        dvalue = tl.dot(f1.to(DOT), t1, input_precision=PREC)
        if PHI == "relu":
            g2 = tl.dot(value, tl.trans(t2), input_precision=PREC) + e2[None, :]
            dvalue = tl.dot(f2.to(DOT), t2, dvalue, input_precision=PREC)
        at = row[:, None] * dstep + cols[None, :]
        tl.store(dk + at, _features_grad(x, f1, g1, g2, PHI).to(dk.dtype.element_ty), mask=keep)
        tl.store(dv + at, dvalue.to(dv.dtype.element_ty), mask=keep)


@triton.jit
def backward_kernel(grad, qkv, extra, dqkv, dextra, state, norm, dstate, dnorm, heads, n, m, chunk, extra_chunk,
                    scale, eps, grad_b, grad_n, grad_r, grad_h, qkv_b, qkv_n, qkv_s, qkv_h,
                    extra_b, extra_n, extra_s, extra_h, R: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
                    PHI: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
                    READ: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    """STEP "both": all gradients of one (image, head). "query" / "key": a split's share, dS in between."""
    pair, part = tl.program_id(0), tl.program_id(1)
    image, head = pair // heads, pair % heads
    lo = part * chunk
    hi = tl.minimum(lo + chunk, n)
    qkv_at = qkv + image.to(tl.int64) * qkv_b + head * qkv_h
    row = (R + 2) * heads * D  # the gradients are contiguous: B n R+2 heads D, B m 2 heads D
    dqkv_at = dqkv + image.to(tl.int64) * n * row + head * D
    if STEP == "key":
        d1, d2, e1, e2 = _load_state(dstate, dnorm, pair, D, PHI)
    else:
        if READ:
            s1, s2, z1, z2 = _load_state(state, norm, pair, D, PHI)
        else:
            s1, s2, z1, z2 = _build_state(qkv, extra, image, head, 0, n, m, n, m, scale,
                                          qkv_b, qkv_n, qkv_s, qkv_h, extra_b, extra_n, extra_s, extra_h,
                                          R, D, BLOCK, PHI, DOT, PREC)  # fmt: skip
        g = grad + image.to(tl.int64) * grad_b + head * grad_h
        d1, d2, e1, e2 = _query_grads(qkv_at, g, dqkv_at, s1, s2, z1, z2, lo, hi, eps, qkv_n, qkv_s, grad_n, grad_r,
                                      row, heads * D, R, D, BLOCK, PHI, DOT, PREC)  # fmt: skip
        d1, d2, e1, e2 = d1 * scale, d2 * scale, e1 * scale, e2 * scale
    if STEP == "query":
        _store_state(dstate, dnorm, part * tl.num_programs(0) + pair, d1, d2, e1, e2, D, PHI)
    else:
        k, dk = qkv_at + R * qkv_s, dqkv_at + R * heads * D
        _key_grads(k, k + qkv_s, dk, dk + heads * D, d1, d2, e1, e2, qkv_n, row, lo, hi, D, BLOCK, PHI, DOT, PREC)
        k = extra + image.to(tl.int64) * extra_b + head * extra_h
        dk = dextra + image.to(tl.int64) * m * 2 * heads * D + head * D
        lo = part * extra_chunk
        _key_grads(k, k + extra_s, dk, dk + heads * D, d1, d2, e1, e2, extra_n, 2 * heads * D,
                   lo, tl.minimum(lo + extra_chunk, m), D, BLOCK, PHI, DOT, PREC)  # fmt: skip
