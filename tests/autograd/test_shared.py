import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from hessfunc.autograd.shared import Shared


def test_the_last_of_overlapping_threads_restores_the_setting() -> None:
    setting = ["before"]

    @contextmanager
    def changed() -> Iterator[None]:
        kept = setting[0]
        setting[0] = "changed"
        yield
        setting[0] = kept

    shared = Shared(changed)
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with shared.held():
            entered.set()
            leave.wait()

    with shared.held():
        thread = threading.Thread(target=hold)
        thread.start()
        entered.wait()
    assert setting == ["changed"]
    leave.set()
    thread.join()
    assert setting == ["before"]
    with pytest.raises(KeyError), shared.held():
        raise KeyError
    assert setting == ["before"]
