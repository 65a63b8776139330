import dataclasses

import pytest

from mateconv_jax import serve
from mateconv_jax.errors import UserError
from mateconv_jax.serving.limits import Limits


def access(*options):
    return serve.access_of(serve.parse_args(["--model_path=x", *options]))


def test_only_this_machine_is_let_in_unless_told_otherwise(tmp_path):
    assert access() == ((), ("localhost", "127.0.0.1", "::1", "127.0.0.1"))
    assert access("--host=::1")[1] is not None and access("--host=localhost")[1] is not None
    with pytest.raises(UserError, match="--host: others can reach 0.0.0.0 .expected --api_key_file FILE, or --allow_anyone"):
        access("--host=0.0.0.0")
    assert access("--host=0.0.0.0", "--allow_anyone") == ((), None)
    keys = tmp_path / "keys"
    keys.write_text("first\nsecond\n")
    assert access("--host=::", f"--api_key_file={keys}") == (("first", "second"), None)
    keys.write_text("\n")
    with pytest.raises(UserError, match="--api_key_file: .* has no keys"):
        access(f"--api_key_file={keys}")
    with pytest.raises(UserError, match="--api_key_file: cannot read"):
        access("--api_key_file=none")
    with pytest.raises(UserError, match="--host: 'example.com' is no IP address"):
        access("--host=example.com")


def test_every_limit_is_an_option_with_its_default():
    args = serve.parse_args(["--model_path=x"])
    shown = {name: (default, kind) for name, default, kind, _ in serve.LIMITS}
    assert shown == {field.name: (field.default, type(field.default)) for field in dataclasses.fields(Limits)}
    assert all(getattr(args, name) is None for name in shown)
