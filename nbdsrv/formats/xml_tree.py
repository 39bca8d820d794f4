"""XML from inside an image, read as what it is: data of unknown origin.

::

    <a> text <b/> <b>more</b> </a>        Node("a", "text", [Node("b"), Node("b", "more")])

Rule: no document type, so no entities, nothing fetched and nothing that grows. Depth and the number
of elements are bounded; attributes and name spaces are of no use to our formats and dropped.
"""

from collections.abc import Iterator, Mapping
from xml.parsers import expat

__all__ = ["Node", "XmlError", "parse_xml"]

MAX_DEPTH = 64
"""Elements within each other; what hypervisors write is a dozen deep."""
MAX_ELEMENTS = 1 << 19
"""Some 100 MiB in memory; an ``ova.xml`` of 1 MiB has some 30 000."""

MAX_TEXT = 1 << 16
"""Characters of an element that are kept; what is looked for here are names and numbers."""


class XmlError(ValueError):
    """Not XML, or not of the plain kind. One line, with the line number inside the text."""


class Node:
    """An element: its name, the text before its first child, and its children."""

    __slots__ = ("children", "tag", "text")

    def __init__(self, tag: str) -> None:
        self.tag = tag
        self.text = ""
        self.children: list[Node] = []

    def all(self, tag: str) -> Iterator["Node"]:
        """The children of that name."""
        return (child for child in self.children if child.tag == tag)

    def find(self, path: str) -> "Node | None":
        """The first descendant along ``a/b/c``."""
        node: Node | None = self
        for tag in path.split("/"):
            node = next(node.all(tag), None) if node is not None else None
        return node

    def value(self, path: str) -> str:
        """The text of that descendant, "" if there is none."""
        node = self.find(path)
        return node.text.strip() if node is not None else ""


def parse_xml(data: bytes) -> Node:
    """The root element.

    Raises:
        XmlError: see there.
    """
    builder = _Builder()
    parser = expat.ParserCreate()
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.characters
    parser.StartDoctypeDeclHandler = builder.doctype
    parser.buffer_text = True
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise XmlError(f"no XML: {expat.ErrorString(error.code)}, line {error.lineno}") from error
    except XmlError:
        raise
    except (LookupError, ValueError) as error:  # one Python never heard of, or expat cannot use
        raise XmlError("no XML: an unknown encoding") from error
    if builder.root is None:  # pragma: no cover - expat has said so
        raise XmlError("no XML: no element")
    return builder.root


class _Builder:
    def __init__(self) -> None:
        self.root: Node | None = None
        self._open: list[Node] = []
        self._count = 0

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        del attributes
        self._count += 1
        if len(self._open) >= MAX_DEPTH or self._count > MAX_ELEMENTS:
            raise XmlError(f"XML of more than {MAX_ELEMENTS} elements or {MAX_DEPTH} levels")
        node = Node(tag)
        if self._open:
            self._open[-1].children.append(node)
        elif self.root is None:
            self.root = node
        self._open.append(node)

    def end(self, tag: str) -> None:
        del tag
        self._open.pop()

    def characters(self, text: str) -> None:
        node = self._open[-1]
        if not node.children and len(node.text) < MAX_TEXT:
            node.text += text

    def doctype(self, *what: object) -> None:
        del what
        raise XmlError("XML with a document type, which is not read")
