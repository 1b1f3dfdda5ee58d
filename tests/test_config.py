"""Options: dictionaries, YAML and overrides in, the same values out, and errors that name what is wrong."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mor.config import apply_overrides, from_dict, list_options, load_yaml, to_dict


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    learning_rate: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.95)
    fused: bool | None = None

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be positive")


@dataclass(frozen=True, kw_only=True)
class Probe:
    every: int
    names: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Run:
    steps: int = 10
    name: str = "run"
    folder: Path = Path("runs")
    schedule: Literal["trapezoid", "cosine"] = "trapezoid"
    mean_depth: float | None = None
    limit: int | str = 0
    optimizer: Optimizer = Optimizer()
    probe: Probe | None = None
    probes: tuple[Probe, ...] = ()
    model: dict[str, Any] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)


def test_from_dict_builds_nested_options():
    run = from_dict(Run, {"steps": 5, "optimizer": {"learning_rate": 1, "betas": [0.8, 1]}, "probe": {"every": 2}})
    assert run == Run(steps=5, optimizer=Optimizer(learning_rate=1.0, betas=(0.8, 1.0)), probe=Probe(every=2))
    assert isinstance(run.optimizer.learning_rate, float)


def test_to_dict_round_trips_through_plain_values():
    run = Run(
        folder=Path("a/b"), probes=(Probe(every=1, names=["x"]),), model={"capacities": [1.0, 0.5]}, mean_depth=1.5
    )
    values = to_dict(run)
    assert values["folder"] == "a/b"
    assert values["probes"] == [{"every": 1, "names": ["x"]}]
    assert from_dict(Run, values) == run


@pytest.mark.parametrize(
    ("override", "path", "expected"),
    [
        ("--steps=1_000", "steps", 1000),
        ("--steps=1e3", "steps", 1000),
        ("steps=-7", "steps", -7),
        ("--optimizer.learning_rate=1e-3", "optimizer.learning_rate", 1e-3),
        ("--optimizer.learning-rate=2", "optimizer.learning_rate", 2.0),
        ("--optimizer.betas=0.8,0.99", "optimizer.betas", (0.8, 0.99)),
        ("--optimizer.betas=[0.8, 0.99]", "optimizer.betas", (0.8, 0.99)),
        ("--optimizer.fused=true", "optimizer.fused", True),
        ("--optimizer.fused=OFF", "optimizer.fused", False),
        ("--optimizer.fused", "optimizer.fused", True),
        ("--optimizer.fused=none", "optimizer.fused", None),
        ("--name=123", "name", "123"),
        ("--name=a=b,c", "name", "a=b,c"),
        ("--name=", "name", ""),
        ("--folder=/x/y", "folder", Path("/x/y")),
        ("--schedule=cosine", "schedule", "cosine"),
        ("--mean_depth=1.7", "mean_depth", 1.7),
        ("--mean_depth=null", "mean_depth", None),
        ("--limit=all", "limit", "all"),
        ("--limit=12", "limit", 12),
        ("--probe.every=3", "probe.every", 3),
        ("--probe={every: 3, names: ['a,b', c]}", "probe.names", ["a,b", "c"]),
        ("--probes=[{every: 1}, {every: 2}]", "probes", (Probe(every=1), Probe(every=2))),
        ("--model.hidden_size=64", "model.hidden_size", 64),
        ("--model.router=expert_choice", "model.router", "expert_choice"),
        ("--model.rope_parameters.rope_theta=1e4", "model.rope_parameters.rope_theta", 1e4),
        ("--model.capacities=[1, 0.5]", "model.capacities", [1, 0.5]),
        ("--model.tie_word_embeddings=false", "model.tie_word_embeddings", False),
        ("--model.mean_depth=none", "model.mean_depth", None),
        ("--model={hidden_size: 8, name: 'x: y'}", "model.name", "x: y"),
        ("--shares.code=1", "shares.code", 1.0),
    ],
)
def test_override_reads_text_by_the_type_of_its_field(override: str, path: str, expected: Any):
    value: Any = apply_overrides(Run(), [override])
    for part in path.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    assert value == expected
    assert type(value) is type(expected)


def test_overrides_keep_the_rest_and_the_later_wins():
    run = Run(name="kept", model={"hidden_size": 8, "vocab_size": 257}, probe=Probe(every=4, names=["a"]))
    changed = apply_overrides(run, ["--model.hidden_size=64", "--probe.every=5", "--probe.every=6"])
    assert changed.name == "kept"
    assert changed.model == {"hidden_size": 64, "vocab_size": 257}
    assert changed.probe == Probe(every=6, names=["a"])
    assert run.model["hidden_size"] == 8


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"step": 1}, "unknown option 'step'; did you mean 'steps'"),
        (
            {"optimizer": {"learning_rat": 1}},
            "unknown option 'optimizer.learning_rat'; did you mean 'optimizer.learning_rate'",
        ),
        ({"learning_rate": 1}, "unknown option 'learning_rate'; did you mean 'optimizer.learning_rate'"),
        ({"probe": {"evry": 1}}, "did you mean 'probe.every'"),
        ({"steps": "10"}, r"option steps='10' \(str\) does not fit; expected int"),
        ({"steps": 1.5}, r"steps=1.5 \(float\) does not fit; expected int"),
        ({"steps": True}, r"steps=True \(bool\) does not fit"),
        ({"optimizer": {"learning_rate": "fast"}}, r"optimizer.learning_rate='fast' .* expected float"),
        ({"optimizer": {"betas": [0.9]}}, r"optimizer.betas=\[0.9\] .* expected tuple\[float, float\]"),
        ({"optimizer": 3}, r"optimizer=3 \(int\) does not fit; expected Optimizer"),
        ({"mean_depth": [1]}, r"mean_depth=\[1\] .* expected float \| none"),
        ({"schedule": "linear"}, "schedule='linear' .* expected one of 'trapezoid', 'cosine'"),
        ({"probe": {}}, "option 'probe.every' is missing; expected int"),
        ({"probes": [{"every": 1}, {"every": "x"}]}, r"probes\[1\].every='x'"),
        ({"shares": {"code": "half"}}, r"shares.code='half' \(str\) does not fit; expected float"),
        ({"optimizer": {"learning_rate": -1}}, "learning_rate=-1.0 must be positive"),
    ],
)
def test_bad_values_are_errors_that_name_them(values: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        from_dict(Run, values)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--optimiser.learning_rate=1", "unknown option 'optimiser'; did you mean 'optimizer"),
        ("--optimizer.lr=1", "unknown option 'optimizer.lr'; did you mean 'optimizer.learning_rate'"),
        ("--steps=many", "option steps='many' does not fit; expected int"),
        ("--steps=1.5", "steps=1.5"),
        ("--steps.x=1", "steps=.* does not fit; expected int"),
        ("--steps", "steps='true' does not fit"),
        ("--optimizer=fast", "optimizer='fast' does not fit; expected Optimizer"),
        ("--probe.names=[a]", "'probe.every' is missing"),
        ("--.x=1", "override '--.x=1' has an empty name"),
        ("--=1", "empty name"),
    ],
)
def test_bad_overrides_are_errors_that_name_them(override: str, message: str):
    with pytest.raises(ValueError, match=message):
        apply_overrides(Run(), [override])


def test_yaml_reads_exponents_as_numbers(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("steps: 1e3\noptimizer:\n  learning_rate: 1e-3\n  betas: [0.9, 99e-2]\nmodel: {router: none}\n")
    run = load_yaml(Run, path)
    assert run.steps == 1000
    assert run.optimizer == Optimizer(learning_rate=1e-3, betas=(0.9, 0.99))
    assert run.model == {"router": "none"}


def test_an_empty_yaml_file_gives_the_defaults(tmp_path: Path):
    (tmp_path / "run.yaml").write_text("# nothing yet\n")
    assert load_yaml(Run, tmp_path / "run.yaml") == Run()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n- 2\n", "holds a list; expected a mapping"),
        ("a: [1\n", "not valid YAML"),
        ("stps: 3\n", "did you mean 'steps'"),
        ("1: 3\n", "unknown option '1'"),
        ("steps: 1\nname: a\nsteps: 2\n", "'steps' is given twice"),
    ],
)
def test_bad_yaml_is_a_clear_error(tmp_path: Path, text: str, message: str):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_yaml(Run, path)


def test_a_missing_yaml_file_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no such options file: .*nowhere\.yaml"):
        load_yaml(Run, tmp_path / "nowhere.yaml")


def test_list_options_names_every_leaf():
    listed = {name: (kind, value) for name, kind, value in list_options(Run())}
    assert listed["optimizer.learning_rate"] == ("float", 3e-3)
    assert listed["mean_depth"] == ("float | none", None)
    assert "optimizer" not in listed


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(
    steps=st.integers(),
    name=st.text(),
    rate=st.floats(min_value=1e-9, allow_nan=False, allow_infinity=True),
    limit=st.integers() | st.text(),
    model=st.dictionaries(st.text(), PLAIN),
)
def test_round_trip_of_any_values(steps: int, name: str, rate: float, limit: int | str, model: dict[str, Any]):
    run = Run(steps=steps, name=name, optimizer=Optimizer(learning_rate=rate), limit=limit, model=model)
    assert from_dict(Run, to_dict(run)) == run
    changed = apply_overrides(Run(), [f"--steps={steps}", f"--name={name}", f"--optimizer.learning_rate={rate!r}"])
    assert (changed.steps, changed.name, changed.optimizer.learning_rate) == (steps, name, rate)
