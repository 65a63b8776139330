import sys
from pathlib import Path

import pytest

from mateconv_jax import config as config_lib, train
from mateconv_jax.config_keys import KEYS
from mateconv_jax.errors import UserError

BASE = f"--config={Path(__file__).parents[1] / 'configs/base.py'}"


@pytest.fixture
def load(monkeypatch):
    def load(*arguments):
        monkeypatch.setattr(sys, "argv", ["train", *arguments])
        return config_lib.resolve(config_lib.from_command_line(sys.argv))

    return load


def test_any_key_can_be_overridden_and_what_depends_on_it_follows(load):
    config = load(
        BASE, "--config.model.dim=64", "--config.training.max_steps=7", "--config.training.use_ema", "--config.data.seq_len=128"
    )
    assert (config.model.dim, config.model.head_dim, config.model.hidden_dim) == (64, 4, 192)
    assert (config.training.max_steps, config.training.use_ema, config.data.seq_len) == (7, True, 128)


def test_a_constant_learning_rate_has_no_use_for_min_lr(load):
    load(BASE, "--config.training.lr_scheduler=constant", "--config.training.learning_rate=1e-5")


def test_the_base_config(load):
    config = load(BASE)
    assert (config.model.head_dim, config.model.hidden_dim) == (32, 1408)
    assert config.training.learning_rate == 3e-4 and config.training.epochs == 15


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--config is missing"),
        (["--config=no/such.py"], "--config: cannot read 'no/such.py'"),
        ([BASE, "--config.training.batchsize=1"], r"--config\.training\.batchsize: unknown key \(did you mean training\.batch_size\?\)"),
        ([BASE, "--config.nothing=1"], r"--config\.nothing: unknown key"),
        ([BASE, "--config.training.batch_size=many"], r"--config\.training\.batch_size: 'many' does not fit \(expected int\)"),
        ([BASE, "--config.training.max_steps=1.5"], r"--config\.training\.max_steps: '1\.5' does not fit \(expected int\)"),
        ([BASE, "--config.training.use_ema=maybe"], r"--config\.training\.use_ema: .* \(expected bool\)"),
        ([BASE, "stray"], "unexpected argument 'stray'"),
        ([BASE, "--other=1"], "other"),
        ([BASE, "--config.training.batch_size=0"], r"training\.batch_size: 0 is not possible \(expected a number above 0\)"),
        ([BASE, "--config.training.dtype=int8"], r"training\.dtype: 'int8' is not possible"),
        ([BASE, "--config.model.attention=flash"], r"model\.attention: 'flash' is not possible"),
        ([BASE, "--config.model.n_heads=7"], r"model\.dim: 512 is not divisible by model\.n_heads \(7\)"),
        ([BASE, "--config.model.n_kv_heads=5"], r"model\.n_kv_heads: 5 does not divide"),
        ([BASE, "--config.model.head_dim=5"], r"model\.head_dim: 5 is odd"),
        ([BASE, "--config.model.num_experts_per_tok=5"], r"model\.num_experts_per_tok: 5 is above model\.n_routed_experts \(4\)"),
        ([BASE, "--config.model.n_shared_experts=2"], r"model\.n_shared_experts: 2 is not possible \(expected 0 or 1\)"),
        ([BASE, "--config.model.experts=sparse"], r"model\.experts: 'sparse' is not possible"),
        ([BASE, "--config.data.seq_len=1024"], r"data\.seq_len: 1024 is above model\.max_seq_len \(512\)"),
        ([BASE, "--config.training.min_lr=1.0"], r"training\.min_lr: 1\.0 is above"),
        ([BASE, "--config.training.sample_prompts=(1, 2)"], r"training\.sample_prompts: \(1, 2\) is not possible \(expected texts"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_that_names_the_key(load, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        load(*arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "source, message",
    [
        ("def get_config(:\n", "SyntaxError"),
        ("from mateconv_jax.config import default_config\ndef get_config():\n    c = default_config()\n    c.training.lr = 1\n    return c\n", "lr"),
        ("from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict(dict(model=dict(dim=1)))\n", "is missing"),
    ],
)  # fmt: skip
def test_a_broken_config_file(load, tmp_path, source, message):
    path = tmp_path / "config.py"
    path.write_text(source)
    with pytest.raises(UserError, match=message):
        load(f"--config={path}")


def test_a_run_folders_config_may_be_older_but_not_newer():
    assert config_lib.from_dict({"training": {"seed": 5}}, "config.json").training.seed == 5
    with pytest.raises(UserError, match=r"config\.json: .*n_experts"):
        config_lib.from_dict({"model": {"n_experts": 5}}, "config.json")


def test_help_prints_meaning_default_and_allowed_values_of_every_key(capsys):
    assert train.main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(line.isascii() and len(line) <= 100 or len(line) <= 90 for line in text.splitlines())  # 中 is two columns wide
    words = " ".join(text.split())
    for key in KEYS:
        name = key.path.split(".")[1]
        assert f" {name} = {key.default} {key.meaning} [{key.allowed}]" in words
    assert (
        "dropout = 0.0 Dropout of embeddings, attention weights and residual branches in training. [a number from 0 to" in words
    )
    assert "\n* dim = 512" in text and "\n  dropout = 0.0" in text


def test_a_default_passes_its_own_check():
    config_lib.resolve(config_lib.default_config())
    for key in KEYS:
        assert key.default is not None or key.value_type is not None, key.path
        assert key.meaning.endswith((".", ".)")), key.path


def test_the_keys_change_only_with_thought():
    """A key is a promise to users' command lines and run folders: removing or renaming one breaks them. When you add one, add
    it here, its entry in config_keys.py, and a test that it changes something.
    """
    keys = {section: sorted(values) for section, values in config_lib.default_config().to_dict().items()}
    assert keys == {
        "model": [
            "attention", "aux_loss_alpha", "dim", "dropout", "experts", "head_dim", "hidden_dim", "max_seq_len", "multiple_of", "n_heads",
            "n_kv_heads", "n_layers", "n_routed_experts", "n_shared_experts", "norm_eps", "norm_topk_prob", "num_experts_per_tok",
            "qk_norm", "qkv_bias", "rope_attention_factor", "rope_beta_fast", "rope_beta_slow", "rope_factor",
            "rope_high_freq_factor", "rope_low_freq_factor", "rope_original_max_seq_len", "rope_scaling", "rope_theta", "rope_truncate",
            "tie_word_embeddings", "use_moe", "vocab_size",
        ],
        "data": ["num_workers", "seq_len", "shuffle", "tokenizer_path", "train_data_path", "val_data_path"],
        "mesh": ["data", "fsdp"],
        "loss": ["beta", "epsilon", "epsilon_high", "gamma", "kind", "label_smoothing", "scale_rewards", "sft_coef"],
        "rollout": ["iterations", "max_new_tokens", "min_p", "samples", "temperature", "top_k", "top_p"],
        "reward": ["functions", "num_threads", "weights"],
        "wandb": ["enable", "project", "run_name"],
        "training": [
            "accumulation_steps", "adam_eps", "batch_size", "best_metric", "beta1", "beta2", "compilation_cache_dir", "decay_ratio", "deterministic",
            "document_mask", "dtype",
            "early_stopping", "ema_decay", "ema_warmup", "epochs", "eval_interval", "eval_iters", "eval_tasks", "eval_tasks_interval",
                "eval_tasks_limit", "eval_tasks_score", "eval_tasks_shots", "grad_allreduce_dtype", "grad_clip",
            "hang_timeout", "init_from", "keep_best", "keep_every", "keep_latest", "learning_rate", "log_interval", "lr_power",
            "lr_scheduler", "matrix_lr_ratio", "max_bad_steps", "max_hours", "max_steps", "min_lr", "muon_momentum", "optimizer_type",
            "out_dir", "patience", "profile_step", "remat", "resume", "resume_from", "sample_chat", "sample_prompts", "samples_interval",
            "save_interval", "save_minutes", "seed", "skip_spikes", "use_ema",
            "warmup_ratio", "warmup_steps", "weight_decay", "z_loss",
        ],
    }  # fmt: skip


def test_a_run_of_a_version_without_losses_learned_the_next_token():
    assert config_lib.from_dict({"training": {"batch_size": 8}}, "config.json").loss.kind == "next_token"
