"""The recipe: its schema with every default, how files and `--set` merge, and every error at once. Imports no torch.

A recipe is one complete run in TOML. Later files and `--set a.b=c` override earlier ones key by key; `section = false`
takes an earlier file's section away. The default of each key is the recommended setting; the text below a key is its
documentation.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field

Dtype = Literal["float32", "bfloat16", "float16"]
AUTO = "auto"
TABLE_SUFFIXES = (".jsonl", ".parquet", ".csv")
TEACHER_NAME_PATTERN = re.compile(r"[A-Za-z0-9_-]+")


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelShape(Section):
    """The sizes that tell what a decoder takes: what `--dry-run` counts with where the model itself is out of reach."""

    num_hidden_layers: int = Field(gt=0)
    """Blocks of attention and feed-forward."""
    hidden_size: int = Field(gt=0)
    """Size of the hidden states."""
    num_attention_heads: int = Field(gt=0)
    """Heads of the queries."""
    num_key_value_heads: int = Field(gt=0)
    """Heads of keys and values."""
    head_dim: int = Field(gt=0)
    """Size of one head."""
    intermediate_size: int = Field(gt=0)
    """Inner size of the feed-forward layer, of one expert where there are several."""
    vocab_size: int = Field(gt=0)
    """Rows of the output matrix."""
    num_experts: int = Field(default=1, gt=0)
    """Experts of a layer; 1 is a dense model."""
    num_experts_per_tok: int = Field(default=1, gt=0)
    """Experts that a token goes through."""
    tie_word_embeddings: bool = False
    """Whether the output matrix is the embedding."""


class Model(Section):
    model: str
    """`toy:teacher`, `toy:student` or another embedded model, a model directory, or a hub id."""
    revision: str | None = None
    """The hub revision; a commit makes the run repeatable."""
    dtype: Dtype = "bfloat16"
    """The type of the weights in engines and, for the student, in the exported directory."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Off unless you have read that code."""
    shape: ModelShape | None = None
    """Its sizes, only for `--dry-run` where the model itself is out of reach."""
    server: str | None = Field(default=None, pattern=r"^https?://[^\s@?#]+$")
    """Address of a vLLM server of this very model, such as `http://host:8000/v1`, for the engine `server`."""
    served_name: str | None = None
    """The name that the server gives the model; its only one if unset."""


class Prompts(Section):
    source: str
    """`toy:sort12` or `toy:perm`, a `.jsonl`, `.parquet` or `.csv` file, or a hub data set id."""
    split: str = "train"
    """The split of a toy task or a hub data set."""
    revision: str | None = None
    """The hub data set's revision."""
    limit: int | None = Field(default=None, gt=0)
    """How many prompts to use, the first ones; all if unset. A toy task has no end and needs it."""
    id_column: str | None = None
    """Column of unique prompt ids; the row number if unset."""
    prompt_column: str = "prompt"
    """Column of the prompt's text."""
    answer_column: str | None = None
    """Column of the gold answer, carried along where there is one."""
    teacher_column: str | None = None
    """Column with the name of each prompt's teacher, one of [teachers]."""
    teacher_prompt_column: str | None = None
    """Column of the prompt that teachers read in place of the student's, such as one with the solution in it."""
    min_values: dict[str, float] = {}
    """Use only rows whose column has at least this value, such as `difficulty = 6`."""
    suffix: str = ""
    """Text put behind every prompt."""
    template_arguments: dict[str, bool | int | str] = {}
    """Arguments to the chat template, such as `enable_thinking = false`."""
    max_tokens: int = Field(default=2048, gt=0)
    """The longest prompt, in tokens, template included."""
    on_too_long: Literal["drop", "error"] = "error"
    """What to do with a longer one. It is never cut."""


class Sampling(Section):
    max_tokens: int = Field(default=16384, gt=0)
    """The longest response, in tokens, end of sequence included."""
    temperature: float = Field(default=1.0, gt=0)
    """Of sampling. 1 in training: on-policy distillation samples the student itself."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the most probable tokens that hold this share. 1 in training."""


class Rollout(Sampling):
    engine: str = "auto"
    """The engine that draws responses, of evaluations too: `transformers`, `vllm`, `server`; `auto` is vLLM where it is
    installed and has a device to run on."""
    prompts_per_step: int = Field(default=1024, gt=0)
    """Prompts of each step. An epoch is as many whole steps as the prompts give."""
    samples_per_prompt: int = Field(default=1, gt=0)
    """Responses to each of them."""
    num_parts: int = Field(default=8, gt=0)
    """Files a step's responses are cut into: the unit of resuming and of sharing work."""
    batch_size: int = Field(default=256, gt=0)
    """Responses drawn together, at most one part's."""
    entropy: bool = False
    """Store the entropy of the student's distribution at each token. On by itself where a weight needs it."""
    top_k: int = Field(default=0, ge=0)
    """Store the student's most probable tokens, so many. At least what weight and objective need."""


