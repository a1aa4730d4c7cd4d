"""The user's registry: from ``MODULE_OR_FILE:REGISTRY`` to the object, and from the object back to that text."""

import difflib
import importlib
import importlib.util
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

from kser.controller import Controller
from kser.entry import Entrypoint, wire_name
from kser.errors import ConfigurationError, ValidationError
from kser.sequencing.registry import OperationRegistry

__all__ = [
    "Needs",
    "absolute",
    "answer_to",
    "file_of",
    "find_class",
    "guard",
    "import_target",
    "load",
    "load_controller",
    "location_of",
    "names_of",
    "needs_of",
    "stand_in_for_main",
    "stop_at_guard",
    "where",
]

#: A registry or a controller, as a Worker takes them.
Registered = OperationRegistry | Controller | type[Controller]


def load(target: str) -> OperationRegistry:
    """The registry that ``target`` names.

    Args:
        target: ``shop.tasks:registry`` or ``path/to/app.py:registry``. The attribute may be left out when the module
            has exactly one OperationRegistry; it may have dots.

    The current directory can be imported from. A file is imported under its stem (with the packages around it, if it
    lies in any), and the classes it defines answer to ``__main__.Name`` too: that is what a producer calls them that
    was run as a script, from the same file.

    Raises ConfigurationError, with file, line and exception where the user's code raised one.
    """
    module, value = _load(target)
    if not isinstance(value, OperationRegistry):
        there = _listed(_registries(module)) or "none"
        raise ConfigurationError(
            f"{module.__name__}:{_split(target)[1]} is a {type(value).__name__}, not an OperationRegistry; "
            f"{module.__name__} has these: {there}"
        )
    return value


def load_controller(target: str) -> Controller | type[Controller]:
    """The controller that ``target`` names, or the one of the registry that it names; otherwise like load()."""
    module, value = _load(target)
    controller = _controller_of(value)
    if controller is None:
        raise ConfigurationError(
            f"{module.__name__}:{_split(target)[1]} is a {type(value).__name__}: name an OperationRegistry or a "
            "Controller"
        )
    return controller


def names_of(registry: OperationRegistry) -> dict[type[Entrypoint], list[str]]:
    """Each class of the registry and the names it answers to, its own first."""
    found: dict[type[Entrypoint], list[str]] = {}
    for name, cls in registry.tasks().items():
        names = found.setdefault(cls, [])
        names.insert(0 if name == wire_name(cls) else len(names), name)
    return found


def find_class(registry: OperationRegistry, name: str) -> type[Entrypoint]:
    """The class registered as ``name``, a full name or that of just one class.

    Raises ValidationError naming what there is.
    """
    if name in registry.tasks():
        return registry.tasks()[name]
    classes = names_of(registry)
    found = [cls for cls, names in classes.items() if name in (cls.__name__, names[0].rpartition(".")[2])]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValidationError(f"{name} may be {_listed(wire_name(cls) for cls in found)}: write one of these")
    known = sorted({n for cls, names in classes.items() for n in (cls.__name__, *names)})
    near = difflib.get_close_matches(name, known, n=1)
    there = f"did you mean {near[0]}?" if near else f"there is {_listed(sorted(map(wire_name, classes))) or 'nothing'}"
    raise ValidationError(f"{name} is not registered: {there}")


# -- the place of a registry -----------------------------------------------------------------------------------------


