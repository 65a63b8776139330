"""Every configuration key, its default and its check.

A file in configs/ starts from `default_config()` and changes what it wants; the command line changes the rest:

    python -m mateconv_jax.train --config=configs/base.py --config.training.batch_size=64
"""

import difflib
import re
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_dict import FieldReference, placeholder

from mateconv_jax import intervals
from mateconv_jax.errors import UserError


def default_config() -> ConfigDict:
    """The reference configuration: MateConv's 26,878,464-parameter model. Locked, so that an unknown key is an error."""
    config = ConfigDict()

    config.model = ConfigDict()
    config.model.dim = 512
    config.model.n_layers = 8
    config.model.n_heads = 16
    config.model.n_kv_heads = 8  # query heads share key/value heads in groups of n_heads / n_kv_heads
    config.model.head_dim = placeholder(int)  # None: dim / n_heads
    config.model.hidden_dim = placeholder(int)  # None: the next multiple of `multiple_of` from int(8 * dim / 3)
    config.model.multiple_of = 64
    config.model.vocab_size = 6400
    config.model.max_seq_len = 512
    config.model.norm_eps = 1e-5
    config.model.rope_theta = 10_000.0
    config.model.rope_factor = 1.0  # above 1, Llama 3's rope scaling for contexts longer than rope_original_max_seq_len
    config.model.rope_low_freq_factor = 1.0
    config.model.rope_high_freq_factor = 4.0
    config.model.rope_original_max_seq_len = 8192
    config.model.qk_norm = False  # norms of each head's queries and keys, as in Qwen3 and the current MiniMind
    config.model.tie_word_embeddings = True  # the embedding is the output layer too
    config.model.dropout = 0.0  # of embeddings, attention weights and residual branches, in training
    config.model.use_moe = False  # a mixture of experts in the place of each feed-forward layer
    config.model.n_routed_experts = 4
    config.model.num_experts_per_tok = 2
    config.model.n_shared_experts = 1  # 0 or 1, which sees every token; as large as a routed one
    config.model.norm_topk_prob = True  # the weights of a token's experts add up to 1
    config.model.aux_loss_alpha = 0.01  # weight of the loss that keeps the experts' load even
    config.model.experts = "auto"  # auto | dense | ragged: see model/moe.py
    config.model.attention = "auto"  # auto | cudnn | blocked | xla: see model/attention/

    config.data = ConfigDict()
    config.data.train_data_path = placeholder(str)  # a folder written by `python -m mateconv_jax.prepare`, or a flat .bin file
    config.data.val_data_path = placeholder(str)  # None: the validation split of train_data_path
    config.data.tokenizer_path = placeholder(str)  # None: the tokenizer in train_data_path (a .bin file has none)
    config.data.seq_len = 512  # the dataset's rows hold seq_len + 1 tokens
    config.data.shuffle = True  # every epoch another permutation of the rows; False: in order
    config.data.num_workers = 4  # threads that read batches ahead

    config.mesh = ConfigDict()
    config.mesh.data = -1  # devices over which the batch alone is split; -1: all that fsdp leaves
    config.mesh.fsdp = 1  # devices over which parameters, EMA and optimizer state are split too

    config.training = ConfigDict()
    config.training.out_dir = "out"
    config.training.compilation_cache_dir = placeholder(str)  # None: see runtime/compilation_cache.py; "": nothing is kept
    config.training.seed = 1337
    config.training.epochs = 15
    config.training.max_steps = placeholder(int)  # when given, it decides instead of epochs
    config.training.batch_size = 32  # GLOBAL: rows of one micro-batch over all devices (PyTorch's was per GPU)
    config.training.accumulation_steps = 1  # micro-batches of one optimizer step
    config.training.optimizer_type = "adamw"  # adamw | adam | lion | adafactor | muon: see training/optimizer.py
    config.training.learning_rate = 3e-4
    config.training.min_lr = 3e-5  # where the schedule ends
    config.training.lr_scheduler = "cosine"  # cosine | linear | polynomial | constant | wsd
    config.training.warmup_ratio = 0.1  # of all steps, linear from 0
    config.training.warmup_steps = placeholder(int)  # when given, it decides instead of warmup_ratio
    config.training.lr_power = 2.0  # of the polynomial
    config.training.decay_ratio = 0.2  # wsd: share of all steps, at the end, in which the rate falls
    config.training.beta1 = 0.9
    config.training.beta2 = 0.95
    config.training.muon_momentum = 0.95
    config.training.weight_decay = 0.1  # on matrices only
    config.training.grad_clip = 1.0  # global norm; 0 turns clipping off
    config.training.z_loss = 0.0  # weight of the squared log-sum-exp; 1e-4 is usual
    config.training.document_mask = False  # attention within a document only, positions restarting
    config.training.remat = "none"  # none | full | dots: compute again in the backward pass, for memory
    config.training.dtype = "auto"  # auto | float32 | bfloat16 | float16, of the computation; parameters are float32
    config.training.grad_allreduce_dtype = "float32"  # in which gradients are summed over devices: float32 | bfloat16
    config.training.deterministic = False  # on a GPU too, the same bits in every run; the CPU's always are
    config.training.use_ema = False
    config.training.ema_decay = 0.9999
    config.training.ema_warmup = True  # a smaller decay in the first steps: (1 + step) / (10 + step)
    # Optimizer steps, or "5%" of the run, or "0.5epoch".
    config.training.eval_interval = FieldReference(500, field_type=object)
    config.training.save_interval = FieldReference(1000, field_type=object)
    config.training.log_interval = FieldReference(10, field_type=object)
    config.training.samples_interval = placeholder(object)  # None: no samples
    config.training.sample_prompts = ("中国", "今天")  # what they continue
    config.training.eval_iters = 100  # batches an evaluation reads at most
    config.training.early_stopping = False  # end after `patience` evaluations without a lower loss (of the EMA, if on)
    config.training.patience = 5
    config.training.keep_latest = 3  # checkpoints
    config.training.keep_every = placeholder(int)  # and those whose step is a multiple of this
    config.training.keep_best = True  # and, in RUN/best, the one with the lowest validation loss
    # An update is left out where the gradient is not finite, or the loss this many standard deviations above its mean over
    # the last 100 steps (0: never for its loss; 6 is usual).
    config.training.skip_spikes = 0.0
    config.training.max_bad_steps = 20  # of them in a row, before the run gives up
    config.training.profile_step = placeholder(int)  # from here on 5 steps are traced, for TensorBoard's profiler
    config.training.resume = "auto"  # auto: go on with the run in out_dir, if there is one | never: refuse to
    config.training.resume_from = placeholder(str)  # RUN or RUN/checkpoints/STEP to go on from in a new out_dir
    config.training.init_from = placeholder(str)  # a run, Hugging Face folder, .pth or .gguf file to take weights from

    config.wandb = ConfigDict()
    config.wandb.enable = False  # needs: pip install wandb
    config.wandb.project = "MateConv-Pretrain"
    config.wandb.run_name = placeholder(str)  # None: the name of out_dir
    return config.lock()


