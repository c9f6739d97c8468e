"""What the weight files of a model hold, by their headers. Plain Python."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from quantizer.errors import ModelError
from quantizer.models.files import abbreviated
from quantizer.models.safetensors_header import StoredTensor, read_tensors

_FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
"""Floats of 16 bits and more: names in the format, and names in torch."""
_SMALL_FLOATS = ("F8_", "F6_", "F4")


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """The tensors in the weight files that count, each once, and their sizes.

    Attributes:
        file_bytes: size of the files.
        tensors: what they hold, by name.
    """

    file_bytes: int
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def of(cls, place: str, file_bytes: int, tensors: Iterable[StoredTensor]) -> "StoredWeights":
        """Return the weights of one or more files together.

        Args:
            place: where the files are, for messages.
            file_bytes: their size together.
            tensors: what they hold.

        Raises:
            ModelError: there are no tensors, or one is stored in floats of 8 bits or fewer.
        """
        found = {tensor.name: tensor for tensor in tensors}
        if not found:
            raise ModelError(f"weights in {place!r} hold no tensors")
        for tensor in found.values():
            if tensor.dtype.startswith(_SMALL_FLOATS):
                raise ModelError(
                    f"tensor {abbreviated(tensor.name)} in {place!r} is stored in 8 bits or fewer "
                    f"({tensor.dtype}); give the original in 16 bits or more"
                )
        return cls(file_bytes, found)

    @property
    def dtype(self) -> str:
        """The dtype of most weights as torch calls it; `float32` where none are floats."""
        weights: Counter[str] = Counter()
        for tensor in self.tensors.values():
            if tensor.dtype in _FLOATS:
                weights[_FLOATS[tensor.dtype]] += tensor.weights
        return max(weights, key=weights.__getitem__, default="float32")

    @property
    def header_bytes(self) -> int:
        """Bytes of the files beside the tensors."""
        return self.file_bytes - sum(tensor.size_bytes for tensor in self.tensors.values())


def read_stored(folder: Path, files: Iterable[Path]) -> StoredWeights:
    """Return what the weight files of a folder hold; only their headers are read.

    Raises:
        ModelError: a header contradicts its file, see
            `quantizer.models.safetensors_header.read_tensors`, or see `StoredWeights.of`.
    """
    named = list(files)
    tensors = [tensor for file in named for tensor in read_tensors(file)]
    return StoredWeights.of(str(folder), sum(file.stat().st_size for file in named), tensors)
