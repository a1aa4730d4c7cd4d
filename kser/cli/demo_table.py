"""What `kser demo` shows on a terminal: a table that changes in place."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from kser.cli.demo_view import ROLLS, DemoView, roll_of, total
from kser.cli.watch import spinner_for, writes_unicode
from kser.events import Event, OperationView
from kser.status import Status

__all__ = ["TableView"]

_FACES = "⚀⚁⚂⚃⚄⚅"
_COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "bright_red")
_STATUS_STYLES = {"SUCCESS": "green", "FAILED": "bold red", "RUNNING": "yellow", "PENDING": "dim"}
#: Lines of the screen that are not rows of games.
_OTHER_LINES = 7


class TableView(DemoView):
    """A row for each game, with its rolls as they come.

    Args:
        operations: how many games will be played.
        workers: names of the workers.
        console: the terminal.
    """

    def __init__(self, operations: int, workers: Sequence[str], console: Console) -> None:
        super().__init__(operations, workers)
        self._console = console
        unicode = writes_unicode(console)
        self._faces = _FACES if unicode else ""
        self._coming, self._later = ("…", "·") if unicode else ("...", "-")
        self._styles = {name: _COLOURS[at % len(_COLOURS)] for at, name in enumerate(workers)}
        self._spinner = Spinner(spinner_for(console), "the workers are starting", style="yellow")

    def workers_ready(self) -> None:
        """All workers have joined."""
        self._spinner.update(text="playing")

    def event(self, game: OperationView, event: Event) -> None:
        """The next refresh shows it."""

    @contextmanager
    def _playing(self, bootstrap_servers: str) -> Iterator[None]:
        self._console.print(f"\n{self.title(bootstrap_servers)}\n", style="bold", markup=False)
        with Live(get_renderable=self._render, console=self._console, refresh_per_second=12):
            yield

    # -- the table -----------------------------------------------------------------------------------------------------

    def _render(self) -> Group | Spinner:
        if not self.games:
            return self._spinner
        shown, first = self._window()
        table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
        table.add_column("game", justify="right")
        for number in range(1, ROLLS + 1):
            table.add_column(f"roll {number}", min_width=13)
        table.add_column("points", justify="right")
        table.add_column("operation")
        for number, game in enumerate(shown, first + 1):
            table.add_row(str(number), *self._rolls(game), *self._end(game))
        ended = sum(game.ended for game in self.games)
        hidden = f" (shown: {first + 1} to {first + len(shown)})" if len(shown) < len(self.games) else ""
        said = f"{ended} of {len(self.games)} operations have ended{hidden}"
        if ended == len(self.games):
            return Group(table, Text(f"\n{said}", style="dim")) if hidden else Group(table)
        self._spinner.update(text=said)
        return Group(table, Text(), self._spinner)

    def _window(self) -> tuple[Sequence[OperationView], int]:
        """The games that fit on the screen, from the first that goes on; and how many are before them."""
        room = max(self._console.height - _OTHER_LINES, 3)
        going_on = next((at for at, game in enumerate(self.games) if not game.ended), len(self.games))
        first = max(min(going_on, len(self.games) - room), 0)
        return self.games[first : first + room], first

    def _rolls(self, game: OperationView) -> list[Text]:
        cells = []
        for step in game.steps[:ROLLS]:
            value = roll_of(step)
            style = self._styles.get(step.worker, "")
            face = f"{self._faces[value - 1]} " if value and self._faces else ""
            cells.append(Text.assemble((f"{face}{value or 'x'}", f"bold {style}"), (f" {step.worker}", style)))
        if len(cells) < ROLLS and game.status == Status.RUNNING:
            cells.append(Text(self._coming, style="yellow"))
        return cells + [Text(self._later, style="dim")] * (ROLLS - len(cells))

    def _end(self, game: OperationView) -> tuple[Text, Text]:
        points = total(game)
        status = Text(game.status, style=_STATUS_STYLES.get(game.status, ""))
        return Text(str(points) if points else "", style="bold" if game.ended else "dim"), status
