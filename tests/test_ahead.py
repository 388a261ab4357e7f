"""Work ahead: in order, bounded, truly beside the caller, and over when the caller is."""

import threading

import pytest

from mochi_lora.data.ahead import begun_ahead, threads_to_read


@pytest.mark.parametrize("ahead", [0, 1, 3, 50])
def test_results_come_in_order_whatever_the_number_of_threads(ahead):
    assert [wait() for wait in begun_ahead(lambda item: item * item, range(20), ahead)] == [n * n for n in range(20)]


def test_without_threads_nothing_is_done_before_it_is_asked_for():
    done = []
    calls = list(begun_ahead(done.append, range(3), 0))
    assert done == []
    calls[1]()
    assert done == [1]


@pytest.mark.parametrize("ahead", [1, 2, 4])
def test_no_more_than_asked_for_is_begun(ahead):
    begun = []
    for consumed, wait in enumerate(begun_ahead(begun.append, range(30), ahead), start=1):
        wait()
        assert len(begun) <= consumed + ahead


def test_the_next_item_is_worked_on_while_the_caller_holds_the_first():
    second = threading.Event()
    calls = begun_ahead(lambda item: second.set() if item == 1 else None, range(3), 1)
    next(calls)()
    assert second.wait(10), "the second item was not begun beside the caller"
    calls.close()


@pytest.mark.parametrize("ahead", [0, 2])
def test_an_error_is_its_items_own_and_the_others_come(ahead):
    def work(item):
        if item % 2:
            raise ValueError(item)
        return item

    found = []
    for wait in begun_ahead(work, range(6), ahead):
        try:
            found.append(wait())
        except ValueError as error:
            found.append(str(error))
    assert found == [0, "1", 2, "3", 4, "5"]


def test_closing_drops_what_has_not_begun_and_leaves_no_thread():
    gate, begun = threading.Event(), []

    def work(item):
        begun.append(item)
        gate.wait(10)

    calls = begun_ahead(work, range(100), 2)
    threading.Timer(0.05, gate.set).start()
    next(calls)
    calls.close()
    assert len(begun) <= 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reader")]


def test_as_many_clips_are_read_ahead_as_a_process_has_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(6), raising=False)
    assert [threads_to_read(None, processes) for processes in (1, 2, 3, 6)] == [6, 3, 2, 2]
    assert [threads_to_read(given) for given in (0, 1, 40)] == [0, 1, 40]
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(192), raising=False)
    assert [threads_to_read(None, processes) for processes in (1, 8, 64)] == [8, 8, 3]
