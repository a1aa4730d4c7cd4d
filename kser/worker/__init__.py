"""The worker: takes messages, runs their tasks, and settles each when what follows from it is confirmed."""

from kser.worker.worker import Worker

__all__ = ["Worker"]
