"""Configurations: dataclasses with PEFT's fields, checked when made, and their JSON file.

A configuration is data. Reading one never imports, downloads by itself, or unpickles anything.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import itertools
import json
import numbers
import os
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

from . import registry
from .errors import CheckpointError, ConfigError, ConfigTypeError, PeftWarning, nearest, shown
from .files import CONFIG_NAME, find_config, look
from .patterns import check_pattern, in_layer_path, is_intricate

PEFT_VERSION = "0.21.2"  # the release of peft whose files and names minipeft reads and writes
LARGEST = 3.4e38  # number in a field, about that of float32
DEEPEST = 20  # levels of lists and dicts in a field


class _Open(enum.EnumMeta):
    if typing.TYPE_CHECKING:

        def __getattr__(cls, name: str) -> PeftType: ...


class PeftType(str, enum.Enum, metaclass=_Open):
    """The adapter methods, by the name that a configuration's `peft_type` holds.

    They are those of this package, and those whose configurations have been made elsewhere.
    """

    @classmethod
    def add(cls, name: str) -> PeftType:
        """The member of that name, which is made if there is none."""
        if name not in cls._member_map_:
            member = str.__new__(cls, name)
            vars(member).update(_name_=name, _value_=name, __objclass__=cls, _sort_order_=len(cls))  # as Enum does it
            type.__setattr__(cls, name, member)
            cls._member_map_[name] = cls._value2member_map_[name] = member
            cls._member_names_.append(name)
        return cls._member_map_[name]  # type: ignore[return-value]


for _name in registry.FILES:
    PeftType.add(_name)


class TaskType(str, enum.Enum):
    """What the adapted model is for; it chooses the `PeftModelFor...` class."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


@dataclass(frozen=True)
class Bound:
    """What the values of a field must satisfy beside their type, in words and as a test."""

    says: str
    holds: Callable[[Any], bool]


ABOVE_ZERO = Bound("above 0", lambda value: value > 0)
AT_LEAST_ZERO = Bound("0 or more", lambda value: value >= 0)
IN_FILE = Bound("a size of a saved tensor", lambda value: True)  # so not above the number of values in a checkpoint
Count = Annotated[int, Bound("an integer from 1 to 1000", lambda value: 0 < value <= 1000)]  # of parts made one by one
Positive = Annotated[int, Bound("a positive integer", lambda value: value > 0)]
NotNegative = Annotated[int, Bound("an integer that is not negative", lambda value: value >= 0)]
Size = Annotated[Positive, IN_FILE]
Probability = Annotated[float, Bound("at least 0 and below 1", lambda value: 0 <= value < 1)]
Fraction = Annotated[float, Bound("above 0 and below 1", lambda value: 0 < value < 1)]
Share = Annotated[float, Bound("between 0 and 1", lambda value: 0 <= value <= 1)]

CONFIGS: dict[PeftType, type[PeftConfig]] = {}  # filled as the configuration classes are defined


