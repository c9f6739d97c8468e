"""A GPU that is only pretended.

Where there is none, it shows where tensors of two devices would meet.

All tensors lie in the processor's memory; which storages were put on the GPU is remembered, and
what torch refuses to do with tensors of both is refused. What happens inside a backward pass is not
looked at.
"""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

GPU, PROCESSOR = torch.device("cuda", 0), torch.device("cpu")
MEMORY_BYTES = 80 * 2**30
_ACROSS = ("copy_", "__set__", "_has_compatible_shallow_copy_type")
"""What takes tensors of two devices: copying, and giving a parameter other data."""


class DevicesMixedError(RuntimeError):
    """An operation got tensors of two devices."""


class PretendedGpu(TorchFunctionMode):
    """While it is entered, `cuda` is a device."""

    def __init__(self) -> None:
        """Begin with an empty GPU."""
        super().__init__()
        self._there: dict[
            int, StorageWeakRef
        ] = {}  # by address, which a weak reference keeps from being taken anew

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Do what torch does, and keep account of devices."""
        with torch._C.DisableTorchFunction():
            return self._special(function)(function, args, dict(kwargs or {}))

    def holds(self, tensor: Tensor) -> bool:
        """Return whether a tensor is on the GPU."""
        return _address(tensor) in self._there

    def _special(self, function: Any) -> Callable[..., Any]:
        name, owner = (
            getattr(function, "__name__", ""),
            getattr(getattr(function, "__self__", None), "__name__", ""),
        )
        if name == "__get__":
            return {"device": self._device, "is_cuda": self._is_cuda, "grad": self._gradient}.get(
                owner, self._usual
            )
        return {
            "to": self._to,
            "cpu": self._cpu,
            "numpy": self._numpy,
            "__getitem__": self._index,
            "__setitem__": self._index,
            "index_put_": self._index,
            **dict.fromkeys(_ACROSS, self._across),
        }.get(name, self._usual)

    def _usual(self, function: Any, args: Any, kwargs: Any) -> Any:
        given = [*_tensors(args), *_tensors(kwargs)]
        if kwargs.get("device") is None:
            there = self._side(function, given)
        else:
            there, kwargs["device"] = (
                torch.device(kwargs["device"]).type == "cuda",
                _real(kwargs["device"]),
            )
        if there and kwargs.get("generator") is not None:
            raise DevicesMixedError(
                f"{function.__name__}: a generator of the processor for numbers on the GPU"
            )
        return self._note(function(*args, **kwargs), given, there=there)

    def _side(self, function: Any, given: list[Tensor]) -> bool:
        """Return whether an operation runs on the GPU.

        Single numbers of the processor may be anywhere.
        """
        whole, single = (
            {self.holds(each) for each in given if bool(each.ndim) == wanted}
            for wanted in (True, False)
        )
        if len(whole) > 1 or (whole == {False} and True in single):
            shapes = ", ".join(
                f"{tuple(each.shape)} on the {'GPU' if self.holds(each) else 'processor'}"
                for each in given
            )
            raise DevicesMixedError(f"{function.__name__}: {shapes}")
        return True in (whole or single)

    def _note(self, result: Any, given: list[Tensor], *, there: bool) -> Any:
        """Note where the results of an operation are that are no views of what it was given."""
        old = {_address(each) for each in given}
        for tensor in _tensors(result):
            if _address(tensor) not in old:
                self._put(tensor, there=there)
        return result

    def _put(self, tensor: Tensor, *, there: bool) -> None:
        if there and tensor.device.type == "cpu":
            self._there.setdefault(_address(tensor), StorageWeakRef(tensor.untyped_storage()))
        else:
            self._there.pop(_address(tensor), None)

    def _device(self, function: Any, args: Any, _: Any) -> Any:
        return GPU if self.holds(args[0]) else function(*args)

    def _is_cuda(self, _: Any, args: Any, __: Any) -> bool:
        return self.holds(args[0])

    def _gradient(self, function: Any, args: Any, _: Any) -> Any:
        found = function(*args)
        if found is not None:
            self._put(found, there=self.holds(args[0]))
        return found

    def _to(self, _: Any, args: Any, kwargs: Any) -> Tensor:
        tensor, where, dtype = args[0], kwargs.get("device"), kwargs.get("dtype")
        for each in args[1:]:
            if isinstance(each, torch.device | str):
                where = each
            elif isinstance(each, Tensor):
                where, dtype = GPU if self.holds(each) else each.device, each.dtype
            elif isinstance(each, torch.dtype):
                dtype = each
        there = self.holds(tensor) if where is None else torch.device(where).type == "cuda"
        moved: Tensor = tensor.to(
            dtype=dtype or tensor.dtype, device=tensor.device if where is None else _real(where)
        )
        if _address(moved) != _address(tensor):
            self._put(moved, there=there)
        elif there != self.holds(tensor):
            moved = moved.clone()
            self._put(moved, there=there)
        return moved

    def _cpu(self, function: Any, args: Any, _: Any) -> Tensor:
        return self._to(function, (args[0], PROCESSOR), {})

    def _numpy(self, function: Any, args: Any, kwargs: Any) -> Any:
        if self.holds(args[0]):
            raise DevicesMixedError(f"numpy: {tuple(args[0].shape)} on the GPU")
        return function(*args, **kwargs)

    def _across(self, function: Any, args: Any, kwargs: Any) -> Any:
        return function(*args, **kwargs)

    def _index(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Indices of the processor may point into a tensor on the GPU, not the other way round."""
        base, places, *values = args
        pointers = [base, *(each for each in _tensors(places) if self.holds(each))]
        there = self._side(function, [*pointers, *_tensors(values)])
        return self._note(function(*args, **kwargs), [base], there=there)


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedGpu]:
    """A GPU for the time of a test."""
    precision, enabled, dtype = torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype
    monkeypatch.setattr(
        torch, "autocast", lambda device, **options: precision(_real(device).type, **options)
    )
    monkeypatch.setattr(
        torch, "is_autocast_enabled", lambda device="cpu": enabled(_real(device).type)
    )
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: dtype(_real(device).type))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (MEMORY_BYTES, MEMORY_BYTES))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=MEMORY_BYTES)
    )
    with PretendedGpu() as gpu:
        yield gpu


def _real(device: Any) -> torch.device:
    wanted = torch.device(device)
    return PROCESSOR if wanted.type == "cuda" else wanted


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
    elif isinstance(values, tuple | list):
        for each in values:
            yield from _tensors(each)
