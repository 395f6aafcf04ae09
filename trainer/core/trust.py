"""The config of a run directory that may be from elsewhere: read, and refused before what it names is imported.

Importing runs code, and calling what was imported runs any: `model: {name: os.system, command: …}`. A run that was made
here is read as it is (see `trusted_runs`). Of any other, what it names must be among `known_components`, or in a
package that the user has named by `--trust`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.config.evaluation_sets import key_of_set
from trainer.config.import_paths import ImportPath, import_paths
from trainer.config.load import load_resolved
from trainer.config.overrides import override_keys
from trainer.config.registry import resolve
from trainer.config.schema import Config
from trainer.core.known_components import (
    LIBRARIES,
    WANTED,
    home_of,
    is_harmless,
    is_known,
    is_of_kind,
    unsafe_arguments,
)
from trainer.errors import ConfigError
from trainer.process import launcher
from trainer.storage.run_directory import config_file
from trainer.storage.trusted_runs import remember_trusted, trust_in

# The parts of a config that name what is imported.
ALL = ("model", "data", "loss", "optimizer", "schedule", "metrics", "observers")
# Which files are opened here may depend on the environment; what is passed on may not.
PATH_KEYS = (("data", "root"), ("model", "weights"))


def read_trusted_config(
    run: Path,
    overrides: Sequence[str] = (),
    trust: Sequence[str] = (),
    *,
    imports: Sequence[str] = ALL,
    directory: Path | None = None,
) -> Config:
    """The config of the run at `run`, with `key=value` overrides, fit to be built from: nothing was imported yet.

    `trust` names packages that the config may import, and is remembered. `imports` are the parts of the config that
    will be built; others may name anything. `directory` is the part of the run whose config it is: `best/`.

    Raises `ConfigError` that names every import path which is neither known nor trusted.
    """
    file = config_file(run, directory)
    config = load_resolved(file, overrides)
    content = file.read_bytes()
    known = trust_in(run, content)
    packages = known.packages | _package_names(trust)
    if not known.made_here:
        _check(run, config, packages, override_keys(overrides), imports)
    if trust and launcher.rank() == 0:
        remember_trusted(run, content, packages)
    return config


def refuse_environment(
    run: Path, config: Config, keys: Iterable[str], typed: Sequence[str] = ()
) -> None:
    """Raise `ConfigError` for text from the environment under one of `keys`, if the run was not made here.

    Who wrote the config chose the variable, which may hold a secret, and where it goes.
    """
    for path, reference in config.references.items():
        key = ".".join(map(str, path))
        if not _is_below(key, keys) or _is_below(key, typed) or _is_path(path):
            continue
        raise ConfigError(
            key,
            f"is {reference.text}: {run} was not made here, and would get that variable of yours; if it should, put "
            f"{key}='{reference.text}' on the command line",
        )


def _is_path(path: Sequence[object]) -> bool:
    key = ".".join(map(str, path))
    return tuple(path) in PATH_KEYS or key_of_set(key) == "root"


def refuse_foreign_settings(run: Path, config: Config) -> None:
    """Raise `ConfigError` for what would send secrets, or send to another server, when a run is sent to W&B.

    A run that was made here may do so.
    """
    if trust_in(run, config_file(run).read_bytes()).made_here:
        return
    refuse_environment(run, config, ("wandb", "run.name"))
    settings = run / "wandb" / "settings"
    if settings.exists():
        raise ConfigError(
            str(settings),
            "would choose the server that your W&B key is sent to; remove it, or log in to that server yourself",
        )


def _check(
    run: Path,
    config: Config,
    packages: frozenset[str],
    typed: Sequence[str],
    imports: Sequence[str],
) -> None:
    paths = []
    for path in import_paths(config):
        # What the user has typed is the user's own word.
        if _is_below(path.section, imports) and not _is_below(path.key, typed):
            paths.append(path)
    _refuse_unknown_packages(run, paths, packages)
    for path in paths:
        _refuse_package_of_the_run(run, path)
    for path in paths:
        _refuse_other_kinds(run, path, packages)
        _refuse_unsafe_arguments(run, path, packages, typed)
    refuse_environment(run, config, imports, typed)


def _refuse_unknown_packages(
    run: Path, paths: Sequence[ImportPath], packages: frozenset[str]
) -> None:
    unknown = [path for path in paths if path.package not in packages | set(LIBRARIES)]
    if not unknown:
        return
    names = ", ".join(f"{path.key}={path.name}" for path in unknown)
    unknown_packages = sorted({path.package for path in unknown})
    flags = " ".join(f"--trust {package}" for package in unknown_packages)
    raise ConfigError(
        unknown[0].key,
        f"{run} was not made here, or has been changed, and would import and run {names}; nothing was. If you know "
        f"that code, allow it with {flags}",
    )


def _refuse_package_of_the_run(run: Path, path: ImportPath) -> None:
    """A package that lies in the run's own directory is not the known one, whatever its name."""
    spec = None
    with suppress(ValueError):  # of __main__, which has none
        spec = importlib.util.find_spec(path.package)
    origins = (
        [] if spec is None else [spec.origin, *(spec.submodule_search_locations or [])]
    )
    for origin in filter(None, origins):
        if Path(origin).resolve().is_relative_to(run.resolve()):
            raise ConfigError(
                path.key,
                f'"{path.name}" would be imported from {origin}, in the run directory itself; start the command from '
                f"another directory",
            )


def _refuse_other_kinds(run: Path, path: ImportPath, packages: frozenset[str]) -> None:
    module, _, attribute = path.name.rpartition(".")
    if path.package in LIBRARIES and not is_harmless(module):
        what = f'"{path.name}" is not imported'
    else:
        target = resolve(path.section, path.name, {})
        if not attribute.startswith("_") and _fits(path, target, packages):
            return
        kind = "class" if isinstance(target, type) else type(target).__name__
        what = f'"{path.name}" is a {kind} of {home_of(target)}'
    raise ConfigError(
        path.key,
        f"{what}, and {run} was not made here: only {WANTED[path.role]} is called, or what a package that you name by "
        f"--trust defines",
    )


def _fits(path: ImportPath, target: Any, packages: frozenset[str]) -> bool:
    # A library stays one of which only parts are known, even where it is named by --trust.
    if home_of(target).partition(".")[0] in packages.difference(LIBRARIES):
        return is_of_kind(path.role, target)
    return is_known(path.role, target)


def _refuse_unsafe_arguments(
    run: Path, path: ImportPath, packages: frozenset[str], typed: Sequence[str]
) -> None:
    if path.package in packages:
        return
    for name in unsafe_arguments(path.arguments):
        key = f"{path.section}.{name}"
        if not _is_below(key, typed):
            raise ConfigError(
                key,
                f"may run code that {path.package} downloads or reads, and {run} was not made here; if you know it, "
                f"allow it with --trust {path.package}",
            )


def _package_names(trust: Iterable[str]) -> frozenset[str]:
    names = set()
    for text in trust:
        name = text.partition(".")[0]
        if not name.isidentifier():
            raise ConfigError("--trust", f'"{text}" is not the name of a package')
        if name in sys.stdlib_module_names or name == "posix":
            raise ConfigError(
                "--trust", f"{name} is Python's own, and no run needs to name it"
            )
        names.add(name)
    return frozenset(names)


def _is_below(key: str, keys: Iterable[str]) -> bool:
    """True if `key` is one of `keys`, or within one."""
    for other in keys:
        rest = key.removeprefix(other)
        if rest != key and (not rest or rest[0] in ".["):
            return True
    return False