@dataclass
class PeftConfig:
    """What every configuration holds. Subclasses name their method: `class LoraConfig(PeftConfig, method="LORA")`.

    The annotation of a field says all that can be said of its value alone: `r: Positive`, `bias: Literal["none"]`.
    With `layers_need_list`, a regular expression for `target_modules` is refused beside layers chosen by number.

    None is no value of most fields, but saved files hold it, and PEFT takes it where it does not need a value: in a
    field that is on or off it is False, in those named by `optional` it is the default.

    Raises `ConfigTypeError` when a field has a value of the wrong type and `ConfigError` when the value cannot work.
    """

    task_type: TaskType | str | None = None
    peft_type: PeftType | str | None = None
    auto_mapping: dict | None = None  # the base model's class and library, noted at saving when there is no task_type
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    _method: typing.ClassVar[PeftType | None] = None
    is_prompt_learning: typing.ClassVar[bool] = False
    is_adaption_prompt: typing.ClassVar[bool] = False
    _layers_need_list: typing.ClassVar[bool] = False
    _optional: typing.ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(
        cls, method: str | None = None, layers_need_list: bool = False, optional: tuple[str, ...] = (), **kwargs: Any
    ):
        super().__init_subclass__(**kwargs)
        cls._layers_need_list |= layers_need_list
        cls._optional += optional
        if method is not None:
            _check_free(method, cls)
            cls._method = PeftType.add(method)
            CONFIGS[cls._method] = cls

    def __post_init__(self):
        self._replace_none()
        check_fields(self)
        cls: Any = type(self)
        for name, kind in _members(cls).items():
            if getattr(self, name) is not None:
                setattr(self, name, _member(kind, getattr(self, name), name))
        if self._method is None:
            self.peft_type = None if self.peft_type is None else _method(self.peft_type)
        elif self.peft_type not in (None, self._method):  # PEFT: without a word
            of, given = self._method.value, shown(self.peft_type)
            warnings.warn(f"{type(self).__name__} is for {of}: peft_type {given} is not used.", PeftWarning)
        self.peft_type = self._method or self.peft_type
        if self.peft_version is None:
            self.peft_version = PEFT_VERSION
        for name in ("target_modules", "exclude_modules", "feedforward_modules"):
            if isinstance(getattr(self, name, None), (list, tuple)):
                setattr(self, name, set(getattr(self, name)))
        self.check_patterns()
        if getattr(self, "layers_pattern", None) and getattr(self, "layers_to_transform", None) is None:
            raise ConfigError("`layers_pattern` says where the layer number stands; set `layers_to_transform` as well.")
        if self._layers_need_list:
            self.require_listed_targets()

    def _replace_none(self) -> None:
        cls: Any = type(self)
        kinds, sound = _types(cls), _sound_defaults(cls)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and value is not sound.get(field.name, field) and not _fits(None, kinds[field.name]):
                if field.name in self._optional:
                    make = field.default_factory
                    setattr(self, field.name, field.default if make is dataclasses.MISSING else make())
                elif _fits(False, kinds[field.name]):
                    setattr(self, field.name, False)

    def check_patterns(self) -> None:
        """Raise `ConfigError` unless each field of regular expressions holds such as can be matched."""
        for name in ("target_modules", "exclude_modules", "feedforward_modules"):
            if isinstance(pattern := getattr(self, name, None), str):
                check_pattern(pattern, name)
        for field in dataclasses.fields(self):
            if field.name.endswith("_pattern") and isinstance(keys := getattr(self, field.name), dict):
                for key in keys:
                    check_pattern(in_layer_path(key), field.name, key)
        stems = getattr(self, "layers_pattern", None) or ()
        for stem in [stems] if isinstance(stems, str) else stems:
            check_pattern(stem, "layers_pattern")
            if is_intricate(stem):
                raise ConfigError(f"`layers_pattern` {shown(stem)} must be a name or a simple regular expression.")

    def require_positive(self, *names: str) -> None:
        """Raise `ConfigError` unless each field of `names` is a whole number above 0."""
        for name in names:
            if getattr(self, name) <= 0:
                value = getattr(self, name)
                raise ConfigError(f"`{name}` should be a positive integer value but the value passed is {value}.")

    def require_one_of(self, *names: str) -> None:
        """Raise `ConfigError` unless one field of `names` is above 0 and the other is 0."""
        values = [getattr(self, name) for name in names]
        if min(values) < 0 or sum(value > 0 for value in values) != 1:
            given = ", ".join(f"{name}={value}" for name, value in zip(names, values))
            either = " or ".join(f"`{name}`" for name in names)
            raise ConfigError(f"You can only specify either {either}: one is positive and the other 0. Got {given}.")

    def require_listed_targets(self) -> None:
        """Raise `ConfigError` when layers are chosen by their number and `target_modules` is a regular expression."""
        by_layer = any(getattr(self, name) is not None for name in ("layers_to_transform", "layers_pattern"))
        if by_layer and isinstance(getattr(self, "target_modules", None), str):
            names = "`layers_to_transform` and `layers_pattern`"
            raise ConfigError(f"{names} cannot be used when `target_modules` is a str.")

    def require_probability(self, *names: str) -> None:
        """Raise `ConfigError` unless each field of `names` is at least 0 and below 1."""
        for name in names:
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"`{name}` must be at least 0 and below 1, got {getattr(self, name)}.")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, sets kept as sets."""
        return dataclasses.asdict(self)

    def to_json(self, auto_mapping: dict | None = None) -> str:
        """The text of `adapter_config.json`, keys sorted, sets as sorted lists."""
        fields = {k: sorted(v) if isinstance(v, (set, frozenset)) else v for k, v in self.to_dict().items()}
        if auto_mapping is not None:
            fields["auto_mapping"] = auto_mapping
        return json.dumps(fields, indent=2, sort_keys=True, default=os.fspath)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write `adapter_config.json` into `save_directory`, which is made when missing.

        Raises `CheckpointError` when `save_directory` is a file.
        """
        from .files import write_text

        write_text(save_directory, CONFIG_NAME, self.to_json(kwargs.get("auto_mapping_dict")))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None, **kwargs: Any
    ):
        """Read the configuration of a saved adapter: a folder, or a hub id when huggingface_hub is installed.

        `kwargs` are download options for the hub, and default values for fields that the file does not hold.
        """
        path = find_config(pretrained_model_name_or_path, subfolder, **kwargs)
        known = {field.name for field in dataclasses.fields(cls)}
        defaults = {key: value for key, value in kwargs.items() if key in known and key != "revision"}
        config = cls.from_peft_type(**{**defaults, **cls.from_json_file(path)})
        config.read_from(pretrained_model_name_or_path, subfolder, **kwargs)
        return config

    def read_from(self, model_id: str | os.PathLike, subfolder: str | None = None, **kwargs: Any) -> None:
        """A place for a method to look for what else was saved there; the arguments are those of `from_pretrained`."""

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike, **kwargs: Any) -> dict[str, Any]:
        """The fields in a JSON file, as they stand. Raises `CheckpointError` when it holds no JSON object."""
        try:
            with open(path_json_file, encoding="utf-8") as file:
                fields = json.load(file)
        except (OSError, ValueError, RecursionError) as error:
            hint = look(path_json_file, known=b"{")
            raise CheckpointError(f"{path_json_file} is not a readable JSON file: {error}.{hint}") from error
        if not isinstance(fields, dict):
            raise CheckpointError(f"{path_json_file} must hold one JSON object, but holds a {type(fields).__name__}.")
        if fields.pop("runtime_config", None) is not None:
            warnings.warn(f"`runtime_config` in {path_json_file} is ignored: it is for running only.", PeftWarning)
        return fields

    @classmethod
    def from_peft_type(cls, /, **kwargs: Any) -> PeftConfig:
        """The configuration that `kwargs["peft_type"]` names, made from `kwargs`; unknown keys: a warning."""
        if "peft_type" in kwargs:
            method = _method(kwargs["peft_type"])
            registry.load(method.value)
            cls = CONFIGS[method]
        elif cls._method is None:
            raise ConfigError("The configuration has no `peft_type`; it should name the method, for example 'LORA'.")
        known = {field.name for field in dataclasses.fields(cls) if field.init}
        unknown = sorted(set(kwargs) - known)
        if unknown and "peft_type" not in kwargs:
            fields = f"without `peft_type`, and with {shown(unknown)}"
            raise ConfigTypeError(f"This is no {cls.__name__}, or it is missing required keys: {fields}.")
        if unknown:
            of = f"for class {cls.__name__}; the file may come from another release"
            warnings.warn(f"Unexpected keyword arguments {shown(unknown)} {of}. They are ignored.", PeftWarning)
        kwargs = {key: value for key, value in kwargs.items() if key in known}
        cls.check_kwargs(**kwargs)
        return cls(**kwargs)

    @property
    def method(self) -> PeftType:
        """The method, by its `peft_type`; raises ValueError for a configuration of no method."""
        method = PeftType(self.peft_type)
        registry.load(method.value)
        return method

    @classmethod
    def check_kwargs(cls, /, **kwargs: Any) -> dict[str, Any]:
        """A place for a method to refuse files of old releases, before anything is built. Returns `kwargs`."""
        return kwargs

    @classmethod
    def _get_peft_type(cls, model_id: str | os.PathLike, **kwargs: Any) -> str | None:
        return cls.from_json_file(find_config(model_id, **kwargs)).get("peft_type")


