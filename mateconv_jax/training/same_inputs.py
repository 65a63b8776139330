"""Processes of a run were started with the same command, over the same data: what they do follows from both."""

from ml_collections import ConfigDict

from mateconv_jax.config_keys import KEYS
from mateconv_jax.errors import UserError
from mateconv_jax.runtime import agreement

# May differ from machine to machine; that the data are the same is checked by what is in them.
OF_A_MACHINE = {
    "data.num_workers", "data.tokenizer_path", "data.train_data_path", "data.val_data_path", "training.compilation_cache_dir",
    "training.eval_tasks",
}  # fmt: skip


def check_same_config(config: ConfigDict) -> None:
    """Raises UserError, in every process, where a process has another value for a key than the first one."""
    names = [key.path for key in KEYS if key.path not in OF_A_MACHINE and not key.path.startswith("wandb.")]
    configs = agreement.gather("config", {name: repr(_value(config, name)) for name in names})
    for process, theirs in enumerate(configs):
        for name in names:
            if theirs[name] != configs[0][name]:
                raise UserError(
                    f"{name}: {theirs[name]} in process {process}, {configs[0][name]} in process 0 (expected the same command "
                    "in every process)"
                )


def check_same_data(train: str, validation: str | None, tasks: str | None) -> None:
    """Raises UserError, in every process, where a process has other fingerprints than the first one."""
    seen = agreement.gather("data", [train, validation, tasks])
    kinds = {"data.train_data_path": "rows", "data.val_data_path": "rows", "training.eval_tasks": "questions"}
    for process, theirs in enumerate(seen):
        for (key, kind), own, first in zip(kinds.items(), theirs, seen[0], strict=True):
            if own != first:
                raise UserError(f"{key}: process {process} has other {kind} than process 0 (expected the same data everywhere)")


def _value(config: ConfigDict, name: str):
    section, key = name.split(".")
    return config[section][key]
