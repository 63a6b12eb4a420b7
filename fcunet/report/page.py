"""One HTML page that needs nothing beside it: its style and its figures are in it."""

import base64
import html
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from .. import plot
from ..session import write_bytes, write_text

logger = logging.getLogger(__name__)

_PHONE_DPI = 240  # of a figure as wide as a journal column, on a screen with fine pixels
_CSS = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --accent: light-dark(#0072b2, #56b4e9);
--warn: #d55e00; } body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 62rem; padding:
1rem; overflow-wrap: anywhere; } h1 { font-size: 1.5rem; margin: 0.5rem 0 0; } h2 { font-size: 1.15rem;
margin: 2.2rem 0 0.6rem; border-bottom: 1px solid var(--line); padding-bottom: 0.2rem; } p { margin: 0.5rem
0; } .small { opacity: 0.75; font-size: 0.9rem; } figure { margin: 1rem 0; } figure img { background: #fff;
border-radius: 6px; height: auto; max-width: 100%; } figcaption { font-size: 0.9rem; opacity: 0.8; } .numbers
{ display: grid; gap: 0.6rem; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); margin: 1rem 0; }
.numbers div { background: var(--soft); border-radius: 6px; padding: 0.5rem 0.7rem; } .numbers b { display:
block; font-size: 1.25rem; } .wide { overflow-x: auto; } table { border-collapse: collapse; font-size:
0.92rem; } td, th { border-bottom: 1px solid var(--line); padding: 0.2rem 0.9rem 0.2rem 0; text-align: left;
vertical-align: top; } th { font-weight: 600; } .grid td, .grid th { overflow-wrap: normal; }
.note { border-left: 4px solid var(--warn); padding-left: 0.7rem; } pre { background: var(--soft);
border-radius: 6px; overflow-x: auto; padding: 0.7rem; } nav a { color: var(--accent); display: inline-block;
margin-right: 0.9rem; } @media (max-width: 40rem) { figure
img { width: 100%; } table { font-size: 0.85rem; } td, th { padding-right: 0.6rem; } .pairs th { width:
38%; } }
"""

Section = tuple[str, str]


def text(value: Any) -> str:
    """Any value as text of a page."""
    return html.escape(str(value))


def section(name: str, parts: Iterable[str]) -> Section:
    """A heading with what stands below it."""
    return name, "".join(parts)


def write_page(path: Path, title: str, head: str, sections: Iterable[Section]) -> None:
    """Write the page: `head` below the title, then links to the sections, then the sections."""
    sections = list(sections)
    links = "".join(f'<a href="#{_anchor(name)}">{text(name)}</a>' for name, _ in sections)
    body = "".join(
        f'<section id="{_anchor(name)}"><h2>{text(name)}</h2>{content}</section>'
        for name, content in sections
    )
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}: strain</title><style>{_CSS}</style></head><body>"
        f"<h1>{text(title)}</h1>{head}<nav>{links}</nav>{body}</body></html>\n"
    )
    write_text(path, page.encode("ascii", "xmlcharrefreplace").decode())  # reads right in any encoding


def _anchor(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower())


def table(rows: Mapping[str, Any]) -> str:
    """Names and values; what is None or empty is left out."""
    cells = "".join(
        f"<tr><th>{text(k)}</th><td>{text(v)}</td></tr>" for k, v in rows.items() if v not in (None, "")
    )
    return f'<div class="wide"><table class="pairs">{cells}</table></div>' if cells else ""


def grid(header: list[str], rows: Iterable[list[str]]) -> str:
    """A table with a header; wider than a phone it scrolls by itself."""
    lines = "".join("<tr>" + "".join(f"<td>{text(c)}</td>" for c in row) + "</tr>" for row in rows)
    head = "".join(f"<th>{text(c)}</th>" for c in header)
    return f'<div class="wide"><table class="grid"><tr>{head}</tr>{lines}</table></div>'


def boxes(values: Mapping[str, str]) -> str:
    """Large numbers with a name each."""
    cells = "".join(f"<div><b>{text(v)}</b>{text(k)}</div>" for k, v in values.items())
    return f'<div class="numbers">{cells}</div>'


def paragraph(words: str, kind: str = "") -> str:
    """Plain text; `kind` is "small", "note" or nothing."""
    return f'<p class="{kind}">{text(words)}</p>' if kind else f"<p>{text(words)}</p>"


def picture(caption: str, draw: Callable[..., Any], keep: Path | None = None, *, narrow: bool = True) -> str:
    """A figure in the page; a note instead if the data for it are missing.

    Parameters
    ----------
    caption : str
    draw : callable
        A function of `fcunet.plot`, called once plain and, for narrow screens, with ``size="column"``.
    keep : Path, optional
        Where the figure is also written, as PNG.
    narrow : bool
        False for a figure without small letters, which suits every screen as it is.
    """
    try:
        png = plot.to_png(draw())
    except (ValueError, KeyError) as err:
        logger.warning("not drawn: %s: %s", caption, err)
        return paragraph(f"{caption}: not drawn ({err})", "small")
    if keep is not None:
        write_bytes(keep, png)
    phone = ""
    if narrow:
        small = _data(plot.to_png(draw(size="column"), dpi=_PHONE_DPI))
        phone = f'<source media="(max-width: 40rem)" srcset="{small}">'
    return (
        f'<figure><picture>{phone}<img alt="{text(caption)}" src="{_data(png)}"></picture>'
        f"<figcaption>{text(caption)}</figcaption></figure>"
    )


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
