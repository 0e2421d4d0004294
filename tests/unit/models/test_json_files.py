"""JSON files of a model directory that are damaged or of another form."""

import os

import pytest

from opdctl.errors import OpdctlError
from opdctl.models.json_files import check_model_files, read_json_object


def test_byte_order_mark_is_accepted(tmp_path):
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json_object(tmp_path / "config.json") == {"a": 1}


@pytest.mark.parametrize(
    "content", [b"", b'{"a": ', b"\xff\xfe{}", b"[1]", b"null", b"[" * 10**5, b'{"a": ' + b"9" * 200 + b"}"]
)
def test_unreadable_objects_are_rejected(content, tmp_path):
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


def test_special_file_in_a_model_directory_is_rejected(tmp_path):
    """The libraries open every file that they find, and would wait for a FIFO. Links are those of the hub's cache."""
    (tmp_path / "blob").write_text("{}")
    (tmp_path / "config.json").symlink_to("blob")
    check_model_files(tmp_path)
    os.mkfifo(tmp_path / "chat_template.jinja")
    with pytest.raises(OpdctlError, match=r"chat_template.jinja: is not a regular file"):
        check_model_files(tmp_path)