def location_of(registry: Registered, why: str = "it has tasks with isolate=True") -> str:
    """``MODULE_OR_FILE:NAME`` from which another process of this program can load ``registry``.

    A script is named by its file. Of several modules that have the registry under a name, the script is taken when
    classes of the registry are defined in it, else the one that defines most of them.

    Raises ConfigurationError when no module has it at its top level, or only an interactive session. ``why``: what a
    child process is for, in the words of that error.
    """
    counts: dict[str, int] = {}
    for cls in _classes(registry):
        counts[cls.__module__] = counts.get(cls.__module__, 0) + 1
    found = [(name, attribute) for name, module in _modules() if (attribute := _name_in(module, registry))]
    found.sort(key=lambda at: (at[0] != "__main__" or not counts.get("__main__"), -counts.get(at[0], 0), at[0]))
    for name, attribute in found:
        place = _main_place() if name == "__main__" else name
        if place is not None:
            return f"{place}:{attribute}"
    what = "registry" if isinstance(registry, OperationRegistry) else "controller"
    if found:
        raise ConfigurationError(
            f"This {what} is {found[0][1]} of an interactive session, from which a child process can load nothing, and "
            f"{why}: put it into a file"
        )
    raise ConfigurationError(
        f"No module has this {what} under a name of its own, so that a child process cannot load it, and {why}: "
        f"assign it to a name at the top level of a module, as in {what} = "
        f"{'OperationRegistry()' if what == 'registry' else 'Shop()'}"
    )


def absolute(target: str) -> str:
    """``target``, with the full path when it names a file."""
    path, attribute = _split(target)
    if not _is_file(path):
        return target
    return f"{Path(path).resolve()}:{attribute}" if attribute else str(Path(path).resolve())


def file_of(target: str) -> Path | None:
    """The file that ``target`` names, with its full path; None when it names a module."""
    path, _ = _split(target)
    return Path(path).resolve() if _is_file(path) else None


class Needs(NamedTuple):
    """What another process has to do beside loading a registry to know what this one knows."""

    #: Modules to import, and the file of the script when classes are defined in it.
    modules: list[str]
    #: What has to stand in for ``__main__`` there: the script's file, or the module after ``python -m``; None: nothing.
    main: str | None
    #: Every name that messages may use -> the class's own.
    names: dict[str, str]


def needs_of(target: str) -> Needs:
    """What another process needs to know all classes that are registered here in what ``target`` names.

    Imports nothing: a target that is not loaded in this process needs nothing.
    """
    path, attribute = _split(target)
    main = _main_place()
    if _is_file(path):
        path = str(Path(path).resolve())
        module = sys.modules.get("__main__" if path == main else _place(Path(path))[1])
    else:
        module = sys.modules.get("__main__" if path == main else path)
    if module is None:
        return Needs([], None, {})
    try:
        controller = _controller_of(_named(module, attribute) if attribute else _only(module, path))
    except ConfigurationError:
        controller = None
    if controller is None:
        return Needs([], None, {})
    names = {name: wire_name(cls) for name, cls in controller.ENTRYPOINTS.items()}
    defined = {cls.__module__ for cls in controller.ENTRYPOINTS.values()}
    modules = sorted(name for name in defined - {"__main__", path} if name.partition(".")[0] != "kser")
    if main is None or not (path == main or "__main__" in defined):
        return Needs(modules, None, names)
    return Needs([*modules, *([main] if path != main else [])], main, names)


def answer_to(controller: Controller | type[Controller], names: Mapping[str, str]) -> None:
    """Let the classes of a controller answer to further names, given with the class's own."""
    for name, own in names.items():
        cls = controller.find(own)
        if cls is not None and controller.find(name) is None:
            controller.register(name, cls)


def import_target(target: str) -> ModuleType:
    """The module or file ``target``, without an attribute, imported as load() does it."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    return _import_file(Path(target)) if _is_file(target) else _import_module(target)


def stand_in_for_main(target: str, controller: Controller | type[Controller]) -> None:
    """Let the module ``target`` be here what ``__main__`` is in the process that was started with it.

    Its classes are called ``__main__.Name`` then, as they are there: what they send names them so.
    """
    module = import_target(target)
    sys.modules["__main__"] = module
    _answer_to_main(controller, module)
    for cls in set(controller.ENTRYPOINTS.values()):
        if cls.__module__ == module.__name__ and not cls.__dict__.get("WIRE_NAME"):
            cls.WIRE_NAME = f"__main__.{cls.__name__}"


def _modules() -> list[tuple[str, ModuleType]]:
    return [
        (name, module)
        for name, module in tuple(sys.modules.items())
        if isinstance(module, ModuleType) and name != "__mp_main__" and name.partition(".")[0] != "kser"
    ]


def _name_in(module: ModuleType, registry: Registered) -> str | None:
    if module.__name__ != "__main__" and getattr(module, "__spec__", None) is None:
        return None  # made by hand: nobody can import it
    for name, value in tuple(vars(module).items()):
        if value is registry or (isinstance(value, OperationRegistry) and value.controller is registry):
            return name
    return None


def _main_place() -> str | None:
    """What to import for ``__main__``: a module after ``python -m``, else the file; None when there is neither."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name != "__main__":
        return str(spec.name)
    file = getattr(main, "__file__", None)
    return str(Path(file).resolve()) if file and Path(file).is_file() else None


