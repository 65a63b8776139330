import numpy as np
from hypothesis import given, strategies as st

from mateconv_jax.data.build import packing


@given(n=st.integers(2, 400), seq_len=st.integers(1, 64))
def test_rows_lose_and_duplicate_no_token(n, seq_len):
    stream = np.arange(1, n + 1, dtype=np.uint16)
    starts = stream % 5 == 1
    batch = packing.pack({"tokens": stream, "document_starts": starts}, seq_len)
    rows, lengths = batch["tokens"], batch["length"]
    assert rows.shape[1] == seq_len + 1 and rows.dtype == np.uint16 and lengths.dtype == np.int32
    np.testing.assert_array_equal(batch["document_starts"], (rows % 5 == 1) & (rows > 0))
    inputs = np.concatenate([row[: length - 1] for row, length in zip(rows, lengths, strict=True)])
    targets = np.concatenate([row[1:length] for row, length in zip(rows, lengths, strict=True)])
    np.testing.assert_array_equal(inputs, stream[:-1])
    np.testing.assert_array_equal(targets, stream[1:])
    assert (lengths >= 2).all() and (lengths[:-1] == seq_len + 1).all()
    assert (rows[-1, lengths[-1] :] == 0).all()
