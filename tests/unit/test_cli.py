"""The command line, in this process: what it understands, where it looks, how it ends. Brokers are in memory."""

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import uuid
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from rich.console import Console

from kser import Message, Result, Worker, headers
from kser.cli import demo as demo_module
from kser.cli import errors, watch
from kser.cli import worker as worker_command
from kser.cli.connection import Drivers, parse_topic
from kser.cli.demo_table import TableView
from kser.cli.demo_view import DemoView
from kser.cli.dice import DiceLaunch, DiceRoll
from kser.cli.logs import configure
from kser.cli.main import cli
from kser.errors import TransportError, ValidationError
from kser.events import Event, EventType, OperationView, events_topic
from kser.loading import find_class, load
from kser.producer import BaseProducer
from kser.transport import OutRecord, TopicSpec
from kser.transport.memory import MemoryTransport
from kser.transport.partitioner import partition_of

SERVERS = ("--bootstrap-servers", "127.0.0.1:1")
SHOP = '''
    import os, signal
    from kser import Operation, OperationRegistry, Result, Task

    registry = OperationRegistry()

    @registry.subscribe
    class Charge(Task):
        """Charge a card.

        More than anyone wants to read in a table.
        """

        REQUIRED_FIELDS = ["amount"]

        def run(self):
            if self.params["amount"] > 100:
                raise ValueError("card refused\\nfor ever")
            return Result(stdout=f"charged {self.params['amount']}")

    @registry.subscribe(topic="mails", aliases=["old.Mail"])
    class Mail(Task):
        def run(self):
            if self.params.get("last"):
                os.kill(os.getpid(), signal.SIGTERM)

    @registry.subscribe
    class Order(Operation):
        TASKS = [Charge]

        def build_tasks(self, **params):
            return [Charge(params=params), Charge(params=params)]

    @registry.subscribe
    class Nothing(Operation):
        pass

    @registry.subscribe
    class Clumsy(Operation):
        def build_tasks(self, **params):
            return [Charge(params={"amount": params["a key that is not there"]})]
'''


