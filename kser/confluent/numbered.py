"""Numbered: writes records with numbers for one who wants to know which failed, at the least cost for each of them."""

import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from confluent_kafka import KafkaError, KafkaException, Message

from kser.errors import Error
from kser.transport import OutRecord

if TYPE_CHECKING:
    from kser.confluent.sink import ConfluentSink

__all__ = ["Numbered"]


class Numbered:
    """Writes through a sink that is told of failures only; each one is told by the number its record was given.

    One thread at a time uses it. What has not been told when the sink's flush() gave 0 is stored, unless ``doubts`` has
    changed since it was handed over.

    Args:
        sink: made with ``failures_only``.
        tell: called with (number, error) when one failed, maybe twice. Holds neither the sink nor this.

    Attributes:
        produce: (topic, key, value, number): hands over one record. Waits and raises as Sink.produce() does.
    """

    def __init__(self, sink: "ConfluentSink", tell: Callable[[int, Error], None]) -> None:
        self._sink = sink
        self.produce = _producing(sink, tell)

    @property
    def doubts(self) -> int:
        """How often the client broke in a way that may have kept back the news of a failure."""
        return self._sink._broke

    def answered(self) -> None:
        """Tell the sink that something was stored: it has no callback to learn it from."""
        self._sink._state.up()


def _producing(sink: "ConfluentSink", tell: Callable[[int, Error], None]) -> Callable[[str, bytes, bytes, int], None]:
    of_sink = weakref.ref(sink)  # else a sink that nobody closed would only end when cycles are looked for

    class Told(int):
        """The delivery callback of one record: its number, and below that the last digits of how often was purged.

        A number, because there are as many of them as records under way, and the garbage collector does not look at
        numbers: with objects of another kind that cost a tenth of the time of a launch.
        """

        __slots__ = ()

        def __call__(self, error: KafkaError | None, message: Message) -> None:
            try:
                sink = of_sink()
            except SystemError:  # an exception that confluent-kafka left behind, see _clear_pending() of the sink
                sink = of_sink()
            if sink is not None and error is not None:
                purges = sink._purges - (sink._purges - self & _PURGES)
                sink._deliver(partial(_failed, tell, self >> _BITS), purges, error, message)

    def produce(topic: str, key: bytes, value: bytes, number: int) -> None:
        producer = sink._producer
        if producer is not None and sink._met:
            try:
                producer.produce(topic, value, key, -1, Told(number << _BITS | sink._purges & _PURGES))
                return
            except (BufferError, KafkaException, RuntimeError):
                pass  # produce() of the sink meets the same, and does about it what can be done
        sink.produce(OutRecord(topic, key, value), partial(_failed, tell, number))
        if producer is not None and sink._producer is not producer:
            sink._broke += 1  # the client was replaced: what the old one had is told by now, or lost

    return produce


def _failed(tell: Callable[[int, Error], None], number: int, error: Error | None) -> None:
    if error is not None:
        tell(number, error)


#: Purges are counted modulo this and one in a Told: a record does not outlive so many of them.
_BITS = 16
_PURGES = (1 << _BITS) - 1
