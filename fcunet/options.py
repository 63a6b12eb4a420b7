"""Options of the command line: those that are settings, made from them, and how numbers are written."""

import inspect
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any

import typer

from .config import SECTIONS


def with_settings(*sections: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add one option per setting of `sections`; those given arrive in the command's ``settings``."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command)
        own = [p for p in signature.parameters.values() if p.name != "settings"]
        generated = []
        for section in sections:
            for name, field in SECTIONS[section].model_fields.items():
                default = "measured" if field.default is None else field.default
                default = _extra(field).get("default", default)
                text = f"{field.description or ''} [{default}]".strip()
                flag = "--" + name.replace("_", "-")
                option = typer.Option(flag, help=text, rich_help_panel=None, show_default=False)
                kind = _option_type(field.annotation)
                if kind is bool:
                    option = typer.Option(f"{flag}/--no-{flag[2:]}", help=text, show_default=False)
                generated.append(
                    inspect.Parameter(
                        name,
                        inspect.Parameter.KEYWORD_ONLY,
                        default=None,
                        annotation=Annotated[kind | None, option],
                    )
                )
        names = {p.name for p in generated}

        def run(**arguments: Any) -> None:
            settings = {n: arguments.pop(n) for n in names & set(arguments)}
            command(**arguments, settings={n: v for n, v in settings.items() if v is not None})

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + generated
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _option_type(annotation: Any) -> Any:
    """What typer is told about a setting: itself if it is simple, else text that the setting parses."""
    members = [a for a in typing.get_args(annotation) if a is not types.NoneType]
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        annotation = members[0] if len(members) == 1 else str
    return (
        annotation
        if annotation in (int, float, bool, str) or typing.get_origin(annotation) is typing.Literal
        else str
    )


def _extra(field: Any) -> dict[str, Any]:
    """What a setting says of itself beyond its type: the word for its default."""
    extra = field.json_schema_extra
    return extra if isinstance(extra, dict) else {}


def pair(text: str, name: str) -> tuple[int, int]:
    """``"24,48"`` as two positive integers."""
    try:
        first, second = (int(v) for v in text.replace("x", ",").split(","))
    except ValueError:
        raise ValueError(f"--{name} is {text!r}; write two whole numbers, such as --{name} 64,64") from None
    if first < 1 or second < 1:
        raise ValueError(f"--{name} is {text!r}; both numbers must be at least 1")
    return first, second


def pair_from_zero(text: str) -> tuple[int, int]:
    try:
        y, x = (int(v) for v in text.split(","))
    except ValueError:
        raise ValueError(f"--at is {text!r}; write row,column of the scan, such as --at 3,10") from None
    return y, x


def quantity(text: str | None, name: str, units: tuple[str, ...]) -> tuple[float, str] | None:
    """``"2.0 nm"`` or ``"2.0"`` as a number and a unit; the first of `units` is the default."""
    if text is None:
        return None
    number, _, unit = text.strip().partition(" ")
    try:
        value = float(number)
    except ValueError:
        raise ValueError(
            f"--{name} is {text!r}; write a number and a unit, such as '0.02 {units[0]}'"
        ) from None
    if (unit or units[0]) not in units:
        raise ValueError(f"--{name} has the unit {unit!r}; known are {', '.join(units)}")
    return value, unit or units[0]