# What each key must satisfy, in words that finish "expected …". Types are checked by ConfigDict itself.
_POSITIVE = ("a number above 0", lambda value: value > 0)
_NOT_NEGATIVE = ("a number of at least 0", lambda value: value >= 0)
_FRACTION = ("a number from 0 to 1", lambda value: 0 <= value <= 1)
_BELOW_ONE = ("a number from 0 to below 1", lambda value: 0 <= value < 1)


def _one_of(*choices):
    return " or ".join(map(str, choices)), lambda value: value in choices


_CHECKS = {
    **{f"model.{key}": _POSITIVE for key in (
        "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "multiple_of", "vocab_size", "max_seq_len",
        "norm_eps", "rope_theta", "rope_low_freq_factor", "rope_original_max_seq_len")},
    "model.rope_factor": ("a number of at least 1", lambda value: value >= 1),
    "model.dropout": _BELOW_ONE,
    "model.n_routed_experts": _POSITIVE,
    "model.num_experts_per_tok": _POSITIVE,
    "model.n_shared_experts": _one_of(0, 1),
    "model.aux_loss_alpha": _NOT_NEGATIVE,
    "model.experts": _one_of("auto", "dense", "ragged"),
    "model.attention": _one_of("auto", "cudnn", "blocked", "xla"),
    "data.seq_len": _POSITIVE,
    "data.num_workers": _POSITIVE,
    **{f"mesh.{axis}": ("a number of devices, or -1", lambda value: value == -1 or value > 0) for axis in ("data", "fsdp")},
    "training.epochs": _POSITIVE,
    "training.max_steps": _POSITIVE,
    "training.batch_size": _POSITIVE,
    "training.accumulation_steps": _POSITIVE,
    "training.optimizer_type": _one_of("adamw", "adam", "lion", "adafactor", "muon"),
    "training.lr_scheduler": _one_of("cosine", "linear", "polynomial", "constant", "wsd"),
    "training.warmup_steps": _NOT_NEGATIVE,
    "training.lr_power": _POSITIVE,
    "training.decay_ratio": _FRACTION,
    "training.muon_momentum": _BELOW_ONE,
    "training.z_loss": _NOT_NEGATIVE,
    "training.remat": _one_of("none", "full", "dots"),
    "training.learning_rate": _POSITIVE,
    "training.min_lr": _NOT_NEGATIVE,
    "training.warmup_ratio": _BELOW_ONE,
    "training.beta1": _BELOW_ONE,
    "training.beta2": _BELOW_ONE,
    "training.weight_decay": _NOT_NEGATIVE,
    "training.grad_clip": _NOT_NEGATIVE,
    "training.dtype": _one_of("auto", "float32", "bfloat16", "float16"),
    "training.grad_allreduce_dtype": _one_of("float32", "bfloat16"),
    "training.ema_decay": _FRACTION,
    **{f"training.{key}": (intervals.EXPECTED, intervals.is_duration) for key in (
        "eval_interval", "save_interval", "log_interval", "samples_interval")},
    "training.eval_iters": _POSITIVE,
    "training.patience": _POSITIVE,
    "training.keep_latest": _POSITIVE,
    "training.keep_every": _POSITIVE,
    "training.skip_spikes": _NOT_NEGATIVE,
    "training.max_bad_steps": _POSITIVE,
    "training.profile_step": _POSITIVE,
    "training.resume": _one_of("auto", "never"),
    "training.seed": _NOT_NEGATIVE,
}  # fmt: skip


