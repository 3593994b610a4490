"""Settings of project 6. Flags: --loss ipo --beta 0.2; presets: configs/*.yaml."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from common.config import BaseConfig, Precision
from common.files import CHECKPOINTS
from phase1_foundation.project1_minimal_gpt.config import OptimizerConfig, check_seed
from phase1_foundation.project3_pretrain.config import TrainConfig
from phase2_finetuning.project4_instruction_tuning.tasks import LONGER

FOLDER = CHECKPOINTS / "project6"
SFT_MODEL = CHECKPOINTS / "project4" / "model.pt"  # made by project 4's train.py
SFT_COMMAND = "uv run python phase2_finetuning/project4_instruction_tuning/train.py"
PREFERENCE_COMMAND = "uv run python phase2_finetuning/project6_alignment/train_preference.py"
REWARD_COMMAND = "uv run python phase2_finetuning/project6_alignment/train_reward.py"
REWARD_MODEL = FOLDER / "reward" / "model.pt"  # made by train_reward.py


@dataclass
class PairsConfig(BaseConfig):
    """Where pairs of a better and a worse answer come from."""

    model: str = str(
        SFT_MODEL
    )  # to begin with: a checkpoint, a folder, a .gguf file, or a name: smollm2-135m
    data: list[str] = field(
        default_factory=lambda: ["tasks"]
    )  # tasks: the model's own answers, judged by the checker; or files of preferences
    families: list[str] = field(
        default_factory=lambda: ["sort_numbers", "sort_words", "count"]
    )  # of tasks: by default some that the tuned model often gets wrong and can learn; none: all there are
    tasks: int = 6000  # prompts that the model answers
    samples: int = 4  # answers to each
    temperature: float = 1.0  # at which it answers
    max_new_tokens: int = 32  # longest answer, in tokens
    longest: int = 512  # tokens of a prompt and an answer from a file; longer ones are left out
    max_pairs: int = 0  # pairs in all; 0: all
    batch_size: int = 32  # pairs per step
    validation_share: float = 0.1  # of the prompts
    test_tasks: int = 300  # prompts never trained on, by which the result is judged

    def validate_config(self) -> None:
        """Raise ValueError for settings that give no pairs."""
        self.require_at_least(1, "tasks", "max_new_tokens", "batch_size", "test_tasks")
        self.require_at_least(2, "samples", "longest")
        self.require_at_least(0, "max_pairs")
        if not self.data:
            raise ValueError("data () must name tasks, or a file of preferences")
        if not self.temperature > 0:
            raise ValueError(f"temperature ({self.temperature}) must be above 0: equal answers make no pair")
        if not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share ({self.validation_share}) must be between 0 and 1")


@dataclass
class PreferenceLossConfig(BaseConfig):
    """What a pair teaches."""

    loss: Literal["dpo", "ipo", "kto", "orpo", "simpo"] = "dpo"  # preference.py has the table
    beta: float | None = None  # strength of the pull towards the reference; none: the loss's usual one
    gamma: float = 1.0  # simpo: margin that the better answer must lead by
    label_smoothing: float = 0.0  # dpo: share of pairs that are taken to be the wrong way round
    sft_weight: float = 1.0  # of the better answer's own loss, per token, added to the pair's (orpo has it)
    desirable_weight: float = 1.0  # kto: of the better answers
    undesirable_weight: float = 1.0  # kto: of the worse ones

    def validate_config(self) -> None:
        """Raise ValueError for losses that no minimum is of use of."""
        self.require_at_least(0, "gamma", "sft_weight", "desirable_weight", "undesirable_weight")
        if self.beta is not None and not self.beta > 0:
            raise ValueError(f"beta ({self.beta}) must be above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing ({self.label_smoothing}) must be at least 0 and below 0.5")


@dataclass
class TuneConfig(TrainConfig):
    """How the weights move: project 3's trainer at the pace of fine-tuning."""

    max_steps: int = 250  # steps
    optimizer: Literal["muon", "adamw"] = "adamw"  # muon: for the blocks' matrices
    lr: float = 2e-4  # peak learning rate of AdamW
    warmup_steps: int = 10  # steps over which the learning rate rises to its peak
    weight_decay: float = 0.0  # pull of matrices towards zero, times the learning rate
    eval_interval: int = 50  # steps between evaluations; each also saves
    eval_batches: int = 8  # batches of each evaluation
    out: Path = FOLDER / "preference"  # folder for checkpoints, pairs.json, *.csv, *.png


