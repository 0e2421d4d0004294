"""JSON files of a model directory that are damaged or of another form."""

import pytest

from opdctl.errors import OpdctlError
from opdctl.models.json_files import read_json_object


def test_byte_order_mark_is_accepted(tmp_path):
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json_object(tmp_path / "config.json") == {"a": 1}


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe{}", b"[1]", b"null", b"[" * 10**5, b"9" * 10**4])
def test_other_content_is_rejected(content, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(OpdctlError) as error:
        read_json_object(path)
    assert error.value.kind == "invalid_model"
    assert str(path) in error.value.message


def test_missing_file_is_rejected(tmp_path):
    with pytest.raises(OpdctlError) as error:
        read_json_object(tmp_path / "config.json")
    assert error.value.kind == "invalid_model"
