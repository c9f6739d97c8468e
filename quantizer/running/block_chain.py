"""Whether a model can be run block by block."""

import torch

from quantizer.errors import ModelError
from quantizer.known_error import KnownError
from quantizer.running.runner import BlockRunner

_TOKENS = 8
_TOLERANCE = 2e-2
"""Relative to the largest value; far above the noise of bfloat16, far below another function."""


def check_block_chain(runner: BlockRunner) -> None:
    """Refuse a model whose blocks give each other more than hidden states.

    Such a model cannot be measured and quantized block by block. A few tokens run through the whole
    model, then from a block in between, with the hidden states that entered it; the input of the
    head must be the same.

    Raises:
        ModelError: it is not, or the model does not run, or not through its blocks in order.
    """
    kind = type(runner.model).__name__
    device = next(runner.model.parameters()).device
    input_ids = torch.arange(2, 2 + _TOKENS, device=device)[None]
    last = len(runner.blocks) - 1
    try:
        hidden = runner.initial_states(input_ids)
        _check_streams(kind, input_ids, hidden)
        whole = runner.head_input(input_ids, hidden, 0).float()
        with torch.no_grad():
            runner.logits(input_ids, whole.to(hidden.dtype))
    except KnownError:
        raise
    except Exception as err:
        raise ModelError(
            f"{kind} does not run on token ids alone: {' '.join(str(err).split())[:200]}; it is "
            "not supported"
        ) from err
    _check_rerun(runner, input_ids, hidden, whole)
    done = 0
    for first in sorted({1, last // 2 + 1, last} - {0}):
        if first > last:
            continue
        hidden = runner.run_blocks(input_ids, hidden, done, first)
        done = first
        try:
            part = runner.head_input(input_ids, hidden, first).float()
        except KnownError:
            raise
        except Exception as err:
            raise _shares(kind, first) from err
        if not _close(part, whole):
            raise _shares(kind, first)


def _check_streams(kind: str, input_ids: torch.Tensor, hidden: torch.Tensor) -> None:
    """Refuse hidden states that are not [batch, tokens, ...]."""
    if hidden.shape[:2] != input_ids.shape:
        raise ModelError(
            f"the blocks of {kind} take hidden states of shape {tuple(hidden.shape)} for token ids "
            f"of shape {tuple(input_ids.shape)}, several streams; such models are not supported"
        )


def _check_rerun(
    runner: BlockRunner, input_ids: torch.Tensor, hidden: torch.Tensor, whole: torch.Tensor
) -> None:
    """Refuse a model that keeps a state from one call to the next."""
    if not _close(runner.head_input(input_ids, hidden, 0).float(), whole):
        raise ModelError(
            f"{type(runner.model).__name__} gives another result when it runs again; it is not "
            "supported"
        )


def _close(part: torch.Tensor, whole: torch.Tensor) -> bool:
    return part.shape == whole.shape and torch.allclose(
        part, whole, rtol=0, atol=_TOLERANCE * float(whole.abs().max())
    )


def _shares(kind: str, first: int) -> ModelError:
    return ModelError(
        f"block {first} of {kind} needs more from the blocks before it than their hidden states; "
        "such models cannot be measured block by block and are not supported"
    )
