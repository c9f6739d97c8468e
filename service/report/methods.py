"""The parts of a report about how a run was made: model, texts, profile, training, versions."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The original model.

    Attributes:
        name: what the user called it.
        sha256: digest of everything that decides what it computes.
        dtype: in which its weights are stored.
    """

    name: str
    sha256: str
    dtype: str


@dataclass(frozen=True, slots=True)
class CalibrationInfo:
    """The calibration text.

    Attributes:
        text: what the user called it.
        sha256: digest of its windows.
    """

    text: str
    sha256: str


@dataclass(frozen=True, slots=True)
class ProfileInfo:
    """How the effects of layers were measured.

    Attributes:
        signal: the measure.
        coupling: which pairs of layers the plan couples: `full`, `block` or `none`.
        coupling_rank: rank of the measured coupling.
        coupling_truncation: share of the products between layers that this rank leaves out.
        context: fidelity of the other layers while one is measured, or `original`.
        context_kl_nats_per_token: KL divergence of this context from the original [nats/token].
        budget_range_bytes: smallest and largest plan whose loss is predicted.
        probe_tokens: tokens that effects were measured on.
        fidelities: the menu.
    """

    signal: str
    coupling: str
    coupling_rank: int
    coupling_truncation: float
    context: str
    context_kl_nats_per_token: float
    budget_range_bytes: tuple[int, int]
    probe_tokens: int
    fidelities: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PhaseInfo:
    """One phase of training, see `quantizer.training.spec.TrainingSpec`.

    Attributes:
        kind: `blocks`, one block after another, or `model`, end to end.
        steps: steps of the optimizer, for each block or in total.
        batch: windows that one step sees.
        trained: `codes`, `scales` or `clipping`.
        code_rate: learning rate of codes.
        scale_rate: learning rate of scales.
        adapter_rate: learning rate of adapters.
        precision: dtype of matrix products.
        seed: of the order of windows.
        salient: which groups' scales are trained.
        penalty: lambda of the penalty on moving weights that matter.
    """

    kind: str
    steps: int
    batch: int
    trained: str
    code_rate: float
    scale_rate: float
    adapter_rate: float
    precision: str
    seed: int
    salient: str
    penalty: float


@dataclass(frozen=True, slots=True)
class TrainingInfo:
    """How the delivered layers were trained.

    Attributes:
        effort: level of effort.
        phases: phases of training; none if they were not trained.
        windows: windows that they were trained on.
    """

    effort: str
    phases: tuple[PhaseInfo, ...]
    windows: int


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where and with what a run was made.

    Attributes:
        created_at: time in UTC, ISO 8601.
        machine: architecture of the processor.
        python: version.
        seed: of everything random.
        bitwright: version of this package.
        torch: version.
        transformers: version.
        cvxpy: version.
        osqp: version.
        numpy: version.
    """

    created_at: str
    machine: str
    python: str
    seed: int
    bitwright: str
    torch: str
    transformers: str
    cvxpy: str
    osqp: str
    numpy: str
