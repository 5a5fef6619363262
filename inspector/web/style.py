"""Colours and spacing of the pages: the part that a Streamlit theme cannot say."""

from __future__ import annotations

import numpy as np
import streamlit as st
from PIL import Image

from inspector.comparison import LOOK_DB
from inspector.render import PROBLEM_DB

FLOAT = {"light": "#475569", "dark": "#94a3b8"}
QUANTIZED = {"light": "#d97706", "dark": "#f59e0b"}
EXCLUDED = "#7c3aed"

SIGNS = {"problem": "●", "look": "▲", "fine": "✓", "unknown": "–"}

_CSS = """
<style>
.stApp { font-variant-numeric: tabular-nums; }
.stMainBlockContainer { padding: 0.6rem 1.75rem 2rem 1.75rem; max-width: 1720px; }
header[data-testid="stHeader"] { background: transparent; height: 2.25rem; min-height: 0;
  pointer-events: none; }
header[data-testid="stHeader"] * { pointer-events: auto; }
section[data-testid="stSidebar"] [data-testid="stSidebarHeader"] { height: 2.25rem; padding-top: 0;
  padding-bottom: 0; margin-bottom: 0; }
section[data-testid="stSidebar"] [data-testid="stSidebarUserContent"] { padding-top: 0; }
.stVerticalBlock { gap: 0.6rem; }
[data-testid="stMetric"] > div { padding: 0.5rem 0.8rem; }
[data-testid="stMetricLabel"] p { font-size: 0.8rem; }
[data-testid="stMetricDelta"] { background: none; padding: 0; font-size: 0.8rem; }
[data-testid="stMetricDelta"], [data-testid="stMetricDelta"] div,
[data-testid="stMetricDelta"] p { white-space: normal; overflow: visible; line-height: 1.3; }
h1, h2, h3 { letter-spacing: -0.01em; }
h1 { padding: 0.1rem 0 !important; }
.st-key-context { border-bottom: 1px solid rgba(128, 128, 128, 0.25); padding-bottom: 0.35rem;
  min-height: 2.9rem; }
.st-key-context p { margin: 0; white-space: nowrap; }
.st-key-context [data-testid="stMarkdownContainer"],
.st-key-sentence [data-testid="stMarkdownContainer"],
.st-key-job [data-testid="stMarkdownContainer"],
.st-key-brand [data-testid="stMarkdownContainer"] { margin-bottom: 0; }
[data-testid="stLayoutWrapper"]:has(> .st-key-context-end) { flex: 1 1 auto !important;
  min-width: max-content; width: auto !important; }
.st-key-context button p { font-size: 0.85rem; }
.st-key-context { row-gap: 0.1rem; }
.st-key-whose p { font-size: 0.85rem; }
.st-key-note { margin-top: -0.25rem; }
.st-key-context [data-testid="stSelectbox"] { min-width: 7rem; }
[class*="st-key-picture-"] { position: relative; }
[class*="st-key-csv-"] { position: absolute; top: 0; right: 0.2rem; width: auto !important;
  z-index: 2; opacity: 0.55; }
[class*="st-key-csv-"]:hover, [class*="st-key-csv-"]:focus-within { opacity: 1; }
[class*="st-key-csv-"] button { min-height: 0; padding: 0 0.3rem; font-size: 0.75rem; }
[class*="st-key-wait-"] { display: flex; justify-content: center; }
[data-testid="stElementToolbar"] { top: 0.15rem !important; }
.st-key-proposal { min-height: 2.1rem; }
.st-key-chart-choice { min-height: 1.7rem; }
.st-key-chart-choice button { min-height: 1.6rem; padding: 0 0.6rem; }
.st-key-chart-choice button p { font-size: 0.8rem; }
.st-key-what { min-height: 2rem; }
.st-key-what button { min-height: 1.6rem; padding: 0 0.5rem; font-size: 0.8rem; }
.st-key-what [data-testid="stMarkdownContainer"],
.st-key-unmatched [data-testid="stMarkdownContainer"] { margin-bottom: 0; }
.st-key-basis summary { padding: 0.15rem 0.6rem; min-height: 0; font-size: 0.85rem; }
.st-key-basis summary p { font-size: 0.85rem; }
.st-key-formula pre { padding: 0.35rem 0.8rem; }
.st-key-formula code { font-size: 0.92rem; }
.st-key-sentence p { font-size: 1.25rem; font-weight: 620; line-height: 1.3; margin: 0; }
.st-key-brand p { font-weight: 650; font-size: 1.02rem; margin: 0 0 0.4rem 0; }
.st-key-preview [data-testid="stMetric"] { border: 1px dashed #7c3aed; }
[data-testid="stLayoutWrapper"]:has(> .st-key-node-card), .st-key-node-card {
  flex: none !important; height: max(560px, calc(100vh - 225px)) !important; }
.st-key-nav { gap: 0.1rem; }
</style>
"""

# `/` and `?` cannot be button shortcuts in Streamlit. This script only moves the focus and presses
# a button that is on the page; it reads and writes nothing else.
_KEYS = """
<script>
(() => {
  if (window.quantInspectorKeys) return;
  window.quantInspectorKeys = true;
  document.addEventListener("keydown", (event) => {
    const target = event.target;
    const typing = target instanceof HTMLElement &&
      (target.isContentEditable || /^(input|textarea|select)$/i.test(target.tagName));
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "/") {
      const field = document.querySelector('[class*="st-key-find"] input');
      if (field) { event.preventDefault(); field.focus(); field.select(); }
    } else if (event.key === "?") {
      const button = document.querySelector('[class*="st-key-keys"] button');
      if (button) { event.preventDefault(); button.click(); }
    }
  });
})();
</script>
"""


def apply() -> None:
    """Puts the stylesheet and the two extra keys on the page."""
    st.html(_CSS)
    st.html(_KEYS, unsafe_allow_javascript=True)


@st.cache_resource
def icon() -> Image.Image:
    """The browser tab's picture: four bars, the last one fallen. Fetched from nowhere."""
    pixels = np.zeros((32, 32, 4), np.uint8)
    for place, (top, color) in enumerate(
        ((4, (71, 85, 105)), (8, (71, 85, 105)), (10, (71, 85, 105)), (22, (217, 119, 6)))
    ):
        left = 2 + 7 * place
        pixels[top:30, left : left + 6] = (*color, 255)
    return Image.fromarray(pixels)


def is_dark() -> bool:
    """Whether the browser shows the dark theme."""
    return bool(st.context.theme.type == "dark")


def severity(sqnr_db: float | None) -> str:
    """The severity of an SQNR in dB: a key of `SIGNS`."""
    if sqnr_db is None or sqnr_db != sqnr_db:
        return "unknown"
    if sqnr_db < PROBLEM_DB:
        return "problem"
    return "look" if sqnr_db < LOOK_DB else "fine"
