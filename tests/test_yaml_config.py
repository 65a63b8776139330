import json
import sys
from pathlib import Path

import pytest

from mateconv_jax import config as config_lib, run_folder, train
from mateconv_jax.errors import UserError, exit_code

CONFIGS = Path(__file__).parents[1] / "configs"

MATECONV = """
data:  # 数据
  tokenizer_path: "/path/to/tokenizer"
  train_data_path: "./dataset/pretrain_data.bin"
  val_data_path: null
  num_workers: 8

training:
  epochs: 3
  batch_size: 64
  learning_rate: 3e-4
  min_lr: 3.0e-5
  optimizer_type: "lion"
  beta1: 0.9
  beta2: 0.98
  weight_decay: 0
  lr_scheduler: "linear"
  warmup_ratio: .05
  grad_clip: 1
  accumulation_steps: 4
  dtype: "float16"
  use_ema: true
  ema_decay: 0.999
  eval_interval: 250
  eval_iters: 1e2
  save_interval: 5%
  log_interval: 20
  early_stopping: yes
  patience: 7
  out_dir: out-yaml
  seed: 7
  max_steps: 1.0e5
"""


@pytest.fixture
def load(monkeypatch, tmp_path):
    """The config of a YAML file with this text (bytes as they are; None: no file), and of what else stands on the command line."""
    monkeypatch.chdir(tmp_path)

    def load(text, *arguments):
        if text is not None:
            Path("config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        monkeypatch.setattr(sys, "argv", ["train", f"--config={CONFIGS / 'yaml.py'}:config.yaml", *arguments])
        return config_lib.from_command_line(sys.argv)

    return load


def test_mateconvs_own_file_says_here_what_it_said_there(load):
    config = config_lib.resolve(load(MATECONV))
    data, training = config.data, config.training
    assert data.tokenizer_path == "/path/to/tokenizer" and data.train_data_path == "./dataset/pretrain_data.bin"
    assert (data.val_data_path, data.num_workers, data.seq_len) == (None, 8, 512)
    assert (training.learning_rate, training.min_lr, training.weight_decay, training.warmup_ratio) == (3e-4, 3e-5, 0.0, 0.05)
    assert (training.optimizer_type, training.lr_scheduler, training.dtype) == ("lion", "linear", "float16")
    assert (training.beta1, training.beta2, training.grad_clip, training.ema_decay) == (0.9, 0.98, 1.0, 0.999)
    assert (training.epochs, training.batch_size, training.accumulation_steps) == (3, 64, 4)
    assert (training.max_steps, training.eval_iters, training.seed) == (100_000, 100, 7)
    assert (training.eval_interval, training.save_interval, training.log_interval) == (250, "5%", 20)
    assert (training.use_ema, training.early_stopping, training.patience) == (True, True, 7)
    assert training.out_dir == "out-yaml"
    for keys in config.values():
        for key, value in keys.items():
            assert value is None or isinstance(value, keys.get_type(key)), key


def test_its_wandb_section(load):
    wandb = load('wandb:\n  enable: true\n  project: "MateConv-Pretrain"\n  run_name: null\n').wandb
    assert (wandb.enable, wandb.project, wandb.run_name) == (True, "MateConv-Pretrain", None)


def test_what_the_file_does_not_say_keeps_its_default(load):
    default = config_lib.default_config()
    default.model.dim = 64
    assert load("model:\n  dim: 64\ntraining:\n").to_dict() == default.to_dict()


def test_every_key_of_ours_can_stand_in_the_file(load):
    ours = config_lib.default_config().to_dict()
    assert load(json.dumps(ours)).to_dict() == ours  # JSON is YAML


def test_the_command_line_has_the_last_word(load):
    config = load("training:\n  batch_size: 8\n  epochs: 2\n", "--config.training.batch_size=64", "--config.model.dim=64")
    assert (config.training.batch_size, config.training.epochs, config.model.dim) == (64, 2, 64)
    with pytest.raises(UserError, match="training.batchsize: unknown key"):
        load("training:\n  batch_size: 8\n", "--config.training.batchsize=64")


def test_a_batch_size_is_said_to_be_global(load, capsys):
    load("training:\n  batch_size: 8\n")
    note = capsys.readouterr().err
    assert note.count("\n") == 1 and "config.yaml: training.batch_size is the global batch here, 8 rows" in note
    load("training:\nmodel:\n  dim: 64\n")
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    "text, message",
    [
        (None, r"--config: cannot read 'config\.yaml' \(No such file"),
        ("", r"config\.yaml: is empty \(expected sections: .*training"),
        ("- data\n- training\n", r"config\.yaml: is a list \(expected sections"),
        ("batch_size = 3\n", r"config\.yaml: is a str"),
        ("data:\n  seq_len: [1\n  x: 2\n", r"config\.yaml:3: not YAML"),
        ("data:\n\tseq_len: 1\n", r"config\.yaml:2: not YAML"),
        ("training:\n  epochs: 3\n  batch_size: 8\n  epochs: 4\n", r"config\.yaml:4: not YAML \(duplicate key 'epochs'"),
        ("data:  # 数据\n".encode("gbk"), r"config\.yaml: not text in UTF-8 \(.*position 9\)"),
        ("data:\n  val_data_path: 2024-13-45\n", r"config\.yaml: not YAML \(month must be in 1\.\.12"),
        ("a: 1\n---\nb: 2\n", r"config\.yaml:2: not YAML \(but found another document"),
        ("trainig:\n  epochs: 3\n", r"config\.yaml: trainig: unknown section \(there are: .*training"),
        ("3:\n  epochs: 3\n", r"config\.yaml: 3: unknown section"),
        ("training: 3\n", r"config\.yaml: training: 3 is not a section"),
        ("training:\n- epochs\n", r"config\.yaml: training: \['epochs'\] is not a section"),
        ("training:\n  batchsize: 3\n", r"config\.yaml: training\.batchsize: unknown key \(did you mean training\.batch_size\?\)"),
        ("data:\n  max_length: 3\n", r"config\.yaml: data\.max_length: unknown key \(did you mean data\.seq_len\?\)"),
        ("data:\n  max_seq_len: 3\n", r"config\.yaml: data\.max_seq_len: unknown key \(did you mean data\.seq_len\?\)"),
        ("model:\n  flash_attn: true\n", r"config\.yaml: model\.flash_attn: unknown key"),
        ("training:\n  on: 3\n", r"config\.yaml: training\.True: unknown key"),
        ("training:\n  batch_size: many\n", r"config\.yaml: training\.batch_size: 'many' does not fit \(expected a whole number, such as 32\)"),
        ("training:\n  batch_size: 1.5\n", r"training\.batch_size: 1\.5 does not fit"),
        ("training:\n  batch_size: true\n", r"training\.batch_size: True does not fit"),
        ("training:\n  batch_size: null\n", r"training\.batch_size: None does not fit"),
        ("training:\n  learning_rate: fast\n", r"training\.learning_rate: 'fast' does not fit \(expected a number, such as 0\.0003\)"),
        ("training:\n  learning_rate: 1e-3x\n", r"training\.learning_rate: '1e-3x' does not fit"),
        ("training:\n  learning_rate: false\n", r"training\.learning_rate: False does not fit"),
        ("training:\n  use_ema: 1\n", r"training\.use_ema: 1 does not fit \(expected true or false, such as False\)"),
        ("training:\n  use_ema: 'true'\n", r"training\.use_ema: 'true' does not fit"),
        ("training:\n  out_dir: 2024\n", r"training\.out_dir: 2024 does not fit \(expected text, such as 'out'\)"),
        ("training:\n  max_steps: {a: 1}\n", r"training\.max_steps: {'a': 1} does not fit \(expected a whole number\)"),
        ("training:\n  eval_interval: null\n", r"training\.eval_interval: None does not fit"),
        ("training:\n  eval_interval: true\n", r"training\.eval_interval: True does not fit"),
        ("training:\n  batch_size: 0\n", r"training\.batch_size: 0 is not possible"),
        ("training:\n  eval_interval: soon\n", r"training\.eval_interval: 'soon' is not possible"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_that_names_the_file_and_the_key(load, text, message):
    with pytest.raises(UserError, match=message) as error:
        config_lib.resolve(load(text))
    assert "\n" not in str(error.value)


def test_a_user_sees_one_line_and_exit_code_2(load, capsys):
    with pytest.raises(UserError):
        load("training:\n  batchsize: 3\n")
    assert exit_code(train.main, sys.argv) == 2
    assert capsys.readouterr().err.startswith("error: config.yaml: training.batchsize: unknown key")
    sys.argv[1] = sys.argv[1].removesuffix(":config.yaml")
    assert exit_code(train.main, sys.argv) == 2
    assert "which YAML file?" in capsys.readouterr().err


# The README's commands train the configs of the demo, base.py and sft.py; the documentation's those of preferences, which need a
# model to start from.
FAST = ("yaml.py", "grpo.py")
PREFERENCES = ("dpo.py", "demo_dpo.py")


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[pytest.mark.slow] * (path.name not in FAST), id=path.name)
        for path in sorted(CONFIGS.glob("*.py"))
        if path.name not in PREFERENCES
    ],
)
def test_every_config_trains(path, dataset_folder, tmp_path, monkeypatch):
    """Two steps, with a tiny model on a tiny dataset."""
    config = str(path)
    if path.name == "yaml.py":
        config += f":{tmp_path / 'config.yaml'}"
        (tmp_path / "config.yaml").write_text(
            f"data:\n  train_data_path: {dataset_folder}\n  seq_len: 32\ntraining:\n  learning_rate: 1e-3\n", encoding="utf-8"
        )
    tiny = {
        "model.dim": 32, "model.n_layers": 2, "model.n_heads": 4, "model.n_kv_heads": 2, "model.head_dim": 8,
        "model.hidden_dim": 64, "model.vocab_size": 400, "model.max_seq_len": 64, "data.train_data_path": dataset_folder,
        "data.seq_len": 32, "training.out_dir": tmp_path / "out", "training.batch_size": 8, "training.max_steps": 2,
        "training.log_interval": 1, "training.eval_iters": 1, "training.init_from": "",
    }  # fmt: skip
    if path.name in ("grpo.py", "demo_rl.py"):
        (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "一", "answer": 3}) + "\n", encoding="utf-8")
        tiny |= {"data.train_data_path": tmp_path / "prompts.jsonl", "data.tokenizer_path": dataset_folder / "tokenizer"}
        tiny |= {"rollout.max_new_tokens": 8, "loss.beta": 0.0, "reward.functions": ("mateconv_jax.rewards:number_match",)}
        tiny |= {"data.val_data_path": tmp_path / "prompts.jsonl", "training.max_steps": 2, "training.warmup_steps": 0}
    argv = ["train", f"--config={config}", *(f"--config.{key}={value}" for key, value in tiny.items())]
    monkeypatch.setattr(sys, "argv", argv)
    assert exit_code(train.main, argv) == 0
    assert run_folder.latest_step(tmp_path / "out") == 2
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 2
    if path.name not in ("grpo.py", "demo_rl.py"):
        assert all(5 < loss < 7 for loss in losses)  # ln(400) = 5.99