@dataclass
class PreferenceConfig(BaseConfig):
    """Project 6: teach a model by pairs of a better and a worse answer (DPO, IPO, KTO, ORPO, SimPO)."""

    pairs: PairsConfig = field(default_factory=PairsConfig)
    loss: PreferenceLossConfig = field(default_factory=PreferenceLossConfig)
    train: TuneConfig = field(default_factory=TuneConfig)


@dataclass
class RewardTuneConfig(TuneConfig):
    """How the weights of the reward model move."""

    out: Path = FOLDER / "reward"  # folder for checkpoints, pairs.json, *.csv, *.png


@dataclass
class RewardConfig(BaseConfig):
    """Project 6: train a model that scores answers, on pairs of a better and a worse one (Bradley-Terry)."""

    pairs: PairsConfig = field(default_factory=PairsConfig)
    train: RewardTuneConfig = field(default_factory=RewardTuneConfig)
    center: float = 0.01  # pull of the two scores' sum towards 0: the loss itself knows only their difference
    best_of: int = 8  # answers of which the reward model picks one, when it is judged

    def validate_config(self) -> None:
        """Raise ValueError for settings that cannot train."""
        super().validate_config()
        self.require_at_least(0, "center")
        self.require_at_least(2, "best_of")


@dataclass
class PolicyLossConfig(BaseConfig):
    """How a batch of answers and their advantages move the policy; configs/*.yaml has the papers' choices."""

    advantage: Literal["normalized", "centered", "leave_one_out"] = "normalized"  # of an answer in its group
    ratio: Literal["token", "sequence", "product"] = (
        "token"  # new odds over old: each token's, their mean, all
    )
    clip: Literal["ppo", "cispo", "none"] = "ppo"  # stop pushing beyond, or push on with a bounded weight
    clip_low: float = 0.2  # how far a ratio may fall below 1
    clip_high: float = 0.2  # how far it may rise above 1
    mean: Literal["sequence", "token", "constant"] = "sequence"  # answers count alike; tokens; by the longest
    kl_weight: float = 0.0  # price of leaving the reference policy, per nat
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"  # what is added up as KL
    kl_in: Literal["loss", "reward"] = "loss"  # where it is added
    entropy_bonus: float = 0.0  # reward for undecided odds, per nat

    def validate_config(self) -> None:
        """Raise ValueError for settings that no ratio or odds can have."""
        self.require_at_least(0, "clip_high", "kl_weight", "entropy_bonus")
        if not 0 <= self.clip_low <= 1:
            raise ValueError(f"clip_low ({self.clip_low}) must be between 0 and 1")


@dataclass
class RLConfig(OptimizerConfig):
    """What reinforcement learning by GRPO and by PPO have in common."""

    max_steps: int = 200  # rounds of writing and learning
    optimizer: Literal["muon", "adamw"] = "adamw"  # muon: for the blocks' matrices
    lr: float = 5e-4  # peak learning rate of AdamW
    warmup_steps: int = 5  # rounds over which the learning rate rises to its peak
    weight_decay: float = 0.0  # pull of matrices towards zero, times the learning rate
    model: str = str(SFT_MODEL)  # to begin with, and the reference: a checkpoint, a folder, .gguf, or a name
    families: list[str] = field(
        default_factory=lambda: list(LONGER)
    )  # of tasks; by default longer ones than any it was tuned on; none: those that it was tuned on
    rewards: list[str] = field(
        default_factory=lambda: ["exact"]
    )  # what counts, added up: exact, contains, format, brevity, a reward model's file; NAME:0.5 weighs it
    prompts: int = 16  # tasks per round
    temperature: float = 1.0  # at which the policy writes
    max_new_tokens: int = 32  # longest answer, in tokens
    epochs: int = 1  # times that each round's answers are learned from
    minibatches: int = 1  # updates per epoch
    micro_batch_size: int = 0  # answers that are computed at once; 0: all of an update
    test_tasks: int = 200  # prompts never trained on, by which the result is judged
    eval_interval: int = 20  # rounds between evaluations; each also saves
    off_policy_cap: float = 0.0  # largest weight of a token whose odds changed since it was written; 0: none
    precision: Precision = "fp32"  # of matrix products in learning; in bf16 odds differ by percents
    write_precision: Precision = "fp32"  # of those in writing
    device: str = "auto"  # auto: cuda, else mps, else cpu
    seed: int = 1337  # of tasks and answers
    resume: bool = False  # go on from the newest checkpoint in `out`
    overwrite: bool = False  # begin anew in an `out` that holds an unfinished run

    def validate_config(self) -> None:
        """Raise ValueError for settings that cannot train."""
        super().validate_config()
        self.require_at_least(
            1, "prompts", "max_new_tokens", "epochs", "minibatches", "test_tasks", "eval_interval"
        )
        self.require_at_least(0, "micro_batch_size", "off_policy_cap")
        check_seed(self.seed)
        if not self.rewards:
            raise ValueError("rewards () must name what counts, such as exact")
        if not self.temperature > 0:
            raise ValueError(f"temperature ({self.temperature}) must be above 0: a policy must explore")
        if self.resume and self.overwrite:
            raise ValueError("overwrite (True) must be off to resume: there would be nothing to go on from")


