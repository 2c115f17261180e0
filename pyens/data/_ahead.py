"""Reading ahead: an iterator whose items are made in a thread while the last ones are in use."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class _End:
    """What a thread puts last: the error that it died of, or None."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


@contextmanager
def ahead(make: Callable[[], Iterator[T]], depth: int = 1) -> Iterator[Iterator[T]]:
    """The items of `make()`, of which `depth` wait to be asked for while one more is made.

    An error of the thread is raised where its item would have come. Leaving the block, by an error or Ctrl-C
    too, ends the thread as soon as it has made what it is at; nobody waits for that longer than a second.
    """
    items: queue.Queue[T | _End] = queue.Queue(depth)
    left = threading.Event()

    def put(item: T | _End) -> bool:
        while not left.is_set():
            try:
                items.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        error: BaseException | None = None
        try:
            for item in make():
                if not put(item):
                    return
        except BaseException as raised:
            error = raised
        put(_End(error))

    def given() -> Iterator[T]:
        while True:
            try:
                item = items.get(timeout=1)
            except queue.Empty:
                if not thread.is_alive() and items.empty():
                    raise RuntimeError(
                        "reading ahead: expected items or an error, got a dead thread"
                    ) from None
                continue
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item

    thread = threading.Thread(target=work, name="pyens reads ahead", daemon=True)
    thread.start()
    try:
        yield given()
    finally:
        left.set()
        thread.join(timeout=1)
