"""The hand-off that most are: a task in the middle of an operation succeeded, and the next one is an entry like most.

Itinerary and Sequencer make the same of it, byte for byte (a property test holds them to that), at three times the
cost: this works on the JSON data as it came.
"""

from typing import Any

from kser.sequencing.itinerary import METADATA_KEY, VERSION

__all__ = ["is_plain", "next_step"]

#: Fields that every itinerary has, and every frame: four each.
_LEAST = 4
_ITINERARY = frozenset({"v", "run", "position", "ops", "new", "key", "tasks"})


def is_plain(data: Any) -> bool:
    """Whether this itinerary can be read without Itinerary: it is of this version, and each field is what it should be.

    Of the entries still to run only next_step() looks at one, as ever.
    """
    # By subscript what is always there: several times as fast as get(), and there are a dozen of them for each message.
    try:
        if (
            type(data) is not dict
            or type(data["v"]) is not int
            or data["v"] != VERSION
            or type(data["run"]) is not int
            or type(data["position"]) is not int
            or (len(data) > _LEAST and not _has_plain_options(data))
        ):
            return False
        ops = data["ops"]
        if type(ops) is not list or not ops:
            return False
        for frame in ops:
            if (
                type(frame) is not dict
                or type(frame["uuid"]) is not str
                or type(frame["entrypoint"]) is not str
                or type(frame["params"]) is not dict
                or type(frame["tasks"]) is not list
                or (
                    len(frame) > _LEAST
                    and (
                        type(frame.get("topic", "")) is not str
                        or type(frame.get("key", "")) is not str
                        or type(frame.get("metadata", _NONE)) is not dict
                        or type(frame.get("hooks", True)) is not bool
                    )
                )
            ):
                return False
    except KeyError:
        return False
    return True


def _has_plain_options(data: dict[str, Any]) -> bool:
    return (
        _ITINERARY.issuperset(data)
        and type(data.get("new", False)) is bool
        and type(data.get("key", "")) is str
        and "tasks" not in data
    )


def next_step(data: dict[str, Any], topic: str) -> "tuple[str, str, str, str, dict[str, Any], dict[str, Any]] | None":
    """What follows the success of a task with this plain itinerary.

    Gives topic, key, uuid, entrypoint, params and metadata of the next message; None when the next task is no plain
    entry, or there is none. ``topic``: where the task's message came from.
    """
    ops = data["ops"]
    inner = ops[-1]
    tasks = inner["tasks"]
    if not tasks:
        return None
    entry = tasks[0]
    if type(entry) is not dict or len(entry) != 3:
        return None
    uuid, entrypoint, params = entry.get("uuid"), entry.get("entrypoint"), entry.get("params")
    if type(uuid) is not str or type(entrypoint) is not str or type(params) is not dict:
        return None
    target = key = None
    frames = []
    for frame in ops:
        made = {"uuid": frame["uuid"], "entrypoint": frame["entrypoint"], "params": frame["params"]}
        if frame.get("topic"):
            made["topic"] = target = frame["topic"]
        if frame.get("key"):
            made["key"] = key = frame["key"]
        if frame.get("metadata"):
            made["metadata"] = frame["metadata"]
        if frame.get("hooks"):
            made["hooks"] = True
        made["tasks"] = frame["tasks"]
        frames.append(made)
    frames[-1]["tasks"] = tasks[1:]
    metadata = {
        METADATA_KEY: {"v": VERSION, "run": data["run"], "position": data["position"] + 1, "ops": frames},
    }
    return target or topic, key or ops[0]["uuid"], uuid, entrypoint, params, metadata


#: The default of an optional object; nobody writes into it.
_NONE: dict[str, Any] = {}
