"""Triton kernels for one token of a decoder block with few rows: a matrix is read once for all of them.

All sums are of fp32 products, without TF32; `tl.dot` is not used. Weights are fp32, bf16, fp16, or int8 with a scale
for each output. An index has three dimensions where rows meet a matrix: (rows, outputs, inputs). Sizes in capitals
belong to the compiled kernel; all but HEAD and SPLITS are powers of two. Pointers may be `None`, which belongs to it,
too. The number of rows does not, nor whether each has a position: one compiled kernel serves all of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.4028234663852886e38)
"""The lowest number of fp32, in place of minus infinity: a difference of two of them is no NaN."""


@triton.jit
def _weights(w, output, column, outputs, inputs, output_step, input_step):
    """Load a tile of a matrix, (1, OUTPUTS, WIDTH)."""
    at = w + output[None, :, None] * output_step + column[None, None, :] * input_step
    inside = (output[None, :, None] < outputs) & (column[None, None, :] < inputs)
    return tl.load(at, mask=inside, other=0).to(tl.float32)


@triton.jit
def _rows(x, column, rows, inputs, ROWS: tl.constexpr):
    """Load a tile of the input, (ROWS, 1, WIDTH)."""
    row = tl.arange(0, ROWS)[:, None, None]
    inside = (row < rows) & (column[None, None, :] < inputs)
    return tl.load(x + row * inputs + column[None, None, :], mask=inside, other=0).to(tl.float32)


@triton.jit
def _moments(x, rows, inputs, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Return each row's mean and the inverse of its deviation, (ROWS, 1, 1)."""
    total = tl.zeros((ROWS, 1, WIDTH), tl.float32)
    for start in range(0, inputs, WIDTH):
        total += _rows(x, start + tl.arange(0, WIDTH), rows, inputs, ROWS)
    mean = tl.sum(total, 2, keep_dims=True) / inputs
    squares = tl.zeros((ROWS, 1, WIDTH), tl.float32)
    for start in range(0, inputs, WIDTH):
        column = start + tl.arange(0, WIDTH)
        apart = _rows(x, column, rows, inputs, ROWS) - mean
        squares += tl.where(column[None, None, :] < inputs, apart * apart, 0)
    return mean, tl.rsqrt(tl.sum(squares, 2, keep_dims=True) / inputs + eps)


@triton.jit
def _normed(x, column, inputs, norm, norm_bias, mean, inverse, LAYER_NORM: tl.constexpr):
    """Apply a norm's weights to a tile of the input. An RMS norm's factor is left to `_scaled`."""
    inside = column < inputs
    factor = tl.load(norm + column, mask=inside, other=0).to(tl.float32)[None, None, :]
    if LAYER_NORM:
        x = (x - mean) * inverse
    x = x * factor
    if norm_bias is not None:
        x += tl.load(norm_bias + column, mask=inside, other=0).to(tl.float32)[None, None, :]
    return x


@triton.jit
def _scaled(products, squares, inputs, eps, LAYER_NORM: tl.constexpr):
    """Sum up products over the inputs, and multiply with an RMS norm's factor; return (ROWS, OUTPUTS)."""
    y = tl.sum(products, 2)
    if not LAYER_NORM:
        y *= tl.rsqrt(tl.sum(squares, 2) / inputs + eps)
    return y


@triton.jit
def _finished(y, output, outputs, scale, bias):
    """Apply the scales of int8 weights and a bias to (ROWS, OUTPUTS)."""
    if scale is not None:
        y *= tl.load(scale + output, mask=output < outputs, other=0)[None, :]
    if bias is not None:
        y += tl.load(bias + output, mask=output < outputs, other=0).to(tl.float32)[None, :]
    return y


