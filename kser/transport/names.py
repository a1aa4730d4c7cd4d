"""Names of topics, as Kafka takes them."""

import re
from typing import Any, Final

__all__ = ["TOPIC_NAME_RULE", "is_topic_name"]

_TOPIC_NAME: Final = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,249}")
#: What a name has to be, to go on after it.
TOPIC_NAME_RULE: Final = "is no topic name: take 1 to 249 of the letters a-z, A-Z, 0-9, '.', '_' and '-'"


def is_topic_name(name: Any) -> bool:
    """Whether Kafka takes this as the name of a topic."""
    return isinstance(name, str) and _TOPIC_NAME.fullmatch(name) is not None
