"""Which captured visit serves a wanted one, and when the exact one is captured after all."""

from __future__ import annotations

import itertools

from mor.engine.slot_program import VisitShape
from mor.engine.visit_choice import VisitChoice, serves


def shape(slots: int, turns: int, longest: int = 512, *, limited: bool = False) -> VisitShape:
    return VisitShape(slots=slots, turns=turns, longest=longest, limited=limited)


def choice(*captured: VisitShape, patience: int = 3) -> VisitChoice:
    made = VisitChoice()
    made.captured |= set(captured)
    made.patience = patience
    return made


def test_a_visit_serves_what_is_smaller_in_every_way() -> None:
    large = shape(8, 6, 2048, limited=True)
    smaller = [shape(8, 6, 2048), shape(4, 2, 512), shape(8, 1, 512, limited=True), large]
    other = [shape(16, 6), shape(8, 8), shape(8, 6, 8192), shape(8, 0)]
    assert all(serves(large, small) for small in smaller) and not any(serves(large, small) for small in other)
    assert not serves(shape(8, 8), shape(8, 8, limited=True))
    assert serves(shape(8, 0), shape(4, 0)) and not serves(shape(8, 8), shape(4, 0))  # in lockstep nobody may turn then


def test_the_cheapest_that_serves_is_taken() -> None:
    made = choice(shape(8, 8, 2048, limited=True), shape(8, 5), shape(4, 4, 2048, limited=True))
    assert made.choose(shape(8, 5)) == shape(8, 5)
    assert made.choose(shape(8, 6)) == shape(8, 8, 2048, limited=True)
    assert made.choose(shape(6, 4)) == shape(8, 5)
    assert made.choose(shape(3, 2, 600)) == shape(4, 4, 2048, limited=True)


def test_what_nothing_serves_is_captured_at_once() -> None:
    assert choice().choose(shape(4, 4)) == shape(4, 4)
    assert choice(shape(2, 2)).choose(shape(4, 4)) == shape(4, 4)


def test_what_is_wanted_often_is_captured_though_requests_wait() -> None:
    made, wanted = choice(shape(8, 8), patience=3), shape(6, 6)
    assert [made.choose(wanted) for _ in range(5)] == [shape(8, 8)] * 3 + [wanted] * 2


def test_what_was_wanted_most_is_missing_until_it_is_captured() -> None:
    made = choice(shape(8, 8))
    assert made.missing() is None
    for wanted in [shape(6, 6), shape(3, 3), shape(3, 3)]:
        made.choose(wanted)
    assert made.missing() == shape(3, 3)
    made.captured.add(shape(3, 3))
    assert made.missing() == shape(6, 6)
    made.captured.add(shape(6, 6))
    assert made.missing() is None


def test_two_visits_for_each_usual_number_serve_everything() -> None:
    made = choice()
    for slots in (1, 2, 4, 8):
        made.captured |= {shape(slots, slots, 4096, limited=True), shape(slots, -(-slots * 3 // 4))}
    for slots, longest, limited in itertools.product(range(1, 9), (512, 2048, 4096), (False, True)):
        for turns in range(1, slots + 1):
            assert made.choose(shape(slots, turns, longest, limited=limited)) in made.captured
