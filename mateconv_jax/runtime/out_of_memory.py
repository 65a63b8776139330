"""One line in place of a traceback where a device or its host runs out of memory: what it needed, what there is, and what
to lower.
"""

import contextlib
import re
from collections.abc import Generator

import jax

from mateconv_jax.errors import UserError, is_out_of_memory
from mateconv_jax.runtime import device_memory


@contextlib.contextmanager
def as_user_error(key: str, advice: str) -> Generator[None]:
    """Within the block, running out of memory, at compilation too, is a UserError.

    Args:
      key: the configuration key or flag that decides most.
      advice: what to do, in words.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(explain(error, key, advice)) from error


def explain(error: BaseException, key: str, advice: str) -> str:
    """One line. key, advice: see as_user_error."""
    # XLA: "Out of memory while trying to allocate 276.17GiB", "… allocating 1000 bytes"; NumPy: "Unable to allocate 2 GiB".
    asked = re.search(r"allocat\w* ([\d.,]+ ?(?:[KMGT]i?B|bytes))", str(error))
    device = jax.local_devices()[0]
    limit, in_use = device_memory.limit(device), device_memory.in_use(device)
    facts = [f"{asked[1]} more requested"] if asked else []
    facts += [f"{limit / 1e9:.1f} GB available to jax"] if limit else []
    facts += [f"{in_use / 1e9:.1f} GB in use"] if in_use else []
    where = "this machine" if isinstance(error, MemoryError) else device.device_kind
    return f"{key}: out of memory on {where}{': ' if facts else ''}{', '.join(facts)} ({advice})"


def check(compiled: jax.stages.Compiled, key: str, advice: str) -> None:
    """Raises UserError where a compiled program cannot fit beside its arguments, before it is run."""
    memory, beside_arguments = compiled.memory_analysis(), device_memory.of_program(compiled)
    device = jax.local_devices()[0]
    limit = device_memory.limit(device)
    if memory is None or beside_arguments is None or limit is None:
        return
    arguments = memory.argument_size_in_bytes
    if (needed := arguments + beside_arguments) > limit:
        raise UserError(
            f"{key}: out of memory on {device.device_kind}: the compiled step needs {needed / 1e9:.1f} GB, "
            f"{arguments / 1e9:.1f} of it for state and batch; {limit / 1e9:.1f} GB available to jax ({advice})"
        )
