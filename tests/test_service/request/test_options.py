"""Options are defined once; a wrong one gets the same sentence everywhere."""

import ast
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from pydantic import BaseModel, ValidationError
from starlette.testclient import TestClient

from service.api.app import create_app
from service.cli.flags import flag_name
from service.errors import RequestError
from service.request.constraints import (
    ConstraintsIn,
    FrontierQuestion,
    LatencyRow,
    PlanConstraints,
    PlanQuestion,
)
from service.request.options import RecipeOption, RunOptions
from service.stages.recipe import RECIPES
from service.validation import sentences, values_of
from tests.support.commands import bitwright
from tests.support.paths import ROOT
from tests.support.profile_commands import store
from tests.support.served import backend_in
from tests.support.synthetic_profiles import make_profile

LONG = "x" * 1001

BAD: Mapping[str, list[str]] = {
    "model": ["", LONG],
    "budget": ["lots", "3", "-2bpw", "0bpw", "2parsecs", "2" * 41],
    "budget_of": ["file", ""],
    "whole_file": [],
    "embeddings": ["maybe", ""],
    "tokens": ["abc", "0", "1", "-5", "1.5", "1000001", "9" * 70],
    "calibration": [LONG],
    "calibration_windows": ["0", "-1", "many", "1000001"],
    "seed": ["-1", "x", str(2**63)],
    "evaluation": [LONG],
    "evaluation_windows": ["-1", "all", "1000001"],
    "probe_windows": ["0", "none", "1000001"],
    "probe_tokens": ["0", "-1", "600"],
    "group_size": ["0", "50", "-32", "big", str(2**20)],
    "signal": ["magic", "Integral", ""],
    "context": ["empty", "original"],
    "coupling": ["some", "FULL"],
    "check_plans": ["1", "2", "-3", "few"],
    "guard_windows": ["0", "x"],
    "effort": ["heroic", ""],
    "device": ["tpu", "cuda:0"],
}
"""Wrong values of each option of a run, as one types them; a flag takes none."""

BAD_CONSTRAINTS: Mapping[str, list[str]] = {
    "target": ["toaster", ""],
    "ties": ["x" * 601],
    "untied": ["x" * 301],
    "rules": ["nonsense", "*>3", "*>=many", "x" * 601],
    "pools": ["gpu0", "gpu0:*=3bpw", "gpu0:*=0.1B", "x" * 601],
    "max_latency_us": ["0", "-1", "soon", "nan", "900"],
    "max_distinct": ["0", "65", "some"],
}

BAD_QUESTIONS: Mapping[str, list[str]] = {
    "budget": ["lots", "x" * 41],
    "budget_of": ["file", ""],
    "max_kl": ["low", "nan", "inf"],
}

BAD_FRONTIERS: Mapping[str, list[str]] = {
    "points": ["1", "1001", "some"],
    "low": ["lots", "x" * 41],
    "high": ["lots", "x" * 41],
    "budget_of": ["file", ""],
}


def rows(table: Mapping[str, list[str]]) -> list[tuple[str, str]]:
    return [(name, value) for name, values in table.items() for value in values]


def test_every_option_is_tried_with_wrong_values() -> None:
    assert set(BAD) == set(RunOptions.model_fields) - {"constraints"}
    assert set(BAD_CONSTRAINTS) == set(PlanConstraints.model_fields)
    assert set(BAD_QUESTIONS) == set(PlanQuestion.model_fields)
    assert set(BAD_FRONTIERS) == set(FrontierQuestion.model_fields)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("options")


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    (folder / "m").mkdir()
    with TestClient(create_app(backend_in(folder)), base_url="http://localhost") as client:
        yield client


def of_command(*arguments: str | Path) -> str:
    """Return the message of a command that must refuse its options."""
    done = bitwright(*arguments, "--json")
    assert done.returncode == 2, done.stderr
    return str(json.loads(done.stdout)["message"])


def of_service(client: TestClient, path: str, body: Mapping[str, Any]) -> str:
    """Return the message of a request that must be refused."""
    answer = client.post(path, json=body)
    assert answer.status_code in (400, 422), answer.text
    return str(answer.json()["detail"])


@pytest.mark.parametrize(("name", "value"), rows(BAD))
def test_a_wrong_option_gets_the_same_sentence_everywhere(
    client: TestClient, name: str, value: str
) -> None:
    body = {"model": "m", "budget": "3bpw", name: value}
    model = body["model"]
    options = ["--budget", "3bpw", *(() if name == "model" else (f"--{flag_name(name)}", value))]
    message = of_command("run", model, *options)
    assert message == of_service(client, "/v1/jobs", body)
    with pytest.raises((ValidationError, RequestError, Exception)) as refused:
        RunOptions.model_validate(body).to_request()
    error = refused.value
    assert message == (sentences(error) if isinstance(error, ValidationError) else str(error))
    assert value[:20] in message


@pytest.mark.parametrize(
    "name", [name for name, f in RunOptions.model_fields.items() if f.is_required()]
)
def test_a_missing_option_gets_the_same_sentence_everywhere(client: TestClient, name: str) -> None:
    body = {"model": "m", "budget": "3bpw"}
    del body[name]
    arguments = [value if key == "model" else f"--{key}={value}" for key, value in body.items()]
    message = of_command("run", *arguments)
    assert message == of_service(client, "/v1/jobs", body) == f"{name} is missing; give it"


