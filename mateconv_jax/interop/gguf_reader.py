"""An open GGUF file: its metadata, and its tensors on demand."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from mateconv_jax.errors import UserError


class GGUFFile:
    """An open GGUF file.

    Attributes:
      path: the file.
      tensors: {name: ReaderTensor}, memory-mapped.
    """

    def __init__(self, path: Path, key: str):
        self.path = path
        try:
            self._reader = gguf.GGUFReader(path)
        except Exception as error:  # a damaged file may raise anything
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{key}: cannot read {path} ({reason}; expected a complete GGUF file)") from error
        self.tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        for tensor in self.tensors.values():
            try:
                gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[tensor.tensor_type][1]), np.uint8), tensor.tensor_type)
            except NotImplementedError as error:
                raise UserError(
                    f"{path}: the tensor {tensor.name} is quantised as {tensor.tensor_type.name}, which the gguf package "
                    "cannot read (expected F32, F16, BF16, Q8_0, Q4_0 or Q4_1)"
                ) from error

    def get(self, name: str, default: Any = None) -> Any:
        """A value or list of values from the file's metadata."""
        field = self._reader.get_field(name)
        return default if field is None else field.contents()

    def number(self, name: str, default: int | float | None = None) -> int | float:
        """A required number. A float32 becomes its shortest decimal: 1e-5, not 9.99999975e-06."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{self.path}: {name} is {'missing' if value is None else repr(value)} (expected a number)")
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def check_only(self, supported: dict[str, Any]) -> None:
        """Raises UserError for a metadata value that is there, and is not the only supported one."""
        for name, expected in supported.items():
            if (value := self.get(name, expected)) != expected:
                raise UserError(f"{self.path}: {name} is {value!r} (expected {expected!r}, the only supported value)")

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.tensors:
            raise UserError(f"{self.path}: the tensor {name} is missing")
        return tuple(int(size) for size in reversed(self.tensors[name].shape))  # GGUF lists the last axis first

    def read(self, name: str) -> np.ndarray:
        tensor = self.tensors[name]
        return gguf.dequantize(tensor.data, tensor.tensor_type).reshape(self.shape(name))
