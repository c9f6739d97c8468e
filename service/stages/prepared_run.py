"""A run whose model, budget and menu are known."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from allocator.demands.menu import Menu
from quantizer.plans.fidelity import Fidelity
from quantizer.plans.plan import LayerSpec
from quantizer.structure.coverage import Coverage
from service.stages.model_sizes import ModelSizes


@dataclass(frozen=True, slots=True)
class PreparedRun:
    """A request once the model's structure is known.

    Attributes:
        layers: the layers to quantize.
        sizes: bytes of the original model by parts.
        coverage: which weights of the blocks are quantized.
        budget_bytes: the budget of the quantized layers.
        menu: fidelities that fit the budget.
        tables: embedding and head, where they are quantized too.
        shared_bytes: the budget of layers, embedding and head together. `budget_bytes` is what an
            expected size of embedding and head leaves of it, until their fidelities are chosen.
        embedding_fidelities: the chosen fidelities of embedding and head, without those that stay
            as they are.
    """

    layers: tuple[LayerSpec, ...]
    sizes: ModelSizes
    coverage: Coverage
    budget_bytes: int
    menu: Menu
    tables: tuple[LayerSpec, ...] = ()
    shared_bytes: int = 0
    embedding_fidelities: Mapping[LayerSpec, Fidelity] = field(default_factory=dict)

    @property
    def unquantized_bytes(self) -> int:
        """Bytes of the checkpoint beside the layers, with embedding and head in any form."""
        table_bytes = sum(table.weights for table in self.tables) * self.sizes.item_bytes
        quantized_table_bytes = self.shared_bytes - self.budget_bytes
        return self.sizes.unquantized_bytes - table_bytes + quantized_table_bytes
