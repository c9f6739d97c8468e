"""The packed modules that take the place of a quantized embedding and of a head tied to it."""

import torch
from torch import Tensor, nn

from quantizer.errors import CheckpointError
from quantizer.modules.matmul import matmul, prepare
from quantizer.modules.tensor_cache import TensorCache
from quantizer.packed.dequantize import dequantize_rows, dequantize_tensors
from quantizer.packed.layout import tensor_specs
from quantizer.packed.weight import QuantizedWeight
from quantizer.plans.fidelity import Fidelity

EMBED_SCALE_ATTRIBUTE = "scalar_embed_scale"
"""Attribute of an embedding that multiplies its rows by a number, as Gemma's does."""


class QuantizedEmbedding(nn.Module):
    """An embedding whose table stays packed; each call dequantizes the rows that it needs.

    Buffers have the names of `QuantizedWeight.tensors`. One more, `like`, is empty and not saved:
    it carries the dtype of the rows, and follows casts of the model.
    """

    like: Tensor

    def __init__(self, fidelity: Fidelity, embedding: nn.Embedding) -> None:
        """Allocate a packed embedding like `embedding`, to be filled from a state dict.

        Raises:
            CheckpointError: the fidelity has outliers or an adapter.
        """
        super().__init__()
        if fidelity.outlier_share or fidelity.adapter_rank:
            raise CheckpointError(
                f"an embedding at {fidelity.name}: embeddings have neither outliers nor adapters"
            )
        self.fidelity = fidelity
        self.num_embeddings = embedding.num_embeddings
        self.embedding_dim = embedding.embedding_dim
        self._cache = TensorCache()
        self._multiplier = getattr(embedding, EMBED_SCALE_ATTRIBUTE, None)
        self.register_buffer("like", torch.empty(0, dtype=embedding.weight.dtype), persistent=False)
        for name, spec in tensor_specs(fidelity, self.num_embeddings, self.embedding_dim).items():
            self.register_buffer(name, torch.zeros(spec.shape, dtype=spec.dtype))

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, weight: QuantizedWeight
    ) -> "QuantizedEmbedding":
        """Return a packed embedding with the given weight, on the device of `embedding`."""
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
        states = rows.view(*input_ids.shape, -1)
        if self._multiplier is None:
            return states
        return states * torch.tensor(self._multiplier, dtype=states.dtype, device=states.device)

    def prepare(self) -> None:
        """Prepare products, once the tensors are loaded."""
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
    """An output head that multiplies by the table of a quantized embedding and stores nothing."""

    def __init__(self, embedding: QuantizedEmbedding) -> None:
        """Refer to the embedding without owning it."""
        super().__init__()
        self._shared = (embedding,)  # a module in a tuple is not a submodule

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return hidden_states @ table'; [..., hidden] to [..., rows]."""
        return self._shared[0].multiply(hidden_states)
