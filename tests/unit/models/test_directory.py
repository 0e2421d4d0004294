"""Finding a model directory, on this machine or on the hub."""

import json

import pytest

from opdctl.errors import OpdctlError
from opdctl.models.directory import find_or_download
from opdctl.recipe.schema import Model


@pytest.mark.parametrize("downloaded", [False, True], ids=["local", "downloaded"])
def test_adapter_alone_is_named_as_one(downloaded, tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base"}))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *arguments, **options: str(tmp_path))
    with pytest.raises(OpdctlError) as error:
        find_or_download(Model(model="owner/adapter" if downloaded else str(tmp_path)), "student.model")
    assert error.value.kind == "missing_model"
    assert all(text in error.value.message for text in ("student.model", str(tmp_path), "owner/base"))
