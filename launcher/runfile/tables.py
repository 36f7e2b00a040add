"""All tables of a run file together, and those that are the launcher's own.

    [run] [train] [optimizer] [learning_rate] [checkpoint] [evaluation] [log] [init]    here
    [model] [model.moe]                                                                 model/config.py
    [parallel] [pipeline] [zero] [recompute]                                            parallel/config.py
    [data]                                                                              data/config.py

The line under each key is its documentation: in docs/run-file.md, in the JSON schema and in an editor. A default of 0
that is not a count says what it stands for. Nothing here loads torch.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, NonNegativeFloat, PositiveFloat

from meshwright.data.config import DataConfig
from meshwright.launcher.ranks.environment import MAX_THREADS
from meshwright.model.config import ModelConfig
from meshwright.model.kinds.sizes import TABLE
from meshwright.parallel.config import ParallelConfig, PipelineConfig, RecomputeConfig, ZeroConfig

# What is counted stays a whole number also where a float takes it.
MAX_COUNT = 2**53
Count = Annotated[int, Field(gt=0, le=MAX_COUNT)]
CountOrZero = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class RunConfig(BaseModel):
    """What the run is called, where it lies and on what it runs."""

    model_config = TABLE

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run, in its folder and its log: letters, digits, dot, dash and underscore."""
    folder: str = ""
    """Where everything of the run is written; "" = `output/<name>`. On a cluster all nodes must see it."""
    seed: CountOrZero = 0
    """Decides initial weights and data order, the same on every layout."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto takes cuda where there is one, and else cpu; mps (Apple) is for one process and only taken by name."""
    timeout_seconds: Annotated[int, Field(gt=0, le=2_592_000)] = 600
    """A rank that waits this long for the others ends with an error; 300 to 1800 are usual, 30 days the most."""

    @property
    def output_folder(self) -> str:
        """Return the folder with the default filled in."""
        return self.folder or f"output/{self.name}"


class BatchRampEntry(BaseModel):
    """One step of the ramp: the batch size until so many samples are consumed."""

    model_config = TABLE

    samples: Count
    """Samples consumed, counted from the start of the run, at which this size ends."""
    global_batch_size: Count
    """Samples of one update until then."""


class TrainConfig(BaseModel):
    """How long, in which portions and in which precision the model is trained."""

    model_config = TABLE

    steps: Count
    """Updates of the weights in the whole run."""
    global_batch_size: Count
    """Samples of one update, over all ranks; 0.5 M to 16 M tokens (times data.seq_len) are usual for large models."""
    micro_batch_size: Count = 1
    """Samples that one rank computes at once, at most; a larger batch is accumulated. As large as memory allows."""
    batch_ramp: Annotated[tuple[BatchRampEntry, ...], Field(strict=False)] = ()
    """Smaller batches at the start: [{samples = 10000, global_batch_size = 64}, ...]; then global_batch_size."""
    precision: Literal["fp32", "bf16_autocast", "bf16", "fp64"] = "fp32"
    """bf16_autocast computes products in bf16; bf16 also holds weights so, with fp32 masters; fp64 is for proofs."""
    clip_norm: NonNegativeFloat = 1.0
    """Scale the gradient down to this norm over all weights, experts included; 0 turns it off. 1.0 is usual."""
    skip_norm_spike: NonNegativeFloat = 0.0
    """Skip, and count, a step whose norm exceeds this multiple of the median of the last 64; 0 = off, at least 1,
    5 to 20 usual."""
    compile: bool = False
    """Compile the layers with torch.compile; pays on a GPU in runs that are longer than a few minutes."""
    threads: Annotated[int, Field(ge=0, le=MAX_THREADS)] = 0
    """CPU threads of each rank; 0 = this machine's cores divided by its ranks."""

    @property
    def batch_sizes(self) -> list[tuple[str, int]]:
        """Return every size of a batch that the run comes through, by its key."""
        ramp = [
            (f"train.batch_ramp[{at}].global_batch_size", entry.global_batch_size)
            for at, entry in enumerate(self.batch_ramp)
        ]
        return [("train.global_batch_size", self.global_batch_size), *ramp]


class OptimizerGroup(BaseModel):
    """Parameters that are updated in a way of their own; what is left out here is as in [optimizer]."""

    model_config = TABLE

    match: str
    """Global names that it is for, "*.router.weight": `*` is any text, `?` one sign; the first group that fits wins."""
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] | None = None
    """As optimizer.betas, for these parameters."""
    eps: PositiveFloat | None = None
    """As optimizer.eps, for these parameters."""
    weight_decay: NonNegativeFloat | None = None
    """As optimizer.weight_decay, for these parameters; acts on norms and biases too where the pattern fits them."""
    kind: Literal["adamw", "muon"] | None = None
    """Which of the two updates these parameters; muon is for matrices (stacks of experts are many)."""
    learning_rate_factor: PositiveFloat | None = None
    """Multiple of the learning rate that these parameters are updated with."""


