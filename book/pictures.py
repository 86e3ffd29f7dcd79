"""Drawings, as SVG that takes its colours from the page."""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

INK, ACCENT, QUIET, PAPER = "#010203", "#040506", "#070809", "#0a0b0c"  # placeholders: see `svg`
COLOURS = {INK: "var(--ink)", ACCENT: "var(--accent)", QUIET: "var(--quiet)", PAPER: "var(--paper)"}
STYLE: Any = {
    "font.family": "sans-serif", "font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "book",
    "text.color": INK, "axes.edgecolor": QUIET, "axes.labelcolor": INK, "xtick.color": QUIET, "ytick.color": QUIET,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlesize": 9, "axes.titlelocation": "left", "figure.facecolor": "none", "axes.facecolor": "none",
    "savefig.facecolor": "none", "legend.frameon": False, "lines.linewidth": 1.6, "axes.linewidth": 0.8,
}
HEAT = np.array([0x2F, 0x6F, 0xB7]) / 255  # the accent of pictures made of points, which no style sheet can reach


def svg(figure: Any, alt: str) -> str:
    """The drawing as an element of the page; `alt` says in words what it shows."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = file.getvalue()
    text = text[text.index("<svg"):]
    for placeholder, colour in COLOURS.items():
        text = text.replace(placeholder, colour)
    number = f"{abs(hash_of(text)):x}"[:8]
    text = re.sub(r'\bid="([^"]+)"', rf'id="{number}-\1"', text)
    text = re.sub(r'(xlink:href="|url\()#', rf"\1#{number}-", text)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    text = text.replace("<svg ", f'<svg role="img" aria-label="{alt}" ', 1)
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', text)[1])  # type: ignore[index]
    return f'<div class="drawing" style="max-width:{width * 1.25:.0f}px">{text}</div>'


def hash_of(text: str) -> int:
    import zlib

    return zlib.crc32(text.encode())


def figure(**options: Any) -> Any:
    with plt.rc_context(STYLE):
        return plt.subplots(layout="constrained", **options)


def heat(axes: Any, M: np.ndarray, title: str, top: float | None = None) -> None:
    """|M| as shades of one colour, from paper for 0 on, so that it reads in light and dark."""
    if M.shape[0] > 1.6 * M.shape[1]:
        M = M.T
    shades = np.empty((*M.shape, 4))
    shades[..., :3] = HEAT
    shades[..., 3] = (np.abs(M) / (top or np.abs(M).max() or 1)).clip(0, 1)
    axes.imshow(shades, aspect="auto" if min(M.shape) < 8 else "equal", interpolation="nearest")
    axes.set_title(title)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(True)


def weights(W: np.ndarray, W2: np.ndarray, layer: str) -> str:
    """|W|, |dW|, |W'|, and the singular values of dW beside those of W."""
    with plt.rc_context(STYLE):
        if min(W.shape) == 1:
            drawn, axes = plt.subplots(figsize=(6.4, 2.2), layout="constrained")
            axes.plot(W.ravel(), ".", color=QUIET, label="before")
            axes.plot(W2.ravel(), ".", color=ACCENT, label="after")
            axes.set(title=layer, xlabel="entry")
            axes.legend()
            return svg(drawn, f"the entries of {layer} before and after training")
        drawn, axes = plt.subplots(1, 4, figsize=(9, 2.3), layout="constrained", width_ratios=(1, 1, 1, 1.1))
        top = float(np.quantile(np.abs(np.concatenate([W.ravel(), W2.ravel()])), 0.995))
        heat(axes[0], W, "|W|", top)
        heat(axes[1], W2 - W, "|ΔW|", float(np.quantile(np.abs(W2 - W), 0.995)) or None)
        heat(axes[2], W2, "|W′|", top)
        s, s0 = (np.linalg.svd(M, compute_uv=False) for M in (W2 - W, W))
        floor = max(s0[0], s[0]) * 1e-4
        axes[3].semilogy(np.arange(1, len(s0) + 1), s0.clip(floor), color=QUIET, label="W")
        axes[3].semilogy(np.arange(1, len(s) + 1), s.clip(floor), color=ACCENT, label="ΔW")
        axes[3].set_title("singular values")
        axes[3].legend(handlelength=1.2)
        kept = int((s > s[0] * 1e-4).sum())
        size = np.linalg.norm(W2 - W) / np.linalg.norm(W)
        return svg(drawn, f"Absolute values of {layer} before training, of its change and after; and the singular "
                          f"values of both. The change has rank {kept} of {len(s)} and {size:.0%} of the norm of W.")


def facts(W: np.ndarray, W2: np.ndarray) -> tuple[int, int, float]:
    """The rank of the change, the most it could be, and its norm relative to that of W."""
    s = np.linalg.svd(W2 - W, compute_uv=False)
    return int((s > s[0] * 1e-4).sum()), len(s), float(np.linalg.norm(W2 - W) / np.linalg.norm(W))


def tensor(T: np.ndarray, name: str) -> str:
    """A trained tensor alone."""
    with plt.rc_context(STYLE):
        if min(T.shape) == 1:
            drawn, axes = plt.subplots(figsize=(6.4, 1.8), layout="constrained")
            axes.plot(T.ravel(), ".", color=ACCENT)
            axes.set_title(name)
        else:
            drawn, axes = plt.subplots(figsize=(6.4, 2.2), layout="constrained")
            heat(axes, T, f"|{name}|", float(np.quantile(np.abs(T), 0.995)) or None)
        return svg(drawn, f"absolute values of {name} after training")