@pytest.mark.parametrize(("name", "value"), rows(BAD_CONSTRAINTS))
def test_a_wrong_constraint_gets_the_same_sentence_everywhere(
    client: TestClient, name: str, value: str
) -> None:
    is_list = get_origin(PlanConstraints.model_fields[name].annotation) is list
    constraints = {name: [value] if is_list else value}
    message = of_command("run", "m", "--budget", "3bpw", f"--{flag_name(name)}", value)
    body = {"model": "m", "budget": "3bpw", "constraints": constraints}
    assert message == of_service(client, "/v1/jobs", body)


NUMBER = "give a whole number from 2 to 1000000, not a boolean"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tokens": True}, f"tokens: {NUMBER}"),
        (
            {"tokens": False, "constraints": {"max_latency_us": True}},
            f"tokens: {NUMBER}",
        ),
        (
            {"constraints": {"max_latency_us": True}},
            "max latency us: give a number above 0, not a boolean",
        ),
        (
            {"labels": {"a b": "c"}},
            "labels: name 'a b': give 1 to 63 of letters, digits, '_', '.' and '-'",
        ),
        ({"labels": {"a": 1}}, "labels: value '1': give text of at most 200 characters"),
        ({"labels": ["a"]}, "labels [...]: give an object of at most 32 entries"),
        ({"profile": "mine"}, "profile 'mine': give 64 hexadecimal digits"),
    ],
)
def test_a_value_of_another_json_type_is_told_what_to_give(
    client: TestClient, given: dict[str, Any], message: str
) -> None:
    body = {"model": "m", "budget": "3bpw", **given}
    assert of_service(client, "/v1/jobs", body) == message


@pytest.fixture(scope="module")
def profile(folder: Path, client: TestClient) -> tuple[Path, str]:
    """A stored profile: its folder, and where the service answers questions about it."""
    made = make_profile(4)
    head, arrays = made.dumps()
    files = {"head": ("profile.json", head), "arrays": ("profile.npz", arrays)}
    digest = client.post("/v1/profiles", files=files).json()["digest"]
    return store(made, folder / "profile"), f"/v1/profiles/{digest}"


@pytest.mark.parametrize(("name", "value"), [*rows(BAD_QUESTIONS), ("", ""), ("both", "")])
def test_a_wrong_question_gets_the_same_sentence_everywhere(
    client: TestClient, profile: tuple[Path, str], name: str, value: str
) -> None:
    where, url = profile
    question = {"both": {"budget": "3bpw", "max_kl": "1"}, "": {}}.get(name, {name: value})
    options = [f"--{flag_name(key)}={text}" for key, text in question.items()]
    message = of_command("plan", where, *options)
    assert message == of_service(client, f"{url}/allocations", {"questions": [question]})


@pytest.mark.parametrize(("name", "value"), rows(BAD_FRONTIERS))
def test_a_wrong_frontier_gets_the_same_sentence_everywhere(
    client: TestClient, profile: tuple[Path, str], name: str, value: str
) -> None:
    where, url = profile
    message = of_command("frontier", where, f"--{flag_name(name)}={value}")
    assert message == of_service(client, f"{url}/frontier", {name: value})


def test_names_of_recipes_are_those_that_exist() -> None:
    assert get_args(RecipeOption.model_fields["recipe"].annotation) == tuple(RECIPES)


# defined once


MODELS: tuple[type[BaseModel], ...] = (
    RunOptions,
    RecipeOption,
    ConstraintsIn,
    LatencyRow,
    PlanQuestion,
    FrontierQuestion,
)


def texts() -> Counter[str]:
    """Return how often each text stands in the service's source, long texts put together."""
    return Counter(
        node.value
        for path in (ROOT / "service").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def defaults(names: set[str]) -> Counter[str]:
    """Return how often each name has a default in the service's source, of a field or an argument.

    None says that nothing was given, and is no default; a recipe in a stage is an object.
    """
    found: Counter[str] = Counter()
    for path in (ROOT / "service").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            for name, kind, value in _given(node):
                if name in names and kind != "Recipe" and ast.unparse(value) != "None":
                    found[name] += 1
    return found


def _given(node: ast.AST) -> Iterator[tuple[str, str, ast.expr]]:
    """Yield name, annotation and default of the field that a node is, or of the arguments."""
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
        yield node.target.id, ast.unparse(node.annotation), node.value
    if isinstance(node, ast.arguments):
        places = [*node.posonlyargs, *node.args]
        last = places[len(places) - len(node.defaults) :]
        pairs = [*zip(last, node.defaults, strict=True)]
        pairs += [
            (each, value)
            for each, value in zip(node.kwonlyargs, node.kw_defaults, strict=True)
            if value is not None
        ]
        for each, value in pairs:
            yield each.arg, "" if each.annotation is None else ast.unparse(each.annotation), value


def test_every_option_has_one_help_text_in_the_source() -> None:
    fields = {(name, f.description) for model in MODELS for name, f in model.model_fields.items()}
    counts = texts()
    assert {name: counts[text or ""] for name, text in fields} == {name: 1 for name, _ in fields}


def test_every_option_has_one_default_in_the_source() -> None:
    fields = {
        name: field.default
        for model in MODELS
        for name, field in model.model_fields.items()
        if not field.is_required() and not isinstance(field.default, BaseModel)
    }
    del fields["latency"]  # rows over REST, a file on the command line
    once = {name: 0 if default is None else 1 for name, default in fields.items()}
    counts = defaults(set(fields))
    assert {name: counts[name] for name in once} == once


def test_the_values_of_every_option_are_said_in_words() -> None:
    for model in MODELS:
        for name, field in model.model_fields.items():
            assert values_of(field), name
            assert field.description, name
