"""MateConv's own config.yaml: sections data, training, wandb and model, with the keys that `train --help` lists.

python -m mateconv_jax.train --config=configs/yaml.py:config.yaml --config.training.batch_size=64

Keys that the file leaves out keep their defaults. Paths are relative to the current folder.
"""

import difflib
import re
import sys

import yaml

from mateconv_jax.config import default_config
from mateconv_jax.errors import UserError

# In YAML 1.1 3e-4 is text and only 3.0e-4 a number. Users of PyTorch MateConv write both.
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text", object: "a number or text"}


def get_config(file: str = ""):
    """The default configuration with what `file` changes.

    Raises:
      UserError: no such file, not YAML, an unknown key, a value of the wrong type; the message names the file and the key or
        line.
    """
    if not file:
        raise UserError("--config: which YAML file? (expected --config=configs/yaml.py:config.yaml)")
    config = default_config()
    sections = _read(file)
    for section, values in sections.items():
        if section not in list(config):
            raise UserError(f"{file}: {section}: unknown section (there are: {', '.join(config)})")
        if not isinstance(values, dict | None):
            raise UserError(
                f"{file}: {section}: {values!r} is not a section (expected lines such as `batch_size: 32` below it)"
            )
        for key, value in (values or {}).items():
            path = f"{section}.{key}"
            if key not in list(config[section]):
                close = difflib.get_close_matches(path, [f"{name}.{key}" for name in config for key in config[name]], n=1)
                raise UserError(f"{file}: {path}: unknown key" + (f" (did you mean {close[0]}?)" if close else ""))
            config[section][key] = _value(config[section], key, value, f"{file}: {path}")
    if "batch_size" in (sections.get("training") or {}):
        rows = config.training.batch_size
        print(
            f"note: {file}: training.batch_size is the global batch here, {rows} rows over all devices; PyTorch MateConv's was "
            "per GPU (to keep it, multiply it by the number of GPUs)",
            file=sys.stderr,
        )
    return config


class _Loader(yaml.SafeLoader):
    """Refuses duplicate keys, of which PyYAML silently takes the last."""

    def construct_mapping(self, node, deep=False):
        names = set()
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        for key in (key for key, _ in pairs if isinstance(key, yaml.ScalarNode)):
            if key.value in names:
                raise yaml.MarkedYAMLError(problem=f"duplicate key {key.value!r}", problem_mark=key.start_mark)
            names.add(key.value)
        return super().construct_mapping(node, deep)


def _read(file: str) -> dict:
    try:
        with open(file, "rb") as stream:  # as bytes: PyYAML detects the encoding
            sections = yaml.load(stream, _Loader)
    except OSError as error:
        raise UserError(f"--config: cannot read {file!r} ({error.strerror})") from error
    except yaml.reader.ReaderError as error:
        raise UserError(f"{file}: not text in UTF-8 ({' '.join(str(error).split())})") from error
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{file}{line}: not YAML ({error.problem})") from error
    except Exception as error:  # PyYAML raises ValueError and others for malformed scalars, such as the date 2024-13-45
        raise UserError(f"{file}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(sections, dict):
        found = "is empty" if sections is None else f"is a {type(sections).__name__}"
        raise UserError(f"{file}: {found} (expected sections: {', '.join(default_config())})")
    return sections


def _value(section, key: str, value, where: str):
    """`value` converted to the type of `key`."""
    kind, default = section.get_type(key), section[key]
    if value is None and default is None:
        return None
    if kind is tuple and isinstance(value, list):
        return tuple(value)
    is_number = kind is not str and isinstance(value, str) and NUMBER.fullmatch(value)
    number = float(value) if is_number else value
    if isinstance(number, float) and number.is_integer() and kind is not float:
        number = int(number)
    if isinstance(number, int) and not isinstance(number, bool) and kind is float:
        number = float(number)
    # A bool is an int too, and everything is an object, the type of keys that take a number or text.
    if isinstance(number, kind) and isinstance(number, bool) == (kind is bool) and number is not None:
        return number
    example = "" if default is None else f", such as {default!r}"
    raise UserError(f"{where}: {value!r} does not fit (expected {EXPECTED.get(kind, kind.__name__)}{example})")
