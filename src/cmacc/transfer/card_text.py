"""The cells and tables of Markdown that is made from cards.

Cards are files that others may have written, so all of their text goes through `plain`.
"""

import re
from collections.abc import Sequence

from cmacc.transfer.card import DataFacts, Result
from cmacc.transfer.metrics import shown

NONE = "—"
NOT_STATED = "not stated"
_DIRECTIONS = {"video_to_audio": "video -> audio", "audio_to_video": "audio -> video"}


def with_interval(result: Result) -> str:
    """The value of a result and its 95 % interval."""
    bounds = (shown(result.metric, bound).removesuffix(" %") for bound in (result.low, result.high))
    return f"{shown(result.metric, result.value)} [{', '.join(bounds)}]"


def has_seeds(result: Result) -> bool:
    """Whether the values of which a result is the mean are those of seeds of a head, not of splits."""
    return bool(result.by_split) and all(name.startswith("seed ") for name in result.by_split)


def presence(facts: DataFacts) -> str:
    """How much of the data was there; without classes, where the data has none."""
    counts = {"files": (facts.files, facts.files_listed), "classes": (facts.classes, facts.classes_listed)}
    parts = [
        f"{found:,} of {listed:,} {what}" if facts.is_partial else f"{found:,} {what}"
        for what, (found, listed) in counts.items()
        if listed or what == "files"
    ]
    return f"{'partial' if facts.is_partial else 'complete'}: {', '.join(parts)}"


def modality_in_words(result: Result) -> str:
    """``video -> audio`` for people; ``card.json`` has ``video_to_audio``."""
    return plain(_DIRECTIONS.get(result.modality, result.modality))


def as_table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in GitHub's Markdown. Text from cards must have gone through `plain`."""
    if not rows:
        return "None."
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain(text: str) -> str:
    """The text on one line that Markdown shows as it is.

    Line ends and control characters become spaces; Markdown, HTML and cell separators are escaped.
    """
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    # Underscores within words are no markup, and names are full of them.
    escaped = re.sub(r"([\\`*~\[\]]|(?<!\w)_|_(?!\w))", r"\\\1", line.replace("&", "&amp;").replace("<", "&lt;"))
    # `>` stays, because "video -> audio" is also read in the file itself. Without `<` it ends no tag; only at the
    # beginning of a line is it markup, a quotation.
    escaped = re.sub(r"^>", "&gt;", escaped)
    # Not a backslash before it: whether that escapes a pipe depends on what stands before the backslash.
    return escaped.replace("|", "&#124;")
