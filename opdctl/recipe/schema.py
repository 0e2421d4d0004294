"""The schema of a recipe, with the default of every key. Imports no torch.

A recipe is one complete run in TOML. `load_recipe` merges files and `--set a.b=c` key by key, and later values override
earlier ones; `key = false` removes a section or a value of an earlier file. The default of a key is the recommended
setting. The docstring below a key is its documentation.
"""

import datetime
import re
from collections.abc import Mapping
from math import ceil
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from opdctl.recipe.prompts import Prompts
from opdctl.recipe.section import Section

Dtype = Literal["float32", "bfloat16", "float16"]
AUTO = "auto"
DEFAULT_NAME = "run"
"""The name of a recipe without files."""
MAX_NAME_CHARS = 200
"""Of a name that is part of a file's: a file system allows 255."""
MAX_PARTS = 10**5
"""The number of a part has five digits."""
MAX_STEPS = 10**7
MIN_TEMPERATURE = 0.01
"""The least temperature above 0: vLLM samples lower ones at this one, and far below it the logits overflow."""
START_OF_THINKING, END_OF_THINKING = "<think>", "</think>"
RESPONSES_PER_PART = 32
"""Engines that stream across parts balance by parts of 16 to 32 responses: four for each of 8 engines of 1,024."""
TEACHER_NAME_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,200}")


LiveCodeBenchRelease = Literal[
    "release_v1",
    "release_v2",
    "release_v3",
    "release_v4",
    "release_v5",
    "release_v6",
    "v1",
    "v2",
    "v3",
    "v4",
    "v5",
    "v6",
]


def _parse_date(value: Any) -> str:
    text = value.isoformat()[:10] if isinstance(value, datetime.date) else str(value)
    return datetime.date.fromisoformat(text).isoformat()


Date = Annotated[str, BeforeValidator(_parse_date)]
"""A date, as TOML has it or as text."""


class ModelShape(Section):
    """The sizes of a decoder, named as in `config.json`. Only `--dry-run` uses them, if the model is not available."""

    num_hidden_layers: int = Field(gt=0)
    """Number of decoder layers."""
    hidden_size: int = Field(gt=0)
    """Size of the hidden states."""
    num_attention_heads: int = Field(gt=0)
    """Number of query heads."""
    num_key_value_heads: int = Field(gt=0)
    """Number of key and value heads."""
    head_dim: int = Field(gt=0)
    """Size of one attention head."""
    intermediate_size: int = Field(gt=0)
    """Inner size of the feed-forward layer; of one expert in a mixture of experts."""
    vocab_size: int = Field(gt=0)
    """Rows of the output matrix."""
    num_experts: int = Field(default=1, gt=0)
    """Experts of a layer; 1 is a dense model."""
    num_experts_per_tok: int = Field(default=1, gt=0)
    """Experts that process each token."""
    tie_word_embeddings: bool = False
    """Whether the output matrix is the embedding matrix."""


class Model(Section):
    """A model and its weights."""

    model: str
    """A toy model such as `toy:teacher` or `toy:student`, a model directory, or a hub id."""
    revision: str | None = None
    """The hub revision. A commit makes the run reproducible."""
    dtype: Dtype = "bfloat16"
    """The dtype of the weights in engines and, for the student, in the exported model directory. If unset, a new run on
    a CPU without fast products of bfloat16 numbers has `float32` for models of the engine transformers."""
    trust_remote_code: bool = False
    """Run code from the model repository. Enable it only after you have read that code."""
    tokenizer: Literal["auto", "file", "class"] = "auto"
    """How the tokenizer is loaded: from tokenizer.json (`file`), or by the class that transformers selects (`class`).
    `auto` is the class if both read texts alike, and the file if the class loses text; other differences are an
    error."""
    shape: ModelShape | None = None
    """The sizes of the model for `--dry-run`, if the model is not available."""
    server: str | None = Field(default=None, pattern=r"^https?://([\w.-]+|\[[\da-fA-F:.]+\])(:\d+)?(/[^\s@?#]*)?$")
    """Address of a vLLM server that serves this model, such as `http://host:8000/v1`. The engine `server` uses it."""
    served_name: str | None = None
    """The name of the model on the server. If unset, the server must serve a single model."""


