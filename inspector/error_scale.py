"""The colours of errors, the same in every chart, table and graph.

Apart from `figures`, because who only colours something needs no plotting library. The scale runs
from dark blue (worst) to yellow (best) in lightness as well as in hue, so that it reads without
colour vision and on a light and a dark background.
"""

from __future__ import annotations

ERROR_STEPS: tuple[float, ...] = (10.0, 20.0, 30.0, 40.0)
ERROR_COLORS: tuple[str, ...] = ("#2a59c0", "#6077a8", "#8b8e90", "#b5a765", "#dcc54a")
"""Worst first: below 10 dB, 10 to 20, 20 to 30, 30 to 40, and 40 dB and more."""
NO_FIGURE_COLOR = "#a1a1aa"


def error_color(db: float | None) -> str:
    """The hex colour of an SQNR, the same in every chart, table and graph, light and dark.

    Worst below 10 dB, best from 40 dB (also exact). nan counts as worst, as in `metrics`; None, no
    figure at all, is a neutral grey.
    """
    if db is None:
        return NO_FIGURE_COLOR
    return ERROR_COLORS[sum(db >= step for step in ERROR_STEPS)]


def contrast_ratio(color: str, other: str) -> float:
    """The contrast of two hex colours (``#rrggbb``), 1 (none) to 21 (black on white).

    As WCAG 2.2 defines it: (lighter + 0.05) / (darker + 0.05) of the relative luminances.
    """
    first, second = sorted((_luminance(color), _luminance(other)), reverse=True)
    return (first + 0.05) / (second + 0.05)


def readable_text(color: str) -> str:
    """``"#fff"`` or ``"#000"``: the one with more contrast on this ground (``#rrggbb``).

    The better of the two has a contrast of at least 4.58 on any colour, above WCAG's 4.5.
    """
    white = contrast_ratio(color, "#ffffff")
    return "#fff" if white >= contrast_ratio(color, "#000000") else "#000"


def _luminance(color: str) -> float:
    """Relative luminance of sRGB, 0 (black) to 1 (white)."""
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
