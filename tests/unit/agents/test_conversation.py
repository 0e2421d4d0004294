"""The ids of trajectories are those that the engine read and sampled, whatever the tokenizer would make of the text."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.tokenizers import CHATML, NUM_IDS, byte_level, write_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from opdctl.agents.conversation import Call, ContextLengthError, Conversation, SampledTrajectory
from opdctl.agents.student import Student
from opdctl.artifacts.records import Completion
from opdctl.data.messages import Chat, Message
from opdctl.data.rendering import PromptFormat, PromptRenderer
from opdctl.data.special_tokens import MarkedText
from opdctl.models.directory import ModelDir
from opdctl.recipe.schema import Sampling

MERGES = [("a", "b"), ("b", "c"), ("ab", "c"), ("c", "a"), ("Ċ", "a"), ("Ġ", "a")]
"""A text that is sampled as `a` and `b` would be tokenized as `ab`."""
ROWS = NUM_IDS + len(MERGES)
END = 2  # <|im_end|>
DROPS_LINES = CHATML.replace(
    "{{ message.content }}",
    "{{ message.content.strip().split('\n')[-1] if message.role == 'assistant' else message.content }}",
)
"""A template that drops all but the last line of the assistant's messages, as templates drop earlier thinking."""


@pytest.fixture(scope="module")
def make_student(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Student]:
    folder = write_tokenizer(Path(tmp_path_factory.mktemp("model")), byte_level(MERGES), rows=ROWS)
    model = ModelDir(folder, "float32")

    def make(template: str | None = None, in_text: str = "split") -> Student:
        form = PromptFormat(chat_template=template, special_tokens_in_text=in_text)
        renderer = PromptRenderer(model.tokenizer, model.vocab_size, form)
        return Student(model.tokenizer, renderer, model.vocab_size, Sampling(max_tokens=10**4), 10**6)

    return make


@pytest.fixture(scope="module")
def student(make_student: Callable[..., Student]) -> Student:
    return make_student()


@pytest.fixture(scope="module")
def forgetful_student(make_student: Callable[..., Student]) -> Student:
    return make_student(DROPS_LINES)


def sampled(ids: list[int], reason: str = "stop", first: float = -1.0) -> Completion:
    logprobs = first - np.arange(len(ids), dtype=np.float32) / 1024
    return Completion(np.array(ids, np.int32), logprobs, reason)


class Engine:
    """What an engine reads and samples in an episode."""

    def __init__(self, student: Student, conversation: Conversation | None = None):
        self.student, self.conversation = student, conversation or student.open_conversation()
        self.calls: list[tuple[Call, Completion]] = []

    def answer(self, prompt: MarkedText | np.ndarray, ids: list[int], reason: str = "stop") -> str:
        call = self.conversation.begin(prompt)
        completion = sampled(ids, reason, -1.0 - len(self.calls))
        self.calls.append((call, completion))
        return self.conversation.finish(call, completion)

    def chat(self, *turns: tuple[str, str]) -> MarkedText:
        messages = [Message(*turn) for turn in turns]
        index = max(i for i, turn in enumerate(turns) if turn[0] == "user")
        chat = Chat(messages[index].text, tuple(messages[:index]), tuple(messages[index + 1 :]))
        return self.student._renderer.render(chat, "the test")

    def visible(self) -> str:
        call, completion = self.calls[-1]
        return self.student.visible_text(call.prompt_ids, completion.response_ids)


def check(engine: Engine) -> list[SampledTrajectory]:
    """Check that the trajectories consist of what the engine read and sampled, each token sampled in one of them."""
    trajectories = engine.conversation.trajectories()
    seen = {call.number: (call, completion) for call, completion in engine.calls}
    num_sampled = 0
    for trajectory in trajectories:
        ids = np.concatenate([trajectory.prompt_ids, trajectory.completion.response_ids])
        mask = np.zeros(len(ids), bool)
        logprobs = np.zeros(len(ids), np.float32)
        calls = seen[trajectory.last_call][0].trajectory()
        assert len(calls) == trajectory.turns
        for call in calls:
            completion = seen[call.number][1]
            start, end = len(call.prompt_ids), len(call.prompt_ids) + len(completion.response_ids)
            assert ids[:start].tolist() == call.prompt_ids.tolist()
            assert ids[start:end].tolist() == completion.response_ids.tolist()
            mask[start:end], logprobs[start:end] = True, completion.logprobs
        first = len(trajectory.prompt_ids)
        assert first == len(calls[0].prompt_ids)
        assert not mask[:first].any()
        assert trajectory.loss_mask.tolist() == mask[first:].tolist()
        assert trajectory.completion.logprobs.tolist() == logprobs[first:].tolist()
        num_sampled += int(trajectory.loss_mask.sum())
    assert num_sampled == sum(len(completion.response_ids) for _, completion in engine.calls)
    return trajectories


