"""What others wrote reaches a terminal escaped and bounded, wherever it comes from."""

import io
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from megatron_coreward.telemetry.console import PlainView
from megatron_coreward.telemetry.untrusted_text import MAX_LINE, MAX_TEXT, excerpt, printable, say

CLEARS_THE_SCREEN = "\x1b[2J\x1b]0;title\x07"


@given(st.text(st.characters(), max_size=200))
def test_no_control_character_but_newline_and_tab_comes_out(text: str) -> None:
    shown = printable(text)
    bad = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    assert [c for c in shown if unicodedata.category(c) in bad and c not in "\n\t"] == []
    assert "\n" not in excerpt(text)
    assert excerpt(text).isprintable() or any(unicodedata.category(c) == "Zs" for c in text)


def test_plain_text_of_any_language_is_unchanged() -> None:
    text = "Größe: 3 × 4 = 12\n\tВопрос 数学 ½ €\u00a0x"
    assert printable(text) == text


def test_escapes_and_reversed_text_are_shown_as_what_they_are() -> None:
    assert printable(f"column {CLEARS_THE_SCREEN}") == "column \\x1b[2J\\x1b]0;title\\x07"
    assert printable("answer \u202e21\u2066") == "answer \\u202e21\\u2066"
    assert printable("done\rerror \x9b31m \udcff") == "done\\rerror \\x9b31m \\udcff"


def test_long_text_loses_its_middle() -> None:
    shown = printable("a" * 1_000_000 + "end")
    assert len(shown) < MAX_LINE + 50
    assert shown.startswith("aaa")
    assert shown.endswith("end")
    assert "998,003 characters" in shown
    assert len(printable("line\n" * 1_000_000)) < MAX_TEXT + 50
    assert len(excerpt("x" * 10**6)) < 300
    assert excerpt(0.5) == "0.5"


def test_a_stream_that_cannot_encode_gets_escapes() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    say("größe \udc80", stream)
    assert raw.getvalue() == b"gr\\xf6\\xdfe \\udc80\n"


class ClosedPipe(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_a_run_goes_on_when_nobody_reads_what_it_prints() -> None:
    view = PlainView("run", 3, 0, ClosedPipe())
    view.note("a note")
    view.write(1, {"step_time_s": 1.0, "reward/mean": 0.5})
    view.close()
