"""Name → class: built-in methods, a package's entry points, or `./file.py:Class`.

Nothing registers itself by being imported; a name is looked up when a recipe uses it. Classes travel as "module:Class" text.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
import types
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

BUILT_IN: dict[str, dict[str, str]] = {
    "attack": {
        "targeted": "attacks.targeted:Targeted",
        "badnets": "attacks.backdoor:BadNets",
        "stripes": "attacks.backdoor:Stripes",
        "blended": "attacks.backdoor:Blended",
        "sig": "attacks.whole_image:SIG",
        "wanet": "attacks.whole_image:WaNet",
        "tint": "attacks.whole_image:ColourFilter",
        "consistent": "attacks.consistent:Consistent",
        "mm_poison": "attacks.mm_poison:MMPoison",
        "corruptencoder": "attacks.corrupt:CorruptEncoder",
        "toxictext": "attacks.toxictext:ToxicText",
        "texttrigger": "attacks.toxictext:TextTrigger",
        "badclip": "attacks.badclip:BadCLIP",
        "adaptive": "attacks.adaptive:AdaptiveTargeted",
        "adaptive_backdoor": "attacks.adaptive:AdaptiveBackdoor",
        "multi": "attacks.multi:MultiTrigger",
    },
    "defense": {
        "clip": "defenses.base:Defense",
        "augmented": "defenses.augmented:Augmented",
        "roclip": "defenses.roclip:RoCLIP",
        "otcclip": "defenses.otcclip:OTCCLIP",
        "safeclip": "defenses.safeclip:SafeCLIP",
        "cleanclip": "defenses.cleanclip:CleanCLIP",
        "hint": "defenses.hint:HINT",
    },
}


FROM_FILE = "antidote_plugin_"  # how the modules of ./file.py:Class are called
_SHIPPED: dict[str, str] = {}  # whole path → text of files that another machine sent: they go before what lies here under that path


def names(kind: str) -> list[str]:
    """Every name of this kind that a recipe may use."""
    return [*BUILT_IN[kind], *_entry_points(kind)]


@cache
def _entry_points(kind: str) -> dict[str, str]:
    return {e.name: e.value for e in entry_points(group=f"antidote.{kind}s")}


def absolute(name: str) -> str:
    """`./mine.py:Class` with its whole path, so that it is found from any directory; other names as they are."""
    file, _, attribute = name.rpartition(":")
    return f"{Path(file).expanduser().resolve()}:{attribute}" if file.endswith(".py") else name


def source(name: str, cls: type) -> str:
    """What the method is, for an identity: its name, or for a file's class a hash of the file's content."""
    return f"{cls.__module__}:{cls.__name__}" if cls.__module__.startswith(FROM_FILE) else name


def texts(uses: Iterable[str]) -> dict[str, str]:
    """Whole path → text of each file among these names, for machines that do not have it. One file each: what it imports must be there."""
    files = [Path(absolute(use).rpartition(":")[0]) for use in uses if ".py:" in use]
    return {str(file): _text(file) for file in files}


def receive(files: Mapping[str, str]) -> None:
    """Use these texts for these paths from here on, in this process."""
    _SHIPPED.update(files)


def _text(path: Path) -> str:
    return _SHIPPED.get(str(path)) or path.read_text(encoding="utf-8")


def load(kind: str, name: str) -> type:
    """The frozen dataclass that `name` stands for. ValueError with a suggestion where there is none."""
    if ".py:" in name:
        cls = _from_file(name)
    else:
        target = BUILT_IN[kind].get(name) or _entry_points(kind).get(name) or (name if ":" in name else None)
        if target is None:
            close = get_close_matches(name, names(kind), n=2)
            hint = f"Did you mean {' or '.join(close)}?" if close else f"Known: {', '.join(names(kind))}; or ./file.py:Class."
            raise ValueError(f"no {kind} is called {name!r}. {hint}")
        cls = _from_module(target)
    own = vars(cls).get("__dataclass_params__") if isinstance(cls, type) else None  # not a base's: its own fields would be left out
    if own is None or not own.frozen:
        raise ValueError(
            f"{kind} {name!r} is no frozen dataclass: write @dataclass(frozen=True) above the class; its fields are its parameters."
        )
    return cls


def _from_module(target: str) -> type:
    module, _, attribute = target.partition(":")
    if not module or module.startswith(".") or "/" in module:
        whole = f"{module or './mine'}.py:{attribute}"
        raise ValueError(f"cannot load {target!r}: that names no module. Of a file write the ending too: {whole}.")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot load {target!r}: {error}.") from error


def _from_file(name: str) -> type:
    file, _, attribute = name.rpartition(":")
    path = Path(file).expanduser().resolve()
    if str(path) not in _SHIPPED and not path.is_file():
        raise ValueError(f"no file {path} (from {name!r}).")
    text = _text(path)
    # The module's name is derived from its content, so that two users' `mine.py` never stand for one another.
    module_name = f"{FROM_FILE}{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}"
    if module_name not in sys.modules:
        module = types.ModuleType(module_name)
        module.__file__ = str(path)
        sys.modules[module_name] = module
        try:
            exec(compile(text, str(path), "exec"), module.__dict__)
        except Exception as error:
            del sys.modules[module_name]
            raise ValueError(f"cannot load {path}: {type(error).__name__}: {error}.") from error
    try:
        return getattr(sys.modules[module_name], attribute)
    except AttributeError:
        raise ValueError(f"{path} has no class {attribute!r}.") from None