TEXT = st.lists(st.sampled_from(["a", "b", "c", "ab", "\n", " ", "<|im_end|>", "ü", "?"]), min_size=1, max_size=4).map(
    "".join
)
IDS = st.lists(st.sampled_from([*range(30, 110), *range(NUM_IDS, ROWS), 0, END, 200]), min_size=1, max_size=5)
TURNS = st.lists(
    st.tuples(st.sampled_from(["reply", "continue", "raw", "ids", "restart", "edit"]), TEXT, IDS, st.booleans()),
    min_size=1,
    max_size=6,
)


def play(student: Student, turns: list[tuple[str, str, list[int], bool]]) -> list[SampledTrajectory]:
    engine = Engine(student)
    messages: list[tuple[str, str]] = [("user", "a?")]
    for kind, text, ids, ends in turns:
        response = [*ids, END] if ends else ids
        prompt: MarkedText | np.ndarray = engine.chat(*messages)
        if engine.calls:
            last, _completion = engine.calls[-1]
            if kind == "raw" and last.prompt_text is not None:
                prompt = MarkedText(f"{last.prompt_text}{last.text}{text}")
            elif kind == "ids":
                prompt = np.concatenate([last.ids(), np.array(ids, np.int32)])
            elif kind == "restart":
                messages = [("user", f"b{text}")]
                prompt = engine.chat(*messages)
        engine.answer(prompt, response)
        visible = engine.visible()
        messages = [*messages, ("assistant", visible if kind != "edit" else f"{visible}{text}".strip() or "c")]
        if kind != "continue":
            messages.append(("user", f"{text}."))
        elif not visible.strip():
            messages[-1] = ("assistant", "c")
    return check(engine)


@given(TURNS)
def test_ids_are_those_that_the_engine_saw(student, turns):
    play(student, turns)


@given(TURNS)
def test_ids_with_a_template_that_drops_text(forgetful_student, turns):
    play(forgetful_student, [("reply" if turn[0] == "continue" else turn[0], *turn[1:]) for turn in turns])


def test_sampled_text_is_not_tokenized_again(student):
    engine = Engine(student)
    tokenizer = byte_level(MERGES)
    a, b, merged = (tokenizer.token_to_id(token) for token in ("a", "b", "ab"))
    engine.answer(engine.chat(("user", "?")), [a, b, END])
    assert engine.visible() == "ab"
    engine.answer(engine.chat(("user", "?"), ("assistant", "ab"), ("user", "ab")), [merged, END])
    (trajectory,) = check(engine)
    before = tokenizer.encode("<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n").ids
    between = tokenizer.encode("\n<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n").ids
    assert trajectory.prompt_ids.tolist() == before
    assert trajectory.completion.response_ids.tolist() == [a, b, END, *between, merged, END]
    assert merged in between
    assert trajectory.turns == 2
    assert trajectory.loss_mask.tolist() == [True] * 3 + [False] * len(between) + [True] * 2


def test_response_without_an_end_is_continued_by_the_template(student):
    engine = Engine(student)
    engine.answer(engine.chat(("user", "?")), [byte_level(MERGES).token_to_id("a")], "length")
    engine.answer(engine.chat(("user", "?"), ("assistant", "a"), ("user", "?")), [END])
    (trajectory,) = check(engine)
    assert trajectory.completion.response_ids[1] == END
    assert not trajectory.loss_mask[1]


def test_changed_text_starts_another_trajectory(student):
    engine = Engine(student)
    engine.answer(engine.chat(("user", "?")), [70, END])
    engine.answer(engine.chat(("user", "?"), ("assistant", "changed"), ("user", "?")), [71, END])
    assert [each.turns for each in check(engine)] == [1, 1]