@dataclass
class PromptLearningConfig(PeftConfig):
    """The fields of the methods that learn a prompt; sizes left None are read off the model's config."""

    num_virtual_tokens: Annotated[int, IN_FILE] | None = None
    token_dim: int | None = None  # hidden size of the model
    num_transformer_submodules: int | None = None  # 1, or 2 for an encoder and a decoder
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None

    is_prompt_learning: typing.ClassVar[bool] = True


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """The configuration object for a plain dict; `config_dict["peft_type"]` chooses the class.

    Keys that the class does not know are dropped with a warning. Raises `ConfigError` or `ConfigTypeError`.
    """
    if not isinstance(config_dict, Mapping):
        raise ConfigTypeError(f"get_peft_config needs a dict, got {type(config_dict).__name__}.")
    return PeftConfig.from_peft_type(**config_dict)


def check_config(config: Any) -> None:
    """Raise `ConfigError` unless `config` is a configuration of this package, not of peft or of another copy of it."""
    if isinstance(config, PeftConfig):
        return
    own, cls = __name__.removesuffix(".core.config"), config if isinstance(config, type) else type(config)
    got = f"peft_config must be a PeftConfig of {own}, got "
    if cls is config and issubclass(cls, PeftConfig):
        raise ConfigError(f"{got}the class {cls.__name__} itself; call it: {cls.__name__}(...).")
    if isinstance(config, Mapping):
        raise ConfigError(f"{got}a {cls.__name__}; {own}.get_peft_config makes a configuration of a dict.")
    if any(parent.__name__ == "PeftConfig" for parent in cls.__mro__):
        raise ConfigError(
            f"{got}a {_full_name(cls)}, from another package. Take {cls.__name__} from {own}, "
            f"or convert it: {own}.get_peft_config(config.to_dict())."
        )
    raise ConfigError(f"{got}{_full_name(cls)}.")


