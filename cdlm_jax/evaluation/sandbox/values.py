"""Values on their way between the checker and hostile code: JSON data that arrives as new, plain objects.

So an object that claims to equal everything, or whose methods were replaced, stays behind.
"""

import builtins
import numbers
from collections.abc import Callable, Iterator, MappingView
from decimal import Decimal
from fractions import Fraction
from itertools import islice
from typing import Any

LONGEST_ITERATOR = 1 << 17  # items

# name -> (what it is for, its parts, back from the parts). Subclasses arrive as the plain type that they equal.
_PLAIN: dict[str, tuple[Any, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "bool": (bool, bool, bool),
    "int": (int, int, int),
    "float": (float, float, float),
    "str": (str, str, str),
    "list": (list, lambda value: [*value], list),
    "tuple": (tuple, lambda value: [*value], tuple),
    "dict": (dict, lambda value: [[*pair] for pair in value.items()], dict),
    "set": (set, lambda value: [*value], set),
    "frozenset": (frozenset, lambda value: [*value], frozenset),
    "bytes": ((bytes, bytearray), lambda value: value.hex(), bytes.fromhex),
    "complex": (complex, lambda value: [value.real, value.imag], lambda parts: complex(*parts)),
    "range": (range, lambda value: [value.start, value.stop, value.step], lambda parts: range(*parts)),
    "fraction": (Fraction, lambda value: [value.numerator, value.denominator], lambda parts: Fraction(*parts)),
    "decimal": (Decimal, str, Decimal),
    "integer": (numbers.Integral, int, int),  # of NumPy
    "iterator": ((Iterator, MappingView), lambda value: [*islice(value, LONGEST_ITERATOR)], iter),
}


def pack(value: Any, refer: Callable[[Any], Any]) -> Any:
    """JSON data of a value; of an object that has no plain form, what `refer` makes of it."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [pack(item, refer) for item in value]
    for name, (kind, parts, _) in _PLAIN.items():
        if isinstance(value, kind):
            return {name: pack(parts(value), refer)}
    if isinstance(value, type) and (kept := vars(builtins).get(value.__name__)) is value:
        return {"type": kept.__name__}
    if getattr(value, "shape", None) == () and hasattr(value, "item"):  # a NumPy scalar
        return pack(value.item(), refer)
    return {"object": refer(value)}


def unpack(data: Any, dereference: Callable[[Any], Any]) -> Any:
    """The inverse. Raises on data that `pack` does not make."""
    if isinstance(data, list):
        return [unpack(item, dereference) for item in data]
    if not isinstance(data, dict):
        return data
    ((name, content),) = data.items()
    if name == "object":
        return dereference(content)
    if name == "type":
        found = getattr(builtins, content)
        if not isinstance(found, type):
            raise TypeError(f"{content} is not a type")
        return found
    return _PLAIN[name][2](unpack(content, dereference))