def resolve(config: ConfigDict) -> ConfigDict:
    """Check every value and fill in what depends on others (head_dim, hidden_dim). Returns a new, locked config.

    Raises:
      UserError: a value is out of its range, or two values do not fit each other; the message names the keys.
    """
    config = config.copy_and_resolve_references()
    for path, (expected, holds) in _CHECKS.items():
        section, key = path.split(".")
        value = config[section][key]
        if value is not None and not holds(value):
            raise UserError(f"{path}: {value!r} is not possible (expected {expected})")

    model = config.model
    if model.head_dim is None:
        if model.dim % model.n_heads:
            raise UserError(f"model.dim: {model.dim} is not divisible by model.n_heads ({model.n_heads})")
        model.head_dim = model.dim // model.n_heads
    if model.head_dim % 2:
        raise UserError(f"model.head_dim: {model.head_dim} is odd (rotary embedding turns pairs of features)")
    if model.n_heads % model.n_kv_heads:
        raise UserError(f"model.n_kv_heads: {model.n_kv_heads} does not divide model.n_heads ({model.n_heads})")
    if model.rope_high_freq_factor <= model.rope_low_freq_factor:
        raise UserError(
            f"model.rope_high_freq_factor: {model.rope_high_freq_factor} is not above model.rope_low_freq_factor "
            f"({model.rope_low_freq_factor})"
        )
    if model.num_experts_per_tok > model.n_routed_experts:
        raise UserError(
            f"model.num_experts_per_tok: {model.num_experts_per_tok} is above model.n_routed_experts ({model.n_routed_experts})"
        )
    if model.hidden_dim is None:
        model.hidden_dim = -(-int(8 * model.dim / 3) // model.multiple_of) * model.multiple_of
    if config.data.seq_len > model.max_seq_len:
        raise UserError(f"data.seq_len: {config.data.seq_len} is above model.max_seq_len ({model.max_seq_len})")
    if config.training.resume_from and config.training.init_from:
        raise UserError("training.init_from: not possible together with training.resume_from (expected one of them)")
    if config.training.min_lr > config.training.learning_rate:
        raise UserError(
            f"training.min_lr: {config.training.min_lr} is above training.learning_rate ({config.training.learning_rate})"
        )
    return config


def from_command_line(argv: list[str]) -> ConfigDict:
    """Read `--config=FILE --config.section.key=value …` from argv (program name first). Not resolved yet.

    ml_collections' config_flags does the work; it takes the overrides from `sys.argv`, so argv must be that.

    Raises:
      UserError: no or no such file, an unknown key, a value of another type, anything else on the command line.
    """
    flag_values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "configuration file", lock_config=True, flag_values=flag_values)
    try:
        left_over = flag_values([_shipped(argument) for argument in argv])[1:]
        config = flag_values.config
        getattr(config, "model", None)  # where the file could not be loaded, its errors are raised when it is touched
    except (flags.Error, KeyError, AttributeError, TypeError, ValueError, OSError, ImportError, SyntaxError) as error:
        raise UserError(_explain(error, argv)) from error
    if left_over:
        raise UserError(f"unexpected argument {left_over[0]!r} (expected --config=FILE and --config.section.key=value)")
    if not isinstance(config, ConfigDict):
        raise UserError("--config is missing (for example --config=configs/base.py)")
    missing = set(_paths(default_config())) - set(_paths(config))
    if missing:
        raise UserError(f"--config: {min(missing)} is missing; start from mateconv_jax.config.default_config()")
    return config


