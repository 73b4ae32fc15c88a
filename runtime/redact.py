"""Texts without what opens doors: the name and password in an URL, and its query, where tokens stand."""

import re
from collections.abc import Mapping

# Up to the @, or with a colon before it that begins no port also beyond characters that a password must not hold.
# One slash: an URL that was taken for a path.
USER = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://?)(?:[^/?#\s]*@|[^/?#\s:@]+:(?!\d+[/?#])\S*@)")
QUERY = re.compile(r"(?P<url>[A-Za-z][A-Za-z0-9+.-]*://?[^?#\s]*)\?[^#\s]*")


def redact(text: str) -> str:
    """``https://user:password@host/file.pt?token=...#sha256=...`` -> ``https://host/file.pt#sha256=...``, wherever in the text;
    what is no URL stays as it is."""
    return QUERY.sub(r"\g<url>", USER.sub(r"\g<scheme>", text))


def redact_values(flags: Mapping[str, object]) -> dict[str, object]:
    """A script's flags as they may be stored: every text, also in a list, redacted."""

    def one(value: object) -> object:
        if isinstance(value, str):
            return redact(value)
        return [one(item) for item in value] if isinstance(value, list) else value

    return {name: one(value) for name, value in flags.items()}
