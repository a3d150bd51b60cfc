"""Which steps accuracy control takes."""

import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimgraph.auto.control import Candidate, by_noise_per_cost, search

LAYERS = [f"layer{index}" for index in range(12)]


def losing(harm):
    """A metric that loses what each layer harms, unless it is spared; and the list of sets it was asked for."""
    asked = []

    def drop_of(spared):
        asked.append(spared)
        return math.fsum(value for name, value in harm.items() if name not in spared)

    return drop_of, asked


def test_nothing_is_spared_where_the_limit_holds_already():
    found = search(LAYERS, losing({"layer3": 0.01})[0], limit=0.01)
    assert (found.taken, found.met, found.trials) == ((), True, 1)


def test_one_poisoned_layer_is_spared_alone_wherever_it_stands():
    for name in LAYERS:
        found = search(LAYERS, losing({name: 0.3})[0], limit=0.01)
        assert (found.taken, found.drop) == ((name,), 0.0)


def test_a_drop_that_no_layer_explains_is_not_met():
    found = search(LAYERS, lambda spared: 0.2, limit=0.01)
    assert (found.taken, found.drop, found.met) == ((), 0.2, False)


def test_a_metric_that_is_no_number_is_beyond_every_limit():
    found = search(LAYERS, lambda spared: math.nan if "layer1" not in spared else 0.0, limit=math.inf)
    assert found.taken == ("layer1",)


def test_no_layer_at_all_is_no_error():
    assert not search([], lambda spared: 1.0, limit=0.5).met


def test_the_dearest_of_two_that_would_do_is_taken_back():
    def drop_of(spared):  # layer1 is needed, and one of the two others
        return 0.0 if "layer1" in spared and spared & {"layer0", "layer2"} else 0.1

    order = ["layer0", "layer2", "layer1"]
    for dear, cheap in (("layer0", "layer2"), ("layer2", "layer0")):
        found = search(order, drop_of, limit=0.01, dearest=[dear, cheap, "layer1"])
        assert set(found.taken) == {cheap, "layer1"}


def test_noise_is_weighed_against_what_its_removal_costs():
    order = by_noise_per_cost(
        [
            Candidate(step="loud but dear", noise=4.0, cost=100.0),
            Candidate(step="loud", noise=2.0, cost=20.0),
            Candidate(step="gains, but is silent", noise=1e-6, cost=-5.0),
        ]
    )
    assert order == ["loud", "loud but dear", "gains, but is silent"]


harms = st.lists(st.integers(0, 20), min_size=1, max_size=10)


@given(harms, st.integers(0, 60))
def test_if_sparing_never_harms_the_limit_is_met_and_nothing_more_can_be_given_back(harm, limit):
    names = [f"layer{index}" for index in range(len(harm))]
    drop_of, _ = losing(dict(zip(names, harm, strict=True)))
    found = search(names, drop_of, limit=limit)
    assert found.met
    assert drop_of(frozenset(found.taken)) == found.drop <= limit
    for name in found.taken:
        assert drop_of(frozenset(found.taken) - {name}) > limit


@given(harms, st.integers(0, 60))
def test_in_the_order_of_their_harm_the_fewest_are_spared(harm, limit):
    worst_first = sorted(harm, reverse=True)
    names = [f"layer{index}" for index in range(len(harm))]
    drop_of, _ = losing(dict(zip(names, worst_first, strict=True)))
    fewest = min(
        count
        for count in range(len(names) + 1)
        for spared in combinations(names, count)
        if drop_of(frozenset(spared)) <= limit
    )
    assert len(search(names, drop_of, limit=limit).taken) == fewest


@given(st.dictionaries(st.frozensets(st.sampled_from("abcdef")), st.floats(0, 1)), st.floats(0, 1))
def test_whatever_the_metric_does_what_is_found_was_measured_and_no_set_twice(drops, limit):
    asked = []

    def drop_of(spared):
        asked.append(spared)
        return drops.get(spared, 0.0 if len(spared) == 6 else 0.5)

    found = search("abcdef", drop_of, limit=limit)
    assert len(asked) == len(set(asked)) == found.trials
    if found.met:
        assert found.drop == drop_of(frozenset(found.taken)) <= limit + 1e-9
    else:
        assert found.drop == drop_of(frozenset("abcdef")) > limit


@pytest.mark.parametrize("needed", [1, 7, 60, 200])
def test_a_few_trials_are_enough_for_many_layers(needed):
    names = [f"layer{index}" for index in range(200)]
    found = search(names, losing(dict.fromkeys(names[:needed], 0.01))[0], limit=0.005)
    assert found.taken == tuple(names[:needed])
    assert found.trials <= 4 * math.log2(200) + 8
