"""A page in one file: no network, no script but ours, and no text of a run that is read as markup.

The page forbids itself everything else by a content security policy that names the checksum of its one script, so even
markup that slipped through could not run or load anything.
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from megatron_coreward.report.panels import Drawn
from megatron_coreward.telemetry.files import replaced_whole, writing


def write_page(path: Path, title: str, sections: Iterable[str], data: Mapping[str, Any]) -> None:
    """Writes a page whole or not at all.

    Args:
        sections: markup, in which every text of a run went through `text`.
        data: plain JSON for the script.
    """
    script = _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{_asset('page.css')}</style></head><body>\n"
        f"{''.join(sections)}\n"
        f'<div id="tip" hidden></div><script type="application/json" id="data">{embed(data)}</script>\n'
        f"<script>{script}</script></body></html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path), replaced_whole(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def embed(data: Any) -> str:
    """JSON that can stand inside a script element: nothing in it ends the element or begins a comment."""
    plain = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return plain.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def text(value: object) -> str:
    """A text of a run as markup; characters that no file can hold are replaced."""
    return escape(str(value).encode(errors="replace").decode())


def section(name: str, title: str, *parts: str) -> str:
    """A part of the page that the menu points to."""
    return f'<section id="{name}"><h2>{text(title)}</h2>{"".join(parts)}</section>\n'


def figures(drawn: Sequence[Drawn], start: int = 0) -> str:
    """Charts in a grid; the script finds the values of chart number `start` + place in the data."""
    return '<div class="charts">' + "".join(_figure(item, start + place) for place, item in enumerate(drawn)) + "</div>"


def readouts(drawn: Sequence[Drawn]) -> list[dict[str, Any]]:
    """What the script needs of the charts, in the order in which they stand on the page."""
    return [item.chart.readout for item in drawn]


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    """Rows of markup; the columns in `numeric` are set to the right."""

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(
            f'<{tag} class="n">{value}</{tag}>' if place in numeric else f"<{tag}>{value}</{tag}>"
            for place, value in enumerate(values)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{cells("th", head)}</tr></thead><tbody>{body}</tbody></table></div>'


def _figure(item: Drawn, number: int) -> str:
    legend = "".join(f'<span><i style="background:{color}"></i>{text(name)}</span>' for name, color in item.legend)
    head = f'<figcaption>{text(item.title)}</figcaption><div class="legend">{legend}</div>'
    return f'<figure data-chart="{number}">{head}{item.chart.svg}</figure>'


def _asset(name: str) -> str:
    return resources.files("megatron_coreward.report").joinpath("assets", name).read_text(encoding="utf-8")
