import copy

import pytest

from mateconv_jax.data.dataset import open_dataset
from tests.training import processes
from tests.training.runs import flags_of


@pytest.fixture(scope="session")
def server():
    processes.start_server()


@pytest.fixture(scope="session")
def straight(server, base_tiny_config, tmp_path_factory):
    """14 steps in one process, over the end of an epoch, with everything on that a resume could miss: (config, run folder)."""
    config = copy.deepcopy(base_tiny_config)
    n_rows = open_dataset(config.data.train_data_path, "", config.data.seq_len).n_rows("train")
    config.model.update(dict(n_layers=1, dropout=0.1, attention="xla"))
    config.training.update(
        dict(
            batch_size=n_rows // 27,
            accumulation_steps=2,
            max_steps=14,
            dtype="float16",
            use_ema=True,
            ema_decay=0.9,
            optimizer_type="muon",
            early_stopping=True,
            patience=9,
            eval_iters=2,
            save_interval=1,
            keep_latest=99,
        )
    )
    folder = tmp_path_factory.mktemp("straight") / "out"
    output = processes.Training(flags_of(config, folder), folder.parent / "log").finish()
    epochs = float(next(line for line in output.splitlines() if " epochs in 14 steps" in line).split("epoch; ")[1].split()[0])
    assert 13 / 14 < 1 / epochs < 1  # an epoch ends within the last step
    return config, folder
