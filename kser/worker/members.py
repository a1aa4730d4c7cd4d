"""A worker of several processes, as its parent sees it: who the members are, and what each of them is told."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from kser.errors import ConfigurationError, FencedError, TransportError
from kser.worker.child import pack
from kser.worker.pool import command, surroundings
from kser.worker.processes import LEFT, MISUSE, TWIN, Processes

__all__ = ["Place", "check_config", "member_processes", "places", "raise_for"]

_LAST_PORT: Final = 65535
#: What of a Kafka configuration another process can be told.
_PLAIN: Final = (str, int, float, bool, type(None))
_BOOT: Final = "import sys; sys.path.insert(0, sys.argv[-1]); from kser.worker.member import main; main()"


class Place(NamedTuple):
    """What only one of several members has."""

    name: str | None
    health_port: int | None
    #: One of them is enough.
    relay: bool


def places(processes: int, name: str | None, health_port: int | None, *, relay: bool = True) -> list[Place]:
    """One for each process: names and ports are counted up from those of the worker.

    Raises ConfigurationError when there are not so many ports.
    """
    if health_port is not None and health_port + processes - 1 > _LAST_PORT:
        raise ConfigurationError(
            f"Health port {health_port} with {processes} processes: process {_LAST_PORT + 1 - health_port} would have "
            f"port {_LAST_PORT + 1}, and there is none; give a lower port"
        )
    return [
        Place(
            f"{name}-{number}" if name is not None else None,
            health_port + number if health_port is not None else None,
            relay and number == 0,
        )
        for number in range(processes)
    ]


def check_config(config: Mapping[str, Any], processes: int) -> None:
    """Raise ConfigurationError for a value that no other process can be told: a function, an object."""
    for name, value in config.items():
        for each in value if isinstance(value, (list, tuple)) else [value]:
            if not isinstance(each, _PLAIN):
                raise ConfigurationError(
                    f"config[{name!r}] with processes={processes}: a {type(each).__name__} cannot be given to another "
                    "process; leave it out, or start each worker as a program of its own"
                )


def member_processes(
    location: str, settings: Mapping[str, Any], members: Sequence[Place], *, end_s: float
) -> Processes:
    """The processes of these members, which are not started yet.

    Args:
        location: ``MODULE_OR_FILE:NAME`` of the registry.
        settings: of the Worker that each of them is, by the names of its arguments, but for what is in its Place.
        members: of places().
        end_s: what each may take to end.
    """
    told = surroundings(location) | {"worker": _plain(settings)}
    orders = [pack(told | {"place": tuple(place)}) for place in members]
    return Processes([command(_BOOT)] * len(members), end_s=end_s, orders=orders)


def raise_for(code: int) -> None:
    """Raise what a worker would that is no process of its own, for the exit code of the processes.

    Nothing for 0, and for tasks that were left.
    """
    if code in (0, LEFT):
        return
    said = f"A process of the worker ended with exit code {code}, and so have the others; the log says why"
    if code == TWIN:
        raise FencedError(f"{said}. Another worker has its name", extra={"twin": True})
    if code == MISUSE:
        raise ConfigurationError(said)
    raise TransportError(said)


def _plain(value: Any) -> Any:
    """The value without classes of the program's own (enumerations of topics, numbers with a name)."""
    if isinstance(value, Mapping):
        return {_plain(name): _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, str):
        return str.__str__(value)
    for kind in (bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    return value