def _shipped(argument: str) -> str:
    """`--config=configs/NAME.py` also means the file that was installed with the package, where the current folder has none."""
    file = argument.removeprefix("--config=").partition(":")[0]
    installed = Path(__file__).parent / file
    if file.startswith("configs/") and not Path(file).exists() and installed.is_file():
        return argument.replace(file, str(installed), 1)
    return argument


def from_dict(values: dict, source: str) -> ConfigDict:
    """The config that a run folder's config.json holds; keys newer than the file take their defaults.

    Raises:
      UserError: a key that this version does not know; the message names it and `source`.
    """
    config = default_config()
    try:
        config.update(values)
    except (KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{source}: {' '.join(str(error).split())}") from error
    return config


def _paths(config: ConfigDict) -> list[str]:
    return [f"{section}.{key}" for section, keys in config.items() for key in keys]


def _explain(error: Exception, argv: list[str]) -> str:
    """config_flags' exceptions carry a bare key, several lines or a module name: say which flag and what would be right."""
    known = _paths(default_config())
    for argument in argv[1:]:
        match = re.match(r"--(?:no)?config\.([^=]+)", argument)
        if match and match[1] not in known:
            close = difflib.get_close_matches(match[1], known, n=1)
            return f"--config.{match[1]}: unknown key" + (f" (did you mean {close[0]}?)" if close else "")
    if isinstance(error, flags.IllegalFlagValueError):
        match = re.match(r"flag --config\.([^=]+)=(.*?): (.*)", str(error), re.S)
        if match:
            section, _, key = match[1].partition(".")
            expected = default_config()[section].get_type(key).__name__ if key else "a section has no value of its own"
            return f"--config.{match[1]}: {match[2]!r} does not fit (expected {expected})"
    if isinstance(error, OSError):
        file = next((a.split("=", 1)[1] for a in argv if a.startswith("--config=")), "?")
        return f"--config: cannot read {file!r} (for example configs/base.py)"
    return f"--config: {type(error).__name__}: {' '.join(str(error).split())}"
