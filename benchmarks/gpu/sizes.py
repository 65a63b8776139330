"""The measured configurations, and their tiny versions for a dry run."""

import argparse
import dataclasses

from ml_collections import ConfigDict

from mateconv_jax import config as config_lib

TINY = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=320)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and a batch.

    Attributes:
      model: changes to config.model; a dry run keeps all but the sizes in TINY.
      rows, seq_len: of a batch.
      training: changes to config.training.
    """

    name: str
    model: dict
    rows: int
    seq_len: int
    training: dict = dataclasses.field(default_factory=dict)

    def config(self, dry_run: bool, **training) -> ConfigDict:
        """The resolved config; `training`: further changes to config.training."""
        return config_from(self.changes(dry_run, **training))

    def changes(self, dry_run: bool, **training) -> dict:
        """{"section.key": value} of the keys that it sets."""
        default = config_lib.default_config().model.to_dict()
        model, seq_len, rows = default | self.model, self.seq_len, self.rows
        if dry_run:
            heads = model["n_kv_heads"] / model["n_heads"]
            model |= TINY | dict(n_kv_heads=round(TINY["n_heads"] * max(heads, 0.25)))
            seq_len, rows = 64, min(rows, 4)
        model["max_seq_len"] = seq_len
        changed = {f"model.{key}": value for key, value in model.items() if value != default[key]}
        training = dict(batch_size=rows) | self.training | training
        return changed | {"data.seq_len": seq_len} | {f"training.{key}": value for key, value in training.items()}


def config_from(changes: dict) -> ConfigDict:
    """The resolved default config with {"section.key": value} changed."""
    config = config_lib.default_config()
    for key, value in changes.items():
        section, name = key.split(".")
        config[section][name] = value
    return config_lib.resolve(config)


BASE = Case("base, 32 x 512", {}, 32, 512)
# Heads of 64, as MiniMind's and nanochat's models of that size have; 16,384 tokens a step.
MODEL_118M = dict(dim=768, n_layers=16, n_heads=12, n_kv_heads=12)
MODEL_336M = dict(dim=1280, n_layers=18, n_heads=20, n_kv_heads=10)
MODEL_988M = dict(dim=2048, n_layers=22, n_heads=32, n_kv_heads=8)
TRAINING = (
    BASE,
    Case("base, 64 x 512", {}, 64, 512),
    Case("118 M, 16 x 1,024", MODEL_118M, 16, 1024),
    Case("336 M, 16 x 1,024", MODEL_336M, 16, 1024),
    Case("336 M, 8 x 2,048", MODEL_336M, 8, 2048),
    Case("988 M, 4 x 2,048", MODEL_988M, 4, 2048),
)


def parse_args(description: str, *flags: str) -> argparse.Namespace:
    """Parse the flags common to all parts, and `flags`, each of which takes any number of values."""
    parser = argparse.ArgumentParser(description=description)
    for flag in flags:
        parser.add_argument(flag, nargs="+", default=[])
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--data", required=True, metavar="DATASET")
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("--compile_only", action="store_true", help="only fill the compilation caches")
    return parser.parse_args()
