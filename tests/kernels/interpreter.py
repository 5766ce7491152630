"""Skip marks for tests of Triton programs on CPUs, which need Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def _missing() -> str | None:
    """Return why a trivial program does not run. Triton releases differ in the NumPy versions they support."""
    if triton is None:
        return "needs the package triton"

    @triton.jit
    def count(out, n):
        total = n * 0
        for k in tl.range(0, n // 2):
            total += k
        tl.store(out, total)

    out = torch.zeros(1, dtype=torch.int32)
    try:
        count[(1,)](out, 8)
    except Exception as error:
        return f"Triton {triton.__version__}'s interpreter does not run here: {str(error).splitlines()[0][:100]}"
    assert out.item() == 6
    return None


_reason = _missing()
needs_interpreter = pytest.mark.skipif(_reason is not None, reason=_reason or "")
# For tests that take the interpreter seconds and mostly repeat quicker ones.
BACKENDS_TRITON_SLOW = pytest.mark.parametrize(
    "backend", ["cpu", pytest.param("triton", marks=[needs_interpreter, pytest.mark.slow])]
)
BACKENDS = pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=needs_interpreter)])