class Teacher(Model):
    """A teacher: a model, and how its prompts differ from the student's."""

    system: str | None = None
    """The system turn that this teacher reads in place of the student's; "" is none. If unset, it is the student's."""
    chat_template: str | None = None
    """A Jinja file: the chat template of the prompts that this teacher reads. If unset, it is the student's."""
    template_arguments: dict[str, bool | int | str] | None = None
    """Arguments of the chat template for this teacher, such as `enable_thinking = true`. If unset, they are
    `prompts.template_arguments`."""

    def has_own_prompts(self) -> bool:
        """Whether the teacher's prompts are rendered separately."""
        return (self.system, self.chat_template, self.template_arguments) != (None, None, None)


class SamplingSettings(Section):
    """What rollouts and evaluations have in common, named and defined as in vLLM."""

    max_tokens: int = Field(default=16384, gt=0)
    """Maximum length of a response in tokens, end-of-sequence token included."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature, at least 0.01."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling: the probability mass to sample from."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Sample only tokens with at least this fraction of the probability of the most probable one."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Divide the positive logits of tokens that are in the prompt or in the response so far by this number, and
    multiply negative ones by it; 1 does not change them."""
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Subtract this number from the logits of tokens that are in the response so far."""
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Subtract this number from the logit of a token for each time it is in the response so far."""
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """Strings that end a response. The response ends with the token that completes one. Special tokens have no text."""
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = []
    """Token ids that end a response, in addition to the end of sequence."""

    @property
    def modifications(self) -> dict[str, float]:
        """The settings by which tokens are not sampled from the model's own distribution, with their values."""
        neutral = {"temperature": 1, "top_p": 1, "min_p": 0, "repetition_penalty": 1}
        neutral |= {"presence_penalty": 0, "frequency_penalty": 0}
        return {name: value for name, default in neutral.items() if (value := getattr(self, name)) != default}

    @property
    def changes(self) -> dict[str, Any]:
        """The settings by which responses differ from the model's own, with their values: modifications and ends."""
        ends = {"stop": self.stop, "stop_token_ids": self.stop_token_ids}
        return {**self.modifications, **{name: value for name, value in ends.items() if value}}


class Sampling(SamplingSettings):
    """How an engine samples."""

    top_k: int = Field(default=0, ge=0)
    """Sample only the K most probable tokens; 0 is all."""

    @property
    def modifications(self) -> dict[str, float]:
        return super().modifications | ({"top_k": self.top_k} if self.top_k else {})

    @property
    def has_penalties(self) -> bool:
        """Whether the distribution of a token depends on which tokens precede it, beyond the model's."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


class RolloutColumns(Section):
    """The columns that a rollout stores besides the log-probs."""

    @property
    def sampling_logprobs(self) -> bool:
        """Whether a response has log-probs under the sampled distribution beside those of the student's own."""
        return False

    entropy: bool = False
    """Store the entropy of the student's distribution at each token. It is enabled automatically if a weight needs
    it."""
    top_k: int = Field(default=0, ge=0)
    """Store the K most probable tokens of the student. The value is raised to what weight and objective need."""
    routed_experts: bool = False
    """Store the experts that the routers of a mixture of experts chose, one byte for each expert of a token and layer,
    or two of more than 256 experts. It is enabled automatically by `train.router_replay`."""


def _default_num_parts(values: Mapping[str, Any]) -> int:
    return min(ceil(values["prompts_per_step"] * values["samples_per_prompt"] / RESPONSES_PER_PART), MAX_PARTS - 1)


