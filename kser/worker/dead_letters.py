from kser import headers as h
from kser.transport import OutRecord


def dead_letter(record, topic, *, error, kmsg, attempt, group, worker, now_ms, max_bytes=900_000):
    return OutRecord(
        topic,
        record.key,
        record.value,
        [*record.headers, (h.ERROR, error.stderr.encode()), (h.ATTEMPT, str(attempt).encode())],
    )
