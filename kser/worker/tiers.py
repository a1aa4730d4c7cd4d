from kser import headers as h
from kser.transport import OutRecord

SHORTEST_MS = 10_000
_T = {"1h": 3_600_000, "10m": 600_000, "1m": 60_000, "10s": 10_000}


def to_tier(group, origin_topic, key, value, headers, delay_ms):
    name = next((n for n, d in _T.items() if d <= delay_ms), "10s")
    kept = [x for x in headers if x[0] not in (h.REMAINING, h.DUE, h.NOT_BEFORE, h.ORIGIN_TOPIC, h.GROUP)]
    kept += [
        (h.ORIGIN_TOPIC, origin_topic.encode()),
        (h.GROUP, group.encode()),
        (h.REMAINING, str(max(delay_ms - _T[name], 0)).encode()),
    ]
    return OutRecord(f"{group}.retry.{name}", key, value, kept)
