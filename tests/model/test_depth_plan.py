import pytest
from hypothesis import given
from hypothesis import strategies as st

from mor.model.depth_plan import KV_POLICIES, SHARINGS, DepthPlan, linear_capacities


@st.composite
def plans(draw):
    sharing = draw(st.sampled_from(SHARINGS))
    recursions = 1 if sharing == "none" else draw(st.integers(1, 4))
    outer = 2 if sharing.startswith("middle_") else 0
    return DepthPlan(
        num_layers=recursions * draw(st.integers(1, 6)) + outer, num_recursions=recursions, sharing=sharing
    )


@pytest.mark.parametrize(
    ("sharing", "num_layers", "weights"),
    [
        ("none", 4, [0, 1, 2, 3]),
        ("cycle", 6, [0, 1, 0, 1, 0, 1]),
        ("sequence", 6, [0, 0, 0, 1, 1, 1]),
        ("middle_cycle", 8, [0, 1, 2, 1, 2, 1, 2, 3]),
        ("middle_sequence", 8, [0, 1, 1, 1, 2, 2, 2, 3]),
    ],
)
def test_weights_follow_the_papers_formulas(sharing, num_layers, weights):
    plan = DepthPlan(num_layers=num_layers, num_recursions=1 if sharing == "none" else 3, sharing=sharing)
    assert [step.weight for step in plan.steps] == weights


@given(plans())
def test_every_weight_is_used_and_block_layers_once_per_recursion(plan):
    assert {step.weight for step in plan.steps} == set(range(plan.num_unique_layers))
    visits = [(step.recursion, step.block_layer) for step in plan.block_steps]
    assert sorted(visits) == [(r, j) for r in range(plan.num_recursions) for j in range(plan.block_size)]
    assert all(plan.application(r, j) == step.layer for (r, j), step in zip(visits, plan.block_steps, strict=True))


@given(plans(), st.sampled_from(KV_POLICIES))
def test_a_slot_is_written_before_it_is_read(plan, policy):
    written: set[int] = set()
    for step in plan.steps:
        access = plan.kv_access(step, policy)
        if access.writes:
            assert access.slot not in written
            written.add(access.slot)
        assert access.slot in written
        assert access.fallback_slot is None or access.fallback_slot in written
    assert len(written) == (plan.num_unique_layers if policy == "shared" else plan.num_layers)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(num_layers=9, num_recursions=3, sharing="middle_cycle"), "num_hidden_layers=8 or 11 would fit"),
        (dict(num_layers=8, num_recursions=3, sharing="cycle"), "num_hidden_layers=6 or 9 would fit"),
        (dict(num_layers=8, num_recursions=2), "needs a sharing"),
        (dict(num_layers=8, num_recursions=0), "at least 1"),
        (dict(num_layers=8, sharing="circle"), "'circle' is unknown"),
        (dict(num_layers=2, sharing="middle_cycle"), "does not divide the 0 shared layers"),
    ],
)
def test_impossible_plans_say_what_would_fit(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DepthPlan(**kwargs)


def test_linear_capacities_are_the_papers():
    assert linear_capacities(3) == (1.0, 2 / 3, 1 / 3)
    assert linear_capacities(1) == (1.0,)
