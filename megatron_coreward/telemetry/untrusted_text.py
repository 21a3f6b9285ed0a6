"""Text that somebody else wrote (data, models, files, other programs), on its way to a terminal or a log.

Everything that a command prints passes `printable`: control characters, which could move the cursor, recolour or
rewrite what is on the screen, are escaped, and so is what a terminal draws in another order than it stands; long text
loses its middle. `excerpt` quotes a value within a message.

Invariants (tests/telemetry/test_untrusted_text.py): what comes out has no control character but newline and tab, and is
bounded however long the text was; plain text of ordinary length, in any language, is unchanged.
"""

import re
import sys
import unicodedata
from typing import TextIO

MAX_LINE = 2_000  # characters of a line
MAX_TEXT = 64_000  # characters of a message
MAX_EXCERPT = 200  # characters of a quoted value

_CONTROL = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")  # control, format (bidi), surrogate, private, unassigned, breaks


def printable(text: str, max_line: int = MAX_LINE, max_text: int = MAX_TEXT) -> str:
    """The text as it may be printed: newlines and tabs stay, other control characters are escaped as in Python."""
    lines = shortened("\n".join(shortened(line, max_line) for line in text.split("\n")), max_text).split("\n")
    return "\n".join(map(_escaped, lines))


def shortened(text: str, limit: int) -> str:
    """A text of at most about `limit` characters: its head and its end, and how much is left out between them."""
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]} [... {len(text) - limit:,} characters ...] {text[-limit // 2 :]}"


def excerpt(value: object, limit: int = MAX_EXCERPT) -> str:
    """A value as Python writes it, on one line, without its middle if it is long."""
    whole = value if isinstance(value, str) else repr(value)
    if len(whole) <= limit:
        return _escaped(repr(value))
    return _escaped(f"{whole[: limit // 2]!r} [... {len(whole) - limit:,} characters ...] {whole[-limit // 2 :]!r}")


def say(text: str, stream: TextIO | None = None, max_text: int = MAX_TEXT) -> None:
    """Prints a line or several to a stream (standard output), whatever is in them and whatever it can encode."""
    stream = stream or sys.stdout
    lines = printable(text, max_text=max_text) + "\n"
    encoding = getattr(stream, "encoding", None) or "utf-8"
    stream.write(lines.encode(encoding, "backslashreplace").decode(encoding))
    stream.flush()


def _escaped(line: str) -> str:
    if line.isprintable():
        return line
    return re.sub(r"[^\t -~]", lambda found: _escape(found[0]), line)


def _escape(character: str) -> str:
    if unicodedata.category(character) not in _CONTROL:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode()
