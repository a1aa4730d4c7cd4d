"""What fails on real brokers and processes: crash loops, attempts under kill -9, dead letters."""

import contextlib
import subprocess
import sys
import time
import uuid
from collections import Counter

import pytest

from kser import control, headers
from kser.confluent.producer import Producer
from kser.confluent.transport import ConfluentTransport
from kser.events import EventType, OperationView, read
from kser.loading import find_class, load
from tests.apps import failing
from tests.processes import ROOT, environment, new_topic, process, records, unfinished, views, wait_for

FAST = ("-X", "session.timeout.ms=3000", "-X", "heartbeat.interval.ms=500")


class Group:
    """Workers of tests.apps.failing on a topic of their own, and what they noted."""

    def __init__(self, bootstrap, folder, partitions):
        self.bootstrap = bootstrap
        self.topic, self.name = new_topic(bootstrap, partitions), f"g{uuid.uuid4().hex[:8]}"
        self.partitions = partitions
        self.runs = folder / "runs"
        self.runs.touch()
        self.log = folder / "workers.log"

    def workers(self, *options, app="tests.apps.failing:registry"):
        return process(
            *("-m", "kser", "worker", app, "--topics", self.topic, "--group", self.name),
            *("--bootstrap-servers", self.bootstrap, "--log-level", "warning", *FAST, *options),
            log=self.log,
            RUNS=str(self.runs),
        )

    def kser(self, *args):
        """A `kser` command, begun."""
        where = ("--bootstrap-servers", self.bootstrap, "--group", self.name)
        return subprocess.Popen(
            [sys.executable, "-m", "kser", *args, *where],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def transport(self):
        return ConfluentTransport({"bootstrap.servers": self.bootstrap})

    def view(self, uuid):
        """What the events say of an operation so far."""
        return views(self.bootstrap, self.name).get(uuid) or OperationView(uuid)

    def noted(self):
        """What ran, and in which process, in the order in which it began."""
        return [line.rsplit(" ", 1) for line in self.runs.read_text().splitlines()]

    def unfinished(self):
        return unfinished(self.bootstrap, self.name, self.topic, self.partitions)

    def dead(self):
        return records(self.bootstrap, f"{self.name}.dlq")

    def events(self):
        return list(read(records(self.bootstrap, f"{self.name}.events")))


@pytest.fixture
def group(apache, tmp_path):
    return lambda partitions=3: Group(apache.bootstrap_servers, tmp_path, partitions)


@pytest.mark.apache
@pytest.mark.parametrize(
    ("culprit", "signal_"),
    [(failing.Aborts, "SIGABRT"), pytest.param(failing.Killed, "SIGKILL", marks=pytest.mark.long)],
)
def test_a_task_that_ends_its_process_ends_in_the_dead_letters_and_its_neighbours_do_not(group, culprit, signal_):
    """Among 2,000 good ones, three workers, each started again when it dies, as by systemd or Kubernetes."""
    at = group()
    with Producer({"bootstrap.servers": at.bootstrap}) as producer:
        failing.registry.configure(producer=producer, topic=at.topic)
        with producer.batch():
            for n in range(2000):
                if n == 1000:
                    culprit(params={}).send()
                failing.Good(params={"n": n}).send()
    with at.workers("--processes", "3"):
        (letter,) = wait_for(at.dead, 120, "the dead letter")
        assert culprit.path in letter.value.decode()
        assert signal_ in headers.text(letter.headers, headers.ERROR)
        wait_for(lambda: len({what for what, _ in at.noted() if what.startswith("good")}) == 2000, 60, "the good ones")
        wait_for(lambda: at.unfinished() <= at.partitions, 60, "all settled")  # markers count as records
    ran = Counter(what for what, _ in at.noted())
    deaths = at.log.read_text().count("was ended by")
    assert deaths == 3
    assert ran[f"{culprit.__name__.lower()} 1"] == deaths + 1  # the last one in a process of its own
    assert len(at.dead()) == 1


@pytest.mark.apache
def test_each_attempt_counts_once_while_workers_are_killed_and_the_exhausted_are_dead_letters_once(group):
    """Messages that fail, with a delay of 1 s and of 10 s, among good ones; two workers, one of them killed twice."""
    at = group()
    bad = 40
    with Producer({"bootstrap.servers": at.bootstrap}) as producer:
        failing.registry.configure(producer=producer, topic=at.topic)
        with producer.batch():
            for n in range(1000):
                failing.Good(params={"n": n}).send()
                if n % 25 == 0:
                    failing.Soon(params={"n": n}).send()
                    failing.Later(params={"n": n, "until": 3 if n % 50 else 1000}).send()
    with at.workers("--name", "one") as first, at.workers("--name", "two"):
        wait_for(lambda: len(retrying(at)) >= bad, 60, "the first failures")
        first.kill()
        first.wait()
        with at.workers("--name", "one") as again:
            wait_for(lambda: len(at.dead()) >= bad // 2, 60, "the first dead letters")
            again.kill()
            again.wait()
            with at.workers("--name", "one"):
                wait_for(
                    lambda: len(at.dead()) >= bad + bad // 2 and at.unfinished() <= 2 * at.partitions, 90, "the end"
                )
    attempts = Counter((event.uuid, event.attempt) for event in retrying(at))
    assert set(attempts.values()) == {1}
    assert Counter(attempt for _, attempt in attempts) == {1: 2 * bad, 2: 2 * bad}
    assert len(at.dead()) == len({letter.key for letter in at.dead()}) == bad + bad // 2
    done = Counter(event.uuid for event in at.events() if event.type == EventType.STEP_DONE)
    assert (len(done), set(done.values())) == (1000 + bad // 2, {1})


@pytest.mark.apache
def test_delayed_messages_that_fell_due_while_no_worker_ran_run_once(group):
    at = group()
    count = 500
    with Producer({"bootstrap.servers": at.bootstrap}) as producer:
        failing.registry.configure(producer=producer, topic=at.topic)
        with producer.batch():
            for n in range(count):
                failing.Good(params={"n": n}).send(delay=41 + n % 3)  # a worker keeps what is due within 30 s
        sent = time.time()
        with at.workers():  # it puts them into a tier, where they wait for the broker's clock
            tier = f"{at.name}.retry.10s"
            wait_for(lambda: len(records(at.bootstrap, tier)) >= count, 30, "the tier")
        assert not at.noted()
        time.sleep(max(sent + 44 - time.time(), 0))  # what they wait for is the time itself
        with at.workers("--processes", "2"):
            wait_for(lambda: len(at.noted()) >= count, 60, "all of them")
            wait_for(lambda: at.unfinished() <= at.partitions, 30, "all settled")
    assert Counter(what for what, _ in at.noted()) == {f"good {n} 1": 1 for n in range(count)}
    done = Counter(event.uuid for event in at.events() if event.type == "step.done")
    assert len(done) == count
    assert set(done.values()) == {1}


@pytest.mark.apache
def test_an_operation_resumed_twice_at_once_runs_once_more_from_the_step_that_failed(group):
    """By two processes at the same time; an abort of the run that failed, sent before, does not stop the new run."""
    at = group()
    with Producer({"bootstrap.servers": at.bootstrap}) as producer:
        failing.registry.configure(producer=producer, topic=at.topic)
        operation = failing.Fifth().build()
        assert operation.launch().retcode == 0
        with at.workers("--processes", "2"):
            wait_for(lambda: at.view(operation.uuid).status == "FAILED", 60, "its failure")
            told = control.abort(operation.uuid, run=1, group=at.name, transport=at.transport())
            assert told.abort.run == 1
            resume = ("operations", "resume", operation.uuid, "--params", '{"well": true}')
            both = [at.kser(*resume) for _ in range(2)]
            said = [child.communicate(timeout=60) for child in both]
            assert 0 in [child.returncode for child in both], said
            view = wait_for(lambda: (v := at.view(operation.uuid)).run == 2 and v.ended and v, 60, f"its end: {said}")
            wait_for(lambda: at.unfinished() <= 2 * at.partitions, 30, "all settled")
    assert view.status == "SUCCESS"
    ran = Counter(what.split()[1].removeprefix(f"{operation.uuid}.") for what, _ in at.noted())
    assert ran == {"1": 1, "2": 1, "3": 2, "4": 1, "5": 1}
    started = [event for event in at.events() if event.type == EventType.OPERATION_STARTED]
    assert Counter(event.run for event in started) == {1: 1, 2: 1}


LAUNCHES = """
import sys
from kser.confluent.producer import Producer
from tests.apps import failing

with Producer({"bootstrap.servers": sys.argv[1]}) as producer:
    failing.registry.configure(producer=producer, topic=sys.argv[2])
    for _ in range(50):
        operation = failing.Fifth(params={"well": True}, idempotency_key="order 7").build()
        assert operation.launch().retcode == 0
    print(operation.uuid)
"""


@pytest.mark.apache
def test_a_key_launched_200_times_by_four_processes_during_rebalances_starts_one_operation(group):
    at = group()
    with at.workers("--name", "one") as one, contextlib.ExitStack() as more:
        launching = [
            subprocess.Popen(
                [sys.executable, "-c", LAUNCHES, at.bootstrap, at.topic],
                cwd=ROOT,
                env=environment(),
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(4)
        ]
        more.enter_context(at.workers("--name", "two"))
        more.enter_context(at.workers("--name", "three"))
        wait_for(at.noted, 60, "the first step")
        one.terminate()
        uuids = {child.communicate(timeout=60)[0].strip() for child in launching}
        assert [child.returncode for child in launching] == [0] * 4
        (name,) = uuids
        wait_for(lambda: at.view(name).ended, 60, "its end")
        wait_for(lambda: at.unfinished() <= 2 * at.partitions, 60, "all settled")
    assert at.view(name).status == "SUCCESS"
    assert Counter(what.split()[1].removeprefix(f"{name}.") for what, _ in at.noted()) == dict.fromkeys("12345", 1)
    assert Counter(event.type for event in at.events()) == {
        EventType.OPERATION_STARTED: 1,
        EventType.STEP_DONE: 5,
        EventType.OPERATION_ENDED: 1,
    }


OLD_RELEASE = """
from kser import Operation, OperationRegistry, Task
registry = OperationRegistry()

@registry.subscribe(name="shop.Reserve")
class Reserve(Task):
    def run(self): pass

@registry.subscribe(name="shop.Pay")
class Pay(Task):
    def run(self): pass

@registry.subscribe(name="shop.Order")
class Order(Operation):
    def build_tasks(self, **params):
        return [Reserve(), Pay(), Reserve()]
"""
NEW_RELEASE = """
from kser import Operation, OperationRegistry, Task
registry = OperationRegistry()

@registry.subscribe(name="shop.Reserve")
class Reserve(Task):
    def run(self): pass

@registry.subscribe(name="shop.Charge", aliases=["shop.Pay"])
class Charge(Task):
    def run(self): pass

@registry.subscribe(name="shop.Order", aliases=["shop.OldOrder"])
class Order(Operation):
    def build_tasks(self, **params):
        return [Reserve(), Charge(), Reserve()]

@registry.subscribe(name="shop.Gift")
class Gift(Operation):
    def build_tasks(self, **params):
        return [Charge(), Order()]
"""


@pytest.mark.apache
def test_a_rolling_deploy_loses_no_operation_of_either_release(group, tmp_path):
    """Workers of the old release are replaced one by one; operations of both are launched all the while."""
    at = group(partitions=4)
    releases = {}
    for name, text in (("old", OLD_RELEASE), ("new", NEW_RELEASE)):
        releases[name] = tmp_path / f"{name}.py"
        releases[name].write_text(text)
    new = load(f"{releases['new']}:registry")
    old = load(f"{releases['old']}:registry")
    launched = []

    def launch(count):
        with Producer({"bootstrap.servers": at.bootstrap}) as producer, producer.batch():
            for loaded, name in ((old, "shop.Order"), (new, "shop.Order"), (new, "shop.Gift")):
                loaded.configure(producer=producer, topic=at.topic)
                for _ in range(count):
                    operation = find_class(loaded, name)().build()
                    operation.launch()
                    launched.append(operation.uuid)

    def workers(release):
        return at.workers("--drain", "5", app=f"{releases[release]}:registry")

    with workers("old") as first, workers("old") as second:
        launch(20)
        wait_for(lambda: any(view.ended for view in views(at.bootstrap, at.name).values()), 60, "the first end")
        with workers("new"):
            first.terminate()
            assert first.wait(30) == 0
            launch(20)
            with workers("new"):
                second.terminate()
                assert second.wait(30) == 0
                launch(20)
                wait_for(
                    lambda: sum(view.ended for view in views(at.bootstrap, at.name).values()) >= len(launched),
                    90,
                    "all ends",
                )
    found = views(at.bootstrap, at.name)
    assert set(found) == set(launched)
    assert Counter(view.status for view in found.values()) == {"SUCCESS": len(launched)}
    waited = [event for event in at.events() if event.type == EventType.MESSAGE_WAITING]
    assert waited
    assert all("not registred" in event.note for event in waited), waited[0].note


def retrying(at):
    return [event for event in at.events() if event.type == EventType.STEP_RETRYING]
