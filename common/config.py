"""Settings: dataclass defaults, then `--config FILE.yaml`, then flags; the later wins.

tyro does the parsing. A YAML file is read as saved flags, so both pass through one parser and `lr: 3e-4`
arrives as a number. Flags are flat: a config made of several dataclasses shows the fields of all of them
side by side, and `--n_embd` equals `--n-embd`.
"""

import contextlib
import dataclasses
import difflib
import inspect
import io
import itertools
import re
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import tyro
import yaml

Precision = Literal["auto", "fp32", "bf16", "fp16"]  # common.device says what they mean


@dataclass
class BaseConfig:
    """What all settings can do; subclasses are dataclasses whose fields have defaults."""

    @classmethod
    def from_cli(cls, argv: Sequence[str] | None = None) -> Self:
        """Return the validated settings of a command line (default: sys.argv).

        Raises ValueError or FileNotFoundError with one line for a wrong flag, value or file; `--help` exits.
        """
        typed = list(sys.argv[1:] if argv is None else argv)
        known = dict(cls._leaves())
        files, typed = _split_off("config", typed)
        if typed.count("--help") or typed.count("-h"):
            typed = ["--help"]
        flags = [flag for file in files for flag in cls._flags_of_file(_find_file(file, cls), known, ())]
        for flag in typed:
            if flag.startswith("--") and flag not in ("--", "--help"):
                _check_name(flag[2:].split("=")[0].replace("-", "_"), known, "flag --")
        config = _parse(cls, flags + typed)
        config.validate_config()
        return config

    def validate_config(self) -> None:
        """Raise ValueError as *name (value) rule* for settings that cannot work.

        Here, those of nested configs.
        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, BaseConfig):
                value.validate_config()

    def require_at_least(self, minimum: float, *names: str) -> None:
        """Raise ValueError unless each named setting that is given (not None) is at least `minimum`."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not value >= minimum:  # "not >=" catches NaN too
                raise ValueError(f"{name} ({value}) must be at least {minimum}")

    def print_config(self) -> None:
        """Print the settings as YAML that `--config` reads back."""
        print(self.to_yaml(), end="", flush=True)

    def to_yaml(self) -> str:
        """Return the settings as flat YAML."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=1000)

    def to_dict(self) -> dict[str, Any]:
        """Return the flat settings, nested configs merged in, as plain values."""
        values: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, BaseConfig):
                values |= value.to_dict()
            else:
                values[field.name] = _plain(value)
        return values

    @classmethod
    def _leaves(cls) -> Iterator[tuple[str, Any]]:
        """Yield name and type of every flat setting.

        Two settings of one name are a mistake of the programmer.
        """
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            kind = hints[field.name]
            if inspect.isclass(kind) and issubclass(kind, BaseConfig):
                yield from kind._leaves()
            else:
                yield field.name, kind

    @classmethod
    def _flags_of_file(cls, path: Path, known: dict[str, Any], seen: tuple[Path, ...]) -> list[str]:
        """Return a YAML file as flags, those of the file that it inherits from first."""
        if path in seen:
            raise ValueError(f"inherits ({path.name}) must not lead back to a file that inherits from it")
        try:  # BaseLoader leaves every scalar a string: the parser of flags decides what it is
            settings = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"config ({path}) must be YAML: {' '.join(str(error).split())}") from error
        if not isinstance(settings, dict):
            raise ValueError(f"config ({path}) must be a list of `name: value` lines")
        flags: list[str] = []
        if "inherits" in settings:
            parent = _find_file(str(settings.pop("inherits")), cls, path.parent)
            flags = cls._flags_of_file(parent, known, (*seen, path))
        for name, value in settings.items():
            name = str(name).replace("-", "_")
            _check_name(name, known, f"{path.name}: setting ")
            flags += _as_flags(name, value, known[name])
        return flags


def _plain(value: Any) -> Any:
    """Return a setting as YAML and checkpoints keep it: paths as strings, tuples as lists, dicts as typed."""
    if isinstance(value, dict):  # --name KEY VALUE KEY VALUE
        value = [part for pair in value.items() for part in pair]
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _as_flags(name: str, value: Any, kind: Any) -> list[str]:
    """Return one YAML setting as command-line words."""
    if isinstance(value, dict) or (
        isinstance(value, list) and any(isinstance(v, dict | list) for v in value)
    ):
        raise ValueError(f"{name} ({value}) must be one value or a flat list")
    if isinstance(value, list):
        return [f"--{name}", *value]
    if kind is bool:
        if value.lower() not in ("true", "false"):
            raise ValueError(f"{name} ({value}) must be true or false")
        return [f"--{name}" if value.lower() == "true" else f"--no-{name}"]
    optional = isinstance(kind, types.UnionType) and type(None) in typing.get_args(kind)
    return [f"--{name}={'None' if optional and value in ('', 'null', '~') else value}"]


def _find_file(name: str, config_class: type, folder: Path | None = None) -> Path:
    """Return the YAML file: from `folder` or here, else from the project's folder or its configs/."""
    project = Path(inspect.getfile(config_class)).parent
    places = [folder or Path(), project, project / "configs"]
    for place in places:
        for candidate in (place / name, place / f"{name}.yaml"):
            if candidate.is_file():
                return candidate.resolve()
    presets = sorted(path.name for path in (project / "configs").glob("*.yaml"))
    raise FileNotFoundError(
        f"config ({name}) must be a YAML file" + (f"; presets: {', '.join(presets)}" if presets else "")
    )


def _split_off(name: str, words: list[str]) -> tuple[list[str], list[str]]:
    """Return the values of --name, and the other words."""
    values, rest, left = [], [], iter(words)
    for word in left:
        if word == f"--{name}":
            value = next(left, None)
            if value is None or value.startswith("--"):
                raise ValueError(f"--{name} must be followed by a value")
            values.append(value)
        elif word.startswith(f"--{name}="):
            values.append(word.split("=", 1)[1])
        else:
            rest.append(word)
    return values, rest


def _check_name(name: str, known: dict[str, Any], what: str) -> None:
    """Raise ValueError, with the nearest known name, unless `name` is known.

    `no_name` is known where `name` is a switch.
    """
    if name in known or (name.startswith("no_") and known.get(name[3:]) is bool):
        return
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else "--help lists what there is"
    raise ValueError(f"{what}{name} is unknown; {hint}")


def _parse(cls: type[Any], words: list[str]) -> Any:
    """Run tyro; turn the box that it prints for an error into one line."""
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    markers = (tyro.conf.OmitArgPrefixes,)
    description = f"{inspect.getdoc(cls)}\n\n--config FILE.yaml reads saved flags; flags typed beside it win."
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(cls, args=words, config=markers, use_underscores=True, description=description)
    except SystemExit as error:
        if not error.code:
            raise
    printed.seek(0)
    box = re.sub(r"\x1b\[[0-9;]*m", "", printed.read())  # colours
    lines = [line.strip(" │|") for line in box.splitlines()[1:]]  # the first is the box's title
    said = list(itertools.dropwhile(_is_rule, filter(None, lines)))
    message = " ".join(itertools.takewhile(lambda line: not _is_rule(line), said))
    raise ValueError(message or "a flag has a value that cannot be read")


def _is_rule(line: str) -> bool:
    """Say whether a line of tyro's box only divides it."""
    return not line.strip("─-")
