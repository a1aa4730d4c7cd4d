"""The user's registry, from ``MODULE_OR_FILE:REGISTRY``."""

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from kser.cli.errors import where
from kser.entry import Entrypoint, wire_name
from kser.errors import ConfigurationError, ValidationError
from kser.sequencing.registry import OperationRegistry

__all__ = ["find_class", "load", "names_of"]


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
    path, attribute = _split(target)
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    is_file = _is_file(path)
    module = _import_file(Path(path)) if is_file else _import_module(path)
    registry = _named(module, attribute) if attribute else _only(module, path)
    _load_tasks(registry, target)
    if is_file:
        _answer_to_main(registry, module)
    return registry


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


# -- the module ------------------------------------------------------------------------------------------------------


def _split(target: str) -> tuple[str, str]:
    path, colon, attribute = target.rpartition(":")
    if not colon or "/" in attribute or "\\" in attribute:  # C:\app.py has no attribute
        return target, ""
    if not path:
        raise ConfigurationError(f"{target!r} names no module: write MODULE_OR_FILE:REGISTRY, as in app.py:registry")
    return path, attribute


def _is_file(path: str) -> bool:
    return path.endswith(".py") or "/" in path or "\\" in path


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as exc:
        if exc.name is not None and (name == exc.name or name.startswith(f"{exc.name}.")):
            hint = f"; for the file write {name}.py" if Path(f"{name}.py").exists() else ""
            raise ConfigurationError(
                f"There is no module {exc.name} in {Path.cwd()} or on Python's path{hint}"
            ) from exc
        raise _told(exc) from exc
    except KeyboardInterrupt:
        raise
    except BaseException as exc:
        raise _told(exc) from exc


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
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


def _named(module: ModuleType, attribute: str) -> OperationRegistry:
    value: Any = module
    for part in attribute.split("."):
        try:
            value = getattr(value, part)
        except AttributeError:
            there = _listed(_registries(module)) or "no OperationRegistry at all"
            raise ConfigurationError(f"{module.__name__} has no {attribute}; it has {there}") from None
    if not isinstance(value, OperationRegistry):
        there = _listed(_registries(module)) or "none"
        raise ConfigurationError(
            f"{module.__name__}:{attribute} is a {type(value).__name__}, not an OperationRegistry; {module.__name__} "
            f"has these: {there}"
        )
    return value


def _only(module: ModuleType, path: str) -> OperationRegistry:
    found = _registries(module)
    different = {id(registry): registry for registry in found.values()}
    if len(different) == 1:
        return next(iter(different.values()))
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


def _answer_to_main(registry: OperationRegistry, module: ModuleType) -> None:
    for cls in names_of(registry):
        name = f"__main__.{cls.__name__}"
        if cls.__module__ == module.__name__ and registry.controller.find(name) is None:
            registry.controller.register(name, cls)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