def _full_name(cls: type) -> str:
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


# ------------------------------------------------------------------------------------------------ checking of values
def check_fields(record: Any) -> None:
    """Raise `ConfigTypeError` or `ConfigError` unless each field of a dataclass holds what its annotation says.

    Whatever that is, numbers are finite and fit into 64 bits, and no value is nested deeply.
    """
    cls: Any = type(record)
    for field in dataclasses.fields(cls):
        value, kind = getattr(record, field.name), _types(cls)[field.name]
        if value is _sound_defaults(cls).get(field.name, field):
            continue
        name = f"{cls.__name__}.{field.name}"
        if fault := _unsound(value):
            raise ConfigError(f"{name} {fault}, got {shown(value)}.")
        if not _fits(value, kind):
            must = f"{name} must be {_spell(kind)}"
            if _fits(value, kind, by_type=True):
                raise ConfigError(f"{must}, got {shown(value)}.")
            raise ConfigTypeError(f"{must}, got {shown(value)} ({_full_name(type(value))}).")


def _unsound(value: Any, depth: int = 0) -> str | None:
    """What is wrong with a value whatever it is for, or None."""
    if isinstance(value, numbers.Integral):
        return None if abs(int(value)) < 2**63 else "must hold integers of at most 64 bits"
    if isinstance(value, numbers.Real):
        return None if abs(float(value)) <= LARGEST else "must hold finite numbers"
    if not isinstance(value, (dict, list, tuple, set, frozenset)):
        return None
    if depth == DEEPEST:
        return f"must not be nested more than {DEEPEST} deep"
    inside = itertools.chain(value, value.values()) if isinstance(value, dict) else value
    return next((fault for item in inside if (fault := _unsound(item, depth + 1))), None)


