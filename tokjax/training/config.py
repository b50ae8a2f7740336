"""The configuration of a training run: everything `python -m tokjax.train` can be told."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tokjax.config import Choice
from tokjax.data.config import DataConfig
from tokjax.errors import ConfigError
from tokjax.finetuning import (
    cat_attention,
    dft,
    one_token_rollout,
    q_tuning,
    rft,
    sft,
    star_dss,
    tvm,
)
from tokjax.gflownet import flower, lacot
from tokjax.models.config import ModelConfig
from tokjax.parallel.mesh import MeshConfig
from tokjax.preference import dpo, figa, kto
from tokjax.pretraining import (
    class_balanced,
    hdlm,
    lexinvariant,
    mae_lm,
    masked_lm,
    mexma,
    signal_processing_llm,
    sink_decorrelation,
    syntactic_smoothing,
    thinking_tokens,
    tree_cross_attention,
    wavelet_gpt,
)
from tokjax.pretraining.next_token import NextToken
from tokjax.pretraining.patch_training import Patch
from tokjax.retrieval import dear
from tokjax.rl import (
    d3s,
    drlc,
    gtpo,
    guided_by_gut,
    policy,
    ppo,
    rl_watermark,
    rlfh,
    rlfr,
    spo,
    ts_grpo,
    unir,
    zvp,
)
from tokjax.tokenization import hat, toucan
from tokjax.training.optimizers import AdamW, Cosine
from tokjax.training.retention import CheckpointConfig
from tokjax.verifiers import ExactMatch

# Importing a method registers it.
METHODS = (
    *(masked_lm, syntactic_smoothing),
    *(mae_lm, mexma),
    hdlm,
    *(sft, rft, q_tuning, dft, one_token_rollout, star_dss, cat_attention, tvm),
    *(dpo, figa, kto),
    *(policy, ppo, unir, spo, guided_by_gut, rlfr),
    *(gtpo, zvp, d3s),
    *(drlc, rlfh, ts_grpo),
    rl_watermark,
    *(flower, lacot),
    dear,
    *(wavelet_gpt, signal_processing_llm),
    *(hat, toucan),
    *(lexinvariant, class_balanced),
    sink_decorrelation,
    tree_cross_attention,
    thinking_tokens,
)

__all__ = ["METHODS", "NextToken", "Patch", "SampleConfig", "StageConfig", "TrainConfig"]


@dataclass(frozen=True)
class StageConfig:
    """A part of a run with an objective of its own; parameters carry over between stages."""

    objective: Annotated[Any, Choice("objective")] = NextToken()  # what is minimised
    share: float = 1.0  # share of the run's data tokens; the shares of all stages sum to 1
    keep_optimizer: bool = False  # carry the optimiser's moments over from the stage before
    rate: float = 1.0  # factor of optimizer.peak_lr in this stage

    def __post_init__(self):
        if not self.rate > 0:
            raise ConfigError(f"rate={self.rate} must be above 0")
        if not 0 < self.share <= 1:
            raise ConfigError(f"share={self.share} must be above 0 and at most 1")


@dataclass(frozen=True)
class AnswersConfig:
    """Evaluation by generation: greedy answers to the prompts of `data.evals`, and their verifier.

    A prompt is what lies before the last answer of an example; sets without prompts are left out.
    """

    verifier: Annotated[Any, Choice("verifier")] = ExactMatch()  # says which answers are right
    max_examples: int | None = 128  # questions of each set; None asks all
    max_new_tokens: int = 64  # tokens of an answer

    def __post_init__(self):
        for name in ("max_examples", "max_new_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True)
class EvalConfig:
    """When and how much is evaluated: the next-token loss on each of `data.evals`."""

    every_steps: int = 500  # steps between evaluations; there is always one at the end
    max_batches: int | None = None  # batches of each set; None reads it all
    batch_size: int | None = None  # rows of an evaluation batch; None takes data.batch_size
    answers: AnswersConfig | None = None  # also let the model answer; None: the loss alone

    def __post_init__(self):
        for name in ("every_steps", "max_batches", "batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True)
class SampleConfig:
    """Texts the model writes during training."""

    every_steps: int | None = None  # steps between samples; None writes only at the end
    prompts: tuple[str, ...] = ()  # what to continue; none means no samples
    max_new_tokens: int = 64  # tokens of each text
    temperature: float = 0.8  # 0 takes the likeliest token
    top_p: float = 0.95  # probability mass that may be sampled from

    def __post_init__(self):
        for name in ("every_steps", "max_new_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.temperature < 0:
            raise ConfigError(f"temperature={self.temperature} must not be negative")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must be above 0 and at most 1")


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    title: str = "tokjax run"  # heads the report
    seed: int = 0  # of initial parameters and of everything random in the step
    # checkpoint to start from: whatever `tokjax.load` takes. The model and, unless one is chosen,
    # the tokenizer are its; of `model` only dtypes, remat, unroll, attention and lora may be set.
    # None: random parameters
    init_from: str | None = None
    # what is trained; with `lora` the adapters alone, beside the frozen checkpoint of init_from
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()  # what it reads
    objective: Annotated[Any, Choice("objective")] = NextToken()  # of a run with one stage
    stages: tuple[StageConfig, ...] = ()  # several objectives in turn; instead of `objective`
    steps: int | None = None  # length of the run in steps of seq_len * batch_size data tokens
    tokens: int | None = None  # length of the run in data tokens, filling included
    epochs: float | None = None  # length of the run in passes over the training data
    optimizer: Annotated[Any, Choice("optimizer")] = AdamW()  # how parameters are updated
    schedule: Annotated[Any, Choice("schedule")] = Cosine()  # learning rate over a stage
    clip_norm: float | None = 1.0  # largest global norm of the gradient; None does not clip
    micro_batches: int = 1  # parts a batch is computed in, to save memory
    # decay of a moving average of the parameters, which is then evaluated and sampled from
    ema_decay: float | None = None
    # a NaN or infinite loss or gradient ends the run, or its update is left out and counted
    on_nonfinite: Literal["stop", "skip"] = "stop"
    mesh: MeshConfig = MeshConfig()  # how devices share the work
    evaluation: EvalConfig = EvalConfig()  # when and how much is evaluated
    samples: SampleConfig = SampleConfig()  # texts written during training
    checkpoints: CheckpointConfig = CheckpointConfig()  # when saved and which kept
    log_every: int = 10  # steps between rows of metrics.csv

    def __post_init__(self):
        lengths = [n for n in ("steps", "tokens", "epochs") if getattr(self, n) is not None]
        if len(lengths) != 1:
            raise ConfigError(
                f"set exactly one of steps, tokens and epochs to say how long to train; "
                f"{' and '.join(lengths) or 'none'} {'are' if lengths else 'is'} set"
            )
        if not getattr(self, lengths[0]) > 0:
            raise ConfigError(f"{lengths[0]}={getattr(self, lengths[0])} must be above 0")
        # JAX would take a larger seed modulo 2^32: two of them would be one.
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed} must be at least 0 and below 2^32")
        if self.micro_batches < 1:
            raise ConfigError(f"micro_batches={self.micro_batches} must be at least 1")
        if self.data.batch_size % self.micro_batches:
            raise ConfigError(
                f"data.batch_size={self.data.batch_size} is not divisible by "
                f"micro_batches={self.micro_batches}"
            )
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay={self.ema_decay} must be at least 0 and below 1")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ConfigError(f"clip_norm={self.clip_norm} must be above 0, or None")
        if self.log_every < 1:
            raise ConfigError(f"log_every={self.log_every} must be at least 1")
        if self.model.lora is not None and self.init_from is None:
            raise ConfigError(
                "model.lora trains adapters beside a frozen model: name that by init_from"
            )
        # Before the checkpoint is looked at its model is not known.
        known = self.init_from is None or self.model.vocab_size is not None
        if known and self.data.seq_len > self.model.max_positions:
            raise ConfigError(
                f"data.seq_len={self.data.seq_len} is longer than "
                f"model.max_positions={self.model.max_positions}"
            )
        if self.stages and self.objective != NextToken():
            raise ConfigError("set either objective or stages, not both")
        shares = sum(stage.share for stage in self.stage_list)
        if abs(shares - 1) > 1e-6:
            raise ConfigError(f"the shares of the stages sum to {shares}, not to 1")

    @property
    def stage_list(self) -> tuple[StageConfig, ...]:
        """The stages; a run without stages is one stage of its objective."""
        return self.stages or (StageConfig(objective=self.objective),)
