import contextlib
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opdctl.artifacts import manifests
from opdctl.artifacts.manifests import Manifest
from opdctl.artifacts.versions import versioned

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["../x", "0" * 64]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "rows", "parts", "sha256", "student", "a"]), inner, max_size=4)
    ),
    max_leaves=12,
)


def manifest() -> dict[str, Any]:
    part = {"name": "part-00000-of-00001.parquet", "rows": 2, "tokens": 9, "bytes": 9, "sha256": "0" * 64}
    header = {"fingerprint": "0" * 64, "settings": {"seed": 0}, "inputs": {"prompts": "x"}, "logprob_metadata": {}}
    return versioned("rollout") | header | {"parts": [part]}


@given(data=st.data())
@settings(max_examples=150)
def test_manifest_with_any_value_at_any_place_is_valid_or_refused(data: st.DataObject) -> None:
    value = manifest()
    home = data.draw(st.sampled_from([value, value["parts"][0]]))
    home[data.draw(st.sampled_from(sorted(home)))] = data.draw(JSON)
    try:
        checked = manifests.check_form(value, Manifest)
    except ValueError:
        return
    for each in checked["parts"]:
        assert (Path("/run") / each["name"]).resolve().parent == Path("/run")
        assert 0 <= each["rows"] < 2**63
        assert re.fullmatch("[0-9a-f]{64}", each["sha256"])


def test_unknown_keys_are_accepted() -> None:
    value = manifest() | {"more": 1}
    assert manifests.check_form(value, Manifest) is value


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "a\0b"])
def test_names_that_lead_out_of_a_directory_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="leads out"):
        manifests.check_form({name: "0" * 64}, manifests.Digests)
    assert manifests.check_form({"a/b.safetensors": "0" * 64}, manifests.Digests)


def test_error_names_the_first_invalid_key() -> None:
    value = manifest()
    value["parts"][0]["rows"] = -1
    with pytest.raises(ValueError, match=r"parts\.0\.rows"):
        manifests.check_form(value, Manifest)


@given(st.binary(max_size=64))
def test_any_bytes_are_a_json_object_or_refused(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert isinstance(manifests.parse_object(data), dict)


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"{", b"[" * 10**5, b'{"a":' * 10**5, b"\xff", b"\0" * 9])
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - of any kind
        manifests.parse_object(data)
