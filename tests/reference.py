"""Slow, simple NumPy versions of the library's computations, in float64."""

import numpy as np


def conv3x3(x, kernel, bias):
    """'Same' 3x3 convolution: [B, H, W, C], [3, 3, C, F], [F] to [B, H, W, F]."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    b, h, w, _ = x.shape
    y = np.zeros((b, h, w, kernel.shape[-1]))
    for n in range(b):
        for i in range(h):
            for j in range(w):
                for u in range(3):
                    for v in range(3):
                        if 0 <= i + u - 1 < h and 0 <= j + v - 1 < w:
                            y[n, i, j] += x[n, i + u - 1, j + v - 1] @ kernel[u, v]
    return y + np.asarray(bias, np.float64)


def depthwise(x, kernel, stride):
    """'Same' depthwise convolution: [B, H, W, C], [K, K, 1, C] to [B, H/s, W/s, C].

    Padded as in TensorFlow: if the padding is odd, the bottom and the right get one pixel more.
    """
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    (b, h, w, c), size = x.shape, len(kernel)
    before = (size - stride) // 2
    y = np.zeros((b, h // stride, w // stride, c))
    for i in range(h // stride):
        for j in range(w // stride):
            for u in range(size):
                for v in range(size):
                    row, column = stride * i + u - before, stride * j + v - before
                    if 0 <= row < h and 0 <= column < w:
                        y[:, i, j] += x[:, row, column] * kernel[u, v, 0]
    return y


def upsample(x, kernel, bias):
    """Transposed convolution, kernel size = stride = s: each pixel becomes a separate square."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    (b, h, w, _), s = x.shape, len(kernel)
    y = np.zeros((b, s * h, s * w, kernel.shape[-1]))
    for n in range(b):
        for i in range(h):
            for j in range(w):
                for u in range(s):
                    for v in range(s):
                        y[n, s * i + u, s * j + v] = x[n, i, j] @ kernel[u, v]
    return y + np.asarray(bias, np.float64)


def group_norm(x, size, scale, bias, epsilon=1e-6):
    """Normalise each image's groups of neighbouring channels to mean 0 and variance 1."""
    x = np.asarray(x, np.float64)
    y = np.empty_like(x)
    for n in range(len(x)):
        for g in range(x.shape[-1] // size):
            group = x[n, ..., g * size : (g + 1) * size]
            y[n, ..., g * size : (g + 1) * size] = (group - group.mean()) / np.sqrt(
                group.var() + epsilon
            )
    return y * np.asarray(scale, np.float64) + np.asarray(bias, np.float64)


def batch_norm(x, real, scale, bias, epsilon=1e-5):
    """Per-channel mean and variance of the real images, and all images normalised with them."""
    x = np.asarray(x, np.float64)
    mean, variance = x[real].mean((0, 1, 2)), x[real].var((0, 1, 2))
    y = (x - mean) / np.sqrt(variance + epsilon)
    return mean, variance, y * np.asarray(scale, np.float64) + np.asarray(bias, np.float64)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def bce(logits, labels):
    """-y log p - (1 - y) log(1 - p), averaged over the pixels of each image."""
    p, y = sigmoid(logits), np.asarray(labels, np.float64)
    return (-y * np.log(p) - (1 - y) * np.log(1 - p)).mean((1, 2, 3))


def soft_dice(logits, labels, smooth=1.0):
    p, y = sigmoid(logits), np.asarray(labels, np.float64)
    losses = []
    for n in range(len(p)):
        classes = []
        for c in range(p.shape[-1]):
            overlap, total = (p[n, ..., c] * y[n, ..., c]).sum(), (p + y)[n, ..., c].sum()
            classes.append((2 * overlap + smooth) / (total + smooth))
        losses.append(1 - np.mean(classes))
    return np.array(losses)


def iou_coef(p, y):
    """The tutorial's `iou_coef`, computed from all images of a batch together."""
    overlap, total = (y * p).sum(), (y + p).sum()
    return (overlap + 100) / (total - overlap + 100)


def adam(gradients, rate=1e-3, b1=0.9, b2=0.999, epsilon=1e-7):
    """Sum of Adam's updates for a list of gradients (Kingma, Ba, ICLR 2015, Algorithm 1)."""
    m = v = total = 0.0
    for t, g in enumerate(np.asarray(gradients, np.float64), start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        total = total - rate * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + epsilon)
    return total
