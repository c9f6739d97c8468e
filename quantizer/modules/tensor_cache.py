"""What a layer's products share from call to call."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")


class TensorCache:
    """One value that is made from stored tensors, and anew when they have changed.

    Copies of it are empty.
    """

    def __init__(self) -> None:
        """Keep nothing yet."""
        self._key: Any = None
        self._value: Any = None

    def get(self, tensors: Mapping[str, Tensor | None], make: Callable[[], T]) -> T:
        """Return what was made from the tensors as they are, or make it.

        Tensors that do not count their changes are not kept.
        """
        found = [tensor for tensor in tensors.values() if tensor is not None]
        if any(tensor.is_inference() for tensor in found):
            return make()
        key = [(tensor.data_ptr(), tensor._version) for tensor in found]  # noqa: SLF001  how autograd counts changes
        if key != self._key:
            self._value, self._key = make(), key
        value: T = self._value
        return value

    def __deepcopy__(self, _: object) -> "TensorCache":
        """Return one that keeps nothing."""
        return TensorCache()

    def __reduce__(self) -> tuple[type["TensorCache"], tuple[()]]:
        """Be stored without what is kept."""
        return TensorCache, ()
