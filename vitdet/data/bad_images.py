"""Images of a training that cannot be read: passed over up to a limit, and remembered."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from vitdet.utils.checks import fail, one_line

logger = logging.getLogger(__name__)

_MOST_NAMED = 20  # in an error; the run's folder has the whole list


class BadImages:
    """The images that could not be read so far, each counted once however often it comes.

    Args:
        limit: how many of them a process passes over.
    """

    def __init__(self, limit: int = 0) -> None:
        if limit < 0:
            fail(
                "dataloader.train.max_bad_images",
                expected="0 or more",
                got=limit,
                remedy="0 stops at the first image that cannot be read.",
            )
        self.limit = limit
        self.messages: dict[str, str] = {}  # by file name

    def add(self, found: Mapping[str, str]) -> None:
        """Log and keep what is new.

        Args:
            found: messages by file name.

        Raises:
            InputError: there are more than the limit.
        """
        for file_name, message in found.items():
            if (name := one_line(file_name)) not in self.messages:
                self.messages[name] = one_line(message)
                logger.warning("passed over bad image %d: %s", len(self.messages), message)
        self.check()

    def check(self) -> None:
        """Raise an InputError with the list when there are more than the limit."""
        if len(self.messages) <= self.limit:
            return
        shown = " ".join(f"[{each}]" for each in list(self.messages.values())[:_MOST_NAMED])
        more = " ..." if len(self.messages) > _MOST_NAMED else ""
        fail(
            "training images",
            expected=f"at most {self.limit} that cannot be read (dataloader.train.max_bad_images)",
            got=f"{len(self.messages)}: {shown}{more}",
            remedy="Repair these or take them out of the annotations, or raise the limit.",
        )