def test_second_continuation_of_a_call_starts_another_trajectory(student):
    """The tokens before it are its prompt, with the same ids: they are learned once."""
    engine = Engine(student)
    a = byte_level(MERGES).token_to_id("a")
    engine.answer(engine.chat(("user", "?")), [a, END])
    for text in ("b", "c"):
        engine.answer(engine.chat(("user", "?"), ("assistant", "a"), ("user", text)), [a, END])
    first, second = check(engine)
    assert (first.turns, second.turns) == (2, 1)
    assert second.prompt_ids[: len(first.prompt_ids) + 2].tolist() == engine.calls[0][0].ids().tolist()


def test_spelled_special_token_of_a_new_message_alone_is_refused(make_student):
    """Text that the student sampled may spell one: its ids are known."""
    engine = Engine(make_student(in_text="error"))
    letters = byte_level(special=()).encode("<|im_end|>").ids
    engine.answer(engine.chat(("user", "?")), [id_ + 3 for id_ in letters] + [END])
    assert engine.visible() == "<|im_end|>"
    history = (("user", "?"), ("assistant", "<|im_end|>"))
    engine.answer(engine.chat(*history, ("user", "?")), [END])
    (trajectory,) = check(engine)
    assert trajectory.turns == 2
    with pytest.raises(Exception, match=r"spells the special token `<\|im_start"):
        engine.answer(engine.chat(("user", "<|im_start|>")), [END])


def test_rest_of_a_trajectory_limits_a_response(student):
    conversation = Conversation(student, max_response=10, max_total=30)
    engine = Engine(student, conversation)
    prompt = np.arange(30, 40, dtype=np.int32)
    assert conversation.begin(prompt).max_tokens == 10
    engine.answer(prompt, [50, 51, 52])
    longer = np.concatenate([engine.calls[0][0].ids(), np.array([60, 61], np.int32)])
    assert engine.conversation.begin(longer, max_tokens=100).max_tokens == 10 - 3 - 2
    assert conversation.begin(np.arange(30, 55, dtype=np.int32)).max_tokens == 5  # of the total
    with pytest.raises(ContextLengthError):
        conversation.begin(np.arange(30, 60, dtype=np.int32))


def test_trajectory_without_room_ends_with_length(student):
    conversation = Conversation(student, max_response=5, max_total=30)
    engine = Engine(student, conversation)
    engine.answer(np.arange(30, 40, dtype=np.int32), [50, 51, END])
    with pytest.raises(ContextLengthError):
        conversation.begin(np.concatenate([engine.calls[0][0].ids(), np.array([60, 61], np.int32)]))
    (trajectory,) = check(engine)
    assert conversation.is_exhausted
    assert trajectory.completion.finish_reason == "length"


def test_seconds_of_tools(student):
    times = iter([0.0, 10.0, 12.0, 20.0, 25.0])  # call, response, call, response, end
    conversation = Conversation(student, 100, 200, clock=lambda: next(times))
    engine = Engine(student, conversation)
    engine.answer(np.array([30], np.int32), [50])
    engine.answer(np.array([30, 50, 60], np.int32), [51])
    (trajectory,) = conversation.trajectories()
    assert trajectory.tool_seconds == (12 - 10) + (25 - 20)


def test_columns_are_zero_at_tokens_that_were_not_sampled(student):
    conversation = student.open_conversation()

    def finish(call: Call, value: float) -> None:
        ones = np.full(1, value, np.float32)
        top = {"top_ids": np.full((1, 2), 7, np.int32), "top_logprobs": np.full((1, 2), value, np.float32)}
        conversation.finish(call, Completion(np.array([50], np.int32), ones, "stop", entropies=ones, **top))

    finish(conversation.begin(np.array([30], np.int32)), -1)
    finish(conversation.begin(np.array([30, 50, 60, 61], np.int32)), -2)
    (trajectory,) = conversation.trajectories()
    completion = trajectory.completion
    assert completion.response_ids.tolist() == [50, 60, 61, 50]
    assert completion.logprobs.tolist() == completion.entropies.tolist() == [-1, 0, 0, -2]
    assert completion.top_ids.tolist() == [[7, 7], [0, 0], [0, 0], [7, 7]]
    assert completion.top_logprobs.tolist() == [[-1, -1], [0, 0], [0, 0], [-2, -2]]
    assert completion.sampling_logprobs is None
