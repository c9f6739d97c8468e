"""The modules that take the place of a quantized embedding, and of an output head that shares its table."""

import torch
from torch import Tensor, nn

from quantizer.errors import CheckpointError
from quantizer.modules.matmul import matmul, prepare
from quantizer.modules.tensor_cache import TensorCache
from quantizer.packed.layout import tensor_specs
from quantizer.packed.weight import QuantizedWeight, dequantize_rows, dequantize_tensors
from quantizer.plans.fidelity import Fidelity

EMBED_SCALE_ATTRIBUTE = "scalar_embed_scale"
"""Where an embedding that multiplies its rows by a number has it."""


class QuantizedEmbedding(nn.Module):
    """An embedding whose table stays packed; each call expands the rows that it needs.

    Buffers carry the names of `QuantizedWeight.tensors`.
    """

    like: Tensor

    def __init__(self, fidelity: Fidelity, embedding: nn.Embedding) -> None:
        """Make room for the packed twin of an embedding, to be filled by `of` or from a state dict.

        Raises:
            CheckpointError: the fidelity has outliers or an adapter.
        """
        super().__init__()
        if fidelity.outlier_share or fidelity.adapter_rank:
            raise CheckpointError(
                f"an embedding at {fidelity.name}: tables have neither outliers nor adapters"
            )
        self.fidelity, self.num_embeddings, self.embedding_dim = (
            fidelity,
            embedding.num_embeddings,
            embedding.embedding_dim,
        )
        self._cache = TensorCache()
        self._multiplier = getattr(embedding, EMBED_SCALE_ATTRIBUTE, None)
        self.register_buffer(
            "like", torch.empty(0, dtype=embedding.weight.dtype), persistent=False
        )  # has the rows' dtype
        for name, spec in tensor_specs(fidelity, self.num_embeddings, self.embedding_dim).items():
            self.register_buffer(name, torch.zeros(spec.shape, dtype=spec.dtype))

    @classmethod
    def of(cls, embedding: nn.Embedding, weight: QuantizedWeight) -> "QuantizedEmbedding":
        """Return the packed twin of an embedding."""
        module = cls(weight.fidelity, embedding)
        for name, tensor in weight.tensors.items():
            module.register_buffer(name, tensor.contiguous())
        return module.to(embedding.weight.device)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the whole table [rows, hidden] in `dtype`."""
        return dequantize_tensors(
            self._tensors(), self.fidelity, self.num_embeddings, self.embedding_dim, dtype
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the rows of tokens, [..., hidden]."""
        rows = dequantize_rows(
            self._tensors(), self.fidelity, self.embedding_dim, input_ids.flatten()
        ).to(self.like.dtype)
        found = rows.view(*input_ids.shape, -1)
        if self._multiplier is None:
            return found
        return found * torch.tensor(self._multiplier, dtype=found.dtype, device=found.device)

    def prepare(self) -> None:
        """Get ready to multiply, once the tensors are loaded."""
        prepare(self._tensors(), self.fidelity, self.embedding_dim, self._cache)

    def multiply(self, hidden_states: Tensor) -> Tensor:
        """Return hidden_states @ table', [..., hidden] to [..., rows]."""
        return matmul(
            hidden_states, self._tensors(), self.fidelity, self.num_embeddings, cache=self._cache
        )

    def extra_repr(self) -> str:
        """Describe the table in a printed model."""
        return f"{self.num_embeddings}, {self.embedding_dim}, fidelity={self.fidelity.name}"

    def _tensors(self) -> dict[str, Tensor]:
        return {
            name: buffer for name, buffer in self.named_buffers(recurse=False) if name != "like"
        }


class TiedHead(nn.Module):
    """An output head that multiplies by the table of a quantized embedding, and stores nothing itself."""

    def __init__(self, embedding: QuantizedEmbedding) -> None:
        """Refer to the embedding without owning it."""
        super().__init__()
        self._shared = (embedding,)  # a module in a tuple is not a submodule

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return hidden_states @ table'; [..., hidden] to [..., rows]."""
        return self._shared[0].multiply(hidden_states)
