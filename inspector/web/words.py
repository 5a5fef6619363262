"""Names in markdown: what comes out of files is shown as it is, whatever it contains.

Every text that a page builds from a model, a feed or a file goes through one of these two.
"""

from __future__ import annotations

import re

from inspector.render import printable

_MARKDOWN = re.compile(r"([\\`*_{}\[\]()<>#+\-.!|~$:&\"'])")
# Where Streamlit would begin an icon, an emoji, its own logo, a link or an arrow.
_MAGIC = re.compile(
    r":(?=[\w+\-/]+:)|(?<=http):(?=//)|(?<=https):(?=//)|www(?=\.)|@|(?<!\S)[<>~-](?=[->=])",
    re.IGNORECASE,
)
_JOINER = "\u2060"
# Of a name in a text or in a tooltip; copies and downloads have it whole.
LONGEST_NAME = 400


def md_text(text: str) -> str:
    """The text as markdown that shows exactly it, on one line.

    Escapes alone do not do: Streamlit looks for icons, emojis, links and arrows in what they leave.
    A word joiner, which has no width, keeps those apart.
    """
    text = printable(text.replace("\n", " "), LONGEST_NAME)
    return _MARKDOWN.sub(r"\\\1", _MAGIC.sub(lambda found: found[0] + _JOINER, text))


def md_code(name: str) -> str:
    """The name as a code span that it cannot break out of, whatever it contains."""
    name = printable(name.replace("\n", " "), LONGEST_NAME)
    name = name.replace(":material/", f":{_JOINER}material/")  # replaced in code spans as well
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`+", name)), default=0))
    padding = " " if name.startswith("`") or name.endswith("`") else ""
    return f"{fence}{padding}{name}{padding}{fence}" if name else "–"
