"""score-teacher: the teacher scores each token of a step's responses. Rollout parts in, safetensors parts out."""

from functools import partial

from opdctl import log
from opdctl.engines import EnginePool
from opdctl.records import Response
from opdctl.run import Run
from opdctl.store import StageDir, read_rows, write_scores


def run(run: Run, step: int, engines: EnginePool, *, repair: bool = False) -> int:
    """Score the parts of a step that still lack it and return how many they were; with `repair` damaged ones too.

    Raises OpdctlError when the step's rollout is unfinished (code 1) or damaged (code 3), when it was scored under
    other settings (code 4), or when another process works on it (code 5).
    """
    stage = run.scores(step)
    with stage.work(repair=repair) as todo:
        if todo:
            _score(run, step, engines, stage, todo)
    return len(todo)


def _score(run: Run, step: int, engines: EnginePool, stage: StageDir, todo: list[int]) -> None:
    rollout, settings = run.rollout(step), run.recipe.score
    engine = engines.get("teacher", settings.engine, run.teacher)
    # Temperature 1 and no top-p: the teacher is a reference, not a sampler.
    meaning = engine.meaning | {
        "temperature": "1",
        "logprobs": "raw, float32, nats",
        "teacher": run.teacher_digest,
        "tokenizer": run.teacher.tokenizer_digest,
    }
    stage.begin(meaning)
    with log.progress(f"score-teacher, step {step}", run.recipe.responses_per_step()) as advance:
        for index in todo:
            path = rollout.verify(index)
            responses = read_rows(path, Response)
            sequences = [(response.prompt_ids, response.response_ids) for response in responses]
            logprobs = engine.score(sequences, settings.tokens_per_batch, advance)
            part = meaning | {"rollout": rollout.sha256(index)}
            ids = [response.sample_id for response in responses]
            save = partial(write_scores, ids=ids, logprobs=logprobs, meaning=part)
            stage.write(index, save, rows=len(ids), tokens=sum(map(len, logprobs)))
