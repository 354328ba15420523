"""A report as blocks, written as Markdown and as one self-contained HTML page from the same blocks.

Text is plain; each writer escapes it. Both are ASCII: other characters become references (``&#233;``), which
Markdown knows, too.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote


@dataclass(frozen=True)
class Link:
    """Text that leads to a file beside the report, or to ``#anchor`` in it."""

    text: str
    target: str


Inline = str | Link | Sequence[str | Link]


@dataclass(frozen=True)
class Heading:
    level: int
    text: str
    anchor: str = ""


@dataclass(frozen=True)
class Paragraph:
    text: Inline


@dataclass(frozen=True)
class Items:
    """A bulleted list."""

    items: Sequence[Inline]


@dataclass(frozen=True)
class Table:
    """Rows of cells under a head; all columns but the first ``left`` are aligned to the right."""

    head: Sequence[str]
    rows: Sequence[Sequence[Inline]]
    left: int = 1


@dataclass(frozen=True)
class Figure:
    """A PNG beside the report, with words for those who don't see it and a caption."""

    file: str
    alternative: str
    caption: str


@dataclass(frozen=True)
class Code:
    """A command line."""

    text: str


Block = Heading | Paragraph | Items | Table | Figure | Code


def _parts(text: Inline) -> Sequence[str | Link]:
    return [text] if isinstance(text, str | Link) else text


def _ascii(text: str) -> str:
    return text.encode("ascii", "xmlcharrefreplace").decode()


def _target(link: Link) -> str:
    return quote(link.target, safe="/#.-_~")


def markdown(blocks: Sequence[Block]) -> str:
    """GitHub's Markdown; anchors are ``<a id>`` elements."""
    return _ascii("\n\n".join(_markdown_block(block) for block in blocks) + "\n")


def _markdown_block(block: Block) -> str:
    match block:
        case Heading(level, text, anchor):
            mark = f'<a id="{html.escape(anchor)}"></a>\n\n' if anchor else ""
            return f"{mark}{'#' * level} {_markdown_text(text)}"
        case Paragraph(text):
            return _markdown_line(text)
        case Items(items):
            return "\n".join(f"- {_markdown_line(item)}" for item in items)
        case Table(head, rows, left):
            rule = ["---" if column < left else "--:" for column in range(len(head))]
            lines = [map(_markdown_text, head), rule, *(map(_markdown_text, row) for row in rows)]
            return "\n".join("| " + " | ".join(line) + " |" for line in lines)
        case Figure(file, alternative, caption):
            image = Link(alternative, file)
            return f"![{_escape_markdown(alternative)}]({_target(image)})\n\n{_markdown_text(caption)}"
        case Code(text):
            return f"```\n{text}\n```"


def _markdown_line(text: Inline) -> str:
    # "1." or "-" at the start would begin a list, "#" a heading.
    return re.sub(
        r"^([-+#]+|\d+(?=\.))(?=\.?\s|$)",
        lambda m: m[0] + "\\" if m[0].isdigit() else "\\" + m[0],
        _markdown_text(text),
    )


def _markdown_text(text: Inline) -> str:
    return "".join(
        f"[{_escape_markdown(part.text)}]({_target(part)})"
        if isinstance(part, Link)
        else _escape_markdown(part)
        for part in _parts(text)
    )


def _escape_markdown(text: str) -> str:
    return re.sub(r"([\\`*<>|\[\]]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", re.sub(r"\s+", " ", text))


_STYLE = """
:root { color-scheme: light dark; --text: #1c1c1c; --page: #fff; --line: #ccc; --faint: #666; --link: #0a58a8;
  --code: #f3f3f3; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e4e4; --page: #17191c; --line: #444; --faint: #aaa; --link: #7db8f0; --code: #24272b; }
  img { filter: brightness(.88); }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page);
  max-width: 70rem; margin: 0 auto; padding: 1rem 1.25rem 4rem; }
h1, h2, h3, h4 { line-height: 1.25; margin: 2em 0 .6em; }
h1 { margin-top: .5em; }
p, li { max-width: 52rem; }
a { color: var(--link); text-decoration-thickness: 1px; text-underline-offset: 2px; }
td a { color: inherit; text-decoration: underline dotted var(--faint); }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { vertical-align: bottom; white-space: normal; border-bottom-width: 2px; }
th.l, td.l { text-align: left; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
figcaption { color: var(--faint); font-size: .875rem; max-width: 52rem; }
pre { background: var(--code); padding: .6rem .8rem; font-size: .8125rem; white-space: pre-wrap;
  overflow-wrap: anywhere; border-radius: 4px; }
@media print {
  :root { --text: #000; --page: #fff; --line: #999; --faint: #333; --link: #000; --code: #f3f3f3; }
  body { font-size: 10pt; max-width: none; padding: 0; }
  table { font-size: 7.5pt; } th, td { padding: 2px 4px; }
  .scroll { overflow: visible; } figure, tr, pre, .scroll { break-inside: avoid; }
  h2, h3, h4 { break-after: avoid; }
}
"""


def page(blocks: Sequence[Block], title: str, folder: Path) -> str:
    """An HTML page without scripts; pictures are read from ``folder`` and embedded.

    Raises:
        OSError: where a picture is missing.
    """
    body = "\n".join(_html_block(block, folder) for block in blocks)
    return _ascii(
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _html_block(block: Block, folder: Path) -> str:
    match block:
        case Heading(level, text, anchor):
            mark = f' id="{html.escape(anchor)}"' if anchor else ""
            return f"<h{level}{mark}>{_html_text(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{_html_text(text)}</p>"
        case Items(items):
            return "<ul>\n" + "".join(f"<li>{_html_text(item)}</li>\n" for item in items) + "</ul>"
        case Table(head, rows, left):
            lines = [_html_row("th", head, left), *(_html_row("td", row, left) for row in rows)]
            inner = f"<thead>\n{lines[0]}</thead>\n<tbody>\n{''.join(lines[1:])}</tbody>"
            return f'<div class="scroll"><table>\n{inner}\n</table></div>'
        case Figure(file, alternative, caption):
            data = base64.b64encode((folder / file).read_bytes()).decode()
            image = f'<img alt="{html.escape(alternative)}" src="data:image/png;base64,{data}">'
            return f"<figure>{image}\n<figcaption>{_html_text(caption)}</figcaption></figure>"
        case Code(text):
            return f"<pre>{html.escape(text)}</pre>"


def _html_row(kind: str, cells: Sequence[Inline], left: int) -> str:
    classes = (' class="l"' if column < left else "" for column in range(len(cells)))
    texts = (f"<{kind}{name}>{_html_text(cell)}</{kind}>" for name, cell in zip(classes, cells, strict=True))
    return f"<tr>{''.join(texts)}</tr>\n"


def _html_text(text: Inline) -> str:
    return "".join(
        f'<a href="{html.escape(_target(part))}">{_html_plain(part.text)}</a>'
        if isinstance(part, Link)
        else _html_plain(part)
        for part in _parts(text)
    )


def _html_plain(text: str) -> str:
    return html.escape(text, quote=False).replace("+-", "&plusmn;")
