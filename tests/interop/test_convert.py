"""python -m mateconv_jax.convert: runs, Hugging Face folders and .pth files into each other."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers

from mateconv_jax import GenerationConfig, TextGenerator, config as config_lib, convert, run_folder
from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib
from mateconv_jax.data.tokenizer.chat import encode_chat
from mateconv_jax.errors import UserError, exit_code
from mateconv_jax.evaluation import held_out
from mateconv_jax.interop import formats, hugging_face
from mateconv_jax.model.config import ModelConfig, ModelOptions
from mateconv_jax.model.transformer import abstract_model
from mateconv_jax.training import loop
from tests import mateconv_torch
from tests.training.runs import metrics_of, train

TOKENIZERS = Path(__file__).parents[3] / "shared" / "tokenizers"
GREEDY = GenerationConfig(do_sample=False, max_new_tokens=24)
PROMPTS = ["小明", "今天早上，老王去公园"]


@pytest.fixture(scope="module")
def run(base_tiny_config, tmp_path_factory):
    """A run of 6 steps with EMA weights that lag behind."""
    config = copy.deepcopy(base_tiny_config)
    folder = tmp_path_factory.mktemp("runs") / "out"
    config.training.update(dict(out_dir=str(folder), use_ema=True, ema_decay=0.9, ema_warmup=False, learning_rate=3e-2))
    config.model.update(dict(rope_theta=5e4, norm_eps=1e-6))
    loop.train(config_lib.resolve(config))
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "model"
    assert convert.main(convert.parse_args(["--from", str(run), "--to", str(folder)])) is None
    return folder


def params_of(path, use_ema=None, **options):
    model = formats.open_model(path, "x", **options)
    return model.params(
        abstract_model(ModelConfig.make(config_lib.options(ModelOptions, model.config.model), "float32"))[1], use_ema
    )


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- out ------------------------------------------------------------------------------------------------------------


def test_an_exported_folder_loads_in_transformers_with_equal_logits_and_greedy_text(run, exported):
    assert files_in(exported) == [
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    assert type(theirs).__name__ == "LlamaForCausalLM" and theirs.dtype == torch.float32
    ours = TextGenerator.from_pretrained(run)
    ids = tokenizer.bos_token + "".join(PROMPTS)
    ids = tokenizer(ids, return_tensors="pt").input_ids
    with torch.no_grad():
        expected_SV = theirs(ids).logits[0].numpy()
    np.testing.assert_allclose(ours.logits(ids.numpy())[0], expected_SV, atol=1e-4)
    assert np.abs(expected_SV).max() > 1
    for prompt in PROMPTS:
        ids = tokenizer(tokenizer.bos_token + prompt, return_tensors="pt")
        out = theirs.generate(ids.input_ids, attention_mask=ids.attention_mask, do_sample=False, max_new_tokens=24)
        theirs_text = tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True)
        assert ours.generate(prompt, GREEDY) == theirs_text
    history = [{"role": "user", "content": "你好"}]
    theirs_ids = tokenizer.apply_chat_template(history, add_generation_prompt=True)["input_ids"]
    assert encode_chat(ours.tokenizer, history, True) == theirs_ids
    assert theirs.generation_config.eos_token_id == 2 and theirs.generation_config.top_k == GREEDY.top_k


def test_ema_weights_are_exported_unless_the_raw_ones_are_asked_for(run, exported, tmp_path):
    formats.convert(run, tmp_path / "raw", use_ema=False)
    formats.convert(run, tmp_path / "run", "run")
    assert not formats.open_model(tmp_path / "run", "x").has_ema and formats.open_model(tmp_path / "run", "x").step == 6
    for folder in (exported, tmp_path / "run"):
        assert_equal(params_of(folder), params_of(run, use_ema=True))
    assert_equal(params_of(tmp_path / "raw"), params_of(run, use_ema=False))
    difference = jax.tree.map(lambda a, b: np.abs(a - b).max(), params_of(exported), params_of(tmp_path / "raw"))
    assert max(jax.tree.leaves(difference)) > 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_written_in_the_dtype_that_is_asked_for(run, dtype, tmp_path):
    formats.convert(run, tmp_path / "model", dtype=dtype)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert theirs.dtype == getattr(torch, dtype)
    rounded = jax.tree.map(lambda p: p.astype(dtype).astype(np.float32), params_of(run))
    assert_equal(params_of(tmp_path / "model"), rounded)


def test_the_model_card_says_what_the_run_knows(run, exported, dataset_folder):
    card = (exported / "README.md").read_text()
    bits = [metrics["val/bits_per_byte"] for metrics in metrics_of(run) if "val/bits_per_byte" in metrics]
    statistics = json.loads((dataset_folder / "stats.json").read_text())
    for said in (
        "LlamaForCausalLM", "1 layer of width 32", "4 query and 2 key/value heads of size 8", "base 50000", "400 tokens",
        f"{6 * 8 * 32:,} tokens: 6 steps of 8 rows of 32 tokens", f"{bits[-1]:.4f} bits per byte",
        f"{statistics['documents']:,} documents", "apply_chat_template", "vllm serve model", "sglang.launch_server",
    ):  # fmt: skip
        assert said in card


@pytest.mark.slow
def test_the_model_cards_python_runs(exported):
    code = (exported / "README.md").read_text().split("```python\n")[1].split("```")[0]
    result = subprocess.run([sys.executable, "-c", code], cwd=exported.parent, capture_output=True, text=True)
    assert result.returncode == 0 and len(result.stdout.splitlines()) >= 2, result.stderr


def test_large_weights_are_several_files(run, exported, tmp_path):
    model = formats.open_model(run, "x")
    hugging_face.write_folder(tmp_path, model, params_of(run), max_shard_size=20_000)
    weights = [name for name in files_in(tmp_path) if name.endswith(".safetensors")]
    assert len(weights) > 3 and weights[0] == f"model-00001-of-{len(weights):05}.safetensors"
    assert_equal(params_of(tmp_path), params_of(exported))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    whole = transformers.AutoModelForCausalLM.from_pretrained(exported).state_dict()
    assert all(torch.equal(theirs[name], whole[name]) for name in whole)
    (tmp_path / weights[1]).unlink()
    with pytest.raises(UserError, match=f"cannot read the weights in .*no {weights[1]}"):
        formats.open_model(tmp_path, "x")


# ---- and back -------------------------------------------------------------------------------------------------------


def test_a_run_comes_back_from_hugging_face_bit_for_bit(run, exported, tmp_path):
    formats.convert(exported, tmp_path / "again")
    assert_equal(params_of(tmp_path / "again"), params_of(run, use_ema=True))
    ours, theirs = (run_folder.read_config(folder, "").model.to_dict() for folder in (run, tmp_path / "again"))
    assert ours == theirs
    assert tokenizer_lib.fingerprint(tokenizer_lib.load(tmp_path / "again" / "tokenizer", "")) == tokenizer_lib.fingerprint(
        tokenizer_lib.load(run / "tokenizer", "")
    )
    text = TextGenerator.from_pretrained(run).generate(PROMPTS[0], GREEDY)
    for folder in (exported, tmp_path / "again"):
        assert TextGenerator.from_pretrained(folder).generate(PROMPTS[0], GREEDY) == text


def test_a_run_comes_back_from_pytorch_bit_for_bit(base_tiny_config, run, tmp_path):
    """The .pth file says neither rope_theta nor norm_eps: those are MateConv's."""
    formats.convert(run, tmp_path / "model.pth")
    formats.convert(tmp_path / "model.pth", tmp_path / "again", "run", tokenizer=run / "tokenizer", n_heads=4)
    assert_equal(params_of(tmp_path / "again"), params_of(run, use_ema=True))
    model = run_folder.read_config(tmp_path / "again", "").model
    assert (model.n_heads, model.n_kv_heads, model.rope_theta, model.norm_eps) == (4, 2, 10_000, 1e-5)


