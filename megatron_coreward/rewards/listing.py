"""Where a list is cut: at commas that are no thousands separators, at "and", "or" and semicolons."""

import re

from megatron_coreward.rewards.brackets import top_level, walk

GROUPED = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_GROUP_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
CONJUNCTION = re.compile(r",?\s+(and|or)\s+|\s*(;)\s*|,\s*(and|or)\s+")


def groupings(text: str) -> list[tuple[str, ...]]:
    """The ways to read the commas of a list: with thousands separators joined, and with every comma parting."""
    joined = tuple(part.strip().replace(",", "") if GROUPED.fullmatch(part.strip()) else part.strip()
                   for part in top_level(_GROUP_COMMA.sub("\0", text).replace("\0", "\\grouped"), ","))  # fmt: skip
    joined = tuple(part.replace("\\grouped", "") for part in joined)
    split = tuple(part.strip() for part in top_level(text, ","))
    if joined == split:
        return [split]
    if any(re.match(r"0\d", part) for part in split):  # "1,000" is no list
        return [joined]
    return [joined, split]


def split_words(text: str) -> list[tuple[str, str]]:
    """(conjunction before, part) of a text with "and", "or" or semicolons outside every bracket."""
    if CONJUNCTION.search(text) is None:
        return [("", text)]
    outside = {position for position, _, depth in walk(text) if depth == 0}
    parts, start, word = [], 0, ""
    for match in CONJUNCTION.finditer(text):
        if match.start() in outside:
            parts.append((word, text[start : match.start()].strip()))
            start, word = match.end(), match[1] or match[2] or match[3]
    parts.append((word, text[start:].strip()))
    if len(parts) == 1 or not all(part for _, part in parts):
        return [("", text)]
    last = parts.pop()
    listed = [(word, piece.strip()) for word, part in parts for piece in _listed(part)]
    return [*listed, last]


def _listed(part: str) -> list[str]:
    """The commas of a list before its "and"."""
    (*_, parts) = groupings(part)[:1]
    return [piece for piece in parts if piece]
