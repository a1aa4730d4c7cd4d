"""Decode + dispatch + a no-op task in one process: ours beside the original kser 0.8.27. Aim: 20 times as fast."""

import json
import subprocess
import timeit
import uuid

from common import HERE, original_python, show

from kser import Controller, Entrypoint, Message, OperationRegistry, Result, Task
from kser.transport import Record
from kser.worker.runner import Runner

registry = OperationRegistry()


class Noop(Entrypoint):
    def run(self):
        return Result(uuid=self.uuid)


class Mine(Controller):
    pass


Mine.register(Noop.path, Noop)


@registry.subscribe
class NoopTask(Task):
    def run(self):
        return Result(uuid=self.uuid)


u = str(uuid.uuid4())


def raw(name: str) -> str:
    return json.dumps(
        {
            "uuid": u,
            "entrypoint": name,
            "params": {"i": 1, "t0": 0},
            "result": {"uuid": u, "retcode": 0, "stdout": "", "stderr": "", "retval": {}},
            "metadata": {},
        }
    )


def microseconds(function, number: int = 20000) -> float:
    return min(timeit.repeat(function, number=number, repeat=5)) / number * 1e6


def main() -> None:
    text = raw(Noop.path)
    assert Mine.run(text).retcode == 0
    message = Message.loads(text)
    runner = Runner(registry.controller, "bench", "bench")
    quiet = Runner(registry.controller, "bench", "bench", events=False)
    record = Record("t", 0, 0, u.encode(), raw(NoopTask.path).encode(), (), 0)
    show("Message.loads", microseconds(lambda: Message.loads(text)), "us")
    show("Entrypoint.from_Message(m).execute()", microseconds(lambda: Noop.from_Message(message).execute()), "us")
    show("Message.to_bytes", microseconds(message.to_bytes), "us")
    ours = microseconds(lambda: Mine.run(text))
    show("Controller.run", ours, "us")
    show("Runner.run (worker, no events)", microseconds(lambda: quiet.run(record)), "us")
    show("Runner.run (worker, with its event)", microseconds(lambda: runner.run(record)), "us")
    peer = subprocess.run(
        [original_python(), str(HERE / "peers" / "original_in_process.py")],
        check=True,
        timeout=300,
        capture_output=True,
        text=True,
    )
    theirs = float(peer.stdout)
    show("kser 0.8.27 Controller.run without its lock file", theirs, "us")
    show("ratio", theirs / ours, "times", "aim: 20")


if __name__ == "__main__":
    main()