def test_what_a_pth_file_does_not_say_is_said(run, tmp_path, capsys):
    convert.main(convert.parse_args(["--from", str(run), "--to", str(tmp_path / "model.pth")]))
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{tmp_path / 'model.pth'}: a .pth file, converted from {run}"
    assert said[1] == "not stored in a .pth file: n_heads 4, rope_theta 50000.0, norm_eps 1e-06, max_seq_len 64"


def test_a_run_comes_back_from_gguf_bit_for_bit(run, tmp_path):
    assert convert.main(convert.parse_args(["--from", str(run), "--to", str(tmp_path / "model.gguf")])) is None
    formats.convert(tmp_path / "model.gguf", tmp_path / "again", "run")
    assert_equal(params_of(tmp_path / "again"), params_of(run, use_ema=True))
    ours, theirs = (run_folder.read_config(folder, "").model.to_dict() for folder in (run, tmp_path / "again"))
    assert ours == theirs
    assert tokenizer_lib.fingerprint(tokenizer_lib.load(tmp_path / "again" / "tokenizer", "")) == tokenizer_lib.fingerprint(
        tokenizer_lib.load(run / "tokenizer", "")
    )


@pytest.mark.slow
def test_every_kind_is_evaluated_and_trained_from(base_tiny_config, run, exported, dataset_folder, tmp_path):
    pth, gguf = tmp_path / "model.pth", tmp_path / "model.gguf"
    for path in (pth, gguf):
        formats.convert(run, path)
    expected = held_out.evaluate_run(run, [str(dataset_folder)], use_ema=True)["scores"]["ema"]
    for path in (exported, gguf):
        result = held_out.evaluate_run(path, [str(dataset_folder)])
        assert result["scores"]["raw"] == expected and result["step"] is None
    config = copy.deepcopy(base_tiny_config)
    config.model.update(dict(rope_theta=5e4, norm_eps=1e-6))
    frozen = dict(max_steps=1, learning_rate=1e-12, min_lr=0.0, eval_interval=1, eval_iters=100)
    for number, source in enumerate((exported, pth, gguf)):
        train(config, tmp_path / str(number), init_from=str(source), **frozen)
        assert metrics_of(tmp_path / str(number))[-1]["val/loss"] == pytest.approx(expected["loss"], abs=1e-5)
    log = (tmp_path / "1" / "train.log").read_text()
    assert "model.rope_theta was 10000.0, now 50000.0" in log and "model.norm_eps was" in log


