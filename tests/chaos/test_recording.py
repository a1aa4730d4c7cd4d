"""Workers and recorders are killed (-9) while operations run: the storage tells what the topics tell, step by step."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.chaos.recording import Recording


def run(recording, operations, *, kills, limit_s, over_s=0):
    """Launch the operations ``over_s`` seconds; after so many kills, and the last launch, there are no more."""
    with recording, ThreadPoolExecutor(1) as pool:
        launching = pool.submit(recording.launch, operations, over_s)
        recording.kill_until(lambda: recording.kills >= kills and launching.done(), seed=1, pace_s=1.5, limit_s=limit_s)
        launching.result(limit_s)
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
    run(Recording(apache.bootstrap_servers, url, tmp_path, topic), 2000, kills=20, limit_s=600, over_s=40)
