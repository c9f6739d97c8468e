"""A value that is derived from a layer's stored tensors, shared by the products of the layer."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")


class TensorCache:
    """One value derived from tensors; it is derived again after a tensor has changed.

    Copies of the cache are empty.
    """

    def __init__(self) -> None:
        """Hold no value yet."""
        self._key: Any = None
        self._value: Any = None

    def get(self, tensors: Mapping[str, Tensor | None], derive: Callable[[], T]) -> T:
        """Return the value for the tensors as they are now, derived if it is not in the cache.

        Inference tensors do not count their changes, so nothing is cached for them.
        """
        present = [tensor for tensor in tensors.values() if tensor is not None]
        if any(tensor.is_inference() for tensor in present):
            return derive()
        # autograd counts in-place changes in _version
        key = [(tensor.data_ptr(), tensor._version) for tensor in present]  # noqa: SLF001
        if key != self._key:
            self._value = derive()
            self._key = key
        value: T = self._value
        return value

    def __deepcopy__(self, _: object) -> "TensorCache":
        """Return an empty cache."""
        return TensorCache()

    def __reduce__(self) -> tuple[type["TensorCache"], tuple[()]]:
        """Let a copy in another process be empty."""
        return TensorCache, ()
