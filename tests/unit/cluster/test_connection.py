import socket
import sys

import pytest
from helpers.commands import small_recipe

from opdctl.cluster import connection
from opdctl.cluster.connection import check_code, code_identity, connect, describe_failure, enter_directory
from opdctl.errors import OpdctlError


def free_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def pipeline(address):
    return small_recipe("pipeline.launcher=ray", f"pipeline.ray_address={address}").pipeline


def test_code_of_another_node_must_be_the_same():
    check_code(code_identity())
    with pytest.raises(OpdctlError, match=r"9\.9") as caught:
        check_code("9.9 (0123456789ab)")
    assert caught.value.kind == "version_mismatch"


def test_a_changed_source_file_is_other_code(tmp_path, monkeypatch):
    package = tmp_path / "opdctl"
    package.mkdir()
    monkeypatch.setattr(connection.opdctl, "__file__", str(package / "__init__.py"))
    identities = []
    for text in ("a = 1\n", "a = 2\n"):
        (package / "module.py").write_text(text)
        identities.append(code_identity.__wrapped__())
    assert identities[0] != identities[1]


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", ""])
def test_an_address_without_a_cluster_is_an_error_at_once(address):
    pytest.importorskip("ray", reason="needs ray, of the extra `ray`")
    with pytest.raises(OpdctlError) as caught, connect(pipeline(address or free_address())):
        pytest.fail("connected")
    assert caught.value.kind == "unavailable_cluster"


def test_ray_that_is_not_installed_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(OpdctlError) as caught, connect(pipeline("")):
        pytest.fail("connected")
    assert caught.value.kind == "missing_package"
    assert "opdctl[ray]" in str(caught.value.hint)


def test_a_directory_that_is_not_there_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    enter_directory(tmp_path)
    with pytest.raises(OpdctlError, match="gone") as caught:
        enter_directory(tmp_path / "gone")
    assert caught.value.kind == "missing_file"


def test_the_cause_of_a_failure_on_another_node_is_its_last_line():
    cause = "ModuleNotFoundError: No module named 'opdctl'"
    error = RuntimeError(f"\x1b[36mray::Worker()\x1b[39m (pid=1)\n  File x\n\x1b[31m{cause}\n")
    assert describe_failure(error) == cause
    assert describe_failure(RuntimeError()) == "RuntimeError"
