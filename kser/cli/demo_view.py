"""What `kser demo` says away from a terminal: a line for each thing that happens, or JSON."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import click

from kser.cli.output import write_json
from kser.events import Event, EventType, OperationView

__all__ = ["ROLLS", "DemoView", "JsonView"]

#: Rolls of one game.
ROLLS = 3

_NEXT = (
    ("kser tasks kser.cli.dice:registry", "what these workers ran"),
    ("kser broker --topic shop:6", "a broker to play with"),
    ("kser worker app.py --topics shop", "your own tasks"),
    ("kser launch app.py Order --topic shop --watch", "an operation, to its end"),
)


class DemoView:
    """A plain line for each thing that happens.

    Args:
        operations: how many games will be played.
        workers: names of the workers.
    """

    def __init__(self, operations: int, workers: Sequence[str]) -> None:
        self.operations = operations
        self.workers = workers
        #: The games, in order; empty until they are launched.
        self.games: Sequence[OperationView] = ()
        self._numbers: dict[str, int] = {}
        self._began = time.monotonic()
        self._took = 0.0

    def playing(self, bootstrap_servers: str) -> AbstractContextManager[None]:
        """Around everything that is shown while it goes on."""
        return self._playing(bootstrap_servers)

    def workers_ready(self) -> None:
        """All workers have joined."""
        click.echo(f"{', '.join(self.workers)}: ready")

    def launched(self, games: Sequence[OperationView]) -> None:
        """The operations were launched."""
        self.games = games
        self._numbers = {game.uuid: number for number, game in enumerate(games, 1)}
        self._began = time.monotonic()

    def event(self, game: OperationView, event: Event) -> None:
        """Something happened to ``game``, which has it in its view already."""
        number = self._numbers[game.uuid]
        match event.type:
            case EventType.OPERATION_STARTED:
                click.echo(f"game {number}: started")
            case EventType.STEP_DONE if event.result is not None:
                click.echo(f"game {number}: roll {len(game.steps)}: {event.result.stdout} ({event.worker})")
            case EventType.STEP_FAILED if event.result is not None:
                click.echo(f"game {number}: roll {len(game.steps)} FAILED: {event.result.stderr} ({event.worker})")
            case EventType.OPERATION_ENDED:
                click.echo(f"game {number}: {event.status}, {total(game)} points")

    def ended(self) -> None:
        """All games have ended."""
        self._took = time.monotonic() - self._began

    def summary(self) -> None:
        """All of them have ended well."""
        click.echo()
        counted = self.shares()
        rolls = sum(counted.values())
        click.secho(f"All {len(self.games)} operations SUCCESS: {rolls} rolls in {self._took:.1f} s", bold=True)
        click.echo("Rolled by " + ", ".join(f"{name}: {counted[name]}" for name in self.workers))
        click.echo("Each roll was a Kafka message; its result sent the next one.")
        click.echo("\nWhat next:")
        width = max(len(command) for command, _ in _NEXT)
        for command, what in _NEXT:
            click.echo(f"  {command.ljust(width)}  # {what}")

    def title(self, bootstrap_servers: str) -> str:
        """What is going to happen."""
        games = f"{self.operations} game{'s' if self.operations > 1 else ''}"
        return f"{games} of {ROLLS} dice, {len(self.workers)} workers, a Kafka broker in memory on {bootstrap_servers}"

    def shares(self) -> Counter[str]:
        """How many rolls each worker made."""
        return Counter(step.worker for game in self.games for step in game.steps)

    @contextmanager
    def _playing(self, bootstrap_servers: str) -> Iterator[None]:
        click.echo(self.title(bootstrap_servers))
        yield


class JsonView(DemoView):
    """An event a line, and a summary as the last one."""

    def workers_ready(self) -> None:
        """Is no data."""

    def event(self, game: OperationView, event: Event) -> None:  # noqa: ARG002 - the interface
        """Something happened."""
        click.echo(event.to_bytes())

    def summary(self) -> None:
        """All of them have ended well."""
        shares = self.shares()
        write_json(
            {
                "type": "demo.summary",
                "operations": len(self.games),
                "rolls": sum(shares.values()),
                "seconds": round(self._took, 3),
                "workers": {name: shares[name] for name in self.workers},
            }
        )

    @contextmanager
    def _playing(self, bootstrap_servers: str) -> Iterator[None]:  # noqa: ARG002 - the interface
        yield


def roll_of(event: Event) -> int | None:
    """The number that was rolled; None for a roll that failed."""
    value = event.result.retval.get("roll") if event.result is not None else None
    return value if isinstance(value, int) else None


def total(game: OperationView) -> int:
    """The points so far."""
    return sum(roll_of(step) or 0 for step in game.steps)
