"""Quantizes language models layer by layer, and stores, loads and measures the result.

Importing this package is cheap. It also makes `AutoModelForCausalLM.from_pretrained` able to load
what Bitwright writes, whichever of the two packages is imported first.
"""

import wrapt


def _register(_: object) -> None:
    import quantizer.conversion.transformers_format  # noqa: F401, PLC0415  registers itself; needs transformers, which is now there


wrapt.register_post_import_hook(_register, "transformers.quantizers.auto")
