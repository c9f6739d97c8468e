"""Errors of the quantizer, split by what the caller can do about them."""

from quantizer.known_error import ExitCode, KnownError


class QuantizerError(KnownError):
    """Base of every error that the quantizer raises on purpose."""

    problem_type = "quantizer-error"


class ModelError(QuantizerError):
    """The model is unknown, unsafe to load, damaged, or of an unsupported architecture."""

    problem_type = "model-error"


class TextError(QuantizerError):
    """The text is missing, empty, unreadable, or too short for the windows that are asked for."""

    problem_type = "text-error"


class FidelityError(QuantizerError):
    """The fidelity does not exist, or does not fit the layer."""

    problem_type = "fidelity-error"


class RoundingError(QuantizerError):
    """The rounding method does not exist, or lacks an input that it needs."""

    problem_type = "rounding-error"


class TrainingError(QuantizerError):
    """Steps, learning rates, or the set of trained parameters are out of range."""

    problem_type = "training-error"


class KernelError(QuantizerError):
    """There is no such kernel for products with packed weights."""

    problem_type = "kernel-error"


class MemoryShort(QuantizerError):
    """The device has too little memory for the model, or for even one window at a time."""

    exit_code = ExitCode.IMPOSSIBLE
    problem_type = "memory-short"


class PlanError(QuantizerError):
    """The plan cannot be read, or belongs to another model."""

    problem_type = "plan-error"


class CheckpointError(QuantizerError):
    """The quantized checkpoint is incomplete, or contradicts its own configuration."""

    problem_type = "checkpoint-error"


class PartMissing(QuantizerError):
    """A finished part of the work, which a later step reads, is missing or damaged."""

    exit_code = ExitCode.IMPOSSIBLE
    http_status = 500
    problem_type = "part-missing"