def test_weights_alone_are_nothing_to_resume(base_tiny_config, exported, tmp_path):
    formats.convert(exported, tmp_path / "run")
    config = copy.deepcopy(base_tiny_config)
    config.model.update(dict(rope_theta=5e4, norm_eps=1e-6))
    for changes in (dict(out_dir=str(tmp_path / "run")), dict(out_dir=str(tmp_path / "x"), resume_from=str(tmp_path / "run"))):
        with pytest.raises(UserError, match="holds only weights.*training.init_from="):
            train(config, **changes)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "changes, message", [(dict(n_layers=3), "model.n_layers: 3"), (dict(qk_norm=True), "model.qk_norm: True")]
)
def test_training_starts_from_no_other_model(base_tiny_config, exported, changes, message, tmp_path):
    config = copy.deepcopy(base_tiny_config)
    config.model.update(changes)
    with pytest.raises(UserError, match=f"{message}, but the weights in .* have"):
        train(config, tmp_path / "x", init_from=str(exported))
    assert not (tmp_path / "x").exists()


# ---- without a tokenizer --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    path = tmp_path_factory.mktemp("bare") / "model.pth"
    torch.save(mateconv_torch.random_model(vocab_size=400).state_dict(), path)
    return path


def test_a_model_without_a_tokenizer_knows_only_token_ids(bare, dataset_folder):
    generator = TextGenerator.from_pretrained(bare)
    logits_BSV = generator.logits([[1, 2, 3]])
    assert logits_BSV.shape == (1, 3, 400)
    for call in (
        lambda: generator.generate("中国"),
        lambda: generator.chat([{"role": "user", "content": "你好"}]),
        lambda: next(generator.stream("中国")),
        lambda: generator.score("中国"),
        lambda: held_out.evaluate_run(bare, [str(dataset_folder)]),
    ):
        with pytest.raises(UserError, match="--tokenizer: "):
            call()
    with_tokenizer = TextGenerator.from_pretrained(bare, dataset_folder / "tokenizer")
    assert with_tokenizer.generate("中国", GREEDY).token_ids


