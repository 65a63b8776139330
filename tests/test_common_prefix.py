import os

from hypothesis import given, strategies as st

from mateconv_jax.common_prefix import common_prefix


@given(st.text("ab", max_size=9), st.text("ab", max_size=9))
def test_it_is_the_longest_of_texts_and_of_lists(a, b):
    assert common_prefix(a, b) == common_prefix(list(a), list(b)) == len(os.path.commonprefix([a, b]))