class Rollout(SamplingSettings, RolloutColumns):
    """How the student samples responses.

    On-policy distillation samples from the student. `temperature`, `top_p`, `min_p`, `sampling_top_k` and the penalties
    change the distribution that is sampled. They require an objective with a rollout correction.
    """

    engine: str = "auto"
    """The engine that samples responses, also for evaluations: `transformers`, `vllm` or `server`. `auto` is vLLM if it
    is installed and has a device, else `transformers`."""
    prompts_per_step: int = Field(default=1024, gt=0)
    """Prompts of each step. An epoch consists of complete steps in a new order, that of torch's RandomSampler with the
    recipe's seed; the remaining prompts are skipped."""
    samples_per_prompt: int = Field(default=1, gt=0)
    """Responses to each prompt."""
    num_parts: int = Field(default_factory=_default_num_parts, gt=0, lt=MAX_PARTS)
    """Number of files for the responses of a step. A part is the unit of resuming and of distributing work. If unset,
    parts have at most 32 responses; a started run keeps its number. transformers, whose batch never exceeds a part, is
    faster on a GPU with fewer."""
    batch_size: int = Field(default=256, gt=0)
    """Responses that an engine samples at the same time. With transformers a batch never exceeds one part."""
    eos_token_ids: list[Annotated[int, Field(ge=0)]] = []
    """Token ids that end a response, also in evaluations. If empty, they are those of the model's
    generation_config.json and of its tokenizer."""
    sampling_top_k: int = Field(default=0, ge=0)
    """Sample only the K most probable tokens; 0 is all. This is vLLM's `top_k`; here `top_k` stores tokens."""
    environment: str = Field(default="", pattern=r"^$|^\w+(\.\w+)*:\w+$")
    """A Python function, `module:function`, that plays an episode from the row of a prompt: it calls the student at the
    address that it gets. If unset, the student answers each prompt once."""
    environment_timeout_seconds: float = Field(default=600.0, gt=0)
    """Seconds after which an episode of the environment counts as failed."""
    max_environments: int = Field(default=64, gt=0)
    """Episodes of the environment that run at the same time."""

    @property
    def modifications(self) -> dict[str, float]:
        return super().modifications | ({"sampling_top_k": self.sampling_top_k} if self.sampling_top_k else {})

    @property
    def sampling_logprobs(self) -> bool:
        return bool(self.modifications)

    def sampling(self) -> Sampling:
        """Return how an engine samples the responses."""
        shared = {name: getattr(self, name) for name in SamplingSettings.model_fields}
        return Sampling(**shared, top_k=self.sampling_top_k)


class Score(Section):
    """How teachers score responses."""

    engine: str = "auto"
    """The engine that scores, as in `rollout.engine`. Scores are always computed at temperature 1."""
    tokens_per_batch: int = Field(default=16384, gt=0)
    """Tokens of one forward pass, padding included. A longer response is a batch by itself."""
    entropy: bool = False
    """Store the entropy of the teacher's distribution at each token. It is enabled automatically if a weight needs
    it."""
    top_k: int = Field(default=0, ge=0)
    """Store the K most probable tokens of the teacher. The value is raised to what weight and objective need."""
    student_top_k: bool = False
    """Store the teacher's log-probs of the student's most probable tokens. It is enabled automatically if needed."""
    hidden_states: bool = False
    """Store the teacher's last hidden states, 4 bytes a dimension. It is enabled automatically for full-vocabulary
    objectives."""