@pytest.fixture(autouse=True)
def own_process_state(monkeypatch, tmp_path):
    """What a command changes in its process is put back: directory, sys.path, modules, logging, interrupts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(errors, "_interrupted", threading.Event())
    loggers = [logging.getLogger(name) for name in ("", "kser.producer", "kser.confluent")]
    before = [(logger, logger.level, list(logger.handlers)) for logger in loggers]
    modules = set(sys.modules)
    yield
    for name in set(sys.modules) - modules:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers


@pytest.fixture
def broker():
    made = MemoryTransport()
    made.admin().create([TopicSpec(name="shop", partitions=2), TopicSpec(name="mails", partitions=1)])
    return made


@pytest.fixture
def drivers(broker):
    """A broker in memory in place of Kafka; ``configs`` has the settings it was asked for with."""

    configs = []

    def transport(config):
        configs.append(dict(config))
        return broker

    def producer(config):
        return BaseProducer(transport(config).sink())

    class Recorded(Drivers):
        @property
        def configs(self):
            return configs

    return Recorded(transport, producer)


@pytest.fixture
def run(drivers):
    """``run("send", ...)`` is the result of the command ``kser send ...``."""

    def invoke(*args, obj=drivers, **options):
        return CliRunner().invoke(cli, [str(arg) for arg in args], obj=obj, **options)

    return invoke


@pytest.fixture
def app(tmp_path):
    """``app(text)`` writes a Python file of a name that no other test has; its path, relative to here."""

    def write(text=SHOP, name=None):
        path = tmp_path / (name or f"app_{uuid.uuid4().hex[:8]}.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path.relative_to(tmp_path)

    return write


def messages(broker, topic):
    return [Message.loads(record.value) for record in broker.records(topic)]


def error_line(result):
    """The one line on stderr of a command that failed."""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("kser: error: ")
    return lines[0].removeprefix("kser: error: ")


def all_commands(group=cli, path=()):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from all_commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(all_commands())


# -- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [(), ("topics",), *COMMANDS])
def test_help_of_each_command_has_an_example_to_copy(run, path):
    result = run(*path, "--help")
    assert result.exit_code == 0
    after = result.output.partition("Example:\n")[2].splitlines()
    assert after
    assert all(re.match(r"    kser( |$)", line) for line in after)


@pytest.mark.parametrize("path", list(COMMANDS))
def test_each_option_reads_a_variable_of_its_name(path):
    """But --topic of the broker, and what is paused: KSER_TOPIC is where messages are sent.

    And --level of the logs, which is not that of one's own log lines.

    And --port: in Kubernetes a service called kser sets KSER_PORT. And what `kser dev` has of its own: it must not
    write into the history that a shell is set up for.
    """
    for option in COMMANDS[path].params:
        if not isinstance(option, click.Option) or option.opts[0] == "-X":
            continue
        long = next(name for name in option.opts if name.startswith("--"))
        own = {(("broker",), "--topic"): "KSER_BROKER_TOPIC"}
        own |= {(("web",), "--token"): "KSER_WEB_TOKEN"} | {
            ((command,), f"--{what}"): f"KSER_HTTP_{what.upper()}"
            for command in ("web", "dev")
            for what in ("host", "port")
        }
        own |= {(("dev",), f"--{what}"): f"KSER_DEV_{what.upper()}" for what in ("topics", "group", "storage")}
        own[("logs",), "--level"] = "KSER_LOGS_LEVEL"
        for command in ("pause", "resume"):
            own |= {((command,), f"--{what}"): f"KSER_PAUSE_{what.upper()}" for what in ("topic", "task", "worker")}
        assert option.envvar == own.get((path, long), "KSER_" + long[2:].upper().replace("-", "_"))
        assert option.show_envvar


def test_the_examples_of_the_help_are_commands_that_exist():
    for path, command in [((), cli), *COMMANDS.items()]:
        for line in (command.epilog or "").splitlines()[2:]:
            words = line.split()
            name = tuple(words[1:3]) if tuple(words[1:3]) in COMMANDS else (words[1],)
            assert name in COMMANDS, (path, line)
            known = {flag for option in COMMANDS[name].params for flag in (*option.opts, *option.secondary_opts)}
            assert {word for word in words if word.startswith("--")} <= known, line


COMMANDS_PAGE = (Path(__file__).resolve().parents[2] / "docs" / "commands.md").read_text("utf-8")


def section_of_the_page(title):
    """What docs/commands.md says below this heading."""
    [found] = re.findall(rf"^## {title}$(.*?)(?=^## |\Z)", COMMANDS_PAGE, re.MULTILINE | re.DOTALL)
    return found


def options_in(section):
    """Each option of the tables of a section, and the rest of its row."""
    rows = re.findall(r"^\| (`-.*)$", section, re.MULTILINE)
    return {name: row for row in rows for name in re.findall(r"`(-[-\w]+)[^`]*`", row.split(" | ")[0])}


@pytest.mark.parametrize("path", list(COMMANDS))
def test_the_page_of_the_commands_has_each_option_and_no_other(path):
    shared = options_in(section_of_the_page("Options of many commands"))
    own = options_in(section_of_the_page(" ".join(("kser", *path))))
    there = [option for option in COMMANDS[path].params if isinstance(option, click.Option)]
    names = {name for option in there for name in (*option.opts, *option.secondary_opts)}
    assert set(own) | (names & set(shared)) == names
    assert not set(own) & set(shared)
    for option in there:  # a default that the help shows is the one of the page
        if option.opts[0] in own and option.show_default and not isinstance(option.default, bool):
            assert own[option.opts[0]].split(" | ")[1].strip("`") == str(option.default)


def test_the_page_of_the_commands_has_a_section_for_each_and_every_exit_code():
    titles = re.findall(r"^## kser (.*)$", COMMANDS_PAGE, re.MULTILINE)
    assert sorted(titles) == sorted(" ".join(path) for path in COMMANDS)
    exit_code = re.compile(r"^\| (\d+) \|", re.MULTILINE)
    assert exit_code.findall(section_of_the_page("Exit codes")) == ["0", "1", "2", str(errors.INTERRUPTED)]
    codes = [0, errors.FAILED, errors.MISUSE, worker_command.TWIN, worker_command.LEFT]
    assert exit_code.findall(section_of_the_page("kser worker")) == list(map(str, codes))


@pytest.mark.parametrize("path", [(), ("topics",)])
def test_a_group_alone_shows_its_help_and_counts_as_misused(run, path):
    result = run(*path)
    assert result.exit_code == 2
    assert "Commands:" in result.stderr
    assert result.stdout == ""


def test_help_loads_no_kafka_client_and_no_other_heavy_package():
    code = (
        "import sys; from kser.cli.main import cli\n"
        "try: cli(['launch', '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'confluent_kafka', 'flask', 'yaml', 'rich', 'sqlalchemy', 'kser.confluent.transport'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert child.stdout.splitlines()[-1] == "HEAVY []"


def test_python_m_kser_is_the_command_too():
    child = subprocess.run(
        [sys.executable, "-m", "kser", "--version"], capture_output=True, text=True, timeout=60, check=True
    )
    assert child.stdout.startswith("kser ")


# -- misuse ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["sned"], "'sned'"),
        (["send"], "Missing argument 'ENTRYPOINT'"),
        (["send", "", "--topic", "t", *SERVERS], "'': write the name of a task, as `kser tasks` shows it"),
        (["send", " \n", "--topic", "t", *SERVERS], "' \\n': write the name of a task"),
        (["send", "x", "--frob"], "--frob"),
        (["send", "x", *SERVERS], "No topic is named: add --topic"),
        (["send", "x", "--topic", "t"], "No broker is named: add --bootstrap-servers HOST:PORT"),
        (["send", "x", "--topic", "t", "--timeout", "0"], "--timeout"),
        (["send", "x", "--topic", "t", "--params", "{a"], "not JSON: Expecting property name"),
        (["send", "x", "--topic", "t", "--params", "[1]"], "a JSON array, and parameters have names"),
        (["send", "x", "--topic", "t", "--params", "null"], "a JSON null"),
        (["send", "x", "--topic", "t", "--params", '{"a": NaN}'], "JSON has no NaN"),
        (["send", "x", "--topic", "t", "--params", "@nowhere.json"], "nowhere.json cannot be read"),
        (["send", "x", "--topic", "t", "-X", "acks", *SERVERS], "-X acks: write -X name=value"),
        (["send", "x", "--topic", "t", "--config-file", "nowhere.yml"], "nowhere.yml cannot be read"),
        (["worker", "nowhere.py", "--topics", "t", *SERVERS], "There is no file"),
        (["worker", "nowhere.py", *SERVERS], "No topics are named: add --topics a,b"),
        (["worker", "nowhere.py", "--topics", "t"], "No broker is named"),
        (["worker", "nowhere.py", "--topics", " , ", *SERVERS], "has no name in it"),
        (["tasks", "no_such_module_here"], "There is no module no_such_module_here in "),
        (["tasks", ":registry"], "':registry' names no module: write MODULE_OR_FILE:REGISTRY"),
        (["tasks", ":x"], "':x' names no module"),
        (["tasks", ""], "'' names no module: write MODULE_OR_FILE:REGISTRY, as in app.py:registry"),
        (["tasks", ":"], "':' names no module"),
        (["tasks", "."], "'.' names no module"),
        (["tasks", ".."], "'..' names no module"),
        (["tasks", ".app:registry"], "'.app' names no module"),
        (["tasks", "app.:registry"], "'app.' names no module"),
        (["tasks", "a..b"], "'a..b' names no module"),
        (["tasks", "x" * 5000], "There is no module xxx"),
        (["tasks", "x" * 5000 + ".py"], "There is no file /"),
        (["tasks", "/dev/null"], "There is no file /dev/null"),
        (["tasks", "\udcff"], "There is no module \\udcff"),
        (["tasks", "json:"], "json has no OperationRegistry"),
        (["tasks", "json:."], "json has no .; it has no OperationRegistry at all"),
        (["launch", ".", "Order", "--topic", "t", *SERVERS], "'.' names no module"),
        (["worker", "", "--topics", "t", *SERVERS], "'' names no module"),
        (["topics", "check", "--topics", "a:x", *SERVERS], "'a:x': write name:partitions, as in orders:6"),
        (["topics", "create", "--topics", "a:0", *SERVERS], "'a:0': write name:partitions"),
        (["broker", "--topic", "a:"], "'a:': write name:partitions"),
        (["demo", "--workers", "99"], "--workers"),
    ],
)
def test_misuse_is_told_in_one_line_with_exit_code_2(run, args, said):
    result = run(*args)
    assert result.exit_code == 2
    assert said in error_line(result)
    assert result.stdout == ""


def test_a_usage_error_names_the_help_of_its_command():
    line = error_line(CliRunner().invoke(cli, ["topics", "check", "--frob"], prog_name="kser"))
    assert line.endswith("Try: kser topics check --help")


def test_a_secret_in_params_that_are_not_json_is_not_repeated(run):
    assert "hunter2" not in run("send", "x", "--topic", "t", "--params", '{"password": "hunter2"').stderr


def test_the_traceback_is_shown_when_KSER_DEBUG_asks_for_it(run, app):
    path = app("raise RuntimeError('boom')")
    assert "Traceback" not in run("tasks", path).stderr
    assert "RuntimeError: boom" in run("tasks", path, env={"KSER_DEBUG": "1"}).stderr.split("kser: error:")[0]


def test_an_unexpected_exception_is_told_in_one_line_with_exit_code_1(run, drivers):
    def producer(config):
        raise ZeroDivisionError("of\nall things")

    result = run("send", "x", "--topic", "t", *SERVERS, obj=Drivers(drivers.transport, producer))
    assert result.exit_code == 1
    assert error_line(result).startswith("ZeroDivisionError: of all things (")


def test_ctrl_c_ends_quietly_with_exit_code_130(run, drivers):
    def producer(config):
        raise KeyboardInterrupt

    result = run("send", "x", "--topic", "t", *SERVERS, obj=Drivers(drivers.transport, producer))
    assert result.exit_code == 130
    assert (result.stdout, result.stderr.strip()) == ("", "")


def test_ctrl_c_that_a_client_library_turned_into_something_else_is_ctrl_c(run, drivers):
    def producer(config):
        try:
            errors.interrupt(2, None)
        except KeyboardInterrupt:
            raise SystemError("returned NULL without setting an exception") from None

    result = run("send", "x", "--topic", "t", *SERVERS, obj=Drivers(drivers.transport, producer))
    assert result.exit_code == 130
    assert result.stderr == ""


# -- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "env", "args", "servers"),
    [
        # The file alone.
        ("file:1", {}, [], "file:1"),
        # KSER_KAFKA_* over the file.
        ("file:1", {"KSER_KAFKA_BOOTSTRAP_SERVERS": "kafka:1"}, [], "kafka:1"),
        # The option's own variable over both.
        ("file:1", {"KSER_KAFKA_BOOTSTRAP_SERVERS": "kafka:1", "KSER_BOOTSTRAP_SERVERS": "env:1"}, [], "env:1"),
        # What was typed over what was set.
        ("file:1", {"KSER_BOOTSTRAP_SERVERS": "env:1"}, ["-X", "bootstrap.servers=x:1"], "x:1"),
        # The option over the property.
        (None, {}, ["-X", "bootstrap.servers=x:1", "--bootstrap-servers", "typed:1"], "typed:1"),
        # The second name of a property is the same property.
        (None, {}, ["-X", "metadata.broker.list=x:1", "--bootstrap-servers", "typed:1"], "typed:1"),
        # An empty variable is none.
        ("file:1", {"KSER_BOOTSTRAP_SERVERS": ""}, [], "file:1"),
    ],
)
def test_options_win_over_KSER_KAFKA_and_that_over_the_file(run, drivers, tmp_path, file, env, args, servers):
    if file:
        Path("kser.yml").write_text(f"kafka:\n  metadata.broker.list: {file}\n  client.id: shop\n")
        args = [*args, "--config-file", "kser.yml"]
    result = run("send", "x", "--topic", "shop", *args, env=env)
    assert result.exit_code == 0, result.stderr
    assert drivers.configs[-1] == {"bootstrap.servers": servers} | ({"client.id": "shop"} if file else {})


def test_an_unknown_kafka_variable_is_named(run):
    result = run("send", "x", "--topic", "t", *SERVERS, env={"KSER_KAFKA_SASL_PASWORD": "x"})
    assert result.exit_code == 2
    assert "KSER_KAFKA_SASL_PASWORD" in error_line(result)
    assert "KSER_KAFKA_SASL_PASSWORD" in result.stderr


def test_an_unknown_property_is_named_by_the_kafka_driver(run):
    result = run("send", "x", "--topic", "t", *SERVERS, "-X", "ack=1", obj=Drivers())
    assert result.exit_code == 2
    assert "Kafka property ack does not exist" in error_line(result)


def test_the_topic_may_come_from_the_file_when_it_names_one(run, broker):
    Path("one.yml").write_text("topics: [shop:6]\n")
    Path("two.yml").write_text("topics: [shop, mails]\n")
    assert run("send", "x", *SERVERS, "--config-file", "one.yml").exit_code == 0
    assert [m.entrypoint for m in messages(broker, "shop")] == ["x"]
    assert "No topic is named" in error_line(run("send", "x", *SERVERS, "--config-file", "two.yml"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kafka: [", "bad.yml:1 is not YAML"),
        ("- a", "holds a list: write `kafka:`"),
        ("bootstrap.servers: x", "unknown entry bootstrap.servers; it takes `kafka:` and `topics:`"),
        ("kafka: [a]", "`kafka:` is a list"),
        ("topics: {a: 1}", "`topics:` is a list of names"),
        ("topics: [1]", "`topics:` is a list of names"),
        ("topics: ['a:x']", "topic 'a:x': write name:partitions"),
        (b"\xff", "is not UTF-8"),
    ],
)
def test_a_configuration_file_that_cannot_be_is_told_with_its_name(run, text, said):
    Path("bad.yml").write_bytes(text if isinstance(text, bytes) else text.encode())
    result = run("send", "x", "--topic", "t", *SERVERS, "--config-file", "bad.yml")
    assert result.exit_code == 2
    line = error_line(result)
    assert line.startswith("Configuration file bad.yml")
    assert said in line


def test_a_topic_with_partitions_is_read_and_a_pattern_is_left_alone():
    assert parse_topic("orders:6") == ("orders", 6)
    assert parse_topic(" orders ") == ("orders", None)
    assert parse_topic("^orders.(?:a|b)") == ("^orders.(?:a|b)", None)


def test_the_format_of_kser_itself_counts_for_its_commands_unless_they_have_their_own(run, app):
    path = app()
    assert run("--format", "json", "tasks", path).stdout.startswith("[")
    assert run("tasks", path, env={"KSER_FORMAT": "json"}).stdout.startswith("[")
    assert run("--format", "json", "tasks", path, "--format", "human").stdout.startswith("NAME")
    assert run("--format", "human", "tasks", path, env={"KSER_FORMAT": "json"}).stdout.startswith("NAME")


@pytest.mark.parametrize(
    ("args", "env", "level"),
    [
        (["tasks"], {}, logging.WARNING),
        (["tasks", "--log-level", "DEBUG"], {}, logging.DEBUG),
        (["--log-level", "error", "tasks"], {}, logging.ERROR),
        (["--log-level", "error", "tasks", "--log-level", "info"], {}, logging.INFO),
        (["tasks"], {"KSER_LOG_LEVEL": "INFO"}, logging.INFO),
        (["--log-level", "error", "tasks"], {"KSER_LOG_LEVEL": "INFO"}, logging.ERROR),
    ],
)
def test_the_log_level_is_the_nearest_that_was_said(run, app, args, env, level):
    result = run(*args, app(), env=env)
    assert result.exit_code == 0
    assert logging.getLogger().level == level
    assert ("Operation registry: loaded" in result.stderr) == (level <= logging.INFO)


def test_what_looks_secret_is_masked_in_what_is_logged_and_in_the_traceback_below_it(capsys):
    configure("info")
    try:
        raise ValueError("refused: {'db_password': 'hunter2'}")
    except ValueError:
        logging.getLogger("shop").exception("no luck with %s", "postgresql://ann:hunter2@host/db")
    told = capsys.readouterr().err
    assert "hunter2" not in told
    assert "no luck with postgresql://ann:********@host/db" in told
    assert "ValueError: refused: {'db_password': ********}" in told


# -- loading ---------------------------------------------------------------------------------------------------------


def test_a_registry_is_found_by_file_and_by_module_with_and_without_its_name(app):
    stem = app().stem
    registry = load(f"{stem}.py:registry")
    assert load(f"{stem}.py") is load(stem) is load(f"{stem}:registry") is registry
    assert list(registry.tasks())[:2] == [f"{stem}.Charge", f"{stem}.Mail"]


def test_a_file_is_imported_under_its_stem_and_its_neighbours_can_be_imported(app):
    app("from kser import OperationRegistry\nregistry = OperationRegistry()\n", "deep/er/neighbour.py")
    path = app("import neighbour\nregistry = neighbour.registry", f"deep/er/app_{uuid.uuid4().hex[:8]}.py")
    assert load(str(path)) is sys.modules["neighbour"].registry
    assert path.stem in sys.modules


def test_a_file_inside_a_package_has_the_name_that_importers_of_the_package_know(app):
    package = f"pack_{uuid.uuid4().hex[:8]}"
    app("", f"{package}/__init__.py")
    app("from kser import OperationRegistry\nshared = OperationRegistry()", f"{package}/common.py")
    path = app(
        "from kser import Task\nfrom .common import shared\n@shared.subscribe\nclass Pay(Task): pass",
        f"{package}/tasks.py",
    )
    assert f"{package}.tasks.Pay" in load(f"{path}:shared").tasks()


def test_the_classes_of_a_file_answer_to_main_as_well_and_those_of_a_module_do_not(app):
    stem = app().stem
    assert "__main__.Charge" not in load(stem).tasks()
    tasks = load(f"{stem}.py").tasks()
    assert tasks["__main__.Charge"] is tasks[f"{stem}.Charge"]


def test_a_main_alias_that_is_taken_already_stays(app):
    path = app("""
        from kser import OperationRegistry, Task
        registry = OperationRegistry()
        @registry.subscribe(name="__main__.Two")
        class One(Task): pass
        @registry.subscribe
        class Two(Task): pass
    """)
    tasks = load(str(path)).tasks()
    assert tasks["__main__.Two"].__name__ == "One"


def test_an_overridden_load_tasks_is_called_as_init_app_would(app):
    path = app("""
        from kser import OperationRegistry, Task
        class Registry(OperationRegistry):
            def load_tasks(self):
                @self.subscribe(name="late")
                class Late(Task): pass
        registry = Registry()
    """)
    assert next(iter(load(str(path)).tasks())) == "late"


@pytest.mark.parametrize(
    ("text", "attribute", "said"),
    [
        ("from kser import OperationRegistry as R\na, b = R(), R()", "", "has 2 registries, a, b: write which, as in "),
        ("x = 1", "", "has no OperationRegistry"),
        ("x = 1", ":x", "is a int, not an OperationRegistry"),
        ("from kser import OperationRegistry as R\na = R()", ":b", "has no b; it has a"),
        ("\nimport no_such_module_here", "", ".py:2: ModuleNotFoundError: No module named 'no_such_module_here'"),
        ("\n\nraise RuntimeError('boom')", "", ".py:3: RuntimeError: boom"),
        ("import json\njson.loads('{')", "", ".py:2: JSONDecodeError: "),
        ("x = (", "", ".py:1: SyntaxError: '(' was never closed"),
        ("import sys\nsys.exit('bye')", "", ".py:2: SystemExit: bye"),
        ("from kser.errors import NotFound\nraise NotFound('no card')", "", ".py:2: NotFound: no card"),
        (
            "from kser import OperationRegistry as R\nclass S(R):\n  def load_tasks(self): 1/0\nr = S()",
            "",
            ".py:3: ZeroDivisionError",
        ),
    ],
)
def test_what_cannot_be_loaded_is_told_with_its_place_and_exit_code_2(run, app, text, attribute, said):
    path = app(text)
    result = run("tasks", f"{path}{attribute}")
    assert result.exit_code == 2
    assert said in error_line(result)
    assert path.stem not in sys.modules or "raise" not in text


def test_a_module_that_fails_is_told_like_a_file(run, app):
    stem = app("\n1/0").stem
    assert f"{stem}.py:2: ZeroDivisionError" in error_line(run("tasks", stem))


def test_a_file_named_like_a_loaded_module_is_refused(run, app):
    result = run("tasks", app("x = 1", "json.py"))
    assert result.exit_code == 2
    assert "would be module json" in error_line(result)
    assert sys.modules["json"] is json


@pytest.mark.parametrize("package", [True, False])
def test_a_directory_is_told_from_a_module_and_a_file(run, app, tmp_path, package):
    name = f"shop_{uuid.uuid4().hex[:8]}"
    (tmp_path / name).mkdir()
    if package:
        (tmp_path / name / "__init__.py").touch()
    for given in (f"{name}/", f"./{name}", str(tmp_path / name), f"{name}/:registry"):
        result = run("tasks", given)
        assert result.exit_code == 2
        folder = tmp_path / name
        assert error_line(result).startswith(f"{folder} is a directory: name a file in it, as in ")
        assert error_line(result).endswith(f"{name}/app.py:registry")
    result = run("tasks", name)
    assert result.exit_code == 2
    assert error_line(result) == (
        f"{name} has no OperationRegistry: make one, registry = OperationRegistry()"
        if package
        else f"{name} is a directory: name a module in it, as in {name}.app:registry"
    )


def test_a_module_that_is_only_a_file_here_is_hinted_at(run, app):
    app("registry = 1", "half-way.py")
    assert error_line(run("tasks", "half-way.missing")).startswith("There is no module half-way")


def test_a_class_is_found_by_its_full_name_an_alias_or_its_own_name(app):
    registry = load(str(app()))
    charge = find_class(registry, "Charge")
    assert find_class(registry, charge.path) is charge
    assert find_class(registry, "__main__.Charge") is charge
    assert find_class(registry, "old.Mail").__name__ == "Mail"
    with pytest.raises(ValidationError, match="Chrage is not registered: did you mean Charge"):
        find_class(registry, "Chrage")
    with pytest.raises(ValidationError, match=r"XYZ is not registered: there is app_.*Charge, app_.*Clumsy"):
        find_class(registry, "XYZ")


def test_a_class_name_that_two_modules_have_is_refused_with_both(app):
    registry = load(
        str(
            app("""
                from kser import OperationRegistry, Task
                registry = OperationRegistry()
                for module in ("one", "two"):
                    registry.subscribe(type(Task)("Pay", (Task,), {"__module__": module}))
            """)
        )
    )
    with pytest.raises(ValidationError, match=r"Pay may be one\.Pay, two\.Pay: write one of these"):
        find_class(registry, "Pay")


# -- kser tasks ------------------------------------------------------------------------------------------------------


def test_tasks_shows_names_kinds_topics_required_fields_and_the_first_line_of_the_docstring(run, app):
    path = app()
    rows = {row["name"].rpartition(".")[2]: row for row in json.loads(run("tasks", path, "--format", "json").stdout)}
    assert rows["Charge"] == {
        "name": f"{path.stem}.Charge",
        "aliases": ["__main__.Charge"],
        "kind": "task",
        "topic": None,
        "required": ["amount"],
        "doc": "Charge a card.",
    }
    assert rows["Mail"]["topic"] == "mails"
    assert rows["Mail"]["aliases"] == ["old.Mail", "__main__.Mail"]
    assert rows["Order"]["kind"] == "operation"
    assert rows["Order"]["required"] == ["amount"]
    lines = run("tasks", path).stdout.splitlines()
    assert lines[0].split() == ["NAME", "KIND", "TOPIC", "REQUIRED"]
    assert re.search(rf"{path.stem}\.Charge +task +- +amount +Charge a card\.$", "\n".join(lines), re.MULTILINE)


def test_tasks_of_an_empty_registry_says_so(run, app):
    path = app("from kser import OperationRegistry\nregistry = OperationRegistry()")
    assert run("tasks", path).stdout == f"Nothing is registered in {path}\n"
    assert json.loads(run("tasks", path, "--format", "json").stdout) == []


# -- kser send -------------------------------------------------------------------------------------------------------


def test_send_prints_the_uuid_and_where_it_went(run, broker):
    result = run("send", "shop.Charge", "--topic", "shop", "--params", '{"amount": 3}', *SERVERS)
    assert result.exit_code == 0
    [kmsg] = messages(broker, "shop")
    assert (kmsg.entrypoint, kmsg.params) == ("shop.Charge", {"amount": 3})
    assert result.stdout == f"shop.Charge[{kmsg.uuid}] sent to shop\n"
    assert result.stderr == ""


def test_send_as_json_is_one_document(run, broker):
    result = run("send", "x", "--topic", "shop", "--uuid", "u1", "--message-key", "c7", "--format", "json", *SERVERS)
    data = json.loads(result.stdout)
    assert {k: data[k] for k in ("uuid", "entrypoint", "topic")} == {"uuid": "u1", "entrypoint": "x", "topic": "shop"}
    assert data["result"]["retcode"] == 0
    assert [r.key for r in broker.records("shop")] == [b"c7"]


def test_send_takes_parameters_from_a_file_from_stdin_and_from_a_variable(run, broker):
    Path("p.json").write_text('{"from": "file"}')
    assert run("send", "x", "--topic", "mails", "--params", "@p.json", *SERVERS).exit_code == 0
    assert run("send", "x", "--topic", "mails", "--params", "-", *SERVERS, input='{"from": "stdin"}').exit_code == 0
    assert run("send", "x", "--topic", "mails", *SERVERS, env={"KSER_PARAMS": '{"from": "env"}'}).exit_code == 0
    assert [m.params["from"] for m in messages(broker, "mails")] == ["file", "stdin", "env"]


def test_send_that_is_not_confirmed_fails_with_the_reason(run, broker):
    broker.fail_next("delivery", TransportError("the leader has gone fishing"))
    result = run("send", "x", "--topic", "shop", "--uuid", "u1", *SERVERS)
    assert result.exit_code == 1
    assert error_line(result) == "x[u1] is not confirmed in topic shop: the leader has gone fishing"
    assert result.stdout == ""


def test_send_of_a_message_that_is_too_large_fails_with_its_size_and_the_limit(run, broker):
    Path("p.json").write_text(json.dumps({"a": "x" * 1_000_000}))
    result = run("send", "x", "--topic", "shop", "--params", "@p.json", *SERVERS)
    assert result.exit_code == 1
    assert "the limit is 921600" in error_line(result)
    assert broker.records("shop") == []


# -- kser launch -----------------------------------------------------------------------------------------------------


def test_launch_sends_the_first_task_with_what_follows_it(run, app, broker):
    path = app()
    result = run(
        "launch",
        path,
        "Order",
        "--topic",
        "shop",
        "--params",
        '{"amount": 3}',
        "--message-key",
        "c7",
        *SERVERS,
        "--format=json",
    )
    assert result.exit_code == 0, result.stderr
    [record] = broker.records("shop")
    kmsg = Message.loads(record.value)
    frame = kmsg.metadata["kser"]["ops"][0]
    assert (kmsg.entrypoint, record.key, len(frame["tasks"])) == (f"{path.stem}.Charge", b"c7", 1)
    data = json.loads(result.stdout)
    assert data["uuid"] == frame["uuid"]
    assert (data["entrypoint"], data["topic"]) == (f"{path.stem}.Order", "shop")


def test_launched_with_the_same_key_operations_are_one(run, app, broker):
    """They have one uuid, and the worker that meets the second one drops it."""
    path = app()
    told = [
        json.loads(run("launch", path, "Order", "--topic", "shop", "--params", '{"amount": 3}', "--key", key, *SERVERS,
                       "--format=json").stdout)["uuid"]
        for key in ("order 7", "order 7", "order 8")
    ]  # fmt: skip
    assert told[0] == told[1] != told[2]
    claims = sorted(headers.text(r.headers, headers.CLAIM) for r in broker.records("shop"))  # by partition, they come
    assert claims == sorted(f"start:{uuid}" for uuid in told)


def test_a_key_of_a_task_is_refused(run, app, broker):
    result = run("launch", app(), "Mail", "--key", "k", *SERVERS)
    assert (result.exit_code, broker.records("mails")) == (2, [])
    assert "only operations are started once" in error_line(result)


def test_launch_of_a_task_sends_it_to_its_own_topic(run, app, broker):
    path = app()
    result = run("launch", path, "Mail", "--message-key", "c7", *SERVERS)
    assert result.exit_code == 0, result.stderr
    [kmsg] = messages(broker, "mails")
    assert result.stdout == f"{path.stem}.Mail[{kmsg.uuid}] sent to mails\n"
    assert [r.key for r in broker.records("mails")] == [b"c7"]


@pytest.mark.parametrize("name", ["Mail", "Order"])
def test_k102_what_is_launched_is_written_by_the_transport_of_the_registrys_controller(run, app, broker, name):
    secret = """
    from kser import Controller, Message

    class Sealed(Message):
        def dumps(self):
            return "sealed " + super().dumps()

    class Sealing(Controller):
        TRANSPORT = Sealed
    """
    text = SHOP.replace("registry = OperationRegistry()", "registry = OperationRegistry(controller_class=Sealing)")
    path = app(textwrap.dedent(secret) + textwrap.dedent(text))
    assert run("launch", path, name, "--topic", "shop", "--params", '{"amount": 3}', *SERVERS).exit_code == 0
    [record] = broker.records("shop")
    assert record.value.startswith(b"sealed {")


def test_launch_of_a_task_sends_it_elsewhere_when_told_so(run, app, broker):
    assert run("launch", app(), "Mail", "--topic", "shop", *SERVERS).exit_code == 0
    assert (len(broker.records("shop")), len(broker.records("mails"))) == (1, 0)


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["Order", "--topic", "shop"], 2, "Missing parameter: amount for app_"),
        (["Charge", "--topic", "shop"], 2, "Missing parameter: amount"),
        (["Order", "--params", '{"amount": 1}'], 2, "No topic is named: add --topic NAME"),
        (["Odrer", "--topic", "shop"], 2, "did you mean Order?"),
        (["Nothing", "--topic", "shop"], 1, "has nothing to do: its build_tasks() gave no task"),
        (["Clumsy", "--topic", "shop"], 1, ".py:41: KeyError: 'a key that is not there'"),
    ],
)
def test_launch_of_what_cannot_be_built_says_why_and_sends_nothing(run, app, broker, args, code, said):
    result = run("launch", app(), *args, *SERVERS)
    assert result.exit_code == code
    assert said in error_line(result)
    assert broker.records("shop") == []


def test_the_time_that_is_left_is_told_in_hundredths_of_a_second(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(watch.time, "monotonic", lambda: now)
    deadline = watch.Deadline(2)
    left = []
    for passed in (0, 1e-5, 0.0123, 1.9999, 2, 3):
        now = 1000.0 + passed
        left.append(deadline.left)
    assert left == [2, 2, 1.99, 0.01, 0, 0]
    assert watch.Deadline(None).left == float("inf")


def test_launch_that_is_not_confirmed_in_time_says_so_without_a_tail_of_digits(run, app, drivers):
    class Silent(BaseProducer):
        def __init__(self):
            super().__init__(MemoryTransport().sink())

        def send(self, topic, kmsg, timeout=60, *, key=None):
            return Result(retcode=503, stderr=f"no answer within {timeout} s", uuid=kmsg.uuid)

    class Mute(type(drivers)):
        def __init__(self):
            super().__init__(drivers.transport, lambda config: Silent())

    args = ["launch", app(), "Order", "--topic", "shop", "--params", '{"amount": 3}', "--timeout", "2", *SERVERS]
    line = error_line(run(*args, obj=Mute()))
    assert re.search(r"no answer within [12]\.\d\d? s$", line)


def test_launch_that_is_not_confirmed_fails_with_the_reason(run, app, broker):
    broker.fail_next("delivery", TransportError("gone fishing"))
    result = run("launch", app(), "Order", "--topic", "shop", "--params", '{"amount": 3}', *SERVERS)
    assert result.exit_code == 1
    assert error_line(result).endswith("is not confirmed in topic shop: gone fishing")


@pytest.fixture
def working(broker):
    """``working(path)`` runs the registry of a file in a thread until the end of the test, in group shop."""
    started = []

    def start(path):
        worker = Worker(load(str(path)), topics=["shop", "mails"], group="shop", transport=broker, name="w1")
        thread = threading.Thread(target=worker.run)
        thread.start()
        started.append((worker, thread))

    yield start
    for worker, thread in started:
        worker.stop()
        thread.join(20)
        assert not thread.is_alive()


def watched(*args):
    return [*args, "--topic", "shop", "--group", "shop", "--watch", "--timeout", "20", *SERVERS]


def test_launch_watch_shows_each_step_and_ends_with_0_on_success(run, app, working):
    path = app()
    working(path)
    result = run("launch", path, *watched("Order", "--params", '{"amount": 3}'))
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()[2:]) for line in result.stdout.splitlines()[1:]]
    name = path.stem
    assert lines == [
        f"RUNNING {name}.Order started (w1)",
        f"SUCCESS {name}.Charge charged 3 (w1)",
        f"SUCCESS {name}.Charge charged 3 (w1)",
        f"SUCCESS {name}.Order ended (w1)",
    ]
    assert result.stderr == ""


def test_launch_watch_ends_with_1_on_failure_and_names_the_task_and_its_error(run, app, working):
    path = app()
    working(path)
    result = run("launch", path, *watched("Order", "--params", '{"amount": 300}'))
    assert result.exit_code == 1
    line = result.stderr.splitlines()[-1]
    assert re.fullmatch(
        rf"kser: error: {path.stem}\.Order\[[^]]+\] FAILED in {path.stem}\.Charge\[[^]]+\]: card refused", line
    )


@pytest.mark.parametrize("odd", ["mine", ["mine"], 5])
def test_the_failure_of_a_lone_task_is_told_whatever_it_gives_as_failed_task(odd):
    view = OperationView("u", "app.Mail", "FAILED", result=Result(retcode=1, stderr="no", retval={"failed_task": odd}))
    assert watch.describe_failure(view) == "app.Mail[u] FAILED: no"


def test_launch_watch_as_json_is_an_event_a_line_and_nothing_else(run, app, working):
    path = app()
    working(path)
    result = run("launch", path, *watched("Order", "--params", '{"amount": 3}', "--format", "json"))
    events = [Event.loads(line.encode()) for line in result.stdout.splitlines()]
    assert [event.type for event in events] == [
        EventType.OPERATION_STARTED,
        EventType.STEP_DONE,
        EventType.STEP_DONE,
        EventType.OPERATION_ENDED,
    ]
    assert {event.key for event in events} == {events[0].uuid}


def test_launch_watch_of_a_lone_task_ends_with_it(run, app, working):
    path = app()
    working(path)
    assert run("launch", path, *watched("Charge", "--params", '{"amount": 3}')).exit_code == 0
    failed = run("launch", path, *watched("Charge", "--params", '{"amount": 300}'))
    assert failed.exit_code == 1
    assert "Charge[" in failed.stderr
    assert "FAILED: card refused" in failed.stderr


def test_launch_watch_without_a_worker_hints_at_it_and_gives_up_at_the_timeout(run, app, monkeypatch):
    monkeypatch.setattr(watch, "HINT_AFTER_S", 0.1)
    result = run(
        *("launch", app(), "Order", "--topic", "shop", "--group", "g", "--params", '{"amount": 3}'),
        *("--watch", "--timeout", "0.6", *SERVERS),
    )
    assert result.exit_code == 1
    hint, error = result.stderr.splitlines()
    assert hint.startswith("kser: Nothing has ended for 0.1 s: no worker of group g seems to run on topic shop")
    assert re.search(r"has not ended within 0\.6 s: PENDING, 0 step\(s\) done", error)


def test_launch_watch_does_not_mistake_another_operation_for_its_own(run, app, broker):
    """What others do in the same events topic is passed over."""
    stop = threading.Event()

    def noise():
        sink = broker.sink()
        while not stop.wait(0.01):
            other = Event(type=EventType.OPERATION_ENDED, uuid="o", entrypoint="x", operation="o", status="FAILED")
            sink.produce(OutRecord(events_topic("g"), b"o", other.to_bytes()))
            sink.produce(OutRecord(events_topic("g"), b"o", b"no event at all"))
            sink.flush(1)

    thread = threading.Thread(target=noise)
    thread.start()
    try:
        result = run(
            *("launch", app(), "Order", "--topic", "shop", "--group", "g", "--params", '{"amount": 3}'),
            *("--watch", "--timeout", "0.5", *SERVERS),
        )
    finally:
        stop.set()
        thread.join(10)
    assert result.exit_code == 1
    assert len(result.stdout.splitlines()) == 1
    assert "PENDING, 0 step(s) done" in result.stderr


# -- kser worker -----------------------------------------------------------------------------------------------------


def test_worker_runs_what_comes_until_sigterm_and_ends_with_0(run, app, broker):
    path = app()
    assert run("launch", path, "Mail", "--params", '{"last": true}', *SERVERS).exit_code == 0
    result = run("worker", f"{path}:registry", "--topics", "mails:1", "--group", "g1", "--name", "w7", *SERVERS)
    assert result.exit_code == 0, result.stderr
    assert re.search(
        r" INFO     Worker\.Starting\.\.\. w7, group g1, topics mails, brokers 127\.0\.0\.1:1$", result.stderr, re.M
    )
    assert re.search(r" INFO     Worker\.Stopped: 1 done$", result.stderr, re.M)
    assert [p.offset for p in broker.positions("g1")] == [1]
    assert result.stdout == ""


def test_worker_stops_with_its_stdin_when_asked_to(run, app):
    result = run("worker", app(), "--topics", "mails", "--stop-with-stdin", *SERVERS, input="")
    assert result.exit_code == 0
    assert "Standard input has ended" in result.stderr


def test_worker_that_is_asked_to_stop_while_it_starts_ends_with_0(run, app, broker):
    class Asking(MemoryTransport):
        def admin(self):
            os.kill(os.getpid(), signal.SIGTERM)
            return super().admin()

    result = run("worker", app(), "--topics", "shop", *SERVERS, obj=Drivers(lambda config: Asking()))
    assert result.exit_code == 0, result.output
    assert "Worker.Stopped: nothing came" in result.stderr


def test_worker_takes_group_and_topics_from_the_file(run, app):
    Path("kser.yml").write_text("kafka:\n  bootstrap.servers: h:1\n  group.id: from-file\ntopics: shop, mails:3\n")
    result = run("worker", app(), "--config-file", "kser.yml", "--stop-with-stdin", input="")
    assert result.exit_code == 0
    assert "group from-file, topics shop, mails, brokers h:1" in result.stderr


def test_worker_refuses_to_start_without_the_groups_topics_when_it_may_not_create_them(run, app, broker):
    result = run("worker", app(), "--topics", "shop", "--group", "g", "--no-create-topics", *SERVERS)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("kser: error: Topics of group g are missing: g.events")
    assert broker.admin().describe(["g.events"]) == {}


def test_worker_of_an_empty_registry_is_refused(run, app):
    path = app("from kser import OperationRegistry\nregistry = OperationRegistry()")
    result = run("worker", path, "--topics", "shop", *SERVERS)
    assert result.exit_code == 2
    assert "Nothing is registered" in error_line(result)


# -- kser demo -------------------------------------------------------------------------------------------------------


def test_a_roll_is_one_of_six_and_a_launch_is_three_of_them():
    rolls = {DiceRoll(params={"pace": 0}).execute().stdout for _ in range(200)}
    assert rolls == {f"You made a {n}" for n in range(1, 7)}
    assert [type(task) for task in DiceLaunch(params={"pace": 0}).build().tasks] == [DiceRoll] * 3


def test_the_keys_of_the_games_alternate_between_the_halves_of_the_partitions():
    keys = demo_module._spread_keys()
    chosen = [next(keys) for _ in range(12)]
    assert [partition_of(key.encode(), 6) for key in chosen] == [0, 3, 1, 4, 2, 5] * 2
    assert len(set(chosen)) == 12


def game(uuid, rolls, status):
    view = OperationView(uuid, "Launch")
    events = [
        Event(
            type=EventType.STEP_DONE,
            uuid=f"{uuid}-{at}",
            entrypoint="Roll",
            operation=uuid,
            position=at,
            status="SUCCESS",
            result=Result(stdout=f"You made a {roll}", retval={"roll": roll}),
            worker="worker-1",
        )
        for at, roll in enumerate(rolls)
    ]
    if status != "RUNNING":
        events.append(
            Event(
                type=EventType.OPERATION_ENDED,
                uuid=uuid,
                entrypoint="Launch",
                operation=uuid,
                position=len(rolls),
                status=status,
                result=Result(),
            )
        )
    for event in events:
        assert view.apply(event)
    return view, events


def test_the_plain_demo_has_a_line_for_each_event(capsys):
    view = DemoView(1, ["worker-1"])
    played, events = game("u", [4, 6, 1], "SUCCESS")
    view.launched([played])
    for event in events:
        view.event(played, event)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "game 1: roll 3: You made a 4 (worker-1)"
    assert lines[-1] == "game 1: SUCCESS, 11 points"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_table_of_the_demo_has_a_row_for_each_game_that_fits_the_screen(encoding):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=out, width=80, height=24, force_terminal=True, color_system=None)
    view = TableView(40, ["worker-1", "worker-2"], console)
    games = [game(str(n), [4, 6, 1], "SUCCESS")[0] for n in range(10)]
    games += [game(str(n), [2], "RUNNING")[0] for n in range(10, 40)]
    view.launched(games)
    console.print(view._render())
    out.flush()
    text = out.buffer.getvalue().decode(encoding)
    rows = [line.split()[0] for line in text.splitlines() if "worker-1" in line]
    assert rows == [str(n) for n in range(11, 28)]
    assert "10 of 40 operations have ended (shown: 11 to 27)" in text
    assert len(text.splitlines()) < 24
    assert ("⚁ 2 worker-1" in text) == (encoding == "utf-8")


def test_the_demos_workers_do_not_see_the_users_settings(monkeypatch):
    monkeypatch.setenv("KSER_KAFKA_SECURITY_PROTOCOL", "SSL")
    monkeypatch.setenv("KSER_TOPICS", "mine")
    monkeypatch.setenv("LOCK_FILE", "/tmp/lock")
    seen = {}

    def popen(command, **options):
        seen.update(options["env"])

    monkeypatch.setattr(demo_module.subprocess, "Popen", popen)
    demo_module._start_worker("worker-1", "127.0.0.1:1", io.BytesIO())
    assert not [name for name in seen if name.startswith(("KSER_", "LOCK_"))]
    assert seen["PATH"] == os.environ["PATH"]