def _classes(registry: Any) -> set[type[Entrypoint]]:
    controller = _controller_of(registry)
    return set(controller.ENTRYPOINTS.values()) if controller is not None else set()


def _controller_of(value: Any) -> Controller | type[Controller] | None:
    if isinstance(value, OperationRegistry):
        return value.controller
    if isinstance(value, Controller) or (isinstance(value, type) and issubclass(value, Controller)):
        return value
    return None


# -- a script that runs a worker as it is imported -------------------------------------------------------------------

_instead: Callable[[], NoReturn] | None = None


def guard() -> None:
    """Called by whatever must run once in a program and not in its child processes: the run() of a worker.

    A child that imports a script without ``if __name__ == "__main__":`` comes to that call as well. What the script
    has set up so far is just what its parent has, so the child does its own work there and this never returns.
    """
    if _instead is not None:
        _instead()


def stop_at_guard(instead: Callable[[], NoReturn] | None) -> None:
    """From now on guard() calls ``instead``; None: it returns."""
    global _instead
    _instead = instead


# -- the module ------------------------------------------------------------------------------------------------------


def _load(target: str) -> tuple[ModuleType, Any]:
    path, attribute = _split(target)
    module = import_target(path)
    value = _named(module, attribute) if attribute else _only(module, path)
    if isinstance(value, OperationRegistry):
        _load_tasks(value, target)
    controller = _controller_of(value)
    if _is_file(path) and controller is not None:
        _answer_to_main(controller, module)
    return module, value


def _split(target: str) -> tuple[str, str]:
    path, colon, attribute = target.rpartition(":")
    if not colon or "/" in attribute or "\\" in attribute:  # C:\app.py has no attribute
        return target, ""
    if not path:
        raise _no_module(target)
    return path, attribute


def _no_module(target: str) -> ConfigurationError:
    return ConfigurationError(f"{target!r} names no module: write MODULE_OR_FILE:REGISTRY, as in app.py:registry")


def _is_file(path: str) -> bool:
    return path.endswith(".py") or "/" in path or "\\" in path


def _import_module(name: str) -> ModuleType:
    if not all(name.split(".")):  # importlib takes dots in front for a relative name, and an empty one for a fault
        raise _no_module(name)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as exc:
        if exc.name is not None and (name == exc.name or name.startswith(f"{exc.name}.")):
            hint = f"; for the file write {name}.py" if os.path.exists(f"{name}.py") else ""  # noqa: PTH110 - never raises
            raise ConfigurationError(
                f"There is no module {exc.name} in {Path.cwd()} or on Python's path{hint}"
            ) from exc
        raise _told(exc) from exc
    except KeyboardInterrupt:
        raise
    except BaseException as exc:
        raise _told(exc) from exc


