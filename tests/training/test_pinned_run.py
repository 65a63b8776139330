"""Twenty steps whose losses are written down here, so that no change of numbers is an accident."""

import copy

import numpy as np

from tests.training.runs import losses_of, train

TRAIN = [
    6.00115, 6.002317, 5.840549, 5.566887, 5.34354, 5.126297, 4.904081, 4.703871, 4.522657, 4.390071, 4.206378, 4.060899, 3.947332,
    3.882899, 3.787391, 3.746403, 3.679747, 3.654832, 3.654999, 3.644737,
]  # fmt: skip
VALIDATION = {
    (10, "val/loss"): 4.128341, (10, "val/ema_loss"): 4.289173, (20, "val/loss"): 3.533625, (20, "val/ema_loss"): 3.57085,
}  # fmt: skip
# Relative. 8 devices and all of XLA's optimisations, in place of 1 and none, moved them by at most 4e-7.
TOLERANCE = 1e-4
MESSAGE = """
The losses of the pinned run have changed. If you did not mean to change what training computes, this is a bug: find it. If you
did, say in docs/LOG.md which numbers changed and why, and put the new ones here; nobody who continues an older run will then get
what they would have got. Never raise the tolerance. Now they are:
"""


def tokens(n):
    """A stream that can be learned in part: each token follows from the one before and a digit that only looks random."""
    stream = [5]
    for i in range(n - 1):
        stream.append(3 + (7 * stream[-1] + (i * i // 3) % 5) % 390)
    return np.array(stream, np.uint16)


def test_the_losses_of_a_pinned_run(base_tiny_config, tmp_path):
    """Accumulation, dropout, the z-loss, warm-up and decay, clipping, weight decay and EMA are all on."""
    stream = tokens(22_000)
    stream[:20_000].tofile(tmp_path / "train.bin")
    stream[20_000:].tofile(tmp_path / "validation.bin")
    config = copy.deepcopy(base_tiny_config)
    config.data.tokenizer_path = f"{config.data.train_data_path}/tokenizer"  # only its size and control tokens matter
    config.data.train_data_path, config.data.val_data_path = str(tmp_path / "train.bin"), str(tmp_path / "validation.bin")
    config.model.update(dict(n_layers=1, dropout=0.1, attention="xla"))
    config.training.update(
        dict(max_steps=20, accumulation_steps=2, z_loss=1e-3, use_ema=True, ema_decay=0.9, eval_interval=10, save_interval=99)
    )
    assert train(config, tmp_path / "out") == 0
    losses = losses_of(tmp_path / "out")
    ours = [losses[step, "train/loss"] for step in range(1, 21)]
    validation = {key: value for key, value in losses.items() if key[1].startswith("val/")}
    now = f"{MESSAGE}TRAIN = {[round(loss, 6) for loss in ours]}\nVALIDATION = { {k: round(v, 6) for k, v in validation.items()} }"
    assert validation.keys() == VALIDATION.keys(), now
    np.testing.assert_allclose(ours, TRAIN, rtol=TOLERANCE, err_msg=now)
    np.testing.assert_allclose(list(validation.values()), list(VALIDATION.values()), rtol=TOLERANCE, err_msg=now)
