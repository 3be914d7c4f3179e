"""Triton 3.6's interpreter, mended where it would compute something other than a GPU does."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def mend() -> None:
    """Mend what stands in the way of running these kernels, all of it in the interpreter only.

    - A loop's bound that was loaded is converted with `int(array)`. Scalars are arrays of one element there, and from
      NumPy 2.4 on only those of no dimension convert.
    - Rounding to fewer bits loses the carry into the exponent: just under 1 becomes a half.
    - Products of bfloat16 matrices multiply the bits as integers.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    floats = {tl.float8e4nv: torch.float8_e4m3fn, tl.bfloat16: torch.bfloat16, tl.float16: torch.float16}
    floats[tl.float32] = torch.float32
    patch, dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def patch_and_convert(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def convert_float(data: Any, source: Any, target: Any, _: Any) -> Any:
        numbers = torch.from_numpy(np.ascontiguousarray(data).view(f"uint{source.primitive_bitwidth}"))
        result = numbers.view(floats[source.scalar]).to(floats[target.scalar])
        return result.view(getattr(torch, f"uint{target.primitive_bitwidth}")).numpy()

    def dot_of_floats(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (
            interpreter.TensorHandle(convert_float(x.data, x.dtype, tl.float32, None).view(np.float32), tl.float32)
            if x.dtype.scalar == tl.bfloat16
            else x
            for x in (a, b)
        )
        return dot(self, a, b, *rest)

    interpreter._patch_lang_tensor = patch_and_convert
    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = dot_of_floats