class Component(Section):
    """A registered component and its parameters."""

    model_config = ConfigDict(extra="allow")
    name: str
    """The registered name. The parameters are further keys of this section."""

    @property
    def params(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


DEFAULT_COMPONENTS = {"weight": "iw_opd", "objective": "policy_gradient", "weight.times": ""}
"""The default name in each section that names a component; "" if the section has none."""


class WeightSettings(Component):
    """The token weight."""

    name: str = DEFAULT_COMPONENTS["weight"]
    """The token weight. Its parameters are further keys of this section."""
    times: Component | None = None
    """A second weight; the two weights are multiplied."""
    logprobs: Literal["rollout", "trainer"] = "rollout"
    """Whose log-probs of the student the weight reads: those that the rollout stored, or the trainer's own before the
    first update of the step, which take another forward pass."""
    modulates: Literal["loss", "extrapolation"] = "loss"
    """What the weight multiplies: a token's loss, or λ of reward extrapolation (`train.extrapolation`). In the latter
    case the losses have weight 1."""


class ObjectiveSettings(Component):
    """The objective."""

    name: str = DEFAULT_COMPONENTS["objective"]
    """The loss of a token. Its parameters are further keys of this section."""


class Train(Section):
    """Updates, checkpoints, and when to stop."""

    steps: int = Field(gt=0, lt=MAX_STEPS)
    """Steps of rollout, score and update. A finished run continues with a greater value."""
    updates_per_step: int = Field(default=1, gt=0)
    """Optimizer updates on the responses of each step."""
    aggregate: Literal["token", "response"] = "token"
    """`token`: the loss is the mean over all tokens of the step. `response`: it is the mean over responses of the mean
    over their tokens."""
    denominator: Literal["all", "selected"] = "all"
    """The tokens that `aggregate` averages over: `all`, or only those of weight > 0, which the weight has `selected`.
    The latter leaves responses without such a token out of the mean over responses."""
    extrapolation: float = 1.0
    """λ of reward extrapolation: the target is λ log T + (1 - λ) log R. Any value but 1 uses R, the [reference]."""
    learning_rate: float = Field(default=1e-5, gt=0)
    """Peak learning rate of AdamW."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear learning-rate warm-up."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """Learning-rate schedule after the warm-up: constant, or a decay to 0 at step `decay_steps`."""
    decay_steps: int | None = Field(default=None, gt=0)
    """The step at which a decaying learning rate reaches 0. It is independent of `steps`, so that more steps do not
    change earlier ones."""
    betas: list[float] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    """The two betas of AdamW, each in [0, 1)."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay of matrices."""
    decay_vectors: bool = False
    """Apply the weight decay to vectors too: norms and biases."""
    master_dtype: Literal["float32", "bfloat16"] = "float32"
    """The dtype of trained weights and of AdamW's moments. `bfloat16`, for a bfloat16 student without LoRA, takes half
    of the memory: the optimizer rounds stochastically, and gradients are summed in bfloat16."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Threshold of gradient-norm clipping."""
    tokens_per_micro_batch: int = Field(default=16384, gt=0)
    """Tokens of one forward and backward pass, with the padding if there is any. A longer response is a micro-batch by
    itself."""
    packing: bool = True
    """Put the responses of a micro-batch into one row, without padding. A student in which one would change the next,
    by a check when it is loaded, gets padded ones. The gradient is the same within rounding."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: slower, with much less memory."""
    checkpoint_every_n_layers: int = Field(default=1, gt=0)
    """With gradient_checkpointing, recompute the activations of every n-th layer only, and keep those of the others."""
    compile: bool = False
    """Compile the blocks of the student by torch.compile: faster, after a minute at the start. Requires a C++
    compiler."""
    cpu_offload: bool = False
    """Keep weights, gradients and optimizer states in CPU memory, and one block at a time on the GPU."""
    fsdp_size: int | None = Field(default=None, gt=0)
    """Processes that hold one copy of the student among them: weights, gradients and moments. It divides the number of
    processes; all of them if unset. Weights are gathered within such a group, those of a node for example, and
    gradients are summed over all groups (HSDP)."""
    router_replay: bool = False
    """Let the routers of a mixture of experts choose in training the experts that the rollout's engine chose. By
    themselves they choose others where rounding decides."""
    max_truncated_fraction: float = Field(default=1.0, gt=0, le=1)
    """Stop training as collapsed if more than this fraction of responses is truncated in three consecutive steps."""
    max_invalid_responses: int = Field(default=0, ge=0)
    """Responses of a step that may be left out because a log-prob is missing or not finite. The run stops if there are
    more."""
    min_entropy: float = Field(default=0.0, ge=0)
    """Stop training as collapsed if the entropy of the policy, in nats a token, is below this in three consecutive
    steps."""
    save_every_steps: int = Field(default=1, gt=0)
    """Steps between two checkpoints of the trainer, 12 bytes a parameter each. After a restart, later updates are
    replayed from the stored responses and scores."""
    keep_every_steps: int = Field(default=50, gt=0)
    """Keep the student of every N-th step. Evaluated students and the last one are always kept."""
    keep_latest: int = Field(default=2, gt=0)
    """Number of latest students and trainer checkpoints to keep in addition."""


ALL_LINEAR = "all-linear"


class Lora(Section):
    """Train LoRA adapters instead of all weights."""

    rank: int = Field(default=0, ge=0, le=2**16)
    """Rank of the adapters; 0 trains all weights."""
    alpha: float = Field(default=32.0, gt=0)
    """The adapters are scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability of the adapters' inputs. With dropout, the trained policy differs slightly from the one that
    sampled the responses."""
    target_modules: list[str] = Field(default=[ALL_LINEAR], min_length=1)
    """Names of the layers with an adapter; `all-linear` is all linear layers and experts, without the output matrix."""
    modules_to_save: list[str] = []
    """Names of further layers whose weights are trained in full."""


class Eval(Sampling):
    """Evaluation on benchmarks."""

    bench: list[str] = Field(default=["sort12"], min_length=1)
    """Benchmarks to run: registered names, `.jsonl`, `.parquet` or `.csv` files, or data sets of the hub as
    `hub:ORG/NAME`, `hub:ORG/NAME:SUBSET`, `hub:ORG/NAME:SUBSET@REVISION`."""
    split: str = "test"
    """Split of a benchmark `hub:ORG/NAME`."""
    release_version: LiveCodeBenchRelease = "release_v6"
    """Release of LiveCodeBench: the problems of the first N versions, or those that version N added."""
    start_date: Date | None = None
    """First date of the contests of LiveCodeBench, such as 2025-02-01; that of the release if unset."""
    end_date: Date | None = None
    """Last date of the contests of LiveCodeBench; that of the release if unset."""
    temperature: float = Field(default=1.0, ge=0)
    """Sampling temperature, at least 0.01. 0 is greedy decoding, with one response to each problem."""
    max_thinking_tokens: int | None = Field(default=None, gt=0)
    """End the thinking of a response after this many of its tokens by `end_thinking`, and sample the answer within the
    rest of `max_tokens`. It is for models with the tokens `<think>` and `</think>`. If unset, thinking is not ended."""
    end_thinking: str = (
        "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now."
        "\n</think>\n\n"
    )
    """The text that ends thinking. The default is Qwen3's."""
    samples: int | None = Field(default=None, gt=0)
    """Responses to each problem. If unset, the benchmark sets the number, such as 32 for AIME and HMMT."""
    limit: int | None = Field(default=None, gt=0)
    """Use the first N problems; all if unset. A toy task is an infinite stream and then uses 256."""
    every_steps: int = Field(default=10, ge=0)
    """Evaluate every N steps, and before and after training; 0 disables all of these."""
    suffix: str = "\nPlease reason step by step, and put your final answer within \\boxed{}."
    """Text that is appended to the problems of a benchmark with boxed answers."""
    code_suffix: str = (
        "\n\nWrite Python code to solve the problem. Present the code in \n```python\nYour code\n```\nat the end.\n"
        "You need to think first then write the Python code."
    )
    """Text that is appended to the problems of a benchmark with code as the answer. The default is that of RUCBM/G-OPD,
    on which the authors' code is built."""
    few_shot: int = Field(default=0, ge=0)
    """Put N solved examples of `few_shot_file` before each problem: as turns of the chat, or as plain text without a
    chat template. They are the first ones of the file that are not the problem itself."""
    few_shot_file: str | None = None
    """A data file of examples, with the columns of a benchmark file. Their answers are the column `solution`, if there
    is one."""
    template_arguments: dict[str, bool | int | str] | None = None
    """Arguments of the chat template. Templates ignore unknown arguments. If unset, they are those of training: of
    [prompts], or of the teacher that is evaluated."""
    system: str | None = None
    """The system turn; "" is none. If unset, it is that of training, as with `template_arguments`."""
    batch_size: int = Field(default=256, gt=0)
    """Responses that an engine samples at the same time. With transformers a batch never exceeds one part."""
    num_parts: int = Field(default=8, gt=0, lt=MAX_PARTS)
    """Number of files for the graded responses, at most one for each problem. A part is the unit of resuming and of
    distributing work: engines beyond this number are idle."""
    grader: Literal["mathematics", "math-verify", "text", "choice"] = "mathematics"
    """How to grade answers: in a box by mathematical value (docs/eval.md lists the rules that precede math-verify), by
    math-verify alone, or as exact text; `choice` by the letter of a choice, of files and hub data sets only."""
    id_column: str | None = None
    """Column of the problem ids in a file or hub data set; `id`, or the row number, if unset."""
    problem_column: str | None = None
    """Column of the problem in a file or hub data set. If unset, it is found as `prompts.prompt_column` is."""
    answer_column: str | None = None
    """Column of the gold answers in a file or hub data set; `answer` if unset."""
    allow_code_execution: bool = False
    """Let HumanEval+, MBPP+ and LiveCodeBench run the code that the model wrote, in a sandbox.
    `opdctl eval --allow-code-execution` sets it."""

    @property
    def changes(self) -> dict[str, Any]:
        budget = {"max_thinking_tokens": self.max_thinking_tokens, "end_thinking": self.end_thinking}
        examples = {"few_shot": self.few_shot, "few_shot_file": self.few_shot_file}
        return super().changes | (budget if self.max_thinking_tokens else {}) | (examples if self.few_shot else {})


class Continuations(Section):
    """Continuations of the student's prefixes by teacher and student."""

    responses: int = Field(default=64, gt=0)
    """Continue prefixes of the first N responses of the step."""
    samples: int = Field(default=1, gt=0)
    """Continuations of each prefix by each model."""
    max_tokens: int | None = Field(default=None, gt=0)
    """Maximum length of a continuation in tokens, the prefix not included. It is the same after every prefix, so that
    longer prefixes do not leave less room. If unset, it is `rollout.max_tokens`."""
    prefix_percents: list[Annotated[int, Field(ge=0, lt=100)]] = list(range(0, 100, 10))
    """Relative lengths of the prefixes, in percent of the response."""
    prefix_tokens: list[Annotated[int, Field(ge=0)]] = []
    """Absolute lengths of the prefixes in tokens, such as `[0, 512, 1024]`. A response that is not longer is not
    continued."""


class Vllm(Section):
    """Settings of the engine `vllm`, named as vLLM's arguments."""

    tensor_parallel_size: int = Field(default=1, gt=0)
    """GPUs that share each layer."""
    pipeline_parallel_size: int = Field(default=1, gt=0)
    """Pipeline stages: groups of GPUs with consecutive layers."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Fraction of GPU memory for the engine."""
    max_model_len: int | None = Field(default=None, gt=0)
    """Maximum length of prompt and response together, in tokens. If unset, it follows from the recipe's limits."""
    max_num_seqs: int = Field(default=256, gt=0)
    """Maximum number of responses that are processed at the same time."""
    max_num_batched_tokens: int | None = Field(default=None, gt=0)
    """Maximum number of tokens in one forward pass. If unset, 16,384 on a GPU and 8,192 on a CPU, where scoring holds
    about two float32 copies of their logits."""
    enforce_eager: bool = False
    """Run without compiled graphs: the engine starts faster and runs slower."""
    enable_lora: bool = False
    """Let the student's engine load the initial student once, and of later ones the LoRA adapter alone: it reads less
    in each step, and samples slower."""
    enable_sleep_mode: bool = False
    """Let engines sleep while others use the GPU, instead of ending and starting again."""
    engine_args: dict[str, bool | int | float | str] = {}
    """Further arguments of vLLM's engine."""

    @model_validator(mode="before")
    @classmethod
    def _drop_removed_default(cls, values: Any) -> Any:
        """Accept the default of a removed key: every run of an earlier version recorded it."""
        if isinstance(values, Mapping) and values.get("data_parallel_size") == 1:
            return {key: value for key, value in values.items() if key != "data_parallel_size"}
        return values

    def fit_together(self, engines: int) -> bool:
        """Whether this number of engines can be awake on a GPU. Otherwise only the one at work is."""
        return engines * self.gpu_memory_utilization <= 1

    def max_batched_tokens(self, device: str) -> int:
        return self.max_num_batched_tokens or (16384 if device == "cuda" else 8192)


class Server(Section):
    """Settings of the engine `server`."""

    api_key_env: str = Field(default="OPDCTL_API_KEY", pattern=r"^[A-Z_][A-Z0-9_]*$")
    """The environment variable with the API key, if the server requires one. The key is never written to a file."""
    concurrency: int = Field(default=32, gt=0)
    """Number of concurrent requests."""
    timeout_seconds: float = Field(default=600.0, gt=0)
    """Timeout of one request, in seconds."""
    max_retries: int = Field(default=6, ge=0)
    """Retries after a lost connection, a timeout, or status 408, 429 or 5xx, with exponential backoff."""


class Tracking(Section):
    """Experiment trackers that receive the metrics, in addition to metrics.jsonl."""

    report_to: list[Literal["mlflow", "tensorboard", "trackio", "wandb"]] = []
    """The trackers. Each is an extra to install: `pip install 'opdctl[wandb]'`."""
    project: str = "opdctl"
    """The project in trackio and Weights & Biases, and the experiment in MLflow."""


class Pipeline(Section):
    """Device, asynchrony, and checks."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """The device of the models; `auto` uses a GPU if there is one: of this machine, or at present on the cluster."""
    threads: int = Field(default=0, ge=0)
    """CPU threads of torch; 0 keeps torch's default."""
    launcher: Literal["local", "ray"] = "local"
    """What starts engines and trainer processes: this machine, or the nodes of a Ray cluster. The sizes are those of
    [hardware]."""
    ray_address: str = ""
    """The address of the cluster, HOST:PORT; if empty RAY_ADDRESS, else the cluster of this machine, else a new one."""
    placement: Literal["colocated", "apart"] = "colocated"
    """Where `opdctl train` has its engines on a cluster: on the trainer's GPUs, or on GPUs apart from them."""
    max_staleness: int = Field(default=0, ge=0)
    """Steps that `rollout --follow` may run ahead. The latest student, of step s - max_staleness or later, samples the
    responses of step s; 0 is on-policy. Other values need an objective with a rollout correction."""
    follow_timeout_seconds: float = Field(default=3600.0, gt=0)
    """Seconds that a stage with `--follow` waits for its inputs while no other stage is running."""
    max_logprob_rms: float = Field(default=0.0, ge=0)
    """Stop if the log-probs of an engine and of the trainer differ by more than this RMS, in nats, on a few responses
    of a step's first part; 0 disables the check. The check loads the model a second time."""


class Hardware(Section):
    """The hardware: what `--dry-run` assumes for memory and hours, and what `pipeline.launcher = "ray"` asks for.
    Otherwise a run ignores it. The defaults are one H100."""

    rollout_gpus: int = Field(default=1, gt=0)
    """GPUs of the allocation that samples responses, for `train --follow` and `train --no-fill`, and of another one for
    `opdctl eval` beside them. On a cluster: those of all engines that sample."""
    score_gpus: int = Field(default=1, gt=0)
    """GPUs of the allocation that scores responses, for the same. On a cluster: those of all engines that score."""
    train_gpus: int = Field(default=1, gt=0)
    """GPUs over which the student is sharded, one for each trainer process. `opdctl train` without these options runs
    all stages on them."""
    gpus_per_node: int = Field(default=8, gt=0)
    """GPUs of a machine. An engine has all of its GPUs on one, but for a larger one on a Ray cluster."""
    memory_gib: float = Field(default=79.0, gt=0)
    """Memory of one GPU, in GiB; torch reports 79 for an H100 of 80 GB. 92% of it may be planned: the rest is for CUDA,
    NCCL and fragmentation."""
    tflops: float = Field(default=989.0, gt=0)
    """Peak of dense 16-bit matrix products, in TFLOP/s."""
    tflops_float32: float = Field(default=67.0, gt=0)
    """Peak of float32 matrix products, in TFLOP/s: of the logits in the trainer and in the engine transformers."""
    bandwidth_gbs: float = Field(default=3350.0, gt=0)
    """Peak memory bandwidth of one GPU, in GB/s."""
    utilization: float = Field(default=0.4, gt=0, le=1)
    """Fraction of these peaks that is reached."""
    storage_gbs: float = Field(default=5.0, gt=0)
    """Speed of the run directory's file system for one process, in GB/s."""
    mean_response_tokens: int | None = Field(default=None, gt=0)
    """Mean length of a response in tokens, for times; the maximum if unset. Memory is that of the maximum."""


class Recipe(Section):
    """A complete run."""

    name: str = Field(default=DEFAULT_NAME, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=MAX_NAME_CHARS)
    """The name of the run. The default run directory is runs/<name>. If unset, it consists of the names of the recipe's
    files, joined by `-`, and of `seed-N` if `--set seed=N` is given."""
    seed: int = Field(default=0, ge=0)
    """The seed of all random numbers: prompts, responses, dropout."""
    plugins: list[str] = []
    """Python modules that register components. They are imported, so their code runs."""
    student: Model
    """The model that is trained."""
    teacher: Teacher | None = None
    """The teacher. Several teachers are [teachers.NAME] each; `prompts.teacher_column` assigns the prompts."""
    teachers: dict[str, Teacher] = {}
    """Several teachers, by name."""
    reference: Model | None = None
    """R of reward extrapolation, for example the teacher's base model. It also scores every response. If unset and
    `train.extrapolation` is not 1, it is the initial student."""
    prompts: Prompts
    rollout: Rollout = Rollout()
    score: Score = Score()
    weight: WeightSettings = WeightSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    train: Train
    lora: Lora = Lora()
    eval: Eval = Eval()
    continuations: Continuations = Continuations()
    vllm: Vllm = Vllm()
    server: Server = Server()
    tracking: Tracking = Tracking()
    pipeline: Pipeline = Pipeline()
    hardware: Hardware = Hardware()

    def flat(self) -> dict[str, Any]:
        """Return every setting by its dotted key."""
        return _flatten(self.model_dump())

    def to_toml(self) -> str:
        """Return the recipe as TOML, with every default."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))

    def responses_per_step(self) -> int:
        return self.rollout.prompts_per_step * self.rollout.samples_per_prompt

    def shards_student(self, num_processes: int) -> bool:
        """Whether FSDP2 shards the student in training, over a single process too.

        Only FSDP2 casts: a bfloat16 student is trained by the same numbers on any number of processes.
        """
        return num_processes > 1 or self.train.cpu_offload or self.student.dtype == "bfloat16"

    def has_base_as_reference(self) -> bool:
        """Whether the reference is the student without its LoRA adapters, so that the trainer can score with it."""
        if self.reference is None or self.reference.server or not self.lora.rank:
            return False
        return self.reference.model_copy(update={"shape": None}) == self.student.model_copy(
            update={"shape": None, "server": None, "served_name": None}
        )

    def teacher_models(self) -> dict[str, Teacher]:
        """Return the teachers by name: `teacher`, or `teacher-NAME` for each of several."""
        return {"teacher": self.teacher} if self.teacher else {teacher_name(n): m for n, m in self.teachers.items()}

    def has_teacher_prompts(self, name: str) -> bool:
        """Whether the teacher `name` may read other prompts than the student."""
        columns = [part.teacher_prompt_column for part in self.prompts.parts().values()]
        return self.teacher_models()[name].has_own_prompts() or any(columns)

    def eval_of(self, name: str) -> Eval:
        """Return [eval] with the prompt settings that are unset there: a teacher's own, or those of [prompts]."""
        sources = [self.eval, *filter(None, [self.teacher_models().get(name)]), self.prompts]
        keys = ("template_arguments", "system")
        values = {key: [value for each in sources if (value := getattr(each, key)) is not None] for key in keys}
        return self.eval.model_copy(update={key: found[0] for key, found in values.items() if found})

    def gpus_per_engine(self, engine: str) -> int:
        """Return the number of GPUs of one engine."""
        return 1 if engine == "transformers" else self.vllm.tensor_parallel_size * self.vllm.pipeline_parallel_size

    def spans_nodes(self, engine: str) -> bool:
        """Whether an engine has GPUs of several nodes of a cluster."""
        is_larger = self.gpus_per_engine(engine) > self.hardware.gpus_per_node
        return engine == "vllm" and self.pipeline.launcher == "ray" and is_larger

    def scorers(self) -> dict[str, Model]:
        """Return the models that score responses, by name: the teachers, and `reference` if there is one."""
        return {**self.teacher_models(), **({"reference": self.reference} if self.reference else {})}

    def models(self) -> dict[str, Model]:
        """Return all models by name: the student and the scorers."""
        return {"student": self.student} | self.scorers()

    def with_dtypes(self, dtypes: Mapping[str, Dtype]) -> "Recipe":
        """Return the recipe with other dtypes of the models with these names."""

        def change(name: str, model: Model | None) -> Model | None:
            return model.model_copy(update={"dtype": dtypes[name]}) if model and name in dtypes else model

        models: dict[str, Any] = {
            name: change(name, getattr(self, name)) for name in ("student", "teacher", "reference")
        }
        models["teachers"] = {name: change(teacher_name(name), model) for name, model in self.teachers.items()}
        return self.model_copy(update=models)


def teacher_name(name: str) -> str:
    """Return the name, in artifacts and messages, of the teacher [teachers.NAME]."""
    return f"teacher-{name}"


def is_scorer(name: str) -> bool:
    """Whether `name` is the name of a teacher or of the reference model."""
    return name in ("teacher", "reference") or name.startswith(teacher_name(""))


def model_key(name: str) -> str:
    """Return the recipe key of a model, such as `teachers.math` for `teacher-math`."""
    return name.replace("teacher-", "teachers.", 1)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
