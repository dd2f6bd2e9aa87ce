"""The parser of recipes and overrides: one readable error in place of jsonargparse's screen of types."""

import difflib
import re
import textwrap
from importlib import import_module
from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from zoo.recipes import RecipeError, suggest

# Where the classes live that a key usually names.
HOMES = {
    "model": "zoo",
    "data": "datamodules",
    "optimizer": "torch.optim",
    "scheduler": "torch.optim.lr_scheduler",
    "callbacks": "lightning.pytorch.callbacks",
    "logger": "lightning.pytorch.loggers",
}
OWN_HOMES = ("zoo.running.schedules", "zoo.running.averaging", "zoo.running.freezing")
GIVEN_CLASS = (  # in jsonargparse's messages, the surest first
    r"import path string: ([\w.]+)",
    r"class_path '([^']+)'",
    r"Import path (\S+) does not",
    r"Expected '([^']+)' to be",
    r"class_path'?[:=, ]+(?:val=)?'([^']+)'",
    r"G(?:iven|ot) value: ([\w.]+)",
)
NO_VALUE = "holds keys of its own: it is no single value"


class RecipeParser(LightningArgumentParser):
    """Raises one :class:`RecipeError` in place of usage, exit and a screen of types.

    jsonargparse reads the arguments of a class with a parser of the same kind, so errors nest. Each reads
    ``‹key› problem``, and the parser around puts its own key before.
    """

    of_classes: tuple[str, ...] = ()  # keys of the recipe's classes, which this parser does not know

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Turn jsonargparse's message into an error that suggests the nearest right key."""
        raise RecipeError(readable(message, self._known_keys())) from None

    def _known_keys(self) -> list[str]:
        parsers = [self, *getattr(self._subcommands_action, "choices", {}).values()]
        keys = {option.lstrip("-") for parser in parsers for option in parser._option_string_actions}
        return [*sorted(key for key in keys if len(key) > 1 and not key.endswith("help")), *self.of_classes]


def readable(message: str, known: list[str]) -> str:
    """One line, ``‹key› problem``, of jsonargparse's message: what was expected and what may have been meant."""
    outer = re.match(r'Parser key "(?:(?:fit|validate|test|predict)\.)?([\w.]+)"', message)
    key = outer[1] if outer else ""
    if inner := re.search(r"‹(.*?)› (.*)", message):
        return f"‹{key}.init_args.{inner[1]}› {inner[2]}" if key else inner[0]
    if match := re.search(r"(?:[Oo]ption|key) '([\w.]+)'|nrecognized arguments: --([\w.]+)", message):
        return _unknown_key(match[1] or match[2], known)
    if match := re.search(r"nrecognized arguments: (\S+)", message):
        word = "--" + match[1].split("=")[0].lstrip("-")
        return f"{match[1]!r} is no override, which is --key value{suggest(word, [f'--{key}' for key in known])}"
    if match := re.search(r"argument (?:-\w/)?--([\w.]+): expected", message):
        return f"‹{match[1]}› needs a value"
    if match := re.search(r"arguments are required: (?:(?:fit|validate|test|predict)\.)?([\w.]+)", message):
        what = f": it names a class of {HOMES[match[1]]} or your own" if match[1] in HOMES else ""
        return f"‹{match[1]}› is missing{what}"
    if "Unable to load config" in message:
        return f"‹{key}› {NO_VALUE}"
    problem = _wrong_class(key, message) or _wrong_type(message) or reason(message)
    return f"‹{key}› {problem}" if key else problem


def _unknown_key(key: str, known: list[str]) -> str:
    head = key.split(".")[0]
    if head != "init_args" and difflib.get_close_matches(head, ["init_args"], cutoff=0.8):
        return f"‹{head}› is no key: did you mean init_args?"
    return f"‹{key}› is no key{suggest(key, known)}"


def _wrong_class(key: str, message: str) -> str | None:
    """The problem of a key that should name a class; None if it should not, or that is not the problem."""
    kind = key.rsplit(".", 1)[-1]
    missing = re.search(r"No module named '[\w.]+'|has no attribute|import path string", message)
    other = re.search(r"Import path .*subclass of (\w+)|to be a subclass of <class '(\w+)'>", message)
    given = next((match[1] for pattern in GIVEN_CLASS if (match := re.search(pattern, message))), None)
    if kind not in HOMES and "Expected a <class" in message:
        return None
    if given and (missing or other):
        why = f" ({missing[0]})" if missing and missing[0].startswith("No module") else ""
        wrong = f"is no {other[1] or other[2]}" if other and not missing else f"is no class{why}"
        return f"names {given}, which {wrong}{_suggest_class(kind, given)}"
    if kind in HOMES:
        given = _given(message)
        return f"must have class_path and, where it needs any, init_args{f', not {given}' if given else ''}"
    return None


def _suggest_class(kind: str, given: str) -> str:
    if kind not in HOMES:
        return ""
    home = given.rpartition(".")[0]
    if home in OWN_HOMES:  # only what is defined there, not what it imports
        names = [name for name, value in vars(import_module(home)).items() if getattr(value, "__module__", "") == home]
    else:
        home = HOMES[kind]
        names = dir(import_module(home))
    paths = {name.lower(): f"{home}.{name}" for name in names if name[0].isupper()}
    asked = given.rsplit(".", 1)[-1].lower()
    near = difflib.get_close_matches(asked, paths, n=2) or [name for name in paths if asked in name][:2]
    if near:
        return f": did you mean {' or '.join(paths[name] for name in near)}?"
    return f": there are {', '.join(paths.values())}" if len(paths) < 40 else f": look in {home}"


def _wrong_type(message: str) -> str | None:
    expected = re.findall(r"Expected a <class '(?:[\w.]+\.)?(\w+)'>", message)
    expected = sorted(dict.fromkeys("null" if name == "NoneType" else name for name in expected), key="null".__eq__)
    choices = re.findall(r"Expected a typing.Literal\[(.*?)\]", message)
    given = _given(message)
    if not expected + choices or given is None:
        return None
    wanted = " or ".join([*expected, *(f"one of {choice}" for choice in choices)])
    return f"must be {wanted}, not {given!r}"


def _given(message: str) -> str | None:
    match = re.search(r"G(?:iven|ot) value: (?:NestedArg\(.*val=)?(.*)", message)
    return textwrap.shorten(match[1], 60, placeholder=" …") if match else None


def reason(message: str) -> str:
    """The first of the reasons that jsonargparse gives for refusing each type of a union, in one line."""
    listed = re.search(r"Errors:\n(.*?)(?:\n *Given value|$)", message, re.DOTALL)
    reasons = re.split(r"(?:^|\n) *- ", listed[1])[1:] if listed else [message]
    told = [" ".join(each.split()) for each in reasons]
    return next((each for each in told if not each.startswith("Expected a <class")), told[0])
