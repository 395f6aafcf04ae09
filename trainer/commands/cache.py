"""List and clear the decoded images that data.cache=decoded keeps in files.

lockstep cache list /fast/cache                        what is there, how large, and when it was used last
lockstep cache clear /fast/cache                       remove all that no run uses now
lockstep cache clear /fast/cache flowers-256-0f5c…     remove one, by its name in the list

A cache that is cleared is made anew when a run wants it.
"""

from __future__ import annotations

from pathlib import Path

from trainer.commands.arguments import CommandParser
from trainer.errors import ConfigError, nearest


def main(arguments: list[str]) -> None:
    """List or clear the caches of a folder."""
    parser = CommandParser("cache", __doc__)
    parser.add_argument("action", choices=("list", "clear"))
    parser.add_argument(
        "directory", metavar="DIR", type=Path, help="a folder: data.cache_dir"
    )
    parser.add_argument(
        "names",
        nargs="*",
        default=[],
        metavar="NAME",
        help="which; all if none is named",
    )
    options = parser.parse(arguments)

    from trainer.storage.cache_folder import Cache, caches_in

    if not options.directory.is_dir():
        raise ConfigError("DIR", f"{options.directory} is not a folder")
    caches = {cache.path.name: cache for cache in caches_in(options.directory)}
    for name in options.names:
        if name not in caches:
            raise ConfigError(
                "NAME",
                f"{options.directory} holds no cache {name}{nearest(name, caches)}",
            )
    chosen: list[Cache] = [caches[name] for name in options.names or caches]
    if not chosen:
        print(f"{options.directory} holds no decoded images")
    for cache in chosen:
        print(cache.clear() if options.action == "clear" else cache.describe())