@dataclass
class GRPOConfig(BaseConfig):
    """Project 6: reinforcement learning from groups of answers (GRPO, Dr. GRPO, DAPO, RLOO, GSPO, CISPO)."""

    rl: RLConfig = field(default_factory=RLConfig)
    policy: PolicyLossConfig = field(default_factory=PolicyLossConfig)
    samples: int = 8  # answers to each task: the group
    dynamic_sampling: bool = False  # draw tasks until enough groups have both right and wrong answers
    overlong_buffer: int = 0  # last tokens of max_new_tokens over which an answer loses up to 1 of its reward
    drop_truncated: bool = False  # answers that did not end teach nothing
    out: Path = FOLDER / "grpo"  # folder for checkpoints, *.csv, *.png

    def validate_config(self) -> None:
        """Raise ValueError for settings that make no groups."""
        super().validate_config()
        self.require_at_least(2, "samples")
        if not 0 <= self.overlong_buffer <= self.rl.max_new_tokens:
            rule = f"must be at least 0 and at most max_new_tokens ({self.rl.max_new_tokens})"
            raise ValueError(f"overlong_buffer ({self.overlong_buffer}) {rule}")


@dataclass
class PPOConfig(BaseConfig):
    """Project 6: reinforcement learning by a value model and its surprises (PPO)."""

    rl: RLConfig = field(
        default_factory=lambda: RLConfig(prompts=128, minibatches=4, lr=3e-4, max_steps=70, eval_interval=10)
    )
    policy: PolicyLossConfig = field(
        default_factory=lambda: PolicyLossConfig(
            mean="token", kl_in="reward", kl_estimator="k1", kl_weight=0.02
        )
    )
    gamma: float = 1.0  # worth of a reward one token later
    lam: float = 0.95  # of GAE: 0 trusts the value model, 1 the rewards
    value_weight: float = 0.5  # of the value model's loss
    value_clip: float = 0.2  # how far a value may move in one round; 0: as far as it likes
    value_lr: float = 1e-3  # peak learning rate of the value model
    out: Path = FOLDER / "ppo"  # folder for checkpoints, *.csv, *.png

    def validate_config(self) -> None:
        """Raise ValueError for settings that no return can have."""
        super().validate_config()
        self.require_at_least(0, "value_weight", "value_clip")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be between 0 and 1")


@dataclass
class EvaluateConfig(BaseConfig):
    """Project 6: hold models against the one that they began from, by the tasks' checker."""

    models: list[str] = field(default_factory=list)  # checkpoints; none: all that this project has made
    reference: str = str(SFT_MODEL)  # what they began from
    families: list[str] = field(default_factory=list)  # of tasks; none: all there are, the longer ones too
    test_tasks: int = 340  # prompts never trained on
    temperature: float = 0.0  # 0: always the likeliest token
    max_new_tokens: int = 32  # longest answer, in tokens
    device: str = "auto"  # auto: cuda, else mps, else cpu
    seed: int = 1337  # of tasks and answers

    def validate_config(self) -> None:
        """Raise ValueError for settings that cannot be measured."""
        self.require_at_least(1, "test_tasks", "max_new_tokens")
        self.require_at_least(0, "temperature")
        check_seed(self.seed)


@dataclass
class VisualizeConfig(BaseConfig):
    """Project 6: draw what training left in its folders."""

    folder: Path = FOLDER  # with the runs' folders in it
    out: Path = FOLDER  # folder for the PNGs
