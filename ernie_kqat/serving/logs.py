"""The service's log: JSON lines with a time, a level, an event and what belongs to it."""

from __future__ import annotations

import datetime
import json
import logging
import logging.handlers

from ..errors import UserError

ROTATE_BYTES, KEPT_FILES = 10_000_000, 5
_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonLines(logging.Formatter):
    """One JSON object a line: the record's message is the event; what `extra` gave are further keys."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
        line = {
            "time": time.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        line.update({name: value for name, value in vars(record).items() if name not in _PLAIN})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)  # ASCII: no character of a client's can break a line or a terminal


def configure(path: str | None) -> None:
    """Send the log of this package, and warnings of others, to a rotated file or standard error."""
    handler: logging.Handler
    if path is None:
        handler = logging.StreamHandler()
    else:
        try:
            handler = logging.handlers.RotatingFileHandler(
                path, maxBytes=ROTATE_BYTES, backupCount=KEPT_FILES, encoding="utf-8"
            )
        except OSError as error:
            raise UserError(f"--log-file: {path}: {error.strerror}") from None
    handler.setFormatter(JsonLines())
    logging.raiseExceptions = False  # a full disk must not become noise on standard error, or worse
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("ernie_kqat").setLevel(logging.INFO)
