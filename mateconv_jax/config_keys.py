"""Every configuration key: its default, what it may be, what it means, and what happens when a resumed run changes it.

`python -m mateconv_jax.train --help` prints this list.
"""

import dataclasses
import enum
from collections.abc import Callable
from typing import Any

from mateconv_jax import intervals


class OnResume(enum.Enum):
    """What changing a key does to a run that is resumed."""

    FREE = "nothing"  # it continues to the bit as it would have
    DIVERGES = "it diverges"  # allowed; the log names the key
    FIXED = "it is refused"  # the parameters in the checkpoint have other shapes or another meaning


FREE, DIVERGES, FIXED = OnResume

# What a value must satisfy: words that complete "expected …", and the test.
Check = tuple[str, Callable[[Any], bool]]
POSITIVE: Check = ("a number above 0", lambda value: value > 0)
NOT_NEGATIVE: Check = ("a number of at least 0", lambda value: value >= 0)
FRACTION: Check = ("a number from 0 to 1", lambda value: 0 <= value <= 1)
BELOW_ONE: Check = ("a number from 0 to below 1", lambda value: 0 <= value < 1)
DEVICES: Check = ("a number of devices, or -1", lambda value: value == -1 or value > 0)
INTERVAL: Check = (intervals.EXPECTED, intervals.is_interval)
TEXTS: Check = ('texts, such as ("中国", "今天")', lambda value: all(isinstance(text, str) for text in value))


REWARD_LOSSES = ("grpo", "bnpo", "dapo", "dr_grpo")  # values of loss.kind that learn from rewards


def one_of(*choices) -> Check:
    return " or ".join(map(str, choices)), lambda value: value in choices


