"""Workers and recorders are killed (-9) while operations run: the storage tells what the topics tell, step by step."""

import pytest

from tests.chaos.recording import Recording


def run(recording, operations, *, kills, limit_s):
    """``kills``: after so many they stop; None: when all operations have ended."""
    with recording:
        recording.launch(operations)

        def done():
            return recording.kills >= kills if kills else recording.ended() >= operations

        recording.kill_until(done, seed=1, pace_s=1.5, limit_s=limit_s)
        recording.wait_ended(limit_s)
        recording.compare()


def test_on_the_embedded_broker_the_storage_equals_the_topics(embedded, tmp_path, make_topic):
    topic = make_topic(embedded, 3, "recorded")
    for name in ("events", "telemetry"):
        embedded.create_topic(f"{topic}.{name}", 3)
    run(
        Recording(embedded.bootstrap_servers, f"sqlite:///{tmp_path}/kser.db", tmp_path, topic, ()),
        60,
        kills=5,
        limit_s=60,
    )


def test_on_apache_kafka_and_postgresql_the_storage_equals_the_topics(apache, postgresql, tmp_path, make_topic):
    topic = make_topic(apache, 3, "recorded")
    url = postgresql.url(topic.replace("-", "_") + "_")
    run(Recording(apache.bootstrap_servers, url, tmp_path, topic), 60, kills=4, limit_s=90)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_2000_operations_of_3_tasks_on_apache_kafka(apache, postgresql, tmp_path, make_topic, database):
    topic = make_topic(apache, 6, "recorded")
    url = postgresql.url(topic.replace("-", "_") + "_") if database == "postgresql" else f"sqlite:///{tmp_path}/kser.db"
    run(Recording(apache.bootstrap_servers, url, tmp_path, topic), 2000, kills=None, limit_s=900)
