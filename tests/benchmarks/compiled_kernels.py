"""Compile the Triton kernels for GPUs that need not be here, and say what they take.

    python -m tests.benchmarks.compiled_kernels [TARGET[/KERNEL[/FORMAT]] ...]
    python -m tests.benchmarks.compiled_kernels --store

One row a line for each target, format and kernel; the second command stores them, in place of those
before.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.benchmarks.record import circumstances

RESULTS = Path(__file__).parent / "results" / "compiled_kernels.jsonl"
TARGETS = {
    **{f"sm_{capability}": ("cuda", capability, 32) for capability in (80, 89, 90, 120)},
    "gfx942": ("hip", "gfx942", 64),
}
KERNELS = {
    "one row": ("fused_kernel", {"MODE": 0, "ROWS": 16}),
    "16 rows": ("fused_kernel", {"MODE": 1, "ROWS": 16}),
    "64 rows": ("fused_kernel", {"MODE": 1, "ROWS": 64}),
    "expand": ("dequantize_kernel", {}),
    "pack": ("pack_kernel", {"UNITS": 4, "OUTPUTS": 64}),
}
FORMATS = {"int2+3g64s6": (3, 2, 6), "int4+8g64": (8, 4, 16)}


def compiled(kernel: str, target: str, constants: dict[str, int]) -> Any:
    """Return a kernel, compiled with 16-bit inputs and aligned pointers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from quantizer.kernels import triton_kernels

    function = getattr(triton_kernels, kernel)
    scales = "*fp16" if constants["SCALE_BITS"] == 16 else "*i32"
    types = {
        "x": "*fp16",
        "out": "*fp32",
        "tile": "*fp16",
        "columns": "*u16",
        "row_scales": "*fp16",
    }
    types |= dict.fromkeys(("high_scales", "low_scales"), scales)
    types |= dict.fromkeys(
        ("high_codes", "high_zeros", "low_codes", "low_zeros", "words"), "*i32"
    ) | {"values": "*fp32"}
    if kernel == "pack_kernel":
        types["columns"] = "i32"  # how many
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in function.arg_names
    }
    aligned = {
        (at,): [["tt.divisibility", 16]]
        for at, kind in enumerate(signature.values())
        if kind.startswith("*")
    }
    source = ASTSource(function, signature, constexprs=constants, attrs=aligned)
    return triton.compile(
        source, target=GPUTarget(*TARGETS[target]), options={"num_warps": 4, "num_stages": 1}
    )


def resources(kernel: Any) -> dict[str, int]:
    """Return registers and spilled bytes of a thread, and shared memory of a program."""
    import triton

    shared = kernel.metadata.shared
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        registers, spilled = (
            int(re.findall(rf"\.vgpr_{what}: +(\d+)", text)[0]) for what in ("count", "spill_count")
        )
        stack = 4 * spilled
    else:
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(kernel.asm["cubin"])
            listed = subprocess.run(
                [tool, "--dump-resource-usage", cubin], check=True, capture_output=True, text=True
            )
        registers, stack = (
            int(re.findall(rf"{what}:(\d+)", listed.stdout)[0]) for what in ("REG", "STACK")
        )
    return {"registers": registers, "shared_bytes": shared, "stack_bytes": stack}


def rows(target: str, *only: str) -> Iterator[dict[str, Any]]:
    """Yield what each kernel takes on a target, for each format.

    Of one kernel or format if named.
    """
    for name, (high, low, scale_bits) in FORMATS.items():
        for kernel, (function, constants) in KERNELS.items():
            if not {*only} <= {name, kernel}:
                continue
            fixed = {
                "HIGH_BITS": high,
                "LOW_BITS": low,
                "GROUP_UNITS": 2,
                "SCALE_BITS": scale_bits,
                "BITS": high,
            }
            fixed |= {"UNITS": 16, "OUTPUTS": 32, "SPLIT": 1} | constants
            yield {"target": target, "kernel": kernel, "format": name} | resources(
                compiled(function, target, fixed)
            )


def main() -> None:
    """Say what kernels take, or store it."""
    if sys.argv[1:] != ["--store"]:
        for target in sys.argv[1:] or TARGETS:
            for row in rows(*target.split("/")):
                print(json.dumps(row), flush=True)
        return
    from triton import __version__

    said = {"triton": __version__, "circumstances": circumstances()}
    RESULTS.write_text(
        "".join(json.dumps(row | said) + "\n" for target in TARGETS for row in rows(target))
    )


if __name__ == "__main__":
    main()
