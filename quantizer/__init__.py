"""Quantize language models layer by layer, and store, load and evaluate the result.

Importing this package is cheap. It lets `AutoModelForCausalLM.from_pretrained` load checkpoints of
Bitwright, whichever of the two packages is imported first. README.md explains formats and methods.
"""

import wrapt


def _register(_: object) -> None:
    import quantizer.conversion.transformers_format  # noqa: F401, PLC0415  after transformers


wrapt.register_post_import_hook(_register, "transformers.quantizers.auto")
