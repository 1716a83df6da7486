"""Other people's losses as their papers write them: float64 NumPy, one number at a time where that is not too slow.

Each takes student and teacher (B, C, H, W) and gives the unweighted loss.
"""

from __future__ import annotations

import math

import numpy as np


def pooled(x):
    return x.sum((2, 3)) / (x.shape[2] * x.shape[3])


def mse(s, t):
    return math.fsum((a - b) ** 2 for a, b in zip(s.ravel(), t.ravel(), strict=True)) / s.size


def cosine(s, t):
    places = [(b, i, j) for b in range(len(s)) for i in range(s.shape[2]) for j in range(s.shape[3])]
    cos = [np.vdot(s[b, :, i, j], t[b, :, i, j]) / math.sqrt(np.vdot(s[b, :, i, j], s[b, :, i, j])
           * np.vdot(t[b, :, i, j], t[b, :, i, j])) for b, i, j in places]  # fmt: skip
    return sum(1 - c for c in cos) / len(places)


def at(s, t):
    total = 0.0
    for a, b in zip(s, t, strict=True):
        a, b = (np.einsum("chw,chw->hw", x, x) / len(x) for x in (a, b))
        total += np.mean((a / np.linalg.norm(a) - b / np.linalg.norm(b)) ** 2)
    return total / len(s)


def cwd(s, t, tau=1.0):
    total = 0.0
    for b in range(len(s)):
        for c in range(s.shape[1]):
            x, y = s[b, c].ravel() / tau, t[b, c].ravel() / tau
            log_s, log_t = (v - v.max() - math.log(np.exp(v - v.max()).sum()) for v in (x, y))
            total += sum(math.exp(q) * (q - p) for p, q in zip(log_s, log_t, strict=True))
    return tau**2 * total / (s.shape[0] * s.shape[1])


def pkd(s, t):
    total = 0.0
    for c in range(s.shape[1]):
        a, b = ((x[:, c] - np.mean(x[:, c])) / (np.std(x[:, c]) + 1e-6) for x in (s, t))
        total += 0.5 * np.mean((a - b) ** 2)
    return total / s.shape[1]


def smooth_l1(x):
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def rkd(s, t, distance=25.0, angle=50.0):
    found = []
    for x in map(pooled, (s, t)):
        n = range(len(x))
        gaps = {(i, j): math.dist(x[i], x[j]) for i in n for j in n}
        mean = sum(gaps.values()) / (len(x) * (len(x) - 1))
        angles = {(j, i, k): (x[i] - x[j]) @ (x[k] - x[j]) / (gaps[i, j] * gaps[k, j]) if j not in (i, k) else 0.0
                  for j in n for i in n for k in n}  # fmt: skip
        found.append(({at: gap / mean for at, gap in gaps.items()}, angles))
    ours, theirs = found
    means = [sum(smooth_l1(a[at] - b[at]) for at in a) / len(a) for a, b in zip(ours, theirs, strict=True)]
    return distance * means[0] + angle * means[1]


def sp(s, t):
    grams = []
    for x in (s, t):
        gram = np.array([[np.vdot(a, b) for b in x] for a in x])
        grams.append(np.stack([row / math.sqrt(row @ row) for row in gram]))
    return sum((a - b) ** 2 for a, b in zip(grams[0].ravel(), grams[1].ravel(), strict=True)) / len(s) ** 2


def mgd(s, t, generator, kept):
    """The convolutions as sums over nine shifts."""
    w1, b1, w2, b2 = (p.detach().double().numpy() for p in generator.parameters())
    hidden = np.maximum(_convolved(s * kept, w1, b1), 0)
    return ((_convolved(hidden, w2, b2) - t) ** 2).sum() / len(s)


def _convolved(x, weight, bias):
    height, width = x.shape[2:]
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    out = np.zeros((len(x), len(weight), height, width)) + bias[:, None, None]
    for i in range(3):
        for j in range(3):
            out += np.einsum("oc,bchw->bohw", weight[:, :, i, j], padded[:, :, i : i + height, j : j + width])
    return out


# Columns of the 2x2 block (upper left, upper right, lower left, lower right): low, then the three that are compared.
HAAR = np.array([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]).T / 2


def freekd(s, t):
    """Each 2x2 block through the four Haar vectors; teacher and student apart."""
    bands = [[], []]
    for side, x in enumerate((s, t)):
        rows, columns = (np.minimum(np.arange(-(-n // 8) * 8), n - 1) for n in x.shape[2:])
        low = x[:, :, rows][:, :, :, columns]
        for _ in range(3):
            half = np.zeros((4, *low.shape[:2], low.shape[2] // 2, low.shape[3] // 2))
            for i in range(half.shape[3]):
                for j in range(half.shape[4]):
                    block = low[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(*low.shape[:2], 4)
                    half[..., i, j] = np.moveaxis(block @ HAAR, -1, 0)
            low = half[0]
            bands[side] += list(half[1:])
    return sum(np.mean(abs(a - b)) for a, b in zip(*bands, strict=True))


def fdcmkd(s, t):
    total = 0.0
    for a, b in zip(pooled(s), pooled(t), strict=True):
        parts = []
        for x in (a, b):
            spectrum, bins = np.fft.rfft(x), np.arange(len(x) // 2 + 1)
            for mask in ((bins >= 1) & (bins <= len(x) // 4), bins > len(x) // 4):
                part = np.fft.irfft(spectrum * mask, n=len(x))
                part = part - part.mean()
                parts.append(part / np.linalg.norm(part))
        low_s, high_s, low_t, high_t = parts
        relaxed = [np.sign(x) * np.log(1 + abs(x)) for x in (high_s, high_t)]
        total += np.mean((low_s - low_t) ** 2) + np.mean((relaxed[0] - relaxed[1]) ** 2)
    return total / len(s)


def cka(s, t):
    """HSIC_1 as the inner product of U-centred Gram matrices (Szekely and Rizzo), on rows that are not centred."""
    n, centred = len(s), []
    for x in (pooled(s), pooled(t)):
        a = x @ x.T
        np.fill_diagonal(a, 0)
        a = a - a.sum(0) / (n - 2) - a.sum(1)[:, None] / (n - 2) + a.sum() / ((n - 1) * (n - 2))
        np.fill_diagonal(a, 0)
        centred.append(a)
    a, b = centred
    return 1 - np.vdot(a, b) / math.sqrt(np.vdot(a, a) * np.vdot(b, b))


REFERENCES = {"mse": mse, "cosine": cosine, "fitnet": mse, "at": at, "cwd": cwd, "pkd": pkd, "rkd": rkd, "sp": sp,
              "freekd": freekd, "fdcmkd": fdcmkd, "cka": cka}  # fmt: skip