def _import_file(path: Path) -> ModuleType:
    if os.path.isdir(path):  # noqa: PTH112 - unlike Path's it never raises, whatever was typed
        raise ConfigurationError(f"{path.absolute()} is a directory: name a file in it, as in {path}/app.py:registry")
    if not os.path.isfile(path):  # noqa: PTH113
        raise ConfigurationError(f"There is no file {path.absolute()}")
    path = path.resolve()
    root, name = _place(path)
    known = sys.modules.get(name)
    if known is not None:
        if getattr(known, "__file__", None) and Path(str(known.__file__)).resolve() == path:
            return known
        raise ConfigurationError(
            f"{path} would be module {name}, and so is {getattr(known, '__file__', None) or 'one of Python itself'}: "
            "rename the file"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    if "." in name:
        return _import_module(name)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigurationError(f"{path} is no Python file: its name has to end with .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as exc:
        del sys.modules[name]
        if isinstance(exc, KeyboardInterrupt):
            raise
        raise _told(exc) from exc
    return module


def _place(path: Path) -> tuple[Path, str]:
    """The directory to import ``path`` from, and its module name there."""
    folder, parts = path.parent, [path.stem]
    while (folder / "__init__.py").exists() and folder.name.isidentifier():
        parts.insert(0, folder.name)
        folder = folder.parent
    if parts[-1] == "__init__" and len(parts) > 1:
        parts.pop()
    return folder, ".".join(parts)


def _told(exc: BaseException) -> ConfigurationError:
    text = exc.msg if isinstance(exc, SyntaxError) else str(getattr(exc, "message", None) or exc)
    return ConfigurationError(f"{where(exc)}: {type(exc).__name__}{f': {text}' if text else ''}")


# -- the registry ----------------------------------------------------------------------------------------------------


def _named(module: ModuleType, attribute: str) -> Any:
    value: Any = module
    for part in attribute.split("."):
        try:
            value = getattr(value, part)
        except AttributeError:
            there = _listed(_registries(module)) or "no OperationRegistry at all"
            raise ConfigurationError(f"{module.__name__} has no {attribute}; it has {there}") from None
    return value


def _only(module: ModuleType, path: str) -> OperationRegistry:
    found = _registries(module)
    different = {id(registry): registry for registry in found.values()}
    if len(different) == 1:
        return next(iter(different.values()))
    if not found and getattr(module, "__file__", None) is None and hasattr(module, "__path__"):
        raise ConfigurationError(f"{path} is a directory: name a module in it, as in {path}.app:registry")
    if not found:
        raise ConfigurationError(f"{path} has no OperationRegistry: make one, registry = OperationRegistry()")
    raise ConfigurationError(
        f"{path} has {len(different)} registries, {_listed(found)}: write which, as in {path}:{next(iter(found))}"
    )


def _registries(module: ModuleType) -> dict[str, OperationRegistry]:
    return {name: value for name, value in vars(module).items() if isinstance(value, OperationRegistry)}


def _load_tasks(registry: OperationRegistry, target: str) -> None:
    """What a Flask application does by init_app(), here without one: an overridden load_tasks() imports the classes."""
    if type(registry).load_tasks is OperationRegistry.load_tasks or registry.app is not None:
        return
    try:
        registry.load_tasks()
    except Exception as exc:  # user code
        raise ConfigurationError(f"load_tasks() of {target} raised at {_told(exc).message}") from exc


def _answer_to_main(controller: Controller | type[Controller], module: ModuleType) -> None:
    for cls in dict.fromkeys(controller.ENTRYPOINTS.values()):
        name = f"__main__.{cls.__name__}"
        if cls.__module__ == module.__name__ and controller.find(name) is None:
            controller.register(name, cls)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


# -- the place of an exception ---------------------------------------------------------------------------------------

#: Where code that is not the user's lies: kser, the standard library, what was installed.
_FOREIGN = (
    Path(__file__).resolve().parent,
    *(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")),
)


def where(exc: BaseException) -> str:
    """``file:line`` of ``exc``: the innermost line of the user's own code, else the innermost of all."""
    if isinstance(exc, SyntaxError) and exc.filename:
        return f"{_short(exc.filename)}:{exc.lineno}"
    frames = traceback.extract_tb(exc.__traceback__)
    own = [f for f in frames if _is_users(f.filename)]
    found = (own or frames)[-1] if frames else None
    return f"{_short(found.filename)}:{found.lineno}" if found is not None else "nowhere"


def _is_users(filename: str) -> bool:
    if filename.startswith("<"):
        return False
    path = Path(filename).resolve()
    return not any(path.is_relative_to(folder) for folder in _FOREIGN)


def _short(filename: str) -> str:
    try:
        return str(Path(filename).resolve().relative_to(Path.cwd()))
    except (ValueError, OSError):
        return filename