class OptimizerConfig(BaseModel):
    """AdamW, or Muon for the matrices of the layers; weight decay leaves out norms and biases."""

    model_config = TABLE

    kind: Literal["adamw", "muon"] = "adamw"
    """muon updates matrices of features to features (docs/optimizer.md lists them); all else stays with AdamW."""
    muon_momentum: Beta = 0.95
    """Muon: how slowly the average of the gradient moves; 0.9 to 0.95 are usual."""
    muon_nesterov: bool = True
    """Muon: look one step of the average ahead (Nesterov), as its author does."""
    muon_steps: Annotated[int, Field(gt=0, le=99)] = 5
    """Muon: Newton-Schulz steps that make an update orthogonal; 5 is usual, more costs more and changes little."""
    adamw_learning_rate_factor: PositiveFloat = 1.0
    """With kind = "muon": multiple of the learning rate for what AdamW updates; 1 as in Moonlight and Kimi K2."""
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.95)
    """How slowly the averages of the gradient and of its square move; the second is 0.95 to 0.999."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment; 1e-8 is usual."""
    weight_decay: NonNegativeFloat = 0.1
    """Part of a weight that is taken off at each step, times the learning rate; 0.01 to 0.1 are usual."""
    embedding_weight_decay: bool = True
    """Let weight decay act on the embedding, on learned positions and on the output matrix too."""
    groups: Annotated[tuple[OptimizerGroup, ...], Field(strict=False)] = ()
    """Other settings for some parameters: [{match = "*.router.weight", weight_decay = 0.0}, ...]."""


class LearningRateConfig(BaseModel):
    """Warm-up from near zero to the peak, then the schedule down to final_fraction of it."""

    model_config = TABLE

    peak: PositiveFloat
    """Highest learning rate; 1e-4 (large models) to 3e-3 (tiny ones)."""
    final_fraction: Fraction = 0.1
    """The last step's learning rate as a fraction of the peak; 0 to 0.1 are usual."""
    warmup_steps: CountOrZero = 0
    """Steps of linear warm-up; 100 to 2000 are usual. Give this or warmup_fraction."""
    warmup_fraction: Fraction = 0.0
    """Warm-up as a fraction of train.steps; 0.01 to 0.05 are usual. Give this or warmup_steps."""
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    """The way down after the warm-up; wsd (warm-up, stable, decay) stays at the peak until its last part."""
    decay_fraction: Fraction = 0.2
    """With schedule = "wsd": the last part of train.steps, over which it decays; 0.1 to 0.2 are usual."""


class CheckpointConfig(BaseModel):
    """When checkpoints are written, and which are kept."""

    model_config = TABLE

    every: CountOrZero = 0
    """Steps between checkpoints; 0 = only after the last step, and when the run is stopped by a signal."""
    keep_last: Count = 2
    """Newest checkpoints that are kept; 2 or more leave one to fall back on."""
    keep_every: CountOrZero = 0
    """Keep every checkpoint of a step that this divides, for good; 0 = none. A multiple of `every`."""
    asynchronous: bool = False
    """Write in the background while training goes on; needs memory for one copy of the rank's state."""


class EvaluationConfig(BaseModel):
    """When the loss on the held-out documents is measured."""

    model_config = TABLE

    every: CountOrZero = 0
    """Steps between evaluations; the last step is evaluated too. 0 = never."""
    samples: Count = 64
    """Samples of the validation split that are used, the same ones each time; all of them where it has fewer."""


class LogConfig(BaseModel):
    """What is told while the run goes on; metrics.jsonl is always written."""

    model_config = TABLE

    every: Count = 1
    """Steps between lines in the terminal; 1 to 100 are usual. metrics.jsonl has every step."""


class InitConfig(BaseModel):
    """Begin from another run's weights instead of fresh ones: to branch, anneal or train on another mixture."""

    model_config = TABLE

    source: Annotated[str, Field(alias="from")] = ""
    """Folder of a checkpoint or of an export; "" = fresh weights. Looked at only when the run has no checkpoint yet."""
    load: Literal["weights", "weights+optimizer"] = "weights"
    """What is taken over; the optimizer's state is in checkpoints only."""
    upcycle: Literal["none", "copy", "partition"] = "none"
    """Make experts of the dense feed-forwards there: each a copy of one, or a piece of one; routers begin anew."""
    upcycle_noise: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Noise on the experts, as a share of the dense weights' deviation; 0 = the first loss is the dense model's, unless
    a capacity or dropout changes it."""
    pool_kv_heads: bool = False
    """Make each key and value head the mean of a group of those there: grouped queries from multi-head attention."""


class RunFile(BaseModel):
    """A run file: everything that decides a run."""

    model_config = TABLE

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    learning_rate: LearningRateConfig
    parallel: ParallelConfig = ParallelConfig()
    pipeline: PipelineConfig = PipelineConfig()
    zero: ZeroConfig = ZeroConfig()
    recompute: RecomputeConfig = RecomputeConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    log: LogConfig = LogConfig()
    init: InitConfig = InitConfig()
