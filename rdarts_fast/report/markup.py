"""The pieces of a page: text that is escaped, tables, pictures with captions, all as HTML."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

_SVG, _LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_LONG = re.compile(r"-?\d+\.\d{3,}")
_FAMILY = re.compile(r"font-family:[^;]*;?\s*")
_NO_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Html:
    """Text that is HTML already; whatever is not is escaped where it is put in."""

    text: str


Piece = str | Html


def raw(piece: Piece) -> str:
    """Return a piece as HTML."""
    return piece.text if isinstance(piece, Html) else escape(_NO_TEXT.sub("\ufffd", piece))


def join(pieces: Sequence[Piece], between: str = "") -> Html:
    """Return pieces one after the other."""
    return Html(raw(between).join(raw(piece) for piece in pieces))


def tag(name: str, *pieces: Piece, **attributes: str) -> Html:
    """Return an element; a trailing _ of an attribute's name is dropped."""
    found = "".join(f' {k.rstrip("_")}="{raw(v)}"' for k, v in attributes.items())
    return Html(f"<{name}{found}>{join(pieces).text}</{name}>")


def paragraphs(*lines: Piece) -> Html:
    """Return each line as a paragraph."""
    return join([tag("p", line) for line in lines])


def bullets(lines: Sequence[Piece]) -> Html:
    """Return a list."""
    return tag("ul", *[tag("li", line) for line in lines])


def folded(title: Piece, *pieces: Piece, open_: bool = False) -> Html:
    """Return what opens at a click on its title."""
    start = "<details open>" if open_ else "<details>"
    return Html(f"{start}{tag('summary', title).text}{join(pieces).text}</details>")


def table(
    head: Sequence[Piece],
    lines: Sequence[Sequence[Piece]],
    *,
    text: Collection[int] = (0,),
    looks: Sequence[str] = (),
) -> Html:
    """Return a table that scrolls in a box of its own.

    text: the columns of text, the others are numbers to the right. looks: a class for each
    line. The first cell of a line names it.
    """

    def cell(kind: str, i: int, piece: Piece, scope: str) -> str:
        look = ' class="n"' if i not in text else ""
        return f"<{kind}{look}{scope}>{raw(piece)}</{kind}>"

    top = "".join(cell("th", i, piece, ' scope="col"') for i, piece in enumerate(head))
    rows = []
    for line, look in zip(lines, looks or [""] * len(lines), strict=True):
        first = cell("th", 0, line[0], ' scope="row"')
        rest = "".join(cell("td", i, piece, "") for i, piece in enumerate(line[1:], start=1))
        rows.append(f"<tr{f' class={chr(34)}{look}{chr(34)}' if look else ''}>{first}{rest}</tr>")
    body = "\n".join(rows)
    inner = f"<table><thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table>"
    return Html(f'<div class="box">{inner}</div>')


def picture(
    svg: str, caption: Piece, name: str, *, wide: bool = False, least: int = 0, most: int = 0
) -> Html:
    """Return a picture on a card; see Pictures.add."""
    limits = [f"min-width:{least}px"] if least else []
    limits += [f"max-width:{most}px;margin:0 auto"] if most else []
    style = f' style="{";".join(limits)}"' if limits else ""
    card = f'<div class="box"><div{style}>{svg}</div></div>'
    file = tag("a", name, href=f"pictures/{name}")
    look = "card wide" if wide else "card"
    return Html(
        f'<figure class="{look}">{card}<figcaption>{raw(caption)} '
        f'<span class="file">{file.text}</span></figcaption></figure>'
    )


# Pictures inside the page


def inlined(path: Path, prefix: str, title: str) -> str:
    """Return an SVG file as an element of a page.

    What would leak into the page or clash with other pictures goes: styles for everything,
    metadata, ids that nothing refers to; the others get `prefix`. Numbers are rounded to hundredths
    of a pixel. title: what a screen reader says.
    """
    root = ET.parse(path).getroot()
    _drop(root)
    used = set(_references(root))
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        if element.attrib.get("id") not in used:
            element.attrib.pop("id", None)
        _tidy(element, prefix)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"role": "img", "aria-label": title}
    return ET.tostring(root, encoding="unicode")


def _drop(element: ET.Element) -> None:
    """Remove styles and metadata below an element, and indentation."""
    for child in list(element):
        if child.tag in (f"{_SVG}metadata", f"{_SVG}style", f"{_SVG}title"):
            element.remove(child)
            continue
        _drop(child)
        child.tail = None if element.tag != f"{_SVG}text" else child.tail
    if element.text is not None and not element.text.strip():
        element.text = None


def _references(root: ET.Element) -> Iterator[str]:
    for element in root.iter():
        for name, value in element.attrib.items():
            yield from _REFERENCE.findall(value)
            if name in (_LINK, "href") and value.startswith("#"):
                yield value[1:]


def _tidy(element: ET.Element, prefix: str) -> None:
    changed = {}
    for name, value in element.attrib.items():
        if name == "id":
            value = prefix + value
        elif name in (_LINK, "href"):
            name, value = "href", f"#{prefix}{value[1:]}" if value.startswith("#") else value
        else:
            value = _REFERENCE.sub(rf"url(#{prefix}\1)", value)
            value = _LONG.sub(lambda found: f"{float(found[0]):.2f}", value.replace("\n", ""))
        if name == "font-family":
            continue
        changed[name] = _FAMILY.sub("", value) if name == "style" else value
    element.attrib.clear()
    element.attrib.update(changed)
