import pytest

from nbdsrv.formats.xml_tree import XmlError, parse_xml


@pytest.mark.parametrize("encoding", ["utf-7", "gb18030", "shift_jis", "klingon"])
def test_an_encoding_that_cannot_be_read(encoding: str) -> None:
    """expat and Python each refuse some of them in a way of their own (found by fuzzing)."""
    text = f'<?xml version="1.0" encoding="{encoding}"?><a/>'
    with pytest.raises(XmlError, match="encoding"):
        parse_xml(text.encode())