@triton.jit
def _stored(y, value, output, rows, outputs, step, ROWS: tl.constexpr):
    row = tl.arange(0, ROWS)[:, None]
    inside = (row < rows) & (output[None, :] < outputs)
    tl.store(y + row * step + output[None, :], value.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def projections(
    x, norm, norm_bias, eps, q, k, v, q_scale, k_scale, v_scale, q_bias, k_bias, v_bias, y,
    rows, inputs, q_outputs, k_outputs, y_step, output_step, input_step,
    LAYER_NORM: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Compute a norm and up to three products of its result: queries, keys and values, side by side in `y`."""
    number = tl.program_id(0)
    w, outputs, before = q, q_outputs, 0
    scale = q_scale  # one by one: Triton 3.3 has no tuples with `None`
    bias = q_bias
    if k is not None:
        q_programs, k_programs = tl.cdiv(q_outputs, OUTPUTS), tl.cdiv(k_outputs, OUTPUTS)
        if number >= q_programs + k_programs:
            w, outputs, before = v, k_outputs, q_outputs + k_outputs
            number -= q_programs + k_programs
            if q_scale is not None:
                scale = v_scale
            if q_bias is not None:
                bias = v_bias
        elif number >= q_programs:
            w, outputs, before = k, k_outputs, q_outputs
            number -= q_programs
            if q_scale is not None:
                scale = k_scale
            if q_bias is not None:
                bias = k_bias
    output = number * OUTPUTS + tl.arange(0, OUTPUTS)
    mean, inverse = 0.0, 1.0
    if LAYER_NORM:
        mean, inverse = _moments(x, rows, inputs, eps, ROWS, WIDTH)
    products = tl.zeros((ROWS, OUTPUTS, WIDTH), tl.float32)
    squares = tl.zeros((ROWS, 1, WIDTH), tl.float32)
    for start in range(0, inputs, WIDTH):
        column = start + tl.arange(0, WIDTH)
        given = _rows(x, column, rows, inputs, ROWS)
        squares += given * given
        given = _normed(given, column, inputs, norm, norm_bias, mean, inverse, LAYER_NORM)
        products += given * _weights(w, output, column, outputs, inputs, output_step, input_step)
    found = _finished(_scaled(products, squares, inputs, eps, LAYER_NORM), output, outputs, scale, bias)
    _stored(y + before, found, output, rows, outputs, y_step, ROWS)


@triton.jit(do_not_specialize=["rows"])
def feed_forward(
    x, norm, norm_bias, eps, gate, up, gate_scale, up_scale, gate_bias, up_bias, y,
    rows, inputs, outputs, output_step, input_step,
    LAYER_NORM: tl.constexpr, GELU: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Compute a norm, one or two products of its result, and the activation: the inner vector of a feed-forward."""
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    mean, inverse = 0.0, 1.0
    if LAYER_NORM:
        mean, inverse = _moments(x, rows, inputs, eps, ROWS, WIDTH)
    ups = tl.zeros((ROWS, OUTPUTS, WIDTH), tl.float32)
    gates = tl.zeros((ROWS, OUTPUTS, WIDTH), tl.float32)
    squares = tl.zeros((ROWS, 1, WIDTH), tl.float32)
    for start in range(0, inputs, WIDTH):
        column = start + tl.arange(0, WIDTH)
        given = _rows(x, column, rows, inputs, ROWS)
        squares += given * given
        given = _normed(given, column, inputs, norm, norm_bias, mean, inverse, LAYER_NORM)
        ups += given * _weights(up, output, column, outputs, inputs, output_step, input_step)
        if gate is not None:
            gates += given * _weights(gate, output, column, outputs, inputs, output_step, input_step)
    found = _finished(_scaled(ups, squares, inputs, eps, LAYER_NORM), output, outputs, up_scale, up_bias)
    if gate is not None:
        opened = _finished(_scaled(gates, squares, inputs, eps, LAYER_NORM), output, outputs, gate_scale, gate_bias)
        found *= _activated(opened, GELU)
    else:
        found = _activated(found, GELU)
    _stored(y, found, output, rows, outputs, outputs, ROWS)


@triton.jit
def _activated(x, GELU: tl.constexpr):
    if GELU:  # (1 + tanh(z)) / 2 is sigmoid(2 z)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return x * tl.sigmoid(x)


@triton.jit(do_not_specialize=["position_step"])
def attention(
    qkv, cos, sin, keys, values, mask, position, sums, maxima, totals,
    scaling, heads, kv_heads, capacity, cos_step, mask_step, position_step,
    SPLITS: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Rotate a query and the new key, write key and value into the cache, and attend to the true length.

    A program computes one head of one row over one of SPLITS shares of the positions: a sum of values, the highest
    score, and the sum of the weights relative to it. `residual_product` joins the shares. The new position is in the
    first share and read from no cache, so that programs of several heads may share its key. A row whose position is
    negative attends to itself alone; its key and value go to the last place.
    """
    row, head, split = tl.program_id(0) // heads, tl.program_id(0) % heads, tl.program_id(1)
    group = heads // kv_heads
    kv_head = head // group
    d = tl.arange(0, WIDTH)
    inside = d < HEAD
    at = qkv + row * (heads + 2 * kv_heads) * HEAD
    at_key = at + (heads + kv_head) * HEAD
    query = tl.load(at + head * HEAD + d, mask=inside, other=0)
    key = tl.load(at_key + d, mask=inside, other=0)
    value = tl.load(at_key + kv_heads * HEAD + d, mask=inside, other=0)
    if cos is not None:
        other = (d + HEAD // 2) % HEAD
        cosine = tl.load(cos + row * cos_step + d, mask=inside, other=0).to(tl.float32)
        sine = tl.load(sin + row * cos_step + d, mask=inside, other=0).to(tl.float32)
        sine = tl.where(d < HEAD // 2, -sine, sine)
        query = query * cosine + tl.load(at + head * HEAD + other, mask=inside, other=0) * sine
        key = key * cosine + tl.load(at_key + other, mask=inside, other=0) * sine
    key = key.to(keys.dtype.element_ty)  # as the next tokens read it
    value = value.to(values.dtype.element_ty)
    length = tl.load(position + row * position_step).to(tl.int32)
    new = tl.where(length < 0, capacity - 1, length)  # where the token is written
    length = tl.maximum(length, 0)
    start_of = (row * kv_heads + kv_head) * capacity * HEAD
    is_writer = inside & (split == 0) & (head % group == 0)
    tl.store(keys + start_of + new * HEAD + d, key, mask=is_writer)
    tl.store(values + start_of + new * HEAD + d, value, mask=is_writer)
    query *= scaling

    # Each of PLACES lanes has a softmax of its own, so that the loop joins no lanes.
    place = tl.arange(0, PLACES)
    is_new = (place == 0) & (split == 0)
    score = tl.sum(query * key.to(tl.float32), 0) + tl.load(mask + row * mask_step + length).to(tl.float32)
    highest = tl.where(is_new, score, LOWEST)
    total = tl.where(is_new, 1.0, 0.0)
    found = tl.where(is_new[:, None], value.to(tl.float32)[None, :], 0.0)
    each = tl.cdiv(length, SPLITS)
    first = split * each
    last = tl.minimum(first + each, length)
    for start in range(first, last, PLACES):
        n = start + place
        seen = n < last
        both = seen[:, None] & inside[None, :]
        tile = start_of + n[:, None] * HEAD + d[None, :]
        old = tl.load(keys + tile, mask=both, other=0).to(tl.float32)
        scores = tl.sum(old * query[None, :], 1)
        scores += tl.load(mask + row * mask_step + n, mask=seen, other=0).to(tl.float32)
        scores = tl.where(seen, scores, LOWEST)
        now = tl.maximum(highest, scores)
        weight = tl.where(seen, tl.exp(scores - now), 0.0)
        kept = tl.exp(highest - now)
        total = total * kept + weight
        found = found * kept[:, None] + weight[:, None] * tl.load(values + tile, mask=both, other=0).to(tl.float32)
        highest = now
    most = tl.max(highest, 0)
    share = tl.exp(highest - most)
    to = tl.program_id(0) * SPLITS + split
    tl.store(sums + to * HEAD + d, tl.sum(found * share[:, None], 0), mask=inside)
    tl.store(maxima + to, most)
    tl.store(totals + to, tl.sum(total * share, 0))


@triton.jit
def _attended(sums, maxima, totals, column, rows, inputs, SPLITS: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr):
    """Join the shares of attention to a tile of its result, (ROWS, 1, WIDTH)."""
    row = tl.arange(0, ROWS)[:, None, None]
    column = column[None, None, :]
    inside = (row < rows) & (column < inputs)
    at = (row * (inputs // HEAD) + column // HEAD) * SPLITS
    most = tl.load(maxima + at, mask=inside, other=0)
    for split in tl.static_range(1, SPLITS):
        most = tl.maximum(most, tl.load(maxima + at + split, mask=inside, other=0))
    total = tl.zeros_like(most)
    found = tl.zeros_like(most)
    for split in tl.static_range(SPLITS):
        share = tl.exp(tl.load(maxima + at + split, mask=inside, other=0) - most)
        total += share * tl.load(totals + at + split, mask=inside, other=1)
        found += share * tl.load(sums + (at + split) * HEAD + column % HEAD, mask=inside, other=0)
    return found / total


@triton.jit(do_not_specialize=["rows"])
def residual_product(
    x, maxima, totals, w, scale, bias, residual, y, rows, inputs, outputs, output_step, input_step,
    SPLITS: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Add a product to the residual. Its input is `x`, or the joined shares of attention if SPLITS is not 0."""
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    products = tl.zeros((ROWS, OUTPUTS, WIDTH), tl.float32)
    for start in range(0, inputs, WIDTH):
        column = start + tl.arange(0, WIDTH)
        if SPLITS == 0:
            given = _rows(x, column, rows, inputs, ROWS)
        else:
            given = _attended(x, maxima, totals, column, rows, inputs, SPLITS, HEAD, ROWS)
        products += given * _weights(w, output, column, outputs, inputs, output_step, input_step)
    found = _finished(tl.sum(products, 2), output, outputs, scale, bias)
    row = tl.arange(0, ROWS)[:, None]
    inside = (row < rows) & (output[None, :] < outputs)
    found += tl.load(residual + row * outputs + output[None, :], mask=inside, other=0).to(tl.float32)
    _stored(y, found, output, rows, outputs, outputs, ROWS)
