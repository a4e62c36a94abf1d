"""What counts against a job."""

from __future__ import annotations

from co3d_ensemble.fleet import attempts


def attempt(record, how, *, before=None, after=None, seconds=10.0, gpu_share=0.0):
    begun = attempts.begin(record, now=100.0, worker="0@host", device="cpu", gpu_share=gpu_share, checkpoint=before)
    assert begun["running"]["worker"] == "0@host"
    return attempts.end(begun, how, now=100.0 + seconds, checkpoint=after, error="boom" if how == attempts.FAILED else None)


def test_three_failures_in_a_row_without_a_newer_checkpoint_exhaust_a_job():
    record = attempts.new_record()
    for _ in range(3):
        assert not attempts.is_exhausted(record, 3)
        record = attempt(record, attempts.FAILED, before=[1, 1], after=[1, 1])
    assert attempts.is_exhausted(record, 3) and record["started"] == 3


def test_a_newer_checkpoint_starts_the_count_anew():
    record = attempts.new_record()
    for _ in range(2):
        record = attempt(record, attempts.FAILED)
    record = attempt(record, attempts.FAILED, before=None, after=[5, 5])
    assert record["fruitless"] == 0
    record = attempt(record, attempts.FAILED, before=[5, 5], after=[5, 5])
    assert record["fruitless"] == 1


def test_attempts_that_end_with_their_worker_do_not_count():
    record = attempt(attempts.new_record(), attempts.FAILED)
    for how in (attempts.LOST, attempts.STOPPED) * 5:
        record = attempt(record, how)
    assert record["fruitless"] == 1 and record["started"] == 11


def test_time_is_summed_over_all_attempts_and_that_on_gpus_by_share():
    record = attempt(attempts.new_record(), attempts.STOPPED, seconds=100.0, gpu_share=0.5)
    record = attempt(record, attempts.DONE, seconds=20.0)
    assert record["seconds"] == 120.0 and record["gpu_seconds"] == 50.0


def test_the_history_is_bounded():
    record = attempts.new_record()
    for _ in range(50):
        record = attempt(record, attempts.LOST)
    assert len(record["history"]) == attempts.SHOWN_HISTORY and record["started"] == 50
