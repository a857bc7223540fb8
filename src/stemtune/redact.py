"""Keeps tokens out of what is shown and written."""

import logging
import re

STRUCK = "…"
TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{8,}")
NAMED = re.compile(
    r"(?i)\b([\w-]*(?:token|[_-]key|apikey|secret|password)[\"']?\s*[=:]\s*[\"']?)([^\s\"',;]{6,})"
)
BEARER = re.compile(r"(?i)\b(bearer\s+)\S{6,}")


def redacted(text: str) -> str:
    """A text without tokens of the Hub, and without what stands behind `…_token=`, `…_key=` and
    their like."""
    text = TOKEN.sub(STRUCK, text)
    text = BEARER.sub(rf"\g<1>{STRUCK}", text)
    return NAMED.sub(rf"\g<1>{STRUCK}", text)


def holds_token(text: str) -> bool:
    """Whether a token of the Hub stands in it."""
    return TOKEN.search(text) is not None


class Redacting(logging.Filter):
    """Strikes tokens out of what a handler is about to write."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Every record passes."""
        record.msg, record.args = redacted(record.getMessage()), ()
        return True