PATHS = (
    "data.val_data_path", "data.tokenizer_path", "training.out_dir", "training.compilation_cache_dir",
    "training.resume_from", "training.init_from",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Key:
    """A configuration key.

    Attributes:
      path: section.name, as after `--config.`
      default: its value unless given.
      on_resume: what changing it does to a resumed run.
      meaning: for --help.
      check: what a value other than None must satisfy; None: its type is enough.
      value_type: where the default does not show it; a key whose default is None may stay None. `object`: a number or text.
    """

    path: str
    default: Any
    on_resume: OnResume
    meaning: str
    check: Check | None = None
    value_type: type | None = None

    @property
    def allowed(self) -> str:
        """In words."""
        if self.check is not None:
            return self.check[0]
        return "True or False" if isinstance(self.default, bool) else "text"


KEYS = [
    # ---- model ------------------------------------------------------------------------------------------------------------
    Key("model.dim", 512, FIXED, "Width of the residual stream.", POSITIVE),
    Key("model.n_layers", 8, FIXED, "Transformer blocks.", POSITIVE),
    Key("model.n_heads", 16, FIXED, "Query heads.", POSITIVE),
    Key("model.n_kv_heads", 8, FIXED, "Key/value heads, each shared by n_heads / n_kv_heads query heads.", POSITIVE),
    Key("model.head_dim", None, FIXED, "Features of a head. None: dim / n_heads.", POSITIVE, int),
    Key("model.hidden_dim", None, FIXED,
        "Width of the feed-forward layer. None: int(8 * dim / 3), rounded up to a multiple of multiple_of.", POSITIVE, int),
    Key("model.multiple_of", 64, FREE, "What an automatic hidden_dim is rounded up to.", POSITIVE),
    Key("model.vocab_size", 6400, FIXED, "Rows of the embedding; at least the tokenizer's vocabulary.", POSITIVE),
    Key("model.max_seq_len", 512, FREE, "Longest context, in tokens.", POSITIVE),
    Key("model.norm_eps", 1e-5, FIXED, "Epsilon of RMSNorm.", POSITIVE),
    Key("model.rope_theta", 10_000.0, FIXED, "Base of the rotary frequencies.", POSITIVE),
    Key("model.rope_factor", 1.0, FIXED,
        "How many times longer the context becomes than rope_original_max_seq_len. 1: no rope scaling.",
        ("a number of at least 1", lambda value: value >= 1)),
    Key("model.rope_scaling", "llama3", FIXED, "Kind of rope scaling, where rope_factor is above 1: Llama 3's or YaRN.",
        one_of("llama3", "yarn")),
    Key("model.rope_original_max_seq_len", 8192, FIXED,
        "Rope scaling: the context that the model was first trained with.", POSITIVE),
    Key("model.rope_low_freq_factor", 1.0, FIXED,
        "llama3: frequencies with fewer turns than this over the original context are divided by rope_factor.", POSITIVE),
    Key("model.rope_high_freq_factor", 4.0, FIXED,
        "llama3: frequencies with more turns than this stay as they are.", POSITIVE),
    Key("model.rope_beta_fast", 32.0, FIXED,
        "yarn: frequencies with more turns than this over the original context stay as they are.", POSITIVE),
    Key("model.rope_beta_slow", 1.0, FIXED,
        "yarn: frequencies with fewer turns than this are divided by rope_factor.", POSITIVE),
    Key("model.rope_truncate", True, FIXED, "yarn: widen the range between the two to whole pairs of features."),
    Key("model.rope_attention_factor", None, FIXED,
        "yarn: factor of rotated queries and keys. None: 0.1 ln(rope_factor) + 1.", POSITIVE, float),
    Key("model.qk_norm", False, FIXED, "RMSNorm of each head's queries and keys, as in Qwen3 and the current MiniMind."),
    Key("model.qkv_bias", False, FIXED, "Add a bias to queries, keys and values, as Qwen2 does."),
    Key("model.tie_word_embeddings", True, FIXED, "Use the embedding as the output layer."),
    Key("model.dropout", 0.0, DIVERGES,
        "Dropout of embeddings, attention weights and residual branches in training.", BELOW_ONE),
    Key("model.use_moe", False, FIXED, "Replace each feed-forward layer by a mixture of experts."),
    Key("model.n_routed_experts", 4, FIXED, "Experts that the gate chooses from.", POSITIVE),
    Key("model.num_experts_per_tok", 2, FIXED, "Routed experts per token.", POSITIVE),
    Key("model.n_shared_experts", 1, FIXED, "Experts that process every token, each as large as a routed one.", one_of(0, 1)),
    Key("model.norm_topk_prob", True, FIXED, "Normalise the weights of a token's experts to sum to 1."),
    Key("model.aux_loss_alpha", 0.01, DIVERGES, "Weight of the load-balancing loss.", NOT_NEGATIVE),
    Key("model.experts", "auto", FREE,
        "How experts are computed: all of them for every token (dense), or grouped by expert (ragged).",
        one_of("auto", "dense", "ragged")),
    Key("model.attention", "auto", FREE,
        "Attention backend. auto: the fastest that the device supports; the log says which.",
        one_of("auto", "cudnn", "blocked", "xla")),

    # ---- data -------------------------------------------------------------------------------------------------------------
    Key("data.train_data_path", None, DIVERGES,
        "A dataset folder written by `python -m mateconv_jax.prepare`, or a flat .bin file. Several, with their shares of the "
        "rows: data/wiki:0.6,data/code:0.4; in a config file also a dict or a list.",
        ("text", lambda value: isinstance(value, str)), object),
    Key("data.val_data_path", None, FREE,
        "Another dataset, all of it for validation. None: the validation split of train_data_path, of each dataset there. "
        "Several, with names: wiki=data/wiki,code=data/code; the first is that of val/loss and the best checkpoint.",
        value_type=str),
    Key("data.tokenizer_path", None, FREE,
        "Tokenizer folder. None: the one in train_data_path, its first folder (a .bin file has none).", value_type=str),
    Key("data.seq_len", 512, DIVERGES, "Targets per row; rows hold seq_len + 1 tokens.", POSITIVE),
    Key("data.shuffle", True, DIVERGES, "Shuffle the rows anew in every epoch. False: read them in order."),
    Key("data.num_workers", 4, FREE, "Threads that read batches ahead.", POSITIVE),

    # ---- mesh -------------------------------------------------------------------------------------------------------------
    Key("mesh.data", -1, FREE, "Devices over which only the batch is split. -1: all that mesh.fsdp leaves.", DEVICES),
    Key("mesh.fsdp", 1, FREE,
        "Devices over which parameters, EMA and optimizer state are sharded too. -1: all that mesh.data leaves.", DEVICES),

    # ---- loss -------------------------------------------------------------------------------------------------------------
    Key("loss.kind", "next_token", FIXED,
        "What is learned: the next token of texts and dialogues; or preferences (sigmoid is DPO), from a dataset of pairs; or, "
        "from rewards of the model's own answers to prompts, grpo, bnpo, dapo and dr_grpo (as TRL's loss_type).",
        one_of("next_token", "sigmoid", "ipo", "orpo", "simpo", *REWARD_LOSSES)),
    Key("loss.beta", None, DIVERGES,
        "Preferences: factor of log-ratios in rewards; the larger, the closer to the reference. orpo: weight of the odds. "
        "Rewards: weight of the KL divergence from training.init_from; 0: none. None: 0.1, with rewards 0.",
        NOT_NEGATIVE, float),
    Key("loss.label_smoothing", 0.0, DIVERGES,
        "sigmoid and simpo: how likely a pair is labelled the wrong way round (cDPO).",
        ("a number from 0 to below 0.5", lambda value: 0 <= value < 0.5)),
    Key("loss.gamma", 0.5, DIVERGES, "simpo: margin that the chosen answer's reward shall have.", NOT_NEGATIVE),
    Key("loss.sft_coef", 0.0, DIVERGES,
        "Preferences: weight of the chosen answer's cross-entropy per token, added to the loss.", NOT_NEGATIVE),
    Key("loss.epsilon", 0.2, DIVERGES, "Rewards: a token's probability ratio is clipped below 1 - epsilon.", BELOW_ONE),
    Key("loss.epsilon_high", None, DIVERGES,
        "Rewards: it is clipped above 1 + epsilon_high. None: epsilon; DAPO's clip-higher is 0.28.", POSITIVE, float),
    Key("loss.scale_rewards", "group", DIVERGES,
        "Divide advantages by the standard deviation of the rewards of a prompt's answers (group), of all the step's answers "
        "(batch), or not (none, as Dr. GRPO recommends).", one_of("group", "batch", "none")),

    # ---- rollout ----------------------------------------------------------------------------------------------------------
    Key("rollout.samples", 8, DIVERGES,
        "Answers to each prompt. A step has batch_size x accumulation_steps answers, to that many / samples prompts.",
        ("a number of at least 2", lambda value: value >= 2)),
    Key("rollout.max_new_tokens", 64, DIVERGES, "Longest answer; a prompt has the rest of data.seq_len + 1.", POSITIVE),
    Key("rollout.temperature", 1.0, DIVERGES, "Divides the logits, in sampling and in the loss.", POSITIVE),
    Key("rollout.top_k", 0, DIVERGES, "Sample from the k most likely tokens. 0: from all.", NOT_NEGATIVE),
    Key("rollout.top_p", 1.0, DIVERGES, "Sample from the smallest set of tokens whose probability reaches p.", FRACTION),
    Key("rollout.min_p", 0.0, DIVERGES,
        "Sample from tokens at least this fraction as likely as the most likely one.", FRACTION),
    Key("rollout.iterations", 1, DIVERGES, "Steps that learn from the same answers; TRL's num_iterations.", POSITIVE),

    # ---- reward -----------------------------------------------------------------------------------------------------------
    Key("reward.functions", (), DIVERGES,
        "Python functions (prompts, completions, records) -> rewards, each as module:function.",
        ('names, such as ("mateconv_jax.rewards:number_match",)',
         lambda value: all(isinstance(name, str) and ":" in name for name in value))),
    Key("reward.weights", (), DIVERGES, "Weight of each function's reward. (): 1 each.",
        ("numbers, such as (1.0, 0.5)", lambda value: all(isinstance(x, int | float) for x in value))),
    Key("reward.num_threads", 8, FREE, "Threads that call them.", POSITIVE),

    # ---- training: the run ------------------------------------------------------------------------------------------------
    Key("training.out_dir", "out", FREE, "The run folder: checkpoints, log, metrics, configuration, tokenizer."),
    Key("training.compilation_cache_dir", None, FREE,
        'Where compiled programs are kept. None: $JAX_COMPILATION_CACHE_DIR or ~/.cache/mateconv_jax/xla; "": nowhere.',
        value_type=str),
    Key("training.seed", 1337, DIVERGES, "Seed of initial weights, order of rows and dropout.", NOT_NEGATIVE),
    Key("training.epochs", 15, DIVERGES,
        "Passes over the training rows; of several datasets, as many rows as they have together.", POSITIVE),
    Key("training.max_steps", None, DIVERGES, "Optimizer steps; overrides epochs.", POSITIVE, int),
    Key("training.max_hours", None, FREE,
        "Hours after which the run saves and exits with 75, as if it were sent SIGTERM: counted from the start of the "
        "process, and early enough for the checkpoint to be written.", POSITIVE, float),
    Key("training.hang_timeout", 0.0, FREE,
        "Seconds without a step of any process after which all print their stacks and exit with 75. 0: never.", NOT_NEGATIVE),
    Key("training.batch_size", 32, DIVERGES,
        "GLOBAL batch: rows of a micro-batch over all devices. (PyTorch MateConv's is per GPU.)", POSITIVE),
    Key("training.accumulation_steps", 1, DIVERGES, "Micro-batches per optimizer step.", POSITIVE),

    # ---- training: optimizer and schedule ---------------------------------------------------------------------------------
    Key("training.optimizer_type", "adamw", FIXED, "Optimizer.", one_of("adamw", "adam", "lion", "adafactor", "muon")),
    Key("training.learning_rate", 3e-4, DIVERGES, "Peak learning rate.", POSITIVE),
    Key("training.matrix_lr_ratio", 1.0, DIVERGES,
        "Learning rate of the blocks' matrices over that of everything else; about 64 / model.dim is best (docs/recipes.md).",
        POSITIVE),
    Key("training.min_lr", 3e-5, DIVERGES, "Learning rate at the end of the schedule (all but constant).", NOT_NEGATIVE),
    Key("training.lr_scheduler", "cosine", DIVERGES,
        "Learning rate after the warm-up.", one_of("cosine", "linear", "polynomial", "constant", "wsd")),
    Key("training.warmup_ratio", 0.1, DIVERGES,
        "Share of all steps in which the learning rate rises linearly from 0.", BELOW_ONE),
    Key("training.warmup_steps", None, DIVERGES, "Steps of the warm-up; overrides warmup_ratio.", NOT_NEGATIVE, int),
    Key("training.lr_power", 2.0, DIVERGES, "Exponent of the polynomial schedule.", POSITIVE),
    Key("training.decay_ratio", 0.2, DIVERGES,
        "wsd: share of all steps, at the end, in which the learning rate falls.", FRACTION),
    Key("training.beta1", 0.9, DIVERGES, "Decay of the first moment (adamw, adam, lion; muon's adamw).", BELOW_ONE),
    Key("training.beta2", 0.95, DIVERGES, "Decay of the second moment (adamw, adam, lion; muon's adamw).", BELOW_ONE),
    Key("training.adam_eps", 1e-8, DIVERGES,
        "Added to the root of the second moment, which divides the update (adamw, adam; muon's adamw).", POSITIVE),
    Key("training.muon_momentum", 0.95, DIVERGES, "Momentum of muon.", BELOW_ONE),
    Key("training.weight_decay", 0.1, DIVERGES, "Weight decay, of matrices only.", NOT_NEGATIVE),
    Key("training.grad_clip", 1.0, DIVERGES, "Largest global norm of the gradient. 0: no clipping.", NOT_NEGATIVE),
    Key("training.skip_spikes", 0.0, DIVERGES,
        "Skip updates whose loss is this many standard deviations above its mean over the last 100 steps; 6 is usual. 0: "
        "never. Updates with non-finite gradients are always skipped.", NOT_NEGATIVE),
    Key("training.max_bad_steps", 20, FREE, "Consecutive skipped updates after which the run gives up.", POSITIVE),

    # ---- training: loss and arithmetic ------------------------------------------------------------------------------------
    Key("training.z_loss", 0.0, DIVERGES, "Weight of the squared log-sum-exp of the logits; 1e-4 is usual.", NOT_NEGATIVE),
    Key("training.document_mask", False, DIVERGES,
        "Restrict attention to a token's own document, with positions from its start. Always so in rows of packed dialogues."),
    Key("training.remat", "none", DIVERGES,
        "What the backward pass recomputes to save memory: nothing, everything in a block (full), or all but matrix "
        "products (dots).", one_of("none", "full", "dots")),
    Key("training.dtype", "auto", DIVERGES,
        "Dtype of the computation; parameters are float32. auto: bfloat16 on an accelerator that has it, float32 "
        "elsewhere.", one_of("auto", "float32", "bfloat16", "float16")),
    Key("training.grad_allreduce_dtype", "float32", DIVERGES,
        "Dtype in which gradients are summed over devices.", one_of("float32", "bfloat16")),
    Key("training.deterministic", False, DIVERGES, "Identical bits in every run on a GPU, too; the CPU's always are."),
    Key("training.use_ema", False, FIXED, "Keep an exponential moving average of the parameters."),
    Key("training.ema_decay", 0.9999, DIVERGES, "Decay of the EMA.", FRACTION),
    Key("training.ema_warmup", True, DIVERGES,
        "Cap the decay at (1 + step) / (10 + step), so that the first steps are forgotten."),

    # ---- training: what happens every so often ----------------------------------------------------------------------------
    Key("training.eval_interval", 500, FREE, "Between two evaluations on the validation rows.", INTERVAL, object),
    Key("training.eval_iters", 100, FREE, "Batches per evaluation, at most.", POSITIVE),
    Key("training.eval_tasks", None, FREE,
        "Benchmark questions that are asked now and then, as `evaluate --tasks` takes them: data/ceval, or several, "
        "ceval=data/ceval,cmmlu=data/cmmlu. Metrics tasks/NAME/acc and so on (of the EMA, if on).", value_type=str),
    Key("training.eval_tasks_interval", None, FREE,
        "Between two of these evaluations. None: eval_interval.", INTERVAL, object),
    Key("training.eval_tasks_shots", 0, FREE, "Solved examples before each question, from the tasks' dev part.", NOT_NEGATIVE),
    Key("training.eval_tasks_score", "letters", FREE,
        "Of an exam, compare the letters of the choices or their texts.", one_of("letters", "texts")),
    Key("training.eval_tasks_limit", None, FREE, "Ask only the first questions of each subject.", POSITIVE, int),
    Key("training.best_metric", None, FREE,
        "What decides the best checkpoint and early stopping: any number of an evaluation, such as tasks/ceval/acc or "
        "val/code/loss; losses, bits per byte, perplexities and KL divergences shall be low, others high. None: val/ema_loss "
        "or val/loss.", value_type=str),
    Key("training.early_stopping", False, FREE,
        "Stop after `patience` evaluations without a better best_metric (a lower loss, of the EMA, if on)."),
    Key("training.patience", 5, FREE, "See early_stopping.", POSITIVE),
    Key("training.save_interval", 1000, FREE, "Between two checkpoints.", INTERVAL, object),
    Key("training.save_minutes", None, FREE, "Also save when the last checkpoint is this old.", POSITIVE, float),
    Key("training.keep_latest", 3, FREE, "Newest checkpoints that are kept.", POSITIVE),
    Key("training.keep_every", None, FREE, "Also keep checkpoints whose step is a multiple of this.", POSITIVE, int),
    Key("training.keep_best", True, FREE, "Keep the best checkpoint, by best_metric, in RUN/best."),
    Key("training.log_interval", 10, FREE, "Between two lines of metrics.", INTERVAL, object),
    Key("training.samples_interval", None, FREE,
        "Between two samples of the model's writing, in the log and TensorBoard. None: no samples.", INTERVAL, object),
    Key("training.sample_prompts", ("中国", "今天"), FREE, "Prompts that the samples continue.", TEXTS),
    Key("training.sample_chat", False, FREE, "The prompts are questions, which the samples answer through the chat template."),
    Key("training.profile_step", None, FREE, "Trace 5 steps from this one on, for TensorBoard's profiler.", POSITIVE, int),

    # ---- training: where it starts ----------------------------------------------------------------------------------------
    Key("training.resume", "auto", FREE,
        "auto: continue the run in out_dir if there is one; never: refuse to.", one_of("auto", "never")),
    Key("training.resume_from", None, FREE,
        "RUN, RUN/best or RUN/checkpoints/STEP to continue from in a new out_dir.", value_type=str),
    Key("training.init_from", None, FREE,
        "Run, RUN/best, RUN/checkpoints/STEP, Hugging Face folder, .pth or .gguf file to take the initial weights from; its "
        "vocabulary may be smaller.",
        value_type=str),

    # ---- wandb ------------------------------------------------------------------------------------------------------------
    Key("wandb.enable", False, FREE, "Log to Weights & Biases; needs `pip install wandb`."),
    Key("wandb.project", "MateConv-Pretrain", FREE, "Project."),
    Key("wandb.run_name", None, FREE, "Name of the run. None: the name of out_dir.", value_type=str),
]  # fmt: skip
