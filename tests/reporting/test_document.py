"""The blocks of a report as Markdown and as HTML."""

from __future__ import annotations

import base64
from html.parser import HTMLParser
from pathlib import Path

from megatron_sharedproj.reporting.document import (
    Block,
    Code,
    Figure,
    Heading,
    Items,
    Link,
    Paragraph,
    Table,
    markdown,
    page,
)

PNG = b"\x89PNG\r\n\x1a\n"
BLOCKS: list[Block] = [
    Heading(2, "A < B", "a_b"),
    Paragraph(["see ", Link("the log", "runs/a b/log.jsonl"), " of caf\u00e9 *x* | qk_eq_v"]),
    Items(["1 +- 2", [Link("here", "#a_b")]]),
    Table(["model", "value"], [["K=V", Link("1.5", "x.json")], ["|", "-"]]),
    Figure("p.png", "a plot", "What it shows."),
    Code("python a.py 'b < c'"),
]


def test_markdown() -> None:
    assert markdown(BLOCKS) == (
        '<a id="a_b"></a>\n\n## A \\< B\n\n'
        "see [the log](runs/a%20b/log.jsonl) of caf&#233; \\*x\\* \\| qk_eq_v\n\n"
        "- 1 +- 2\n- [here](#a_b)\n\n"
        "| model | value |\n| --- | --: |\n| K=V | [1.5](x.json) |\n| \\| | - |\n\n"
        "![a plot](p.png)\n\nWhat it shows.\n\n"
        "```\npython a.py 'b < c'\n```\n"
    )


def test_text_that_would_begin_a_list_or_heading_does_not() -> None:
    texts = ["- a", "# b", "3. c", "-1 %", "+2.5 %", "1.5"]
    blocks: list[Block] = [Paragraph(text) for text in texts]
    assert markdown(blocks).split("\n\n") == ["\\- a", "\\# b", "3\\. c", "-1 %", "+2.5 %", "1.5\n"]


class Reader(HTMLParser):
    """Texts, links and the nesting of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.links += [found["href"] or ""] if "href" in found else []
        self.sources += [found["src"] or ""] if "src" in found else []
        if tag not in ("meta", "img", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_is_one_ascii_page_without_scripts_and_outside_links(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(PNG)
    text = page(BLOCKS, "A < B", tmp_path)
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == [] and text.isascii() and "<script" not in text and "http" not in text
    assert reader.links == ["runs/a%20b/log.jsonl", "#a_b", "x.json"]
    assert reader.sources == ["data:image/png;base64," + base64.b64encode(PNG).decode()]
    assert "of caf\u00e9 *x* | qk_eq_v" in reader.text and "1 \u00b1 2" in reader.text
    assert "python a.py 'b < c'" in reader.text and 'id="a_b"' in text
    assert "prefers-color-scheme: dark" in text and "@media print" in text
