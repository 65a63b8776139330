import copy
import importlib.metadata
import os
from pathlib import Path

# Tests run on the CPU, and compile each program once for all the processes that they start.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["HF_HUB_OFFLINE"] = "1"
# They compile far more than they compute: without LLVM's optimisations a tiny step takes 1.8 processor seconds instead of 5,
# and with the older code for fused loops, which jaxlib 0.12 has no more, 0.6.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".cache" / "jax-tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")

import hypothesis
import pytest

from mateconv_jax import config as config_lib
from mateconv_jax.prepare import main as prepare, parse_args

hypothesis.settings.register_profile("default", deadline=None, max_examples=60)
hypothesis.settings.load_profile("default")


# pytest-xdist's --dist loadfile hands files out in this order. Those with the longest tests go first: the README's commands,
# one test of 70 s, at the end would keep one of two processes waiting.
LONG_FIRST = ("tests/test_readme.py", "tests/training/", "tests/inference/", "tests/evaluation/", "tests/interop/")


def pytest_collection_modifyitems(items):
    def rank(item):
        return next((i for i, prefix in enumerate(LONG_FIRST) if item.nodeid.startswith(prefix)), len(LONG_FIRST))

    items.sort(key=rank)


@pytest.fixture(scope="session")
def demo_jsonl(tmp_path_factory):
    """400 documents of the demo corpus, half of them dialogues."""
    from mateconv_jax.data import demo

    path = tmp_path_factory.mktemp("corpus") / "demo.jsonl"
    demo.main(demo.parse_args(["--output", str(path), "--kind", "mixed", "--documents", "400"]))
    return path


@pytest.fixture(scope="session")
def dataset_folder(demo_jsonl, tmp_path_factory):
    """The documents as rows of 32 tokens with their own tokenizer of 400; of dialogues everything is learned, as of texts."""
    folder = tmp_path_factory.mktemp("data") / "demo"
    flags = ["--train_tokenizer", "--vocab_size", "400", "--seq_len", "32", "--val_fraction", "0.05", "--num_workers", "1"]
    prepare(parse_args(["--input", str(demo_jsonl), "--output", str(folder), "--learn", "everything", *flags]))
    return folder


@pytest.fixture(scope="session")
def base_tiny_config(dataset_folder):
    """A model of 20,000 parameters on that dataset; copy it before changes. One layer: compiling a step takes 40 % less time."""
    config = config_lib.default_config()
    config.model.update(dict(dim=32, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=400, max_seq_len=64))
    config.data.update(dict(train_data_path=str(dataset_folder), seq_len=32))
    config.training.update(dict(batch_size=8, max_steps=6, learning_rate=1e-2))
    config.training.update(dict(log_interval=1, eval_interval=3, save_interval=3))
    return config


@pytest.fixture
def tiny_config(base_tiny_config, tmp_path):
    """The same with an out_dir, to be changed and resolved."""
    config = copy.deepcopy(base_tiny_config)
    config.training.out_dir = str(tmp_path / "out")
    return config
