"""What is known of a signal is written once, and agrees with the function that measures it."""

import ast
from pathlib import Path

import pytest

from allocator.errors import SignalUnknown
from allocator.profiling.measures import MEASURES
from allocator.signals import (
    DEFAULT_SIGNAL,
    NARROW,
    ORIGINAL,
    SIGNALS,
    UNIFORM,
    Signal,
    find_signal,
    reach_of,
)
from service.errors import RequestError
from service.request.options import RunOptions
from service.request.request import Method
from tests.support.paths import ROOT

signals = pytest.mark.parametrize("signal", SIGNALS.values(), ids=lambda signal: signal.name)


def names_in(path: Path) -> list[str]:
    """Return the string constants of a module that are names of signals."""
    constants = (node for node in ast.walk(ast.parse(path.read_text())))
    return [
        node.value
        for node in constants
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in SIGNALS
    ]


def test_no_other_module_names_a_signal() -> None:
    owner = ROOT / "allocator" / "signals.py"
    modules = [path for room in ("allocator", "service") for path in (ROOT / room).rglob("*.py")]
    assert sorted(names_in(owner)) == sorted(SIGNALS)
    assert {str(path): names_in(path) for path in modules if path != owner and names_in(path)} == {}


def test_every_signal_has_a_function_that_measures_it() -> None:
    assert list(MEASURES) == list(SIGNALS.values())
    assert len(set(MEASURES.values())) == len(MEASURES)


def test_the_default_comes_first_and_names_are_keys() -> None:
    assert next(iter(SIGNALS.values())) == DEFAULT_SIGNAL
    assert DEFAULT_SIGNAL.name == "integral"
    assert all(signal.name == name for name, signal in SIGNALS.items())


def test_an_unknown_signal_is_refused_with_those_that_exist() -> None:
    with pytest.raises(SignalUnknown, match=r"'guess' does not exist; use one of integral, output"):
        find_signal("guess")
    with pytest.raises(SignalUnknown, match="'guess' does not exist"):
        Method("guess", "full")


@signals
def test_a_request_takes_the_probes_of_the_signal(signal: Signal) -> None:
    options = RunOptions(model="model", budget="2.5bpw", signal=signal.name)
    amounts = options.to_request().amounts
    assert (amounts.probe_windows, amounts.probe_tokens) == (
        signal.probe_windows,
        signal.probe_tokens,
    )
    short = options.model_copy(update={"tokens": 64}).to_request().amounts
    assert short.probe_tokens == 64


@signals
def test_only_signals_that_can_be_are_measured_in_the_original_model(signal: Signal) -> None:
    assert set(signal.contexts) <= {UNIFORM, ORIGINAL}
    assert signal.in_original(requested=False) == (UNIFORM not in signal.contexts)
    if ORIGINAL in signal.contexts:
        assert Method(signal.name, "full", in_original=True).in_original
    else:
        with pytest.raises(RequestError, match="in the original model; use one of output, noise"):
            Method(signal.name, "full", in_original=True)


def test_costs_of_signals_that_change_one_layer_at_a_time_grow_with_the_layers() -> None:
    products = {name: signal.cost.products(210) for name, signal in SIGNALS.items()}
    assert products == {
        "integral": (7, 10),
        "output": (210, 19),
        "gradient": (5, 6),
        "noise": (315, 19),
        "hessian": (1, 2),
    }
    assert [name for name, signal in SIGNALS.items() if signal.cost.all_probes_at_once] == [
        "output",
        "noise",
    ]


def table_row(signal: Signal) -> str:
    """Return the row of a signal in the table of allocator/README.md."""
    reach = f"-{signal.reach.below:.0%} .. +{signal.reach.above:.0%}".replace("%", " %")
    per_layer = signal.cost.products_per_layer
    products = f"{per_layer:g} L".removeprefix("1 ") if per_layer else signal.cost.layer_products
    cells = (
        f"`{signal.name}`",
        "coupled" if signal.coupled else "additive",
        ", ".join(signal.contexts),
        f"{signal.probe_windows} x {signal.probe_tokens}",
        reach,
        products,
        signal.cost.other_products,
    )
    return f"| {' | '.join(map(str, cells))} |"


def test_the_table_of_the_readme_agrees() -> None:
    readme = (ROOT / "allocator" / "README.md").read_text()
    table = readme.split("<!-- signals: begin -->")[1].split("<!-- signals: end -->")[0]
    assert table.strip().splitlines()[2:] == [table_row(signal) for signal in SIGNALS.values()]


def test_a_wide_reach_takes_a_context_below_the_budget() -> None:
    assert find_signal("integral").reach.largest_plan == 1.45
    assert NARROW.largest_plan is None
    assert reach_of("of another version") == NARROW