class Score(Section):
    engine: str = "auto"
    """The engine that scores, as for rollouts. A teacher is always scored at temperature 1."""
    tokens_per_batch: int = Field(default=16384, gt=0)
    """Tokens, padding included, in one forward pass; a longer response goes alone."""
    entropy: bool = False
    """Store the entropy of the teacher's distribution at each token. On by itself where a weight needs it."""
    top_k: int = Field(default=0, ge=0)
    """Store the teacher's most probable tokens, so many. At least what weight and objective need."""
    student_top_k: bool = False
    """Store the teacher's log-probs of the student's most probable tokens. On by itself where they are needed."""
    hidden_states: bool = False
    """Store the teacher's last hidden states, 4 bytes a dimension. On by itself for full-vocabulary losses."""


class Component(Section):
    """A registered component and its parameters."""

    model_config = ConfigDict(extra="allow")
    name: str
    """Its registered name; its parameters stand beside it."""

    @property
    def params(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


DEFAULT_COMPONENTS = {"weight": "iw_opd", "objective": "policy_gradient", "weight.times": ""}


class Weight(Component):
    name: str = DEFAULT_COMPONENTS["weight"]
    """The token weight; its parameters stand beside it."""
    times: Component | None = None
    """A second weight, that the first is multiplied by."""


class Objective(Component):
    name: str = DEFAULT_COMPONENTS["objective"]
    """The loss of a token; its parameters stand beside it."""


class Train(Section):
    steps: int = Field(gt=0)
    """Steps of rollout, score and update. May be raised later to go on."""
    updates_per_step: int = Field(default=1, gt=0)
    """Optimizer steps on each step's responses."""
    aggregate: Literal["token", "response"] = "token"
    """The loss is the mean over all tokens of the step, or the mean over responses of each one's mean."""
    extrapolation: float = 1.0
    """λ of reward extrapolation: the student is drawn to λ log T + (1 - λ) log R; other than 1 it needs [reference]."""
    learning_rate: float = Field(default=1e-5, gt=0)
    """Of AdamW."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises linearly."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """What the learning rate does after the warm-up: stays, or falls to 0 at step `decay_steps`."""
    decay_steps: int | None = Field(default=None, gt=0)
    """The step at which a falling learning rate is 0. Its own, so that raising `steps` changes no step before."""
    betas: list[float] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    """Of AdamW, each in [0, 1)."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled, on matrices only."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """A longer gradient is brought to this norm."""
    tokens_per_micro_batch: int = Field(default=16384, gt=0)
    """Tokens, padding included, in one forward and backward pass; a longer response goes alone."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: slower, and much leaner."""
    cpu_offload: bool = False
    """Keep weights, gradients and optimizer states in the CPU's memory, and a block at a time on the GPU."""
    max_truncated_fraction: float = Field(default=1.0, gt=0, le=1)
    """Stop as collapsed where more of the responses than this run into `rollout.max_tokens`, in each of three steps."""
    max_invalid_responses: int = Field(default=0, ge=0)
    """Responses of a step that are left out where one of their log-probs is missing or no finite number; one more, and
    the run stops."""
    min_entropy: float = Field(default=0.0, ge=0)
    """Stop as collapsed where the policy's entropy, in nats a token, is below this, in each of three steps."""
    save_every_steps: int = Field(default=1, gt=0)
    """Steps from one saved trainer state, 12 bytes a parameter, to the next. Updates since the last one are made once
    more where a run goes on, from their stored responses and scores."""
    keep_every_steps: int = Field(default=50, gt=0)
    """Students that are kept: every so many steps, those evaluated, and the last."""
    keep_latest: int = Field(default=2, gt=0)
    """Newest students and trainer states that are kept besides."""


class Lora(Section):
    """Train adapters instead of the weights."""

    rank: int = Field(default=0, ge=0)
    """Rank of the adapters; 0 trains the weights themselves."""
    alpha: float = Field(default=32.0, gt=0)
    """Adapters are scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of an adapter's inputs that is dropped. The policy in training is then not quite the one that responded."""
    target_modules: list[str] = Field(default=["all-linear"], min_length=1)
    """Names of the layers that get one; `all-linear` is every linear layer but the output matrix."""
    modules_to_save: list[str] = []
    """Names of layers that are trained whole besides."""


class Eval(Sampling):
    bench: list[str] = Field(default=["sort12"], min_length=1)
    """Benchmarks to run: names, or `.jsonl`, `.parquet` or `.csv` files of your own."""
    temperature: float = Field(default=1.0, ge=0)
    """0 takes the most probable token: one response a problem, always the same."""
    samples: int | None = Field(default=None, gt=0)
    """Responses to each problem; as many as the benchmark names if unset, 32 for AIME and HMMT."""
    limit: int | None = Field(default=None, gt=0)
    """Problems to use, from the start; all if unset. The embedded task has no end and then uses 256."""
    every_steps: int = Field(default=10, ge=0)
    """Evaluate every so many steps while training; 0: neither then nor before and after."""
    suffix: str = "\nPlease reason step by step, and put your final answer within \\boxed{}."
    """Text put behind every problem of a benchmark that wants a boxed answer."""
    code_suffix: str = "\nSolve this in one Python code block that holds the whole program."
    """Text put behind every problem of a benchmark that wants code."""
    template_arguments: dict[str, bool | int | str] = {"enable_thinking": False}
    """Arguments to the chat template; one that a template does not know changes nothing."""
    batch_size: int = Field(default=256, gt=0)
    """Responses drawn together, at most one part's."""
    num_parts: int = Field(default=8, gt=0)
    """Files the graded responses are cut into, at most one a problem: the unit of resuming and of sharing work."""
    grader: Literal["mathematics", "text"] = "mathematics"
    """How a file of your own is graded: by what the answer means, or letter by letter."""
    id_column: str | None = None
    """Column of the problems' ids in a file of your own; `id`, or the row number, if unset."""
    problem_column: str | None = None
    """Column of the problems' text in a file of your own; `problem`, `question` or `prompt` if unset."""
    answer_column: str | None = None
    """Column of the gold answers in a file of your own; `answer` if unset."""
    allow_code_execution: bool = False
    """Let HumanEval+ and MBPP+ run what the model wrote, within limits: `opdctl eval --allow-code-execution`."""


class Continuations(Section):
    """What `opdctl analyze-position --continuations` does: teacher and student go on from the student's prefixes."""

    responses: int = Field(default=64, gt=0)
    """Responses of the step, the first ones, whose prefixes are gone on from."""
    samples: int = Field(default=1, gt=0)
    """Continuations of each prefix by each model."""


class Vllm(Section):
    """Settings of the engine `vllm`."""

    tensor_parallel_size: int = Field(default=1, gt=0)
    """GPUs that share each layer."""
    pipeline_parallel_size: int = Field(default=1, gt=0)
    """Groups of GPUs that hold successive layers."""
    data_parallel_size: int = Field(default=1, gt=0)
    """Copies of the model."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of the GPU's memory that the engine may take."""
    max_model_len: int | None = Field(default=None, gt=0)
    """Longest prompt and response together, in tokens; what the recipe can ask for if unset."""
    max_num_seqs: int = Field(default=256, gt=0)
    """Responses in work at once."""
    max_num_batched_tokens: int = Field(default=8192, gt=0)
    """Tokens in one forward pass. Scoring holds about two float32 copies of their logits."""
    enforce_eager: bool = False
    """Run without compiled graphs: a faster start, slower steps."""
    enable_sleep_mode: bool = False
    """Give the GPU memory back between stages."""
    engine_args: dict[str, bool | int | float | str] = {}
    """Further arguments to vLLM's engine."""


class Server(Section):
    """Settings of the engine `server`."""

    api_key_env: str = "OPDCTL_API_KEY"
    """The environment variable that holds the API key, if the server wants one. A key is never written anywhere."""
    concurrency: int = Field(default=32, gt=0)
    """Requests under way at once."""
    timeout_seconds: float = Field(default=600.0, gt=0)
    """Time for one request."""
    max_retries: int = Field(default=6, ge=0)
    """Further attempts after a lost connection, a time-out, 408, 429 or 5xx, with growing pauses."""


class Tracking(Section):
    """Where metrics go besides metrics.jsonl."""

    report_to: list[Literal["tensorboard", "trackio", "wandb"]] = []
    """Trackers, each an extra to install: `pip install 'opdctl[wandb]'`."""
    project: str = "opdctl"
    """The project's name at trackio and Weights & Biases."""


class Pipeline(Section):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where models run; `auto` takes a GPU if there is one."""
    threads: int = Field(default=0, ge=0)
    """CPU threads of torch; 0 leaves its own choice."""
    max_staleness: int = Field(default=0, ge=0)
    """Steps that `rollout --follow` may run ahead: the responses of step s are then drawn by the newest student there
    is, of step s - max_staleness at least. 0 is on-policy. More needs an objective with a rollout correction."""
    follow_timeout_seconds: float = Field(default=3600.0, gt=0)
    """How long a stage with `--follow` waits for its inputs, where no other one is at work, before it gives up."""
    max_logprob_rms: float = Field(default=0.0, ge=0)
    """Stop where an engine's log-probs are further than this, RMS in nats, from the trainer's own on a few responses of
    a step's first part; 0 checks nothing. The model is loaded a second time for it."""


class Hardware(Section):
    """What `--dry-run` counts memory and hours for; it changes nothing of a run. The defaults are those of one H100."""

    rollout_gpus: int = Field(default=1, gt=0)
    """GPUs that draw responses, of evaluations too."""
    score_gpus: int = Field(default=1, gt=0)
    """GPUs that score."""
    train_gpus: int = Field(default=1, gt=0)
    """GPUs that the student is sharded over."""
    memory_gib: float = Field(default=80.0, gt=0)
    """Memory of a GPU, in GiB."""
    tflops: float = Field(default=989.0, gt=0)
    """Peak of matrix products in 16 bits, dense, in TFLOP/s."""
    tflops_float32: float = Field(default=67.0, gt=0)
    """The same in float32, in which logits are made."""
    bandwidth_gbs: float = Field(default=3350.0, gt=0)
    """Peak bandwidth of a GPU's memory, in GB/s."""
    utilisation: float = Field(default=0.4, gt=0, le=1)
    """Share of these peaks that is reached."""


class Recipe(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the run directory, runs/<name>."""
    seed: int = Field(default=0, ge=0)
    """Of every random draw: prompts, responses, dropout."""
    plugins: list[str] = []
    """Python modules of your own that register weights or objectives; they are imported, so they run."""
    student: Model
    """The model that is trained."""
    teacher: Model | None = None
    """The teacher. With several, [teachers.NAME] each, and `prompts.teacher_column` says which prompt is whose."""
    teachers: dict[str, Model] = {}
    """Several teachers, by name."""
    reference: Model | None = None
    """R of reward extrapolation: the student's own start, or the teacher's base. It scores every response too."""
    prompts: Prompts
    rollout: Rollout = Rollout()
    score: Score = Score()
    weight: Weight = Weight()
    objective: Objective = Objective()
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
        return flatten(self.model_dump())

    def to_toml(self) -> str:
        """Return the resolved recipe, every default written out."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))

    def responses_per_step(self) -> int:
        return self.rollout.prompts_per_step * self.rollout.samples_per_prompt

    def teacher_models(self) -> dict[str, Model]:
        """Return the teachers by the name that prompts, responses and folders know them by: `teacher`, or
        `teacher-NAME` where there are several."""
        return {"teacher": self.teacher} if self.teacher else {teacher_name(n): m for n, m in self.teachers.items()}

    def scorers(self) -> dict[str, Model]:
        """Return every model that scores responses, by name: the teachers, and `reference` where there is one."""
        return self.teacher_models() | ({"reference": self.reference} if self.reference else {})

    def models(self) -> dict[str, Model]:
        """Return every model by name: the student and the scorers."""
        return {"student": self.student} | self.scorers()


def teacher_name(name: str) -> str:
    """Return what the rest of opdctl calls the teacher of [teachers.NAME]."""
    return f"teacher-{name}"


def is_scorer(name: str) -> bool:
    """Whether `name` is what a run calls a model that scores."""
    return name in ("teacher", "reference") or name.startswith(teacher_name(""))


def model_key(name: str) -> str:
    """Return the recipe's key of a model's settings, such as `teachers.math` of `teacher-math`."""
    return name.replace("teacher-", "teachers.", 1)


def is_data_file(name: str) -> bool:
    """Whether a benchmark's name is that of a file of the user's own."""
    return name.endswith(TABLE_SUFFIXES)


def is_kept(recipe: Recipe, step: int) -> bool:
    """Whether the student of `step` stays when newer ones are there."""
    return any(every and step % every == 0 for every in (recipe.train.keep_every_steps, recipe.eval.every_steps))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
