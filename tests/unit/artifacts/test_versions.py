from opdctl.artifacts.versions import OLDEST_VERSION, VERSIONS, versioned


def test_every_kind_of_artifact_has_a_version_that_is_read():
    assert set(VERSIONS) == {
        *("run", "rollout", "score", "update", "trainer", "eval", "continuations", "file_scores", "analysis")
    }
    assert all(version >= OLDEST_VERSION for version in VERSIONS.values())


def test_versioned_names_kind_and_version():
    assert versioned("run") == {"artifact": "run", "version": VERSIONS["run"]}
