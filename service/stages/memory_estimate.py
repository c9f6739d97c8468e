"""How much memory a run would take, from shapes alone."""

from allocator.signals import SKETCH_WIDTH, find_signal
from quantizer.plans.plan import by_block
from service.request.request import RunRequest
from service.stages.machine import Machine
from service.stages.prepared_run import PreparedRun
from service.stages.profile import PROBE_BATCH
from service.stages.recipe import MODEL
from service.stages.training_phases import TRAINING_BYTES, phases_for

EXPECTED_RIVALS = 2
"""Uniform plans that are quantized and scored beside the solver's plan in most runs."""

_FLOAT_BYTES = 4
_ACTIVATION_COPIES = 2.5
"""What a backward pass keeps of a block, as a multiple of the inputs and outputs of its layers."""
_LIBRARY_BYTES = 900_000_000
"""The interpreter with torch and transformers."""
_METRIC_COPIES, _SCORE_COPIES = 9, 7
"""Arrays of the size of all logits that exist at once.

The first while the output metric is made, the second while models are scored.
"""


def peak_memory_bytes(request: RunRequest, prepared: PreparedRun, machine: Machine) -> int:
    """Return the most memory that a run takes at once.

    It is reached while effects are measured, while layers are trained, or while all candidates are
    scored beside the original.
    """
    model = (prepared.sizes.layer_weights + prepared.sizes.other_weights) * machine.dtype.itemsize
    working = max(
        _measuring_bytes(request, prepared, machine),
        _training_bytes(request, prepared, machine),
        _scoring_bytes(request, prepared, machine),
    )
    return int(_LIBRARY_BYTES + model + working)


def _logit_bytes(prepared: PreparedRun) -> int:
    """Return the bytes of the logits of one token."""
    return prepared.sizes.vocabulary * _FLOAT_BYTES


def _features(prepared: PreparedRun) -> int:
    """Return the numbers that enter and leave all layers for one token."""
    return sum(layer.in_features + layer.out_features for layer in prepared.layers)


def _measuring_bytes(request: RunRequest, prepared: PreparedRun, machine: Machine) -> float:
    """Return what the profile takes beside the model."""
    amounts = request.amounts
    blocks = by_block(prepared.layers).values()
    largest_block = max(sum(layer.weights for layer in members) for members in blocks)
    widest = max(layer.in_features for layer in prepared.layers)
    probes = amounts.probe_windows * amounts.probe_tokens
    states = amounts.calibration.windows * amounts.calibration.tokens + probes
    if find_signal(request.method.signal).cost.all_probes_at_once:
        at_once = probes
        activations = 0.0
        states += probes * (len(blocks) + SKETCH_WIDTH)
    else:
        at_once = PROBE_BATCH * amounts.probe_tokens
        activations = _features(prepared) * _ACTIVATION_COPIES * at_once
    originals = prepared.sizes.layer_weights * machine.dtype.itemsize
    working = states * widest + activations + 4 * largest_block + 4 * widest**2
    metric = _METRIC_COPIES * at_once * _logit_bytes(prepared)
    return originals + working * _FLOAT_BYTES + metric


def _training_bytes(request: RunRequest, prepared: PreparedRun, machine: Machine) -> int:
    """Return what the phase of training that needs most takes beside the model."""
    window = request.amounts.calibration.tokens
    tokens = request.amounts.batch * window
    activations = 2 * _features(prepared) * tokens * _FLOAT_BYTES
    metric = _METRIC_COPIES * window * _logit_bytes(prepared)
    largest = 0
    phases = phases_for(
        request.effort, prepared.layers, machine, request.amounts.batch, request.seed
    )
    for phase in phases:
        trained = prepared.sizes.layer_weights if phase.kind == MODEL else 0
        each = TRAINING_BYTES if phase.spec.trained == "codes" else _FLOAT_BYTES
        largest = max(largest, each * trained + activations + metric)
    return largest


def _scoring_bytes(request: RunRequest, prepared: PreparedRun, machine: Machine) -> int:
    """Return what all candidates and their logits take beside the original."""
    packed = prepared.budget_bytes + prepared.sizes.other_weights * machine.dtype.itemsize
    tokens = request.amounts.batch * request.amounts.evaluation.tokens
    return (1 + EXPECTED_RIVALS) * packed + _SCORE_COPIES * tokens * _logit_bytes(prepared)
