"""Reads a report's page as a browser would, and checks that it stands alone."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

from rdarts_fast.report.reading import read_all
from rdarts_fast.report.rows import Row, rows_of

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """A page, read; raises where it is not well-formed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.links: list[tuple[str, str, str]] = []  # tag, attribute, value
        self.tables: list[list[list[str]]] = []
        self.words: list[str] = []
        self.parts: dict[str, str] = {}  # of a search, the words of its part of the page
        self._part: list[str] | None = None
        self._name = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "details" and ("class", "run") in attrs:
            self._part = []
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "summary" and self._part is not None and not self._name:
            self._name = self._part[0]
        if tag == "details" and "details" not in self.open and self._part is not None:
            self.parts[self._name] = " ".join(" ".join(self._part).split())
            self._part, self._name = None, ""

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.words.append(data)
            if self._part is not None:
                self._part.append(data)
            if self.open and {"td", "th"} & set(self.open):
                self.tables[-1][-1][-1] += data

    def _note(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert len({name for name, _ in attrs}) == len(attrs), (tag, attrs)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("href", "src", "xlink:href", "srcset", "action", "data"):
                self.links.append((tag, name, str(value)))

    def column(self, title: str, table: int = 0) -> dict[str, str]:
        """A column of a table, by the name of the line."""
        head, *lines = self.tables[table]
        return {line[0]: line[head.index(title)] for line in lines}

    @property
    def text(self) -> str:
        """All words."""
        return " ".join(" ".join(self.words).split())


def written(out: Path) -> Page:
    """The page of a report, checked for standing alone."""
    text = (out / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.tags & {"script", "link", "iframe", "img", "object", "embed", "base"}
    assert len(set(page.ids)) == len(page.ids)
    for tag_, name, value in page.links:
        if value.startswith("#"):
            assert value[1:] in page.ids, value
        elif tag_ == "a":
            assert (out / value).is_file(), value
        else:
            assert name == "href" and value.startswith("data:image/png;base64,"), value
    for reference in re.findall(r"url\(#([^)]*)\)", text):
        assert reference in page.ids
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert not re.search(r"\son\w+=", re.sub(r">[^<]*<", "><", text))
    return page


def rows_in(*folders: Path) -> dict[str, Row]:
    """The rows of runs by name."""
    return {row.name: row for row in rows_of(read_all(folders)[0])}


def pictures_of(out: Path) -> set[str]:
    """The stems of a report's pictures."""
    return {path.stem for path in (out / "pictures").iterdir()}
