"""Runs on several datasets."""

import copy
import json
import shutil

import numpy as np
import pytest

from mateconv_jax import config as config_lib
from mateconv_jax.data import loader, mixture
from mateconv_jax.data.dataset import fingerprint, open_dataset
from mateconv_jax.errors import UserError
from mateconv_jax.planning import plan, programs
from mateconv_jax.prepare import main as prepare, parse_args
from mateconv_jax.training import mixing
from mateconv_jax.training.checkpoints import Progress
from mateconv_jax.training.open_data import DataOptions, open_data, open_prompts
from mateconv_jax.training.preemption import RESUMABLE
from tests.training.processes import Training
from tests.training.runs import assert_equal_checkpoints, flags_of, losses_of, metrics_of, saved, steps_in, train


@pytest.fixture(scope="module")
def sets(dataset_folder, tmp_path_factory):
    """Paths by name: texts with a validation split, three flat files, and texts and dialogues that say what is learned of them."""
    folder = tmp_path_factory.mktemp("sets")
    random, paths = np.random.default_rng(0), {"demo": dataset_folder}
    for name, n_rows in (("noise", 30), ("code", 50), ("books", 70)):
        paths[name] = folder / f"{name}.bin"
        random.integers(4, 400, size=32 * n_rows + 1, dtype=np.uint16).tofile(paths[name])
    return {name: str(path) for name, path in paths.items()}


