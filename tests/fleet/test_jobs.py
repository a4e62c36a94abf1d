"""Which jobs there are, and in what order."""

from __future__ import annotations

import pytest

from co3d_ensemble.fleet.jobs import Job, chosen_subsets, longest_first


def job(name, seconds=None, work=1.0):
    return Job(name, ("true",), "recipe", seconds, work)


def test_longest_come_first_and_equal_ones_by_name():
    jobs = [job("b", 5.0), job("c", 9.0), job("a", 5.0)]
    assert [j.name for j in longest_first(jobs)] == ["c", "a", "b"]


def test_jobs_without_a_measurement_are_placed_by_their_work_on_the_scale_of_the_measured():
    jobs = [job("hour", 3600.0, work=10.0), job("two", None, work=20.0), job("half", None, work=5.0)]
    assert [j.name for j in longest_first(jobs)] == ["two", "hour", "half"]


def test_filters_leave_what_both_name():
    available = [("apple", "manyview_dev_0"), ("apple", "manyview_test_0"), ("cape", "manyview_dev_0")]
    assert chosen_subsets(available) == available
    assert chosen_subsets(available, categories=["apple"], subsets=["manyview_dev_0"]) == [("apple", "manyview_dev_0")]


@pytest.mark.parametrize("filters", [{"categories": ["pear"]}, {"subsets": ["manyview_dev_7"]}])
def test_a_filter_that_names_nothing_is_an_error_that_lists_what_there_is(filters):
    with pytest.raises(ValueError, match="apple|manyview_dev_0"):
        chosen_subsets([("apple", "manyview_dev_0")], **filters)


def test_a_job_survives_its_way_through_the_store():
    first = Job("a/b/c", ("python", "x=1"), "recipe", 3.5, 2.0)
    assert Job.from_json(first.as_json()) == first