def _member(kind: type[enum.Enum], value: Any, field: str, more: str = "") -> Any:
    try:
        return kind(value)
    except ValueError:
        names = [member.value for member in kind]
        hint = nearest(str(value)[:100], names)
        rule = f"It must be one of {', '.join(names)}.{more}"
        raise ConfigError(f"Invalid {field} {shown(value)}.{hint} {rule}") from None


def _check_free(method: str, cls: type[PeftConfig]) -> None:
    """Raise `ConfigError` when another class has that peft_type. One that is defined again replaces itself."""
    ours = registry.FILES.get(method, cls.__module__)
    taken: Any = next((known for kind, known in CONFIGS.items() if kind == method), cls)
    once_more = (taken.__module__, taken.__qualname__) == (cls.__module__, cls.__qualname__)
    if not (once_more and cls.__module__.startswith(ours.rpartition(".")[0])):
        owner = ours if once_more else f"{taken.__module__}.{taken.__qualname__}"
        raise ConfigError(f"peft_type {method!r} is that of {owner}; give {cls.__name__} another.")


def _method(value: Any) -> PeftType:
    """The method of that name. One that another package has is imported, if its entry points say where it is."""
    if isinstance(value, str) and value not in PeftType.__members__:
        registry.load_plugin(value)
    more = " If another package defines it, import that first, or have it name an entry point of `minipeft.methods`."
    return _member(PeftType, value, "peft_type", more)


@functools.cache
def _types(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


@functools.cache
def _members(cls: Any) -> dict[str, type[enum.Enum]]:
    """The fields that hold members of an enum, which may be given by their values; other packages add to `PeftType`."""
    parts = [(name, part) for name, kind in _types(cls).items() for part in typing.get_args(kind)]
    enums = {name: part for name, part in parts if isinstance(part, type) and issubclass(part, enum.Enum)}
    return {name: kind for name, kind in enums.items() if name != "peft_type"}


@functools.cache
def _sound_defaults(cls: Any) -> dict[str, Any]:
    """The defaults of fields that are what their annotations say. (Others stand for what must be given.)"""
    given = {field.name: field.default for field in dataclasses.fields(cls)}
    return {name: default for name, default in given.items() if _fits(default, _types(cls)[name])}


def _fits(value: Any, kind: Any, by_type: bool = False) -> bool:
    """Whether `value` may stand where the annotation `kind` is; ints serve as floats, tuples and sets as lists.

    `by_type`: also if it is none of the values that a `Literal` lists, or breaks a `Bound`.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    fits = functools.partial(_fits, by_type=by_type)
    if kind is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is Literal:
        return any(isinstance(value, type(arg)) for arg in args) if by_type else value in args
    if origin is Annotated:
        return fits(value, args[0]) and (by_type or all(bound.holds(value) for bound in args[1:]))
    if origin is list:
        return isinstance(value, (list, tuple, set, frozenset)) and all(fits(v, args[0]) for v in value)
    if origin is tuple:  # JSON has lists only
        return isinstance(value, (list, tuple)) and len(value) == len(args) and all(map(fits, value, args))
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, args[0]) and fits(v, args[1]) for k, v in value.items())
    if kind is bool:
        return isinstance(value, bool)
    if kind is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool)
    return isinstance(value, kind)


def sizes(config: Any) -> Iterator[tuple[str, int]]:
    """(field, value) of every field that is the size of a tensor which a checkpoint holds."""
    cls: Any = type(config)
    yield from ((name, value) for name in _size_fields(cls) if (value := getattr(config, name)) is not None)


@functools.cache
def _size_fields(cls: Any) -> list[str]:
    kinds = {name: (kind, *typing.get_args(kind)) for name, kind in _types(cls).items()}
    return [name for name, parts in kinds.items() if any(IN_FILE in getattr(p, "__metadata__", ()) for p in parts)]


def _spell(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_spell, args))
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin is Annotated:
        return args[1].says if args[1] is not IN_FILE else _spell(args[0])
    if args:
        return f"{origin.__name__}[{', '.join(map(_spell, args))}]"
    return "None" if kind is type(None) else getattr(kind, "__name__", str(kind))
