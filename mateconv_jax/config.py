"""Reading and checking a configuration; config_keys.py lists the keys.

A file in configs/ changes what it likes of `default_config()`; the command line has the last word:

    python -m mateconv_jax.train --config=configs/base.py --config.training.batch_size=64
"""

import dataclasses
import difflib
import os
import re
import textwrap
import unicodedata
from pathlib import Path
from typing import TypeVar

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_dict import FieldReference

from mateconv_jax import weighted_paths
from mateconv_jax.config_keys import KEYS, PATHS, REWARD_LOSSES, OnResume
from mateconv_jax.errors import UserError

Options = TypeVar("Options")


def default_config() -> ConfigDict:
    """The reference configuration: MateConv's 26,878,464-parameter model. Locked, so that an unknown key is an error."""
    config = ConfigDict()
    for key in KEYS:
        section, name = key.path.split(".")
        if section not in config:
            config[section] = ConfigDict()
        default = key.default
        if key.value_type is not None:  # a plain None could not be overridden, a plain 500 not by "5%"
            default = FieldReference(default, field_type=key.value_type)
        config[section][name] = default
    return config.lock()


def resolve(config: ConfigDict) -> ConfigDict:
    """Check every value, expand ~ in paths, and fill in what follows from others (head_dim, hidden_dim). Returns a new,
    locked config.

    Raises:
      UserError: a value is out of range, or two contradict each other; the message names the keys.
    """
    if (paths := config.data.train_data_path) is not None:
        with config.ignore_type():  # in place: ConfigDict cannot copy a dict with dots in its keys
            config.data.train_data_path = weighted_paths.as_text(paths, "data.train_data_path")
    config = config.copy_and_resolve_references()
    for key in KEYS:
        section, name = key.path.split(".")
        value = config[section][name]
        if key.path in PATHS and value:
            config[section][name] = os.path.expanduser(value)  # a shell leaves `--key=~/folder` as it is
        if key.check is not None and value is not None and not key.check[1](value):
            raise UserError(f"{key.path}: {value!r} is not possible (expected {key.check[0]})")

    model = config.model
    if model.head_dim is None:
        if model.dim % model.n_heads:
            raise UserError(f"model.dim: {model.dim} is not divisible by model.n_heads ({model.n_heads})")
        model.head_dim = model.dim // model.n_heads
    if model.head_dim % 2:
        raise UserError(f"model.head_dim: {model.head_dim} is odd (rotary embeddings rotate pairs of features)")
    if model.n_heads % model.n_kv_heads:
        raise UserError(f"model.n_kv_heads: {model.n_kv_heads} does not divide model.n_heads ({model.n_heads})")
    if model.rope_high_freq_factor <= model.rope_low_freq_factor:
        raise UserError(
            f"model.rope_high_freq_factor: {model.rope_high_freq_factor} is not above model.rope_low_freq_factor "
            f"({model.rope_low_freq_factor})"
        )
    if model.rope_beta_fast <= model.rope_beta_slow:
        raise UserError(
            f"model.rope_beta_fast: {model.rope_beta_fast} is not above model.rope_beta_slow ({model.rope_beta_slow})"
        )
    if model.rope_scaling == "yarn" and model.rope_theta <= 1:
        raise UserError(f"model.rope_theta: {model.rope_theta} is not possible with rope_scaling yarn (expected more than 1)")
    if model.num_experts_per_tok > model.n_routed_experts:
        raise UserError(
            f"model.num_experts_per_tok: {model.num_experts_per_tok} is above model.n_routed_experts ({model.n_routed_experts})"
        )
    if model.hidden_dim is None:
        model.hidden_dim = -(-int(8 * model.dim / 3) // model.multiple_of) * model.multiple_of
    if config.data.seq_len > model.max_seq_len:
        raise UserError(f"data.seq_len: {config.data.seq_len} is above model.max_seq_len ({model.max_seq_len})")
    _check_loss(config)
    training = config.training
    if training.resume_from and training.init_from:
        raise UserError("training.init_from: cannot be combined with training.resume_from (expected one of them)")
    if training.min_lr > training.learning_rate and training.lr_scheduler != "constant":
        raise UserError(f"training.min_lr: {training.min_lr} is above training.learning_rate ({training.learning_rate})")
    return config


def _check_loss(config: ConfigDict) -> None:
    """Fill in loss.beta. Raises UserError for keys that have no effect on this kind of loss, or miss what it needs."""
    loss, training = config.loss, config.training
    from_rewards = loss.kind in REWARD_LOSSES
    if loss.beta is None:
        loss.beta = 0.0 if from_rewards else 0.1
    if loss.beta == 0 and not from_rewards:
        raise UserError(f"loss.beta: 0 is not possible with loss.kind {loss.kind} (expected a number above 0)")
    if loss.label_smoothing and loss.kind not in ("sigmoid", "simpo"):
        raise UserError(f"loss.label_smoothing: has no effect on loss.kind {loss.kind} (expected sigmoid or simpo)")
    if loss.sft_coef and (loss.kind == "next_token" or from_rewards):
        raise UserError(f"loss.sft_coef: has no effect on loss.kind {loss.kind}, only on preferences (expected 0)")
    if training.document_mask and from_rewards:
        raise UserError(f"training.document_mask: has no effect on loss.kind {loss.kind} (expected False)")
    if training.z_loss and loss.kind != "next_token":
        raise UserError(f"training.z_loss: has no effect on loss.kind {loss.kind} (expected 0)")


def options(cls: type[Options], section: ConfigDict) -> Options:
    """The dataclass `cls` filled with the keys of `section` that have its fields' names: code below training/setup.py takes
    these, so that its signature shows what it depends on.
    """
    return cls(**{field.name: section[field.name] for field in dataclasses.fields(cls)})  # pyrefly: ignore[bad-argument-type]


def describe() -> str:
    """Every key with its default, meaning and allowed values, at most 100 columns wide."""
    lines, last_section = [], None
    for key in KEYS:
        section, name = key.path.split(".")
        if section != last_section:
            lines += ["", section]
            last_section = section
        left = f"{'*' if key.on_resume is OnResume.FIXED else ' '} {name} = {key.default}"
        left += " " * (36 - len(left) - sum(unicodedata.east_asian_width(c) == "W" for c in left))
        right = textwrap.wrap(f"{key.meaning} [{key.allowed}]", 63, break_on_hyphens=False)
        lines += [left + right[0], *(" " * 36 + line for line in right[1:])]
    return "\n".join(lines[1:])


def from_command_line(argv: list[str]) -> ConfigDict:
    """The config of `--config=FILE --config.section.key=value …`, not resolved.

    Args:
      argv: sys.argv, from which ml_collections' config_flags reads the overrides itself.

    Raises:
      UserError: a missing file, an unknown key, a value of the wrong type, or any other argument.
    """
    flag_values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "configuration file", lock_config=True, flag_values=flag_values)
    try:
        left_over = flag_values([_with_installed_file(argument) for argument in argv])[1:]
        config = flag_values.config
        getattr(config, "model", None)  # a file that cannot be loaded raises when its config is first used
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


def _with_installed_file(argument: str) -> str:
    """`--config=configs/NAME.py` falls back to the file that is installed with the package."""
    file = argument.removeprefix("--config=").partition(":")[0]
    installed = Path(__file__).parent / file
    if file.startswith("configs/") and not Path(file).exists() and installed.is_file():
        return argument.replace(file, str(installed), 1)
    return argument


def from_dict(values: dict, source: str) -> ConfigDict:
    """The config stored in a run folder's config.json; keys that are newer than the file get their defaults.

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
    """One line for an exception of config_flags, whose own messages lack the flag or what it expects."""
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
