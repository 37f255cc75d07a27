"""The lines of a training's progress: printed where it runs, and in its run's folder for whoever follows it."""

from __future__ import annotations

import threading
import time
from contextlib import suppress

from etl.stage.folder import Folder

PROGRESS_FILE = "progress.log"
SECONDS_BETWEEN_UPLOADS = 5.0


class Progress:
    """Takes lines of one process; call `close` behind the last.

    A local file is added to. An object cannot be: it is written anew every few seconds, off the steps' path; what a
    store does not take goes with the next.

    Args:
        prints: print each line, too.
    """

    def __init__(self, folder: Folder, prints: bool) -> None:
        self.folder, self.prints = folder, prints
        self._text = "" if folder.is_local else folder.read_text(PROGRESS_FILE) or ""
        self._written = self._text
        self._closing = threading.Event()
        self._uploads = threading.Thread(target=self._upload_at_intervals, name="progress", daemon=True)
        if not folder.is_local:
            self._uploads.start()

    def __call__(self, message: str) -> None:
        line = f"{time.strftime('%H:%M:%S')} {message}"
        if self.folder.is_local:
            self.folder.append_text(PROGRESS_FILE, line + "\n")
        else:
            self._text += line + "\n"
        if self.prints:
            print(line, flush=True)

    def close(self) -> None:
        """Write what is not written yet."""
        if self._uploads.is_alive():
            self._closing.set()
            self._uploads.join()

    def _upload_at_intervals(self) -> None:
        last = False
        while not last:
            last = self._closing.wait(SECONDS_BETWEEN_UPLOADS)
            if (text := self._text) != self._written:
                with suppress(OSError):
                    self.folder.write_text(PROGRESS_FILE, text)
                    self._written = text