def test_sample_and_evaluate_take_a_tokenizer(bare, dataset_folder, capsys):
    from mateconv_jax import evaluate, sample

    flags = ["--model_path", str(bare), "--tokenizer", str(dataset_folder / "tokenizer")]
    assert exit_code(sample.main, sample.parse_args([*flags, "--prompt", "中国", "--greedy", "--max_new_tokens", "5"])) == 0
    assert capsys.readouterr().out.startswith("中国")
    arguments = [*flags, "--data", str(dataset_folder), "--max_batches", "1", "--json"]
    assert exit_code(evaluate.main, evaluate.parse_args(arguments)) == 0
    assert json.loads(capsys.readouterr().out)["scores"]["raw"]["loss"] > 0


def test_a_tokenizer_without_a_begin_token_will_do(bare, dataset_folder, tmp_path):
    """As Qwen3's: a prompt is read as it is."""
    tokenizer = tokenizer_lib.load(dataset_folder / "tokenizer", "")
    tokenizer.bos_token = None
    tokenizer.save_pretrained(tmp_path)
    generator = TextGenerator.from_pretrained(bare, tmp_path)
    ids = tokenizer_lib.encode(tokenizer, ["小明去公园"])[0]
    written = generator.generate("小明去公园", GREEDY)
    assert written.n_prompt_tokens == len(ids)
    first = generator.logits([ids])[0, -1].argmax()
    assert written.token_ids[0] == first
    cut = GenerationConfig(do_sample=False, max_new_tokens=24, truncate_prompt=True)
    assert generator.generate("小明去公园" * 200, cut).n_prompt_tokens == 512 - 24
    with pytest.raises(UserError, match="prompt: empty"):
        generator.generate("", GREEDY)


@pytest.mark.parametrize("name", ["mateconv", "minimind"])
def test_tokenizers_that_users_have_come_through(name, tmp_path):
    folder = TOKENIZERS / name
    if not folder.exists():
        pytest.skip("no such tokenizer on this machine")
    torch.save(mateconv_torch.random_model(vocab_size=6400, dim=32).state_dict(), tmp_path / "model.pth")
    formats.convert(tmp_path / "model.pth", tmp_path / "hf", "hf", tokenizer=folder)
    theirs, ours = (transformers.AutoTokenizer.from_pretrained(path) for path in (folder, tmp_path / "hf"))
    text = "今天天气很好，<think>我们去公园。1234 Hello"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"] and sorted(ours.all_special_ids) == sorted(
        theirs.all_special_ids
    )
    history = [{"role": "user", "content": "你好"}]
    assert ours.apply_chat_template(history, tokenize=False) == theirs.apply_chat_template(history, tokenize=False)
    generator = TextGenerator.from_pretrained(tmp_path / "hf")
    assert generator.generate("中国", GREEDY) == TextGenerator.from_pretrained(tmp_path / "model.pth", folder).generate(
        "中国", GREEDY
    )


def test_special_tokens_of_ones_own_are_written_as_transformers_4_reads_them(bare, dataset_folder, tmp_path):
    tokenizer = tokenizer_lib.load(dataset_folder / "tokenizer", "")
    tokenizer.add_special_tokens({"extra_special_tokens": [tokenizer.convert_ids_to_tokens(399)]})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer_config.json"  # MateConv's says so, though its tokenizer.json does not
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_prefix_space": True}))
    formats.convert(bare, tmp_path / "hf", "hf", tokenizer=tmp_path / "tokenizer")
    settings = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in settings
    assert settings["add_prefix_space"] is False
    assert settings["additional_special_tokens"] == [tokenizer.convert_ids_to_tokens(399)]
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert again.all_special_ids == tokenizer.all_special_ids


