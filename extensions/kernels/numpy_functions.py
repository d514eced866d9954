"""The functions of ``functions.c`` in NumPy, for machines without the compiled library.

They have the same arguments in the same order, with arrays for C's addresses. Arrays of images are
[N, H, W, C] (channels last), weights are [K, C, ky, kx], and all are float32. The products of
matrices are NumPy's BLAS's: their bits depend on it and on the processor.
"""

from __future__ import annotations

import math

import numpy as np

# A convolution copies the windows of some images at once: as many values as a core's cache holds,
# but enough windows for a fast product.
_VALUES, _WINDOWS = 1 << 18, 512
# Batch normalization computes on as many rows at once, of about this width.
_ROWS, _WIDTH = 32, 1024

# ---------------------------------------------------------------- convolution


def _sides(H, W, ky, kx, sy, sx, py, px):
    return (H + 2 * py - ky) // sy + 1, (W + 2 * px - kx) // sx + 1


def _groups(images, pixels, length):
    """Returns the number of images of a group, and the groups as slices."""
    size = min(max(_VALUES // length, _WINDOWS) // pixels + 1, images)
    return size, [slice(start, start + size) for start in range(0, images, size)]


def _windows(x, *geometry):
    """Yields groups of images, and their windows as rows of a matrix [windows, ky * kx * C].

    A window's values are in the order of its rows, columns and channels.
    """
    ky, kx, sy, sx, py, px = geometry
    N, H, W, C = x.shape
    if geometry == (1, 1, 1, 1, 0, 0):
        yield slice(None), x.reshape(-1, C)
        return
    OH, OW = _sides(H, W, *geometry)
    size, groups = _groups(N, OH * OW, ky * kx * C)
    padded = np.zeros((size, H + 2 * py, W + 2 * px, C), np.float32)
    of_n, of_y, of_x, of_c = padded.strides
    windows = np.lib.stride_tricks.as_strided(
        padded, (size, OH, OW, ky, kx * C), (of_n, sy * of_y, sx * of_x, of_y, of_c)
    )
    copy = np.empty(windows.shape, np.float32)
    for group in groups:
        n = len(x[group])
        padded[:n, py : py + H, px : px + W] = x[group]
        copy[:n] = windows[:n]
        yield group, copy[:n].reshape(-1, ky * kx * C)


def _by_taps(w, K, C):
    """Returns the weights as [K, ky * kx, C]."""
    return np.ascontiguousarray(w.reshape(K, C, -1).transpose(0, 2, 1))


def convolution(N, H, W, C, K, ky, kx, sy, sx, py, px, x, w, y):
    x, y = x.reshape(N, H, W, C), y.reshape(N, -1, K)
    matrix = _by_taps(w, K, C).reshape(K, -1).T
    for group, windows in _windows(x, ky, kx, sy, sx, py, px):
        np.matmul(windows, matrix, out=y[group].reshape(-1, K))


def convolution_gx(N, H, W, C, K, ky, kx, sy, sx, py, px, gy, w, gx):
    OH, OW = _sides(H, W, ky, kx, sy, sx, py, px)
    gy, gx = gy.reshape(N, OH, OW, K), gx.reshape(N, H, W, C)
    taps = np.ascontiguousarray(_by_taps(w, K, C).transpose(1, 0, 2))
    if sy == sx == 1 and py < ky and px < kx:  # a convolution with the reversed kernel
        matrix = taps[::-1].reshape(-1, C)
        for group, windows in _windows(gy, ky, kx, 1, 1, ky - 1 - py, kx - 1 - px):
            np.matmul(windows, matrix, out=gx[group].reshape(-1, C))
        return
    size, groups = _groups(N, OH * OW, C)
    padded = np.empty((size, H + 2 * py, W + 2 * px, C), np.float32)
    for group in groups:
        rows = gy[group].reshape(-1, K)
        sums = padded[: len(gy[group])]
        sums.fill(0)
        for tap, (j, i) in zip(taps, np.ndindex(ky, kx)):
            met = sums[:, j : j + sy * OH : sy, i : i + sx * OW : sx]
            met += np.matmul(rows, tap).reshape(met.shape)
        gx[group] = sums[:, py : py + H, px : px + W]


def convolution_gw(N, H, W, C, K, ky, kx, sy, sx, py, px, x, gy, gw):
    x, gy = x.reshape(N, H, W, C), gy.reshape(N, -1, K)
    total = 0
    for group, windows in _windows(x, ky, kx, sy, sx, py, px):
        total += np.matmul(gy[group].reshape(-1, K).T, windows)
    gw.reshape(K, C, -1)[...] = total.reshape(K, -1, C).transpose(0, 2, 1)


# ---------------------------------------------------------------- batch normalization


def _blocks(P, C, vectors, *arrays):
    """Yields the vectors of C, repeated to a block's width, and blocks of the arrays [P, C].

    A block fits into a core's cache. A row holds several pixels: NumPy is slow on short rows.
    """
    n = math.gcd(P, max(_WIDTH // C, 1))
    wide = np.empty((len(vectors), n, C), np.float32)
    wide[...] = np.array(vectors)[:, np.newaxis]
    wide = wide.reshape(len(vectors), -1)
    arrays = [array.reshape(-1, n * C) for array in arrays]
    for start in range(0, P // n, _ROWS):
        yield (*wide, *(array[start : start + _ROWS] for array in arrays))


def _sums(blocks, C):
    """Returns two sums per channel, over the rows in float32 for a block, then in float64."""
    total = 0
    for one, other in blocks:
        total += np.array([one.sum(0), other.sum(0)], np.float64)
    return total.reshape(2, -1, C).sum(1)


def _normalize(P, C, x, mean, inv_std, gamma, beta, y):
    k, scale = mean.astype(np.float32), gamma * inv_std
    vectors = k, scale, beta - (mean - k) * scale
    for k, scale, shift, values, result in _blocks(P, C, vectors, x, y):
        np.subtract(values, k, out=result)
        result *= scale
        result += shift


def batch_normalization(P, C, eps, decay, x, gamma, beta, running_mean, running_var, saved, y):
    k = (x.reshape(P, C)[np.arange(16) * P // 16].sum(0, np.float64) / 16).astype(np.float32)
    differences = (x - k for k, x in _blocks(P, C, [k], x))
    d, square = _sums(((d, d * d) for d in differences), C) / P
    var = np.maximum(square - d * d, 0)
    mean, inv_std = saved
    mean[...] = k + d
    inv_std[...] = 1 / np.sqrt(var + eps)
    if running_mean is not None:
        running_mean[...] = decay * running_mean + (1 - decay) * mean
        running_var[...] = decay * running_var + (1 - decay) * (var * P / max(P - 1, 1))
    _normalize(P, C, x, mean, inv_std, gamma, beta, y)


def fixed_batch_normalization(P, C, eps, x, gamma, beta, mean, var, y):
    inv_std = 1 / np.sqrt(var.astype(np.float64) + eps)
    _normalize(P, C, x, mean.astype(np.float64), inv_std, gamma, beta, y)


def batch_normalization_gradients(P, C, x, gamma, saved, gy, gx, ggamma, gbeta):
    mean, inv_std = saved
    k = mean.astype(np.float32)
    blocks = _blocks(P, C, [k], x, gy)
    sum_gy, product = _sums(((gy, (x - k) * gy) for k, x, gy in blocks), C)
    rest, scale = mean - k, gamma * inv_std
    product = (product - rest * sum_gy) * inv_std
    slope = -scale * inv_std * product / P
    ggamma[...], gbeta[...] = product, sum_gy
    vectors = k, scale, slope, -scale * sum_gy / P - slope * rest
    for k, a, b, d, values, gradients, result in _blocks(P, C, vectors, x, gy, gx):
        np.subtract(values, k, out=result)
        result *= b
        result += d
        result += a * gradients


# ---------------------------------------------------------------- ReLU and max pooling


def relu(_, x, y):
    np.maximum(x, 0, out=y)


def relu_gx(_, y, gy, gx):
    np.multiply(gy, y > 0, out=gx)


def max_pooling(N, H, W, C, ky, kx, sy, sx, py, px, x, y, at):
    """If a value is NaN, so is y; its gradient may go to another pixel than C's."""
    OH, OW = _sides(H, W, ky, kx, sy, sx, py, px)
    x, y, at = x.reshape(-1, C), y.reshape(-1, C), at.reshape(-1, C)
    images, j_of_y, i_of_y = np.ogrid[:N, :OH, :OW]
    for j, i in np.ndindex(ky, kx):
        # Beyond an edge: the window's pixel at the edge, which is its maximum twice or not at all.
        rows = np.clip(j_of_y * sy + j - py, 0, H - 1)
        columns = np.clip(i_of_y * sx + i - px, 0, W - 1)
        pixels = ((images * H + rows) * W + columns).astype(np.int32).reshape(-1, 1)
        v = x[pixels[:, 0]]
        if j == i == 0:
            y[...], at[...] = v, pixels
        else:
            at += (v > y) * (pixels - at)  # three times as fast as np.copyto(.., where=v > y)
            np.maximum(y, v, out=y)


def max_pooling_gx(pixels_of_x, pixels, C, gy, at, gx):
    values = at.reshape(pixels, C) * np.int64(C) + np.arange(C)
    gx.reshape(-1)[...] = np.bincount(values.ravel(), gy.ravel(), gx.size)


# ---------------------------------------------------------------- averages, biases and the loss


def sum_pixels(N, P, C, factor, x, y):
    y.reshape(N, C)[...] = factor * x.reshape(N, P, C).sum(1, np.float64)


def spread(N, P, C, factor, gy, gx):
    gx.reshape(N, P, C)[...] = factor * gy.reshape(N, 1, C)


def add_bias(P, K, b, y):
    y.reshape(P, K)[...] += b


def softmax_cross_entropy(N, K, ignored, factor, x, t, y, loss, losses):
    z = x - x.max(1, keepdims=True).astype(np.float64)
    e = np.exp(z)
    sums = e.sum(1)
    y[...] = e / sums[:, np.newaxis]
    of_t = z[np.arange(N), t] - np.log(sums)
    of_t[t == ignored] = 0
    loss[...] = -factor * of_t.sum()
    losses[...] = 0 - of_t


def softmax_cross_entropy_gx(N, K, ignored, factor, y, t, gx):
    one_hot = np.arange(K) == t[:, np.newaxis]
    gx[...] = np.where(t == ignored, 0, factor)[:, np.newaxis] * (y - one_hot)


FUNCTIONS = {
    function.__name__: function
    for function in (
        convolution,
        convolution_gx,
        convolution_gw,
        batch_normalization,
        fixed_batch_normalization,
        batch_normalization_gradients,
        relu,
        relu_gx,
        max_pooling,
        max_pooling_gx,
        sum_pixels,
        spread,
        add_bias,
        softmax_cross_entropy,
        softmax_cross_entropy_gx,
    )
}