@pytest.fixture(scope="module")
def dialogues(dataset_folder, demo_jsonl, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dialogues") / "talk"
    flags = ["--tokenizer", f"{dataset_folder}/tokenizer", "--seq_len", "32", "--num_workers", "1", "--val_fraction", "0.1"]
    prepare(parse_args(["--input", str(demo_jsonl), "--output", str(folder), *flags]))
    return str(folder)


@pytest.fixture
def config(tiny_config):
    """A learning rate that does not depend on how long the run is; a tokenizer for flat files."""
    tiny_config.data.tokenizer_path = f"{tiny_config.data.train_data_path}/tokenizer"
    tiny_config.training.update(dict(lr_scheduler="constant", warmup_steps=0, eval_interval=100, save_interval=2))
    return tiny_config


@pytest.fixture
def rows_read(monkeypatch):
    """The tokens of every row that a run takes, in order."""
    tokens, original = [], loader.training_batches

    def batches(*args):
        for batch in original(*args):
            tokens.extend(map(tuple, batch["tokens"].tolist()))
            yield batch

    monkeypatch.setattr(loader, "training_batches", batches)
    return tokens


def rows_of(path):
    """{tokens of a row: its number}"""
    rows = open_dataset(path, "", 32).rows("train")
    return {tuple(tokens): number for number, tokens in enumerate(rows.read(np.arange(len(rows)))["tokens"].tolist())}


def log_of(folder):
    return (folder / "train.log").read_text()


# ---- a run ---------------------------------------------------------------------------------------------------------


def test_a_run_on_two_datasets_and_how_it_goes_on(config, sets, tmp_path, rows_read):
    """Straight, resumed, with other weights and a third dataset, and with one of them alone."""
    config.data.train_data_path = f"{sets['demo']}:0.6,{sets['noise']}:0.4"
    train(config, tmp_path / "straight", max_steps=6, eval_interval=6)
    straight = list(rows_read)
    demo, noise = rows_of(sets["demo"]), rows_of(sets["noise"])
    of_noise = [noise[row] for row in straight if row in noise]
    assert len(straight) == 48 and len(of_noise) == sum(row not in demo for row in straight) == 19
    log = log_of(tmp_path / "straight")
    n_demo = open_dataset(sets["demo"], "", 32).n_rows("train")
    assert (
        f"data: {n_demo + 30} rows of 32 tokens in 2 datasets, " in log and f"data: 60 % from demo, {n_demo} rows: 0.03" in log
    )
    assert "data: 40 % from noise, 30 rows: 0.63 epochs in 6 steps\n" in log
    [evaluation] = [m for m in metrics_of(tmp_path / "straight") if "val/loss" in m]
    assert evaluation["val/loss"] == evaluation["val/demo/loss"] and "val/noise/loss" not in evaluation  # a file has no split

    rows_read.clear()
    half = dict(resume_from=str(tmp_path / "straight" / "checkpoints" / "4"))
    train(config, tmp_path / "resumed", max_steps=6, eval_interval=6, **half)
    assert rows_read == straight[32:]
    assert_equal_checkpoints(tmp_path / "straight", tmp_path / "resumed", 6)
    assert "mixture was" not in log_of(tmp_path / "resumed")

    rows_read.clear()
    config.data.train_data_path = [(sets["noise"], 1), (sets["code"], 1)]
    train(config, tmp_path / "changed", max_steps=6, **half)
    was_noise = [noise[row] for row in straight[:32] if row in noise]
    now_noise = [noise[row] for row in rows_read if row in noise]
    assert len(was_noise) == 13 and len(now_noise) == 8 and len({*was_noise, *now_noise}) == 21  # none is read twice
    assert len({rows_of(sets["code"])[row] for row in rows_read if row not in noise}) == 8
    said = "the mixture was demo 60 %, noise 40 %, now noise 50 %, code 50 %; noise goes on after 13 rows, code begins"
    assert f"not an exact continuation: {said}" in log_of(tmp_path / "changed")

    rows_read.clear()
    config.data.train_data_path = sets["noise"]
    train(config, tmp_path / "changed", max_steps=7, batch_size=9)
    alone = [noise[row] for row in rows_read]
    assert len({*was_noise, *now_noise, *alone}) == 30  # an epoch, over three mixtures
    assert saved(tmp_path / "changed", 7)[1]["mixture"]["since"] == 48


def test_one_dataset_is_read_as_ever(config, sets, tmp_path, rows_read):
    """With a weight too; its order is pinned in test_loader.py."""
    rows = open_dataset(sets["demo"], "", 32).rows("train")
    in_order = rows.read(loader.rows_at(np.arange(24), len(rows), config.training.seed, True))["tokens"].tolist()
    config.data.train_data_path = f"{sets['demo']}:2"
    train(config, tmp_path / "out", max_steps=2, eval_interval=2)
    assert rows_read == list(map(tuple, in_order[:16]))
    assert saved(tmp_path / "out", 2)[1]["mixture"] is None
    assert {m for line in metrics_of(tmp_path / "out") for m in line if "val" in m} == {"val/loss", "val/bits_per_byte"}
    # Another one joins: this one goes on where it is.
    config.data.train_data_path = f"{sets['demo']}:0.5,{sets['code']}:0.5"
    train(config, tmp_path / "out", max_steps=4)
    assert [row for row in rows_read[16:] if row in rows_of(sets["demo"])] == list(map(tuple, in_order[16:]))
    assert "was demo 100 %, now demo 50 %, code 50 %; demo goes on after 16 rows" in log_of(tmp_path / "out")


# ---- progress, without a model ----------------------------------------------------------------------------------------


def parts_of(rows_and_counts):
    opened = {name: open_dataset(path, "", 32).rows("train") for name, path, _ in rows_and_counts}
    return mixture.MixedRows(
        [mixture.Part(name, opened[name], n, fingerprint(opened[name], len(opened[name]))) for name, _, n in rows_and_counts]
    )


def test_the_order_of_the_list_and_the_names_may_change(sets):
    progress = Progress(rows=0)
    a, b = ("a", sets["noise"], 70_000), ("b", sets["code"], 30_000)
    order, changes = mixing.order_of(parts_of([a, b]), "", progress)
    assert changes == []
    progress = Progress(**json.loads(json.dumps(vars(progress))))  # as a checkpoint keeps it
    progress.rows = 40
    again, changes = mixing.order_of(parts_of([("c", *b[1:]), a]), "", progress)
    assert changes == [] and progress.mixture["since"] == 0
    first, then = parts_of([a, b]), parts_of([b, a])
    positions = np.arange(200)
    tokens = [rows.read(o.rows_at(positions, 7, True))["tokens"] for rows, o in ((first, order), (then, again))]
    np.testing.assert_array_equal(*tokens)


def test_a_dataset_that_comes_back_goes_on_where_it_was(sets):
    noise, code, books = ((name, sets[name], 50_000) for name in ("noise", "code", "books"))
    progress, read = Progress(rows=0), {"noise": [], "code": [], "books": []}
    for mixed in ([noise, code], [books, code], [noise, code]):
        rows = parts_of(mixed)
        order, _ = mixing.order_of(rows, "", progress)
        for number in order.rows_at(progress.rows + np.arange(30), 7, True).tolist():
            part = next(part for part in order.parts if part.start <= number < part.start + part.n_rows)
            read[part.name].append(number - part.start)
        progress.rows += 30
    assert {name: (len(numbers), len(set(numbers))) for name, numbers in read.items()} == {
        "noise": (30, 30), "code": (45, 45), "books": (15, 15),
    }  # fmt: skip


def test_rows_that_changed_under_a_name_are_named(sets):
    progress = Progress(rows=0)
    mixing.order_of(parts_of([("a", sets["noise"], 50_000), ("b", sets["code"], 50_000)]), "", progress)
    progress.rows = 10
    _, changes = mixing.order_of(parts_of([("a", sets["books"], 50_000), ("b", sets["code"], 50_000)]), "", progress)
    assert changes == [
        "not an exact continuation: the mixture was a 50 %, b 50 %, now b 50 %, a 50 %; b goes on after 5 rows, a begins",
        "a: these are other rows than those that the run has read under that name",
    ]


# ---- what is opened ---------------------------------------------------------------------------------------------------


def opened(config, paths, **changes):
    config = copy.deepcopy(config)
    config.data.update(changes)
    config.data.train_data_path = paths
    return open_data(config_lib.options(DataOptions, config_lib.resolve(config).data), 400, document_mask=False)


def test_each_dataset_has_its_validation_set(config, sets, dialogues):
    rows, val_sets, _ = opened(config, f"{sets['demo']}:1,{sets['noise']}:1,{dialogues}:1")
    assert list(val_sets) == ["demo", "talk"] and [part.name for part in rows.parts] == ["demo", "noise", "talk"]
    assert len(val_sets["talk"]) == open_dataset(dialogues, "", 32).n_rows("validation")
    batch = rows.read(np.array([0, len(rows) - 1]))  # rows of texts alone have the fields of dialogues
    assert set(batch) == {"tokens", "length", "learned", "document_starts"}
    assert batch["learned"][0].all() and not batch["learned"][1].all()
    _, val_sets, _ = opened(config, f"{sets['demo']}:1,{sets['noise']}:1", val_data_path=sets["books"])
    assert list(val_sets) == [""]


@pytest.mark.parametrize(
    "paths, message",
    [
        ("{demo}:1,{noise}:0.000001", "'.*noise.bin' has the weight 1e-06, less than one row in 100,000"),
        ("{noise}:1,{copy}:1", "'.*copy.bin' holds the same rows as 'noise'"),
        ("{demo}:1,no/such:1", "no dataset at 'no/such'"),
        ("{demo}:1,{short}:1", "data.seq_len: 32, but '.*short' has rows of 16 tokens"),
        ("{demo}:1,{other}:1", "'.*other' was tokenised with another tokenizer than the run's"),
        ("{demo}:1,{large}:1", "'.*large.bin' has the token id 500"),
        ("{noise}:1,{code}:1", "data.tokenizer_path: missing"),
    ],
)
def test_what_cannot_be_mixed(config, sets, tmp_path, paths, message):
    paths_of = sets | {name: str(tmp_path / name) for name in ("short", "other", "copy.bin", "large.bin")}
    paths_of |= {"copy": paths_of["copy.bin"], "large": paths_of["large.bin"]}
    shutil.copy(sets["noise"], paths_of["copy"])
    np.full(100, 500, np.uint16).tofile(paths_of["large"])
    for name, key, value in (("short", "seq_len", 16), ("other", "tokenizer_fingerprint", "0" * 16)):
        shutil.copytree(sets["demo"], paths_of[name])
        metadata = json.loads((tmp_path / name / "metadata.json").read_text()) | {key: value}
        (tmp_path / name / "metadata.json").write_text(json.dumps(metadata))
    tokenizer = None if paths.startswith("{noise}:1,{code}") else f"{sets['demo']}/tokenizer"
    with pytest.raises(UserError, match=message):
        opened(config, paths.format(**paths_of), tokenizer_path=tokenizer)


def test_the_training_data_are_not_for_validation(config, sets):
    with pytest.raises(UserError, match="data.val_data_path: '.*noise.bin' is the training data"):
        opened(config, f"{sets['demo']}:1,{sets['noise']}:1", val_data_path=f"a={sets['code']},b={sets['noise']}")


def test_prompts_come_from_one_file(sets):
    options = DataOptions(f"{sets['noise']}:1,{sets['code']}:1", None, f"{sets['demo']}/tokenizer", 32)
    with pytest.raises(UserError, match="data.train_data_path: '.*' has weights, but prompts come from one file"):
        open_prompts(options, 400, 20, 1, None)


def test_a_plan_counts_the_rows_of_all_datasets(config, sets, dialogues):
    config.data.train_data_path = f"{sets['noise']}:0.9,{sets['code']}:0.1"
    config.training.update(dict(max_steps=None, epochs=3))
    assert plan.run_length(config) == (3 * 80 // 8, "3 epochs of 80 rows")
    assert not programs._rows_say_what_is_learned(config)
    config.data.train_data_path = f"{sets['noise']}:0.9,{dialogues}:0.1"
    assert programs._rows_say_what_is_learned(config)


# ---- killed ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_mixture_that_is_stopped_and_goes_on_equals_one_that_never_stopped(server, config, sets, dialogues, tmp_path):
    """Texts, dialogues and a flat file, over the end of the file's first epoch; accumulation, dropout, EMA; two micro-batches."""
    config.data.train_data_path = f"{sets['demo']}:0.5,{dialogues}:0.2,{sets['noise']}:0.3"
    config.model.dropout = 0.1
    config.training.update(
        dict(accumulation_steps=2, max_steps=12, use_ema=True, save_interval=1, eval_interval=4, keep_latest=99)
    )
    Training(flags_of(config, tmp_path / "straight"), tmp_path / "log").finish()
    for stop in (3, 8, None):
        training = Training(flags_of(config, tmp_path / "out"), tmp_path / f"log{stop}", stop_at=stop)
        training.finish(0 if stop is None else RESUMABLE)
    assert steps_in(tmp_path / "out")[-1] == 12
    for step in (4, 9, 12):
        assert_equal_checkpoints(tmp_path / "out", tmp_path / "straight", step)
    assert losses_of(tmp_path / "out") == losses_of(tmp_path / "straight")
    assert "data: 30 % from noise, 30 rows: 1.93 epochs in 12 steps (" in log_of(tmp_path / "out")
    assert {"val/demo/loss", "val/talk/loss"} <= set(metrics_of(tmp_path / "out")[-1])


@pytest.mark.slow
def test_killed_without_warning(server, config, sets, tmp_path):
    config.data.train_data_path = f"{sets['demo']}:0.5,{sets['noise']}:0.5"
    config.training.update(dict(max_steps=40, save_interval=2, eval_interval=100, keep_latest=99))
    Training(flags_of(config, tmp_path / "straight"), tmp_path / "log").finish()
    training = Training(flags_of(config, tmp_path / "out"), tmp_path / "log1")
    training.wait_for("step 10/40")
    training.process.kill()
    training.process.join()
    assert 2 <= steps_in(tmp_path / "out")[-1] < 40
    Training(flags_of(config, tmp_path / "out"), tmp_path / "log2").finish()
    assert_equal_checkpoints(tmp_path / "out", tmp_path / "straight", 40)


@pytest.mark.slow
def test_pairs_mix_with_pairs_and_have_their_reference(config, sets, tmp_path):
    """The reference scores the rows of both; the first loss is ln 2; weights change, and a pair is compared with its own numbers."""
    for name, answer in (("short", "好。"), ("long", "好好好好好。")):
        records = [{"prompt": f"{i}？", "chosen": answer, "rejected": "不" * (1 + i % 4)} for i in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        flags = ["--tokenizer", f"{sets['demo']}/tokenizer", "--seq_len", "32", "--val_fraction", "0.2", "--num_workers", "1"]
        prepare(parse_args(["--input", str(tmp_path / f"{name}.jsonl"), "--output", str(tmp_path / name), *flags]))
    train(config, tmp_path / "start", max_steps=2)
    config.loss.kind, config.training.init_from = "sigmoid", str(tmp_path / "start")
    config.data.train_data_path = f"{tmp_path}/short:0.75,{tmp_path}/long:0.25"
    train(config, tmp_path / "out", max_steps=4, eval_interval=2)
    lines = metrics_of(tmp_path / "out")
    assert lines[0]["train/loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert {"val/short/margin", "val/long/margin"} <= {name for line in lines for name in line}
    config.data.train_data_path = f"{tmp_path}/short:0.25,{tmp_path}/long:0.75"
    train(config, tmp_path / "out", max_steps=6, eval_interval=2)
    log = log_of(tmp_path / "out")
    assert "short 75 %, long 25 %, now short 25 %, long 75 %; short goes on after 24 rows, long goes on after 8 rows" in log
    assert log.count("pairs of train") == 1  # the numbers are of the same rows
    config.data.train_data_path = f"{sets['demo']}:0.25,{tmp_path}/long:0.75"
    with pytest.raises(UserError, match="loss.kind: sigmoid learns from pairs, but '.*demo' holds texts"):
        train(config, tmp_path / "out", max_steps=8)