# ---- what is wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--from", "none", "--to", "x"], "--from: no model at 'none' (expected a run folder, a Hugging Face folder, a .pth file or a .gguf file)"),
        (["--from", "EXPORTED", "--to", "RUN"], "exists (expected a new name)"),
        (["--from", "RUN", "--to", "x.pth", "--to_kind", "hf"], "--to: 'x.pth' cannot name a Hugging Face folder"),
        (["--from", "RUN", "--to", "x", "--to_kind", "pth"], "--to: 'x' cannot name a .pth file (expected a name that ends in .pth)"),
        (["--from", "RUN", "--to", "x", "--to_kind", "run", "--dtype", "bfloat16"], "--dtype: bfloat16 is invalid for a run folder"),
        (["--from", "RUN", "--to", "x", "--dtype", "q8_0"], "--dtype: q8_0 is invalid for a Hugging Face folder (expected float32"),
        (["--from", "RUN", "--to", "x", "--to_kind", "gguf"], "--to: 'x' cannot name a .gguf file (expected a name that ends in .gguf)"),
        (["--from", "BARE", "--to", "x.gguf"], "--tokenizer: missing"),
        (["--from", "RUN", "--to", "x", "--n_heads", "3"], "already specifies it (expected only with a .pth file)"),
        (["--from", "RUN", "--to", "x.pth", "--tokenizer", "DIR"], "--tokenizer: a .pth file cannot hold one"),
        (["--from", "BARE", "--to", "x"], "--to_kind: missing (expected run or hf: the folder 'x' could become either)"),
        (["--from", "BARE", "--to", "x", "--to_kind", "hf"], "--tokenizer: missing"),
        (["--from", "BARE", "--to", "x", "--to_kind", "hf", "--ema", "--tokenizer", "DIR"], "has no EMA weights"),
        (["--from", "BARE", "--to", "x", "--to_kind", "run", "--tokenizer", "none"], "--tokenizer: no tokenizer at 'none'"),
        (["--from", "BARE", "--to", "x", "--to_kind", "run", "--n_heads", "0", "--tokenizer", "DIR"], "--n_heads: 0 does not fit"),
        (["--from", "EXPORTED", "--to", "x", "--ema"], "has no EMA weights"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line_and_leaves_nothing(
    flags, message, run, bare, exported, dataset_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    paths = {"RUN": str(run), "BARE": str(bare), "EXPORTED": str(exported), "DIR": str(dataset_folder / "tokenizer")}
    flags = [paths.get(flag, flag) for flag in flags]
    assert exit_code(convert.main, convert.parse_args(flags)) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_with_more_tokens_than_the_model_does_not_fit(dataset_folder, tmp_path):
    torch.save(mateconv_torch.random_model(vocab_size=390).state_dict(), tmp_path / "small.pth")
    with pytest.raises(UserError, match="has 400 tokens, the model 390"):
        TextGenerator.from_pretrained(tmp_path / "small.pth", dataset_folder / "tokenizer")


def test_a_weight_too_large_for_float16_is_said(dataset_folder, tmp_path):
    model = mateconv_torch.random_model(vocab_size=400)
    with torch.no_grad():
        model.tok_embeddings.weight[0, 3] = 1e6
    torch.save(model.state_dict(), tmp_path / "large.pth")
    with pytest.raises(UserError, match="--dtype: some weights overflow float16"):
        formats.convert(tmp_path / "large.pth", tmp_path / "half.pth", dtype="float16")
    with pytest.raises(UserError, match="--dtype: some weights overflow float16"):  # half-written
        formats.convert(tmp_path / "large.pth", tmp_path / "half.gguf", None, "float16", None, dataset_folder / "tokenizer")
    assert files_in(tmp_path) == ["large.pth"]


def test_nothing_is_left_of_a_conversion_that_fails_or_was_killed(run, tmp_path, monkeypatch):
    (tmp_path / "model.partial" / "model").mkdir(parents=True)  # of one that was killed
    (tmp_path / "model.partial" / "model" / "old.safetensors").touch()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(hugging_face.files, "write_text", full)
        with pytest.raises(UserError, match="--to: cannot write .*No space left on device"):
            formats.convert(run, tmp_path / "model")
    assert not list(tmp_path.iterdir())
    formats.convert(run, tmp_path / "model")
    assert files_in(tmp_path) == ["model"] and "old.safetensors" not in files_in(tmp_path / "model")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("config.json", b"{", "config.json is not valid JSON"),
        ("config.json", b'{"architectures": ["GPT2LMHeadModel"]}', "architectures is 'GPT2LMHeadModel'"),
        ("model.safetensors", b"xx", "cannot read the weights in"),
        ("tokenizer.json", b"{}", "cannot read the tokenizer"),
    ],
)
def test_a_broken_folder_is_one_clear_error(exported, name, content, message, tmp_path):
    shutil.copytree(exported, tmp_path / "broken")
    (tmp_path / "broken" / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        formats.open_model(tmp_path / "broken", "--from")


@pytest.mark.slow
def test_converting_does_not_import_tensorflow_nor_clu_nor_pytorch():
    code = (
        "import sys; import mateconv_jax.convert; before = 'jax' in sys.modules; import mateconv_jax.interop.formats;"
        "print(before, [name for name in ('tensorflow', 'clu', 'torch') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "False []", result.stderr


# ---- in the ecosystem -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_lm_eval_scores_an_exported_folder_as_we_do(run, exported, tmp_path):
    """A task of two questions; the log-likelihood of each answer after its question, <s> before it."""
    questions = [
        {"question": "法国的首都是", "choices": ["巴黎。", "北京。"], "answer": 0},
        {"question": "小明今天早上去", "choices": ["公园。", "吃竹子。"], "answer": 0},
    ]
    lines = [json.dumps(question, ensure_ascii=False) + "\n" for question in questions]
    (tmp_path / "questions.jsonl").write_text("".join(lines), encoding="utf-8")
    (tmp_path / "local.yaml").write_text(
        f"task: local\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'questions.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: '{{answer}}'\ntarget_delimiter: ''\nmetric_list: [{metric: acc}]\n"
    )
    command = ["-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={exported},dtype=float32,add_bos_token=True"]
    command += ["--tasks", "local", "--include_path", str(tmp_path), "--device", "cpu", "--log_samples"]
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, *command, "--output_path", str(tmp_path / "out")], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    [path] = (tmp_path / "out").rglob("samples_local_*.jsonl")
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    ours = TextGenerator.from_pretrained(run)
    n_right = 0
    for sample, question in zip(samples, questions, strict=True):
        theirs = [float(response[0]) for response in sample["filtered_resps"]]
        n_read = len(tokenizer_lib.encode(ours.tokenizer, [question["question"]])[0])
        expected = [ours.score(question["question"] + choice)[1][n_read:].sum() for choice in question["choices"]]
        np.testing.assert_allclose(theirs, expected, rtol=1e-4)
        n_right += np.argmax(expected) == 0
    [path] = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(path.read_text())["results"]["local"]["acc,none"] == n_right / 2


@pytest.mark.slow
def test_a_folder_is_read_onto_a_mesh_of_eight_devices(exported, dataset_folder, tmp_path):
    """Split as training splits it; the evaluation's figures are those of one device."""
    code = f"""
import json, jax
from mateconv_jax import config as config_lib
from mateconv_jax.evaluation import held_out
from mateconv_jax.runtime import sharding
from mateconv_jax.interop import formats
from mateconv_jax.model.config import ModelConfig
from mateconv_jax.model.transformer import abstract_model
sharding.MIN_SHARDED_SIZE = 64
config = config_lib.default_config()
config.mesh.fsdp = 8
mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
model = formats.open_model({str(exported)!r}, "x")
_, abstract_params = abstract_model(ModelConfig.make(config_lib.options(ModelOptions, model.config.model), "float32"))
params = model.params(sharding.with_shardings(mesh, abstract_params))
shards = [leaf.addressable_shards for leaf in jax.tree.leaves(params)]
assert all(len(s) == 8 for s in shards)
print(json.dumps([sum(leaf.size for leaf in jax.tree.leaves(params)), sum(s[0].data.size for s in shards)]))
print(json.dumps(held_out.evaluate_run({str(exported)!r}, [{str(dataset_folder)!r}])["scores"]["raw"]))
"""
    environment = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    (size, on_one_device), scores = map(json.loads, result.stdout.splitlines())
    assert on_one_device < size / 6
    expected = held_out.evaluate_run(exported, [str(dataset_folder)])["scores"]["raw"]
    assert scores["loss"] == pytest.approx(expected["loss"], rel=1e-6)
