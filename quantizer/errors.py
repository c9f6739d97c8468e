"""What can go wrong in the quantizer, split by what the caller can do about it.

QuantizerError
├── ModelError        the model cannot be used as it is: unknown, unsafe, broken, or unsupported
├── TextError         the calibration or evaluation text cannot be used
├── FidelityError     a fidelity that does not exist, or does not fit a layer
├── RoundingError     a way to round that does not exist, or lacks what it needs
├── TrainingError     training that cannot be done as specified
├── KernelError       a way to multiply that does not exist
├── MemoryShort       a device has too little memory for a model, or for one window
├── PlanError         a plan that does not belong to this model, or cannot be read
└── CheckpointError   a quantized checkpoint that is damaged
"""


class QuantizerError(Exception):
    """Base of every error that the quantizer raises on purpose.

    The message says what, which value, what next.
    """


class ModelError(QuantizerError):
    """The model is unknown, unsafe to load, damaged, or of a kind that is not supported."""


class TextError(QuantizerError):
    """The text is missing, empty, unreadable, or too short for the windows asked for."""


class FidelityError(QuantizerError):
    """The fidelity is not one that can be stored."""


class RoundingError(QuantizerError):
    """There is no such way to round, or what it needs was not given."""


class TrainingError(QuantizerError):
    """Steps, rates, or what is to be trained are out of range."""


class KernelError(QuantizerError):
    """There is no such way to compute products with packed weights."""


class MemoryShort(QuantizerError):
    """The device has too little memory for the model, or for even one window at a time."""


class PlanError(QuantizerError):
    """The plan cannot be read, or does not fit the model."""


class CheckpointError(QuantizerError):
    """The quantized checkpoint is incomplete or contradicts its own configuration."""
