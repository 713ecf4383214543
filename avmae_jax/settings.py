"""The settings of a run as plain values: read, written, compared, overridden, handed to a constructor.

Imports nothing of what a config describes: `experiment.py` is where a name in it becomes a thing.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import pathlib
import re
import runpy
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from absl import flags
from etils import epath

from avmae_jax import whole

Config = Mapping[str, Any]

CONFIG_FILE = 'config.json'
# What a run may be resumed with a different value of: nothing of it changes what the next step computes.
HARMLESS = (
    'data.path', 'data.data_dir', 'data.verify', 'data.num_workers', 'data.num_threads', 'data.max_damaged_ratio',
    'data.stall_seconds', 'parallel', 'checkpoint', 'report', 'evaluation',
)  # fmt: skip


# -- Reading and comparing --


def to_plain(config: Any) -> dict[str, Any]:
    """A config (ConfigDict or dict) as JSON would give it back: dicts, lists, strings, numbers, None."""
    tree = config.to_dict() if hasattr(config, 'to_dict') else config
    return json.loads(json.dumps(tree))


def load_config(path: epath.PathLike) -> dict[str, Any]:
    """The resolved config of a run: `config.json` itself, or the workdir that holds it."""
    file = epath.Path(path)
    if file.is_dir():
        file = file / CONFIG_FILE
    if not file.exists():
        raise ValueError(f'{file} does not exist: a run writes its config there when it starts.')
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f'{file} is not whole: {error}. Remove it: the next start writes it anew.') from error


def save_config(config: Config, workdir: epath.PathLike) -> None:
    """Whole or not at all: a run that is killed meanwhile goes on by what is there."""
    with whole.new_file(epath.Path(workdir) / CONFIG_FILE) as file:
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + '\n')


def flatten(config: Any, prefix: str = '') -> dict[str, Any]:
    """'optimizer.base_learning_rate' -> value."""
    if not isinstance(config, Mapping):
        return {prefix: config}
    found: dict[str, Any] = {}
    for name, value in config.items():
        found |= flatten(value, f'{prefix}.{name}' if prefix else name)
    return found


def is_within(name: str, sections: Iterable[str]) -> bool:
    """Whether a setting 'section.name' is one of these, or lies in one."""
    return any(name == section or name.startswith(f'{section}.') for section in sections)


def check_resumable(old: Config, new: Config, workdir: epath.PathLike) -> None:
    """Refuses to go on with a run under settings that would make it another run; names them."""
    before, now = flatten(old), flatten(new)
    changed = [
        f'{name}: {before.get(name, "not there")!r} -> {now.get(name, "not there")!r}'
        for name in sorted(before.keys() | now.keys())
        if before.get(name, KeyError) != now.get(name, KeyError) and not is_within(name, HARMLESS)
    ]
    if changed:
        raise ValueError(
            f'{workdir} holds a run with other settings: {"; ".join(changed)}. Give these their old values to go '
            'on with it, or another --workdir to begin anew.'
        )


# -- Kinds --

MAX_NUMBER = 3.4028234663852886e38  # Of float32, in which everything is computed.
KIND_NAMES = {int: 'a whole number', float: 'a finite number', bool: 'true or false', str: 'a text', type(None): 'null'}


def fits(value: Any, kind: Any) -> bool:
    """Whether a plain value is of a kind: int, float (finite, whole or not), bool, str, None, lists, tables, unions.

    Of other kinds, which no file can hold, every value is.
    """
    base, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if base in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in arguments)
    if base is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_NUMBER
    if base is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if base in KIND_NAMES:
        return isinstance(value, base)
    if isinstance(base, type) and issubclass(base, Sequence):
        return isinstance(value, list | tuple) and all(fits(one, arguments[0]) for one in value)
    if isinstance(base, type) and issubclass(base, Mapping):
        return isinstance(value, Mapping) and (not arguments or all(fits(one, arguments[1]) for one in value.values()))
    return True


def name_kind(kind: Any) -> str:
    """A kind in words."""
    base, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if base in (typing.Union, types.UnionType):
        whole = float in arguments  # Such a number may be whole.
        return ' or '.join(name_kind(one) for one in arguments if not (whole and one is int))
    if base in KIND_NAMES:
        return KIND_NAMES[base]
    if isinstance(base, type) and issubclass(base, Sequence):
        return f'a list ({name_kind(arguments[0])} each)'
    if isinstance(base, type) and issubclass(base, Mapping):
        return f'a table ({name_kind(arguments[1])} each)' if arguments and arguments[1] is not Any else 'a table'
    return getattr(kind, '__name__', str(kind))


def check_kinds(where: str, values: Config, kinds: Mapping[str, Any]) -> None:
    """Refuses what is of another kind than its name is to have; `where` comes before the name in what is said."""
    for name in values:
        if name in kinds and not fits(values[name], kinds[name]):
            raise ValueError(f'{where}.{name} is {values[name]!r:.80}, where {name_kind(kinds[name])} was due.')


def kinds_of(constructor: Callable[..., Any]) -> dict[str, Any]:
    """Argument -> kind, of a class or function."""
    return typing.get_type_hints(constructor)


# -- Handing over --


def construct(constructor: Callable[..., Any], where: str, section: Config, /, **more: Any) -> Any:
    """`constructor(**section, **more)`; an argument it does not have is named with the one that was meant."""
    known = [name for name in inspect.signature(constructor).parameters if name not in ('self', 'parent', 'name')]
    for name in section:
        if name not in known or name in more:
            raise ValueError(f'config.{where}.{name} is no setting{_instead(name, known)}')
    check_kinds(f'config.{where}', section, kinds_of(constructor))
    try:
        return constructor(**{name: _unfold(section[name]) for name in section}, **more)
    except (TypeError, ValueError) as error:
        raise ValueError(f'config.{where}: {error}') from error


def with_setting(where: str, function: Callable[..., Any], *args: Any) -> Any:
    """What the function gives; what it refuses is told with the name of the setting."""
    try:
        return function(*args)
    except ValueError as error:
        raise ValueError(f'config.{where}: {error}') from error


def choose(table: Mapping[str, Any], where: str, name: str) -> Any:
    """What a table has under the name that the setting config.WHERE has; a wrong one is told with those that are."""
    return _choose(table, f'config.{where}', name)


def choose_flag(table: Mapping[str, Any], flag: str, name: str) -> Any:
    """The same of the flag --FLAG."""
    return _choose(table, f'--{flag}', name)


def refuse_flags(given: Sequence[flags.FlagHolder[Any]], why: str) -> None:
    """Of flags that would do nothing here, the first that was given is an error."""
    for flag in given:
        if flag.present:
            raise ValueError(f'--{flag.name} {why}: leave it out.')


def _choose(table: Mapping[str, Any], where: str, name: str) -> Any:
    if name not in table:
        close = difflib.get_close_matches(str(name), table, n=1)
        raise ValueError(
            f'{where}={name!r} is none of {", ".join(table)}' + (f'; did you mean {close[0]}?' if close else '.')
        )
    return table[name]


def _unfold(value: Any) -> Any:
    """Plain dicts and tuples: no config gets past this file."""
    if isinstance(value, Mapping):
        return {name: _unfold(value[name]) for name in value}
    return tuple(_unfold(x) for x in value) if isinstance(value, list | tuple) else value


# -- From the command line --


def flags_parser(verb: str) -> Callable[[list[str]], list[str]]:
    """For `app.run`: a command line that is wrong ends in one line and exit code 2, like every other mistake."""

    def parse(argv: list[str]) -> list[str]:
        try:
            return flags.FLAGS(argv)
        except flags.Error as error:
            print(f'{verb}: {str(error).rstrip(".")}. --help lists the flags.', file=sys.stderr)
            sys.exit(2)

    return parse


def find_neighbours(config_file: str) -> None:
    """Lets a config file import its neighbours (`from configs import sections`), wherever the command is given.

    Those in the folder `configs` that the file lies in come first, whatever else has that name in the current folder;
    a file that lies elsewhere gets those of the checkout that this package lies in.
    """
    file = pathlib.Path(config_file.partition(':')[0]).resolve()
    own = [folder.parent for folder in file.parents if folder.name == 'configs']
    sys.path[:0] = [str(root) for root in [*own, pathlib.Path(__file__).resolve().parent.parent][:1]]


def find_unknown(config: Mapping[str, Any], argv: list[str]) -> str | None:
    """What is wrong with the first setting of a command line that the config does not have."""
    for path in split_overrides(argv)[1]:
        section: Any = config
        for part in path.split('.'):
            if not isinstance(section, Mapping):
                return f'config.{path} is no setting; {section!r:.80} is a value, which has no {part}.'
            if part not in section:
                return f'config.{path} is no setting{_instead(part, section)}'
            section = section[part]
    return None


def _instead(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f'; did you mean {close[0]}?' if close else f'; there are {", ".join(known)}.'


def read_config(text: str) -> dict[str, Any]:
    """The config of a file with `get_config`, its arguments after a colon; ValueError for whatever is wrong with it."""
    file, colon, arguments = text.partition(':')
    if not pathlib.Path(file).is_file():
        raise ValueError(f'--config={text}: there is no file {file}.')
    find_neighbours(file)
    given = [arguments] if colon else []
    try:
        made = runpy.run_path(file).get('get_config')
        if made is None:
            raise ValueError(f'{file} has no function get_config.')
        if colon and not inspect.signature(made).parameters:
            raise ValueError(f'get_config of {file} takes no arguments: leave out {colon}{arguments}.')
        config = made(*given)
        if not isinstance(config, Mapping) and not hasattr(config, 'to_dict'):
            raise ValueError(f'get_config of {file} gives {config!r}, where a ConfigDict was due.')
        return to_plain(config)
    except ValueError as error:
        raise ValueError(f'--config={text}: {error}') from error
    except Exception as error:  # A config is a program, and may fail in any way.
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        where = f' in line {lines[-1]}' if lines else ''
        raise ValueError(f'--config={text}: {file} fails{where} with {type(error).__name__}: {error}.') from error


def override(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The config with 'section.name' -> value put in; a setting it does not have is an error that names near ones."""
    config = to_plain(config)
    for path, value in values.items():
        *sections, name = path.split('.')
        section: Any = config
        for part in sections:
            section = choose(section, path, part)
            section = section if isinstance(section, Mapping) else {}
        old = choose(section, path, name)
        if not _can_replace(old, value):
            raise ValueError(f'config.{path} is {old!r}; {value!r} cannot take its place.')
        section[name] = list(value) if isinstance(value, tuple) else value
    return config


def _can_replace(old: Any, new: Any) -> bool:
    if isinstance(old, Mapping) or not isinstance(new, (*KIND_NAMES, list, tuple)):
        return False  # Sections stay, and what Python writes otherwise, as {1, 2} or b'x', is no plain value.
    if old is None or new is None:
        return True
    kinds: dict[type, Any] = {float: (int, float), list: (list, tuple)}
    return isinstance(new, kinds.get(type(old), type(old))) and isinstance(new, bool) == isinstance(old, bool)


def split_overrides(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """The arguments without `--config.a.b=value`, and those as 'a.b' -> value. Values are Python literals or words."""
    rest, found = [], {}
    for argument in argv:
        match = re.fullmatch(r'--?config\.([\w.]+)=(.*)', argument, re.DOTALL)
        if match is None:
            rest.append(argument)
            continue
        try:
            found[match[1]] = ast.literal_eval(match[2])
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # All that it says of words.
            found[match[1]] = match[2]
    return rest, found
