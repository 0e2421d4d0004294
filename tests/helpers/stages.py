"""A stage directory of three small parts."""

from opdctl.artifacts.stage_dir import Fingerprint, StageDir


def stage(folder, parts=3, settings=None, inputs=None) -> StageDir:
    """Return a stage directory of text parts."""
    fingerprint = Fingerprint(settings or {"rollout.temperature": 1.0}, inputs or {"prompts": "abc"})
    return StageDir(
        folder,
        stage="rollout",
        num_parts=parts,
        suffix=".txt",
        fingerprint=fingerprint,
        rerun_command="opdctl rollout",
    )


def fill(made: StageDir, *parts: int) -> None:
    """Write parts of a stage: part i has the text "part i" and i + 1 rows."""
    made.start({"engine": "test"})
    for index in parts:
        made.write(index, lambda path, i=index: path.write_text(f"part {i}"), rows=index + 1, tokens=10)
